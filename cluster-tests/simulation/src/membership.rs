//! The members of the Raft group: the managers' Raft ids, and the set of voters and learners that the log agrees on.
//!
//! A manager that is new is a learner first, and a voter once it has caught up. Voters change by joint consensus: for
//! a while a majority of the set before and one of the set after are needed. Source: Ongaro and Ousterhout, "In Search
//! of an Understandable Consensus Algorithm", section 6, as openraft does it.

use std::collections::BTreeSet;
use std::fmt;

use skep_common::mistakes::{self, Mistake};

use crate::message::MachineId;

/// More machines than any swarm here has.
const MACHINES_MAX: u64 = 100;

/// A Raft id: a machine's role as a manager. One that becomes a manager anew has another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ManagerId(u64);

impl ManagerId {
    /// That of a machine which was a manager `n_before` times before.
    pub(crate) fn new(machine: MachineId, n_before: u64) -> Self {
        Self(n_before * MACHINES_MAX + machine as u64 + 1)
    }

    /// As the store has it.
    pub(crate) fn of_raft_id(raft_id: u64) -> Self {
        Self(raft_id)
    }

    pub(crate) fn raft_id(self) -> u64 {
        self.0
    }

    /// Where it is.
    pub(crate) fn machine(self) -> MachineId {
        usize::try_from((self.0 - 1) % MACHINES_MAX).unwrap_or(usize::MAX)
    }
}

impl fmt::Debug for ManagerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "m{}", self.0)
    }
}

/// Voters and learners.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Membership {
    /// One set of voters, or two while one follows the other.
    configs: Vec<BTreeSet<ManagerId>>,
    /// Voters and learners.
    members: BTreeSet<ManagerId>,
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let learners: Vec<_> = self.members.iter().filter(|id| !self.is_voter(**id)).collect();
        write!(f, "{:?} learners {learners:?}", self.configs)
    }
}

impl Membership {
    /// Voters alone.
    pub(crate) fn of(voters: BTreeSet<ManagerId>) -> Self {
        Self { configs: vec![voters.clone()], members: voters }
    }

    /// Voters and learners.
    pub(crate) fn members(&self) -> &BTreeSet<ManagerId> {
        &self.members
    }

    /// All that vote, in one set or the other.
    pub(crate) fn voters(&self) -> BTreeSet<ManagerId> {
        self.configs.iter().flatten().copied().collect()
    }

    pub(crate) fn is_voter(&self, id: ManagerId) -> bool {
        self.configs.iter().any(|config| config.contains(&id))
    }

    /// Whether one set of voters follows another one.
    pub(crate) fn is_joint(&self) -> bool {
        self.configs.len() > 1
    }

    fn newest(&self) -> BTreeSet<ManagerId> {
        self.configs.last().cloned().unwrap_or_default()
    }

    /// Whether those are a majority of each set of voters.
    pub(crate) fn is_quorum(&self, is_in: impl Fn(ManagerId) -> bool) -> bool {
        let has_majority = |config: &BTreeSet<ManagerId>| {
            config.iter().filter(|id| is_in(**id)).count() > config.len() / 2
        };
        !self.configs.is_empty() && self.configs.iter().all(has_majority)
    }

    /// The highest number that a majority of each set of voters has reached; `all` are those that have numbers.
    pub(crate) fn reached(
        &self,
        all: impl Iterator<Item = ManagerId> + Clone,
        number: impl Fn(ManagerId) -> u64,
    ) -> u64 {
        let of_config = |config: &BTreeSet<ManagerId>| {
            let has_vote = |id: &ManagerId| {
                config.contains(id)
                    || (mistakes::is(Mistake::RemovedCounted) && !self.members.contains(id))
            };
            let mut numbers: Vec<u64> = all.clone().filter(has_vote).map(&number).collect();
            numbers.sort_unstable_by(|left, right| right.cmp(left));
            numbers.get(config.len() / 2).copied().unwrap_or(0)
        };
        self.configs.iter().map(of_config).min().unwrap_or(0)
    }

    pub(crate) fn with_learner(&self, id: ManagerId) -> Self {
        let mut new = self.clone();
        new.members.insert(id);
        new
    }

    /// The next step towards another set of voters: both sets where it differs from the newest, else that one alone.
    /// Who loses its vote is no member any more in the end.
    pub(crate) fn towards(&self, change: impl FnOnce(&mut BTreeSet<ManagerId>)) -> Self {
        let mut goal = self.newest();
        change(&mut goal);
        let mut new = self.clone();
        new.configs = match self.configs.contains(&goal) {
            true => vec![goal],
            false => vec![self.newest(), goal],
        };
        let before = self.voters();
        let now = new.voters();
        new.members.retain(|id| now.contains(id) || !before.contains(id));
        new.members.extend(now);
        new
    }

    pub(crate) fn without_learner(&self, id: ManagerId) -> Self {
        let mut new = self.clone();
        new.members.remove(&id);
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(machines: &[usize]) -> BTreeSet<ManagerId> {
        machines.iter().map(|machine| ManagerId::new(*machine, 0)).collect()
    }

    #[test]
    fn voters_change_by_way_of_both_sets() {
        let new = ManagerId::new(3, 2);
        assert_eq!((new.machine(), ManagerId::of_raft_id(new.raft_id())), (3, new));
        let first = Membership::of(set(&[0, 1, 2]));
        let learning = first.with_learner(new);
        assert!(learning.members().contains(&new) && !learning.is_voter(new));
        let joint = learning.towards(|voters| {
            voters.insert(new);
        });
        assert!(joint.is_joint() && joint.is_voter(new));
        let quorum =
            |machines: &'static [usize]| joint.is_quorum(|id| machines.contains(&id.machine()));
        assert!(quorum(&[0, 1, 3]) && quorum(&[0, 1, 2]) && !quorum(&[0, 2]) && !quorum(&[0, 3]));
        let done = joint.towards(|voters| {
            voters.insert(new);
        });
        assert!(!done.is_joint() && done.voters().len() == 4);
        let leaving = done.towards(|voters| {
            voters.remove(&new);
        });
        assert!(leaving.is_joint() && leaving.members().contains(&new));
        assert_eq!(
            leaving.towards(|voters| {
                voters.remove(&new);
            }),
            first
        );
        assert_eq!(learning.without_learner(new), first);
    }

    #[test]
    fn what_is_reached_is_so_in_both_sets() {
        let joint = Membership::of(set(&[0, 1, 2])).towards(|voters| *voters = set(&[2, 3, 4]));
        let reached = |numbers: [u64; 5]| {
            let all = (0..5).map(|machine| ManagerId::new(machine, 0));
            joint.reached(all, |id| numbers[id.machine()])
        };
        assert_eq!(reached([9, 9, 1, 2, 3]), 2);
        assert_eq!(reached([1, 2, 9, 9, 9]), 2);
        assert_eq!(reached([5, 5, 0, 5, 0]), 0);
    }
}
