//! What runs beside each container: makes it, starts it, keeps its output, records its end.
//!
//! [`shim_main`] is the whole life of the hidden command `skep shim --dir DIR`. It must be the
//! first thing a process does: there is one thread from start to end.
//!
//! # Reading order
//!
//! [`shim_main`], `create` (making the container), `watch` (the poll loop); `executor` and
//! `small_init` are what runs inside the container up to its program; `console` and `output` move
//! bytes.
//!
//! # Invariants
//!
//! - The first file that is written is `state.json` with this process in it, the last one
//!   `exit.json`.
//! - Until `start` the daemon's socket is this process's licence: when it closes, everything of the
//!   container goes away, directories included.
//! - Nothing here is sized by what the container does: two buffers of a line each, one for records.

mod console;
mod create;
mod executor;
mod messages;
mod output;
mod small_init;
mod watch;

pub(super) use executor::ExecExecutor;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::{Mode, umask};
use skep_runtime::sys::ProcessId;

use super::dirs::{DataDir, RunDir, remove_all, write_atomically};
use super::error::{Context, Error, chain};
use super::payloads;
use super::protocol::{Phase, Report, ShimConfig, ShimState, read_json, send};
use crate::sys;

/// Exit code of a shim that could not make its container.
const EXIT_FAILED: i32 = 125;

/// Protects the shim when memory runs out: the container goes first. containerd's value.
const OOM_SCORE_ADJ: &str = "-998";

/// Runs a container's shim in `dir` and never returns.
///
/// Call it before any thread exists. Standard input is the daemon's socket.
pub fn shim_main(dir: &Path) -> ! {
    let run = RunDir(dir.to_path_buf());
    let code = match run_shim(&run) {
        Ok(()) => 0,
        Err(error) => {
            // Nobody may listen; the file is what an operator finds then.
            eprintln!("{}", chain(&error));
            EXIT_FAILED
        }
    };
    std::process::exit(code)
}

fn run_shim(run: &RunDir) -> Result<(), Error> {
    prepare_process().during(|| "prepare the shim's process".into())?;
    let daemon = std::io::stdin().as_fd().try_clone_to_owned();
    let daemon = UnixStream::from(daemon.during(|| "open the daemon's socket".into())?);

    let config: ShimConfig =
        read_json(&run.shim_config()).during(|| "read the shim's configuration".into())?;
    let data = DataDir(config.data_dir.clone());
    let shim = ProcessId::current().during(|| "read the shim's own start time".into())?;
    let state =
        ShimState { shim, init: None, phase: Phase::Creating, started_at: None, kept: Vec::new() };
    write_state(run, &state)?;
    let received = payloads::receive(&daemon, config.n_payload_bytes);
    let received = received.during(|| "read the container's secrets".into());
    // A daemon that ends meanwhile wants nothing of it any more.
    let files = received.inspect_err(|_| remove_directories(run, &data))?;

    match create::create(run, &data, &config, files, state) {
        Ok(container) => {
            let created = Report::Created { init: container.init };
            // A daemon that is gone already is noticed by the loop, as end of file.
            let _ = send(&daemon, &created);
            let rotation = config.log;
            drop(config);
            sys::trim_memory();
            watch::watch(run, &data, rotation, container, daemon)
        }
        Err(error) => {
            let failed = Report::Failed { reason: error.reason() };
            if send(&daemon, &failed).is_err() {
                remove_directories(run, &data);
            }
            Err(error)
        }
    }
}

/// Detaches from the daemon: session, descriptors, signals, mask of new files.
fn prepare_process() -> std::io::Result<()> {
    sys::close_inherited_fds()?;
    // EPERM: already the leader of its group, hence spawned with a session of its own.
    let _ = nix::unistd::setsid();
    nix::sys::prctl::set_child_subreaper(true)?;
    nix::sys::prctl::set_name(c"skep-shim")?;
    umask(Mode::from_bits_truncate(0o022));
    std::env::set_current_dir("/")?;
    // Of all signals that ask a process to go, SIGKILL alone ends a shim: its work is to outlive.
    let mut blocked = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ] {
        blocked.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None)?;
    Ok(())
}

fn write_state(run: &RunDir, state: &ShimState) -> Result<(), Error> {
    let text = serde_json::to_vec(state).map_err(std::io::Error::from);
    text.and_then(|text| write_atomically(&run.state(), &text))
        .during(|| format!("write {}", run.state().display()))
}

/// Removes all that is on disk of a container that never ran.
fn remove_directories(run: &RunDir, data: &DataDir) {
    for directory in [run.path(), data.path()] {
        if let Err(error) = remove_all(directory) {
            eprintln!("failed to remove {}: {error}", directory.display());
        }
    }
}
