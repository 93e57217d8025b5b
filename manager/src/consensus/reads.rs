//! Linearizable reads share their rounds.
//!
//! What a read must have applied is found by a round: the leader asks a majority whether it still leads. While
//! one round is under way, all reads that arrive wait for the next: it begins after them, so that it holds all
//! that was acknowledged before any of them. There is no timer; a lone read waits for nobody.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::{Raft, ReadPolicy};
use skep_common::mistakes::{self, Mistake};
use skep_manager_core::State;
use tokio::sync::{mpsc, oneshot, watch};

use super::Consensus;
use super::deadline::Deadline;
use super::handle::ReadError;
use super::leadership::{Leader, Leadership};
use super::machine::Machine;
use super::network::RaftTransport;
use super::types::{LogId, TypeConfig};
use super::wire::{self, RaftRequest, ReadIndexAnswer, Route, WriteIndex, WriteIndexAnswer};

/// Reads that wait for a round to begin.
pub(super) const QUEUE_LENGTH: usize = 4096;

/// A read that waits for its round.
pub(super) type Waiting<T> = oneshot::Sender<T>;

/// Runs one round after the other as long as somebody waits: each begins after all that it answers.
pub(super) async fn share<T: Clone, F: Future<Output = T>>(
    mut queue: mpsc::Receiver<Waiting<T>>,
    mut round: impl FnMut() -> F,
) {
    while let Some(first) = queue.recv().await {
        let mut waiting = vec![first];
        while let Ok(next) = queue.try_recv() {
            waiting.push(next);
        }
        let answer = round().await;
        for read in waiting {
            drop(read.send(answer.clone())); // Whoever asked may have stopped waiting.
        }
    }
}

/// What a round takes.
#[derive(Clone)]
pub(super) struct Round {
    pub(super) raft_id: u64,
    pub(super) raft: Raft<TypeConfig, Machine>,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) transport: Arc<dyn RaftTransport>,
    pub(super) patience: Duration,
}

impl Round {
    /// What a read that began before must have applied; none where no leader says so.
    pub(super) async fn run(self) -> ReadIndexAnswer {
        let leader = self.leadership.borrow().leader.clone()?;
        self.under(&leader, async {
            if leader.raft_id == self.raft_id {
                let linearizer = self.raft.get_read_linearizer(ReadPolicy::ReadIndex).await;
                return linearizer.ok().map(|linearizer| *linearizer.read_log_id().log_id());
            }
            wire::read_json(&self.ask(&leader, |_| {}).await?).ok()?
        })
        .await
    }

    /// What the view of a write that begins after this must have applied, by the word of another manager that leads.
    pub(super) async fn ask_for_view(self) -> WriteIndexAnswer {
        let leader = self.leadership.borrow().leader.clone();
        let leader = leader.filter(|leader| leader.raft_id != self.raft_id)?;
        self.under(&leader, async {
            wire::read_write_index(&self.ask(&leader, wire::put_view_request).await?).ok()?
        })
        .await
    }

    /// Who waits for an old leader is told at once, and asks the next.
    async fn under<T>(&self, leader: &Leader, asked: impl Future<Output = Option<T>>) -> Option<T> {
        let mut leadership = self.leadership.clone();
        tokio::select! {
            answer = tokio::time::timeout(self.patience, asked) => answer.ok().flatten(),
            _ = leadership.wait_for(|now| !now.is_led_by(leader.raft_id)) => None,
        }
    }

    async fn ask(&self, leader: &Leader, put: impl FnOnce(&mut Vec<u8>)) -> Option<Bytes> {
        let mut body = Route { from: self.raft_id, to: leader.raft_id }.start();
        put(&mut body);
        let request = RaftRequest::ReadIndex(body.into());
        let call = self.transport.call(leader.raft_id, &leader.addr, request, self.patience);
        Some(wire::read_answer(call.await.ok()?).ok()?.rest())
    }
}

/// What a write is decided on.
///
/// It holds all that was acknowledged before it was asked for, if the write is committed: that is for the write's own
/// commit to confirm, where the view names a term. Whoever decides not to write has to [read](Consensus::read_state).
#[derive(Debug, Clone)]
pub struct View {
    /// What was applied.
    pub state: State,
    pub(super) term: Option<u64>,
}

impl View {
    /// One that needs no confirmation.
    pub fn confirmed(state: State) -> Self {
        Self { state, term: None }
    }

    /// Whether it holds all that was acknowledged, also where nothing is written.
    pub fn is_confirmed(&self) -> bool {
        self.term.is_none()
    }
}

impl Consensus {
    /// A state that holds all that was acknowledged, anywhere, before this call.
    pub async fn read_state(&self) -> Result<State, ReadError> {
        self.read_state_within(self.inner.timing.patience).await
    }

    /// The same, tried for that long.
    pub(crate) async fn read_state_within(&self, waited: Duration) -> Result<State, ReadError> {
        if mistakes::is(Mistake::StaleRead) {
            return Ok(self.state());
        }
        let mut deadline = Deadline::after(waited);
        loop {
            if let Some(log_id) = deadline.bound(self.read_index()).await.flatten() {
                return self.wait_applied(log_id, &deadline).await;
            }
            self.go_on_looking(&mut deadline, waited).await?;
        }
    }

    /// A view for a write to be decided on, which is then made by [`Consensus::propose_on`].
    pub async fn view_to_write(&self) -> Result<View, ReadError> {
        let waited = self.inner.timing.patience;
        let mut deadline = Deadline::after(waited);
        loop {
            // In this order: the term may be older than the state, which the write will find.
            let leadership = self.inner.leadership.borrow().clone();
            if leadership.is_self {
                return Ok(View { state: self.state(), term: Some(leadership.term) });
            }
            if let Some(index) = deadline.bound(self.write_index()).await.flatten() {
                let state = self.wait_applied(index.applied, &deadline).await?;
                return Ok(View { state, term: index.term });
            }
            self.go_on_looking(&mut deadline, waited).await?;
        }
    }

    /// Waits before the next attempt, if there may be one.
    async fn go_on_looking(
        &self,
        deadline: &mut Deadline,
        waited: Duration,
    ) -> Result<(), ReadError> {
        if self.inner.metrics.borrow().running_state.is_err() {
            return Err(ReadError::Stopped);
        }
        if deadline.has_passed() {
            return Err(ReadError::NoLeader { waited });
        }
        deadline.back_off().await;
        Ok(())
    }

    async fn write_index(&self) -> WriteIndexAnswer {
        let (waiting, answer) = oneshot::channel();
        self.inner.views.send(waiting).await.ok()?;
        answer.await.ok()?
    }

    /// What the view of a write must have applied; none unless this manager leads. All that it acknowledged is
    /// applied here, and in its term nobody else acknowledges anything.
    pub(super) fn write_index_here(&self) -> WriteIndexAnswer {
        let leadership = self.inner.leadership.borrow().clone();
        let applied = self.watch_published().borrow().applied?;
        leadership.is_self.then_some(WriteIndex { applied, term: Some(leadership.term) })
    }

    async fn read_index(&self) -> ReadIndexAnswer {
        let (waiting, answer) = oneshot::channel();
        self.inner.reads.send(waiting).await.ok()?;
        answer.await.ok()?
    }

    /// What a linearizable read must have applied; none unless this manager leads with a quorum.
    pub(super) async fn read_index_here(&self) -> ReadIndexAnswer {
        if self.is_raft_leader() { self.read_index().await } else { None }
    }

    async fn wait_applied(&self, log_id: LogId, deadline: &Deadline) -> Result<State, ReadError> {
        let mut published = self.watch_published();
        let applied = published.wait_for(|published| {
            published.applied.is_some_and(|applied| applied.index >= log_id.index)
        });
        match deadline.bound(applied).await {
            Some(Ok(published)) => Ok(published.state.clone()),
            Some(Err(_)) => Err(ReadError::Stopped),
            None => Err(ReadError::NoLeader { waited: self.inner.timing.patience }),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_read_shares_the_round_that_begins_after_it_and_none_that_began_before() {
        let (reads, queue) = mpsc::channel(QUEUE_LENGTH);
        let (begun, mut begins) = mpsc::channel::<oneshot::Sender<u32>>(8);
        let round = move || {
            let begun = begun.clone();
            async move {
                let (end, ended) = oneshot::channel();
                begun.send(end).await.unwrap();
                ended.await.unwrap()
            }
        };
        let tasks = skep_runtime::TaskSet::new();
        tasks.spawn("reads", share(queue, round));
        let read = || {
            let (waiting, answer) = oneshot::channel();
            reads.try_send(waiting).unwrap();
            answer
        };
        let mut first = read();
        let end = begins.recv().await.unwrap();
        let (second, third) = (read(), read());
        assert_eq!((&mut first).now_or_never(), None);
        end.send(1).unwrap();
        assert_eq!(first.await, Ok(1));
        let end = begins.recv().await.unwrap();
        // What gives up waiting does not keep the others from their answer.
        let (fourth, fifth) = (read(), read());
        drop(fourth);
        end.send(2).unwrap();
        assert_eq!((second.await, third.await), (Ok(2), Ok(2)));
        begins.recv().await.unwrap().send(3).unwrap();
        assert_eq!(fifth.await, Ok(3));
        tasks.shutdown().await;
    }
}
