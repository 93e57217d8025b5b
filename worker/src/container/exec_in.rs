//! Runs one command in a running container, for health checks.
//!
//! [`exec_in_main`] is the whole life of the hidden command `skep exec-in --dir DIR -- ARGV`, a
//! process with one thread from start to end. Standard input is the daemon's socket, standard output
//! takes the command's output. When the socket closes or the daemon says anything on it, the command
//! is killed with all processes of its session.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::{Capability, LinuxCapabilities, Process, Spec};
use libcontainer::syscall::syscall::SyscallType;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use skep_runtime::sys::PidFd;
use skep_worker_core::oci::process;

use super::cgroup::Cgroup;
use super::dirs::{RunDir, remove_all};
use super::error::{Context, Error, chain, unwrapped};
use super::protocol::{ExecReport, ShimConfig, read_json, send};
use super::shim::ExecExecutor;
use crate::sys;

/// Rounds of looking for processes of the session; each one can only have been forked meanwhile.
const N_KILL_ROUNDS: usize = 32;

/// How long a killed process may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs `argv` in the container of `dir` with `env` added, and never returns.
///
/// Call it before any thread exists. Standard input is the daemon's socket.
pub fn exec_in_main(dir: &Path, argv: Vec<String>, env: &[String]) -> ! {
    let code = match run(&RunDir(dir.to_path_buf()), argv, env) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{}", chain(&error));
            1
        }
    };
    std::process::exit(code)
}

fn run(run: &RunDir, argv: Vec<String>, env: &[String]) -> Result<(), Error> {
    sys::close_inherited_fds().during(|| "close inherited descriptors".into())?;
    nix::sys::prctl::set_name(c"skep-exec-in").during(|| "name the process".into())?;
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None).during(|| "block signals".into())?;
    let signals = SignalFd::with_flags(&blocked, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .during(|| "open a signal descriptor".into())?;
    let daemon = std::io::stdin().as_fd().try_clone_to_owned();
    let daemon = UnixStream::from(daemon.during(|| "open the daemon's socket".into())?);

    let config: ShimConfig =
        read_json(&run.shim_config()).during(|| "read the container's configuration".into())?;
    // A root of its own in the run directory: the runtime leaves a socket behind there.
    let root = run.path().join(format!("exec-{}", std::process::id()));
    let started = start(run, &config, &root, argv, env);
    let cleaned = remove_all(&root).during(|| format!("remove {}", root.display()));
    let report = match started.and_then(|pid| cleaned.map(|()| pid)) {
        Ok(pid) => {
            let cgroup = Cgroup::open(&config.spec.cgroup_path());
            let cgroup = cgroup.during(|| "find the cgroup mounts".into())?;
            release_output()?;
            supervise(pid, &signals, &daemon, &cgroup)?
        }
        Err(error) => ExecReport::Failed { reason: error.reason() },
    };
    // A daemon that went away needs no report.
    let _ = send(&daemon, &report);
    Ok(())
}

/// Starts the command; gives its pid.
fn start(
    run: &RunDir,
    config: &ShimConfig,
    root: &Path,
    argv: Vec<String>,
    env: &[String],
) -> Result<i32, Error> {
    let id = &config.spec.id;
    let failed = |reason: String| Error::Exec { id: id.clone(), reason };
    let own = root.join(id);
    fs::create_dir_all(&own).during(|| format!("create {}", own.display()))?;
    let state = run.runtime_root().join(id).join("state.json");
    fs::copy(&state, own.join("state.json")).during(|| format!("read {}", state.display()))?;

    let spec: Spec = read_json(&run.spec()).during(|| "read the specification".into())?;
    let (process, capabilities) =
        tenant_process(&spec, argv, env).ok_or_else(|| failed("it has no process".into()))?;
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let context = || "pass the command on".to_owned();
    let description = memfd_create("process.json", MFdFlags::MFD_CLOEXEC).during(context)?;
    let mut description = fs::File::from(description);
    let text = serde_json::to_vec(&process).map_err(io::Error::from).during(context)?;
    description.write_all(&text).during(context)?;
    // Open until the command runs.
    let description = OwnedFd::from(description);
    let path = super::process::fd_path(&description);

    let output = || std::io::stdout().as_fd().try_clone_to_owned().during(context);
    let null = fs::File::open("/dev/null").during(|| "open /dev/null".into())?;
    let pid = ContainerBuilder::new(id.clone(), SyscallType::Linux)
        .with_root_path(root)
        .map_err(|error| failed(unwrapped(&error)))?
        .with_executor(ExecExecutor::new(seccomp, capabilities))
        .with_stdin(null)
        .with_stdout(output()?)
        .with_stderr(output()?)
        .as_tenant()
        .with_process(Some(PathBuf::from(path)))
        .with_detach(false)
        .build()
        .map_err(|error| failed(unwrapped(&error)))?;
    Ok(pid.as_raw())
}

/// The container's process with another command line and added variables; its capabilities.
///
/// For loading the filter it starts with two capabilities more, which its executor drops.
fn tenant_process(
    spec: &Spec,
    argv: Vec<String>,
    env: &[String],
) -> Option<(Process, LinuxCapabilities)> {
    let mut tenant = spec.process().clone()?;
    let capabilities = tenant.capabilities().clone()?;
    let mut variables = tenant.env().clone().unwrap_or_default();
    for variable in env {
        process::set(&mut variables, variable);
    }
    let mut raised = capabilities.clone();
    let raise = |set: &Option<std::collections::HashSet<Capability>>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend([Capability::SysAdmin, Capability::Setpcap]);
        Some(set)
    };
    raised
        .set_bounding(raise(capabilities.bounding()))
        .set_effective(raise(capabilities.effective()))
        .set_permitted(raise(capabilities.permitted()));
    tenant
        .set_terminal(Some(false))
        .set_args(Some(argv))
        .set_env(Some(variables))
        .set_capabilities(Some(raised));
    Some((tenant, capabilities))
}

/// Closes this process's copies of the output, so that it ends with the command.
fn release_output() -> Result<(), Error> {
    let context = || "replace standard output".to_owned();
    let null = fs::OpenOptions::new().write(true).open("/dev/null").during(context)?;
    nix::unistd::dup2_stdout(&null).during(context)?;
    nix::unistd::dup2_stderr(&null).during(context)
}

/// Waits for the command; kills it when the daemon asks or goes away.
fn supervise(
    pid: i32,
    signals: &SignalFd,
    daemon: &UnixStream,
    cgroup: &Cgroup,
) -> Result<ExecReport, Error> {
    let mut is_killed = false;
    loop {
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if !is_killed {
            fds.push(PollFd::new(daemon.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).during(|| "wait for the command".into()),
        }
        let has_events = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let is_asked = fds.get(1).is_some_and(has_events);
        while let Ok(Some(_)) = signals.read_signal() {}
        while let Some((ended_pid, ended)) = sys::reap_child() {
            if ended_pid == pid {
                return Ok(ExecReport::Exited { code: ended.code() });
            }
        }
        if is_asked {
            is_killed = true;
            kill_session(pid, cgroup);
        }
    }
}

/// Kills the command and all processes of its session that are in the container's cgroup, and
/// waits until they have ended.
fn kill_session(leader: i32, cgroup: &Cgroup) {
    let mut killed: BTreeMap<i32, Option<PidFd>> = BTreeMap::new();
    for _ in 0..N_KILL_ROUNDS {
        let is_new = |pid: &i32| !killed.contains_key(pid) && session_of(*pid) == Some(leader);
        let found: Vec<i32> = cgroup.pids().into_iter().filter(is_new).collect();
        if found.is_empty() {
            break;
        }
        for pid in found {
            let handle = PidFd::open(pid).ok();
            sys::kill(pid, libc::SIGKILL);
            killed.insert(pid, handle);
        }
    }
    sys::kill(leader, libc::SIGKILL);
    for handle in killed.into_values().flatten() {
        // One that the kernel cannot end, because its disk stands still, must not hold up the rest.
        let _ = handle.wait_exit(Some(KILL_TIMEOUT));
    }
}

fn session_of(pid: i32) -> Option<i32> {
    nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid))).ok().map(nix::unistd::Pid::as_raw)
}
