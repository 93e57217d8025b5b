//! The one-line protocol between the lab's commands and a node's init.
//!
//! A command connects to the member's `control.sock`, writes one [`Request`] as a line of JSON and
//! reads one [`Status`] back, which tells what is so *after* the request was done.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::state::MemberPaths;

/// An init answers at once; what takes longer is stuck.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// What a node's init can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Request {
    /// Only answer.
    Status,
    /// Start the daemon unless it runs.
    StartDaemon,
    /// End the daemon alone, and wait until it is gone.
    KillDaemon,
}

/// What an init says of its daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Status {
    pub is_daemon_running: bool,
    /// How the daemon before ended, in words.
    pub last_exit: Option<String>,
    /// Why the request could not be done.
    pub error: Option<String>,
}

/// Asks a member's init; an error also when it could not do what was asked.
pub(super) fn request(member: &MemberPaths, request: Request) -> Result<Status> {
    let path = member.control_socket();
    let ask = || -> Result<Status> {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        write_line(&mut stream, &request)?;
        read_line(&stream)
    };
    let status = ask().with_context(|| format!("ask the init behind {}", path.display()))?;
    match status.error {
        Some(error) => Err(anyhow!(error)),
        None => Ok(status),
    }
}

pub(super) fn write_line<T: Serialize>(mut to: impl Write, value: &T) -> Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(to.write_all(&line)?)
}

pub(super) fn read_line<T: serde::de::DeserializeOwned>(from: &UnixStream) -> Result<T> {
    let mut line = String::new();
    BufReader::new(from).read_line(&mut line)?;
    serde_json::from_str(&line).with_context(|| format!("unexpected line {line:?}"))
}
