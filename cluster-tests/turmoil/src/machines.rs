//! The machines of a run, and what each is in the swarm: what outlives their crashes, and what people tell them.
//!
//! It stands for what a daemon keeps beside its log: its certificate, its Raft id, and whether it is a voter.
//!
//! # Invariants
//!
//! - A Raft id is of one membership, and never used again: a machine that joins again has a new one, a new node and an
//!   empty disk.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use skep_common::NodeId;

/// Raft ids are this many apart for each time that a machine joins; below it they are its number.
const GENERATION: u64 = 100;

/// One time that a machine is in the swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Whom its certificate names.
    pub(crate) node_id: NodeId,
    /// Its Raft id.
    pub(crate) raft_id: u64,
    /// The others have made it a voter.
    pub(crate) is_voter: bool,
}

/// What a machine is told by those who use it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Wish {
    /// Nothing.
    #[default]
    None,
    /// `swarm join`, with this token, at whoever is a manager when it is tried.
    Join { token: String },
    /// `swarm leave`.
    Leave,
    /// It is out of the Raft group, as its agent hears from the managers.
    BeOutside,
}

#[derive(Debug, Default)]
struct Machine {
    identity: Option<Identity>,
    n_identities: u64,
    wish: Wish,
    is_off: bool,
}

/// All machines, by number.
#[derive(Debug)]
pub(crate) struct Machines {
    inner: Mutex<BTreeMap<u64, Machine>>,
    n_founders: u64,
}

/// The machine that a Raft id is of.
pub(crate) fn machine_of(raft_id: u64) -> u64 {
    raft_id % GENERATION
}

impl Machines {
    /// The first so many found the swarm; the others are outside.
    pub(crate) fn new(n_founders: u64, n_spares: u64) -> Self {
        let numbers = 1..=n_founders + n_spares;
        let machines = Self {
            inner: Mutex::new(numbers.map(|number| (number, Machine::default())).collect()),
            n_founders,
        };
        for number in 1..=n_founders {
            machines.enter(number, NodeId(u128::from(number)));
        }
        machines
    }

    fn inner(&self) -> MutexGuard<'_, BTreeMap<u64, Machine>> {
        self.inner.lock().expect("nothing panics while it holds the machines")
    }

    /// All of them.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u64> + use<> {
        let n_machines = self.inner().len() as u64;
        1..=n_machines
    }

    /// Whether it is one of those that found the swarm, and still the manager that it was then.
    pub(crate) fn is_founder(&self, raft_id: u64) -> bool {
        raft_id <= self.n_founders
    }

    /// What it is in the swarm.
    pub(crate) fn identity(&self, number: u64) -> Option<Identity> {
        self.inner()[&number].identity
    }

    /// Those with a certificate.
    pub(crate) fn inside(&self) -> Vec<(u64, Identity)> {
        let inner = self.inner();
        inner.iter().filter_map(|(number, machine)| Some((*number, machine.identity?))).collect()
    }

    /// Those that others have made a voter, and that know of nothing else.
    pub(crate) fn voters(&self) -> Vec<u64> {
        let voters = self.inside().into_iter().filter(|(_, identity)| identity.is_voter);
        voters.map(|(number, _)| number).collect()
    }

    /// It has a certificate for this node.
    pub(crate) fn enter(&self, number: u64, node_id: NodeId) -> Identity {
        let mut inner = self.inner();
        let machine = inner.get_mut(&number).expect("machines are numbered");
        let raft_id = machine.n_identities * GENERATION + number;
        let identity = Identity { node_id, raft_id, is_voter: false };
        (machine.identity, machine.wish) = (Some(identity), Wish::None);
        machine.n_identities += 1;
        identity
    }

    /// The others have made it a voter.
    pub(crate) fn has_joined(&self, number: u64) {
        let mut inner = self.inner();
        let machine = inner.get_mut(&number).expect("machines are numbered");
        if let Some(identity) = &mut machine.identity {
            identity.is_voter = true;
        }
    }

    /// It forgets all of the swarm.
    pub(crate) fn forget(&self, number: u64) {
        let mut inner = self.inner();
        let machine = inner.get_mut(&number).expect("machines are numbered");
        (machine.identity, machine.wish) = (None, Wish::None);
    }

    /// What it was told last.
    pub(crate) fn wish(&self, number: u64) -> Wish {
        self.inner()[&number].wish.clone()
    }

    /// Whether it was switched off.
    pub(crate) fn is_off(&self, number: u64) -> bool {
        self.inner()[&number].is_off
    }

    /// Switches it off or on.
    pub(crate) fn switch(&self, number: u64, is_off: bool) {
        self.inner().get_mut(&number).expect("machines are numbered").is_off = is_off;
    }

    /// Its users want that no more.
    pub(crate) fn withdraw(&self, number: u64, wish: &Wish) {
        let mut inner = self.inner();
        let machine = inner.get_mut(&number).expect("machines are numbered");
        if machine.wish == *wish {
            machine.wish = Wish::None;
        }
    }

    /// Tells a machine that a manager is one no more; not if it has gone by itself meanwhile. Returns whether it was told.
    pub(crate) fn tell_out(&self, raft_id: u64) -> bool {
        let mut inner = self.inner();
        let machine = inner.get_mut(&machine_of(raft_id)).expect("machines are numbered");
        let is_it = machine.identity.is_some_and(|identity| identity.raft_id == raft_id);
        if is_it {
            machine.wish = Wish::BeOutside;
        }
        is_it
    }

    /// Tells it something.
    pub(crate) fn tell(&self, number: u64, wish: Wish) {
        self.inner().get_mut(&number).expect("machines are numbered").wish = wish;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_joins_again_has_another_raft_id() {
        let machines = Machines::new(3, 2);
        assert_eq!(machines.numbers().count(), 5);
        let before = machines.identity(2).unwrap();
        assert!(!before.is_voter && machines.is_founder(before.raft_id));
        machines.has_joined(2);
        assert_eq!(machines.voters(), [2]);
        assert!(!machines.tell_out(102));
        assert_eq!(machines.wish(2), Wish::None, "it is another");
        assert!(machines.tell_out(2));
        assert_eq!(machines.wish(2), Wish::BeOutside);
        machines.forget(2);
        assert!(!machines.tell_out(2));
        assert_eq!((machines.identity(2), machines.wish(2)), (None, Wish::None));
        let after = machines.enter(2, NodeId(77));
        assert!(before.raft_id != after.raft_id && !machines.is_founder(after.raft_id));
        assert_eq!((machine_of(before.raft_id), machine_of(after.raft_id)), (2, 2));
        assert_eq!(machines.inside().len(), 3);
        assert!(machines.voters().is_empty());
    }
}
