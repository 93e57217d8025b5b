//! The snapshot file: the last built or received state, compressed and sealed.
//!
//! Frames: the head (JSON), then the compressed state in pieces, then an empty end. Peers get the
//! compressed bytes as they are and seal them with keys of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use skep_manager_core::State;

use super::disk::{Disk, Error};
use super::frame::{
    FIRST_COUNTER, FileKind, HEADER_LENGTH, new_header, parse_frame, put_frame, read_header,
};
use super::seal::DataKey;
use super::types::SnapshotMeta;

const SNAPSHOT: FileKind = FileKind { magic: b"skepsnap", purpose: "skep raft snapshot" };
const FILE: &str = "snapshot";
/// An older snapshot: this, and the index of its last entry.
const OLD_PREFIX: &str = "snapshot.old-";
const TEMPORARY_FILE: &str = "snapshot.new";
/// Content of one frame.
const PIECE_BYTES: usize = 1 << 20;
/// zstd's own default: fast, and about a tenth of the JSON.
const COMPRESSION_LEVEL: i32 = 3;

/// A state, compressed. Clones share the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotData(pub(crate) Bytes);

impl SnapshotData {
    /// Compresses a state. Takes its time.
    pub(crate) fn of(state: &State) -> std::io::Result<Self> {
        zstd::bulk::compress(&state.encode(), COMPRESSION_LEVEL).map(|bytes| Self(bytes.into()))
    }

    /// Reads the state back. Takes its time.
    pub(crate) fn state(&self) -> std::io::Result<State> {
        let bytes = zstd::stream::decode_all(&*self.0)?;
        State::decode(&bytes).map_err(std::io::Error::other)
    }
}

#[derive(Serialize, Deserialize)]
struct Head {
    meta: SnapshotMeta,
    /// Bytes of the compressed state.
    length: u64,
}

/// The snapshot file of a manager. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotStore {
    dir: PathBuf,
    key: DataKey,
    disk: Arc<dyn Disk>,
    /// What is in the file; the lock keeps writers apart.
    current: Arc<Mutex<Option<SnapshotMeta>>>,
}

impl SnapshotStore {
    /// Opens the snapshot of a data directory, and checks it if there is one.
    #[cfg(test)]
    pub(crate) fn open(dir: PathBuf, key: DataKey) -> Result<Self, Error> {
        Self::open_on(dir, key, Arc::new(super::disk::RealDisk))
    }

    /// The same on a disk that tests may have made.
    pub(crate) fn open_on(dir: PathBuf, key: DataKey, disk: Arc<dyn Disk>) -> Result<Self, Error> {
        let temporary = dir.join(TEMPORARY_FILE);
        match disk.remove(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &temporary)(error));
            }
            _ => {}
        }
        let store = Self { dir, key, disk, current: Arc::default() };
        let current = store.read()?.map(|(meta, _)| meta);
        // Its name may be in the kernel's memory alone, and the log is purged because of it.
        store.disk.sync_dir(&store.dir).map_err(Error::io("sync", &store.dir))?;
        *store.current.lock().expect(UNPOISONED) = current;
        Ok(store)
    }

    /// Stores a snapshot durably, unless a newer one is there, and keeps so many older ones beside it. Blocks.
    pub(crate) fn write(
        &self,
        meta: &SnapshotMeta,
        data: &SnapshotData,
        n_old: usize,
    ) -> Result<(), Error> {
        let mut current = self.current.lock().expect(UNPOISONED);
        if current.as_ref().is_some_and(|current| current.last_log_id >= meta.last_log_id) {
            return Ok(());
        }
        let temporary = self.dir.join(TEMPORARY_FILE);
        let bytes = self.seal(meta, data);
        match self.disk.remove(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &temporary)(error));
            }
            _ => {}
        }
        let file = self.disk.create(&temporary).map_err(Error::io("create", &temporary))?;
        self.disk.write(&file, 0, &bytes).map_err(Error::io("write", &temporary))?;
        self.disk.sync_all(&file).map_err(Error::io("sync", &temporary))?;
        if let Some(before) = current.as_ref().filter(|_| n_old > 0) {
            let index = before.last_log_id.map_or(0, |log_id| log_id.index);
            let kept = self.dir.join(format!("{OLD_PREFIX}{index:020}"));
            match self.disk.link(&self.path(), &kept) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::io("link", &kept)(error));
                }
                _ => {}
            }
        }
        self.disk.rename(&temporary, &self.path()).map_err(Error::io("rename", &temporary))?;
        self.remove_old(n_old)?;
        self.disk.sync_dir(&self.dir).map_err(Error::io("sync", &self.dir))?;
        *current = Some(meta.clone());
        Ok(())
    }

    /// Removes the oldest of the older snapshots, beyond so many.
    fn remove_old(&self, n_kept: usize) -> Result<(), Error> {
        let mut old = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(Error::io("list", &self.dir))? {
            let path = entry.map_err(Error::io("list", &self.dir))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name.starts_with(OLD_PREFIX)) {
                old.push(path);
            }
        }
        old.sort();
        let n_surplus = old.len().saturating_sub(n_kept);
        for path in old.drain(..n_surplus) {
            self.disk.remove(&path).map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }

    /// Reads the snapshot back, if there is one. Blocks.
    pub(crate) fn read(&self) -> Result<Option<(SnapshotMeta, SnapshotData)>, Error> {
        let path = self.path();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        self.unseal(&path, &bytes).map(Some)
    }

    fn path(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    fn seal(&self, meta: &SnapshotMeta, data: &SnapshotData) -> Vec<u8> {
        let (mut bytes, file_key) = new_header(SNAPSHOT, &self.key, 0);
        let head = Head { meta: meta.clone(), length: data.0.len() as u64 };
        let head = serde_json::to_vec(&head).expect("a head has no failing parts");
        let pieces = std::iter::once(head.as_slice()).chain(data.0.chunks(PIECE_BYTES));
        for (counter, piece) in (FIRST_COUNTER..).zip(pieces.chain(std::iter::once(&[][..]))) {
            put_frame(&mut bytes, &file_key, self.key.id(), counter, piece);
        }
        bytes
    }

    fn unseal(&self, path: &Path, bytes: &[u8]) -> Result<(SnapshotMeta, SnapshotData), Error> {
        let (_, file_key) = read_header(SNAPSHOT, &self.key, path, bytes)?;
        let mut at = HEADER_LENGTH;
        let mut counter = FIRST_COUNTER;
        let mut next = || {
            let offset = at as u64;
            let frame =
                parse_frame(&bytes[at..]).map_err(|reason| Error::damaged(path, offset, reason))?;
            let content = frame.open(&file_key, &self.key, counter, path, offset)?;
            at += frame.length;
            counter += 1;
            Ok((offset, content))
        };
        let (offset, head) = next()?;
        let head: Head = serde_json::from_slice(&head)
            .map_err(|error| Error::damaged(path, offset, error.to_string()))?;
        let mut data = Vec::new();
        loop {
            let (offset, piece) = next()?;
            if !piece.is_empty() {
                data.extend_from_slice(&piece);
            } else if data.len() as u64 == head.length {
                return Ok((head.meta, SnapshotData(data.into())));
            } else {
                return Err(Error::damaged(path, offset, "pieces of the snapshot are missing"));
            }
        }
    }
}

const UNPOISONED: &str = "nothing panics while it holds the snapshot";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::types::{StoredMembership, log_id};
    use std::os::unix::fs::PermissionsExt as _;

    fn meta(index: u64) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: Some(log_id(2, index)),
            last_membership: StoredMembership::default(),
        }
    }

    #[test]
    fn a_snapshot_reads_back_and_an_older_one_never_replaces_it() {
        let dir = tempfile::tempdir().unwrap();
        let key = DataKey::new(3, [1; 32]);
        let store = SnapshotStore::open(dir.path().to_owned(), key.clone()).unwrap();
        assert_eq!(store.read().unwrap(), None);
        let large = SnapshotData(vec![5; 3 * PIECE_BYTES + 7].into());
        store.write(&meta(9), &large, 0).unwrap();
        store.write(&meta(8), &SnapshotData(Bytes::new()), 0).unwrap();
        let mode = fs::metadata(store.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        fs::write(dir.path().join(TEMPORARY_FILE), b"half").unwrap();
        let store = SnapshotStore::open(dir.path().to_owned(), key).unwrap();
        assert_eq!(store.read().unwrap(), Some((meta(9), large)));
        assert!(!dir.path().join(TEMPORARY_FILE).exists());
    }

    #[test]
    fn a_damaged_cut_or_foreign_snapshot_is_refused_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let key = DataKey::new(3, [1; 32]);
        let open = |key: &DataKey| {
            let opened = SnapshotStore::open(dir.path().to_owned(), key.clone());
            opened.map(drop).map_err(|error| error.to_string())
        };
        let store = SnapshotStore::open(dir.path().to_owned(), key.clone()).unwrap();
        store.write(&meta(9), &SnapshotData(Bytes::from_static(b"state")), 0).unwrap();
        let good = fs::read(store.path()).unwrap();

        let mut flipped = good.clone();
        flipped[HEADER_LENGTH + 40] ^= 1;
        fs::write(store.path(), flipped).unwrap();
        let text = open(&key).unwrap_err();
        assert!(text.contains("snapshot is damaged at offset 70: the checksum"), "{text}");

        let end = parse_frame(&good[HEADER_LENGTH..]).unwrap().length + HEADER_LENGTH;
        fs::write(store.path(), &good[..end]).unwrap();
        let text = open(&key).unwrap_err();
        assert!(
            text.contains(&format!("damaged at offset {end}: a frame is incomplete")),
            "{text}"
        );

        fs::write(store.path(), &good).unwrap();
        let text = open(&DataKey::new(4, [1; 32])).unwrap_err();
        assert!(text.contains("its key id is 3, this node's is 4"), "{text}");
        let text = open(&DataKey::new(3, [2; 32])).unwrap_err();
        assert!(text.contains("the header does not authenticate"), "{text}");
        open(&key).unwrap();
    }

    #[test]
    fn so_many_older_snapshots_are_kept_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let key = DataKey::new(3, [1; 32]);
        let store = SnapshotStore::open(dir.path().to_owned(), key.clone()).unwrap();
        let old = |index: u64| dir.path().join(format!("{OLD_PREFIX}{index:020}"));
        for (index, n_old, kept) in [
            (1, 2, vec![]),
            (2, 2, vec![1]),
            (3, 2, vec![1, 2]),
            (14, 2, vec![2, 3]),
            (15, 0, vec![]),
        ] {
            let data = SnapshotData(Bytes::from(vec![u8::try_from(index).unwrap()]));
            store.write(&meta(index), &data, n_old).unwrap();
            let found: Vec<u64> = (1..20).filter(|index| old(*index).exists()).collect();
            assert_eq!(found, kept, "after {index}");
        }
        store.write(&meta(16), &SnapshotData(Bytes::new()), 1).unwrap();
        fs::rename(old(15), store.path()).unwrap();
        let store = SnapshotStore::open(dir.path().to_owned(), key).unwrap();
        let (found, data) = store.read().unwrap().unwrap();
        assert_eq!((found, &*data.0), (meta(15), &[15][..]), "it opens in the newest one's place");
    }

    /// `UPDATE_GOLDEN=1` rewrites the file, which only a new format version justifies.
    #[test]
    fn a_snapshot_of_format_version_1_still_opens() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR"));
        let golden = golden.join("src/consensus/log/golden/v1.snapshot");
        let dir = tempfile::tempdir().unwrap();
        let key = DataKey::new(3, [1; 32]);
        let mut state = State::default();
        state.skip(9);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let store = SnapshotStore::open(dir.path().to_owned(), key.clone()).unwrap();
            store.write(&meta(9), &SnapshotData::of(&state).unwrap(), 0).unwrap();
            fs::rename(store.path(), &golden).unwrap();
        }
        fs::copy(&golden, dir.path().join(FILE)).unwrap();
        let store = SnapshotStore::open(dir.path().to_owned(), key).unwrap();
        let (found, data) = store.read().unwrap().unwrap();
        assert_eq!(found, meta(9));
        assert_eq!(data.state().unwrap().digest(), state.digest());
    }
}
