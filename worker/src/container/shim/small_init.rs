//! Process 1 of a container that asks for an init: passes signals on and reaps orphans.
//!
//! Docker mounts a program (`tini`) into the container for this. Here the process that would
//! execute the container's program forks instead: the child executes it, the parent stays. Nothing
//! has to fit the image. The parent has the container's user, capabilities and filter; it is not
//! dumpable, and its executable is on a read-only mount, so that the container gains nothing by it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::Pid;

use crate::sys;

/// Returns in the child, which executes the program; the parent ends with the child's exit code.
pub(super) fn fork_child(result: &OwnedFd) -> io::Result<()> {
    // Before the fork, so that no signal is lost between it and the loop.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    match sys::fork()? {
        None => {
            // A group of its own: a signal to process 1's group must not reach it twice.
            nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            sys::reset_signals()
        }
        Some(child) => {
            nix::sys::prctl::set_name(c"skep-init")?;
            // The shim waits for all copies of it to close.
            nix::unistd::close(result.as_raw_fd())?;
            std::process::exit(supervise(child))
        }
    }
}

/// Passes on what process 1 gets until `child` ends, and gives its exit code.
fn supervise(child: Pid) -> i32 {
    let all = SigSet::all();
    loop {
        match sys::wait_signal(&all) {
            Ok(number) if number == Signal::SIGCHLD as i32 => {
                while let Some((pid, ended)) = sys::reap_child() {
                    if pid == child.as_raw() {
                        // The kernel kills and reaps what is left when process 1 ends.
                        return ended.code();
                    }
                }
            }
            Ok(number) => sys::kill(child.as_raw(), number),
            // EINTR: stopped and continued.
            Err(_) => {}
        }
    }
}
