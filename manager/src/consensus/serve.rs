//! The receiving side: what other managers send.

use bytes::Bytes;
use openraft::raft::AppendEntriesResponse;

use super::Consensus;
use super::anew::epoch;
use super::codec::{Malformed, Reader};
use super::deadline::Deadline;
use super::propose::{submit, verdict_of, wait_written};
use super::snapshot::SnapshotData;
use super::wire::{self, CommandVerdict, Proposal, RaftRequest, Route, SnapshotHead};

/// Why a request was not served. The sender gets the text.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("this is manager {own:x}, not {meant:x}")]
    Misaddressed { own: u64, meant: u64 },
    #[error("this manager lost the end of its log, and does not vote before it has caught up")]
    LostTail,
    #[error("Raft does not run here: {0}")]
    Stopped(String),
    /// The sender was a manager before the swarm began anew.
    #[error("the swarm began anew, in epoch {0}")]
    Superseded(u64),
}

impl Refusal {
    fn stopped(error: impl ToString) -> Self {
        Self::Stopped(error.to_string())
    }
}

impl Consensus {
    /// Serves a request of another manager. The answer goes back as it is; refusals are part of it.
    ///
    /// The transport has made sure that the sender is a manager of this swarm.
    pub async fn handle(&self, request: RaftRequest) -> Bytes {
        match self.serve(request).await {
            Ok(answer) => answer,
            Err(Refusal::Superseded(epoch)) => wire::superseded_answer(epoch),
            Err(refusal) => wire::refused_answer(&refusal.to_string()),
        }
    }

    async fn serve(&self, request: RaftRequest) -> Result<Bytes, Refusal> {
        let raft = &self.inner.raft;
        let is_of_election = matches!(
            request,
            RaftRequest::Vote(_) | RaftRequest::PreVote(_) | RaftRequest::TransferLeader(_)
        );
        if is_of_election && self.inner.lost_tail.is_set() {
            return Err(Refusal::LostTail);
        }
        self.check_epoch(&request)?;
        match request {
            RaftRequest::Append(body) => {
                let request = wire::read_append(&mut self.open(body)?)?;
                let (term, committed) = (request.vote.leader_id.term, request.leader_commit);
                let answer = raft.append_entries(request).await.map_err(Refusal::stopped)?;
                if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
                    // Who was just elected does not know how far entries are committed until one of its own term is.
                    let is_known = committed.is_some_and(|id| id.leader_id.term == term);
                    let has_all = self.inner.metrics.borrow().last_applied >= committed;
                    self.inner.heard.note(is_known && has_all);
                }
                Ok(wire::ok_answer(|bytes| wire::put_append_answer(bytes, &answer)))
            }
            RaftRequest::Vote(body) => {
                let request = wire::read_vote_request(&mut self.open(body)?)?;
                let answer = raft.vote(request).await.map_err(Refusal::stopped)?;
                Ok(wire::ok_answer(|bytes| wire::put_vote_answer(bytes, &answer)))
            }
            RaftRequest::PreVote(body) => {
                let request = wire::read_vote_request(&mut self.open(body)?)?;
                let answer = raft.pre_vote(request).await.map_err(Refusal::stopped)?;
                Ok(wire::ok_answer(|bytes| wire::put_vote_answer(bytes, &answer)))
            }
            RaftRequest::TransferLeader(body) => {
                let request = wire::read_transfer(&mut self.open(body)?)?;
                let answer =
                    raft.handle_transfer_leader(request).await.map_err(Refusal::stopped)?;
                Ok(wire::ok_answer(|bytes| wire::put_transfer_answer(bytes, &answer)))
            }
            RaftRequest::Snapshot(pieces) => self.serve_snapshot(pieces).await,
            RaftRequest::Propose(body) => match Proposal::read(&mut self.open(body)?)? {
                Proposal::Commands(commands) => {
                    let commands = commands.into_iter().map(|command| (None, command)).collect();
                    let verdicts = self.write_all(commands).await;
                    Ok(wire::ok_answer(|bytes| wire::put_json(bytes, &verdicts)))
                }
                Proposal::CommandsOf(commands) => {
                    let verdicts = self.write_all(commands).await;
                    Ok(wire::ok_answer(|bytes| wire::put_json(bytes, &verdicts)))
                }
                Proposal::Membership(change) => {
                    let verdict = self.change_here(&change).await;
                    Ok(wire::ok_answer(|bytes| wire::put_json(bytes, &verdict)))
                }
            },
            RaftRequest::ReadIndex(body) => {
                if wire::is_view_request(&mut self.open(body)?) {
                    let answer = self.write_index_here();
                    return Ok(wire::ok_answer(|bytes| wire::put_json(bytes, &answer)));
                }
                let answer = self.read_index_here().await;
                Ok(wire::ok_answer(|bytes| wire::put_json(bytes, &answer)))
            }
        }
    }

    /// Refuses who was a manager before the swarm began anew, whomever it means: of those that tell their term,
    /// so all that lead or want to.
    fn check_epoch(&self, request: &RaftRequest) -> Result<(), Refusal> {
        let (RaftRequest::Append(body) | RaftRequest::Vote(body) | RaftRequest::PreVote(body)) =
            request
        else {
            return Ok(());
        };
        let mut reader = Reader::new(body.clone(), "a request");
        Route::read(&mut reader)?;
        let theirs = epoch(reader.vote()?.leader_id.term);
        let own = epoch(self.inner.metrics.borrow().current_term);
        if theirs < own { Err(Refusal::Superseded(own)) } else { Ok(()) }
    }

    /// Checks whom a request is meant for.
    fn open(&self, body: Bytes) -> Result<Reader, Refusal> {
        let mut reader = Reader::new(body, "a request");
        let route = Route::read(&mut reader)?;
        if route.to != self.inner.raft_id {
            return Err(Refusal::Misaddressed { own: self.inner.raft_id, meant: route.to });
        }
        Ok(reader)
    }

    async fn serve_snapshot(&self, pieces: Vec<Bytes>) -> Result<Bytes, Refusal> {
        let mut pieces = pieces.into_iter();
        let head = pieces.next().ok_or(Malformed("a snapshot"))?;
        let head = SnapshotHead::read(&mut self.open(head)?)?;
        let length = usize::try_from(head.length).map_err(|_| Malformed("a snapshot"))?;
        let mut data =
            Vec::with_capacity(length.min(pieces.as_slice().iter().map(Bytes::len).sum()));
        for piece in pieces {
            data.extend_from_slice(&piece);
        }
        if data.len() != length {
            return Err(Malformed("a snapshot").into());
        }
        let snapshot = openraft::Snapshot { meta: head.meta, snapshot: SnapshotData(data.into()) };
        let installed = self.inner.raft.install_full_snapshot(head.vote, snapshot).await;
        let answer = installed.map_err(Refusal::stopped)?;
        Ok(wire::ok_answer(|bytes| super::codec::put_vote(bytes, &answer.vote)))
    }

    /// Writes forwarded commands: all are handed to Raft before the first is waited for.
    async fn write_all(&self, commands: Vec<(Option<u64>, Bytes)>) -> Vec<CommandVerdict> {
        let deadline = Deadline::after(self.inner.timing.patience);
        let mut submitted = Vec::with_capacity(commands.len());
        for (term, command) in commands {
            submitted.push(submit(&self.inner.raft, command, term).await);
        }
        let mut verdicts = Vec::with_capacity(submitted.len());
        for written in submitted {
            verdicts.push(verdict_of(match written {
                Ok(written) => wait_written(written, &deadline).await,
                Err(attempt) => attempt,
            }));
        }
        verdicts
    }
}
