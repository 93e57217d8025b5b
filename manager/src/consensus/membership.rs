//! The set of managers: who is asked for votes.
//!
//! A new manager first gets the log as a learner, without a vote, and becomes a voter once it has
//! caught up: a manager that does not answer never counts towards a majority. The leader makes the
//! changes, one at a time; other managers pass them on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{BasicNode, ChangeMembers, LogIdOptionExt as _, RaftMetrics};
use serde::Serialize;
use skep_manager_core::roles;
use skep_runtime::clock;

use super::Consensus;
use super::deadline::Deadline;
use super::types::{Membership, TypeConfig};
use super::wire::{self, MembershipChange, Proposal, RaftRequest, Route, Verdict};

/// A learner that lacks no more than this gets its vote: what arrives while a message travels.
const LAG_MAX: u64 = 100;
/// What a forwarded change gets beyond the leader's own patience.
const FORWARD_MARGIN: Duration = Duration::from_secs(2);

/// Why a change is not begun.
const UNDER_WAY: &str = "another change of the managers is under way; repeat when it has ended";

/// Whether a manager has a vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum MemberRole {
    /// It votes.
    Voter,
    /// It gets the log, and has no vote yet.
    Learner,
}

/// A manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Its Raft id.
    pub raft_id: u64,
    /// Where managers reach it.
    pub addr: String,
    /// Whether it votes.
    pub role: MemberRole,
}

/// Why the set of managers was not changed. All changes are safe to repeat.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No leader took the change in time.
    #[error("no leader was found within {} ms: a majority of the managers is needed", waited.as_millis())]
    NoLeader {
        /// How long it was tried.
        waited: Duration,
    },
    /// The leader was lost meanwhile; repeat to be sure.
    #[error("the leader was lost before it confirmed the change of manager {raft_id:x}")]
    Unknown {
        /// Whom the change was about.
        raft_id: u64,
    },
    /// The leader refused.
    #[error("failed to change manager {raft_id:x}: {reason}")]
    Refused {
        /// Whom the change was about.
        raft_id: u64,
        /// Why, with the remedy.
        reason: String,
    },
}

impl Consensus {
    /// Makes a manager a voter, or gives it another address. Returns once it is one.
    ///
    /// It must run already: it is sent the log first. Safe to repeat.
    pub async fn add_manager(&self, raft_id: u64, addr: &str) -> Result<(), Error> {
        let patience = self.inner.timing.catch_up;
        let change = MembershipChange::Add { raft_id, addr: addr.to_owned(), patience };
        self.change(change, raft_id, patience).await
    }

    /// Takes a manager out. The last voter stays. Safe to repeat.
    pub async fn remove_manager(&self, raft_id: u64) -> Result<(), Error> {
        let patience = self.inner.timing.patience;
        self.change(MembershipChange::Remove { raft_id, patience }, raft_id, patience).await
    }

    /// Whether a manager could be taken out: the others that answer its leader keep a majority.
    pub async fn ask_to_remove(&self, raft_id: u64) -> Result<(), Error> {
        let patience = self.inner.timing.patience;
        self.change(MembershipChange::MayRemove { raft_id, patience }, raft_id, patience).await
    }

    /// All managers, by Raft id.
    pub fn members(&self) -> Vec<Member> {
        let metrics = self.inner.metrics.borrow();
        members_of(metrics.membership_config.membership())
    }

    /// Waits until the managers know this one at another address than `own`; where it is no member, for ever.
    /// False when consensus has ended.
    pub(crate) async fn is_known_elsewhere(&self, own: &str) -> bool {
        let mut metrics = self.inner.metrics.clone();
        let raft_id = self.inner.raft_id;
        let elsewhere = metrics.wait_for(|metrics| {
            let known = metrics.membership_config.membership().get_node(&raft_id);
            known.is_some_and(|known| known.addr != own)
        });
        elsewhere.await.is_some()
    }

    /// Waits until the managers are others than `known`, as far as this one has heard; false when consensus has
    /// ended.
    pub(crate) async fn members_changed(&self, known: &[Member]) -> bool {
        let mut metrics = self.inner.metrics.clone();
        let changed =
            metrics.wait_for(|metrics| members_of(metrics.membership_config.membership()) != known);
        changed.await.is_some()
    }

    /// As the leader: takes a manager out unless a node of the state names it, or it is the leader; true where it is
    /// out. Safe to repeat, and beside a manager that is joining: its node names it before it is added, and none is
    /// added between the look at the state and the change.
    pub(crate) async fn remove_unnamed(&self, raft_id: u64) -> Result<bool, Error> {
        let waited = self.inner.timing.patience;
        let deadline = Deadline::after(waited);
        let refused = |reason: &str| Error::Refused { raft_id, reason: reason.to_owned() };
        let Some(_one_at_a_time) = deadline.bound(self.inner.membership_change.lock()).await else {
            return Err(refused(UNDER_WAY));
        };
        let term = |consensus: &Self| {
            let leadership = consensus.inner.leadership.borrow();
            leadership.is_self.then_some(leadership.term)
        };
        let before = term(self);
        let state = self.read_state().await.map_err(|_| Error::NoLeader { waited })?;
        // In another term, somebody else may have added it meanwhile.
        if before.is_none() || term(self) != before {
            return Err(Error::NoLeader { waited });
        }
        if roles::unnamed(&state, &[raft_id], self.inner.raft_id).is_empty() {
            return Ok(false);
        }
        self.remove_here(raft_id).await.map(|()| true).map_err(|verdict| match verdict {
            Verdict::Refused(reason) => Error::Refused { raft_id, reason },
            Verdict::NotTaken => Error::NoLeader { waited },
            Verdict::Unknown | Verdict::Done(()) => Error::Unknown { raft_id },
        })
    }

    async fn change(
        &self,
        change: MembershipChange,
        raft_id: u64,
        waited: Duration,
    ) -> Result<(), Error> {
        let mut deadline = Deadline::after(waited);
        loop {
            let verdict = if self.is_raft_leader() {
                self.change_here(&change).await
            } else {
                self.forward_change(&change, waited).await
            };
            match verdict {
                Verdict::Done(()) => return Ok(()),
                Verdict::Refused(reason) => return Err(Error::Refused { raft_id, reason }),
                // Repeating is safe, and tells what became of it.
                Verdict::NotTaken | Verdict::Unknown if !deadline.has_passed() => {
                    deadline.back_off().await;
                }
                Verdict::NotTaken => return Err(Error::NoLeader { waited }),
                Verdict::Unknown => return Err(Error::Unknown { raft_id }),
            }
        }
    }

    async fn forward_change(&self, change: &MembershipChange, patience: Duration) -> Verdict<()> {
        let Some((leader, addr)) = self.raft_leader() else { return Verdict::NotTaken };
        let mut body = Route { from: self.inner.raft_id, to: leader }.start();
        Proposal::Membership(change.clone()).put(&mut body);
        let request = RaftRequest::Propose(body.into());
        let call = self.inner.transport.call(leader, &addr, request, patience + FORWARD_MARGIN);
        let mut metrics = self.inner.metrics.clone();
        let result = tokio::select! {
            result = call => result,
            _ = metrics.wait_for(|metrics| metrics.current_leader != Some(leader)) => {
                return Verdict::Unknown;
            }
        };
        match result.map(wire::read_answer) {
            Ok(Ok(mut reader)) => wire::read_json(&reader.rest()).unwrap_or(Verdict::Unknown),
            Ok(Err(_)) => Verdict::NotTaken,
            Err(error) if error.may_have_arrived => Verdict::Unknown,
            Err(_) => Verdict::NotTaken,
        }
    }

    /// Makes a change as leader.
    pub(crate) async fn change_here(&self, change: &MembershipChange) -> Verdict<()> {
        let (MembershipChange::Add { patience, .. }
        | MembershipChange::Remove { patience, .. }
        | MembershipChange::MayRemove { patience, .. }) = change;
        let deadline = Deadline::after(*patience);
        let Some(_one_at_a_time) = deadline.bound(self.inner.membership_change.lock()).await else {
            return Verdict::Refused(UNDER_WAY.to_owned());
        };
        let done = match change {
            MembershipChange::Add { raft_id, addr, .. } => {
                self.add_here(*raft_id, addr, &deadline).await
            }
            MembershipChange::Remove { raft_id, .. } => self.remove_here(*raft_id).await,
            MembershipChange::MayRemove { raft_id, .. } => self.may_remove(*raft_id).await,
        };
        match done {
            Ok(()) => Verdict::Done(()),
            Err(verdict) => verdict,
        }
    }

    async fn add_here(
        &self,
        raft_id: u64,
        addr: &str,
        deadline: &Deadline,
    ) -> Result<(), Verdict<()>> {
        let node = BasicNode::new(addr);
        let membership = self.membership();
        match membership.get_node(&raft_id) {
            Some(known) if *known == node => {}
            Some(_) => {
                let nodes = BTreeMap::from([(raft_id, node)]);
                self.write_membership(ChangeMembers::SetNodes(nodes), true).await?;
            }
            None => {
                let nodes = BTreeMap::from([(raft_id, node)]);
                self.write_membership(ChangeMembers::AddNodes(nodes), true).await?;
            }
        }
        if is_settled_voter(&self.membership(), raft_id) {
            return Ok(());
        }
        self.wait_caught_up(raft_id, deadline).await?;
        let ids = BTreeSet::from([raft_id]);
        self.write_membership(ChangeMembers::AddVoterIds(ids), true).await
    }

    async fn remove_here(&self, raft_id: u64) -> Result<(), Verdict<()>> {
        let membership = self.membership();
        let ids = BTreeSet::from([raft_id]);
        if membership.voter_ids().any(|voter| voter == raft_id) {
            self.may_remove(raft_id).await?;
            self.write_membership(ChangeMembers::RemoveVoters(ids), false).await
        } else if membership.get_node(&raft_id).is_some() {
            self.write_membership(ChangeMembers::RemoveNodes(ids), false).await
        } else {
            Ok(())
        }
    }

    /// Only what answers from now on counts: a manager may have died a moment ago. It is waited for as long
    /// as a manager may be silent.
    async fn may_remove(&self, raft_id: u64) -> Result<(), Verdict<()>> {
        let silence_max = self.inner.timing.leader_silence_max();
        let asked_at = clock::monotonic();
        let mut metrics = self.inner.metrics.clone();
        let settled = metrics.wait_for(|metrics| {
            let has_lost_the_lead = metrics.current_leader != Some(metrics.id);
            has_lost_the_lead || silent_others(metrics, raft_id, asked_at).is_ok()
        });
        let settled = Deadline::after(silence_max).bound(settled).await.flatten();
        let metrics = settled.unwrap_or_else(|| self.inner.metrics.borrow().clone());
        if metrics.current_leader != Some(metrics.id) {
            return Err(Verdict::NotTaken);
        }
        silent_others(&metrics, raft_id, asked_at).map_err(Verdict::Refused)
    }

    async fn wait_caught_up(&self, raft_id: u64, deadline: &Deadline) -> Result<(), Verdict<()>> {
        let mut metrics = self.inner.metrics.clone();
        let ready = metrics.wait_for(|metrics| {
            let no_more_leader = metrics.current_leader != Some(metrics.id);
            no_more_leader || raft_id == metrics.id || has_caught_up(metrics, raft_id)
        });
        let Some(Some(metrics)) = deadline.bound(ready).await else {
            let reason = "it has not caught up with the log in time; see that it runs and that the \
                          managers reach it, then repeat";
            return Err(Verdict::Refused(reason.to_owned()));
        };
        if metrics.current_leader == Some(metrics.id) { Ok(()) } else { Err(Verdict::NotTaken) }
    }

    async fn write_membership(
        &self,
        change: ChangeMembers<u64, BasicNode>,
        retain: bool,
    ) -> Result<(), Verdict<()>> {
        let written = self.inner.raft.change_membership(change, retain).await;
        if let Ok(response) = &written {
            // Metrics come a moment later, and who asks next is to see it. An end of them is no failure.
            let mut metrics = self.inner.metrics.clone();
            let shown = metrics.wait_for(|metrics| {
                metrics.membership_config.log_id().as_ref() >= Some(&response.log_id)
            });
            let _ = shown.await;
        }
        written.map(drop).map_err(|error| match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => Verdict::NotTaken,
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) | RaftError::Fatal(_) => {
                Verdict::Unknown
            }
            // A change that the leader before began; it ends soon.
            RaftError::APIError(ClientWriteError::ChangeMembershipError(
                ChangeMembershipError::InProgress(_)
                | ChangeMembershipError::UncommittedLeaderLog(_),
            )) => Verdict::NotTaken,
            RaftError::APIError(error) => Verdict::Refused(error.to_string()),
        })
    }

    fn membership(&self) -> Membership {
        self.inner.metrics.borrow().membership_config.membership().clone()
    }

    /// Whom openraft takes for the leader, with the address.
    pub(crate) fn raft_leader(&self) -> Option<(u64, String)> {
        self.inner.metrics.leader()
    }
}

pub(crate) fn members_of(membership: &Membership) -> Vec<Member> {
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let role = |raft_id| {
        if voters.contains(raft_id) { MemberRole::Voter } else { MemberRole::Learner }
    };
    let nodes = membership.nodes();
    nodes
        .map(|(raft_id, node)| Member {
            raft_id: *raft_id,
            addr: node.addr.clone(),
            role: role(raft_id),
        })
        .collect()
}

/// Why the others would have no majority without `raft_id`, with those that do not answer this leader.
fn silent_others(
    metrics: &RaftMetrics<TypeConfig>,
    raft_id: u64,
    asked_at: Instant,
) -> Result<(), String> {
    let membership = metrics.membership_config.membership();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let since_asked = clock::monotonic().duration_since(asked_at);
    let answers = |voter: u64| {
        let heard = metrics.heartbeat.as_ref().and_then(|peers| peers.get(&voter));
        let heard = heard.copied().flatten();
        voter == metrics.id
            || heard.is_some_and(|at| openraft::Instant::elapsed(&*at) <= since_asked)
    };
    let address = |voter: u64| {
        membership.get_node(&voter).map_or_else(|| "?".to_owned(), |node| node.addr.clone())
    };
    roles::may_leave(&voters, raft_id, answers, address).map_err(|needed| needed.to_string())
}

/// It votes, and no change is half done.
fn is_settled_voter(membership: &Membership, raft_id: u64) -> bool {
    match membership.get_joint_config().as_slice() {
        [voters] => voters.contains(&raft_id),
        _ => false,
    }
}

fn has_caught_up(metrics: &RaftMetrics<TypeConfig>, raft_id: u64) -> bool {
    let replication = metrics.replication.as_ref();
    let matched = replication.and_then(|peers| peers.get(&raft_id)).and_then(|m| m.as_ref());
    matched.is_some_and(|matched| matched.index + LAG_MAX >= metrics.last_log_index.unwrap_or(0))
        && metrics.last_applied.index() <= metrics.last_log_index
}
