//! A command on a node that goes on, such as `skep service logs --follow`.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::command::{describe, skep, wait};
use crate::lab::Lab;
use crate::wait::wait_until;

/// A command that runs on a node while the test goes on; it ends when this is dropped.
#[derive(Debug)]
pub struct Running {
    command: String,
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Lab {
    /// Starts a command of the client on a node.
    #[track_caller]
    pub fn start_skep(&self, node: &str, args: &[&str]) -> Running {
        self.start_command(node, &[&["skep"], args].concat())
    }

    /// Starts any command on a node.
    #[track_caller]
    pub fn start_command(&self, node: &str, words: &[&str]) -> Running {
        let mut command = skep(["lab", "--name", self.name(), "exec", node, "--"]);
        command.args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let line = describe(&command);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("cannot start `{line}`: {error}"),
        };
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let stdout = child.stdout.take().expect("a pipe was asked for");
        let stderr = child.stderr.take().expect("a pipe was asked for");
        let readers = vec![collect(stdout, &lines), collect(stderr, &lines)];
        Running { command: line, child, lines, readers }
    }
}

impl Running {
    /// What it printed so far, on standard output and standard error.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("nobody panics with the lock").clone()
    }

    /// Waits for a line that is as wanted, and gives it.
    #[track_caller]
    pub fn wait_for_line(
        &self,
        deadline: Duration,
        what: &str,
        mut is_wanted: impl FnMut(&str) -> bool,
    ) -> String {
        wait_until(deadline, what, || {
            let lines = self.lines();
            let found = lines.iter().find(|line| is_wanted(line)).cloned();
            (found, format!("`{}` printed\n{}", self.command, lines.join("\n")))
        })
    }

    /// Waits for its end; gives how it ended and all that it printed.
    #[track_caller]
    pub fn finish(mut self, deadline: Duration) -> (ExitStatus, String) {
        let has_ended = wait(&self.child, deadline);
        let seen = || self.lines().join("\n");
        assert!(has_ended, "`{}` still runs after {deadline:?}:\n{}", self.command, seen());
        for reader in std::mem::take(&mut self.readers) {
            reader.join().expect("reading does not panic");
        }
        let status = self.child.wait().expect("a child can be waited for");
        (status, self.lines().join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Ended and waited for already is fine; there is nothing else to do about an error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(from: impl Read + Send + 'static, lines: &Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    let lines = Arc::clone(lines);
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            lines.lock().expect("nobody panics with the lock").push(line);
        }
    })
}
