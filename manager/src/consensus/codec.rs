//! The byte forms of log ids, votes and entries, on disk and between managers.
//!
//! They are ours, little-endian and fixed, so that neither an upgrade of openraft nor of serde
//! changes what was stored. Golden bytes in the tests hold them.

use bytes::{Buf as _, BufMut as _, Bytes};
use openraft::EntryPayload;

use super::types::{Entry, LogId, Membership, Payload, Vote, log_id};

/// Bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is cut short or malformed")]
pub(crate) struct Malformed(pub(crate) &'static str);

const ENTRY_BLANK: u8 = 0;
const ENTRY_COMMAND: u8 = 1;
const ENTRY_MEMBERSHIP: u8 = 2;

/// Reads fields off the front of bytes without copying them.
#[derive(Debug)]
pub(crate) struct Reader {
    bytes: Bytes,
    what: &'static str,
}

impl Reader {
    /// `what` names the bytes in errors.
    pub(crate) fn new(bytes: Bytes, what: &'static str) -> Self {
        Self { bytes, what }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.bytes.try_get_u8().map_err(|_| Malformed(self.what))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.bytes.try_get_u32_le().map_err(|_| Malformed(self.what))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.bytes.try_get_u64_le().map_err(|_| Malformed(self.what))
    }

    pub(crate) fn bool(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed(self.what)),
        }
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<Bytes, Malformed> {
        if self.bytes.len() < length {
            return Err(Malformed(self.what));
        }
        Ok(self.bytes.split_to(length))
    }

    /// Bytes behind their length.
    pub(crate) fn block(&mut self) -> Result<Bytes, Malformed> {
        let length = self.u32()? as usize;
        self.take(length)
    }

    pub(crate) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes)
    }

    pub(crate) fn log_id(&mut self) -> Result<LogId, Malformed> {
        Ok(log_id(self.u64()?, self.u64()?))
    }

    pub(crate) fn optional_log_id(&mut self) -> Result<Option<LogId>, Malformed> {
        if self.bool()? { self.log_id().map(Some) } else { Ok(None) }
    }

    pub(crate) fn vote(&mut self) -> Result<Vote, Malformed> {
        let (term, node_id) = (self.u64()?, self.u64()?);
        let committed = self.bool()?;
        Ok(if committed { Vote::new_committed(term, node_id) } else { Vote::new(term, node_id) })
    }

    /// An entry that fills the rest.
    pub(crate) fn entry(&mut self) -> Result<Entry, Malformed> {
        let log_id = self.log_id()?;
        let kind = self.u8()?;
        let body = self.rest();
        let payload = match kind {
            ENTRY_BLANK if body.is_empty() => EntryPayload::Blank,
            ENTRY_COMMAND => EntryPayload::Normal(Payload(body)),
            ENTRY_MEMBERSHIP => EntryPayload::Membership(membership(&body)?),
            _ => return Err(Malformed("a log entry")),
        };
        Ok(Entry { log_id, payload })
    }
}

fn membership(json: &[u8]) -> Result<Membership, Malformed> {
    serde_json::from_slice(json).map_err(|_| Malformed("a membership"))
}

pub(crate) fn put_log_id(bytes: &mut Vec<u8>, log_id: &LogId) {
    bytes.put_u64_le(log_id.leader_id.term);
    bytes.put_u64_le(log_id.index);
}

pub(crate) fn put_optional_log_id(bytes: &mut Vec<u8>, log_id: Option<&LogId>) {
    bytes.put_u8(log_id.is_some().into());
    if let Some(log_id) = log_id {
        put_log_id(bytes, log_id);
    }
}

pub(crate) fn put_vote(bytes: &mut Vec<u8>, vote: &Vote) {
    bytes.put_u64_le(vote.leader_id.term);
    bytes.put_u64_le(vote.leader_id.voted_for);
    bytes.put_u8(vote.committed.into());
}

/// Appends `body` behind its length.
pub(crate) fn put_block(bytes: &mut Vec<u8>, body: &[u8]) {
    put_length(bytes, body.len());
    bytes.extend_from_slice(body);
}

/// Appends an entry behind its length.
pub(crate) fn put_entry_block(bytes: &mut Vec<u8>, entry: &Entry) {
    let start = bytes.len();
    bytes.put_u32_le(0);
    put_entry(bytes, entry);
    let length = length_u32(bytes.len() - start - 4);
    bytes[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

fn put_entry(bytes: &mut Vec<u8>, entry: &Entry) {
    put_log_id(bytes, &entry.log_id);
    match &entry.payload {
        EntryPayload::Blank => bytes.put_u8(ENTRY_BLANK),
        EntryPayload::Normal(Payload(command)) => {
            bytes.put_u8(ENTRY_COMMAND);
            bytes.extend_from_slice(command);
        }
        EntryPayload::Membership(membership) => {
            bytes.put_u8(ENTRY_MEMBERSHIP);
            serde_json::to_writer(bytes, membership).expect("a membership has no failing parts");
        }
    }
}

/// Bytes that an entry takes, about.
pub(crate) fn entry_size(entry: &Entry) -> usize {
    const OVERHEAD: usize = 64; // Ids and what holds them in memory.
    match &entry.payload {
        EntryPayload::Blank => OVERHEAD,
        EntryPayload::Normal(Payload(command)) => OVERHEAD + command.len(),
        EntryPayload::Membership(_) => OVERHEAD + 256,
    }
}

fn put_length(bytes: &mut Vec<u8>, length: usize) {
    bytes.put_u32_le(length_u32(length));
}

fn length_u32(length: usize) -> u32 {
    u32::try_from(length).expect("commands are far below 4 GiB: see COMMAND_BYTES_MAX")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn entry(payload: EntryPayload<Payload, u64, openraft::BasicNode>) -> Entry {
        Entry { log_id: log_id(2, 258), payload }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn stored_forms_keep_their_golden_bytes() {
        let mut bytes = Vec::new();
        put_entry_block(&mut bytes, &entry(EntryPayload::Blank));
        assert_eq!(hex(&bytes), "110000000200000000000000020100000000000000");

        bytes.clear();
        put_entry_block(
            &mut bytes,
            &entry(EntryPayload::Normal(Payload(Bytes::from_static(b"{}")))),
        );
        assert_eq!(hex(&bytes), "1300000002000000000000000201000000000000017b7d");

        bytes.clear();
        put_vote(&mut bytes, &Vote::new_committed(3, 7));
        assert_eq!(hex(&bytes), "0300000000000000070000000000000001");

        bytes.clear();
        put_optional_log_id(&mut bytes, Some(&log_id(1, 2)));
        put_optional_log_id(&mut bytes, None);
        assert_eq!(hex(&bytes), "010100000000000000020000000000000000");

        let node = openraft::BasicNode::new("10.0.0.1:2377");
        let membership = Membership::new_with_defaults(vec![BTreeSet::from([7])], [7]);
        let json = serde_json::to_string(&membership).unwrap();
        assert_eq!(json, r#"{"configs":[[7]],"nodes":{"7":{"addr":"localhost"}}}"#);
        assert_eq!(serde_json::to_string(&node).unwrap(), r#"{"addr":"10.0.0.1:2377"}"#);
    }

    #[test]
    fn entries_and_votes_read_back_as_written() {
        let membership = Membership::new_with_defaults(vec![BTreeSet::from([1, 2])], [3]);
        for payload in [
            EntryPayload::Blank,
            EntryPayload::Normal(Payload(Bytes::from_static(b"x"))),
            EntryPayload::Membership(membership),
        ] {
            let entry = entry(payload);
            let mut bytes = Vec::new();
            put_entry_block(&mut bytes, &entry);
            let mut reader = Reader::new(bytes.into(), "test");
            let block = reader.block().unwrap();
            assert!(reader.is_empty());
            assert_eq!(Reader::new(block.clone(), "test").entry().unwrap(), entry);
            assert_eq!(Reader::new(block.slice(..9), "test").entry(), Err(Malformed("test")));
        }
        for vote in [Vote::new(4, 5), Vote::new_committed(4, 5)] {
            let mut bytes = Vec::new();
            put_vote(&mut bytes, &vote);
            assert_eq!(Reader::new(bytes.into(), "test").vote().unwrap(), vote);
        }
    }
}
