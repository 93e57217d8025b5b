//! Tables by id for what is asked most often.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Hashes an id: random bits already, so that folding them is enough, and a multiplication for the small
/// ids of tests. Nobody outside chooses ids, so no others are to be feared.
#[derive(Debug, Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write_u128(&mut self, id: u128) {
        let folded = (id >> 64) as u64 ^ id as u64;
        self.0 = folded.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u128(u128::from(self.0) << 8 | u128::from(*byte));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A table that is asked by id, and never in its order, which is none.
pub(crate) type ById<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;
