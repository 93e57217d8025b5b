//! A disk that forgets what was not synced, and is slow, full or broken when it is told to be.
//!
//! Files lie in a directory of this machine's memory, so that reads see what was written. Beside them is
//! kept what a loss of power may undo: the bytes written since the last sync of their file, and the names
//! changed since the last sync of their directory.
//!
//! # Invariants
//!
//! - What a sync covered survives every loss of power, whole.
//! - Of other bytes any 512 may be lost; names are lost newest first, as a journal loses them.
//! - From the moment at which power fails nothing is written, until [`ForgetfulDisk::lose_power`].

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use skep_manager::consensus::Disk;

/// What a disk writes whole or not at all.
const SECTOR: u64 = 512;
const UNPOISONED: &str = "nothing panics while it holds the disk";

/// The disk of one manager; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct ForgetfulDisk {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    rng: StdRng,
    /// Where removed files are kept until their removal is durable.
    trash: PathBuf,
    n_trash: u64,
    /// By inode: files with bytes or a length that are not durable.
    unsynced: BTreeMap<u64, Unsynced>,
    /// Oldest first.
    names: Vec<NameChange>,
    /// Power fails at this many syncs from now.
    crash_in: Option<u32>,
    has_power: bool,
    is_slow: bool,
    /// Bytes that still find room.
    space: Option<u64>,
    fails_sync: bool,
    n_syncs: u64,
}

#[derive(Debug)]
struct Unsynced {
    file: File,
    durable_length: u64,
    writes: Vec<Write>,
}

#[derive(Debug)]
struct Write {
    offset: u64,
    /// What stood there.
    before: Vec<u8>,
}

#[derive(Debug)]
enum NameChange {
    Created { path: PathBuf },
    Renamed { from: PathBuf, to: PathBuf, replaced: Option<PathBuf> },
    Removed { path: PathBuf, kept: PathBuf },
}

impl NameChange {
    fn dir(&self) -> Option<&Path> {
        match self {
            Self::Created { path } | Self::Removed { path, .. } => path.parent(),
            Self::Renamed { to, .. } => to.parent(),
        }
    }

    fn kept(&self) -> Option<&Path> {
        match self {
            Self::Created { .. } => None,
            Self::Renamed { replaced, .. } => replaced.as_deref(),
            Self::Removed { kept, .. } => Some(kept),
        }
    }

    fn undo(&self) -> io::Result<()> {
        match self {
            Self::Created { path } => fs::remove_file(path),
            Self::Renamed { from, to, replaced } => {
                fs::rename(to, from)?;
                replaced.as_ref().map_or(Ok(()), |kept| fs::rename(kept, to))
            }
            Self::Removed { path, kept } => fs::rename(kept, path),
        }
    }
}

/// Whether power fails around a sync.
enum Power {
    Stays,
    FailsBefore,
    FailsAfter,
}

fn no_power() -> io::Error {
    io::Error::other("the machine has lost power")
}

impl ForgetfulDisk {
    /// A disk whose own files lie in `trash`, a directory beside the manager's.
    pub(crate) fn new(seed: u64, trash: &Path) -> io::Result<Self> {
        fs::create_dir_all(trash)?;
        let inner = Inner {
            rng: StdRng::seed_from_u64(seed),
            trash: trash.to_owned(),
            n_trash: 0,
            unsynced: BTreeMap::new(),
            names: Vec::new(),
            crash_in: None,
            has_power: true,
            is_slow: false,
            space: None,
            fails_sync: false,
            n_syncs: 0,
        };
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect(UNPOISONED)
    }

    /// Power fails in the middle of a sync, so many syncs from now; none: it does not.
    pub(crate) fn set_crash(&self, n_syncs: Option<u32>) {
        self.inner().crash_in = n_syncs;
    }

    /// Whether power has failed.
    pub(crate) fn has_failed(&self) -> bool {
        !self.inner().has_power
    }

    /// Writes take up to a quarter of a second, or are fast.
    pub(crate) fn set_slow(&self, is_slow: bool) {
        self.inner().is_slow = is_slow;
    }

    /// So many bytes find room; none: as many as there are.
    pub(crate) fn set_space(&self, space: Option<u64>) {
        self.inner().space = space;
    }

    /// Whether the next sync fails, so that what it was to cover stays unsynced.
    pub(crate) fn set_next_sync_fails(&self, fails: bool) {
        self.inner().fails_sync = fails;
    }

    /// Syncs so far.
    pub(crate) fn n_syncs(&self) -> u64 {
        self.inner().n_syncs
    }

    /// Loses what is not durable, or any part of it. The disk is as good as new afterwards.
    pub(crate) fn lose_power(&self) -> io::Result<()> {
        let mut inner = self.inner();
        inner.lose_bytes()?;
        inner.lose_names()?;
        inner.has_power = true;
        inner.crash_in = None;
        inner.fails_sync = false;
        Ok(())
    }
}

impl Inner {
    fn check_power(&self) -> io::Result<()> {
        if self.has_power { Ok(()) } else { Err(no_power()) }
    }

    /// Counts a sync, and says whether power fails around it.
    fn count_sync(&mut self) -> io::Result<Power> {
        self.check_power()?;
        self.n_syncs += 1;
        match self.crash_in {
            Some(0) => {
                self.has_power = false;
                let is_before = self.rng.random_bool(0.5);
                Ok(if is_before { Power::FailsBefore } else { Power::FailsAfter })
            }
            left => {
                self.crash_in = left.map(|left| left - 1);
                Ok(Power::Stays)
            }
        }
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        if let Power::FailsBefore = self.count_sync()? {
            return Err(no_power());
        }
        if std::mem::take(&mut self.fails_sync) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.unsynced.remove(&file.metadata()?.ino());
        Ok(())
    }

    fn unsynced(&mut self, file: &File) -> io::Result<&mut Unsynced> {
        let metadata = file.metadata()?;
        Ok(match self.unsynced.entry(metadata.ino()) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert(Unsynced {
                file: file.try_clone()?,
                durable_length: metadata.len(),
                writes: Vec::new(),
            }),
        })
    }

    /// Takes room for bytes that lie behind the end of a file; gives how many of them find it.
    fn take_space(&mut self, n_bytes: u64) -> u64 {
        let Some(space) = &mut self.space else { return n_bytes };
        let taken = n_bytes.min(*space);
        *space -= taken;
        taken
    }

    fn write(&mut self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check_power()?;
        let length = file.metadata()?.len();
        let within = length.saturating_sub(offset).min(bytes.len() as u64);
        let fits = within + self.take_space(bytes.len() as u64 - within);
        let fits = usize::try_from(fits).expect("it is at most a slice's length");
        let mut before = vec![0; fits];
        let n_there = usize::try_from(within).expect("it is at most a slice's length").min(fits);
        file.read_exact_at(&mut before[..n_there], offset)?;
        self.unsynced(file)?.writes.push(Write { offset, before });
        file.write_all_at(&bytes[..fits], offset)?;
        if fits < bytes.len() { Err(io::Error::from_raw_os_error(ENOSPC)) } else { Ok(()) }
    }

    fn keep(&mut self, path: &Path) -> io::Result<PathBuf> {
        self.n_trash += 1;
        let kept = self.trash.join(self.n_trash.to_string());
        fs::hard_link(path, &kept)?;
        Ok(kept)
    }

    fn lose_bytes(&mut self) -> io::Result<()> {
        for (_, unsynced) in std::mem::take(&mut self.unsynced) {
            let Unsynced { file, durable_length, writes } = unsynced;
            // Nothing, all or any part of it got to the disk.
            let survival = [0.0, 1.0, 0.5][self.rng.random_range(0..3)];
            for write in writes.iter().rev() {
                let mut at = 0;
                while at < write.before.len() {
                    let offset = write.offset + at as u64;
                    let left =
                        usize::try_from(SECTOR - offset % SECTOR).expect("a sector is small");
                    let end = (at + left).min(write.before.len());
                    if !self.rng.random_bool(survival) {
                        file.write_all_at(&write.before[at..end], offset)?;
                    }
                    at = end;
                }
            }
            if !self.rng.random_bool(survival) {
                file.set_len(durable_length)?;
            }
        }
        Ok(())
    }

    fn lose_names(&mut self) -> io::Result<()> {
        let names = std::mem::take(&mut self.names);
        let n_kept = self.rng.random_range(0..=names.len());
        for change in names[n_kept..].iter().rev() {
            change.undo()?;
        }
        for kept in names[..n_kept].iter().filter_map(NameChange::kept) {
            fs::remove_file(kept)?;
        }
        Ok(())
    }
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl Disk for ForgetfulDisk {
    fn write(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.inner().write(file, offset, bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.inner().sync(file)
    }

    fn sync_all(&self, file: &File) -> io::Result<()> {
        self.inner().sync(file)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        let mut inner = self.inner();
        inner.check_power()?;
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        inner.unsynced(&file)?.durable_length = 0;
        inner.names.push(NameChange::Created { path: path.to_owned() });
        Ok(file)
    }

    fn reserve(&self, file: &File, length: u64) -> io::Result<()> {
        let mut inner = self.inner();
        inner.check_power()?;
        let wanted = length.saturating_sub(file.metadata()?.len());
        if inner.space.is_some_and(|space| space < wanted) {
            return Err(io::Error::from_raw_os_error(ENOSPC));
        }
        inner.take_space(wanted);
        inner.unsynced(file)?;
        file.set_len(length)
    }

    fn trim(&self, file: &File, length: u64) -> io::Result<()> {
        let mut inner = self.inner();
        inner.check_power()?;
        inner.unsynced(file)?;
        file.set_len(length)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.check_power()?;
        let replaced = if to.exists() { Some(inner.keep(to)?) } else { None };
        fs::rename(from, to)?;
        let (from, to) = (from.to_owned(), to.to_owned());
        inner.names.push(NameChange::Renamed { from, to, replaced });
        Ok(())
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.check_power()?;
        fs::hard_link(from, to)?;
        inner.names.push(NameChange::Created { path: to.to_owned() });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.check_power()?;
        fs::metadata(path)?;
        let kept = inner.keep(path)?;
        fs::remove_file(path)?;
        inner.names.push(NameChange::Removed { path: path.to_owned(), kept });
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        if let Power::FailsBefore = inner.count_sync()? {
            return Err(no_power());
        }
        let names = std::mem::take(&mut inner.names);
        let (durable, rest): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|change| change.dir() == Some(path));
        inner.names = rest;
        for kept in durable.iter().filter_map(NameChange::kept) {
            fs::remove_file(kept)?;
        }
        Ok(())
    }

    fn delay(&self) -> Duration {
        let mut inner = self.inner();
        let millis_max = if inner.is_slow { 250 } else { 2 };
        Duration::from_millis(inner.rng.random_range(0..=millis_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        dir: tempfile::TempDir,
        disk: ForgetfulDisk,
    }

    impl Rig {
        fn new(seed: u64) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let disk = ForgetfulDisk::new(seed, &dir.path().join("trash")).unwrap();
            fs::create_dir(dir.path().join("data")).unwrap();
            Self { dir, disk }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join("data").join(name)
        }

        fn durable(&self, name: &str, bytes: &[u8]) -> File {
            let file = self.disk.create(&self.path(name)).unwrap();
            self.disk.write(&file, 0, bytes).unwrap();
            self.disk.sync_all(&file).unwrap();
            self.disk.sync_dir(&self.dir.path().join("data")).unwrap();
            file
        }
    }

    #[test]
    fn what_was_synced_survives_and_the_rest_may_be_lost_in_sectors() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..40 {
            let rig = Rig::new(seed);
            let file = rig.durable("log", &[1; 1024]);
            rig.disk.write(&file, 512, &[2; 1024]).unwrap();
            assert_eq!(fs::read(rig.path("log")).unwrap().len(), 1536, "reads see it");
            rig.disk.lose_power().unwrap();
            let bytes = fs::read(rig.path("log")).unwrap();
            assert_eq!(bytes[..512], [1; 512], "seed {seed}");
            assert!(bytes.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
            seen.insert((bytes.get(512).copied(), bytes.get(1024).copied()));
        }
        for expected in
            [(Some(1), None), (Some(2), Some(2)), (Some(1), Some(2)), (Some(2), Some(0))]
        {
            assert!(seen.contains(&expected), "{expected:?} is not among {seen:?}");
        }
    }

    #[test]
    fn names_are_lost_newest_first_until_their_directory_is_synced() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..40 {
            let rig = Rig::new(seed);
            drop(rig.durable("old", b"old"));
            drop(rig.durable("new", b"new"));
            rig.disk.rename(&rig.path("new"), &rig.path("old")).unwrap();
            rig.disk.remove(&rig.path("old")).unwrap();
            rig.disk.lose_power().unwrap();
            let read = |name| fs::read_to_string(rig.path(name)).ok();
            seen.insert((read("old"), read("new")));
        }
        let text = |text: &str| Some(text.to_owned());
        let expected = [(None, None), (text("new"), None), (text("old"), text("new"))];
        assert_eq!(seen, expected.into_iter().collect());
    }

    #[test]
    fn power_that_fails_at_a_sync_leaves_it_done_or_undone_and_nothing_is_written_after_it() {
        let mut lengths = std::collections::BTreeSet::new();
        for seed in 0..40 {
            let rig = Rig::new(seed);
            let file = rig.durable("log", b"");
            rig.disk.set_crash(Some(0));
            rig.disk.write(&file, 0, b"frame").unwrap();
            let is_synced = rig.disk.sync(&file).is_ok();
            assert!(rig.disk.has_failed());
            rig.disk.write(&file, 5, b"more").unwrap_err();
            rig.disk.lose_power().unwrap();
            let length = fs::read(rig.path("log")).unwrap().len();
            assert!(!is_synced || length == 5, "seed {seed}: {length}");
            lengths.insert((is_synced, length));
        }
        assert!(lengths.contains(&(true, 5)) && lengths.contains(&(false, 0)), "{lengths:?}");
    }

    #[test]
    fn a_full_disk_takes_a_part_and_reserved_space_still_takes_all() {
        let rig = Rig::new(1);
        let file = rig.durable("log", b"");
        rig.disk.reserve(&file, 8).unwrap();
        rig.disk.set_space(Some(2));
        rig.disk.write(&file, 0, b"reserved").unwrap();
        let error = rig.disk.write(&file, 8, b"more").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read(rig.path("log")).unwrap(), b"reservedmo");
        assert!(rig.disk.reserve(&file, 64).is_err());
        rig.disk.set_space(None);
        rig.disk.write(&file, 8, b"more").unwrap();
    }

    #[test]
    fn a_sync_that_fails_leaves_its_bytes_unsynced() {
        let is_lost = (0..20).any(|seed| {
            let rig = Rig::new(seed);
            let file = rig.durable("log", b"");
            rig.disk.write(&file, 0, b"frame").unwrap();
            rig.disk.set_next_sync_fails(true);
            rig.disk.sync(&file).unwrap_err();
            rig.disk.lose_power().unwrap();
            fs::read(rig.path("log")).unwrap().is_empty()
        });
        assert!(is_lost);
    }
}
