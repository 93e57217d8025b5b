//! Commands against a daemon in this process, over a unix socket.

mod daemon;
mod endpoints;
mod events;
mod jobs;
mod lists;
mod payloads;
mod plans;
mod services;

use std::io::Write;
use std::sync::{Arc, Mutex};

use clap::Parser as _;
use skep_common::Timestamp;

use crate::args::Cli;
use crate::ui::Ui;
pub(super) use daemon::Daemon;

/// The tests' present: 2023-11-14T22:15:00Z.
pub(super) fn now() -> Timestamp {
    Timestamp::from_secs(1_700_000_100)
}

/// What a command wrote.
#[derive(Debug, Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Buffer {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Buffer {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A reader that went away.
#[derive(Debug)]
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Exit code, standard output and standard error.
type Outcome = (u8, String, String);

/// Runs a command line, split as a shell does, against the daemon.
async fn run(daemon: &Daemon, line: &str) -> Outcome {
    let words = skep_common::compose::units::split_words(line).unwrap();
    run_words(daemon, &words.iter().map(String::as_str).collect::<Vec<_>>()).await
}

async fn run_words(daemon: &Daemon, words: &[&str]) -> Outcome {
    let (out, err) = (Buffer::default(), Buffer::default());
    let mut ui = Ui::new(Box::new(out.clone()), Box::new(err.clone()), now);
    let code = run_with(daemon, words, &mut ui).await;
    (code, out.text(), err.text())
}

async fn run_with(daemon: &Daemon, words: &[&str], ui: &mut Ui) -> u8 {
    let host = daemon.host();
    let words = ["skep", "--host", &host].into_iter().chain(words.iter().copied());
    let cli = Cli::try_parse_from(words).unwrap();
    super::finish(super::run(cli, ui).await, ui)
}

#[test]
fn the_command_line_is_consistent() {
    use clap::CommandFactory as _;
    Cli::command().debug_assert();
    for (line, code) in [
        ("skep --help", 0),
        ("skep service create", 1),
        ("skep service ls --nonsense", super::CODE_USAGE),
        ("skep swarm join-token king", super::CODE_USAGE),
    ] {
        let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
        assert_eq!(super::usage_code(&error), code, "{line}: {error}");
    }
}

#[tokio::test]
async fn a_reader_that_went_away_is_no_message() {
    let daemon = Daemon::start();
    let err = Buffer::default();
    let mut ui = Ui::new(Box::new(Closed), Box::new(err.clone()), now);
    assert_eq!(run_with(&daemon, &["completion", "bash"], &mut ui).await, super::CODE_BROKEN_PIPE);
    assert_eq!(err.text(), "");
}
