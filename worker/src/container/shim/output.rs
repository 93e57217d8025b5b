//! Moves a container's output into its log file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use skep_runtime::clock;

use super::super::dirs::DataDir;
use super::super::error::{Context, Error};
use super::super::logs::format::{Encoder, Stream};

/// Bytes that are read at once: a quarter of a pipe.
const READ_BYTES: usize = 16 * 1024;

/// Capacity that the buffer of records keeps between reads.
const KEPT_BYTES: usize = 32 * 1024;

/// One stream of a container, read without blocking.
pub(super) struct Output {
    file: File,
    encoder: Encoder,
    is_open: bool,
}

impl Output {
    /// Reads `fd`, which becomes non-blocking.
    pub(super) fn new(fd: OwnedFd, stream: Stream) -> Result<Self, Error> {
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .during(|| "make a pipe non-blocking".into())?;
        Ok(Self { file: File::from(fd), encoder: Encoder::new(stream), is_open: true })
    }

    /// What to poll, unless it ended.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.is_open.then(|| self.file.as_fd())
    }
}

/// A container's log file, to which only its shim appends.
pub(super) struct LogFile {
    file: File,
    length: u64,
    records: Vec<u8>,
    input: Box<[u8; READ_BYTES]>,
}

impl LogFile {
    /// Opens the file to append.
    pub(super) fn open(data: &DataDir) -> Result<Self, Error> {
        let path = data.log();
        let context = || format!("open {}", path.display());
        let mut options = OpenOptions::new();
        let file = options.create(true).append(true).mode(0o640).open(&path).during(context)?;
        let length = file.metadata().during(context)?.len();
        Ok(Self { file, length, records: Vec::new(), input: Box::new([0; READ_BYTES]) })
    }

    /// Reads what is there, once, and appends it. Tells whether there may be more.
    pub(super) fn pump(&mut self, output: &mut Output) -> bool {
        let n_bytes = match output.file.read(&mut self.input[..]) {
            Ok(0) => 0,
            Ok(n_bytes) => n_bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            // EIO: nobody has the terminal open any more. Anything else ends the stream as well.
            Err(_) => 0,
        };
        if n_bytes == 0 {
            output.is_open = false;
            return false;
        }
        output.encoder.push(&self.input[..n_bytes], clock::now(), &mut self.records);
        self.append();
        true
    }

    /// Reads all that is left, once nobody writes any more, and the unfinished last line.
    pub(super) fn finish(&mut self, output: &mut Output) {
        while output.is_open && self.pump(output) {}
        output.encoder.finish(clock::now(), &mut self.records);
        self.append();
    }

    /// Appends the records. Where the disk is full they are dropped: the container must not stand
    /// still for its log, and no half record may stay.
    fn append(&mut self) {
        match self.file.write_all(&self.records) {
            Ok(()) => self.length += self.records.len() as u64,
            Err(_) => {
                let _ = self.file.set_len(self.length);
            }
        }
        self.records.clear();
        self.records.shrink_to(KEPT_BYTES);
    }
}

/// Whether a read failed only because nothing is there yet.
pub(super) fn is_not_yet(error: Errno) -> bool {
    matches!(error, Errno::EAGAIN | Errno::EINTR)
}
