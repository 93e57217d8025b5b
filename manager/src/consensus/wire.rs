//! What managers say to each other, as bytes.
//!
//! A request is `version 1 | from 8 | to 8 | body`, an answer `status 1 | body`. The receiver checks
//! that it is the one who was meant: an address may have been given to another manager meanwhile.

use std::time::Duration;

use bytes::{BufMut as _, Bytes};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderError, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use serde::{Deserialize, Serialize};
use skep_manager_core::Outcome;

use super::codec::{Malformed, Reader, put_block, put_entry_block, put_optional_log_id, put_vote};
use super::types::{Entry, LogId, SnapshotMeta, TypeConfig, Vote};

const WIRE_VERSION: u8 = 1;
const STATUS_OK: u8 = 0;
const STATUS_REFUSED: u8 = 1;
/// The sender is of an earlier epoch; the receiver's follows.
const STATUS_SUPERSEDED: u8 = 2;

/// A message for another manager. The bytes are opaque to the transport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RaftRequest {
    /// Entries, or none as a heartbeat.
    Append(Bytes),
    /// A candidate asks for a vote.
    Vote(Bytes),
    /// A manager asks whether it would get a vote.
    PreVote(Bytes),
    /// The leader transfers its leadership.
    TransferLeader(Bytes),
    /// A snapshot: its head, then its bytes in order. To be streamed; the answer comes at the end.
    Snapshot(Vec<Bytes>),
    /// Commands and membership changes for the leader.
    Propose(Bytes),
    /// Asks the leader what a linearizable read must have applied, or what the view of a write must.
    ReadIndex(Bytes),
}

impl RaftRequest {
    /// Bytes it carries.
    pub fn size(&self) -> usize {
        match self {
            Self::Append(body)
            | Self::Vote(body)
            | Self::PreVote(body)
            | Self::TransferLeader(body)
            | Self::Propose(body)
            | Self::ReadIndex(body) => body.len(),
            Self::Snapshot(pieces) => pieces.iter().map(Bytes::len).sum(),
        }
    }
}

/// Who speaks to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) from: u64,
    pub(crate) to: u64,
}

impl Route {
    pub(crate) fn start(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_u8(WIRE_VERSION);
        bytes.put_u64_le(self.from);
        bytes.put_u64_le(self.to);
        bytes
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self, Malformed> {
        match reader.u8()? {
            WIRE_VERSION => Ok(Self { from: reader.u64()?, to: reader.u64()? }),
            _ => Err(Malformed("a message of another wire version")),
        }
    }
}

/// Why a request was not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotServed {
    /// As the receiver says.
    #[error("{0}")]
    Refused(String),
    /// The swarm began anew without the sender.
    #[error("the swarm began anew, in epoch {0}")]
    Superseded(u64),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// An answer without its status.
pub(crate) fn read_answer(bytes: Bytes) -> Result<Reader, NotServed> {
    let mut reader = Reader::new(bytes, "an answer");
    match reader.u8()? {
        STATUS_OK => Ok(reader),
        STATUS_REFUSED => {
            Err(NotServed::Refused(String::from_utf8_lossy(&reader.rest()).into_owned()))
        }
        STATUS_SUPERSEDED => Err(NotServed::Superseded(reader.u64()?)),
        _ => Err(Malformed("an answer").into()),
    }
}

pub(crate) fn ok_answer(put: impl FnOnce(&mut Vec<u8>)) -> Bytes {
    let mut bytes = vec![STATUS_OK];
    put(&mut bytes);
    bytes.into()
}

pub(crate) fn refused_answer(reason: &str) -> Bytes {
    let mut bytes = vec![STATUS_REFUSED];
    bytes.extend_from_slice(reason.as_bytes());
    bytes.into()
}

pub(crate) fn superseded_answer(epoch: u64) -> Bytes {
    let mut bytes = vec![STATUS_SUPERSEDED];
    bytes.put_u64_le(epoch);
    bytes.into()
}

pub(crate) fn put_append(bytes: &mut Vec<u8>, request: &AppendEntriesRequest<TypeConfig>) {
    put_vote(bytes, &request.vote);
    put_optional_log_id(bytes, request.prev_log_id.as_ref());
    put_optional_log_id(bytes, request.leader_commit.as_ref());
    for entry in &request.entries {
        put_entry_block(bytes, entry);
    }
}

pub(crate) fn read_append(
    reader: &mut Reader,
) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
    let vote = reader.vote()?;
    let prev_log_id = reader.optional_log_id()?;
    let leader_commit = reader.optional_log_id()?;
    let mut entries: Vec<Entry> = Vec::new();
    while !reader.is_empty() {
        entries.push(Reader::new(reader.block()?, "a log entry").entry()?);
    }
    Ok(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
}

pub(crate) fn put_append_answer(bytes: &mut Vec<u8>, answer: &AppendEntriesResponse<TypeConfig>) {
    match answer {
        AppendEntriesResponse::Success => bytes.put_u8(0),
        AppendEntriesResponse::Conflict => bytes.put_u8(1),
        AppendEntriesResponse::HigherVote(vote) => {
            bytes.put_u8(2);
            put_vote(bytes, vote);
        }
        AppendEntriesResponse::PartialSuccess(log_id) => {
            bytes.put_u8(3);
            put_optional_log_id(bytes, log_id.as_ref());
        }
    }
}

pub(crate) fn read_append_answer(
    reader: &mut Reader,
) -> Result<AppendEntriesResponse<TypeConfig>, Malformed> {
    Ok(match reader.u8()? {
        0 => AppendEntriesResponse::Success,
        1 => AppendEntriesResponse::Conflict,
        2 => AppendEntriesResponse::HigherVote(reader.vote()?),
        3 => AppendEntriesResponse::PartialSuccess(reader.optional_log_id()?),
        _ => return Err(Malformed("an answer to entries")),
    })
}

pub(crate) fn put_vote_request(bytes: &mut Vec<u8>, request: &VoteRequest<TypeConfig>) {
    put_vote(bytes, &request.vote);
    bytes.put_u8(request.leadership_transfer.into());
    put_optional_log_id(bytes, request.last_log_id.as_ref());
}

pub(crate) fn read_vote_request(reader: &mut Reader) -> Result<VoteRequest<TypeConfig>, Malformed> {
    let (vote, leadership_transfer) = (reader.vote()?, reader.bool()?);
    Ok(VoteRequest { vote, leadership_transfer, last_log_id: reader.optional_log_id()? })
}

pub(crate) fn put_vote_answer(bytes: &mut Vec<u8>, answer: &VoteResponse<TypeConfig>) {
    put_vote(bytes, &answer.vote);
    bytes.put_u8(answer.vote_granted.into());
    put_optional_log_id(bytes, answer.last_log_id.as_ref());
}

pub(crate) fn read_vote_answer(reader: &mut Reader) -> Result<VoteResponse<TypeConfig>, Malformed> {
    let (vote, vote_granted) = (reader.vote()?, reader.bool()?);
    Ok(VoteResponse { vote, vote_granted, last_log_id: reader.optional_log_id()? })
}

pub(crate) fn put_transfer(bytes: &mut Vec<u8>, request: &TransferLeaderRequest<TypeConfig>) {
    put_vote(bytes, request.from_leader());
    bytes.put_u64_le(*request.to_node_id());
    put_optional_log_id(bytes, request.last_log_id());
}

pub(crate) fn read_transfer(
    reader: &mut Reader,
) -> Result<TransferLeaderRequest<TypeConfig>, Malformed> {
    let (vote, to) = (reader.vote()?, reader.u64()?);
    Ok(TransferLeaderRequest::new(vote, to, reader.optional_log_id()?))
}

pub(crate) fn put_transfer_answer(
    bytes: &mut Vec<u8>,
    answer: &TransferLeaderResponse<TypeConfig>,
) {
    match answer {
        Ok(()) => bytes.put_u8(0),
        Err(TransferLeaderError::VoteChanged { expected, actual }) => {
            bytes.put_u8(1);
            put_vote(bytes, expected);
            put_vote(bytes, actual);
        }
        Err(TransferLeaderError::LogNotFlushed { expected, actual }) => {
            bytes.put_u8(2);
            put_optional_log_id(bytes, expected.as_ref());
            put_optional_log_id(bytes, actual.as_ref());
        }
    }
}

pub(crate) fn read_transfer_answer(
    reader: &mut Reader,
) -> Result<TransferLeaderResponse<TypeConfig>, Malformed> {
    Ok(match reader.u8()? {
        0 => Ok(()),
        1 => Err(TransferLeaderError::VoteChanged {
            expected: reader.vote()?,
            actual: reader.vote()?,
        }),
        2 => Err(TransferLeaderError::LogNotFlushed {
            expected: reader.optional_log_id()?,
            actual: reader.optional_log_id()?,
        }),
        _ => return Err(Malformed("an answer to a transfer")),
    })
}

/// What comes before the bytes of a snapshot.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SnapshotHead {
    pub(crate) vote: Vote,
    pub(crate) meta: SnapshotMeta,
    /// Bytes that follow.
    pub(crate) length: u64,
}

impl SnapshotHead {
    pub(crate) fn put(&self, bytes: &mut Vec<u8>) {
        put_vote(bytes, &self.vote);
        bytes.put_u64_le(self.length);
        let meta = serde_json::to_vec(&self.meta).expect("a snapshot's meta has no failing parts");
        bytes.extend_from_slice(&meta);
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self, Malformed> {
        let (vote, length) = (reader.vote()?, reader.u64()?);
        let meta = serde_json::from_slice(&reader.rest());
        Ok(Self { vote, length, meta: meta.map_err(|_| Malformed("a snapshot's head"))? })
    }
}

/// No leader has this term.
const ANY_TERM: u64 = 0;

/// What a follower asks of the leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Proposal {
    /// Commands, in order, each as its JSON.
    Commands(Vec<Bytes>),
    /// Commands, in order, each with the term that it is to be written in, if in one alone.
    CommandsOf(Vec<(Option<u64>, Bytes)>),
    /// A membership change.
    Membership(MembershipChange),
}

/// A change of the set of managers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MembershipChange {
    /// Adds a manager, or changes its address.
    Add { raft_id: u64, addr: String, patience: Duration },
    /// Removes a manager.
    Remove { raft_id: u64, patience: Duration },
    /// Asks whether a manager could be removed; changes nothing.
    MayRemove { raft_id: u64, patience: Duration },
}

impl Proposal {
    pub(crate) fn put(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Commands(commands) => {
                bytes.put_u8(0);
                for command in commands {
                    put_block(bytes, command);
                }
            }
            Self::Membership(change) => {
                bytes.put_u8(1);
                put_json(bytes, change);
            }
            Self::CommandsOf(commands) => {
                bytes.put_u8(2);
                for (term, command) in commands {
                    bytes.put_u64_le(term.unwrap_or(ANY_TERM));
                    put_block(bytes, command);
                }
            }
        }
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self, Malformed> {
        match reader.u8()? {
            0 => {
                let mut commands = Vec::new();
                while !reader.is_empty() {
                    commands.push(reader.block()?);
                }
                Ok(Self::Commands(commands))
            }
            1 => read_json(&reader.rest()).map(Self::Membership),
            2 => {
                let mut commands = Vec::new();
                while !reader.is_empty() {
                    let term = Some(reader.u64()?).filter(|term| *term != ANY_TERM);
                    commands.push((term, reader.block()?));
                }
                Ok(Self::CommandsOf(commands))
            }
            _ => Err(Malformed("a proposal")),
        }
    }
}

/// What became of a forwarded command or change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verdict<T> {
    /// It was done.
    Done(T),
    /// It was surely not done and never will be: may be tried elsewhere.
    NotTaken,
    /// It was taken, and may still be done.
    Unknown,
    /// It was refused for good.
    Refused(String),
}

pub(crate) type CommandVerdict = Verdict<Outcome>;

pub(crate) fn put_json(bytes: &mut Vec<u8>, document: &impl Serialize) {
    serde_json::to_writer(bytes, document).expect("wire documents have no failing parts");
}

pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, Malformed> {
    serde_json::from_slice(bytes).map_err(|_| Malformed("a JSON document"))
}

/// The answer to [`RaftRequest::ReadIndex`]: what to wait for, or none: not the leader.
pub(crate) type ReadIndexAnswer = Option<LogId>;

/// Follows a [`Route`] where the view of a write is asked for. Leaders of before do not read it, and answer as to a
/// read.
const VIEW_TO_WRITE: u8 = 1;

/// Asks for the view of a write.
pub(crate) fn put_view_request(bytes: &mut Vec<u8>) {
    bytes.put_u8(VIEW_TO_WRITE);
}

/// Whether that is asked for.
pub(crate) fn is_view_request(reader: &mut Reader) -> bool {
    reader.u8().is_ok_and(|what| what == VIEW_TO_WRITE)
}

/// What the view of a write must have applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WriteIndex {
    pub(crate) applied: LogId,
    /// The only term to write in, since nobody has confirmed yet that its leader leads; none: somebody has.
    pub(crate) term: Option<u64>,
}

/// The answer where a view is asked for; none: not the leader.
pub(crate) type WriteIndexAnswer = Option<WriteIndex>;

/// Reads it, also as a leader of before gives it.
pub(crate) fn read_write_index(bytes: &[u8]) -> Result<WriteIndexAnswer, Malformed> {
    let confirmed =
        |answer: ReadIndexAnswer| answer.map(|applied| WriteIndex { applied, term: None });
    read_json(bytes).or_else(|_| read_json(bytes).map(confirmed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::types::{Payload, log_id};
    use openraft::EntryPayload;

    fn reader(put: impl FnOnce(&mut Vec<u8>)) -> Reader {
        let mut bytes = Vec::new();
        put(&mut bytes);
        Reader::new(bytes.into(), "test")
    }

    #[test]
    fn requests_and_answers_read_back_as_written() {
        let vote = Vote::new_committed(3, 7);
        let payload = EntryPayload::Normal(Payload(Bytes::from_static(b"{}")));
        let entries = vec![
            Entry { log_id: log_id(3, 5), payload },
            Entry { log_id: log_id(3, 6), payload: EntryPayload::Blank },
        ];
        let (prev_log_id, leader_commit) = (Some(log_id(2, 4)), None);
        let append = AppendEntriesRequest { vote, prev_log_id, entries, leader_commit };
        let read = read_append(&mut reader(|bytes| put_append(bytes, &append))).unwrap();
        assert_eq!((read.vote, read.prev_log_id, read.leader_commit), (vote, prev_log_id, None));
        assert_eq!(read.entries, append.entries);

        for answer in [
            AppendEntriesResponse::Success,
            AppendEntriesResponse::Conflict,
            AppendEntriesResponse::HigherVote(vote),
            AppendEntriesResponse::PartialSuccess(prev_log_id),
        ] {
            let mut reader = reader(|bytes| put_append_answer(bytes, &answer));
            assert_eq!(read_append_answer(&mut reader).unwrap(), answer);
        }

        let request = VoteRequest { vote, last_log_id: prev_log_id, leadership_transfer: true };
        let mut bytes = reader(|bytes| put_vote_request(bytes, &request));
        assert_eq!(read_vote_request(&mut bytes).unwrap(), request);
        let answer = VoteResponse::new(vote, prev_log_id, true);
        let mut bytes = reader(|bytes| put_vote_answer(bytes, &answer));
        assert_eq!(read_vote_answer(&mut bytes).unwrap(), answer);

        let transfer = TransferLeaderRequest::new(vote, 9, prev_log_id);
        let mut bytes = reader(|bytes| put_transfer(bytes, &transfer));
        assert_eq!(read_transfer(&mut bytes).unwrap(), transfer);
        for answer in [
            Ok(()),
            Err(TransferLeaderError::VoteChanged { expected: vote, actual: Vote::new(4, 1) }),
            Err(TransferLeaderError::LogNotFlushed { expected: prev_log_id, actual: None }),
        ] {
            let mut bytes = reader(|bytes| put_transfer_answer(bytes, &answer));
            assert_eq!(read_transfer_answer(&mut bytes).unwrap(), answer);
        }
    }

    #[test]
    fn leaders_of_before_answer_for_a_view_as_for_a_read() {
        let index = WriteIndex { applied: log_id(3, 5), term: Some(3) };
        let bytes = |put: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = Vec::new();
            put(&mut bytes);
            bytes
        };
        let confirmed = WriteIndex { term: None, ..index };
        for (name, answer, expect) in [
            ("a leader", bytes(&|bytes| put_json(bytes, &Some(index))), Some(index)),
            (
                "one of before",
                bytes(&|bytes| put_json(bytes, &Some(log_id(3, 5)))),
                Some(confirmed),
            ),
            ("none", bytes(&|bytes| put_json(bytes, &ReadIndexAnswer::None)), None),
        ] {
            assert_eq!(read_write_index(&answer).unwrap(), expect, "{name}");
        }
        let route = Route { from: 1, to: 2 };
        let asks = |request: Vec<u8>| {
            let mut reader = Reader::new(request.into(), "test");
            assert_eq!(Route::read(&mut reader).unwrap(), route);
            is_view_request(&mut reader)
        };
        let mut for_view = route.start();
        put_view_request(&mut for_view);
        assert_eq!((asks(for_view), asks(route.start())), (true, false));
    }

    #[test]
    fn proposals_heads_and_routes_read_back_as_written() {
        let patience = Duration::from_secs(1);
        for proposal in [
            Proposal::Commands(vec![Bytes::from_static(b"a"), Bytes::from_static(b"")]),
            Proposal::CommandsOf(vec![
                (Some(7), Bytes::from_static(b"a")),
                (None, Bytes::from_static(b"")),
            ]),
            Proposal::Membership(MembershipChange::Add {
                raft_id: 1,
                addr: "a:1".into(),
                patience,
            }),
            Proposal::Membership(MembershipChange::Remove { raft_id: 1, patience }),
            Proposal::Membership(MembershipChange::MayRemove { raft_id: 1, patience }),
        ] {
            let mut bytes = reader(|bytes| proposal.put(bytes));
            assert_eq!(Proposal::read(&mut bytes).unwrap(), proposal);
        }
        let meta = SnapshotMeta { last_log_id: Some(log_id(1, 2)), ..SnapshotMeta::default() };
        let head = SnapshotHead { vote: Vote::new(1, 2), meta, length: 5 };
        let mut bytes = reader(|bytes| head.put(bytes));
        assert_eq!(SnapshotHead::read(&mut bytes).unwrap(), head);

        let route = Route { from: 1, to: 2 };
        let mut newer = route.start();
        let mut bytes = Reader::new(newer.clone().into(), "test");
        assert_eq!(Route::read(&mut bytes).unwrap(), route);
        newer[0] = 9;
        assert!(Route::read(&mut Reader::new(newer.into(), "test")).is_err());
    }
}
