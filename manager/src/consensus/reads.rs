//! Linearizable reads share their rounds.
//!
//! What a read must have applied is found by a round: the leader asks a majority whether it still leads. While
//! one round is under way, all reads that arrive wait for the next: it begins after them, so that it holds all
//! that was acknowledged before any of them. There is no timer; a lone read waits for nobody.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use openraft::{Raft, ReadPolicy};
use skep_manager_core::State;
use tokio::sync::{mpsc, oneshot};

use super::Consensus;
use super::deadline::Deadline;
use super::handle::ReadError;
use super::leadership::Metrics;
use super::machine::Machine;
use super::network::RaftTransport;
use super::types::{LogId, TypeConfig};
use super::wire::{self, RaftRequest, ReadIndexAnswer, Route};

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
    pub(super) metrics: Metrics,
    pub(super) transport: Arc<dyn RaftTransport>,
    pub(super) patience: Duration,
}

impl Round {
    /// What a read that began before must have applied; none where no leader says so.
    pub(super) async fn run(self) -> ReadIndexAnswer {
        let (leader, addr) = self.metrics.leader()?;
        let deadline = Deadline::after(self.patience);
        let asked = async {
            match leader == self.raft_id {
                true => {
                    let linearizer = self.raft.get_read_linearizer(ReadPolicy::ReadIndex).await;
                    linearizer.ok().map(|linearizer| *linearizer.read_log_id().log_id())
                }
                false => self.ask(leader, &addr, &deadline).await,
            }
        };
        let mut metrics = self.metrics.clone();
        tokio::select! {
            answer = deadline.bound(asked) => answer.flatten(),
            // Who waited for the old leader is told at once, and asks the next.
            _ = metrics.wait_for(|metrics| metrics.current_leader != Some(leader)) => None,
        }
    }

    async fn ask(&self, leader: u64, addr: &str, deadline: &Deadline) -> ReadIndexAnswer {
        let body = Route { from: self.raft_id, to: leader }.start();
        let request = RaftRequest::ReadIndex(body.into());
        let answer = self.transport.call(leader, addr, request, deadline.remaining()).await.ok()?;
        wire::read_json(&wire::read_answer(answer).ok()?.rest()).ok()?
    }
}

impl Consensus {
    /// A state that holds all that was acknowledged, anywhere, before this call.
    pub async fn read_state(&self) -> Result<State, ReadError> {
        self.read_state_within(self.inner.timing.patience).await
    }

    /// The same, tried for that long.
    pub(crate) async fn read_state_within(&self, waited: Duration) -> Result<State, ReadError> {
        let mut deadline = Deadline::after(waited);
        loop {
            if let Some(log_id) = deadline.bound(self.read_index()).await.flatten() {
                return self.wait_applied(log_id, &deadline).await;
            }
            if self.inner.metrics.borrow().running_state.is_err() {
                return Err(ReadError::Stopped);
            }
            if deadline.has_passed() {
                return Err(ReadError::NoLeader { waited });
            }
            deadline.back_off().await;
        }
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
