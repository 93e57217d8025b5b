//! `skep lab http`: sends HTTP requests and reports every outcome.
//!
//! The load client of tests and of the demonstration. What makes it one: it *never tries anything
//! twice*. A refused connection, a reset, a connection closed early, a timeout and an error status
//! are each one failed request, so that "no request failed" means just that.
//!
//! Each client is one thread. The n-th request of all goes to the n-th URL in turn; with
//! `--keep-alive` each client keeps a connection to one URL. It ends after `--requests`, or when
//! its standard input ends. The last line it prints is the [`Summary`].
//!
//! Clients send as soon as they have their answers. With `--rate` the load is open-loop: requests are due at
//! even intervals whatever becomes of those before, and each counts from when it was due, so that a server
//! that stands still is seen by all that should have been sent meanwhile.
//!
//! With `--hold` it keeps one single connection, sends a request for each line of its standard
//! input (the line is the path; an empty one means the URL's), and prints the outcome.

mod connection;

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use skep_runtime::clock::monotonic;

use self::connection::{Connection, Failure, How};

/// Arguments of the hidden `skep lab http`.
#[derive(Debug, Args)]
pub(crate) struct HttpArgs {
    /// Where to; given more than once, requests go to each in turn.
    #[arg(required = true, value_parser = parse_url)]
    urls: Vec<Url>,
    /// How many clients send at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    clients: u32,
    /// How many requests in all; without it, until standard input ends.
    #[arg(long)]
    requests: Option<u64>,
    /// Send many requests over one connection.
    #[arg(long)]
    keep_alive: bool,
    /// Keep one connection and send a request for each line of standard input.
    #[arg(long, conflicts_with_all = ["requests", "clients"])]
    hold: bool,
    /// Send this many requests a second, at even intervals.
    #[arg(long, conflicts_with = "hold", value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    /// Send each request from a port of its own: the first from this one, then upwards. What the kernel gives is used
    /// again soon, through another node as well, and may then meet the rest of an earlier connection.
    #[arg(long, conflicts_with_all = ["keep_alive", "hold"], requires = "requests",
        value_parser = clap::value_parser!(u16).range(1..))]
    ports_from: Option<u16>,
    /// Print each request's outcome and answer.
    #[arg(long)]
    record: bool,
    /// Print the outcome of each request that failed.
    #[arg(long, conflicts_with = "record")]
    record_failed: bool,
    /// How long to wait for a connection, and for each part of an answer, in milliseconds.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    timeout_ms: u64,
}

/// An `http://ADDRESS:PORT/PATH`; names are not resolved, so that a resolver is no part of a test.
#[derive(Debug, Clone)]
struct Url {
    address: SocketAddr,
    path: String,
}

fn parse_url(text: &str) -> Result<Url, String> {
    let rest = text.strip_prefix("http://").ok_or("must start with http://")?;
    let (address, path) = match rest.split_once('/') {
        Some((address, path)) => (address, format!("/{path}")),
        None => (rest, "/".to_owned()),
    };
    let with_port = address.parse().or_else(|_| format!("{address}:80").parse());
    Ok(Url { address: with_port.map_err(|_| "needs ADDRESS or ADDRESS:PORT")?, path })
}

/// What became of one request, as `--record` prints it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Record {
    /// When it was sent, or due, in milliseconds since this program began.
    sent_at_ms: u64,
    took_ms: u64,
    client: u32,
    server: SocketAddr,
    /// `Ok`, or the kind of failure.
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// The last line: counts of all requests.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Summary {
    requests: u64,
    ok: u64,
    failed: u64,
    /// Failed requests by kind.
    failures: BTreeMap<&'static str, u64>,
    /// How many requests each connection's server address answered well.
    servers: BTreeMap<String, u64>,
    /// The first error, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_error: Option<String>,
    longest_ms: u64,
}

/// What the clients share.
struct Shared<'a> {
    args: &'a HttpArgs,
    started: Instant,
    n_sent: AtomicU64,
    is_over: AtomicBool,
    summary: Mutex<Summary>,
}

/// Sends what was asked. The exit code is 0 also when requests failed: that is the answer.
pub(super) fn run(args: &HttpArgs) -> Result<ExitCode> {
    if let (Some(first), Some(requests)) = (args.ports_from, args.requests)
        && u64::from(first).saturating_add(requests) > 1 << 16
    {
        bail!("--ports-from {first} leaves too few ports for {requests} requests");
    }
    let shared = Shared {
        args,
        started: monotonic(),
        n_sent: AtomicU64::new(0),
        is_over: AtomicBool::new(false),
        summary: Mutex::default(),
    };
    if args.hold {
        shared.hold()?;
    } else {
        std::thread::scope(|scope| {
            for client in 0..args.clients {
                let shared = &shared;
                scope.spawn(move || shared.send_all(client));
            }
            if args.requests.is_none() {
                // Whatever comes is ignored; only the end counts, and an error is an end.
                let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
                shared.is_over.store(true, Ordering::Relaxed);
            }
        });
    }
    let summary = shared.summary.into_inner().expect("no client panicked");
    print_line(&summary)?;
    Ok(ExitCode::SUCCESS)
}

impl Shared<'_> {
    fn send_all(&self, client: u32) {
        let timeout = Duration::from_millis(self.args.timeout_ms);
        let mut kept: Option<Connection> = None;
        while !self.is_over.load(Ordering::Relaxed) {
            let number = self.n_sent.fetch_add(1, Ordering::Relaxed);
            if self.args.requests.is_some_and(|limit| number >= limit) {
                return;
            }
            let turn = if self.args.keep_alive { u64::from(client) } else { number };
            let n_urls = self.args.urls.len() as u64;
            let nth = usize::try_from(turn % n_urls).expect("less than the number of URLs");
            let url = &self.args.urls[nth];
            let due = self.args.rate.map(|rate| self.wait_until_due(number, rate));
            let port = self.args.ports_from.map(|first| own_port(first, number));
            let how = How { port, timeout };
            let record = self.send((client, due), url, &url.path, how, &mut kept);
            if !self.args.keep_alive {
                kept = None;
            }
            self.count(&record);
        }
    }

    /// Keeps one connection until its first failure; after it every request fails.
    fn hold(&self) -> Result<()> {
        let how = How { port: None, timeout: Duration::from_millis(self.args.timeout_ms) };
        let url = &self.args.urls[0];
        let mut kept = None;
        let mut is_lost = false;
        for line in io::stdin().lock().lines() {
            let line = line.context("read standard input")?;
            let path = if line.is_empty() { &url.path } else { &line };
            let record = match is_lost {
                false => self.send((0, None), url, path, how, &mut kept),
                true => self.record(0, url, monotonic(), Err(Failure::lost())),
            };
            is_lost |= kept.is_none();
            self.count(&record);
            if !self.args.record {
                print_line(&record)?;
            }
        }
        Ok(())
    }

    /// Waits until the n-th request is due; gives the time.
    fn wait_until_due(&self, number: u64, rate: u64) -> Instant {
        let nanos = u128::from(number) * 1_000_000_000 / u128::from(rate);
        let due = self.started + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        std::thread::sleep(due.saturating_duration_since(monotonic()));
        due
    }

    /// Sends one request of a client, over the kept connection where there is one. It counts from when it
    /// was due, if that is given.
    fn send(
        &self,
        (client, due): (u32, Option<Instant>),
        url: &Url,
        path: &str,
        how: How,
        kept: &mut Option<Connection>,
    ) -> Record {
        let sent_at = due.unwrap_or_else(monotonic);
        let connection = match kept.take() {
            Some(connection) => Ok(connection),
            None => Connection::open(url.address, how),
        };
        let keep = self.args.keep_alive || self.args.hold;
        let answer = connection.and_then(|mut connection| {
            let answer = connection.get(path, keep)?;
            *kept = answer.can_go_on.then_some(connection);
            Ok(answer)
        });
        self.record(client, url, sent_at, answer)
    }

    fn record(
        &self,
        client: u32,
        url: &Url,
        sent_at: Instant,
        answer: Result<connection::Answer, Failure>,
    ) -> Record {
        let (outcome, status, body, error) = match answer {
            Ok(answer) => {
                let outcome = if answer.status < 400 { "Ok" } else { "Status" };
                (outcome, Some(answer.status), Some(answer.body), None)
            }
            Err(failure) => (failure.kind, None, None, Some(failure.message)),
        };
        Record {
            sent_at_ms: millis(sent_at.saturating_duration_since(self.started)),
            took_ms: millis(monotonic().saturating_duration_since(sent_at)),
            client,
            server: url.address,
            outcome,
            status,
            body,
            error,
        }
    }

    fn count(&self, record: &Record) {
        let mut summary = self.summary.lock().expect("no client panicked");
        summary.requests += 1;
        summary.longest_ms = summary.longest_ms.max(record.took_ms);
        if record.outcome == "Ok" {
            summary.ok += 1;
            *summary.servers.entry(record.server.to_string()).or_default() += 1;
        } else {
            summary.failed += 1;
            *summary.failures.entry(record.outcome).or_default() += 1;
            let status = || record.status.map(|status| format!("status {status}"));
            let words = record.error.clone().or_else(status).unwrap_or_default();
            summary.first_error.get_or_insert_with(|| format!("{}: {words}", record.server));
        }
        let is_shown = self.args.record || self.args.record_failed && record.outcome != "Ok";
        // Printed under the lock, so that lines stay whole.
        if is_shown && print_line(record).is_err() {
            self.is_over.store(true, Ordering::Relaxed);
        }
    }
}

/// The port of the n-th request.
fn own_port(first: u16, number: u64) -> u16 {
    u16::try_from(u64::from(first) + number).expect("there are enough ports, as was checked")
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn print_line<T: Serialize>(value: &T) -> Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line)?;
    Ok(stdout.flush()?)
}

/// Reads all of a bounded stream; used where an answer has no length.
fn read_bounded(from: impl Read, n_bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(n_bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}
