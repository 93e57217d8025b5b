//! 7. The balancer's set is of tasks that are running, healthy and not draining, as of the table that the
//!    node last applied; and a task is told to stop only when no node that is not down balances to it, or
//!    each of them had its time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use skep_common::limits::DRAIN_ACK_WAIT;
use skep_common::object::NodeState;
use skep_common::{NodeId, TaskId, TaskState, Timestamp};
use skep_manager_core::endpoints::Table;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

#[derive(Default)]
pub(super) struct Balancer {
    /// The tables of each term, by number.
    tables: BTreeMap<(u64, u64), Arc<Table>>,
    /// When a task left the newest table of a term.
    withdrawn: BTreeMap<(u64, TaskId), Timestamp>,
}

fn backends(table: &Table) -> BTreeSet<TaskId> {
    table.ports.values().flat_map(|port| port.backends.keys().copied()).collect()
}

impl Invariant for Balancer {
    fn name(&self) -> &'static str {
        "7: connections go to tasks that run, are healthy and are not draining"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Tabled { term, version, table, state, silent } => {
                for task_id in backends(table) {
                    let Some(task) = state.task(task_id) else {
                        return Err(format!("{task_id} is balanced to and is not there"));
                    };
                    let is_sound = task.status.state == TaskState::Running
                        && !task.status.unhealthy
                        && task.desired_state == TaskState::Running
                        && task.node_id.is_some_and(|node_id| !silent.contains(&node_id));
                    ensure!(
                        is_sound,
                        "table {version} balances to {}: {:?}",
                        task.name(),
                        task.status
                    );
                }
                let now = world.now();
                let last = self.tables.range(..(*term, *version)).next_back();
                let last = last.filter(|((of, _), _)| of == term).map(|(_, table)| backends(table));
                let current = backends(table);
                for gone in last.iter().flatten().filter(|id| !current.contains(id)) {
                    self.withdrawn.insert((*term, *gone), now);
                }
                self.withdrawn.retain(|(of, id), _| of != term || !current.contains(id));
                self.tables.insert((*term, *version), table.clone());
            }
            Seen::Programmed { machine } => {
                let kernel = &world.machines[*machine].agent.kernel;
                let table = self.tables.get(&(kernel.term, kernel.version));
                // A table that differs only in what other nodes see has no number of its own here.
                let is_same = table.is_none_or(|table| **table == *kernel.table.table);
                ensure!(is_same, "{machine} balances by another table than {}", kernel.version);
            }
            Seen::Told { term, what, .. } => {
                let tasks = what.tasks.iter().flat_map(|message| &message.changes.tasks);
                let stopping = tasks.filter(|one| !one.desired_state.wants_run());
                for task_id in stopping.map(|one| one.task.id) {
                    self.check_stop(world, *term, task_id)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl Balancer {
    fn check_stop(&self, world: &World, term: u64, task_id: TaskId) -> Result<(), String> {
        let now = world.now();
        let Some((id, leader)) = world.leaders().find(|(_, leader)| leader.term == term) else {
            return Ok(());
        };
        // What is in none of its tables was taken out by a leader before, and counts from its beginning.
        let since = self.withdrawn.get(&(term, task_id)).copied().unwrap_or(leader.began_at);
        // One that stops hears nothing new, whoever may balance to it by now.
        let mut agents = world.machines.iter().map(|machine| &machine.agent);
        let serves =
            agents.any(|agent| agent.running.contains(&task_id) && !agent.is_stopping(task_id));
        // A clock that jumped may have cut the wait short.
        let had_time = !serves
            || now >= since.after(DRAIN_ACK_WAIT)
            || !world.machines[id].is_calm(now, DRAIN_ACK_WAIT * 2);
        if had_time {
            return Ok(());
        }
        // A session that is newer has not been told the newest table yet, and is waited for all the same.
        let may_balance =
            leader.state.nodes().values().filter(|node| {
                matches!(node.status.state, NodeState::Ready | NodeState::Disconnected)
            });
        let waited_for: BTreeSet<NodeId> =
            leader.nodes().map(|(id, _)| id).chain(may_balance.map(|node| node.id)).collect();
        // One that was down was not waited for, and is told of the stop and of the table in its first message.
        let is_back = |node_id: NodeId| {
            let is_new = |(id, opened_at): (NodeId, Timestamp)| id == node_id && opened_at == now;
            let node = leader.state.node(node_id);
            node.is_some_and(|node| node.status.state == NodeState::Down)
                && leader.nodes().any(is_new)
        };
        for node_id in waited_for.into_iter().filter(|node_id| !is_back(*node_id)) {
            let Some(machine) = world.machine_of(node_id) else { continue };
            let kernel = &world.machines[machine].agent.kernel;
            let still = backends(&kernel.table.table).contains(&task_id);
            let node = leader.state.node(node_id).map(|node| node.status.state);
            let task = leader.state.task(task_id).map(|task| task.status.state);
            ensure!(
                !still,
                "{task_id} ({task:?}) is told to stop while {machine} ({node:?}) balances to it"
            );
        }
        Ok(())
    }
}
