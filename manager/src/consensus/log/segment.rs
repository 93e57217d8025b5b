//! One file of the log.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::consensus::codec::Reader;
use crate::consensus::disk::{Disk, Error};
use crate::consensus::frame::{
    FIRST_COUNTER, FRAME_OVERHEAD, FileKind, HEADER_LENGTH, new_header, parse_frame, put_frame,
};
use crate::consensus::seal::{DataKey, FileKey};
use crate::consensus::types::Entry;

use super::record::{Checkpoint, RecordWriter};

pub(super) const SEGMENT: FileKind =
    FileKind { magic: b"skep-log", purpose: "skep raft log segment" };
const EXTENSION: &str = "segment";
const TEMPORARY_EXTENSION: &str = "new";

/// A segment that can be read, also when its name is gone already.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) file_key: FileKey,
    pub(super) data_key: DataKey,
}

/// Where a frame is.
#[derive(Debug)]
pub(super) struct FramePlace {
    pub(super) segment: Arc<Segment>,
    pub(super) offset: u64,
    pub(super) length: usize,
    pub(super) counter: u64,
}

/// Where an entry is.
#[derive(Debug, Clone)]
pub(super) struct EntryPlace {
    pub(super) frame: Arc<FramePlace>,
    /// Where in the frame's content.
    pub(super) at: u32,
    pub(super) length: u32,
}

impl FramePlace {
    /// Reads and opens the frame.
    pub(super) fn read(&self) -> Result<Bytes, Error> {
        let Segment { path, file, file_key, data_key, .. } = &*self.segment;
        let mut bytes = vec![0; self.length];
        file.read_exact_at(&mut bytes, self.offset).map_err(Error::io("read", path))?;
        let frame =
            parse_frame(&bytes).map_err(|reason| Error::damaged(path, self.offset, reason))?;
        frame.open(file_key, data_key, self.counter, path, self.offset).map(Bytes::from)
    }
}

impl EntryPlace {
    /// Takes the entry out of its frame's content.
    pub(super) fn entry(&self, content: &Bytes) -> Result<Entry, Error> {
        let (from, to) = (self.at as usize, self.at as usize + self.length as usize);
        let entry = Reader::new(content.slice(from..to), "a log entry").entry();
        let FramePlace { segment, offset, .. } = &*self.frame;
        entry.map_err(|error| Error::damaged(&segment.path, *offset, error.to_string()))
    }
}

/// A new segment, ready for its second frame.
#[derive(Debug)]
pub(super) struct NewSegment {
    pub(super) segment: Arc<Segment>,
    /// Where the next frame goes.
    pub(super) offset: u64,
    /// The next frame's counter.
    pub(super) counter: u64,
    /// Bytes reserved.
    pub(super) capacity: u64,
}

/// Creates a segment whose first frame is `checkpoint`, and makes it durable under its name.
///
/// A segment of that number is replaced: one that holds nothing but its checkpoint.
pub(super) fn create(
    dir: &Path,
    number: u64,
    data_key: &DataKey,
    disk: &dyn Disk,
    capacity: u64,
    checkpoint: &Checkpoint,
) -> Result<NewSegment, Error> {
    let path = path_of(dir, number);
    let temporary = path.with_extension(TEMPORARY_EXTENSION);
    let file = disk.create(&temporary).map_err(Error::io("create", &temporary))?;
    disk.reserve(&file, capacity).map_err(Error::io("reserve space for", &temporary))?;

    let (mut bytes, file_key) = new_header(SEGMENT, data_key, number);
    let mut content = RecordWriter::default();
    content.checkpoint(checkpoint);
    put_frame(&mut bytes, &file_key, data_key.id(), FIRST_COUNTER, &content.bytes);
    disk.write(&file, 0, &bytes).map_err(Error::io("write", &temporary))?;
    // All of it, with the reserved size: later syncs need not touch the inode.
    disk.sync_all(&file).map_err(Error::io("sync", &temporary))?;
    disk.rename(&temporary, &path).map_err(Error::io("rename", &temporary))?;
    disk.sync_dir(dir).map_err(Error::io("sync", dir))?;

    debug_assert_eq!(bytes.len(), HEADER_LENGTH + FRAME_OVERHEAD + content.bytes.len());
    let segment = Segment { number, path, file, file_key, data_key: data_key.clone() };
    Ok(NewSegment {
        segment: Arc::new(segment),
        offset: bytes.len() as u64,
        counter: FIRST_COUNTER + 1,
        capacity,
    })
}

/// Numbers of the segments in a directory, ascending. Unfinished ones are removed.
pub(super) fn list(dir: &Path, disk: &dyn Disk) -> Result<Vec<u64>, Error> {
    let mut numbers = Vec::new();
    let entries = fs::read_dir(dir).map_err(Error::io("list", dir))?;
    for entry in entries {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if path.extension().is_some_and(|extension| extension == TEMPORARY_EXTENSION) {
            disk.remove(&path).map_err(Error::io("remove", &path))?;
        } else if path.extension().is_some_and(|extension| extension == EXTENSION) {
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            let number = stem.and_then(|stem| stem.parse().ok());
            numbers.push(number.ok_or_else(|| {
                Error::damaged(&path, 0, "its name is not that of a log segment")
            })?);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The file of segment `number`.
pub(super) fn path_of(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:020}.{EXTENSION}"))
}
