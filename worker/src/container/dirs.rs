//! Where everything of a container lies.
//!
//! The *run directory* is on a tmpfs and holds what ends with the machine's uptime; the *data
//! directory* is on disk and holds what containers write and say.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

/// A container's run directory, the shim's `--dir`.
#[derive(Debug, Clone)]
pub(super) struct RunDir(pub(super) PathBuf);

impl RunDir {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// What the shim is to make: `ShimConfig`.
    pub(super) fn shim_config(&self) -> PathBuf {
        self.0.join("shim.json")
    }

    /// The OCI specification.
    pub(super) fn spec(&self) -> PathBuf {
        self.0.join("config.json")
    }

    /// What the shim has made: `ShimState`.
    pub(super) fn state(&self) -> PathBuf {
        self.0.join("state.json")
    }

    /// How the container ended: `ExitStatus`.
    pub(super) fn exit(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// Exists when the container was lost and cleaned up after.
    pub(super) fn lost(&self) -> PathBuf {
        self.0.join("lost")
    }

    /// Mount point of the root file system.
    pub(super) fn rootfs(&self) -> PathBuf {
        self.0.join("rootfs")
    }

    /// Short names of the layers, for the mount's options.
    pub(super) fn links(&self) -> PathBuf {
        self.0.join("l")
    }

    /// Mount point of the secrets and configs.
    pub(super) fn payloads(&self) -> PathBuf {
        self.0.join("payloads")
    }

    /// State directory of libcontainer, which adds the id.
    pub(super) fn runtime_root(&self) -> PathBuf {
        self.0.join("lc")
    }

    /// Name of the socket that hands over the terminal.
    pub(super) fn console_socket(&self) -> PathBuf {
        self.0.join("console.sock")
    }

    /// What the shim itself says, when it panics.
    pub(super) fn shim_messages(&self) -> PathBuf {
        self.0.join("shim.err")
    }
}

/// A container's data directory.
#[derive(Debug, Clone)]
pub(super) struct DataDir(pub(super) PathBuf);

impl DataDir {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Upper directory of the overlay.
    pub(super) fn upper(&self) -> PathBuf {
        self.0.join("upper")
    }

    /// Work directory of the overlay.
    pub(super) fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    /// File `number` of the container's output: `log`, `log.1`, `log.2`, …, each later than the one
    /// before. A file is never renamed.
    pub(super) fn log_file(&self, number: u64) -> PathBuf {
        match number {
            0 => self.0.join("log"),
            _ => self.0.join(format!("log.{number}")),
        }
    }

    /// The numbers of the files of the container's output that are there, oldest first.
    pub(super) fn log_numbers(&self) -> io::Result<BTreeSet<u64>> {
        let mut numbers = BTreeSet::new();
        for entry in std::fs::read_dir(&self.0)? {
            numbers.extend(log_number(&entry?.file_name()));
        }
        Ok(numbers)
    }

    /// Whether anything but the container's output is there.
    pub(super) fn has_more_than_log(&self) -> io::Result<bool> {
        Ok(self.all_but_log()?.is_some_and(|paths| !paths.is_empty()))
    }

    /// Removes everything but the container's output, and the directory where there is none.
    pub(super) fn remove_all_but_log(&self) -> io::Result<()> {
        let Some(paths) = self.all_but_log()? else { return Ok(()) };
        for path in paths {
            remove_all(&path)?;
        }
        if self.log_numbers()?.is_empty() { remove_all(&self.0) } else { Ok(()) }
    }

    /// `None` where there is no directory.
    fn all_but_log(&self) -> io::Result<Option<Vec<PathBuf>>> {
        let entries = match std::fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries?,
        };
        let entries = entries.collect::<io::Result<Vec<_>>>()?;
        let others = entries.iter().filter(|entry| log_number(&entry.file_name()).is_none());
        Ok(Some(others.map(std::fs::DirEntry::path).collect()))
    }

    pub(super) fn hosts(&self) -> PathBuf {
        self.0.join("hosts")
    }

    pub(super) fn hostname(&self) -> PathBuf {
        self.0.join("hostname")
    }

    pub(super) fn resolv_conf(&self) -> PathBuf {
        self.0.join("resolv.conf")
    }
}

/// The number of a file of a container's output.
fn log_number(name: &OsStr) -> Option<u64> {
    match name.to_str()?.strip_prefix("log")? {
        "" => Some(0),
        rest => rest.strip_prefix('.')?.parse().ok(),
    }
}

/// Writes a file so that a reader sees all of it or nothing.
pub(super) fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, content)?;
    std::fs::rename(&temporary, path)
}

/// Removes a file or a directory with all that is in it; it need not exist.
pub(super) fn remove_all(path: &Path) -> io::Result<()> {
    let result = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
