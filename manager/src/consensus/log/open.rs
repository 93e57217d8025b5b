//! Opening the log: finds the segments, checks them, cuts a torn tail and starts a new segment.
//!
//! # What may be wrong
//!
//! - The last frame may be whole, and only in the kernel's memory: it is made durable before anything counts on it.
//! - The last segment may end in a torn frame, the trace of a crash during a write: nothing valid
//!   follows it. It was never acknowledged and is cut, with a warning.
//! - The file of the last segment may be shorter than the space that was reserved for it, which no
//!   crash does: acknowledged entries may be lost. It is cut as well, and the loss written down
//!   ([`super::super::lost_tail`]) before the log is continued.
//! - Everything else is an error: a segment that is missing, a frame that is damaged while others
//!   follow, a segment shorter than its successor remembers, a key or a manager that is not ours.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::consensus::disk::{self, Error};
use crate::consensus::frame::{
    FIRST_COUNTER, HEADER_LENGTH, find_frame, is_incomplete, parse_frame, read_header,
};
use crate::consensus::lost_tail;
use crate::consensus::seal::FileKey;
use crate::consensus::types::LogId;

use super::index::Index;
use super::record::{Checkpoint, Meta, Record, read_records};
use super::segment::{self, EntryPlace, FramePlace, NewSegment, SEGMENT, Segment};
use super::writer::StoredSegment;
use super::{LogOptions, dir_of};

/// A log as found, and the segment that continues it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) index: Index,
    pub(super) meta: Meta,
    /// Segments before the new one, oldest first.
    pub(super) stored: Vec<StoredSegment>,
    pub(super) active: NewSegment,
}

/// A segment file with its header and checkpoint read.
struct SegmentFile {
    path: PathBuf,
    bytes: Vec<u8>,
    number: u64,
    file_key: FileKey,
    checkpoint: Checkpoint,
    /// Where the frame after the checkpoint starts.
    start: usize,
}

/// What the records read so far amount to.
struct Replay {
    index: Index,
    meta: Meta,
    stored: Vec<StoredSegment>,
}

/// Opens the log of a manager, or starts an empty one.
pub(super) fn open(options: &LogOptions) -> Result<Opened, Error> {
    let dir = dir_of(options);
    disk::create_private_dir(&dir)?;
    let numbers = segment::list(&dir, &*options.disk)?;
    check_numbers(&dir, &numbers)?;

    let mut replay = Replay {
        index: Index::new(options.cached_bytes_max),
        meta: Meta::default(),
        stored: Vec::new(),
    };
    let mut next_file =
        numbers.first().map(|number| read_file(options, &dir, *number)).transpose()?;
    if let Some(file) = &next_file {
        replay.start_from(&file.checkpoint);
    }
    let mut last_length = 0;
    let mut is_last_empty = false;
    let mut has_lost_tail = false;
    for number in &numbers {
        let file = next_file.take().expect("there is a file for each number");
        if *number < numbers[numbers.len() - 1] {
            next_file = Some(read_file(options, &dir, number + 1)?);
        }
        let length = match &next_file {
            Some(next) => Some(length_before(&file, &next.checkpoint)?),
            None => None,
        };
        is_last_empty = length.is_none();
        let start = file.start;
        let previous_length = file.checkpoint.previous_length;
        let is_short = (file.bytes.len() as u64) < options.segment_bytes_first;
        let (end, is_cut_off) = replay.segment(options, file, length)?;
        has_lost_tail = length.is_none() && (is_short || is_cut_off);
        is_last_empty &= end == start;
        last_length = if is_last_empty { previous_length } else { end as u64 };
    }
    replay.check_complete(&dir)?;

    // A segment that holds nothing but its checkpoint is replaced: restarts do not pile up files.
    let mut number = numbers.last().map_or(1, |last| last + 1);
    if is_last_empty {
        number -= 1;
        replay.stored.pop();
    }
    let Replay { mut index, meta, stored } = replay;
    let checkpoint =
        Checkpoint { raft_id: options.raft_id, previous_length: last_length, meta: meta.clone() };
    if has_lost_tail {
        tracing::error!(
            dir = %dir.display(),
            "the end of the Raft log is gone, which no crash does: this manager takes no part in elections until it has caught up with the leader"
        );
        lost_tail::mark(&options.dir)?;
    }
    let capacity = options.segment_bytes_first;
    let active =
        segment::create(&dir, number, &options.key, &*options.disk, capacity, &checkpoint)?;
    index.vote = meta.vote;
    index.committed = meta.committed;
    Ok(Opened { index, meta, stored, active })
}

fn check_numbers(dir: &Path, numbers: &[u64]) -> Result<(), Error> {
    for pair in numbers.windows(2) {
        if pair[1] != pair[0] + 1 {
            let path = segment::path_of(dir, pair[0] + 1);
            return Err(Error::damaged(&path, 0, "this segment is missing"));
        }
    }
    Ok(())
}

fn read_file(options: &LogOptions, dir: &Path, number: u64) -> Result<SegmentFile, Error> {
    let path = segment::path_of(dir, number);
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let (found, file_key) = read_header(SEGMENT, &options.key, &path, &bytes)?;
    if found != number {
        return Err(Error::damaged(&path, 0, format!("it is segment {found} by its header")));
    }
    let offset = HEADER_LENGTH as u64;
    let damaged = |reason: String| Error::damaged(&path, offset, reason);
    let frame =
        parse_frame(&bytes[HEADER_LENGTH..]).map_err(|reason| damaged(reason.to_owned()))?;
    let content = frame.open(&file_key, &options.key, FIRST_COUNTER, &path, offset)?;
    let records = read_records(content).map_err(|error| damaged(error.to_string()))?;
    let [Record::Checkpoint(checkpoint)] = records.as_slice() else {
        return Err(damaged("it does not start with a checkpoint".to_owned()));
    };
    if checkpoint.raft_id != options.raft_id {
        let (theirs, ours) = (checkpoint.raft_id, options.raft_id);
        return Err(damaged(format!("it is the log of manager {theirs:x}, not of {ours:x}")));
    }
    let (checkpoint, start) = (checkpoint.clone(), HEADER_LENGTH + frame.length);
    Ok(SegmentFile { path, bytes, number, file_key, checkpoint, start })
}

/// How long a segment is by what its successor remembers.
fn length_before(file: &SegmentFile, next: &Checkpoint) -> Result<usize, Error> {
    let length = usize::try_from(next.previous_length).unwrap_or(usize::MAX);
    if length < file.start || length > file.bytes.len() {
        let reason = format!("it has {} bytes where {length} belong", file.bytes.len());
        return Err(Error::damaged(&file.path, file.bytes.len() as u64, reason));
    }
    Ok(length)
}

impl Replay {
    fn start_from(&mut self, checkpoint: &Checkpoint) {
        self.meta = checkpoint.meta.clone();
        self.index.purged = checkpoint.meta.purged;
    }

    /// Reads a segment up to `length`, or to where the last one ends; gives that end, and whether a
    /// frame there runs past the end of the file.
    fn segment(
        &mut self,
        options: &LogOptions,
        file: SegmentFile,
        length: Option<usize>,
    ) -> Result<(usize, bool), Error> {
        let SegmentFile { path, bytes, number, file_key, checkpoint, start } = file;
        if checkpoint.meta != self.meta && !self.stored.is_empty() {
            let reason = "its checkpoint is not what the segments before it amount to";
            return Err(Error::damaged(&path, HEADER_LENGTH as u64, reason));
        }
        let handle = fs::File::options().read(true).write(true).open(&path);
        let handle = handle.map_err(Error::io("open", &path))?;
        let data_key = options.key.clone();
        let segment = Arc::new(Segment { number, path, file: handle, file_key, data_key });
        self.stored.push(StoredSegment { segment: Arc::clone(&segment), last_index: None });

        let limit = length.unwrap_or(bytes.len());
        let mut at = start;
        let mut last = start;
        let mut counter = FIRST_COUNTER + 1;
        while at < limit && !(length.is_none() && bytes[at..].iter().all(|byte| *byte == 0)) {
            let (path, offset) = (&segment.path, at as u64);
            let frame = match parse_frame(&bytes[at..limit]) {
                Ok(frame) => frame,
                Err(reason) if length.is_some() => {
                    return Err(Error::damaged(path, offset, reason));
                }
                Err(reason) => {
                    check_torn_tail(options, &segment, &bytes, at, reason)?;
                    settle(options, &segment, last, &bytes[last..at])?;
                    return Ok((at, is_incomplete(&bytes[at..])));
                }
            };
            let content = frame.open(&segment.file_key, &options.key, counter, path, offset)?;
            let place =
                FramePlace { segment: Arc::clone(&segment), offset, length: frame.length, counter };
            self.frame(Arc::new(place), content)?;
            last = at;
            at += frame.length;
            counter += 1;
        }
        if length.is_none() {
            settle(options, &segment, last, &bytes[last..at])?;
        }
        Ok((at, false))
    }

    fn frame(&mut self, frame: Arc<FramePlace>, content: Vec<u8>) -> Result<(), Error> {
        let damaged = |reason: String| Error::damaged(&frame.segment.path, frame.offset, reason);
        for record in read_records(content).map_err(|error| damaged(error.to_string()))? {
            match record {
                Record::Checkpoint(_) => {
                    return Err(damaged("a checkpoint stands behind the first frame".to_owned()));
                }
                Record::Entry { entry, at, length } => {
                    let place = EntryPlace { frame: Arc::clone(&frame), at, length };
                    self.entry(entry.log_id, place).map_err(damaged)?;
                }
                Record::Vote(vote) => self.meta.vote = Some(vote),
                Record::Truncate(after) => {
                    self.index.truncate(after);
                    self.meta.truncate(after);
                    StoredSegment::truncate(&mut self.stored, after);
                }
                Record::Purge(upto) => {
                    self.index.purge(upto);
                    self.meta.purge(upto);
                }
                Record::Committed(log_id) => self.meta.committed = Some(log_id),
            }
        }
        Ok(())
    }

    fn entry(&mut self, log_id: LogId, place: EntryPlace) -> Result<(), String> {
        let expected = self.meta.last.map(|last| last.index + 1);
        if expected.is_some_and(|expected| expected != log_id.index) {
            return Err(format!("entry {} stands where another belongs", log_id.index));
        }
        self.meta.last = Some(log_id);
        let stored = self.stored.last_mut().expect("the segment being read was pushed");
        stored.last_index = stored.last_index.max(Some(log_id.index));
        let is_added = self.index.push_stored(log_id, place);
        debug_assert!(is_added, "the index follows the last entry");
        Ok(())
    }

    /// Checks that no entry between the purged ones and the last is missing.
    fn check_complete(&self, dir: &Path) -> Result<(), Error> {
        let Some(last) = self.meta.last else { return Ok(()) };
        let range = self.index.range();
        let is_first_segment_there = self.stored.first().is_none_or(|s| s.segment.number == 1);
        let is_complete = match self.meta.purged {
            Some(purged) if purged.index >= last.index => true,
            Some(purged) => range.start <= purged.index + 1 && range.end == last.index + 1,
            None => is_first_segment_there && range.end == last.index + 1,
        };
        if is_complete {
            return Ok(());
        }
        let purged = self.meta.purged.map_or(0, |purged| purged.index);
        let reason = format!(
            "of the entries behind {purged} up to {} only {} to {} are there: segments are missing",
            last.index, range.start, range.end
        );
        Err(Error::damaged(dir, 0, reason))
    }
}

/// Makes the last frame durable, of which only the kernel may know: whoever wrote it was killed before its sync, or
/// the sync failed. It is written again, since a kernel whose sync failed believes that there is nothing to write.
fn settle(
    options: &LogOptions,
    segment: &Segment,
    offset: usize,
    frame: &[u8],
) -> Result<(), Error> {
    if frame.is_empty() {
        return Ok(());
    }
    let Segment { path, file, .. } = segment;
    let written = options.disk.write(file, offset as u64, frame);
    written.map_err(Error::io("write", path))?;
    options.disk.sync(file).map_err(Error::io("sync", path))
}

/// Whether what was lost is all that a crash left half written. The next segment remembers where
/// this one ends, so what follows there is never read again.
fn check_torn_tail(
    options: &LogOptions,
    segment: &Segment,
    bytes: &[u8],
    at: usize,
    reason: &'static str,
) -> Result<(), Error> {
    let path = &segment.path;
    if let Some(next) = find_frame(&bytes[at + 1..], &options.key) {
        let next = at + 1 + next;
        let reason = format!("{reason}, but a whole frame follows at offset {next}");
        return Err(Error::damaged(path, at as u64, reason));
    }
    tracing::warn!(
        file = %path.display(),
        offset = at,
        reason,
        "cut the end of the Raft log: its last write is incomplete"
    );
    Ok(())
}
