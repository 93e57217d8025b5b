//! Sealing of files with AES-256-GCM.
//!
//! Each file has a key of its own, derived by HKDF-SHA256 (RFC 5869) from the node's data key and
//! 32 random bytes in the file's header. Nonces count up from 0, which authenticates the header.
//!
//! # Invariants
//!
//! - A nonce is used once under a key: a file is written by one writer from its first byte on,
//!   and nothing is ever appended to a file that was opened for reading.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom as _, SystemRandom};

/// Random bytes in the header of a sealed file.
pub(crate) const SALT_LENGTH: usize = 32;
/// Bytes that sealing adds.
pub(crate) const TAG_LENGTH: usize = 16;
/// The counter that authenticates a file's header; frames start behind it.
pub(crate) const HEADER_COUNTER: u64 = 0;

/// The key that a node's Raft files are sealed with. Kept in the header of the node's TLS key.
#[derive(Clone, PartialEq, Eq)]
pub struct DataKey {
    id: u32,
    secret: [u8; 32],
}

impl DataKey {
    /// A key; `id` is stored in every frame and tells a rotated key from a foreign one.
    pub fn new(id: u32, secret: [u8; 32]) -> Self {
        Self { id, secret }
    }

    /// The number stored with all that this key seals.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The key of one file.
    pub(crate) fn file_key(&self, salt: &[u8; SALT_LENGTH], purpose: &'static str) -> FileKey {
        let secret = Salt::new(HKDF_SHA256, salt).extract(&self.secret);
        let info = [purpose.as_bytes()];
        let output = secret.expand(&info, &AES_256_GCM).expect("32 bytes are within HKDF's limit");
        FileKey(LessSafeKey::new(UnboundKey::from(output)))
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataKey {{ id: {} }}", self.id)
    }
}

/// A file's sealed content does not authenticate: it was changed, or sealed with another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forged;

/// The key of one file.
pub(crate) struct FileKey(LessSafeKey);

impl fmt::Debug for FileKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FileKey")
    }
}

impl FileKey {
    /// Seals `bytes[from..]` in place and appends the tag.
    pub(crate) fn seal(&self, counter: u64, aad: &[u8], bytes: &mut Vec<u8>, from: usize) {
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce(counter), Aad::from(aad), &mut bytes[from..])
            .expect("a frame is far below the limit of AES-GCM, 64 GiB");
        bytes.extend_from_slice(tag.as_ref());
    }

    /// Opens sealed bytes with the tag at their end.
    pub(crate) fn open(&self, counter: u64, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Forged> {
        let mut bytes = sealed.to_vec();
        let plain = self.0.open_in_place(nonce(counter), Aad::from(aad), &mut bytes);
        let length = plain.map_err(|_| Forged)?.len();
        bytes.truncate(length);
        Ok(bytes)
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Fresh random bytes for a file's header.
pub(crate) fn new_salt() -> [u8; SALT_LENGTH] {
    let mut salt = [0; SALT_LENGTH];
    SystemRandom::new().fill(&mut salt).expect("the kernel gives random bytes");
    salt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_only_with_key_salt_purpose_counter_and_context() {
        let data = DataKey::new(1, [7; 32]);
        let (salt, other_salt) = (new_salt(), new_salt());
        let key = data.file_key(&salt, "a");
        let mut sealed = b"head".to_vec();
        sealed.extend_from_slice(b"secret");
        key.seal(5, b"context", &mut sealed, 4);
        let body = &sealed[4..];
        assert_eq!(key.open(5, b"context", body).unwrap(), b"secret");
        assert!(!body.windows(6).any(|window| window == b"secret"));
        assert_eq!(key.open(6, b"context", body), Err(Forged));
        assert_eq!(key.open(5, b"other", body), Err(Forged));
        assert_eq!(data.file_key(&other_salt, "a").open(5, b"context", body), Err(Forged));
        assert_eq!(data.file_key(&salt, "b").open(5, b"context", body), Err(Forged));
        let foreign = DataKey::new(1, [8; 32]);
        assert_eq!(foreign.file_key(&salt, "a").open(5, b"context", body), Err(Forged));
    }
}
