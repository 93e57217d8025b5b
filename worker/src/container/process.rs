//! The daemon's handle on a process that it started or found.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use skep_runtime::sys::PidFd;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Children that ended, or will, and that nobody waits for any more.
///
/// A child that is not waited for stays as a zombie. Operations sweep this list in passing.
#[derive(Debug, Default)]
pub(super) struct Reaper {
    unreaped: Mutex<Vec<OwnedFd>>,
}

impl Reaper {
    /// Reaps every child of the list that has ended.
    pub(super) fn sweep(&self) {
        let mut unreaped = self.unreaped.lock().expect("no holder of this lock panics");
        unreaped.retain(|fd| !is_reaped(fd));
    }

    fn add(&self, fd: OwnedFd) {
        self.unreaped.lock().expect("no holder of this lock panics").push(fd);
        self.sweep();
    }
}

/// Reaps a child; true also where it is none of ours, as after a restart of the daemon.
fn is_reaped(fd: &impl AsFd) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    !matches!(waitid(Id::PIDFd(fd.as_fd()), flags), Ok(WaitStatus::StillAlive))
}

/// A process whose end can be awaited by any number of tasks.
#[derive(Debug)]
pub(super) struct Process {
    fd: AsyncFd<OwnedFd>,
    reaper: Arc<Reaper>,
}

impl Process {
    /// Watches the process behind `pidfd`.
    pub(super) fn new(pidfd: &PidFd, reaper: Arc<Reaper>) -> io::Result<Self> {
        let fd = pidfd.as_fd().try_clone_to_owned()?;
        Ok(Self { fd: sys::watch_readable(fd)?, reaper })
    }

    /// Waits until the process has ended. Cancel-safe.
    pub(super) async fn ended(&self) -> io::Result<()> {
        // The descriptor stays readable for ever after the end, so readiness is never cleared.
        let _guard = self.fd.readable().await?;
        is_reaped(self.fd.get_ref());
        Ok(())
    }

    /// Kills the process itself.
    pub(super) fn kill(&self) -> io::Result<()> {
        sys::send_signal(self.fd.get_ref().as_fd(), libc::SIGKILL)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !is_reaped(self.fd.get_ref())
            && let Ok(fd) = self.fd.get_ref().as_fd().try_clone_to_owned()
        {
            self.reaper.add(fd);
        }
    }
}

/// The path by which this process and children it has just forked can open what `fd` is.
pub(super) fn fd_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}
