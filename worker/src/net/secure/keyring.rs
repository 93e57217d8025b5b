//! The node's own key pairs, which never leave it: one, and two while it changes to a new one.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::x25519;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use skep_common::Timestamp;
use skep_common::wireguard::{PublicKey, SLOTS, WireguardKey, WireguardKeys, port};
use skep_runtime::clock;
use tokio::sync::watch;

use crate::net::Error;

/// The file in the node's data directory.
const FILE: &str = "wireguard.json";

/// A private key, which no text shows.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey([u8; 32]);

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey")
    }
}

impl PrivateKey {
    /// A new one.
    pub(super) fn new() -> Result<Self, Error> {
        let mut bytes = [0; 32];
        let filled = SystemRandom::new().fill(&mut bytes);
        filled.map_err(|_| Error::kernel("make a key", io::Error::other("no random numbers")))?;
        Ok(Self(bytes))
    }

    /// For the library that uses it.
    pub(super) fn secret(&self) -> x25519::StaticSecret {
        x25519::StaticSecret::from(self.0)
    }

    /// Its other half.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519::PublicKey::from(&self.secret()).to_bytes())
    }
}

/// A key pair by its private half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The private key.
    pub key: PrivateKey,
    /// When it was made.
    pub made: Timestamp,
}

/// The key pairs of a node, by slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pairs {
    /// The slot that others are to send to.
    pub current: u8,
    /// The pairs.
    pub keys: BTreeMap<u8, Pair>,
    /// When the current slot became that.
    pub switched: Timestamp,
}

impl Pairs {
    /// What other nodes are told.
    pub fn public(&self) -> WireguardKeys {
        let keys = self.keys.iter().map(|(slot, pair)| WireguardKey {
            slot: *slot,
            public_key: pair.key.public(),
            port: port(*slot),
        });
        WireguardKeys { current: self.current, keys: keys.collect() }
    }
}

/// The file's content.
#[derive(Serialize, Deserialize)]
struct Stored {
    current: u8,
    switched: Timestamp,
    /// By slot.
    keys: BTreeMap<u8, StoredPair>,
}

#[derive(Serialize, Deserialize)]
struct StoredPair {
    /// In Base64.
    private: String,
    made: Timestamp,
}

/// The key pairs of this node and the file that keeps them. Clones of its watch follow changes.
#[derive(Debug)]
pub struct Keyring {
    path: PathBuf,
    pairs: watch::Sender<Pairs>,
}

impl Keyring {
    /// Reads the key pairs in a data directory; makes one where there is none.
    pub fn open(data_dir: &Path) -> Result<Self, Error> {
        let path = data_dir.join(FILE);
        let pairs = match fs::read(&path) {
            Ok(text) => read(&text).map_err(|error| Error::file("read", &path, error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (key, made) = (PrivateKey::new()?, clock::now());
                let keys = BTreeMap::from([(0, Pair { key, made })]);
                let pairs = Pairs { current: 0, keys, switched: made };
                write(&path, &pairs)?;
                pairs
            }
            Err(error) => return Err(Error::file("read", &path, error)),
        };
        Ok(Self { path, pairs: watch::Sender::new(pairs) })
    }

    /// Deletes the key pairs in a data directory, of a node that leaves its swarm; fine if there are none.
    pub fn remove(data_dir: &Path) -> Result<(), Error> {
        let path = data_dir.join(FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::file("remove", path, error))
            }
            _ => Ok(()),
        }
    }

    /// The pairs at this moment.
    pub fn pairs(&self) -> Pairs {
        self.pairs.borrow().clone()
    }

    /// Follows the pairs.
    pub fn watch(&self) -> watch::Receiver<Pairs> {
        self.pairs.subscribe()
    }

    /// Makes a pair in the other slot, beside the current one; nothing is sent to it yet. Nothing to do
    /// where there is one already.
    pub fn begin_rotation(&self, now: Timestamp) -> Result<(), Error> {
        let mut pairs = self.pairs();
        let other = (pairs.current + 1) % SLOTS;
        if pairs.keys.contains_key(&other) {
            return Ok(());
        }
        pairs.keys.insert(other, Pair { key: PrivateKey::new()?, made: now });
        self.put(pairs)
    }

    /// Makes the pair of the other slot the current one, where there is one.
    pub fn switch(&self, now: Timestamp) -> Result<(), Error> {
        let mut pairs = self.pairs();
        let other = (pairs.current + 1) % SLOTS;
        if !pairs.keys.contains_key(&other) {
            return Ok(());
        }
        (pairs.current, pairs.switched) = (other, now);
        self.put(pairs)
    }

    /// Forgets every pair but the current one.
    pub fn end_rotation(&self) -> Result<(), Error> {
        let mut pairs = self.pairs();
        let current = pairs.current;
        pairs.keys.retain(|slot, _| *slot == current);
        self.put(pairs)
    }

    fn put(&self, pairs: Pairs) -> Result<(), Error> {
        if *self.pairs.borrow() == pairs {
            return Ok(());
        }
        write(&self.path, &pairs)?;
        self.pairs.send_replace(pairs);
        Ok(())
    }
}

fn read(text: &[u8]) -> io::Result<Pairs> {
    let stored: Stored = serde_json::from_slice(text)?;
    let pair = |(slot, pair): (u8, StoredPair)| {
        let bytes = STANDARD.decode(pair.private).ok().and_then(|bytes| bytes.try_into().ok());
        let bytes = bytes.ok_or_else(|| io::Error::other("a key is not 32 bytes in Base64"))?;
        Ok((slot, Pair { key: PrivateKey(bytes), made: pair.made }))
    };
    let keys: BTreeMap<u8, Pair> = stored.keys.into_iter().map(pair).collect::<io::Result<_>>()?;
    if !keys.contains_key(&stored.current) || keys.keys().any(|slot| *slot >= SLOTS) {
        return Err(io::Error::other("its keys are not those of its slots"));
    }
    Ok(Pairs { current: stored.current, keys, switched: stored.switched })
}

/// Replaces the file whole: written beside it, synced, renamed.
fn write(path: &Path, pairs: &Pairs) -> Result<(), Error> {
    let pair = |pair: &Pair| StoredPair { private: STANDARD.encode(pair.key.0), made: pair.made };
    let keys = pairs.keys.iter().map(|(slot, one)| (*slot, pair(one))).collect();
    let stored = Stored { current: pairs.current, switched: pairs.switched, keys };
    let text = serde_json::to_vec(&stored).expect("numbers and texts have no failing parts");
    let beside = path.with_extension("tmp");
    let write = || {
        let mut options = fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&beside)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|error| Error::file("write", path, error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keys_are_kept_for_their_owner_alone_and_change_one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let keyring = Keyring::open(dir.path()).unwrap();
        let first = keyring.pairs();
        let path = dir.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Keyring::open(dir.path()).unwrap().pairs(), first, "a new daemon has the same");
        assert!(!format!("{keyring:?}").contains(&STANDARD.encode(first.keys[&0].key.0)));

        let now = Timestamp::from_secs(i64::MAX / 2_000_000_000);
        keyring.switch(now).unwrap();
        assert_eq!(keyring.pairs(), first, "there is nothing to change to");
        keyring.begin_rotation(now).unwrap();
        let both = keyring.pairs();
        keyring.begin_rotation(now).unwrap();
        assert_eq!(keyring.pairs(), both, "it has begun");
        assert_eq!((both.current, both.keys.len()), (0, 2));
        assert_eq!(both.keys[&0], first.keys[&0]);
        keyring.switch(now).unwrap();
        assert_eq!(keyring.pairs().current, 1);
        keyring.end_rotation().unwrap();
        let last = Keyring::open(dir.path()).unwrap().pairs();
        assert_eq!((last.current, last.keys.len(), last.switched), (1, 1, now));
        assert_eq!(last.public().keys[0].port, 4791);
        assert_ne!(last.public().keys[0].public_key, first.public().keys[0].public_key);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let good = r#"{"current":0,"switched":"1970-01-01T00:00:00Z","keys":{"0":
            {"private":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","made":"1970-01-01T00:00:00Z"}}}"#;
        fs::write(&path, good).unwrap();
        assert_eq!(Keyring::open(dir.path()).unwrap().pairs().keys.len(), 1);
        for (part, bad) in
            [("AAAA=", "AA="), ("\"current\":0", "\"current\":1"), ("\"0\"", "\"2\"")]
        {
            let text = good.replace(part, bad);
            fs::write(&path, &text).unwrap();
            assert!(Keyring::open(dir.path()).is_err(), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
