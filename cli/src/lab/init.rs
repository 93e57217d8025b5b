//! The init of a member: pid 1 of its PID namespace.
//!
//! `up` and `start` run it in two stages, both of them `skep lab init`, single-threaded and without
//! tokio. The first joins the member's cgroup and unshares the PID namespace; the second, pid 1
//! in there, unshares the rest, mounts what a machine of its own has, and then serves
//! [`control`](super::control) requests and reaps orphans until it is killed.
//!
//! # Invariants
//!
//! - It never exits by itself: its end is the power loss of its node.
//! - The daemon is its child and is started only when asked, after the network is plugged in.
//! - A daemon's end is recorded, not repaired: tests and users decide when it comes back.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use skep_runtime::sys::{ChildSetup, ProcessId, close_others_on_exec, prepare_child};

use super::cgroup;
use super::control::{Request, Status, TIMEOUT, read_line, write_line};
use super::state::{MemberPaths, write_json};

/// What stage two says once the member is a machine of its own.
const READY: &str = "ready";

/// What of the caller's environment a daemon gets, besides all `SKEP_` and `RUST_` variables.
const KEPT_VARIABLES: [&str; 5] = ["PATH", "HOME", "LANG", "LC_ALL", "TZ"];

/// Arguments of the hidden `skep lab init`.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The member's spec.json.
    #[arg(long)]
    spec: PathBuf,
    /// This process is pid 1 already.
    #[arg(long)]
    stage_two: bool,
}

/// What a member is made of; written by `up`, read by both stages.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Spec {
    pub host_name: String,
    pub cgroup: String,
    /// Where stage one records the process that becomes pid 1.
    pub init_file: PathBuf,
    pub control_socket: PathBuf,
    /// Directories of the host and where the member sees them.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Directories of the host that the member sees empty.
    pub hidden: Vec<PathBuf>,
    pub daemon: Option<DaemonSpec>,
}

/// How a node's daemon is started.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DaemonSpec {
    pub program: PathBuf,
    pub args: Vec<String>,
    pub log: PathBuf,
}

/// Boots a member; returns once its namespaces are made and its init answers.
pub(super) fn boot(member: &MemberPaths, spec: &Spec) -> Result<()> {
    write_json(&member.spec(), spec)?;
    let log = File::create(member.init_log()).context("make the init's log")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("skep").args(["lab", "init", "--spec"]).arg(member.spec());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    prepare_child(&mut command, ChildSetup { new_session: true, ..Default::default() });
    let status = command.status().context("start the init")?;
    if !status.success() {
        let log = std::fs::read_to_string(member.init_log()).unwrap_or_default();
        bail!("the init of {} failed: {}", spec.host_name, log.trim());
    }
    Ok(())
}

/// Runs one of the two stages.
pub(super) fn run(args: &InitArgs) -> Result<ExitCode> {
    let spec = std::fs::read(&args.spec).with_context(|| args.spec.display().to_string())?;
    let spec: Spec = serde_json::from_slice(&spec).context("read the spec")?;
    if args.stage_two {
        Init::new(spec)?.serve()
    } else {
        stage_one(&args.spec, &spec)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn stage_one(spec_path: &Path, spec: &Spec) -> Result<()> {
    cgroup::join(&spec.cgroup)?;
    close_others_on_exec().context("mark open files")?;
    unshare(CloneFlags::CLONE_NEWPID).context("make a PID namespace")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("skep").args(["lab", "init", "--stage-two", "--spec"]).arg(spec_path);
    // The working directory must not hold a file system of the caller.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).current_dir("/");
    let mut child = command.spawn().context("start pid 1")?;
    let pid = i32::try_from(child.id()).context("pid")?;
    let process = ProcessId::of(pid).with_context(|| format!("find pid {pid}"))?;
    write_json(&spec.init_file, &process)?;

    let mut line = String::new();
    let stdout = child.stdout.take().context("no pipe to pid 1")?;
    BufReader::new(stdout).read_line(&mut line).context("wait for pid 1")?;
    if line.trim() != READY {
        bail!("pid 1 ended: {}", child.wait()?);
    }
    Ok(())
}

/// Makes what a machine of its own has, but for the network, which the lab plugs in.
fn make_machine(spec: &Spec) -> Result<()> {
    let namespaces = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    unshare(namespaces).context("make namespaces")?;
    nix::unistd::sethostname(&spec.host_name).context("set the host name")?;

    let (nothing, no_text) = (None::<&Path>, None::<&str>);
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(nothing, "/", nothing, private, no_text).context("make mounts private")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, no_text).context("mount /proc")?;
    for (from, to) in &spec.binds {
        mount(Some(from), to, nothing, MsFlags::MS_BIND, no_text)
            .with_context(|| format!("bind {} on {}", from.display(), to.display()))?;
    }
    for dir in spec.hidden.iter().filter(|dir| dir.exists()) {
        let flags = flags | MsFlags::MS_RDONLY;
        mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some("size=4k,mode=755"))
            .with_context(|| format!("hide {}", dir.display()))?;
    }
    Ok(())
}

/// Pid 1 at work.
struct Init {
    spec: Spec,
    listener: UnixListener,
    signals: SignalFd,
    log: Option<File>,
    daemon: Option<Pid>,
    last_exit: Option<String>,
}

impl Init {
    fn new(spec: Spec) -> Result<Self> {
        let mask = SigSet::all();
        mask.thread_block().context("block signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&mask, flags).context("signalfd")?;
        // Socket and log are opened before the lab's directories are hidden.
        let listener = UnixListener::bind(&spec.control_socket)
            .with_context(|| format!("listen on {}", spec.control_socket.display()))?;
        let log = match &spec.daemon {
            None => None,
            Some(daemon) => Some(open_log(&daemon.log)?),
        };
        make_machine(&spec)?;
        let init = Self { spec, listener, signals, log, daemon: None, last_exit: None };
        println!("{READY}");
        std::io::stdout().flush().context("say ready")?;
        let null = OpenOptions::new().write(true).open("/dev/null").context("/dev/null")?;
        nix::unistd::dup2_stdout(&null).context("leave standard output")?;
        Ok(init)
    }

    fn serve(mut self) -> Result<ExitCode> {
        loop {
            let mut fds = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                done => done.context("poll")?,
            };
            let is_ready = |fd: &PollFd| fd.any().unwrap_or(true);
            let (has_signal, has_request) = (is_ready(&fds[0]), is_ready(&fds[1]));
            if has_signal {
                // Only SIGCHLD matters here; pid 1 ignores every other signal but SIGKILL.
                while matches!(self.signals.read_signal(), Ok(Some(_))) {}
                self.reap();
            }
            if has_request && let Ok((stream, _)) = self.listener.accept() {
                // A caller that went away or wrote nonsense concerns nobody else.
                if let Err(error) = self.answer(&stream) {
                    eprintln!("request failed: {error:#}");
                }
            }
        }
    }

    /// Takes the exit of every process that ended, orphans of the node included.
    fn reap(&mut self) {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            match (status.pid(), status) {
                (None, _) => return,
                (Some(pid), status) if self.daemon == Some(pid) => self.record_exit(status),
                _ => {}
            }
        }
    }

    fn record_exit(&mut self, status: WaitStatus) {
        self.daemon = None;
        self.last_exit = Some(match status {
            WaitStatus::Exited(_, code) => format!("exited with code {code}"),
            WaitStatus::Signaled(_, signal, _) => format!("was ended by {signal}"),
            other => format!("{other:?}"),
        });
    }

    fn answer(&mut self, stream: &UnixStream) -> Result<()> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let request: Request = read_line(stream)?;
        self.reap();
        let done = match request {
            Request::Status => Ok(()),
            Request::StartDaemon => self.start_daemon(),
            Request::KillDaemon => self.kill_daemon(),
        };
        let status = Status {
            is_daemon_running: self.daemon.is_some(),
            last_exit: self.last_exit.clone(),
            error: done.err().map(|error| format!("{error:#}")),
        };
        write_line(stream, &status)
    }

    fn start_daemon(&mut self) -> Result<()> {
        let (Some(daemon), Some(log)) = (&self.spec.daemon, &self.log) else {
            bail!("{} is no node: it has no daemon", self.spec.host_name);
        };
        if self.daemon.is_some() {
            return Ok(());
        }
        let mut command = Command::new(&daemon.program);
        command.args(&daemon.args).env_clear().envs(std::env::vars_os().filter(|(name, _)| {
            let name = name.to_string_lossy();
            let is_ours = name.starts_with("SKEP_") || name.starts_with("RUST_");
            (is_ours && name != "SKEP_HOST") || KEPT_VARIABLES.contains(&&*name)
        }));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
        prepare_child(&mut command, ChildSetup { new_session: true, ..Default::default() });
        let child =
            command.spawn().with_context(|| format!("start {}", daemon.program.display()))?;
        self.daemon = Some(Pid::from_raw(i32::try_from(child.id()).context("pid")?));
        self.last_exit = None;
        Ok(())
    }

    fn kill_daemon(&mut self) -> Result<()> {
        // Only this process reaps the daemon, so that its pid cannot be another's by now.
        if let Some(pid) = self.daemon {
            kill(pid, Signal::SIGKILL).context("kill the daemon")?;
            let status = waitpid(pid, None).context("wait for the daemon")?;
            self.record_exit(status);
        }
        Ok(())
    }
}

fn open_log(path: &Path) -> Result<File> {
    let log = OpenOptions::new().create(true).append(true).open(path);
    log.with_context(|| format!("open {}", path.display()))
}
