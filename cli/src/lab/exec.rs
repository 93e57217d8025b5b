//! `skep lab exec` and `skep lab client`: runs a command in a member's namespaces.
//!
//! The command ends with the member when its power goes, and with this process when that is
//! killed. Its exit code becomes ours; 128 + n when signal n ended it, as in a shell.

use std::env;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use skep_runtime::sys::{ChildSetup, PidFd, ProcessId, prepare_child};

use super::node::{client_url, running_init};
use super::state::{CLIENT, LabPaths, SWITCH};

/// Signals that are passed on to the command.
const FORWARDED: [Signal; 6] = [
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Runs `command` on a member and waits for it.
pub(super) fn run(lab_name: &str, member: &str, command: &[OsString]) -> Result<ExitCode> {
    let paths = LabPaths::new(lab_name);
    if !matches!(member, CLIENT | SWITCH) {
        paths.load()?.node(member)?;
    }
    let Some(init) = running_init(&paths.member(member)) else {
        paths.load()?;
        bail!("{member} of lab {lab_name} is down: start it with `skep lab start {member}`");
    };
    let (program, args) = command.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(args).env("PATH", path_with_skep()?).env("SKEP_HOST", client_url());
    // The lab's directories and the host's Docker are not the node's.
    command.env_remove("SKEP_LAB").env_remove("DOCKER_HOST");
    if let Ok(dir) = env::current_dir() {
        command.current_dir(dir);
    }
    enter(init).with_context(|| format!("enter {member}"))?;
    run_to_end(command).with_context(|| format!("run {} on {member}", program.display()))
}

/// `skep` on a node is this very program, wherever it is.
fn path_with_skep() -> Result<OsString> {
    let program = env::current_exe().context("find the program")?;
    let own = program.parent().map(ToOwned::to_owned);
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths(own.into_iter().chain(env::split_paths(&path))).context("set PATH")
}

fn enter(init: ProcessId) -> Result<()> {
    let handle = init.open()?.context("it has just ended")?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID;
    Ok(setns(handle.as_fd(), namespaces)?)
}

fn run_to_end(mut command: Command) -> Result<ExitCode> {
    let mask: SigSet = FORWARDED.into_iter().collect();
    mask.thread_block().context("block signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&mask, flags).context("signalfd")?;
    let setup = ChildSetup { parent_death_signal: Some(Signal::SIGKILL), ..Default::default() };
    prepare_child(&mut command, setup);
    let mut child = command.spawn()?;
    let handle = PidFd::open(i32::try_from(child.id())?).context("open the child")?;
    loop {
        let mut fds = [
            PollFd::new(handle.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            done => done.context("poll")?,
        };
        if fds[0].any().unwrap_or(true) {
            break;
        }
        while let Ok(Some(info)) = signals.read_signal() {
            let signal = Signal::try_from(i32::try_from(info.ssi_signo)?)?;
            // A terminal sends its signals to the whole process group, child included.
            if info.ssi_code != libc::SI_KERNEL {
                handle.send_signal(signal).context("forward a signal")?;
            }
        }
    }
    let status = child.wait()?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}
