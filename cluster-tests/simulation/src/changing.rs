//! The set of members changes: what a leader does, one change at a time, and how others ask it to.
//!
//! It follows `manager/src/consensus/membership.rs` and `manager/src/roles.rs`; what is decided is decided by the
//! core's `roles`.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use skep_common::{Node, Object, Timestamp};
use skep_manager_core::roles::{self, Retirement};
use skep_manager_core::{Action, Command, Expect};

use crate::log::Payload;
use crate::machine::Waiter;
use crate::membership::ManagerId;
use crate::message::{MachineId, Message};
use crate::replica::{Outgoing, Replica, SILENCE_MAX};
use crate::seen::Seen;
use crate::world::{Timer, World};

/// How long a leader tries a change.
const PATIENCE: Duration = Duration::from_secs(8);
/// How often it looks at what it waits for, and at managers that are to be workers.
const LOOK: Duration = Duration::from_millis(200);

/// A change of the members. All are safe to repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// It is sent the log, and gets its vote once it has it.
    Add(ManagerId),
    /// It is out of the Raft group.
    Remove(ManagerId),
    /// Nothing changes: would the others keep their majority without it?
    MayRemove(ManagerId),
}

/// What became of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Done,
    Refused(String),
    /// Whoever was asked does not lead, or no more.
    NotTaken,
}

/// Who waits for a change.
#[derive(Debug, Clone)]
enum Asker {
    /// A request to this manager.
    Own,
    Manager(MachineId),
    /// The leader itself, of a manager that is to be a worker.
    Retiring(Arc<Node>),
    /// The leader itself, of a member that no node names.
    Unnamed,
}

#[derive(Debug, Clone)]
struct Pending {
    id: u64,
    asker: Asker,
    change: Change,
    since: Timestamp,
    /// Only who answers a message of that round or a later one counts as answering.
    asked_round: Option<u64>,
}

/// What is asked of a leader.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    queue: VecDeque<Pending>,
    /// It is to look again.
    pub(crate) is_waiting: bool,
    /// That a manager is a worker is on its way into the log.
    pub(crate) is_noting: bool,
    retires_at: Option<Timestamp>,
}

impl Pending {
    /// Does what can be done now; what became of it in the end.
    fn step(&mut self, replica: &mut Replica, now: Timestamp) -> Option<Verdict> {
        if now > self.since.after(PATIENCE) {
            return Some(Verdict::Refused("it was not done in time".to_owned()));
        }
        if !replica.may_change() {
            return None; // Another change is under way.
        }
        let membership = replica.membership().clone();
        let next = match self.change {
            Change::MayRemove(id) => return self.may_remove(replica, id, now),
            Change::Add(id) if !membership.members().contains(&id) => membership.with_learner(id),
            Change::Add(id) if membership.is_voter(id) && !membership.is_joint() => {
                return Some(Verdict::Done);
            }
            Change::Add(id) if !membership.is_voter(id) && !replica.has_caught_up(id) => {
                return None;
            }
            Change::Add(id) => membership.towards(|voters| {
                voters.insert(id);
            }),
            Change::Remove(id) if membership.is_voter(id) => {
                match self.may_remove(replica, id, now)? {
                    Verdict::Done => membership.towards(|voters| {
                        voters.remove(&id);
                    }),
                    refused => return Some(refused),
                }
            }
            Change::Remove(id) if membership.members().contains(&id) => {
                membership.without_learner(id)
            }
            Change::Remove(_) => return Some(Verdict::Done),
        };
        replica.append(Payload::Membership(next));
        None
    }

    fn may_remove(&mut self, replica: &Replica, id: ManagerId, now: Timestamp) -> Option<Verdict> {
        let round = *self.asked_round.get_or_insert_with(|| replica.next_round());
        let voters = replica.membership().voters();
        let voters: BTreeSet<u64> = voters.into_iter().map(ManagerId::raft_id).collect();
        let answers = |voter| replica.has_answered(ManagerId::of_raft_id(voter), round);
        let address = |voter| format!("machine {}", ManagerId::of_raft_id(voter).machine());
        match roles::may_leave(&voters, id.raft_id(), answers, address) {
            Ok(()) => Some(Verdict::Done),
            Err(_) if now <= self.since.after(SILENCE_MAX) => None,
            Err(needed) => Some(Verdict::Refused(needed.to_string())),
        }
    }
}

impl World {
    /// Asks whoever leads; the answer comes as a verdict.
    pub(crate) fn ask_for_change(&mut self, machine: MachineId, id: u64, change: Change) {
        let replica = &self.manager(machine).replica;
        if replica.is_leader() {
            self.take_change(machine, id, None, change);
        } else if let Some(leader) = replica.leader() {
            self.send(machine, leader.machine(), Message::Change { id, change });
        }
    }

    /// A change is asked of this manager as the leader, by a request here or by another manager.
    pub(crate) fn take_change(
        &mut self,
        machine: MachineId,
        id: u64,
        from: Option<MachineId>,
        change: Change,
    ) {
        let now = self.now();
        let manager = self.manager(machine);
        if !manager.replica.is_leader() {
            if let Some(from) = from {
                self.send(machine, from, Message::Changed { id, verdict: Verdict::NotTaken });
            }
            return;
        }
        let is_known = |pending: &Pending| pending.id == id && pending.change == change;
        if !manager.changes.queue.iter().any(is_known) {
            let asker = from.map_or(Asker::Own, Asker::Manager);
            let pending = Pending { id, asker, change, since: now, asked_round: None };
            manager.changes.queue.push_back(pending);
        }
    }

    /// Goes on with what is asked of the leader.
    pub(crate) fn change_members(&mut self, machine: MachineId, out: &mut Vec<Outgoing>) {
        let now = self.now();
        let manager = self.manager(machine);
        if !manager.replica.is_leader() {
            let queue = std::mem::take(&mut manager.changes.queue);
            manager.changes.is_noting = false;
            for pending in queue {
                if let Asker::Manager(from) = pending.asker {
                    let (id, verdict) = (pending.id, Verdict::NotTaken);
                    self.send(machine, from, Message::Changed { id, verdict });
                }
            }
            return;
        }
        self.look_for_retiring(machine, out);
        let own = self.manager(machine).replica.id().raft_id();
        loop {
            let manager = self.manager(machine);
            let Some(pending) = manager.changes.queue.front_mut() else { break };
            if let (Asker::Unnamed, Change::Remove(id)) = (&pending.asker, pending.change)
                && roles::unnamed(&manager.state, &[id.raft_id()], own).is_empty()
            {
                manager.changes.queue.pop_front(); // It was named meanwhile, and may be joining.
                continue;
            }
            let last = manager.replica.membership().clone();
            let verdict = pending.step(&mut manager.replica, now);
            if *manager.replica.membership() != last {
                let (change, next) = (pending.change, manager.replica.membership().clone());
                manager.replica.speak(now, out);
                self.note(format_args!("{machine} {change:?}: {next:?}"));
                break;
            }
            let Some(verdict) = verdict else { break };
            let Some(pending) = manager.changes.queue.pop_front() else { break };
            self.answer_change(machine, pending, verdict, out);
        }
        let manager = self.manager(machine);
        if !manager.changes.queue.is_empty() && !manager.changes.is_waiting {
            manager.changes.is_waiting = true;
            self.timer(machine, LOOK, Timer::Changes);
        }
    }

    fn answer_change(
        &mut self,
        machine: MachineId,
        pending: Pending,
        verdict: Verdict,
        out: &mut Vec<Outgoing>,
    ) {
        let id = pending.id;
        match pending.asker {
            Asker::Own => self.changed(machine, id, &verdict, out),
            Asker::Manager(from) => self.send(machine, from, Message::Changed { id, verdict }),
            Asker::Unnamed => self.note(format_args!(
                "{machine}: {:?}, which nobody names: {verdict:?}",
                pending.change
            )),
            Asker::Retiring(node) => {
                self.note(format_args!("{machine}: {} retires: {verdict:?}", node.hostname()));
                match (verdict, pending.change) {
                    (Verdict::Done, Change::MayRemove(_)) => {
                        self.manager(machine).replica.transfer_leadership(out);
                    }
                    (Verdict::Done, _) => self.note_retired(machine, &node, out),
                    _ => {} // It is tried again.
                }
            }
        }
    }

    /// As the leader: begins with the next manager that is to be a worker, or that no node names.
    fn look_for_retiring(&mut self, machine: MachineId, out: &mut Vec<Outgoing>) {
        let (now, id) = (self.now(), self.next_id());
        let manager = self.manager(machine);
        let changes = &mut manager.changes;
        let is_own =
            |pending: &Pending| matches!(pending.asker, Asker::Retiring(_) | Asker::Unnamed);
        let is_busy = changes.is_noting || changes.queue.iter().any(is_own);
        let Some(leader) = manager.leader.as_ref().filter(|_| !is_busy) else { return };
        if changes.retires_at.is_some_and(|at| now < at) {
            return;
        }
        changes.retires_at = Some(now.after(LOOK));
        let own = manager.replica.id();
        let Some(node) =
            roles::retiring(&leader.state).first().map(|node| Arc::new(Node::clone(node)))
        else {
            let members = manager.replica.membership().members();
            let members: Vec<u64> = members.iter().map(|id| id.raft_id()).collect();
            let unnamed = roles::unnamed(&leader.state, &members, own.raft_id());
            if let Some(raft_id) = unnamed.first() {
                let change = Change::Remove(ManagerId::of_raft_id(*raft_id));
                let asker = Asker::Unnamed;
                changes.queue.push_back(Pending {
                    id,
                    asker,
                    change,
                    since: now,
                    asked_round: None,
                });
            }
            return;
        };
        let change = match roles::retirement(&node, own.raft_id()) {
            Retirement::TransferLeadership => Change::MayRemove(own),
            Retirement::TakeOut { raft_id } => Change::Remove(ManagerId::of_raft_id(raft_id)),
            Retirement::Note => return self.note_retired(machine, &node, out),
        };
        let asker = Asker::Retiring(node);
        let pending = Pending { id, asker, change, since: now, asked_round: None };
        changes.queue.push_back(pending);
    }

    /// It is out of the Raft group.
    fn note_retired(&mut self, machine: MachineId, node: &Node, out: &mut Vec<Outgoing>) {
        let (now, clock) = (self.now(), self.machines[machine].clock(self.now()));
        let id = self.next_id();
        let object = Object::Node(Box::new(roles::retired(node)));
        let expect = Expect::Version(node.meta.version);
        let command = Arc::new(Command::new(clock, vec![Action::Put { object, expect }]));
        let (level, state) = (command.level, self.manager(machine).state.clone());
        self.see(&Seen::Proposed { manager: machine, level, state });
        let manager = self.manager(machine);
        manager.replica.append(Payload::Command { id, command });
        manager.replica.speak(now, out);
        manager.waiting.insert(id, Waiter::Retirement);
        manager.changes.is_noting = true;
    }
}
