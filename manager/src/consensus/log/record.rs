//! What a frame of the log holds: records, each `kind 1 | length 4 | body`.

use bytes::{BufMut as _, Bytes};

use crate::consensus::codec::{
    Malformed, Reader, put_block, put_entry_block, put_log_id, put_optional_log_id, put_vote,
};
use crate::consensus::types::{Entry, LogId, Vote};

const KIND_CHECKPOINT: u8 = 1;
const KIND_ENTRY: u8 = 2;
const KIND_VOTE: u8 = 3;
const KIND_TRUNCATE: u8 = 4;
const KIND_PURGE: u8 = 5;
const KIND_COMMITTED: u8 = 6;

/// Kind and length in front of a body.
const RECORD_HEAD_LENGTH: usize = 5;

/// What the log holds besides entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    /// Entries up to here are gone.
    pub(super) purged: Option<LogId>,
    /// The last entry, or what was purged when there is none.
    pub(super) last: Option<LogId>,
}

impl Meta {
    pub(super) fn truncate(&mut self, after: Option<LogId>) {
        self.last = after.or(self.purged);
    }

    pub(super) fn purge(&mut self, upto: LogId) {
        self.purged = self.purged.max(Some(upto));
        if self.last.is_none_or(|last| last.index <= upto.index) {
            self.last = Some(upto);
        }
    }
}

/// The first record of each segment: what all segments before it amount to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Checkpoint {
    /// The manager whose log it is.
    pub(super) raft_id: u64,
    /// Valid bytes of the segment before.
    pub(super) previous_length: u64,
    pub(super) meta: Meta,
}

/// One record as read back.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Record {
    Checkpoint(Checkpoint),
    /// An entry, and where its bytes are in the frame.
    Entry {
        entry: Entry,
        at: u32,
        length: u32,
    },
    Vote(Vote),
    /// Entries behind this one are gone; all are when there is none.
    Truncate(Option<LogId>),
    /// Entries up to this one are gone.
    Purge(LogId),
    Committed(LogId),
}

/// Builds the content of a frame.
#[derive(Debug, Default)]
pub(super) struct RecordWriter {
    pub(super) bytes: Vec<u8>,
}

impl RecordWriter {
    pub(super) fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        let Checkpoint { raft_id, previous_length, meta } = checkpoint;
        let mut body = Vec::new();
        body.put_u64_le(*raft_id);
        body.put_u64_le(*previous_length);
        body.put_u8(meta.vote.is_some().into());
        if let Some(vote) = &meta.vote {
            put_vote(&mut body, vote);
        }
        put_optional_log_id(&mut body, meta.committed.as_ref());
        put_optional_log_id(&mut body, meta.purged.as_ref());
        put_optional_log_id(&mut body, meta.last.as_ref());
        self.put(KIND_CHECKPOINT, &body);
    }

    /// Appends an entry; gives where its bytes are.
    pub(super) fn entry(&mut self, entry: &Entry) -> (u32, u32) {
        let at = self.bytes.len() + RECORD_HEAD_LENGTH;
        self.bytes.put_u8(KIND_ENTRY);
        put_entry_block(&mut self.bytes, entry);
        (to_u32(at), to_u32(self.bytes.len() - at))
    }

    pub(super) fn vote(&mut self, vote: &Vote) {
        let mut body = Vec::new();
        put_vote(&mut body, vote);
        self.put(KIND_VOTE, &body);
    }

    pub(super) fn truncate(&mut self, after: Option<&LogId>) {
        let mut body = Vec::new();
        put_optional_log_id(&mut body, after);
        self.put(KIND_TRUNCATE, &body);
    }

    pub(super) fn purge(&mut self, upto: &LogId) {
        self.log_id(KIND_PURGE, upto);
    }

    pub(super) fn committed(&mut self, log_id: &LogId) {
        self.log_id(KIND_COMMITTED, log_id);
    }

    fn log_id(&mut self, kind: u8, log_id: &LogId) {
        let mut body = Vec::new();
        put_log_id(&mut body, log_id);
        self.put(kind, &body);
    }

    fn put(&mut self, kind: u8, body: &[u8]) {
        self.bytes.put_u8(kind);
        put_block(&mut self.bytes, body);
    }
}

/// Reads all records of a frame's content.
pub(super) fn read_records(content: Vec<u8>) -> Result<Vec<Record>, Malformed> {
    let mut at = 0;
    let mut reader = Reader::new(content.into(), "a log record");
    let mut records = Vec::new();
    while !reader.is_empty() {
        let kind = reader.u8()?;
        let body = reader.block()?;
        at += RECORD_HEAD_LENGTH;
        let length = body.len();
        records.push(read_record(kind, body, at)?);
        at += length;
    }
    Ok(records)
}

fn read_record(kind: u8, body: Bytes, at: usize) -> Result<Record, Malformed> {
    let length = to_u32(body.len());
    let mut reader = Reader::new(body, "a log record");
    let record = match kind {
        KIND_CHECKPOINT => Record::Checkpoint(read_checkpoint(&mut reader)?),
        KIND_ENTRY => Record::Entry { entry: reader.entry()?, at: to_u32(at), length },
        KIND_VOTE => Record::Vote(reader.vote()?),
        KIND_TRUNCATE => Record::Truncate(reader.optional_log_id()?),
        KIND_PURGE => Record::Purge(reader.log_id()?),
        KIND_COMMITTED => Record::Committed(reader.log_id()?),
        _ => return Err(Malformed("a log record of unknown kind")),
    };
    if reader.is_empty() { Ok(record) } else { Err(Malformed("a log record")) }
}

fn read_checkpoint(reader: &mut Reader) -> Result<Checkpoint, Malformed> {
    let (raft_id, previous_length) = (reader.u64()?, reader.u64()?);
    let vote = if reader.bool()? { Some(reader.vote()?) } else { None };
    let committed = reader.optional_log_id()?;
    let purged = reader.optional_log_id()?;
    let last = reader.optional_log_id()?;
    Ok(Checkpoint { raft_id, previous_length, meta: Meta { vote, committed, purged, last } })
}

fn to_u32(length: usize) -> u32 {
    u32::try_from(length).expect("a frame is far below 4 GiB")
}
