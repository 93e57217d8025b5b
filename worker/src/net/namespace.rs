//! Network namespaces: entering them for a moment, and keeping some by a file.
//!
//! A namespace that no process is in lives as long as its file is mounted over. That file is how a
//! restarted daemon finds it again.

use std::fs::{self, File};
use std::io;
use std::os::linux::fs::MetadataExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs};

use super::Error;

const OWN: &str = "/proc/thread-self/ns/net";

/// The file system of namespaces, `NSFS_MAGIC`.
const NSFS: FsType = FsType(0x6e73_6673);

/// The network namespace that a dedicated thread belongs in. All that leaves it returns to it.
#[derive(Debug)]
pub struct Home(File);

impl Home {
    /// The namespace of the calling thread, which must be a dedicated one.
    pub fn here() -> Result<Self, Error> {
        File::open(OWN).map(Self).map_err(|e| Error::file("open", OWN, e))
    }

    /// Runs `work` inside of another namespace. Sockets that it makes stay there.
    pub fn within<T>(&self, inside: &File, work: impl FnOnce() -> T) -> Result<T, Error> {
        let entered = setns(inside, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
        entered.map_err(|e| Error::kernel("enter a network namespace", e))?;
        let result = work();
        self.come_back();
        Ok(result)
    }

    /// The network namespace of a container, which must not be the node's own.
    pub fn of_container(&self, task_id: &str, pid: u32) -> Result<File, Error> {
        let gone = |source| Error::ContainerGone { task_id: task_id.to_owned(), pid, source };
        let namespace = File::open(format!("/proc/{pid}/ns/net")).map_err(gone)?;
        let identity = |file: &File| file.metadata().map(|m| (m.st_dev(), m.st_ino()));
        let inside = identity(&namespace).map_err(gone)?;
        let home = identity(&self.0).map_err(gone)?;
        if inside == home {
            return Err(Error::HostNetwork { task_id: task_id.to_owned(), pid });
        }
        Ok(namespace)
    }

    /// Makes a namespace that lives until `path` is forgotten; `prepare` runs in it first.
    pub fn make_kept(
        &self,
        path: &Path,
        prepare: impl FnOnce() -> Result<(), Error>,
    ) -> Result<File, Error> {
        File::create(path).map_err(|e| Error::file("create", path, e))?;
        let made = unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
        made.map_err(|e| Error::kernel("make a network namespace", e))?;
        let kept = prepare().and_then(|()| {
            let nothing = None::<&str>;
            let mounted = mount(Some(OWN), path, nothing, MsFlags::MS_BIND, nothing);
            mounted.map_err(|e| Error::file("mount a network namespace over", path, e.into()))?;
            File::open(OWN).map_err(|e| Error::file("open", OWN, e))
        });
        self.come_back();
        kept
    }

    fn come_back(&self) {
        // Going on in the wrong namespace would change that one instead of the node.
        setns(&self.0, CloneFlags::CLONE_NEWNET)
            .expect("a thread may return to the namespace that it came from");
    }
}

/// The namespace that `path` keeps; `None` where there is none, or none any more.
pub fn open_kept(path: &Path) -> Result<Option<File>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("open", path, error)),
    };
    let kind = fstatfs(&file).map_err(|e| Error::file("look at", path, e.into()))?;
    Ok((kind.filesystem_type() == NSFS).then_some(file))
}

/// Keeps a namespace no longer; fine if it is not kept.
pub fn forget(path: &Path) -> Result<(), Error> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(Error::file("unmount", path, error.into())),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", path, error))
        }
        _ => Ok(()),
    }
}
