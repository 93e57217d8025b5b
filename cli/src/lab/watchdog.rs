//! The process that removes a lab nobody will remove.
//!
//! `up` starts one, detached, before it makes anything. It waits for the end of `up`; when the lab
//! did not come up it removes it, whatever ended `up`. With `--until-exit-of` it then waits for that
//! process, a test's, and removes the lab after it. `down` ends the watchdog of a lab; one that
//! `down` does not find, because the record is lost, sees the switch end and goes by itself.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use clap::Args;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use skep_runtime::sys::{PidFd, ProcessId};

use super::down;
use super::state::{Lab, LabPaths, Phase, SWITCH};

/// Arguments of the hidden `skep lab watchdog`.
#[derive(Debug, Args)]
pub(crate) struct WatchdogArgs {
    /// The lab this is about; a later one of the same name is left alone.
    #[arg(long)]
    id: String,
    /// The `up` that makes the lab.
    #[arg(long)]
    up: ProcessId,
    /// The process after whose end the lab is removed.
    #[arg(long)]
    until_exit_of: Option<ProcessId>,
}

/// Waits, and removes the lab when it is time.
pub(super) fn run(name: &str, args: &WatchdogArgs) -> Result<()> {
    let paths = LabPaths::new(name);
    // Opened first: the process may end while `up` still runs.
    let until = args.until_exit_of.map(ProcessId::open).transpose()?;
    if let Some(up) = args.up.open()? {
        up.wait_exit(None).context("wait for up")?;
    }
    let is_ours = |lab: &Lab| lab.id == args.id;
    if paths.load().is_ok_and(|lab| is_ours(&lab) && lab.phase == Phase::Up) {
        match until {
            None => return Ok(()),
            Some(None) => {}
            Some(Some(process)) => wait(&paths, &process, is_ours)?,
        }
    }
    down::remove_if(&paths, is_ours)
}

/// Waits until the process has ended, or the lab is gone.
fn wait(paths: &LabPaths, process: &PidFd, is_ours: impl Fn(&Lab) -> bool) -> Result<()> {
    let switch = paths.member(SWITCH).load_init().map(ProcessId::open).transpose()?.flatten();
    if let Some(switch) = switch {
        let mut fds = [process, &switch].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
        while let Err(error) = poll(&mut fds, PollTimeout::NONE) {
            if error != Errno::EINTR {
                return Err(error).context("poll");
            }
        }
        if fds[0].any().unwrap_or(true) {
            return Ok(());
        }
    }
    // Without a switch this is a `down` under way, or one that is over, or a broken lab.
    let lock = paths.lock()?;
    if paths.load().is_ok_and(|lab| is_ours(&lab)) {
        drop(lock);
        process.wait_exit(None).context("wait for the process")?;
    }
    Ok(())
}
