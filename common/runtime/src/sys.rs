//! System calls that the standard library and `nix` do not wrap safely.
//!
//! The only file of this package that holds `unsafe` code. It decides nothing: callers are the
//! laboratory (`skep lab`), the shim and tests.
//!
//! # Invariants
//!
//! - A process is named by its pid *and* its start time ([`ProcessId`]), so that a pid that was
//!   used again is never signalled.
//! - What runs between `fork` and `exec` allocates nothing and takes no lock.

#![expect(unsafe_code, reason = "the one place for system calls without a safe wrapper")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use serde::{Deserialize, Serialize};

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ProcessId {
    /// The pid, as seen from the process that made this value.
    pub pid: i32,
    /// When it started, in clock ticks since the machine booted (proc(5), `stat`, field 22).
    pub start_time: u64,
}

impl ProcessId {
    /// Names the process that has this pid now; a zombie counts as gone.
    pub fn of(pid: i32) -> io::Result<Self> {
        let (state, start_time) = read_stat(pid)?;
        if matches!(state, 'Z' | 'X') {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        Ok(Self { pid, start_time })
    }

    /// Names the calling process.
    pub fn current() -> io::Result<Self> {
        Self::of(std::process::id().try_into().map_err(io::Error::other)?)
    }

    /// Tells whether this very process still runs; a zombie does not.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid).is_ok_and(|found| found == self)
    }

    /// Opens a handle on this very process, or gives `None` when it is gone.
    pub fn open(self) -> io::Result<Option<PidFd>> {
        let handle = match PidFd::open(self.pid) {
            Ok(handle) => handle,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // The handle is on whatever has the pid now; only then is comparing free of a race.
        Ok(self.is_alive().then_some(handle))
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pid, self.start_time)
    }
}

impl FromStr for ProcessId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (pid, start_time) = text.split_once(':')?;
            Some(Self { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? })
        };
        parse().ok_or_else(|| format!("{text:?} is not PID:START-TIME"))
    }
}

/// Reads the state and the start time of a process.
fn read_stat(pid: i32) -> io::Result<(char, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&stat).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat: {stat:?}")))
}

/// The command name may hold spaces and parentheses: fields are counted from the last one.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// A handle on a process, pidfd_open(2): what it is sent never reaches another process.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens a handle on the process that has this pid now.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: the call takes two integers; the result is an error or a new descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends a signal; a process that is gone already is no error.
    pub fn send_signal(&self, signal: Signal) -> io::Result<()> {
        let info = std::ptr::null::<libc::siginfo_t>();
        let (fd, number) = (self.0.as_raw_fd(), signal as i32);
        // SAFETY: the descriptor is open while `self` lives, and a null `info` is allowed.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, number, info, 0) };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process has ended, and tells whether it did before the time was over.
    ///
    /// `None` waits without end.
    pub fn wait_exit(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout = match timeout {
            None => PollTimeout::NONE,
            Some(timeout) => PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX),
        };
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, timeout) {
                Ok(n_ready) => return Ok(n_ready > 0),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How a child process differs from its parent; see [`prepare_child`].
#[derive(Debug, Clone, Copy, Default)]
pub struct ChildSetup {
    /// Starts a session of its own: no terminal's signal reaches the child.
    pub new_session: bool,
    /// The signal the child gets when the thread that spawned it ends.
    pub parent_death_signal: Option<Signal>,
}

/// Has `command` start its child with no signal blocked, and as `setup` says.
///
/// The parent may block signals to read them from a descriptor; a child would inherit that.
pub fn prepare_child(command: &mut Command, setup: ChildSetup) {
    let start = move || -> io::Result<()> {
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        if setup.new_session {
            nix::unistd::setsid()?;
        }
        if let Some(signal) = setup.parent_death_signal {
            nix::sys::prctl::set_pdeathsig(signal)?;
        }
        Ok(())
    };
    // SAFETY: the closure makes three system calls on values it owns; it neither allocates nor
    // locks, so that running it between fork and exec is sound.
    unsafe { command.pre_exec(start) };
}

/// Has no descriptor but standard input, output and error survive the next `exec`.
///
/// A long-lived process would otherwise keep a caller's pipes open, and the caller waiting.
pub fn close_others_on_exec() -> io::Result<()> {
    // SAFETY: close_range(2) takes three integers, and with this flag closes nothing now.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_the_last_parenthesis() {
        let stat = "12 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        assert_eq!(parse_stat(stat), Some(('S', 4242)));
        assert_eq!(parse_stat("12 (x) S 1 2"), None);
    }

    #[test]
    fn a_process_is_found_by_pid_and_start_time_and_is_gone_after_its_exit() {
        let mut command = Command::new("sleep");
        prepare_child(command.arg("600"), ChildSetup { new_session: true, ..Default::default() });
        let mut child = command.spawn().unwrap();
        let process = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert_eq!(process.to_string().parse(), Ok(process));

        let reused = ProcessId { start_time: process.start_time + 1, ..process };
        assert!(reused.open().unwrap().is_none(), "another start time is another process");

        let handle = process.open().unwrap().expect("it sleeps");
        assert!(!handle.wait_exit(Some(Duration::ZERO)).unwrap());
        handle.send_signal(Signal::SIGKILL).unwrap();
        assert!(handle.wait_exit(Some(Duration::from_secs(30))).unwrap());
        assert!(!process.is_alive(), "a zombie does not run");
        child.wait().unwrap();
        assert!(process.open().unwrap().is_none());
        handle.send_signal(Signal::SIGKILL).expect("signalling a process that ended is no error");
    }

    #[test]
    fn a_child_starts_with_no_signal_blocked() {
        SigSet::all().thread_block().unwrap();
        let mut command = Command::new("grep");
        prepare_child(command.args(["SigBlk", "/proc/self/status"]), ChildSetup::default());
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.split_whitespace().nth(1), Some("0000000000000000"), "{text}");
    }
}
