//! Reads one container's log, across all of its files.
//!
//! A file is complete once the next one exists, and files are only ever deleted, the oldest first.
//! Those that are there when a reader begins are opened at once, so that none is deleted before it was
//! read; a follower loses a file only where it is as many files behind as are kept.

use std::collections::VecDeque;
use std::io::{self, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;

use skep_common::Timestamp;
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, AsyncSeekExt, BufReader};

use super::super::dirs::{DataDir, RunDir};
use super::super::error::{Context, Error};
use super::format::{LogRecord, decode};
use super::watch::{Watch, Watcher};

/// Bytes that are read at once when looking for the last records, from the end.
const TAIL_BLOCK_BYTES: u64 = 64 * 1024;

/// A place between two records of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogPosition {
    /// Number of the file.
    pub file: u64,
    /// Byte in it.
    pub byte: u64,
}

/// Which records to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on here, as [`LogReader::position`] gave it.
    pub from: Option<LogPosition>,
    /// Only that many of the last records, where no position is given.
    pub tail: Option<usize>,
    /// Only records of this moment and later ones.
    pub since: Option<Timestamp>,
    /// Whether to go on until the container ends.
    pub follow: bool,
}

/// Reads the records of one log in order.
#[derive(Debug)]
pub struct LogReader {
    files: Files,
    follow: Option<Follow>,
}

/// The files of one log, from the one at hand on.
#[derive(Debug)]
struct Files {
    id: String,
    data: DataDir,
    number: u64,
    file: BufReader<File>,
    /// Later ones that are open already.
    later: VecDeque<Numbered>,
    /// Bytes of the file at hand that were read in whole records.
    byte: u64,
    /// What has been read of the record at hand.
    line: Vec<u8>,
    since: Option<Timestamp>,
    /// Whether files that are made later are read too.
    goes_on: bool,
}

/// A file and its number.
type Numbered = (u64, std::fs::File);

#[derive(Debug)]
struct Follow {
    watcher: Arc<Watcher>,
    /// The directory of the log: its files grow, and new ones appear.
    data: Watch,
    /// Absent where the run directory is gone, hence the container too.
    run: Option<Watch>,
    exit: PathBuf,
    lost: PathBuf,
}

impl LogReader {
    pub(in super::super) async fn open(
        id: &str,
        run: &RunDir,
        data: &DataDir,
        options: LogOptions,
        watcher: Arc<Watcher>,
    ) -> Result<Self, Error> {
        let context = || format!("read the log of container {id}");
        let opening = data.clone();
        let opened = tokio::task::spawn_blocking(move || begin(&opening, options)).await;
        let (mut later, position) = opened.map_err(io::Error::other).flatten().during(context)?;
        let Some((number, file)) = later.pop_front() else {
            return Err(Error::NotFound(id.to_owned()));
        };
        let follow = if options.follow {
            let data = watcher.watch(data.path()).during(context)?;
            let run_watch = watcher.watch(run.path()).ok();
            Some(Follow { watcher, data, run: run_watch, exit: run.exit(), lost: run.lost() })
        } else {
            None
        };
        let mut file = BufReader::new(File::from_std(file));
        file.seek(SeekFrom::Start(position)).await.during(context)?;
        let files = Files {
            id: id.to_owned(),
            data: data.clone(),
            number,
            file,
            later,
            byte: position,
            line: Vec::new(),
            since: options.since,
            goes_on: options.follow,
        };
        Ok(Self { files, follow })
    }

    /// The place behind the last record that was given.
    pub fn position(&self) -> LogPosition {
        LogPosition { file: self.files.number, byte: self.files.byte }
    }

    /// The next record; `None` at the end, which with `follow` is the container's end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<LogRecord>, Error> {
        loop {
            if let Some(record) = self.files.next().await? {
                return Ok(Some(record));
            }
            let Some(follow) = &self.follow else { return Ok(None) };
            let mut data = pin!(follow.data.notified());
            data.as_mut().enable();
            let mut run = pin!(follow.run.as_ref().map(Watch::notified));
            if let Some(run) = run.as_mut().as_pin_mut() {
                run.enable();
            }
            // In this order: what was written before the end was recorded is read after it.
            let has_ended = follow.has_ended();
            if let Some(record) = self.files.next().await? {
                return Ok(Some(record));
            }
            if has_ended {
                return Ok(None);
            }
            tokio::select! {
                () = data => {}
                () = async { match run.as_pin_mut() {
                    Some(run) => run.await,
                    None => std::future::pending().await,
                }} => {}
                dispatched = follow.watcher.dispatch() => {
                    dispatched.during(|| "read file events".into())?;
                }
            }
        }
    }
}

impl Follow {
    fn has_ended(&self) -> bool {
        self.run.is_none() || self.exit.exists() || self.lost.exists() || !self.has_run_dir()
    }

    fn has_run_dir(&self) -> bool {
        self.exit.parent().is_some_and(std::path::Path::exists)
    }
}

impl Files {
    /// The next wanted record that is whole, of any file. Cancel-safe.
    async fn next(&mut self) -> Result<Option<LogRecord>, Error> {
        loop {
            if let Some(record) = self.next_of_file().await? {
                return Ok(Some(record));
            }
            if !self.has_later().await? {
                return Ok(None);
            }
            // It may have grown before the later one was made.
            if let Some(record) = self.next_of_file().await? {
                return Ok(Some(record));
            }
            let Some((number, file)) = self.later.pop_front() else { continue };
            if number > self.number + 1 {
                tracing::warn!(
                    container.id = self.id,
                    files = number - self.number - 1,
                    "log files were deleted before a reader came to them"
                );
            }
            (self.number, self.byte) = (number, 0);
            self.file = BufReader::new(File::from_std(file));
            // Of a shim that was killed.
            self.line.clear();
        }
    }

    /// Cancel-safe: what was read stays in `line`.
    async fn next_of_file(&mut self) -> Result<Option<LogRecord>, Error> {
        loop {
            let read = self.file.read_until(b'\n', &mut self.line).await;
            read.during(|| format!("read the log of container {}", self.id))?;
            if !self.line.ends_with(b"\n") {
                return Ok(None);
            }
            let record = decode(&self.line);
            self.byte += self.line.len() as u64;
            self.line.clear();
            match record {
                Some(record) if self.since.is_none_or(|since| since <= record.time) => {
                    return Ok(Some(record));
                }
                Some(_) => {}
                // A machine that lost power may leave a torn record.
                None => tracing::debug!(container.id = self.id, "skipped a torn log record"),
            }
        }
    }

    /// Whether there is a file after the one at hand, which is open then. Cancel-safe.
    async fn has_later(&mut self) -> Result<bool, Error> {
        if !self.later.is_empty() || !self.goes_on {
            return Ok(!self.later.is_empty());
        }
        let context = || format!("read the log of container {}", self.id);
        let (data, number) = (self.data.clone(), self.number);
        let is_deleted = self.file.get_ref().metadata().await.during(context)?.nlink() == 0;
        let found = tokio::task::spawn_blocking(move || match open(&data, number + 1)? {
            // Where this one is deleted, the next one may be too.
            None if is_deleted => Ok(open_all(&data, number + 1)?.pop_front()),
            file => Ok(file.map(|file| (number + 1, file))),
        });
        self.later.extend(found.await.map_err(io::Error::other).flatten().during(context)?);
        Ok(!self.later.is_empty())
    }
}

/// Opens a file of the log, if it is there.
fn open(data: &DataDir, number: u64) -> io::Result<Option<std::fs::File>> {
    match std::fs::File::open(data.log_file(number)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens the files of the log from number `first` on. One is there unless the whole log is gone.
fn open_all(data: &DataDir, first: u64) -> io::Result<VecDeque<Numbered>> {
    loop {
        let mut numbers = match data.log_numbers() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(VecDeque::new()),
            other => other?,
        };
        let numbers = numbers.split_off(&first);
        let mut files = VecDeque::new();
        for number in &numbers {
            // Those that were deleted meanwhile are the oldest.
            files.extend(open(data, *number)?.map(|file| (*number, file)));
        }
        // Where all of them were, later ones have been made.
        if !files.is_empty() || numbers.is_empty() {
            return Ok(files);
        }
    }
}

/// The files of the log that have the records that are asked for, and where these begin in the first one.
fn begin(data: &DataDir, options: LogOptions) -> io::Result<(VecDeque<Numbered>, u64)> {
    let mut files = open_all(data, options.from.map_or(0, |from| from.file))?;
    if let Some(from) = options.from {
        // Where that file was deleted meanwhile, what is left is all later.
        let is_there = files.front().is_some_and(|(number, _)| *number == from.file);
        return Ok((files, if is_there { from.byte } else { 0 }));
    }
    let Some(mut n_missing) = options.tail else { return Ok((files, 0)) };
    for nth in (0..files.len()).rev() {
        let (position, n_found) = last_records(&files[nth].1, n_missing)?;
        if n_found == n_missing {
            return Ok((files.split_off(nth), position));
        }
        n_missing -= n_found;
    }
    Ok((files, 0))
}

/// The byte at which the last `n_records` whole records of a file begin, and how many there are.
fn last_records(file: &std::fs::File, n_records: usize) -> io::Result<(u64, usize)> {
    let mut end = file.metadata()?.len();
    let mut block = vec![0; usize::try_from(TAIL_BLOCK_BYTES).map_err(io::Error::other)?];
    let mut n_newlines = 0;
    while end > 0 {
        let start = end.saturating_sub(TAIL_BLOCK_BYTES);
        let length = usize::try_from(end - start).map_err(io::Error::other)?;
        file.read_exact_at(&mut block[..length], start)?;
        for (at, byte) in block[..length].iter().enumerate().rev() {
            if *byte == b'\n' {
                // The newline of the record before the first one that is wanted.
                if n_newlines == n_records {
                    return Ok((start + at as u64 + 1, n_records));
                }
                n_newlines += 1;
            }
        }
        end = start;
    }
    Ok((0, n_newlines))
}
