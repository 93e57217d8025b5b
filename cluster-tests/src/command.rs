//! Runs commands with a deadline, and shows all of them when they fail.

use std::ffi::OsStr;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use skep_runtime::sys::PidFd;

/// A client's command that takes longer hangs.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(180);

/// The `skep` that was built with this test: beside its target directory's `deps`.
///
/// `SKEP_BINARY` names another one.
pub fn skep_binary() -> PathBuf {
    if let Some(path) = std::env::var_os("SKEP_BINARY") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    let found = test.ancestors().skip(1).take(2).map(|dir| dir.join("skep"));
    found.into_iter().find(|path| path.is_file()).unwrap_or_else(|| {
        panic!("no skep near {}: build it with `cargo build --workspace`", test.display())
    })
}

/// What a command printed and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Panics with all that was printed unless the command succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.status.success(), "failed: {self}");
        self
    }

    /// Panics unless the command failed; gives its standard error.
    #[track_caller]
    pub fn err(self) -> String {
        assert!(!self.status.success(), "did not fail: {self}");
        self.stderr
    }

    /// Standard output without white space at its ends.
    pub fn text(&self) -> &str {
        self.stdout.trim()
    }

    /// Standard output as one JSON value a line.
    #[track_caller]
    pub fn json_lines(&self) -> Vec<Value> {
        let parse = |line: &str| match serde_json::from_str(line) {
            Ok(value) => value,
            Err(error) => panic!("{error} in line {line:?} of {self}"),
        };
        self.stdout.lines().filter(|line| !line.trim().is_empty()).map(parse).collect()
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub fn json(&self) -> Value {
        match serde_json::from_str(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("{error} in {self}"),
        }
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, status, stdout, stderr } = self;
        write!(f, "`{command}` ({status})\nstdout:\n{stdout}\nstderr:\n{stderr}")
    }
}

/// Makes a command line of `skep`.
pub(crate) fn skep<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(skep_binary());
    command.args(args);
    command
}

/// Runs a command to its end; ends it and panics when that takes too long.
#[track_caller]
pub(crate) fn run(mut command: Command) -> Output {
    let line = describe(&command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => panic!("cannot start `{line}`: {error}"),
    };
    let stdout = read_aside(child.stdout.take().expect("a pipe was asked for"));
    let stderr = read_aside(child.stderr.take().expect("a pipe was asked for"));
    let has_ended = wait(&child, COMMAND_TIMEOUT);
    if !has_ended {
        child.kill().expect("a child can be killed");
    }
    let status = child.wait().expect("a child can be waited for");
    let output = Output {
        command: line,
        status,
        stdout: stdout.join().expect("reading does not panic"),
        stderr: stderr.join().expect("reading does not panic"),
    };
    assert!(has_ended, "still ran after {} s, and was ended: {output}", COMMAND_TIMEOUT.as_secs());
    output
}

/// The command line, for messages.
pub(crate) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Waits for a child's end, and tells whether it came in time.
pub(crate) fn wait(child: &Child, timeout: Duration) -> bool {
    let pid = i32::try_from(child.id()).expect("a pid is an i32");
    let handle = PidFd::open(pid).expect("a child is there until it was waited for");
    handle.wait_exit(Some(timeout)).expect("poll")
}

fn read_aside(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is still worth showing.
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
