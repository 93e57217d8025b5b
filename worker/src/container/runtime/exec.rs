//! Commands in running containers.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Stdio;
use std::time::Duration;

use skep_runtime::sys::PidFd;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::super::error::{Context, Error};
use super::super::process::Process;
use super::super::protocol::ExecReport;
use super::{ContainerRuntime, Control, Inner, blocking};

/// Output that is kept, from its start. Docker's value for health checks.
const MAX_OUTPUT_BYTES: usize = 4096;

/// How long the helper may take to kill a command that ran out of time.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutcome {
    /// Exit code; 128 and the signal's number where a signal ended it.
    pub exit_code: i32,
    /// Whether it was killed because its time was over.
    pub is_timed_out: bool,
    /// The first 4 KiB of what it wrote to both its outputs.
    pub output: String,
}

/// A helper at work.
struct Running {
    process: Process,
    control: Control,
    pipe: pipe::Receiver,
    output: Vec<u8>,
}

impl ContainerRuntime {
    /// Runs `argv` in a container as its own program runs: same user, capabilities, filter,
    /// environment and cgroup.
    ///
    /// After `time` the command is killed with its session; so it is when the future is dropped.
    pub async fn exec(
        &self,
        id: &str,
        argv: &[String],
        env: &[String],
        time: Duration,
    ) -> Result<ExecOutcome, Error> {
        let handle = self.inner.handle(id)?;
        if handle.control.lock().await.is_some() {
            return Err(Error::WrongState { id: id.to_owned(), state: "not started" });
        }
        self.inner.reaper.sweep();
        let (inner, own_id) = (self.inner.clone(), id.to_owned());
        let (argv, env) = (argv.to_vec(), env.to_vec());
        let spawned = blocking(move || inner.spawn_exec(&own_id, &argv, &env)).await?;
        let mut running = Running::new(spawned)?;

        let failed = |reason: String| Error::Exec { id: id.to_owned(), reason };
        let (report, is_timed_out) = match timeout(time, running.report()).await {
            Ok(report) => (report, false),
            Err(_) => {
                running.ask_to_kill().await;
                let report = timeout(KILL_TIMEOUT, running.report()).await;
                (report.unwrap_or_else(|elapsed| Err(elapsed.into())), true)
            }
        };
        match report {
            Ok(ExecReport::Exited { code }) => {
                let output = running.finish().await.during(|| format!("end an exec in {id}"))?;
                Ok(ExecOutcome { exit_code: code, is_timed_out, output })
            }
            Ok(ExecReport::Failed { reason }) => Err(failed(reason)),
            Err(error) => {
                let said = String::from_utf8_lossy(&running.output);
                Err(failed(format!("its helper ended: {error}; {said}").trim().to_owned()))
            }
        }
    }
}

impl Inner {
    fn spawn_exec(
        &self,
        id: &str,
        argv: &[String],
        env: &[String],
    ) -> Result<(Process, StdUnixStream, OwnedFd), Error> {
        let context = || format!("start a command in container {id}");
        let (ours, theirs) = StdUnixStream::pair().during(context)?;
        let (read, write) = io::pipe().during(context)?;
        let mut command = self.helper("exec-in");
        command.arg("--dir").arg(self.dirs(id).0.path());
        for variable in env {
            command.args(["--env", variable]);
        }
        let errors = write.try_clone().during(context)?;
        let child = command
            .arg("--")
            .args(argv)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(write)
            .stderr(errors)
            .spawn()
            .during(context)?;
        let pidfd = PidFd::open(child.id().cast_signed()).during(context)?;
        let process = Process::new(&pidfd, self.reaper.clone()).during(context)?;
        Ok((process, ours, read.into()))
    }
}

impl Running {
    fn new((process, socket, read): (Process, StdUnixStream, OwnedFd)) -> Result<Self, Error> {
        let pipe =
            pipe::Receiver::from_owned_fd(read).during(|| "read a command's output".into())?;
        Ok(Self { process, control: Control::new(socket)?, pipe, output: Vec::new() })
    }

    /// Takes output until the helper reports. Cancel-safe.
    async fn report(&mut self) -> io::Result<ExecReport> {
        let mut buffer = [0; 4096];
        let mut is_open = true;
        loop {
            tokio::select! {
                report = self.control.receive::<ExecReport>() => return report,
                n_bytes = self.pipe.read(&mut buffer), if is_open => {
                    let n_bytes = n_bytes?;
                    is_open = n_bytes > 0;
                    keep(&mut self.output, &buffer[..n_bytes]);
                }
            }
        }
    }

    /// Anything on the socket asks for the end.
    async fn ask_to_kill(&mut self) {
        use tokio::io::AsyncWriteExt;
        // A helper that has ended meanwhile has reported.
        let _ = self.control.stream.write_all(b"kill\n").await;
    }

    /// Takes what is still in the pipe; a process that the command left behind may hold it open.
    async fn finish(mut self) -> io::Result<String> {
        let mut buffer = [0; 4096];
        loop {
            match self.pipe.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(n_bytes) => keep(&mut self.output, &buffer[..n_bytes]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.process.ended().await?;
        Ok(String::from_utf8_lossy(&self.output).into_owned())
    }
}

fn keep(output: &mut Vec<u8>, bytes: &[u8]) {
    let room = MAX_OUTPUT_BYTES.saturating_sub(output.len());
    output.extend_from_slice(&bytes[..bytes.len().min(room)]);
}
