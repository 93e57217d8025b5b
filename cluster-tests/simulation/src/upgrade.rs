//! Another program for a machine: mostly the newest, on the way of a rolling upgrade, sometimes an older one.
//!
//! It follows `docs/operations/upgrade.md`: machines take turns, in any order. What machines hold on their disks stays.

use std::time::Duration;

use rand::RngExt as _;
use skep_common::spec::NodeRole;
use skep_manager_core::command::FORMAT_LEVEL;

use crate::client::Wish;
use crate::message::MachineId;
use crate::world::World;

/// In a swarm of an earlier level a machine gets another program every few seconds.
const CHANCE: f64 = 0.25;
/// How often that is an older one, where one may have it.
const CHANCE_BACK: f64 = 0.25;

impl World {
    /// What an operator does in a second of the phase with faults.
    pub(crate) fn upgrade_sometimes(&mut self) {
        let is_mixed = self.first_level < FORMAT_LEVEL;
        if !self.is_rough || !is_mixed || !self.upgrade_rng.random_bool(CHANCE) {
            return;
        }
        let back: Vec<MachineId> =
            (0..self.machines.len()).filter(|id| self.may_go_back(*id)).collect();
        if !back.is_empty() && self.upgrade_rng.random_bool(CHANCE_BACK) {
            let machine = back[self.upgrade_rng.random_range(0..back.len())];
            self.counts.n_downgraded += 1;
            if self.machines[machine].manager.is_none() && self.upgrade_rng.random_bool(0.5) {
                // What its session said is not true any more when it asks to be a manager.
                self.ask_somebody(Wish::Promote(self.machines[machine].node_id));
            }
            self.change_program(machine, self.first_level);
        } else {
            self.upgrade_one();
        }
    }

    /// The newest program for one of the machines that have an older one.
    pub(crate) fn upgrade_one(&mut self) {
        // What a manager that went back knows now is to be in the store before the others go on.
        if (0..self.machines.len()).any(|id| self.is_going_back(id)) {
            return;
        }
        let old: Vec<MachineId> =
            (0..self.machines.len()).filter(|id| self.machines[*id].level < FORMAT_LEVEL).collect();
        if !old.is_empty() {
            let machine = old[self.upgrade_rng.random_range(0..old.len())];
            self.counts.n_upgraded += 1;
            self.change_program(machine, FORMAT_LEVEL);
        }
    }

    fn change_program(&mut self, machine: MachineId, level: u32) {
        self.note(format_args!("{machine} gets the program of level {level}"));
        self.machines[machine].level = level;
        if self.machines[machine].is_up {
            let millis = self.upgrade_rng.random_range(50..1500);
            self.go_down(machine, Duration::from_millis(millis));
        }
    }

    /// Whether an older program may take the place of the newest.
    ///
    /// A worker's always may: it reads nothing that managers wrote down. A manager's may while others keep the swarm
    /// from using what is new, and nobody is about to remove those.
    fn may_go_back(&self, id: MachineId) -> bool {
        let machine = &self.machines[id];
        if machine.level < FORMAT_LEVEL {
            return false;
        }
        let Some(manager) = &machine.manager else {
            let node = self.ledger.node(machine.node_id);
            return node.is_some_and(|node| node.observed_role() == NodeRole::Worker);
        };
        let is_old = |other: &&crate::machine::Machine| {
            let node = self.ledger.node(other.node_id);
            node.is_some_and(|node| {
                node.manager_status.is_some()
                    && other.level < FORMAT_LEVEL
                    && node
                        .description
                        .as_ref()
                        .is_some_and(|said| said.format_level == other.level)
            })
        };
        let n_old = self.machines.iter().filter(is_old).count();
        n_old >= 2 && !self.is_removing() && manager.replica.level() <= self.first_level
    }

    /// Whether a manager has gone back, and the store does not say so yet: nobody is to be removed meanwhile.
    pub(crate) fn is_going_back(&self, id: MachineId) -> bool {
        let machine = &self.machines[id];
        let node = self.ledger.node(machine.node_id);
        let said = node.filter(|node| node.manager_status.is_some());
        let said = said.and_then(|node| node.description.as_ref());
        machine.manager.is_some() && said.is_some_and(|said| said.format_level > machine.level)
    }

    fn is_removing(&self) -> bool {
        let managers = self.machines.iter().filter_map(|machine| machine.manager.as_ref());
        let mut requests = managers.flat_map(|manager| manager.requests.values());
        requests.any(|request| matches!(request.wish, Wish::RemoveNode(..)))
    }
}
