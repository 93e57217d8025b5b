//! Processes in network namespaces, which do what a test asks: this test binary, executed again.
//!
//! Nothing of them is in the host's namespace, and they end when the test does.

use std::fmt::Debug;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Serialize;
use serde_json::Value;

/// Says that this process is a helper.
pub(crate) const HELPER: &str = "SKEP_NETWORK_TEST_HELPER";

/// Marks the lines that are answers, among those of the test harness.
pub(crate) const ANSWER: &str = "@skep ";

/// Whether this test can run; where it cannot, says why, and fails in CI.
pub(crate) fn can_run() -> bool {
    let reason = if !nix::unistd::geteuid().is_root() {
        "needs root to make network namespaces"
    } else if Command::new("ip").arg("-V").output().is_err() {
        "needs iproute2"
    } else {
        return true;
    };
    skip(reason);
    false
}

/// Reports a test, or a part of one, that cannot run here.
pub(crate) fn skip(reason: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "skipped in CI: {reason}");
    eprintln!("skipped: {reason}");
}

/// A process in a network namespace, with mounts of its own.
pub(crate) struct Machine {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Machine {
    /// A process in namespaces of its own.
    pub(crate) fn new() -> Self {
        Self::start(&["unshare", "--net", "--mount"])
    }

    /// Another process in the namespaces of this one.
    pub(crate) fn beside(&self) -> Self {
        let mounts = format!("--mount=/proc/{}/ns/mnt", self.pid());
        Self::start(&["nsenter", &self.namespace(), &mounts])
    }

    /// The namespace is entered before this binary runs: its harness starts threads at once.
    fn start(enter: &[&str]) -> Self {
        let mut command = Command::new(enter[0]);
        command.args(&enter[1..]).arg(std::env::current_exe().expect("this test"));
        command.args(["--exact", "helper_process", "--nocapture"]).env(HELPER, "1");
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a helper process");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut machine = Self { child, stdin, stdout };
        machine.answer().expect("a helper that is ready");
        let namespace = |pid| std::fs::read_link(format!("/proc/{pid}/ns/net")).expect("a process");
        assert_ne!(namespace(machine.pid()), namespace(std::process::id()), "not the host's");
        machine
    }

    /// The argument that has `nsenter` enter the machine's namespace.
    pub(crate) fn namespace(&self) -> String {
        format!("--net=/proc/{}/ns/net", self.pid())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks, and expects that it succeeds.
    #[track_caller]
    pub(crate) fn ask(&mut self, request: &(impl Serialize + Debug)) -> Value {
        match self.try_ask(request) {
            Ok(value) => value,
            Err(error) => panic!("{request:?}: {error}"),
        }
    }

    /// Asks; the error is the text of a chain of errors.
    pub(crate) fn try_ask(&mut self, request: &(impl Serialize + Debug)) -> Result<Value, String> {
        let stdin = self.stdin.as_mut().expect("open until dropped");
        let line = serde_json::to_string(request).expect("a request");
        writeln!(stdin, "{line}").and_then(|()| stdin.flush()).expect("a helper that listens");
        self.answer()
    }

    fn answer(&mut self) -> Result<Value, String> {
        loop {
            let mut line = String::new();
            assert_ne!(self.stdout.read_line(&mut line).expect("stdout"), 0, "the helper ended");
            if let Some(text) = line.strip_prefix(ANSWER) {
                return serde_json::from_str(text).expect("an answer");
            }
        }
    }

    /// Runs `ip` in the machine's namespace.
    #[track_caller]
    pub(crate) fn ip(&self, arguments: &str) -> String {
        let mut command = Command::new("nsenter");
        command.arg(self.namespace()).arg("ip").args(arguments.split_whitespace());
        let output = command.output().expect("nsenter");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {arguments}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Ends the process at once, as a crash would.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.stdin.take()); // The helper ends when its stdin does.
        drop(self.child.wait());
    }
}
