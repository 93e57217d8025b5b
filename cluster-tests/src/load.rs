//! HTTP requests from inside a lab: many at once, or one kept connection.
//!
//! `skep lab http` sends them, in a member's namespaces. It never tries anything twice, so that
//! `failed == 0` means that no request failed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;

use crate::command::{describe, skep, wait};
use crate::lab::Lab;
use crate::wait::wait_until;

/// Requests that are under way when a load is stopped end within their own timeouts.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// A load of a fixed number of requests on a busy machine.
const FINISH_TIMEOUT: Duration = Duration::from_secs(300);

/// What to send.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where to; requests go to each in turn.
    pub urls: Vec<String>,
    /// How many clients send at once.
    pub clients: u32,
    /// How many requests in all; without it, until [`Load::stop`].
    pub requests: Option<u64>,
    /// Whether each client keeps its connection.
    pub keep_alive: bool,
    /// How many requests are due in a second, whatever becomes of them; without it each client sends as
    /// soon as it has its answer. Only those that fail are recorded then.
    pub rate: Option<u64>,
    /// The first of as many ports as there are requests, each of which is sent from one of its own: what the kernel
    /// gives is used again soon, through another node too. A task that still remembers the connection of before has
    /// the client ask twice, and the second time it is another task's turn.
    pub ports_from: Option<u16>,
    /// How long to wait for a connection, and for each part of an answer.
    pub timeout: Duration,
}

impl LoadOptions {
    /// One client, a new connection for each request, until it is stopped.
    pub fn to(urls: impl IntoIterator<Item = String>) -> Self {
        let timeout = Duration::from_secs(5);
        let urls = urls.into_iter().collect();
        Self {
            urls,
            clients: 1,
            requests: None,
            keep_alive: false,
            rate: None,
            ports_from: None,
            timeout,
        }
    }
}

/// One request, as it went.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Record {
    /// When it was sent, or due, in milliseconds since the load began.
    pub sent_at_ms: u64,
    /// How long it took.
    pub took_ms: u64,
    /// Which client sent it.
    pub client: u32,
    /// The address it was sent to.
    pub server: String,
    /// `Ok`, or the kind of failure: `Connect`, `Timeout`, `Reset`, `Closed`, `Status`, …
    pub outcome: String,
    /// The answer's status.
    pub status: Option<u16>,
    /// The answer's body.
    pub body: Option<String>,
    /// The failure in words.
    pub error: Option<String>,
}

impl Record {
    /// Whether a whole answer with a status below 400 came.
    pub fn is_ok(&self) -> bool {
        self.outcome == "Ok"
    }
}

/// Counts of all requests of a load.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Summary {
    /// How many were sent.
    pub requests: u64,
    /// How many were answered well.
    pub ok: u64,
    /// How many were not.
    pub failed: u64,
    /// Those by kind.
    pub failures: BTreeMap<String, u64>,
    /// How many each server address answered well.
    pub servers: BTreeMap<String, u64>,
    /// The first error, in words.
    pub first_error: Option<String>,
    /// The longest time that a request took.
    pub longest_ms: u64,
}

/// What a load came to.
#[derive(Debug, Clone)]
pub struct Report {
    /// All counts.
    pub summary: Summary,
    /// Each request, in the order they ended.
    pub records: Vec<Record>,
}

impl Report {
    /// Panics with the failures unless there were requests and none failed.
    #[track_caller]
    pub fn assert_none_failed(&self) {
        let failed: Vec<&Record> = self.records.iter().filter(|r| !r.is_ok()).take(5).collect();
        let Summary { requests, failed: n_failed, .. } = self.summary;
        assert!(requests > 0, "no request was sent");
        assert!(n_failed == 0, "{n_failed} of {requests} requests failed, such as {failed:#?}");
    }

    /// How often each body came.
    pub fn bodies(&self) -> BTreeMap<&str, usize> {
        let mut bodies = BTreeMap::new();
        for body in self.records.iter().filter_map(|record| record.body.as_deref()) {
            *bodies.entry(body).or_default() += 1;
        }
        bodies
    }
}

/// Requests that are being sent.
#[derive(Debug)]
pub struct Load {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Arc<Mutex<Lines>>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Lines {
    records: Vec<Record>,
    summary: Option<Summary>,
}

impl Load {
    #[track_caller]
    pub(crate) fn start(lab: &Lab, from: &str, options: &LoadOptions) -> Self {
        let mut command = http_command(lab, from);
        match options.rate {
            Some(rate) => command.args(["--record-failed", "--rate", &rate.to_string()]),
            None => command.arg("--record"),
        };
        command.args(["--clients", &options.clients.to_string()]);
        command.args(["--timeout-ms", &options.timeout.as_millis().to_string()]);
        if let Some(requests) = options.requests {
            command.args(["--requests", &requests.to_string()]);
        }
        if let Some(port) = options.ports_from {
            command.args(["--ports-from", &port.to_string()]);
        }
        if options.keep_alive {
            command.arg("--keep-alive");
        }
        command.args(&options.urls);
        let (child, stdin, stdout) = spawn(command);
        let lines: Arc<Mutex<Lines>> = Arc::default();
        let shared = Arc::clone(&lines);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let mut lines = shared.lock().expect("nobody panics with the lock");
                match serde_json::from_str(&line) {
                    Ok(record) => lines.records.push(record),
                    Err(_) => lines.summary = serde_json::from_str(&line).ok(),
                }
            }
        });
        Self { child, stdin: Some(stdin), lines, reader: Some(reader) }
    }

    /// The requests that ended so far.
    pub fn records(&self) -> Vec<Record> {
        self.lines.lock().expect("nobody panics with the lock").records.clone()
    }

    /// Waits until this many more requests were answered well.
    #[track_caller]
    pub fn wait_for_more(&self, n_more: usize, deadline: Duration) {
        let count = || self.records().iter().filter(|record| record.is_ok()).count();
        let target = count() + n_more;
        wait_until(deadline, "the load goes on", || {
            let n_ok = count();
            ((n_ok >= target).then_some(()), format!("{n_ok} of {target} answered well"))
        });
    }

    /// Ends the load and gives what it came to.
    #[track_caller]
    pub fn stop(mut self) -> Report {
        self.stdin = None;
        self.report(STOP_TIMEOUT)
    }

    /// Waits until the requests asked for were sent, and gives what they came to.
    #[track_caller]
    pub fn finish(mut self) -> Report {
        self.report(FINISH_TIMEOUT)
    }

    #[track_caller]
    fn report(&mut self, timeout: Duration) -> Report {
        assert!(wait(&self.child, timeout), "the load did not end in {} s", timeout.as_secs());
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader does not panic");
        }
        let mut lines = self.lines.lock().expect("nobody panics with the lock");
        let records = std::mem::take(&mut lines.records);
        let summary = lines.summary.take().expect("a load ends with a summary");
        Report { summary, records }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// One connection that is kept open; a request goes out when the test says so.
#[derive(Debug)]
pub struct HeldConnection {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl HeldConnection {
    #[track_caller]
    pub(crate) fn open(lab: &Lab, from: &str, url: &str) -> Self {
        let mut command = http_command(lab, from);
        command.args(["--hold", url]);
        let (child, stdin, stdout) = spawn(command);
        Self { child, stdin, stdout: BufReader::new(stdout) }
    }

    /// Sends a request; the first one opens the connection, and once it is lost all fail.
    #[track_caller]
    pub fn request(&mut self, path: &str) -> Record {
        writeln!(self.stdin, "{path}").expect("the holder of the connection runs");
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("the holder answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
    }
}

impl Drop for HeldConnection {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn http_command(lab: &Lab, from: &str) -> Command {
    skep(["lab", "--name", lab.name(), "exec", from, "--", "skep", "lab", "http"])
}

#[track_caller]
fn spawn(mut command: Command) -> (Child, ChildStdin, ChildStdout) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => panic!("cannot start `{}`: {error}", describe(&command)),
    };
    let stdin = child.stdin.take().expect("a pipe was asked for");
    let stdout = child.stdout.take().expect("a pipe was asked for");
    (child, stdin, stdout)
}

fn end(child: &mut Child) {
    // Ended and waited for already is fine; there is nothing else to do about an error.
    let _ = child.kill();
    let _ = child.wait();
}
