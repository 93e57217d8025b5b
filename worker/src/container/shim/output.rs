//! Moves a container's output into its log files.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use skep_common::spec::LogRotation;
use skep_runtime::clock;

use super::super::dirs::{DataDir, remove_all};
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

/// A container's log, to which only its shim appends: the newest of its files is written.
///
/// A file is complete once the next one exists, and the oldest ones go when there are too many.
pub(super) struct LogFile {
    data: DataDir,
    rotation: LogRotation,
    number: u64,
    file: File,
    length: u64,
    records: Vec<u8>,
    input: Box<[u8; READ_BYTES]>,
}

impl LogFile {
    /// Opens the newest file to append, or makes the first one.
    pub(super) fn open(data: &DataDir, rotation: LogRotation) -> Result<Self, Error> {
        let context = || format!("open the log in {}", data.path().display());
        let number = data.log_numbers().during(context)?.last().copied().unwrap_or(0);
        let file = open_file(data, number).during(context)?;
        let length = file.metadata().during(context)?.len();
        let (records, input) = (Vec::new(), Box::new([0; READ_BYTES]));
        Ok(Self { data: data.clone(), rotation, number, file, length, records, input })
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

    /// Appends the records, in as many files as they need. What cannot be written is dropped: the
    /// container must not stand still for its log, and its log must not outgrow its bound.
    fn append(&mut self) {
        let records = std::mem::take(&mut self.records);
        let mut rest = &records[..];
        while !rest.is_empty() {
            let room = self.rotation.file_bytes_max.saturating_sub(self.length);
            let mut fitting = whole_records(rest, room);
            if fitting == 0 && self.length > 0 {
                if self.rotate().is_err() {
                    break;
                }
                continue;
            }
            if fitting == 0 {
                // One that no file has room for has a file of its own.
                fitting = first_record(rest);
            }
            let (now, later) = rest.split_at(fitting);
            self.write(now);
            rest = later;
        }
        self.records = records;
        self.records.clear();
        self.records.shrink_to(KEPT_BYTES);
    }

    /// Writes records; where the disk is full they are dropped, and no half record stays.
    fn write(&mut self, records: &[u8]) {
        match self.file.write_all(records) {
            Ok(()) => self.length += records.len() as u64,
            Err(_) => {
                let _ = self.file.set_len(self.length);
            }
        }
    }

    /// Goes on with the next file. It exists before another one goes: there always is a log to read.
    fn rotate(&mut self) -> io::Result<()> {
        let number = self.number + 1;
        self.file = open_file(&self.data, number)?;
        (self.number, self.length) = (number, 0);
        if let Some(oldest) = number.checked_sub(u64::from(self.rotation.files_max)) {
            // One that cannot be removed now could not be later.
            let _ = remove_all(&self.data.log_file(oldest));
        }
        Ok(())
    }
}

fn open_file(data: &DataDir, number: u64) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o640).open(data.log_file(number))
}

/// Bytes of the whole records that fit into `room`.
fn whole_records(records: &[u8], room: u64) -> usize {
    let room = usize::try_from(room).unwrap_or(usize::MAX).min(records.len());
    records[..room].iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1)
}

/// Bytes of the first record.
fn first_record(records: &[u8]) -> usize {
    records.iter().position(|byte| *byte == b'\n').map_or(records.len(), |end| end + 1)
}

/// Whether a read failed only because nothing is there yet.
pub(super) fn is_not_yet(error: Errno) -> bool {
    matches!(error, Errno::EAGAIN | Errno::EINTR)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes each text as one read of standard output; gives each file's number and `log` fields.
    fn files(rotation: LogRotation, texts: &[&str]) -> Vec<(u64, String)> {
        let directory = tempfile::tempdir().unwrap();
        let data = DataDir(directory.path().to_owned());
        let mut log = LogFile::open(&data, rotation).unwrap();
        let mut encoder = Encoder::new(Stream::Stdout);
        for text in texts {
            encoder.push(text.as_bytes(), skep_common::Timestamp(0), &mut log.records);
            log.append();
        }
        let numbers = data.log_numbers().unwrap().into_iter();
        let read = |number| {
            let text = std::fs::read_to_string(data.log_file(number)).unwrap();
            let is_bounded = text.len() as u64 <= rotation.file_bytes_max;
            assert!(is_bounded || text.lines().count() == 1, "{number}: {text}");
            let lines = text.lines().map(|line| {
                super::super::super::logs::format::decode(line.as_bytes()).unwrap().line
            });
            (number, lines.collect::<Vec<_>>().join(" "))
        };
        numbers.map(read).collect()
    }

    #[test]
    fn files_are_bounded_in_size_and_number() {
        // A record of one letter has 62 bytes.
        let three = LogRotation { file_bytes_max: 130, files_max: 3 };
        let one = LogRotation { file_bytes_max: 130, files_max: 1 };
        let long = "x".repeat(200);
        let around = format!("a\n{long}\nb\n");
        for (name, rotation, texts, expect) in [
            ("what fits is one file", three, &["a\nb\n"][..], &[(0, "a b")][..]),
            ("the next record is the next file's", three, &["a\nb\nc\n"], &[(0, "a b"), (1, "c")]),
            ("a file is gone on with", three, &["a\n", "b\n", "c\n"], &[(0, "a b"), (1, "c")]),
            (
                "the oldest go",
                three,
                &["a\nb\nc\nd\ne\nf\ng\nh\ni\n"],
                &[(2, "e f"), (3, "g h"), (4, "i")],
            ),
            ("one file is the newest", one, &["a\nb\nc\n"], &[(1, "c")]),
            ("a long record is alone", three, &[&around], &[(0, "a"), (1, &long), (2, "b")]),
        ] {
            let expect: Vec<(u64, String)> =
                expect.iter().map(|(number, text)| (*number, (*text).to_owned())).collect();
            assert_eq!(files(rotation, texts), expect, "{name}");
        }
    }
}
