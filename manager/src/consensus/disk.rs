//! Files and directories of the Raft log and snapshot, and what can be wrong with them.
//!
//! # Invariants
//!
//! - Directories have mode 0700 and files 0600: they hold secrets, sealed.
//! - A file gets its final name only when its content is durable.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

const LOCK_FILE: &str = "lock";

/// Why stored Raft data cannot be used. Each message names the file, the place and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused. The remedy is in the cause: space, permissions, a broken disk.
    #[error("failed to {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Two daemons were given one data directory.
    #[error("{} is in use by another process: stop it, or give this one a data directory of its own", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// Bytes that were durable are not what was written.
    #[error(
        "{} is damaged at offset {offset}: {reason}; restore this manager's data directory from a \
         backup, or remove this manager from the swarm, empty the directory and join again",
        path.display()
    )]
    Damaged {
        /// The file, or the directory where a file is missing.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// The data directory belongs to another node, or the node's key was replaced.
    #[error(
        "{} is sealed at offset {offset} with a key that this node does not have ({reason}); give \
         this node back its own TLS key, or its own data directory",
        path.display()
    )]
    ForeignKey {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// How that was seen.
        reason: String,
    },
    /// A newer skep wrote it.
    #[error(
        "{} has format version {found} at offset {offset}, this program knows {known}; start the \
         version of skep that wrote it, or a newer one",
        path.display()
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// Its version.
        found: u16,
        /// The highest version known here.
        known: u16,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn damaged(path: &Path, offset: u64, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), offset, reason: reason.into() }
    }
}

/// Whatever changes files and names: the place where tests make a disk slow, full or forgetful. Reads go to the
/// kernel, which shows what was written whether it is durable or not.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Writes all of `bytes` at `offset`.
    fn write(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    /// Makes what was written durable.
    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    /// Makes all of a new file durable, its length too.
    fn sync_all(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    /// Creates a file that must not exist, for its owner alone.
    fn create(&self, path: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).open(path)
    }

    /// Reserves space without writing it. A file system that cannot do that gives a sparse file.
    fn reserve(&self, file: &File, length: u64) -> io::Result<()> {
        let bytes = i64::try_from(length).unwrap_or(i64::MAX);
        match fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => file.set_len(length),
            other => other.map_err(io::Error::from),
        }
    }

    /// Gives back what lies behind `length`.
    fn trim(&self, file: &File, length: u64) -> io::Result<()> {
        file.set_len(length)
    }

    /// Gives a file another name, in the place of what had it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Gives a file a second name.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    /// Takes a name away.
    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path).and_then(|dir| dir.sync_all())
    }

    /// How long the next write waits, where Raft runs on its caller's runtime: there no thread may stand still.
    fn delay(&self) -> Duration {
        Duration::ZERO
    }
}

/// The kernel's files.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RealDisk;

impl Disk for RealDisk {}

/// Makes a directory that only its owner may enter, with its parents, and its name durable.
pub(crate) fn create_private_dir(path: &Path) -> Result<(), Error> {
    let io = |action| Error::io(action, path);
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("create"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(io("protect"))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => Ok(()),
    }
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), Error> {
    RealDisk.sync_dir(path).map_err(Error::io("sync", path))
}

/// Keeps every other process out of a data directory until dropped.
#[derive(Debug)]
pub(crate) struct DirLock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl DirLock {
    pub(crate) fn take(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(LOCK_FILE);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(Error::io("open", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Err(Error::InUse { path: dir.to_owned() }),
            Err((_, error)) => Err(Error::io("lock", &path)(error.into())),
        }
    }
}
