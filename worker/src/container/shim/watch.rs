//! The shim's loop: from the waiting container to the record of its end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, read};
use skep_common::spec::LogRotation;
use skep_runtime::clock;

use super::super::dirs::{DataDir, RunDir, remove_all, write_atomically};
use super::super::error::{Context, Error, chain, unwrapped};
use super::super::protocol::{Phase, Report, START, receive_with_fds, send};
use super::super::runtime::ExitStatus;
use super::create::Waiting;
use super::output::{LogFile, is_not_yet};
use super::{remove_directories, write_state};
use crate::sys::{self, Ended};

/// What the loop found out in one round.
enum Turn {
    /// Nothing that ends it.
    GoOn,
    /// The container's first process ended.
    Ended(Ended),
    /// The daemon went away before the start.
    Abandoned,
}

struct Watch<'a> {
    run: &'a RunDir,
    waiting: Waiting,
    signals: SignalFd,
    /// Until the start is reported.
    daemon: Option<UnixStream>,
    /// Until the program was executed, or not.
    is_exec_pending: bool,
    /// Why it was not, as far as it has been read.
    exec_error: Vec<u8>,
    log: LogFile,
    /// Never read here: while they are open, what is sent to them waits for the next daemon.
    kept: Vec<OwnedFd>,
}

/// Watches the container to its end and removes all of it but its directories and its log.
pub(super) fn watch(
    run: &RunDir,
    data: &DataDir,
    rotation: LogRotation,
    waiting: Waiting,
    daemon: UnixStream,
) -> Result<(), Error> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .during(|| "open a signal descriptor".into())?;
    daemon.set_nonblocking(true).during(|| "make the daemon's socket non-blocking".into())?;
    // The loop holds its own copy of it.
    null_stdin()?;
    let mut watch = Watch {
        run,
        waiting,
        signals,
        daemon: Some(daemon),
        is_exec_pending: false,
        exec_error: Vec::new(),
        log: LogFile::open(data, rotation)?,
        kept: Vec::new(),
    };
    // A child may have ended before the descriptor existed; its signal is pending and readable.
    loop {
        match watch.turn()? {
            Turn::GoOn => {}
            Turn::Ended(ended) => return watch.finish(ended),
            Turn::Abandoned => {
                watch.abandon();
                remove_directories(run, data);
                return Ok(());
            }
        }
    }
}

fn null_stdin() -> Result<(), Error> {
    let context = || "replace standard input".to_owned();
    let null = std::fs::File::open("/dev/null").during(context)?;
    nix::unistd::dup2_stdin(&null).during(context)
}

impl Watch<'_> {
    /// Waits for one round of events and handles them.
    fn turn(&mut self) -> Result<Turn, Error> {
        let ready = self.wait()?;
        for (output, is_ready) in self.waiting.outputs.iter_mut().zip(ready.outputs) {
            if is_ready {
                self.log.pump(output);
            }
        }
        if ready.exec_result {
            self.read_exec_result()?;
        }
        if ready.signals {
            while let Ok(Some(_)) = self.signals.read_signal() {}
            if let Some(ended) = self.reap() {
                return Ok(Turn::Ended(ended));
            }
        }
        if ready.daemon {
            return self.read_daemon();
        }
        Ok(Turn::GoOn)
    }

    fn wait(&self) -> Result<Ready, Error> {
        // At most five: signals, daemon, result of the exec, two outputs. Absent ones are skipped.
        let result = self.is_exec_pending.then(|| self.waiting.exec_result.as_fd());
        let mut sources: [Option<BorrowedFd<'_>>; 5] =
            [Some(self.signals.as_fd()), self.daemon.as_ref().map(AsFd::as_fd), result, None, None];
        for (slot, output) in sources[3..].iter_mut().zip(&self.waiting.outputs) {
            *slot = output.fd();
        }
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).during(|| "wait for the container".into()),
        }
        // Hang-ups and errors count as readable: reading tells which it is.
        let mut polled = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        let ready = sources.map(|source| source.is_some() && polled.next().unwrap_or(false));
        let [signals, daemon, exec_result, first, second] = ready;
        Ok(Ready { signals, daemon, exec_result, outputs: [first, second] })
    }

    /// Reaps all children that ended; gives the status of the container's first process.
    fn reap(&self) -> Option<Ended> {
        let mut init = None;
        while let Some((pid, ended)) = sys::reap_child() {
            if pid == self.waiting.init.pid {
                init = Some(ended);
            }
        }
        init
    }

    /// Handles `start`, or the end of the daemon.
    fn read_daemon(&mut self) -> Result<Turn, Error> {
        let Some(daemon) = &self.daemon else { return Ok(Turn::GoOn) };
        let mut buffer = [0; 64];
        match receive_with_fds(daemon, &mut buffer) {
            Ok((n_bytes, kept)) if n_bytes == START.len() && buffer[..n_bytes] == *START => {
                self.waiting.state.kept = kept.iter().map(AsRawFd::as_raw_fd).collect();
                self.kept = kept;
                self.start()
            }
            Err(error) if is_not_yet(error) => Ok(Turn::GoOn),
            // End of file, an error or nonsense: without a daemon that knows it, the container
            // must not run; once it was started it does not need one.
            _ if self.waiting.state.phase == Phase::Running => {
                self.daemon = None;
                Ok(Turn::GoOn)
            }
            _ => Ok(Turn::Abandoned),
        }
    }

    fn start(&mut self) -> Result<Turn, Error> {
        // Written first: a daemon that comes back now must not take it for abandoned.
        self.waiting.state.phase = Phase::Running;
        self.waiting.state.started_at = Some(clock::now());
        write_state(self.run, &self.waiting.state)?;
        if let Err(error) = self.waiting.container.start() {
            self.report(&Report::Failed { reason: unwrapped(&error) });
            self.daemon = None;
            // Its end is recorded as that of any other container.
            sys::kill(self.waiting.init.pid, Signal::SIGKILL as i32);
            return Ok(Turn::GoOn);
        }
        self.is_exec_pending = true;
        Ok(Turn::GoOn)
    }

    /// Reads why the program was not executed; the end of the pipe alone means that it was.
    fn read_exec_result(&mut self) -> Result<(), Error> {
        let mut buffer = [0; 512];
        match read(&self.waiting.exec_result, &mut buffer) {
            Ok(0) => {}
            Ok(n_bytes) => {
                self.exec_error.extend_from_slice(&buffer[..n_bytes]);
                return Ok(());
            }
            Err(Errno::EINTR) => return Ok(()),
            Err(error) => return Err(error).during(|| "read the result of the start".into()),
        }
        self.is_exec_pending = false;
        let reason = String::from_utf8_lossy(&std::mem::take(&mut self.exec_error)).into_owned();
        let at = self.waiting.state.started_at.unwrap_or_default();
        let report =
            if reason.is_empty() { Report::Started { at } } else { Report::Failed { reason } };
        self.report(&report);
        self.daemon = None;
        // Making the container took far more code and memory than watching it will.
        sys::trim_memory();
        sys::release_program_pages().during(|| "release memory".into())
    }

    fn report(&self, report: &Report) {
        if let Some(daemon) = &self.daemon {
            // A daemon that went away finds out from the files.
            let _ = send(daemon, report);
        }
    }

    /// Records the end and removes the container.
    fn finish(mut self, ended: Ended) -> Result<(), Error> {
        let is_oom_killed = self.waiting.cgroup.n_oom_kills() > 0;
        for output in &mut self.waiting.outputs {
            self.log.finish(output);
        }
        if self.is_exec_pending {
            // It ended before the result was read; a program that fails at once looks like this.
            while self.is_exec_pending {
                self.read_exec_result()?;
            }
        }
        let exit = exit_status(ended, is_oom_killed);
        let text = serde_json::to_vec(&exit).map_err(io::Error::from);
        text.and_then(|text| write_atomically(&self.run.exit(), &text))
            .during(|| format!("write {}", self.run.exit().display()))?;
        self.remove()
    }

    /// Kills a container that was never started.
    fn abandon(&mut self) {
        let pid = self.waiting.init.pid;
        sys::kill(pid, Signal::SIGKILL as i32);
        while let Err(Errno::EINTR) = waitpid(Pid::from_raw(pid), None) {}
        if let Err(error) = self.remove() {
            eprintln!("{}", chain(&error));
        }
    }

    fn remove(&self) -> Result<(), Error> {
        let removed =
            self.waiting.cgroup.remove().during(|| "remove the container's cgroup".into());
        remove_all(&self.run.runtime_root())
            .during(|| format!("remove {}", self.run.runtime_root().display()))?;
        removed
    }
}

/// Which sources have something to read.
struct Ready {
    signals: bool,
    daemon: bool,
    exec_result: bool,
    outputs: [bool; 2],
}

fn exit_status(ended: Ended, oom_killed: bool) -> ExitStatus {
    let signal = match ended {
        Ended::Signaled(signal) => Some(signal),
        Ended::Exited(_) => None,
    };
    ExitStatus { exit_code: ended.code(), signal, oom_killed, finished_at: clock::now() }
}
