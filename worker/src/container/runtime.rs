//! The daemon's side: makes, starts, signals, awaits and removes containers.
//!
//! Every operation names a container by id and may be called by many tasks at once. Blocking file
//! work runs on tokio's blocking threads.

mod adopt;
mod exec;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IoSlice, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use skep_common::Timestamp;
use skep_common::spec::LogRotation;
use skep_runtime::clock;
use skep_runtime::sys::{PidFd, ProcessId};
use skep_worker_core::dns::Scope;
use skep_worker_core::oci::payloads::{self, PayloadFile};
use skep_worker_core::oci::{ContainerInput, GeneratedFiles, ImageConfig, SpecInput, process};
use tokio::io::{AsyncBufReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::cgroup::Cgroup;
use super::dirs::{DataDir, RunDir, remove_all, write_atomically};
use super::error::{Context, Error};
use super::logs::{LogOptions, LogReader, Watcher};
use super::process::{Process, Reaper, fd_path};
use super::protocol::{Report, START, ShimConfig, ShimState, read_json};
use crate::sys;

pub use adopt::{Adopted, AdoptedState};
pub use exec::ExecOutcome;

/// How long the shim may take to make a container. Mounting and cloning take milliseconds; this is
/// for a host whose disk stands still.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the program may take to be executed, which reads it from disk.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest id, so that the names of sockets in the run directory stay within a socket's 107 bytes.
const ID_LENGTH_MAX: usize = 64;

/// Where containers live.
#[derive(Debug, Clone)]
pub struct Options {
    /// Run directories, on a tmpfs: `/run/skep/containers`.
    pub containers_dir: PathBuf,
    /// Data directories with upper layers and logs: `/var/lib/skep/containers`.
    pub state_dir: PathBuf,
    /// Absolute cgroup above the containers' cgroups: `/skep/<node>`.
    pub cgroup_parent: String,
    /// The program that has the commands `shim` and `exec-in`: `/proc/self/exe`.
    pub self_exe: PathBuf,
}

/// What container to make.
#[derive(Debug, Clone, Default)]
pub struct ContainerConfig {
    /// Its id, a file name; the task's id.
    pub id: String,
    /// Directories of the image's layers, base first.
    pub layers: Vec<PathBuf>,
    /// The image's configuration.
    pub image: ImageConfig,
    /// The service's share.
    pub container: ContainerInput,
    /// How much of its output is kept.
    pub log: LogRotation,
    /// Text of /etc/hosts.
    pub etc_hosts: String,
    /// Text of /etc/resolv.conf.
    pub etc_resolv_conf: String,
    /// Whose questions for names are answered; see [`ContainerRuntime::kept`].
    pub names: Option<Scope>,
    /// Its secrets and configs.
    pub payloads: Vec<PayloadFile>,
}

/// What becomes of a container's log when the container is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    Removed,
    Kept,
}

/// A container that waits for its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// Its first process; `/proc/PID/ns/net` is its network namespace.
    pub pid: i32,
    /// Its shim.
    pub shim_pid: i32,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Exit code; 128 and the signal's number where a signal ended it.
    pub exit_code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether the kernel killed a process of it because memory ran out.
    pub oom_killed: bool,
    /// When it ended.
    pub finished_at: Timestamp,
}

/// What the daemon holds of a container whose shim runs, or ended under its eyes.
#[derive(Debug)]
struct Handle {
    shim: Process,
    init: PidFd,
    /// The shim's socket until the start. Closing it makes the shim remove the container.
    control: tokio::sync::Mutex<Option<Control>>,
}

/// Makes and watches the containers of one node.
#[derive(Debug, Clone)]
pub struct ContainerRuntime {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: Options,
    /// The program on a read-only mount, where the kernel can make one.
    program: Option<OwnedFd>,
    handles: Mutex<BTreeMap<String, Arc<Handle>>>,
    reaper: Arc<Reaper>,
    watcher: Arc<Watcher>,
}

impl ContainerRuntime {
    /// Opens the directories, making them where they are missing.
    ///
    /// Call it within a tokio runtime, and [`ContainerRuntime::adopt`] before anything else.
    pub fn open(options: Options) -> Result<Self, Error> {
        for directory in [&options.containers_dir, &options.state_dir] {
            let context = || format!("create {}", directory.display());
            fs::create_dir_all(directory).during(context)?;
        }
        // Containers must not reach the program they were started by; an old kernel has to do
        // without, as all had before 5.12.
        let program = sys::open_read_only_mount(&options.self_exe)
            .inspect_err(|error| tracing::warn!(%error, "running shims from a writable program"))
            .ok();
        let watcher = Watcher::new().during(|| "open an inotify instance".into())?;
        Ok(Self {
            inner: Arc::new(Inner {
                options,
                program,
                handles: Mutex::new(BTreeMap::new()),
                reaper: Arc::default(),
                watcher: Arc::new(watcher),
            }),
        })
    }

    /// Makes a container up to the point where only its program is missing.
    ///
    /// On failure, and when the future is dropped, nothing of it is left.
    pub async fn create(&self, config: &ContainerConfig) -> Result<Created, Error> {
        let id = &config.id;
        check_id(id)?;
        self.inner.reaper.sweep();
        let (inner, own_config) = (self.inner.clone(), config.clone());
        let (shim, shim_pid, socket) = blocking(move || inner.spawn_shim(&own_config)).await?;
        let mut control = Control::new(socket)?;
        let reason = match timeout(CREATE_TIMEOUT, report(&mut control, &shim)).await {
            Ok(Some(Report::Created { init })) => {
                let pidfd = init.open().during(|| format!("open process {}", init.pid))?;
                if let Some(pidfd) = pidfd {
                    let control = tokio::sync::Mutex::new(Some(control));
                    self.inner.insert(id, Handle { shim, init: pidfd, control });
                    return Ok(Created { pid: init.pid, shim_pid });
                }
                "its first process ended".to_owned()
            }
            Ok(Some(Report::Failed { reason })) => reason,
            Ok(Some(Report::Started { .. })) => "its shim started it unasked".to_owned(),
            Ok(None) => self.inner.last_words(id),
            Err(_) => format!("its shim took longer than {} s", CREATE_TIMEOUT.as_secs()),
        };
        drop(control);
        if timeout(CREATE_TIMEOUT, shim.ended()).await.is_err() {
            shim.kill().during(|| format!("kill shim {shim_pid}"))?;
            shim.ended().await.during(|| format!("wait for shim {shim_pid}"))?;
        }
        self.delete(id, Log::Kept).await?;
        Err(Error::Create { id: id.clone(), reason })
    }

    /// Executes the program of a container that was made; returns when it runs.
    ///
    /// The moment it gives is when the shim began to.
    pub async fn start(&self, id: &str) -> Result<Timestamp, Error> {
        self.start_keeping(id, &[]).await
    }

    /// The same; the shim keeps copies of `kept`, four at most, as long as the container runs. A later
    /// daemon has them by [`ContainerRuntime::kept`].
    pub async fn start_keeping(
        &self,
        id: &str,
        kept: &[BorrowedFd<'_>],
    ) -> Result<Timestamp, Error> {
        let handle = self.inner.handle(id)?;
        let mut slot = handle.control.lock().await;
        let Some(mut control) = slot.take() else {
            return Err(Error::WrongState { id: id.to_owned(), state: "not waiting to start" });
        };
        let failed = |reason: String| Error::Start { id: id.to_owned(), reason };
        if control.send_start(kept).await.is_err() {
            return Err(failed("its shim ended".into()));
        }
        match timeout(START_TIMEOUT, report(&mut control, &handle.shim)).await {
            Ok(Some(Report::Started { at })) => Ok(at),
            Ok(Some(Report::Failed { reason })) => Err(failed(reason)),
            Ok(Some(Report::Created { .. }) | None) => Err(failed("its shim ended".into())),
            Err(_) => Err(failed(format!("it took longer than {} s", START_TIMEOUT.as_secs()))),
        }
    }

    /// What a running container was started with: whose questions for names are answered, and the
    /// descriptors that its shim keeps. Needs Linux 5.6, and the right to trace processes.
    pub async fn kept(&self, id: &str) -> Result<(Option<Scope>, Vec<OwnedFd>), Error> {
        check_id(id)?;
        let (inner, own_id) = (self.inner.clone(), id.to_owned());
        blocking(move || inner.kept(&own_id)).await
    }

    /// Waits for the end of a container, adopted or not. Cancel-safe.
    ///
    /// [`Error::Lost`] where its shim died with the answer; nothing of it runs any more then.
    pub async fn wait(&self, id: &str) -> Result<ExitStatus, Error> {
        if let Ok(handle) = self.inner.handle(id) {
            handle.shim.ended().await.during(|| format!("wait for the shim of container {id}"))?;
        }
        let (inner, own_id) = (self.inner.clone(), id.to_owned());
        blocking(move || inner.settle(&own_id)).await
    }

    /// Sends signal `number` to the first process of a container that was started.
    pub async fn signal(&self, id: &str, number: i32) -> Result<(), Error> {
        let handle = self.inner.handle(id)?;
        if handle.control.lock().await.is_some() {
            return Err(Error::WrongState { id: id.to_owned(), state: "not started" });
        }
        let context = || format!("send signal {number} to container {id}");
        sys::send_signal(handle.init.as_fd(), number).during(context)
    }

    /// Asks a container to end, and kills all of it when it has not within `grace`.
    ///
    /// A container that was never started is removed.
    pub async fn stop(&self, id: &str, number: i32, grace: Duration) -> Result<ExitStatus, Error> {
        if let Ok(handle) = self.inner.handle(id) {
            if handle.control.lock().await.take().is_some() {
                let context = || format!("wait for the shim of container {id}");
                handle.shim.ended().await.during(context)?;
                let signal = Some(libc::SIGKILL);
                let finished_at = clock::now();
                return Ok(ExitStatus { exit_code: 137, signal, oom_killed: false, finished_at });
            }
            let context = || format!("send signal {number} to container {id}");
            sys::send_signal(handle.init.as_fd(), number).during(context)?;
            if timeout(grace, handle.shim.ended()).await.is_err() {
                self.kill(id, &handle).await?;
            }
        }
        self.wait(id).await
    }

    /// Removes a container with its log; one that still runs is killed first.
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        self.end(id).await?;
        self.delete(id, Log::Removed).await
    }

    /// The same, but that the log is kept: a container that is made of this id goes on with it.
    pub async fn clear(&self, id: &str) -> Result<(), Error> {
        self.end(id).await?;
        self.delete(id, Log::Kept).await
    }

    /// Kills what still runs of a container.
    async fn end(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        if let Ok(handle) = self.inner.handle(id) {
            handle.control.lock().await.take();
            self.kill(id, &handle).await?;
            handle.shim.ended().await.during(|| format!("wait for the shim of container {id}"))?;
        }
        self.inner.lock_handles().remove(id);
        self.inner.reaper.sweep();
        Ok(())
    }

    /// Opens a container's log, which lives until [`ContainerRuntime::remove`].
    pub async fn logs(&self, id: &str, options: LogOptions) -> Result<LogReader, Error> {
        check_id(id)?;
        let (run, data) = self.inner.dirs(id);
        LogReader::open(id, &run, &data, options, self.inner.watcher.clone()).await
    }

    /// Kills everything of a container.
    async fn kill(&self, id: &str, handle: &Handle) -> Result<(), Error> {
        sys::send_signal(handle.init.as_fd(), libc::SIGKILL)
            .during(|| format!("kill container {id}"))?;
        let (inner, own_id) = (self.inner.clone(), id.to_owned());
        blocking(move || {
            inner.cgroup(&own_id)?.kill_all();
            Ok(())
        })
        .await
    }

    /// Removes what is left of a container whose shim has ended.
    async fn delete(&self, id: &str, log: Log) -> Result<(), Error> {
        let (inner, own_id) = (self.inner.clone(), id.to_owned());
        blocking(move || {
            let (run, data) = inner.dirs(&own_id);
            // A shim that was never adopted would be left without its directory.
            if let Some(shim) = running_shim(&run)? {
                kill_process(&shim)?;
            }
            inner.remove_cgroup(&own_id)?;
            // The run directory last: while it exists, a daemon that comes back tries again.
            let context = || format!("remove {}", data.path().display());
            match log {
                Log::Removed => remove_all(data.path()),
                Log::Kept => data.remove_all_but_log(),
            }
            .during(context)?;
            remove_all(run.path()).during(|| format!("remove {}", run.path().display()))
        })
        .await
    }
}

impl Inner {
    fn dirs(&self, id: &str) -> (RunDir, DataDir) {
        let options = &self.options;
        (RunDir(options.containers_dir.join(id)), DataDir(options.state_dir.join(id)))
    }

    fn kept(&self, id: &str) -> Result<(Option<Scope>, Vec<OwnedFd>), Error> {
        let (run, _) = self.dirs(id);
        let context = || format!("read what container {id} was started with");
        let config = read_json::<ShimConfig>(&run.shim_config()).during(context)?;
        let state = read_json::<ShimState>(&run.state()).during(context)?;
        let Some(shim) = open_process(state.shim)? else {
            return Err(Error::Lost(id.to_owned()));
        };
        let copies = state.kept.iter().map(|number| sys::copy_fd(shim.as_fd(), *number));
        let copies = copies.collect::<io::Result<_>>();
        let copies = copies.during(|| format!("take over the sockets of container {id}"))?;
        Ok((config.names, copies))
    }

    fn cgroup(&self, id: &str) -> Result<Cgroup, Error> {
        let path = format!("/{}/{id}", self.options.cgroup_parent.trim_matches('/'));
        Cgroup::open(&path).during(|| "find the cgroup mounts".into())
    }

    fn remove_cgroup(&self, id: &str) -> Result<(), Error> {
        self.cgroup(id)?.remove().during(|| format!("remove the cgroup of container {id}"))
    }

    /// What a shim said that ended without a report.
    fn last_words(&self, id: &str) -> String {
        let text = fs::read_to_string(self.dirs(id).0.shim_messages()).unwrap_or_default();
        let last = text.lines().last().unwrap_or("it said nothing");
        format!("its shim ended: {last}")
    }

    fn lock_handles(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Handle>>> {
        self.handles.lock().expect("no holder of this lock panics")
    }

    fn insert(&self, id: &str, handle: Handle) {
        self.lock_handles().insert(id.to_owned(), Arc::new(handle));
    }

    fn handle(&self, id: &str) -> Result<Arc<Handle>, Error> {
        self.lock_handles().get(id).cloned().ok_or_else(|| Error::NotFound(id.to_owned()))
    }

    /// A command that runs this program with one of its hidden commands.
    fn helper(&self, name: &str) -> Command {
        let mut command = match &self.program {
            Some(program) => Command::new(fd_path(program)),
            None => Command::new(&self.options.self_exe),
        };
        command.arg0("skep").arg(name);
        command
    }

    /// Writes what the shim needs and starts it.
    fn spawn_shim(&self, config: &ContainerConfig) -> Result<(Process, i32, StdUnixStream), Error> {
        let id = &config.id;
        let (run, data) = self.dirs(id);
        let has_data = || data.has_more_than_log().during(|| format!("look for container {id}"));
        if run.path().exists() || has_data()? {
            return Err(Error::Exists(id.clone()));
        }
        let payloads = match config.payloads.is_empty() {
            true => Vec::new(),
            false => serde_json::to_vec(&config.payloads)
                .map_err(io::Error::from)
                .during(|| format!("write down the secrets of container {id}"))?,
        };
        let written = self.write_files(config, payloads.len(), &run, &data);
        let spawned = written.and_then(|()| {
            let context = || format!("start the shim of container {id}");
            let (ours, theirs) = StdUnixStream::pair().during(context)?;
            let messages = fs::File::create(run.shim_messages()).during(context)?;
            let child = self
                .helper("shim")
                .arg("--dir")
                .arg(run.path())
                .stdin(Stdio::from(OwnedFd::from(theirs)))
                .stdout(Stdio::null())
                .stderr(messages)
                .spawn()
                .during(context)?;
            // Nobody has reaped it, so that the pid is still the child's.
            let pid = child.id().cast_signed();
            let pidfd = PidFd::open(pid).during(context)?;
            (&ours).write_all(&payloads).during(context)?;
            Ok((Process::new(&pidfd, self.reaper.clone()).during(context)?, pid, ours))
        });
        spawned.inspect_err(|_| {
            // The error at hand says more than these would.
            let _ = data.remove_all_but_log();
            let _ = remove_all(run.path());
        })
    }

    fn write_files(
        &self,
        config: &ContainerConfig,
        n_payload_bytes: usize,
        run: &RunDir,
        data: &DataDir,
    ) -> Result<(), Error> {
        fs::create_dir(run.path()).during(|| format!("create {}", run.path().display()))?;
        // It is there where an earlier container of the same task left its log.
        fs::create_dir_all(data.path()).during(|| format!("create {}", data.path().display()))?;
        let hostname = process::hostname(&config.id, &config.container);
        for (path, text) in [
            (data.hosts(), &config.etc_hosts),
            (data.hostname(), &format!("{hostname}\n")),
            (data.resolv_conf(), &config.etc_resolv_conf),
        ] {
            fs::write(&path, text).during(|| format!("write {}", path.display()))?;
        }
        let mut container = config.container.clone();
        container.mounts.extend(payloads::mounts(&config.payloads, &run.payloads()));
        let shim_config = ShimConfig {
            spec: SpecInput {
                id: config.id.clone(),
                root: run.rootfs(),
                cgroup_parent: self.options.cgroup_parent.clone(),
                image: config.image.clone(),
                container,
                files: GeneratedFiles {
                    hosts: data.hosts(),
                    hostname: data.hostname(),
                    resolv_conf: data.resolv_conf(),
                },
            },
            layers: config.layers.clone(),
            log: config.log,
            names: config.names.clone(),
            data_dir: data.path().to_path_buf(),
            n_payload_bytes,
        };
        let path = run.shim_config();
        let text = serde_json::to_vec(&shim_config).map_err(io::Error::from);
        text.and_then(|text| fs::write(&path, text)).during(|| format!("write {}", path.display()))
    }

    /// The exit of a container whose shim has ended; removes what an unclean end left behind.
    fn settle(&self, id: &str) -> Result<ExitStatus, Error> {
        let (run, data) = self.dirs(id);
        if !run.path().exists() {
            let is_known = data.path().exists();
            return Err(if is_known { Error::Lost } else { Error::NotFound }(id.to_owned()));
        }
        if run.lost().exists() {
            return Err(Error::Lost(id.to_owned()));
        }
        if running_shim(&run)?.is_some() {
            // Nothing may be removed under it.
            return Err(Error::WrongState { id: id.to_owned(), state: "not adopted" });
        }
        let exit = read_json::<ExitStatus>(&run.exit());
        // The shim removes it, unless it was killed at the wrong moment.
        self.remove_cgroup(id)?;
        let runtime_root = run.runtime_root();
        remove_all(&runtime_root).during(|| format!("remove {}", runtime_root.display()))?;
        exit.map_err(|_| {
            // Followers of the log watch for this file.
            if let Err(error) = write_atomically(&run.lost(), b"") {
                tracing::warn!(container.id = id, %error, "failed to mark a container as lost");
            }
            Error::Lost(id.to_owned())
        })
    }
}

/// The next report of a shim; `None` when it ended without one. Cancel-safe.
///
/// The socket alone does not tell: a container that waits for its start has it open too.
async fn report(control: &mut Control, shim: &Process) -> Option<Report> {
    tokio::select! {
        biased;
        report = control.receive::<Report>() => report.ok(),
        _ = shim.ended() => None,
    }
}

/// A helper's socket; messages are JSON lines.
#[derive(Debug)]
struct Control {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Control {
    fn new(socket: StdUnixStream) -> Result<Self, Error> {
        let context = || "use a helper's socket".to_owned();
        socket.set_nonblocking(true).during(context)?;
        let stream = BufReader::new(UnixStream::from_std(socket).during(context)?);
        Ok(Self { stream, line: Vec::new() })
    }

    /// Sends the line that starts a container, with descriptors.
    async fn send_start(&self, kept: &[BorrowedFd<'_>]) -> io::Result<()> {
        let numbers: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if kept.is_empty() { &[][..] } else { &rights[..] };
        let stream = self.stream.get_ref();
        let send = || {
            let (line, flags) = ([IoSlice::new(START)], MsgFlags::MSG_NOSIGNAL);
            Ok(sendmsg::<()>(stream.as_raw_fd(), &line, rights, flags, None)?)
        };
        let n_bytes = stream.async_io(Interest::WRITABLE, send).await?;
        // It is the first that is written to this socket, so that it has room for all.
        if n_bytes == START.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Receives one message. Cancel-safe: what was read of it is kept.
    async fn receive<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        self.stream.read_until(b'\n', &mut self.line).await?;
        if !self.line.ends_with(b"\n") {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let message = serde_json::from_slice(&self.line);
        self.line.clear();
        Ok(message?)
    }
}

fn check_id(id: &str) -> Result<(), Error> {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    let is_name = !id.is_empty() && id.len() <= ID_LENGTH_MAX && !id.starts_with('.');
    if is_name && id.bytes().all(is_good) { Ok(()) } else { Err(Error::InvalidId(id.to_owned())) }
}

/// Runs blocking work; a panic in it is passed on.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(io::Error::other(error)).during(|| "run blocking work".into()),
        },
    }
}

/// Names of the directories in `path` that are container ids.
fn ids_in(path: &Path) -> Result<Vec<String>, Error> {
    let context = || format!("read {}", path.display());
    let mut ids = Vec::new();
    for entry in fs::read_dir(path).during(context)? {
        let name = entry.during(context)?.file_name();
        if let Some(id) = name.to_str().filter(|id| check_id(id).is_ok()) {
            ids.push(id.to_owned());
        }
    }
    ids.sort();
    Ok(ids)
}

/// The shim that wrote its name down in a run directory, where it still runs.
fn running_shim(run: &RunDir) -> Result<Option<PidFd>, Error> {
    match read_json::<ShimState>(&run.state()) {
        Ok(state) => open_process(state.shim),
        // It never came to it, and gives up when it does.
        Err(_) => Ok(None),
    }
}

/// Kills a process and waits for its end.
fn kill_process(process: &PidFd) -> Result<(), Error> {
    let context = || "kill a shim".to_owned();
    sys::send_signal(process.as_fd(), libc::SIGKILL).during(context)?;
    process.wait_exit(None).during(context)?;
    Ok(())
}

/// Whether a process is gone, dead or another one by now; a handle on it where it is not.
fn open_process(process: ProcessId) -> Result<Option<PidFd>, Error> {
    process.open().during(|| format!("open process {}", process.pid))
}
