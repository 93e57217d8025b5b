//! A swarm in one file: its state, sealed.
//!
//! ```text
//! magic 8 | length 4 | head (JSON) | a sealed file: the head again, the compressed state in pieces, an empty end
//! ```
//!
//! The head names the format, the level of the state, and the swarm. The key is the swarm's unlock key where its
//! managers start locked, which whoever restores must give; otherwise it stands in the head, as it stands in the
//! key file of such managers: the seal then shows damage, and keeps nobody from reading.
//!
//! # Invariants
//!
//! - Every byte is authenticated: what was changed, cut, or added is refused, and nothing of it is used.

use std::path::Path;

use bytes::BufMut as _;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use skep_common::spec::Base64;
use skep_common::{ClusterId, Timestamp};
use skep_manager_core::State;
use skep_manager_core::command::FORMAT_LEVEL;

use super::disk;
use super::frame::{
    FIRST_COUNTER, FileKind, HEADER_LENGTH, new_header, parse_frame, put_frame, read_header,
};
use super::seal::DataKey;
use super::snapshot::SnapshotData;

const MAGIC: &[u8; 8] = b"SKEPBAK1";
const SEALED: FileKind = FileKind { magic: b"skepback", purpose: "skep swarm backup" };
/// The version that this program writes, and the highest it reads.
const FORMAT: u32 = 1;
/// Bytes of a head are far fewer.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Content of one frame.
const PIECE_BYTES: usize = 1 << 20;
const KEY_LENGTH: usize = 32;

/// What a backup says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Head {
    format: u32,
    /// The format level of the state.
    level: u32,
    /// The swarm.
    #[serde(rename = "ClusterID")]
    pub cluster_id: ClusterId,
    /// Of its state.
    pub version: u64,
    /// In which it was read.
    pub term: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// Version of the unlock key that it is sealed with; 0 where the key is here.
    unlock_key_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<Base64>,
}

impl Head {
    /// Whether it takes the unlock key of its swarm to read it.
    pub fn is_locked(&self) -> bool {
        self.key.is_none()
    }
}

/// A backup that was read: whole, and as it was written.
#[derive(Debug)]
pub struct Backup {
    /// What it says of itself.
    pub head: Head,
    /// The swarm.
    pub state: State,
}

/// Why a file is not taken for a backup. Nothing of it was used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Remedy: another file.
    #[error("it is no backup of a swarm: it does not begin as `skep swarm backup` writes one")]
    Foreign,
    /// Remedy: a newer version.
    #[error(
        "the backup has format {found}, and this version of skep knows {FORMAT}: restore it with the version that wrote it, or a newer one"
    )]
    NewerFormat {
        /// Its format.
        found: u32,
    },
    /// Remedy: a newer version.
    #[error(
        "the state in the backup has format level {found}, and this version of skep knows {FORMAT_LEVEL}: restore it with the version that wrote it, or a newer one"
    )]
    NewerLevel {
        /// Its level.
        found: u32,
    },
    /// Remedy: the key.
    #[error(
        "the backup is sealed with the unlock key that its swarm had (version {version}): give it on standard input, or on the terminal"
    )]
    Sealed {
        /// Of the key.
        version: u32,
    },
    /// Remedy: the right key.
    #[error(
        "invalid unlock key: the backup was sealed with another one, the one with version {version}"
    )]
    WrongKey {
        /// Of the key.
        version: u32,
    },
    /// Remedy: another copy.
    #[error(
        "the backup is damaged at byte {offset}: {reason}; use another copy of it, or another backup"
    )]
    Damaged {
        /// Where.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// The state holds no swarm.
    #[error("there is no swarm in it")]
    Empty,
}

/// Writes a backup of a state that was read in `term`. Takes its time.
pub fn write(state: &State, term: u64, now: Timestamp) -> Result<Vec<u8>, Error> {
    let cluster = state.cluster().ok_or(Error::Empty)?;
    let (version, secret) = match &cluster.unlock_key {
        Some(key) => {
            let version = u32::try_from(cluster.unlock_key_version).unwrap_or(u32::MAX);
            (version, key.0.clone())
        }
        None => {
            let mut key = vec![0; KEY_LENGTH];
            SystemRandom::new().fill(&mut key).expect("the kernel gives random bytes");
            (0, key)
        }
    };
    let damaged = |reason: String| Error::Damaged { offset: 0, reason };
    let key = data_key(version, &secret).ok_or_else(|| damaged("its key is no key".into()))?;
    let data = SnapshotData::of(state).map_err(|error| damaged(error.to_string()))?;
    let head = Head {
        format: FORMAT,
        level: state.level(),
        cluster_id: cluster.id,
        version: state.version().index,
        term,
        created_at: now,
        unlock_key_version: version,
        key: (version == 0).then_some(Base64(secret)),
    };
    Ok(seal(&head, &key, &data))
}

fn seal(head: &Head, key: &DataKey, data: &SnapshotData) -> Vec<u8> {
    let head = serde_json::to_vec(head).expect("a head has no failing parts");
    let mut bytes = MAGIC.to_vec();
    bytes.put_u32_le(u32::try_from(head.len()).expect("a head is short"));
    bytes.extend_from_slice(&head);
    let (header, file_key) = new_header(SEALED, key, 0);
    bytes.extend_from_slice(&header);
    let pieces = std::iter::once(head.as_slice()).chain(data.0.chunks(PIECE_BYTES));
    for (counter, piece) in (FIRST_COUNTER..).zip(pieces.chain(std::iter::once(&[][..]))) {
        put_frame(&mut bytes, &file_key, key.id(), counter, piece);
    }
    bytes
}

fn data_key(version: u32, secret: &[u8]) -> Option<DataKey> {
    Some(DataKey::new(version, secret.try_into().ok()?))
}

/// Reads what a file says of itself; nothing of it is authenticated yet.
pub fn read_head(bytes: &[u8]) -> Result<Head, Error> {
    Ok(split_head(bytes)?.0)
}

/// The head, its bytes, and where the sealed file begins.
fn split_head(bytes: &[u8]) -> Result<(Head, &[u8], usize), Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Format {
        format: u32,
    }
    let rest = bytes.strip_prefix(MAGIC).ok_or(Error::Foreign)?;
    let at = MAGIC.len();
    let damaged = |reason: &str| Error::Damaged { offset: at as u64, reason: reason.to_owned() };
    let (length, rest) = rest.split_first_chunk().ok_or_else(|| damaged("it is cut short"))?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > HEAD_BYTES_MAX {
        return Err(damaged("its head is too long"));
    }
    let json = rest.get(..length).ok_or_else(|| damaged("it is cut short"))?;
    let unreadable =
        |error: serde_json::Error| damaged(&format!("its head cannot be read: {error}"));
    let Format { format } = serde_json::from_slice(json).map_err(unreadable)?;
    if format > FORMAT {
        return Err(Error::NewerFormat { found: format });
    }
    let head: Head = serde_json::from_slice(json).map_err(unreadable)?;
    if head.level > FORMAT_LEVEL {
        return Err(Error::NewerLevel { found: head.level });
    }
    Ok((head, json, at + 4 + length))
}

/// Reads a backup. `unlock_key` is of its swarm, where that is locked. Takes its time.
pub fn read(bytes: &[u8], unlock_key: Option<&[u8]>) -> Result<Backup, Error> {
    let (head, json, start) = split_head(bytes)?;
    let version = head.unlock_key_version;
    let secret = match (&head.key, unlock_key) {
        (Some(key), _) => &key.0,
        (None, Some(key)) => key,
        (None, None) => return Err(Error::Sealed { version }),
    };
    let damaged = |offset: usize, reason: String| Error::Damaged { offset: offset as u64, reason };
    let key = data_key(version, secret);
    let key = key.ok_or_else(|| damaged(MAGIC.len(), "its key is no key".to_owned()))?;
    let data = unseal(bytes, start, json, &key, head.key.is_none())?;
    let state = data.state();
    let state =
        state.map_err(|error| damaged(start, format!("its state cannot be read: {error}")))?;
    let is_same = state.cluster().is_some_and(|cluster| cluster.id == head.cluster_id);
    if !is_same || state.version().index != head.version {
        return Err(damaged(MAGIC.len(), "its head is of another state".to_owned()));
    }
    Ok(Backup { head, state })
}

fn unseal(
    bytes: &[u8],
    start: usize,
    head: &[u8],
    key: &DataKey,
    is_users_key: bool,
) -> Result<SnapshotData, Error> {
    let here = Path::new("backup");
    let damaged = |offset: usize, reason: String| Error::Damaged { offset: offset as u64, reason };
    let translated = |base: usize, error: disk::Error| match error {
        disk::Error::Damaged { offset, reason, .. } => damaged(base, reason).moved_by(offset),
        disk::Error::ForeignKey { .. } if is_users_key => Error::WrongKey { version: key.id() },
        other => damaged(base, other.to_string()),
    };
    let sealed = &bytes[start..];
    let (_, file_key) =
        read_header(SEALED, key, here, sealed).map_err(|error| translated(start, error))?;
    let mut at = start + HEADER_LENGTH;
    let mut counter = FIRST_COUNTER;
    let mut data = Vec::new();
    loop {
        let frame = parse_frame(&bytes[at..]).map_err(|reason| damaged(at, reason.to_owned()))?;
        let content = frame.open(&file_key, key, counter, here, 0);
        let content = content.map_err(|error| translated(at, error))?;
        at += frame.length;
        match (counter, content.is_empty()) {
            (FIRST_COUNTER, _) if content != head => {
                return Err(damaged(MAGIC.len(), "its head was changed".to_owned()));
            }
            (FIRST_COUNTER, _) => {}
            (_, false) => data.extend_from_slice(&content),
            (_, true) if at == bytes.len() => return Ok(SnapshotData(data.into())),
            (_, true) => return Err(damaged(at, "something follows its end".to_owned())),
        }
        counter += 1;
    }
}

impl Error {
    fn moved_by(self, bytes: u64) -> Self {
        match self {
            Self::Damaged { offset, reason } => Self::Damaged { offset: offset + bytes, reason },
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use skep_common::{Cluster, Object};
    use skep_manager_core::{Action, Command, Expect};

    const NOW: Timestamp = Timestamp::from_secs(1_000_000);

    const SECRET: &str = "what joiners show";

    fn state(unlock_key: Option<[u8; 32]>) -> State {
        let document = serde_json::json!({
            "ID": ClusterId(1), "Version": {"Index": 0}, "CreatedAt": NOW, "UpdatedAt": NOW, "Spec": {},
            "JoinTokens": {"Worker": SECRET, "Manager": ""}, "RootCaCert": "", "RootCaKey": "",
            "IngressPool": "10.0.0.0/8", "UnlockKeyVersion": u64::from(unlock_key.is_some()) * 3,
        });
        let mut cluster: Cluster = serde_json::from_value(document).unwrap();
        cluster.unlock_key = unlock_key.map(|key| Base64(key.to_vec()));
        let put =
            Action::Put { object: Object::Cluster(Box::new(cluster)), expect: Expect::Absent };
        let mut state = State::default();
        state.skip(41);
        state.apply(42, &Command::new(NOW, vec![put]));
        state
    }

    fn check(bytes: &[u8], words: &str) {
        let error = read(bytes, None).unwrap_err().to_string();
        assert!(error.contains(words), "{words:?} in {error:?}");
    }

    /// The same backup with another head.
    fn with_head(bytes: &[u8], change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
        let (_, json, start) = split_head(bytes).unwrap();
        let mut head: serde_json::Value = serde_json::from_slice(json).unwrap();
        change(&mut head);
        let head = serde_json::to_vec(&head).unwrap();
        let mut changed = MAGIC.to_vec();
        changed.put_u32_le(head.len().try_into().unwrap());
        changed.extend_from_slice(&head);
        changed.extend_from_slice(&bytes[start..]);
        changed
    }

    #[test]
    fn a_backup_reads_back_as_the_state_was() {
        let state = state(None);
        let bytes = write(&state, 7, NOW).unwrap();
        let Backup { head, state: read } = read(&bytes, None).unwrap();
        assert_eq!((head.version, head.term, head.created_at), (42, 7, NOW));
        assert_eq!(read.digest(), state.digest());
        assert_eq!(write(&State::default(), 7, NOW), Err(Error::Empty));
    }

    #[test]
    fn where_managers_start_locked_only_their_key_opens_it() {
        let key = [5; 32];
        let bytes = write(&state(Some(key)), 7, NOW).unwrap();
        assert_eq!(read(&bytes, None).unwrap_err(), Error::Sealed { version: 3 });
        assert_eq!(read(&bytes, Some(&[6; 32])).unwrap_err(), Error::WrongKey { version: 3 });
        assert_eq!(read(&bytes, Some(&key)).unwrap().head.version, 42);
    }

    #[test]
    fn foreign_newer_and_changed_files_are_refused_with_the_reason() {
        check(b"", "no backup of a swarm");
        check(b"PK\x03\x04 and so on", "no backup of a swarm");
        let bytes = write(&state(None), 7, NOW).unwrap();
        check(&with_head(&bytes, |head| head["Format"] = 2.into()), "has format 2");
        check(&with_head(&bytes, |head| head["Level"] = 99.into()), "format level 99");
        check(&with_head(&bytes, |head| head["Term"] = 8.into()), "its head was changed");
        check(&[&bytes[..], b"x"].concat(), "something follows its end");
    }

    #[test]
    fn a_backup_that_is_cut_anywhere_is_refused() {
        let bytes = write(&state(None), 7, NOW).unwrap();
        for length in 0..bytes.len() {
            assert!(read(&bytes[..length], None).is_err(), "with {length} bytes");
        }
    }

    proptest! {
        #[test]
        fn a_backup_with_one_byte_changed_is_refused(at: prop::sample::Index, change in 1_u8..) {
            let mut bytes = write(&state(None), 7, NOW).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert!(read(&bytes, None).is_err(), "byte {at}");
        }
    }
}
