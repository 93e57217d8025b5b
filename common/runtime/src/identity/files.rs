//! A node's identity on disk: `certificates/` in the data directory, 0700, files 0600.
//!
//! The key file begins with the data key that seals this manager's log, so that wrapping one file
//! (autolock) protects both.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ring::rand::SecureRandom as _;

use super::{Credentials, Error};

const KEY_ID_HEADER: &str = "Raft-Key-Id: ";
const KEY_HEADER: &str = "Raft-Key: ";

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

/// The directory with a node's certificate, key and root.
#[derive(Debug, Clone)]
pub struct Files {
    directory: PathBuf,
}

impl Files {
    /// The identity below a data directory.
    pub fn in_data_dir(data_dir: &Path) -> Self {
        Self { directory: data_dir.join("certificates") }
    }

    /// What is stored; `None` where this node is in no swarm.
    pub fn load(&self) -> Result<Option<(Credentials, RaftKey)>, Error> {
        if !self.certificate().exists() {
            return Ok(None);
        }
        let key_file = read(&self.key())?;
        let raft_key = parse_raft_key(&key_file).ok_or_else(|| {
            let why = "it has no Raft-Key-Id and Raft-Key lines before the PEM block; restore it from a backup, or leave and join again";
            Error::invalid("certificates/swarm-node.key", why)
        })?;
        let credentials = Credentials {
            certificate_pem: read(&self.certificate())?,
            key_pem: key_file[key_file.find("-----BEGIN").unwrap_or(0)..].to_owned(),
            root_pem: read(&self.root())?,
        };
        Ok(Some((credentials, raft_key)))
    }

    /// Stores all of it; the certificate last, since its presence means that the rest is there.
    pub fn store(&self, credentials: &Credentials, raft_key: &RaftKey) -> Result<(), Error> {
        let wrap = |source| Error::File { verb: "make", path: self.directory.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).map_err(wrap)?;
        let hex: String = raft_key.key.iter().map(|byte| format!("{byte:02x}")).collect();
        let id = raft_key.id;
        let key = format!("{KEY_ID_HEADER}{id}\n{KEY_HEADER}{hex}\n{}", credentials.key_pem);
        replace(&self.key(), &key)?;
        replace(&self.root(), &credentials.root_pem)?;
        replace(&self.certificate(), &credentials.certificate_pem)
    }

    /// Forgets the identity, certificate first.
    pub fn remove(&self) -> Result<(), Error> {
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

fn parse_raft_key(text: &str) -> Option<RaftKey> {
    let line = |prefix: &str| text.lines().find_map(|line| line.strip_prefix(prefix));
    let id = line(KEY_ID_HEADER)?.parse().ok()?;
    let hex = line(KEY_HEADER)?;
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    let mut key = [0u8; 32];
    for (index, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(RaftKey { id, key })
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
