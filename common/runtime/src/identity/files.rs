//! A node's identity on disk: `certificates/` in the data directory, 0700, files 0600.
//!
//! The key file begins with the data key that seals this manager's log, so that sealing one file, where
//! managers start locked, protects both.
//!
//! # Invariants
//!
//! - A manager's key file is sealed with the newest unlock key that this node has heard of; an older one,
//!   read back from the log, never replaces it.
//! - A worker's key file is in clear.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ring::rand::SecureRandom as _;

use skep_common::spec::NodeRole;

use super::{Credentials, Error, Subject, UnlockKey};

const KEY_ID_HEADER: &str = "Raft-Key-Id: ";
const KEY_HEADER: &str = "Raft-Key: ";
/// How many changes of the swarm's unlock key the file has seen.
const LOCK_HEADER: &str = "Unlock-Key-Version: ";
/// All the rest of the file, sealed with the unlock key.
const SEALED_HEADER: &str = "Sealed: ";

/// The key that seals the Raft log and its snapshots.
#[derive(Clone, PartialEq, Eq)]
pub struct RaftKey {
    /// Names the key in every frame that it sealed.
    pub id: u32,
    /// 256 bits.
    pub key: [u8; 32],
}

impl std::fmt::Debug for RaftKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RaftKey({})", self.id)
    }
}

impl RaftKey {
    /// Draws a new key.
    pub fn generate() -> Self {
        let mut key = [0u8; 32];
        ring::rand::SystemRandom::new().fill(&mut key).expect("the kernel gives random bytes");
        Self { id: 1, key }
    }
}

/// What the key file of a manager is sealed with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lock {
    /// Counts the changes of the swarm's unlock key: only a newer one replaces another.
    pub version: u64,
    /// `None`: the file is in clear.
    pub key: Option<UnlockKey>,
}

/// What is stored of a node's identity.
#[derive(Debug)]
pub enum Stored {
    /// This node is in no swarm.
    Nothing,
    /// All of it.
    Open(Box<Credentials>, RaftKey),
    /// The key file is sealed, with a key that is not known here.
    Locked(Subject),
}

/// The directory with a node's certificate, key and root. Clones are the same, and know the same unlock key.
#[derive(Debug, Clone)]
pub struct Files {
    directory: PathBuf,
    /// Held by whoever writes the key file.
    lock: Arc<Mutex<Lock>>,
}

impl Files {
    /// The identity below a data directory.
    pub fn in_data_dir(data_dir: &Path) -> Self {
        Self { directory: data_dir.join("certificates"), lock: Arc::default() }
    }

    /// What is stored, as far as it can be read with the unlock key that is known here.
    pub fn load(&self) -> Result<Stored, Error> {
        if !self.certificate().exists() {
            return Ok(Stored::Nothing);
        }
        let mut lock = self.lock.lock().expect(NOT_POISONED);
        let certificate_pem = read(&self.certificate())?;
        let Some(key_file) = self.open_key_file(&mut lock)? else {
            let subject = Subject::of_der(&super::pem_to_der("certificate", &certificate_pem)?)?;
            return Ok(Stored::Locked(subject));
        };
        let raft_key = parse_raft_key(&key_file).ok_or_else(|| {
            let why = "it has no Raft-Key-Id and Raft-Key lines before the PEM block; restore it from a backup, or leave and join again";
            Error::invalid("certificates/swarm-node.key", why)
        })?;
        let credentials = Credentials {
            certificate_pem,
            key_pem: key_file[key_file.find("-----BEGIN").unwrap_or(0)..].to_owned(),
            root_pem: read(&self.root())?,
        };
        Ok(Stored::Open(Box::new(credentials), raft_key))
    }

    /// The key file in clear, and the lock that it has; `None` where it is sealed with another key.
    fn open_key_file(&self, lock: &mut Lock) -> Result<Option<String>, Error> {
        let text = read(&self.key())?;
        let Some((version, sealed)) = parse_sealed(&text) else {
            let version = header(&text, LOCK_HEADER).and_then(|version| version.parse().ok());
            *lock = Lock { version: version.unwrap_or(0), key: None };
            return Ok(Some(text));
        };
        let plain = lock.key.as_ref().and_then(|key| key.open(&sealed));
        lock.version = version;
        Ok(plain.and_then(|plain| String::from_utf8(plain).ok()))
    }

    /// Opens a sealed key file with this key from now on; false where it was sealed with another one.
    pub fn unlock(&self, key: UnlockKey) -> Result<bool, Error> {
        let mut lock = self.lock.lock().expect(NOT_POISONED);
        let Some((version, sealed)) = parse_sealed(&read(&self.key())?) else { return Ok(true) };
        let is_right = key.open(&sealed).is_some();
        if is_right {
            *lock = Lock { version, key: Some(key) };
        }
        Ok(is_right)
    }

    /// Seals the key file with another key, or no more, where that is news. The key file must be open.
    pub fn relock(&self, wanted: Lock) -> Result<(), Error> {
        let mut lock = self.lock.lock().expect(NOT_POISONED);
        if wanted.version <= lock.version {
            return Ok(());
        }
        if let Some(text) = self.open_key_file(&mut lock)? {
            self.write_key_file(&wanted, &text)?;
            *lock = wanted;
        }
        Ok(())
    }

    /// The version of the unlock key that the key file has.
    pub fn lock_version(&self) -> u64 {
        self.lock.lock().expect(NOT_POISONED).version
    }

    fn write_key_file(&self, lock: &Lock, text: &str) -> Result<(), Error> {
        // An earlier version of the lock is no part of what is sealed or kept.
        let body = text.lines().filter(|line| !line.starts_with(LOCK_HEADER));
        let body: String = body.flat_map(|line| [line, "\n"]).collect();
        let version = lock.version;
        let text = match &lock.key {
            None if version == 0 => body,
            None => format!("{LOCK_HEADER}{version}\n{body}"),
            Some(key) => {
                let sealed = to_hex(&key.seal(body.as_bytes()));
                format!("{LOCK_HEADER}{version}\n{SEALED_HEADER}{sealed}\n")
            }
        };
        replace(&self.key(), &text)
    }

    /// Stores all of it; the certificate last, since its presence means that the rest is there. A worker's
    /// key file is in clear.
    pub fn store(&self, credentials: &Credentials, raft_key: &RaftKey) -> Result<(), Error> {
        let wrap = |source| Error::File { verb: "make", path: self.directory.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).map_err(wrap)?;
        let mut lock = self.lock.lock().expect(NOT_POISONED);
        if credentials.subject()?.role == NodeRole::Worker {
            *lock = Lock::default();
        }
        let (id, hex) = (raft_key.id, to_hex(&raft_key.key));
        let key = format!("{KEY_ID_HEADER}{id}\n{KEY_HEADER}{hex}\n{}", credentials.key_pem);
        self.write_key_file(&lock, &key)?;
        replace(&self.root(), &credentials.root_pem)?;
        replace(&self.certificate(), &credentials.certificate_pem)
    }

    /// Forgets the identity, certificate first.
    pub fn remove(&self) -> Result<(), Error> {
        *self.lock.lock().expect(NOT_POISONED) = Lock::default();
        for path in [self.certificate(), self.key(), self.root()] {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::File { verb: "remove", path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn certificate(&self) -> PathBuf {
        self.directory.join("swarm-node.crt")
    }

    fn key(&self) -> PathBuf {
        self.directory.join("swarm-node.key")
    }

    fn root(&self) -> PathBuf {
        self.directory.join("swarm-root-ca.crt")
    }
}

const NOT_POISONED: &str = "nothing panics while it holds the key file";

fn header<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(prefix))
}

fn parse_raft_key(text: &str) -> Option<RaftKey> {
    let id = header(text, KEY_ID_HEADER)?.parse().ok()?;
    let key = from_hex(header(text, KEY_HEADER)?)?.try_into().ok()?;
    Some(RaftKey { id, key })
}

/// The version and the sealed bytes of a sealed key file.
fn parse_sealed(text: &str) -> Option<(u64, Vec<u8>)> {
    let version = header(text, LOCK_HEADER)?.parse().ok()?;
    Some((version, from_hex(header(text, SEALED_HEADER)?)?))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    let pairs = (0..text.len()).step_by(2);
    pairs.map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::File {
        verb: "read",
        path: path.into(),
        source,
    })
}

/// Replaces a file whole, durably: written beside it, synced, renamed.
fn replace(path: &Path, text: &str) -> Result<(), Error> {
    let wrap = |source| Error::File { verb: "write", path: path.into(), source };
    let beside = path.with_extension("tmp");
    let mut options = fs::OpenOptions::new();
    let mut file =
        options.write(true).create(true).truncate(true).mode(0o600).open(&beside).map_err(wrap)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(wrap)?;
    fs::rename(&beside, path).map_err(wrap)?;
    let directory = path.parent().expect("an identity file has a directory");
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(wrap)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use skep_common::{ClusterId, NodeId, Timestamp};

    use super::super::{Authority, Csr};
    use super::*;

    fn credentials(role: NodeRole) -> Credentials {
        let now = Timestamp::from_secs(1_800_000_000);
        let (authority, csr) = (Authority::generate(now).unwrap(), Csr::generate().unwrap());
        let (node, cluster, life) = (NodeId(7), ClusterId(8), Duration::from_secs(3600));
        Credentials {
            certificate_pem: authority.sign(&csr.csr_pem, node, role, cluster, now, life).unwrap(),
            key_pem: csr.key_pem,
            root_pem: authority.root_pem().to_owned(),
        }
    }

    /// `open`, `locked` or `nothing`, as another process finds it.
    fn found(directory: &Path) -> &'static str {
        match Files::in_data_dir(directory).load().unwrap() {
            Stored::Nothing => "nothing",
            Stored::Open(..) => "open",
            Stored::Locked(subject) => {
                assert_eq!(subject.node_id, NodeId(7));
                "locked"
            }
        }
    }

    fn lock(version: u64, key: Option<&UnlockKey>) -> Lock {
        Lock { version, key: key.cloned() }
    }

    #[test]
    fn a_managers_key_file_is_sealed_with_the_newest_key() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::in_data_dir(directory.path());
        let (held, raft_key) = (credentials(NodeRole::Manager), RaftKey::generate());
        assert_eq!(found(directory.path()), "nothing");
        files.store(&held, &raft_key).unwrap();
        assert_eq!(found(directory.path()), "open");

        let (first, second) = (UnlockKey::generate(), UnlockKey::generate());
        files.relock(lock(2, Some(&second))).unwrap();
        files.relock(lock(1, Some(&first))).unwrap();
        files.store(&held, &raft_key).unwrap();
        let text = fs::read_to_string(files.key()).unwrap();
        assert!(!text.contains("BEGIN") && !text.contains("Raft-Key"), "{text}");
        assert_eq!(found(directory.path()), "locked");

        let other = Files::in_data_dir(directory.path());
        assert!(!other.unlock(first).unwrap(), "it was sealed with the second one");
        assert!(other.unlock(second).unwrap());
        let Stored::Open(read, key) = other.load().unwrap() else { panic!("it is open") };
        assert_eq!(
            (&read.key_pem, key, other.lock_version()),
            (&held.key_pem, raft_key.clone(), 2)
        );

        other.relock(lock(3, None)).unwrap();
        assert_eq!(found(directory.path()), "open");
        other.relock(lock(2, Some(&UnlockKey::generate()))).unwrap();
        assert_eq!((found(directory.path()), other.lock_version()), ("open", 3));
    }

    #[test]
    fn a_worker_is_never_locked() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::in_data_dir(directory.path());
        let raft_key = RaftKey::generate();
        files.store(&credentials(NodeRole::Manager), &raft_key).unwrap();
        files.relock(lock(1, Some(&UnlockKey::generate()))).unwrap();
        files.store(&credentials(NodeRole::Worker), &raft_key).unwrap();
        assert_eq!(found(directory.path()), "open");
    }

    /// Made with the key of 32 bytes 7: what managers of this version have on their disks.
    #[test]
    fn a_sealed_key_file_still_opens() {
        let key = UnlockKey::from_bytes(&[7; 32]).unwrap();
        let sealed = to_hex(&key.seal_salted([9; 32], b"Raft-Key-Id: 1\n"));
        assert_eq!(sealed, GOLDEN);
        let file = format!("Unlock-Key-Version: 5\nSealed: {GOLDEN}\n");
        let (version, sealed) = parse_sealed(&file).unwrap();
        assert_eq!((version, key.open(&sealed).unwrap()), (5, b"Raft-Key-Id: 1\n".to_vec()));
    }

    const GOLDEN: &str = "09090909090909090909090909090909090909090909090909090909090909098645b94101980c055b5091f633a27c99d45074eb98bfbd6854b7b59f4dbb8e";
}
