//! The root file system of a container: mounts it, and reads and makes files within it.
//!
//! Paths inside come from the image and may lead anywhere by symbolic links: they are resolved by
//! the kernel as if the root file system were the root (`RESOLVE_IN_ROOT`).

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::dirs::{DataDir, RunDir};
use super::error::{Context, Error};

/// A passwd or group file beyond this size is cut: it is read into memory.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// The mount namespace that this process came from, to return to.
pub(super) struct HostMounts(OwnedFd);

impl HostMounts {
    /// Moves this process into a mount namespace of its own that nothing propagates from or to.
    pub(super) fn leave() -> Result<Self, Error> {
        let host = File::open("/proc/self/ns/mnt")
            .during(|| "open this process's mount namespace".into())?;
        unshare(CloneFlags::CLONE_NEWNS).during(|| "unshare the mount namespace".into())?;
        let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
            .during(|| "make all mounts private".into())?;
        Ok(Self(host.into()))
    }

    /// Returns to the host's mounts.
    ///
    /// The container has its own copy by now. Staying would pin every mount of the host as it is
    /// now for as long as the container runs.
    pub(super) fn enter(self) -> Result<(), Error> {
        setns(&self.0, CloneFlags::CLONE_NEWNS)
            .during(|| "return to the host's mount namespace".into())
    }
}

/// Mounts the layers, base first, with the container's own upper directory on top.
///
/// The layers are named by short links relative to the working directory: the options of a mount
/// fit one page, which absolute paths of some twenty layers exceed; and a path may hold `:`.
pub(super) fn mount_overlay(
    run: &RunDir,
    data: &DataDir,
    layers: &[PathBuf],
) -> Result<PathBuf, Error> {
    let (root, links) = (run.rootfs(), run.links());
    let context = || format!("mount the root file system at {}", root.display());
    for directory in [&root, &links, &data.upper(), &data.work()] {
        fs::create_dir_all(directory).during(context)?;
    }
    symlink(data.upper(), links.join("u")).during(context)?;
    symlink(data.work(), links.join("w")).during(context)?;
    let mut names: Vec<String> = Vec::with_capacity(layers.len());
    for (number, layer) in layers.iter().enumerate() {
        symlink(layer, links.join(number.to_string())).during(context)?;
        names.push(number.to_string());
    }
    if names.is_empty() {
        // An image without layers still needs one directory below the upper one.
        fs::create_dir(links.join("0")).during(context)?;
        names.push("0".into());
    }
    names.reverse();
    let mut options = format!("lowerdir={},upperdir=u,workdir=w", names.join(":"));
    if Path::new("/sys/module/overlay/parameters/index").exists() {
        // Layers are shared by containers; an index on them would tie them to the first one.
        options.push_str(",index=off");
    }
    std::env::set_current_dir(&links).during(context)?;
    let mounted =
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()));
    std::env::set_current_dir("/").during(context)?;
    mounted.during(context)?;
    Ok(root)
}

/// The text of a file of the image, empty where it is no regular file.
pub(super) fn read_text(root: &Path, path: &str) -> Result<String, Error> {
    let context = || format!("read {path} of the image");
    let root = open_root(root)?;
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match open_inside(&root, Path::new(path), flags) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(String::new()),
        Err(error) => return Err(error).during(context),
    };
    if !file.metadata().during(context)?.is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).during(context)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Makes `path` and its parents in the image, owned by root, as Docker does for a working directory.
pub(super) fn make_directories(root: &Path, path: &Path) -> Result<(), Error> {
    let context = || format!("make the working directory {}", path.display());
    let root = open_root(root)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut parent = open_inside(&root, Path::new("/"), flags).during(context)?;
    let mut so_far = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => so_far.push(name),
            Component::ParentDir => return Err(Errno::EINVAL).during(context),
            _ => continue,
        }
        match open_inside(&root, &so_far, flags) {
            Ok(directory) => parent = directory,
            Err(Errno::ENOENT) => {
                let name = so_far.file_name().unwrap_or_default();
                match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
                    // EEXIST: a link that leads nowhere; opening it again says so.
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(error) => return Err(error).during(context),
                }
                parent = open_inside(&root, &so_far, flags).during(context)?;
            }
            Err(error) => return Err(error).during(context),
        }
    }
    Ok(())
}

/// Replaces a symbolic link in the image by an empty file, for a file to be mounted on.
///
/// Images of whole distributions have /etc/resolv.conf lead to a file that exists on a running
/// system only; the runtime refuses to mount on such a link.
pub(super) fn replace_link(root: &Path, directory: &str, name: &str) -> Result<(), Error> {
    let context = || format!("replace the link {directory}/{name} of the image");
    let root = open_root(root)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = match open_inside(&root, Path::new(directory), flags) {
        Ok(directory) => directory,
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        Err(error) => return Err(error).during(context),
    };
    match readlinkat(&directory, name) {
        Ok(_) => {}
        // EINVAL: it is no link.
        Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(error).during(context),
    }
    unlinkat(&directory, name, UnlinkatFlags::NoRemoveDir).during(context)?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    openat(&directory, name, flags, Mode::from_bits_truncate(0o644)).during(context)?;
    Ok(())
}

fn open_root(root: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(root, flags, Mode::empty()).during(|| format!("open {}", root.display()))
}

fn open_inside(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    openat2(root, path, OpenHow::new().flags(flags).resolve(resolve))
}
