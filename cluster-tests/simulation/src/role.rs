//! Which role a machine plays: how it hears of another one, gets a certificate for it, and takes it up.
//!
//! It follows `cli/src/daemon/role.rs`: the certificate decides, and a Raft id is made for one promotion. A machine
//! that was made a manager begins with no log, and asks the others to admit it until they do.

use std::time::Duration;

use rand::RngExt as _;
use skep_common::NodeId;
use skep_common::spec::NodeRole;
use skep_manager_core::roles;

use crate::machine::Manager;
use crate::membership::ManagerId;
use crate::message::{MachineId, Message};
use crate::world::{Timer, World};

/// Between attempts, and how long an answer is waited for.
const RETRY: Duration = Duration::from_secs(1);
const RENEW_PATIENCE: Duration = Duration::from_secs(4);
const ADMIT_PATIENCE: Duration = Duration::from_secs(11);
/// After so many failures somebody tells the node of another manager.
const FAILURES_MAX: u32 = 8;

/// How far a machine is with another role.
#[derive(Debug, Default)]
pub(crate) struct RoleChange {
    /// How often it was made a manager.
    n_before: u64,
    /// What it asks for now.
    request: Option<u64>,
    /// What the leader said last, and by which Raft id it is a manager.
    told: Option<(NodeRole, u64)>,
}

/// What a manager answers to whoever asks for a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is a member.
    Member,
    /// What the certificate is for, and by which Raft id its node is a manager.
    Role(NodeRole, u64),
}

impl World {
    /// What the certificate of a machine is for.
    pub(crate) fn role(&self, machine: MachineId) -> NodeRole {
        match self.machines[machine].manager {
            Some(_) => NodeRole::Manager,
            None => NodeRole::Worker,
        }
    }

    /// Whom a machine asks where nobody told it whom.
    pub(crate) fn some_manager_known_to(&mut self, machine: MachineId) -> MachineId {
        let all = self.managers();
        let one = &mut self.machines[machine];
        let is_lost = one.agent.n_failed > FAILURES_MAX || one.agent.managers.is_empty();
        let known = if is_lost { &all } else { &one.agent.managers };
        known.get(one.rng.random_range(0..known.len().max(1))).copied().unwrap_or(machine)
    }

    /// The leader says which role the node has.
    pub(crate) fn hear_role(&mut self, machine: MachineId, role: NodeRole, raft_id: u64) {
        let is_other = self.is_other_role(machine, role, raft_id);
        let change = &mut self.machines[machine].role_change;
        change.told = Some((role, raft_id));
        if is_other && change.request.is_none() {
            self.ask_for_role(machine);
        }
    }

    /// Whether a machine is to begin another role than it plays. One that has not heard yet that it is a member is
    /// still joining.
    fn is_other_role(&self, machine: MachineId, role: NodeRole, raft_id: u64) -> bool {
        let member = self.machines[machine].manager.as_ref().filter(|one| one.is_member);
        role != self.role(machine)
            || member.is_some_and(|one| roles::is_over(one.replica.id().raft_id(), Some(raft_id)))
    }

    /// A daemon has started: what it is to go on with.
    pub(crate) fn start_role(&mut self, machine: MachineId) {
        let change = &mut self.machines[machine].role_change;
        (change.request, change.told) = (None, None);
        self.ask_for_role(machine);
    }

    /// Nobody answered, or not as hoped.
    pub(crate) fn take_up_role(&mut self, machine: MachineId, request: u64) {
        if self.machines[machine].role_change.request == Some(request) {
            self.machines[machine].role_change.request = None;
            self.ask_for_role(machine);
        }
    }

    fn ask_for_role(&mut self, machine: MachineId) {
        let request = self.next_id();
        let one = &self.machines[machine];
        let (node_id, level) = (one.node_id, one.level);
        let told = one.role_change.told;
        let is_other = told.is_some_and(|(role, id)| self.is_other_role(machine, role, id));
        let outsider = one.manager.as_ref().filter(|manager| !manager.is_member);
        let outsider = outsider.map(|manager| manager.replica.id());
        let (message, patience) = match outsider {
            _ if is_other => (Message::Renew { request, node_id }, RENEW_PATIENCE),
            Some(manager) => (Message::Admit { request, node_id, manager, level }, ADMIT_PATIENCE),
            None => return,
        };
        self.machines[machine].role_change.request = Some(request);
        let manager = self.some_manager_known_to(machine);
        self.send(machine, manager, message);
        self.timer(machine, patience, Timer::Role { request });
    }

    fn ask_later(&mut self, machine: MachineId) {
        let request = self.next_id();
        self.machines[machine].role_change.request = Some(request);
        self.timer(machine, RETRY, Timer::Role { request });
    }

    /// A manager has signed a certificate, or could not.
    pub(crate) fn renewed(
        &mut self,
        machine: MachineId,
        request: u64,
        role: Option<(NodeRole, u64)>,
    ) {
        if self.machines[machine].role_change.request != Some(request) {
            return;
        }
        self.machines[machine].role_change.request = None;
        match role {
            Some((role, raft_id)) if self.is_other_role(machine, role, raft_id) => {
                self.change_role(machine, role);
            }
            Some(_) => {} // The managers have changed their minds; the leader tells.
            None => self.ask_later(machine),
        }
    }

    /// The managers have admitted this one, or have not.
    pub(crate) fn admitted(&mut self, machine: MachineId, request: u64, is_member: bool) {
        let one = &mut self.machines[machine];
        if one.role_change.request != Some(request) {
            return;
        }
        one.role_change.request = None;
        let Some(manager) = &mut one.manager else { return };
        manager.is_member |= is_member;
        if is_member {
            self.counts.n_promoted += 1;
            self.note(format_args!("{machine} is a manager"));
            self.ask_later(machine); // That it is over may have been told before.
        } else {
            self.ask_later(machine);
        }
    }

    /// The daemon begins anew with another role; containers go on.
    fn change_role(&mut self, machine: MachineId, role: NodeRole) {
        self.note(format_args!("{machine} is a {} now", role.name()));
        self.set_role(machine, role);
        let millis = self.machines[machine].rng.random_range(20..800);
        self.go_down(machine, Duration::from_millis(millis));
    }

    fn set_role(&mut self, machine: MachineId, role: NodeRole) {
        let now = self.now();
        let one = &mut self.machines[machine];
        self.counts.n_demoted += u64::from(one.manager.is_some() && role == NodeRole::Worker);
        one.manager = (role == NodeRole::Manager).then(|| {
            one.role_change.n_before += 1;
            Manager::new(ManagerId::new(machine, one.role_change.n_before), Vec::new(), now)
        });
    }

    /// A node that was removed: its operator has it leave, so that it may join anew.
    pub(crate) fn leave_managers(&mut self, machine: MachineId) {
        let is_removed = self.ledger.node(self.machines[machine].node_id).is_none();
        if is_removed && self.machines[machine].manager.is_some() {
            self.note(format_args!("{machine} was removed, and is no manager any more"));
            self.change_role(machine, NodeRole::Worker);
        }
    }

    /// A machine that is no member joins as a new node.
    pub(crate) fn join(&mut self, machine: MachineId, node_id: NodeId, role: NodeRole) {
        if self.ledger.node(self.machines[machine].node_id).is_some() {
            return; // Another request had it join.
        }
        let managers = self.managers();
        let one = &mut self.machines[machine];
        one.node_id = node_id;
        one.agent.n_failed = 0;
        one.agent.managers = managers;
        if one.manager.is_some() || role == NodeRole::Manager {
            self.change_role(machine, role);
        }
    }
}
