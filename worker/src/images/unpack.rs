//! Unpacks one layer into a directory that overlayfs takes as a lower directory.
//!
//! A whiteout becomes a character device 0:0, an opaque directory gets the attribute
//! `trusted.overlay.opaque`; owners, modes, set-user-id bits, times, extended attributes, hard
//! links, FIFOs and device nodes are kept.
//!
//! # Invariants
//!
//! - Nothing is written outside of the directory: every path is resolved below it by the kernel
//!   (`openat2` with `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS`), and its last part is never
//!   followed. A path through a symbolic link of the same layer is refused; no differ writes one.
//! - A whiteout hides lower layers only, never what its own layer has, in whatever order they come.
//! - An image cannot speak to overlayfs: its attributes `trusted.overlay.*` and `user.overlay.*`
//!   are dropped, as is `security.selinux`, which only the host can know.
//! - A directory that the layer does not list itself is made as 0755 of root. Differs from
//!   containerd, which copies it from the layer below: here layers do not know each other.
//!
//! Nothing is synced: see `layers` for what makes an unpacked layer survive a power cut.
//!
//! Sources: OCI Image Format Specification 1.1, `layer.md`; kernel `overlayfs.rst`; containerd
//! `pkg/archive/tar.go`.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, makedev, mkdirat,
    mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use tar::EntryType;

use super::stream::{BUFFER_LEN, Counting, Hashing, Pacer, decoded};
use super::tarball::{LayerError, Place, Spot, damaged, inside, place, unknown_kind};
use skep_worker_core::image::Digest;

/// The attribute that makes overlayfs stop at a directory.
pub(super) const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
const XATTR_RECORD: &[u8] = b"SCHILY.xattr.";
const DIR_MODE: u32 = 0o755;

/// Unpacks the possibly compressed stream `blob` into the empty directory `dir`.
///
/// The stream's digest must be `diff_id`; after an error the directory holds some of the layer and
/// must be thrown away.
pub(super) fn unpack(blob: impl Read, dir: &Path, diff_id: Digest) -> Result<(), LayerError> {
    let broken = |error: io::Error| LayerError::Damaged { offset: 0, detail: error.to_string() };
    let (_, stream) = decoded(blob).map_err(broken)?;
    let (mut stream, position) = Counting::new(Hashing::new(stream));
    let mut unpacker = Unpacker::new(dir).map_err(broken)?;
    let mut archive = tar::Archive::new(&mut stream);
    for entry in archive.entries().map_err(|error| damaged(&position, &error))? {
        let mut entry = entry.map_err(|error| damaged(&position, &error))?;
        unpacker.entry(&mut entry)?;
    }
    unpacker.finish();
    let found = stream.into_inner().finish().map_err(|error| damaged(&position, &error))?;
    if found != diff_id {
        return Err(LayerError::DiffId { expected: diff_id, found });
    }
    Ok(())
}

/// An errno and what was tried, until the entry's name is known.
type Failure = (&'static str, Errno);

trait Doing<T> {
    fn doing(self, action: &'static str) -> Result<T, Failure>;
}

impl<T> Doing<T> for Result<T, Errno> {
    fn doing(self, action: &'static str) -> Result<T, Failure> {
        self.map_err(|errno| (action, errno))
    }
}

struct Unpacker {
    root: OwnedFd,
    /// The directory of the last entry: the next one is mostly in the same.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Times are set last, because every file made in a directory changes them.
    dir_times: Vec<(PathBuf, TimeSpec)>,
    buffer: Vec<u8>,
}

/// What an entry's header says, in the types that the system calls take.
struct Attributes {
    uid: Uid,
    gid: Gid,
    mode: Mode,
    mtime: TimeSpec,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

impl Unpacker {
    fn new(dir: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = openat(AT_FDCWD, dir, flags, Mode::empty())?;
        chmod(&root, OsStr::new("."), Mode::from_bits_truncate(DIR_MODE))?;
        Ok(Self { root, parent: None, dir_times: Vec::new(), buffer: vec![0; BUFFER_LEN] })
    }

    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<(), LayerError> {
        let spot = Spot::of(entry);
        let kind = entry_type(entry);
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        match place(&entry.path_bytes()).ok_or_else(|| spot.clone().escape())? {
            Place::Skip => Ok(()),
            Place::Root => {
                let attributes = attributes(entry, &spot)?;
                let root = self.root.try_clone().map_err(|error| write_error(&spot, &error))?;
                set_attributes(&root, OsStr::new("."), &attributes, true).at(&spot)?;
                self.dir_times.push((PathBuf::new(), attributes.mtime));
                Ok(())
            }
            Place::Opaque(dir) => self
                .ensure_dir(&dir, &spot)
                .and_then(|dir| set_opaque(&dir, OsStr::new(".")).at(&spot)),
            Place::Whiteout(path) => self.whiteout(&path, &spot),
            Place::Node(path) => self.node(entry, kind, &path, &spot),
        }
    }

    fn whiteout(&mut self, path: &Path, spot: &Spot) -> Result<(), LayerError> {
        let (parent, name) = self.parent_of(path, spot)?;
        let device = mknodat(&parent, name, SFlag::S_IFCHR, Mode::empty(), 0);
        match device {
            // The layer has this path itself: it hides a lower file anyway, and a directory must
            // only be kept from merging with the lower one.
            Err(Errno::EEXIST) => match stat(&parent, name).at(spot)? {
                Some(stat) if is_dir(&stat) => set_opaque(&parent, name).at(spot),
                _ => Ok(()),
            },
            other => other.doing("create a whiteout").at(spot),
        }
    }

    fn node<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        kind: EntryType,
        path: &Path,
        spot: &Spot,
    ) -> Result<(), LayerError> {
        let attributes = attributes(entry, spot)?;
        let (parent, name) = self.parent_of(path, spot)?;
        let is_dir_entry = kind == EntryType::Directory;
        let existing = stat(&parent, name).at(spot)?;
        match &existing {
            Some(stat) if is_dir(stat) && is_dir_entry => {}
            Some(_) => self.delete(&parent, name, spot)?,
            None => {}
        }
        match kind {
            EntryType::Directory => {
                if !existing.as_ref().is_some_and(is_dir) {
                    make_dir(&parent, name).at(spot)?;
                }
                // The whiteout that stood here said: nothing of the lower directory.
                if existing.as_ref().is_some_and(is_whiteout) {
                    set_opaque(&parent, name).at(spot)?;
                }
                self.dir_times.push((path.to_owned(), attributes.mtime));
            }
            EntryType::Link => return self.hard_link(entry, &parent, name, spot),
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                symlinkat(OsStr::from_bytes(&target), &parent, name)
                    .doing("create a symbolic link")
                    .at(spot)?;
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                make_device(entry, kind, &parent, name, spot)?;
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.regular(entry, &parent, name, spot)?;
            }
            other => return Err(unknown_kind(spot, other)),
        }
        set_attributes(&parent, name, &attributes, kind != EntryType::Symlink).at(spot)
    }

    fn regular<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
        spot: &Spot,
    ) -> Result<(), LayerError> {
        let flags =
            OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(parent, name, flags, Mode::from_bits_truncate(0o600));
        let mut file = File::from(file.doing("create a file").at(spot)?);
        let expected = entry.size();
        let mut written = 0;
        let mut pacer = Pacer::default();
        loop {
            let n = match entry.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) => {
                    let detail = error.to_string();
                    return Err(LayerError::Damaged { offset: spot.offset + written, detail });
                }
            };
            file.write_all(&self.buffer[..n]).map_err(|error| write_error(spot, &error))?;
            written += n as u64;
            pacer.advance(&file, written);
        }
        if written < expected {
            return Err(spot.clone().cut_off(expected, written));
        }
        Ok(())
    }

    fn hard_link<R: Read>(
        &self,
        entry: &tar::Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
        spot: &Spot,
    ) -> Result<(), LayerError> {
        let target = entry.link_name_bytes().unwrap_or_default().into_owned();
        let missing = || LayerError::HardLink {
            entry: spot.entry.clone(),
            offset: spot.offset,
            target: OsString::from_vec(target.clone()),
        };
        let path = inside(&target).ok_or_else(|| spot.clone().escape())?;
        let target_name = path.file_name().ok_or_else(missing)?;
        let target_dir = match self.open_beneath(path.parent().unwrap_or(Path::new(""))) {
            Ok(dir) => dir,
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Err(missing()),
            Err(errno) => return Err(errno).doing("open the directory of a hard link").at(spot),
        };
        match linkat(&target_dir, target_name, parent, name, AtFlags::empty()) {
            Err(Errno::ENOENT) => Err(missing()),
            other => other.doing("create a hard link").at(spot),
        }
    }

    /// The directory that `path` is in, made if it does not exist, and the last part of `path`.
    fn parent_of<'a>(
        &mut self,
        path: &'a Path,
        spot: &Spot,
    ) -> Result<(OwnedFd, &'a OsStr), LayerError> {
        let name = path.file_name().expect("a place other than the root has a name");
        let dir = path.parent().unwrap_or(Path::new(""));
        if let Some((known, fd)) = &self.parent
            && known == dir
        {
            return Ok((fd.try_clone().map_err(|error| write_error(spot, &error))?, name));
        }
        let fd = self.ensure_dir(dir, spot)?;
        let kept = fd.try_clone().map_err(|error| write_error(spot, &error))?;
        self.parent = Some((dir.to_owned(), kept));
        Ok((fd, name))
    }

    fn open_beneath(&self, dir: &Path) -> Result<OwnedFd, Errno> {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        openat2(&self.root, dir, how)
    }

    /// Opens a directory of the layer, and makes what is missing of its path.
    fn ensure_dir(&mut self, dir: &Path, spot: &Spot) -> Result<OwnedFd, LayerError> {
        if let Ok(fd) = self.open_beneath(dir) {
            return Ok(fd);
        }
        let mut current = self.open_beneath(Path::new("")).doing("open the root").at(spot)?;
        let mut path = PathBuf::new();
        for name in dir {
            path.push(name);
            match stat(&current, name).at(spot)? {
                Some(stat) if is_dir(&stat) => {}
                Some(stat) if is_whiteout(&stat) => {
                    self.delete(&current, name, spot)?;
                    make_dir(&current, name).at(spot)?;
                    set_opaque(&current, name).at(spot)?;
                }
                Some(_) => {
                    let entry = spot.entry.clone();
                    return Err(LayerError::Through { entry, offset: spot.offset, through: path });
                }
                None => make_dir(&current, name).at(spot)?,
            }
            current = self.open_beneath(&path).doing("open a directory").at(spot)?;
        }
        Ok(current)
    }

    /// Deletes what an earlier entry of the same layer put at a path.
    fn delete(&mut self, parent: &OwnedFd, name: &OsStr, spot: &Spot) -> Result<(), LayerError> {
        match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {
                self.parent = None;
                let path = descriptor_path(parent, name);
                std::fs::remove_dir_all(path).map_err(|error| write_error(spot, &error))
            }
            other => other.doing("replace a file").at(spot),
        }
    }

    fn finish(&mut self) {
        for (dir, mtime) in self.dir_times.iter().rev() {
            // A later entry may have replaced the directory; then it has no time to restore.
            if let Ok(fd) = self.open_beneath(dir) {
                let name = OsStr::new(".");
                let _ = utimensat(&fd, name, mtime, mtime, UtimensatFlags::NoFollowSymlink);
            }
        }
    }
}

trait AtSpot<T> {
    fn at(self, spot: &Spot) -> Result<T, LayerError>;
}

impl<T> AtSpot<T> for Result<T, Failure> {
    fn at(self, spot: &Spot) -> Result<T, LayerError> {
        self.map_err(|(action, errno)| LayerError::Write {
            entry: spot.entry.clone(),
            offset: spot.offset,
            action,
            source: errno.into(),
        })
    }
}

fn write_error(spot: &Spot, error: &io::Error) -> LayerError {
    LayerError::Write {
        entry: spot.entry.clone(),
        offset: spot.offset,
        action: "write",
        source: error
            .raw_os_error()
            .map_or_else(|| error.kind().into(), io::Error::from_raw_os_error),
    }
}

/// The type of an entry. Archives older than ustar mark a directory by a slash alone.
fn entry_type<R: Read>(entry: &tar::Entry<'_, R>) -> EntryType {
    match entry.header().entry_type() {
        EntryType::Regular if entry.path_bytes().ends_with(b"/") => EntryType::Directory,
        kind => kind,
    }
}

fn attributes<R: Read>(
    entry: &mut tar::Entry<'_, R>,
    spot: &Spot,
) -> Result<Attributes, LayerError> {
    let refused = |detail: String| LayerError::Header {
        entry: spot.entry.clone(),
        offset: spot.offset,
        detail,
    };
    let id = |value: io::Result<u64>, what: &str| {
        let value = value.map_err(|error| refused(error.to_string()))?;
        u32::try_from(value).map_err(|_| refused(format!("{what} id {value} is too large")))
    };
    let uid = Uid::from_raw(id(entry.header().uid(), "user")?);
    let gid = Gid::from_raw(id(entry.header().gid(), "group")?);
    let mode = entry.header().mode().map_err(|error| refused(error.to_string()))?;
    let seconds = entry.header().mtime().map_err(|error| refused(error.to_string()))?;
    let mut mtime = TimeSpec::new(i64::try_from(seconds).unwrap_or(0), 0);
    let mut xattrs = Vec::new();
    let extensions = entry.pax_extensions().map_err(|error| refused(error.to_string()))?;
    for extension in extensions.into_iter().flatten() {
        let extension = extension.map_err(|error| refused(error.to_string()))?;
        if extension.key_bytes() == b"mtime" {
            mtime = extension.value().ok().and_then(pax_time).unwrap_or(mtime);
        } else if let Some(name) = extension.key_bytes().strip_prefix(XATTR_RECORD)
            && is_kept_xattr(name)
        {
            xattrs.push((OsStr::from_bytes(name).to_owned(), extension.value_bytes().to_owned()));
        }
    }
    Ok(Attributes { uid, gid, mode: Mode::from_bits_truncate(mode & 0o7777), mtime, xattrs })
}

fn is_kept_xattr(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.overlay.")
        && !name.starts_with(b"user.overlay.")
        && name != b"security.selinux"
}

/// Seconds with a fraction, as POSIX writes them.
fn pax_time(text: &str) -> Option<TimeSpec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: i64 = digits.parse().ok()?;
    if seconds < 0 {
        return Some(TimeSpec::new(seconds, 0)); // Before 1970, to the second.
    }
    Some(TimeSpec::new(seconds, nanos))
}

/// A path to `name` in an open directory, for calls that have no form with a descriptor. The last
/// part is not followed by those calls.
fn descriptor_path(parent: &OwnedFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name)
}

fn stat(parent: &OwnedFd, name: &OsStr) -> Result<Option<FileStat>, Failure> {
    match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(("look at a file", errno)),
    }
}

fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn is_dir(stat: &FileStat) -> bool {
    file_type(stat) == SFlag::S_IFDIR
}

fn is_whiteout(stat: &FileStat) -> bool {
    file_type(stat) == SFlag::S_IFCHR && stat.st_rdev == 0
}

fn chmod(parent: &OwnedFd, name: &OsStr, mode: Mode) -> Result<(), Errno> {
    // Nobody else writes here, so the name cannot become a link after it was made as a file.
    fchmodat(parent, name, mode, FchmodatFlags::FollowSymlink)
}

fn make_dir(parent: &OwnedFd, name: &OsStr) -> Result<(), Failure> {
    let mode = Mode::from_bits_truncate(DIR_MODE);
    mkdirat(parent, name, mode).doing("create a directory")?;
    chmod(parent, name, mode).doing("set the mode")
}

fn make_device<R: Read>(
    entry: &tar::Entry<'_, R>,
    kind: EntryType,
    parent: &OwnedFd,
    name: &OsStr,
    spot: &Spot,
) -> Result<(), LayerError> {
    let number = |value: io::Result<Option<u32>>| {
        value.map(|number| number.unwrap_or(0)).map_err(|error| LayerError::Header {
            entry: spot.entry.clone(),
            offset: spot.offset,
            detail: error.to_string(),
        })
    };
    let (flag, device) = match kind {
        EntryType::Fifo => (SFlag::S_IFIFO, 0),
        _ => {
            let major = number(entry.header().device_major())?;
            let minor = number(entry.header().device_minor())?;
            let flag = if kind == EntryType::Char { SFlag::S_IFCHR } else { SFlag::S_IFBLK };
            (flag, makedev(major.into(), minor.into()))
        }
    };
    mknodat(parent, name, flag, Mode::from_bits_truncate(0o600), device)
        .doing("create a device")
        .at(spot)
}

fn set_opaque(parent: &OwnedFd, name: &OsStr) -> Result<(), Failure> {
    let set = xattr::set(descriptor_path(parent, name), OPAQUE_XATTR, b"y");
    set.map_err(|error| ("make a directory opaque", errno(&error)))
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The order matters: a new owner clears set-user-id bits and file capabilities.
fn set_attributes(
    parent: &OwnedFd,
    name: &OsStr,
    attributes: &Attributes,
    has_mode: bool,
) -> Result<(), Failure> {
    let Attributes { uid, gid, mode, mtime, xattrs } = attributes;
    fchownat(parent, name, Some(*uid), Some(*gid), AtFlags::AT_SYMLINK_NOFOLLOW)
        .doing("set the owner")?;
    if has_mode {
        chmod(parent, name, *mode).doing("set the mode")?;
    }
    for (key, value) in xattrs {
        match xattr::set(descriptor_path(parent, name), key, value) {
            // The file system has none of this kind; Docker goes on too.
            Err(error) if errno(&error) == Errno::EOPNOTSUPP => {}
            other => {
                other.map_err(|error| ("set an extended attribute", errno(&error)))?;
            }
        }
    }
    utimensat(parent, name, mtime, mtime, UtimensatFlags::NoFollowSymlink).doing("set the time")
}
