//! Proposing commands: on the leader directly, elsewhere forwarded to it.
//!
//! Proposals of a follower travel together: while one message is on its way, all that arrive form
//! the next. There is no timer. On the leader openraft and the log's writer do the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{ClientWriteError, ForwardReason};
use openraft::impls::ProgressResponder;
use openraft::{Raft, RaftTypeConfig};
use skep_common::mistakes::{self, Mistake};
use skep_manager_core::{Command, Outcome};
use tokio::sync::{mpsc, oneshot, watch};

use super::Consensus;
use super::deadline::Deadline;
use super::leadership::Leadership;
use super::machine::Machine;
use super::network::{CallError, RaftTransport};
use super::reads::View;
use super::types::{Payload, Reply, TypeConfig};
use super::wire::{self, CommandVerdict, Proposal, RaftRequest, Route, Verdict};

/// The largest command: a plan for some ten thousand tasks, far below the largest message.
pub const COMMAND_BYTES_MAX: usize = 16 << 20;
/// Forwarded at once at most.
const BATCH_LENGTH: usize = 512;
const BATCH_BYTES: usize = 4 << 20;
/// Proposals that wait to be forwarded.
pub(crate) const QUEUE_LENGTH: usize = 4096;

/// Why a command has no outcome. [`Error::may_still_commit`] says whether it may get one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// This manager does not lead in that term, and never will again. The command was not taken: plan anew.
    #[error("this manager is not the leader of term {term}")]
    NotLeader {
        /// The term that the command was planned in.
        term: u64,
    },
    /// No leader took the command in time. It was not written.
    #[error("no leader was found within {} ms: a majority of the managers is needed", waited.as_millis())]
    NoLeader {
        /// How long it was tried.
        waited: Duration,
    },
    /// The leader took the command, but no majority confirmed it in time. It may still commit.
    #[error("the command was not committed within {} ms; it may still be", waited.as_millis())]
    Timeout {
        /// How long it was waited for.
        waited: Duration,
    },
    /// The leader was lost with the command in its hands. It may still commit.
    #[error("the leader was lost before it confirmed the command, which may still be committed")]
    Lost,
    /// Remedy: split the change.
    #[error("the command has {bytes} bytes, the limit is {COMMAND_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// This manager stops. What it had written may still commit.
    #[error("this manager is stopping")]
    Stopped {
        /// The command had been handed to Raft.
        may_still_commit: bool,
    },
}

impl Error {
    /// Whether the command may take effect all the same. If not, it surely never will.
    pub fn may_still_commit(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Lost => true,
            Self::Stopped { may_still_commit } => *may_still_commit,
            Self::NotLeader { .. } | Self::NoLeader { .. } | Self::TooLarge { .. } => false,
        }
    }
}

/// What one attempt gave.
#[derive(Debug)]
pub(crate) enum Attempt {
    Done(Outcome),
    /// Surely not written. The reason is openraft's, where it was this manager's.
    NotTaken(Option<ForwardReason>),
    /// Taken, and then the leader was lost.
    Lost,
    TimedOut,
    Stopped {
        may_still_commit: bool,
    },
}

impl Consensus {
    /// Proposes a command, whoever leads, and waits until it was applied here or by the leader.
    ///
    /// After it succeeded on the leader, [`Consensus::state`] there holds the change.
    pub async fn propose(&self, command: &Command) -> Result<Outcome, Error> {
        let payload = encode(command)?;
        let waited = self.inner.timing.patience;
        let mut deadline = Deadline::after(waited);
        loop {
            let attempt = if self.is_raft_leader() {
                write_here(&self.inner.raft, payload.clone(), None, &deadline).await
            } else {
                self.forward(payload.clone(), None, &deadline).await
            };
            match attempt {
                Attempt::Done(outcome) => return Ok(outcome),
                Attempt::Lost => return Err(Error::Lost),
                Attempt::TimedOut => return Err(Error::Timeout { waited }),
                Attempt::Stopped { may_still_commit } => {
                    return Err(Error::Stopped { may_still_commit });
                }
                Attempt::NotTaken(_) if deadline.has_passed() => {
                    return Err(Error::NoLeader { waited });
                }
                Attempt::NotTaken(_) => deadline.back_off().await,
            }
        }
    }

    /// Proposes a command that was planned as leader of `term`: it is taken in that term only. May return at once,
    /// without ever waiting: who tries again after an error waits for something else first.
    pub async fn propose_as_leader(&self, term: u64, command: &Command) -> Result<Outcome, Error> {
        let payload = encode(command)?;
        let waited = self.inner.timing.patience;
        let mut deadline = Deadline::after(waited);
        if mistakes::is(Mistake::DeposedWrite) {
            return self.propose(command).await;
        }
        loop {
            if !self.is_raft_leader() {
                return Err(Error::NotLeader { term });
            }
            match write_here(&self.inner.raft, payload.clone(), Some(term), &deadline).await {
                Attempt::Done(outcome) => return Ok(outcome),
                Attempt::Lost => return Err(Error::Lost),
                Attempt::TimedOut => return Err(Error::Timeout { waited }),
                Attempt::Stopped { may_still_commit } => {
                    return Err(Error::Stopped { may_still_commit });
                }
                // Still the leader of that term, waiting for a quorum to answer.
                Attempt::NotTaken(Some(ForwardReason::LeaseExpired)) if !deadline.has_passed() => {
                    deadline.back_off().await;
                }
                Attempt::NotTaken(Some(ForwardReason::LeaseExpired)) => {
                    return Err(Error::NoLeader { waited });
                }
                // Its term is over, or about to be: a leader that transfers its leadership takes nothing any more.
                Attempt::NotTaken(_) => return Err(Error::NotLeader { term }),
            }
        }
    }

    /// Proposes a command that was decided on a view, whoever leads: in the term of the view only, where it has one.
    pub async fn propose_on(&self, view: &View, command: &Command) -> Result<Outcome, Error> {
        let Some(term) = view.term else { return self.propose(command).await };
        if self.is_raft_leader() {
            return self.propose_as_leader(term, command).await;
        }
        let payload = encode(command)?;
        let waited = self.inner.timing.patience;
        let deadline = Deadline::after(waited);
        match self.forward(payload, Some(term), &deadline).await {
            Attempt::Done(outcome) => Ok(outcome),
            Attempt::Lost => Err(Error::Lost),
            Attempt::TimedOut => Err(Error::Timeout { waited }),
            Attempt::Stopped { may_still_commit } => Err(Error::Stopped { may_still_commit }),
            Attempt::NotTaken(_) => Err(Error::NotLeader { term }),
        }
    }

    pub(crate) fn is_raft_leader(&self) -> bool {
        self.inner.metrics.borrow().current_leader == Some(self.inner.raft_id)
    }

    async fn forward(&self, payload: Bytes, term: Option<u64>, deadline: &Deadline) -> Attempt {
        let (reply, answer) = oneshot::channel();
        let (progress, deadline) = (Arc::new(Progress::default()), *deadline);
        let forward = Forward { payload, term, progress: Arc::clone(&progress), reply, deadline };
        match deadline.bound(self.inner.forwards.send(forward)).await {
            None => return Attempt::NotTaken(None),
            Some(Err(_)) => return Attempt::Stopped { may_still_commit: false },
            Some(Ok(())) => {}
        }
        match deadline.bound(answer).await {
            Some(Ok(attempt)) => attempt,
            Some(Err(_)) => Attempt::Stopped { may_still_commit: !progress.give_up() },
            None if progress.give_up() => Attempt::NotTaken(None),
            None => Attempt::TimedOut,
        }
    }
}

/// The command as JSON: its one encoding.
fn encode(command: &Command) -> Result<Bytes, Error> {
    let bytes =
        serde_json::to_vec(command).expect("commands have string keys and no failing parts");
    if bytes.len() > COMMAND_BYTES_MAX {
        return Err(Error::TooLarge { bytes: bytes.len() });
    }
    Ok(bytes.into())
}

type Result_<T> = openraft::raft::ClientWriteResult<T>;

/// Has this manager write a command, as leader; in that term only, if one is given.
pub(crate) async fn write_here(
    raft: &Raft<TypeConfig, Machine>,
    payload: Bytes,
    term: Option<u64>,
    deadline: &Deadline,
) -> Attempt {
    match submit(raft, payload, term).await {
        Ok(written) => wait_written(written, deadline).await,
        Err(attempt) => attempt,
    }
}

type Written = <<TypeConfig as RaftTypeConfig>::AsyncRuntime as openraft::AsyncRuntime>::Oneshot;
type WrittenReceiver = <Written as openraft::async_runtime::Oneshot>::Receiver<Result_<TypeConfig>>;

/// Hands a command to openraft without waiting for its outcome.
pub(crate) async fn submit(
    raft: &Raft<TypeConfig, Machine>,
    payload: Bytes,
    term: Option<u64>,
) -> Result<WrittenReceiver, Attempt> {
    let (responder, written) = ProgressResponder::complete_only();
    let mut request = raft.write(Payload(payload)).responder(responder);
    if let Some(term) = term {
        request = request.with_leader(term);
    }
    request.await.map_err(|_| Attempt::Stopped { may_still_commit: false })?;
    Ok(written)
}

pub(crate) async fn wait_written(written: WrittenReceiver, deadline: &Deadline) -> Attempt {
    match deadline.bound(written).await {
        None => Attempt::TimedOut,
        Some(Err(_)) => Attempt::Stopped { may_still_commit: true },
        Some(Ok(Ok(response))) => match response.data {
            Reply::Outcome(outcome) => Attempt::Done(outcome),
            Reply::Nothing => unreachable!("a command has an outcome"),
        },
        Some(Ok(Err(ClientWriteError::ForwardToLeader(forward)))) => {
            Attempt::NotTaken(Some(forward.reason))
        }
        Some(Ok(Err(ClientWriteError::LogEntryDiscarded(_)))) => Attempt::Lost,
        Some(Ok(Err(
            ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_),
        ))) => unreachable!("a command changes no membership and has no precondition"),
    }
}

/// Whether a proposal was sent, or its proposer gave up before: the first to say so decides.
#[derive(Debug, Default)]
struct Progress(AtomicU8);

const WAITING: u8 = 0;
const SENT: u8 = 1;
const GIVEN_UP: u8 = 2;

impl Progress {
    /// True: it was not sent, and never will be.
    fn give_up(&self) -> bool {
        self.advance(GIVEN_UP)
    }

    /// True: it may be sent.
    fn send(&self) -> bool {
        self.advance(SENT)
    }

    fn advance(&self, to: u8) -> bool {
        self.0.compare_exchange(WAITING, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// A proposal on its way to the forwarder.
#[derive(Debug)]
pub(crate) struct Forward {
    payload: Bytes,
    /// The term to write it in, if in one alone.
    term: Option<u64>,
    progress: Arc<Progress>,
    reply: oneshot::Sender<Attempt>,
    deadline: Deadline,
}

/// Carries a follower's proposals to the leader.
#[derive(Debug)]
pub(crate) struct Forwarder {
    pub(crate) raft_id: u64,
    pub(crate) leadership: watch::Receiver<Leadership>,
    pub(crate) transport: Arc<dyn RaftTransport>,
}

impl Forwarder {
    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<Forward>) {
        while let Some(first) = queue.recv().await {
            let mut bytes = first.payload.len();
            let mut batch = vec![first];
            while batch.len() < BATCH_LENGTH && bytes < BATCH_BYTES {
                let Ok(next) = queue.try_recv() else { break };
                bytes += next.payload.len();
                batch.push(next);
            }
            self.forward(batch).await;
        }
    }

    async fn forward(&mut self, batch: Vec<Forward>) {
        let leader = self.leadership.borrow().leader.clone();
        let Some(leader) = leader.filter(|leader| leader.raft_id != self.raft_id) else {
            return answer(batch, |_| Attempt::NotTaken(None));
        };
        let batch: Vec<Forward> =
            batch.into_iter().filter(|forward| forward.progress.send()).collect();
        let Some(time) = batch.iter().map(|forward| forward.deadline.remaining()).max() else {
            return;
        };

        let proposal = match batch.iter().any(|forward| forward.term.is_some()) {
            true => {
                let commands = batch.iter().map(|forward| (forward.term, forward.payload.clone()));
                Proposal::CommandsOf(commands.collect())
            }
            // As every leader reads it.
            false => {
                Proposal::Commands(batch.iter().map(|forward| forward.payload.clone()).collect())
            }
        };
        let mut body = Route { from: self.raft_id, to: leader.raft_id }.start();
        proposal.put(&mut body);
        let request = RaftRequest::Propose(body.into());
        let call = self.transport.call(leader.raft_id, &leader.addr, request, time);
        let result = tokio::select! {
            result = call => result,
            // Nobody knows what the old leader did with them; whoever waits is told so at once.
            _ = self.leadership.wait_for(|now| !now.is_led_by(leader.raft_id)) => {
                return answer(batch, |_| Attempt::Lost);
            }
        };
        match result.map(wire::read_answer) {
            Ok(Ok(mut reader)) => {
                let verdicts: Vec<CommandVerdict> =
                    wire::read_json(&reader.rest()).unwrap_or_default();
                answer(batch, |at| verdicts.get(at).map_or(Attempt::Lost, attempt_of));
            }
            // It refuses what is not meant for it before it reads on.
            Ok(Err(_)) | Err(CallError { may_have_arrived: false, .. }) => {
                answer(batch, |_| Attempt::NotTaken(None));
            }
            Err(CallError { may_have_arrived: true, .. }) => answer(batch, |_| Attempt::Lost),
        }
    }
}

fn answer(batch: Vec<Forward>, attempt: impl Fn(usize) -> Attempt) {
    for (at, forward) in batch.into_iter().enumerate() {
        // Whoever proposed may have stopped waiting.
        drop(forward.reply.send(attempt(at)));
    }
}

fn attempt_of(verdict: &CommandVerdict) -> Attempt {
    match verdict {
        Verdict::Done(outcome) => Attempt::Done(outcome.clone()),
        Verdict::NotTaken | Verdict::Refused(_) => Attempt::NotTaken(None),
        Verdict::Unknown => Attempt::Lost,
    }
}

/// What the leader tells the follower that forwarded a command.
pub(crate) fn verdict_of(attempt: Attempt) -> CommandVerdict {
    match attempt {
        Attempt::Done(outcome) => Verdict::Done(outcome),
        Attempt::NotTaken(_) | Attempt::Stopped { may_still_commit: false } => Verdict::NotTaken,
        Attempt::Lost | Attempt::TimedOut | Attempt::Stopped { may_still_commit: true } => {
            Verdict::Unknown
        }
    }
}
