//! What daemon, shim and exec helper tell each other, by file and by socket.
//!
//! The socket is the helper's standard input. Messages are JSON, one a line. The daemon sends the
//! shim `start`; closing the socket before that means "never mind".

use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use skep_common::Timestamp;
use skep_common::spec::LogRotation;
use skep_runtime::sys::ProcessId;
use skep_worker_core::dns::Scope;
use skep_worker_core::oci::SpecInput;

use crate::sys::own_received_fd;

/// What the shim is to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ShimConfig {
    /// The specification's share.
    pub(super) spec: SpecInput,
    /// Layers of the image, base first.
    pub(super) layers: Vec<PathBuf>,
    /// The container's data directory.
    pub(super) data_dir: PathBuf,
    /// How much of its output is kept.
    #[serde(default)]
    pub(super) log: LogRotation,
    /// Whose questions for names are answered; the daemon's, which finds it here again.
    #[serde(default)]
    pub(super) names: Option<Scope>,
    /// How many bytes of secrets and configs come over the socket, before anything else.
    #[serde(default)]
    pub(super) n_payload_bytes: usize,
}

/// How far a shim has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    /// The container is being made.
    Creating,
    /// It waits for its start, and goes away with the daemon.
    Created,
    /// It was told to start; from now on it outlives the daemon.
    Running,
}

/// What a shim has made, in its run directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ShimState {
    pub(super) shim: ProcessId,
    pub(super) init: Option<ProcessId>,
    pub(super) phase: Phase,
    pub(super) started_at: Option<Timestamp>,
    /// Its numbers of the descriptors that came with the start, which it keeps for daemons to come.
    #[serde(default)]
    pub(super) kept: Vec<RawFd>,
}

/// What a shim says to its daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Report {
    /// The container exists and waits.
    Created { init: ProcessId },
    /// The container's program runs.
    Started { at: Timestamp },
    /// It could not be made or started.
    Failed { reason: String },
}

/// What an exec helper says to its daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ExecReport {
    /// The command ended.
    Exited { code: i32 },
    /// The command could not be run.
    Failed { reason: String },
}

/// Most descriptors that come with the start.
pub(super) const KEPT_MAX: usize = 4;

/// The line that starts a container. Descriptors that come with it are kept to the container's end.
pub(super) const START: &[u8] = b"start\n";

/// Writes one message to a stream.
pub(super) fn send<T: Serialize>(mut stream: impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads from a socket, and takes the descriptors that came along.
pub(super) fn receive_with_fds(
    socket: &UnixStream,
    buffer: &mut [u8],
) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut buffers = [IoSliceMut::new(buffer)];
    let mut space = nix::cmsg_space!([RawFd; KEPT_MAX]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            received.extend(fds.into_iter().map(own_received_fd));
        }
    }
    Ok((message.bytes, received))
}

/// Reads a JSON file.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::from)
}
