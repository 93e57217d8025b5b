//! Receives the terminal of a container that has one.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::super::dirs::RunDir;
use super::super::error::{Context, Error};

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
        let mut buffers = [IoSliceMut::new(&mut name)];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut space), flags)
            .during(context)?;
        for control in message.cmsgs().during(context)? {
            if let ControlMessageOwned::ScmRights(fds) = control
                && let Some(fd) = fds.first()
            {
                return Ok(crate::sys::own_received_fd(*fd));
            }
        }
        Err(std::io::Error::other("the message holds no descriptor")).during(context)
    }
}
