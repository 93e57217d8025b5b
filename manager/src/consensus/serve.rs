//! The receiving side: what other managers send.

use bytes::Bytes;
use openraft::raft::AppendEntriesResponse;

use super::Consensus;
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
        match request {
            RaftRequest::Append(body) => {
                let request = wire::read_append(&mut self.open(body)?)?;
                let committed = request.leader_commit;
                let answer = raft.append_entries(request).await.map_err(Refusal::stopped)?;
                if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
                    self.inner.heard.note(self.inner.metrics.borrow().last_applied >= committed);
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
                    let verdicts = self.write_all(commands).await;
                    Ok(wire::ok_answer(|bytes| wire::put_json(bytes, &verdicts)))
                }
                Proposal::Membership(change) => {
                    let verdict = self.change_here(&change).await;
                    Ok(wire::ok_answer(|bytes| wire::put_json(bytes, &verdict)))
                }
            },
            RaftRequest::ReadIndex(body) => {
                self.open(body)?;
                let answer = self.read_index_here().await;
                Ok(wire::ok_answer(|bytes| wire::put_json(bytes, &answer)))
            }
        }
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
    async fn write_all(&self, commands: Vec<Bytes>) -> Vec<CommandVerdict> {
        let deadline = Deadline::after(self.inner.timing.patience);
        let mut submitted = Vec::with_capacity(commands.len());
        for command in commands {
            submitted.push(submit(&self.inner.raft, command, None).await);
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
