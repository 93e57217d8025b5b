//! 2. At most one unfenced running task per slot once a partition has healed.

use std::collections::BTreeMap;
use std::time::Duration;

use skep_common::object::{self, NodeState};
use skep_common::{ServiceId, TaskId, Version};

use super::{Invariant, ensure};
use crate::agent::Link;
use crate::machine::Machine;
use crate::seen::Seen;
use crate::world::World;

/// After this a node that was cut off has been told, has withdrawn and has stopped what was replaced.
const HEAL_WAIT: Duration = Duration::from_secs(20);

/// With start-first updates there may be one of each spec.
type Slot = (ServiceId, object::Slot, Option<Version>);

pub(super) struct OnePerSlot;

impl Invariant for OnePerSlot {
    fn name(&self) -> &'static str {
        "2: at most one running task per slot once a partition has healed"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        if !matches!(seen, Seen::Second | Seen::Started) {
            return Ok(());
        }
        let Some((_, leader)) = world.leaders().max_by_key(|(_, leader)| leader.term) else {
            return Ok(());
        };
        let now = world.now();
        let is_healed = |machine: &Machine| {
            let is_open =
                matches!(machine.agent.link, Link::Open { term, .. } if term == leader.term);
            let node = world.ledger.node(machine.node_id);
            let is_member = node.is_some_and(|node| node.status.state == NodeState::Ready);
            is_member
                && is_open
                && machine.is_calm(now, HEAL_WAIT)
                && now >= machine.session_since.after(HEAL_WAIT)
        };
        check_slots(world, is_healed)
    }
}

/// Counts the containers of each slot on the machines that count.
pub(super) fn check_slots(
    world: &World,
    is_healed: impl Fn(&Machine) -> bool,
) -> Result<(), String> {
    let mut slots: BTreeMap<Slot, Vec<TaskId>> = BTreeMap::new();
    for machine in world.machines.iter().filter(|machine| is_healed(machine)) {
        for task_id in &machine.agent.running {
            let Some(held) = machine.agent.held.get(task_id) else {
                return Err(format!("{task_id} runs and nobody holds it"));
            };
            let task = &held.task;
            let is_start_first = world.ledger.service(task.service_id).is_some_and(|service| {
                let config = service.spec.update_config.as_ref();
                config.is_some_and(|config| config.order.as_deref() == Some("start-first"))
            });
            // With start-first the old one stops only when the new one runs.
            let is_told_to_stop = !task.desired_state.wants_run();
            if task.standalone.is_none() && !(is_start_first && is_told_to_stop) {
                let of_spec = is_start_first.then_some(task.spec_version);
                let tasks = slots.entry((task.service_id, task.slot_key(), of_spec)).or_default();
                tasks.push(*task_id);
                ensure!(
                    tasks.len() == 1,
                    "{} of {tasks:?} run in one slot of {}",
                    tasks.len(),
                    task.name()
                );
            }
        }
    }
    Ok(())
}
