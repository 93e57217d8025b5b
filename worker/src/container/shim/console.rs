//! Receives the terminal of a container that has one.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use super::super::dirs::RunDir;
use super::super::error::{Context, Error};
use super::super::protocol::receive_with_fds;

/// A socket on which the runtime hands over the terminal's main end.
pub(super) struct Console(UnixListener);

impl Console {
    /// Listens in the run directory.
    pub(super) fn listen(run: &RunDir) -> Result<Self, Error> {
        let path = run.console_socket();
        let context = || format!("listen on {}", path.display());
        // By name alone: the path of a socket may have 107 bytes at most.
        std::env::set_current_dir(run.path()).during(context)?;
        let name = path.file_name().unwrap_or_default();
        let listener = UnixListener::bind(name);
        std::env::set_current_dir("/").during(context)?;
        Ok(Self(listener.during(context)?))
    }

    /// Takes the terminal; the runtime has sent it by the time a container waits for its start.
    pub(super) fn accept(self) -> Result<OwnedFd, Error> {
        let context = || "receive the container's terminal".to_owned();
        let (stream, _) = self.0.accept().during(context)?;
        let mut name = [0; 4096];
        let (_, received) = receive_with_fds(&stream, &mut name).during(context)?;
        let terminal = received.into_iter().next();
        let missing = || std::io::Error::other("the message holds no descriptor");
        terminal.ok_or_else(missing).during(context)
    }
}
