//! 6. A secret is on no node without a task that uses it: nobody is told it but for a task of his that has
//!    not ended, and an agent has in memory what its tasks use and nothing else.

use std::collections::BTreeSet;

use skep_common::{Kind, Task, TaskState};
use skep_manager_core::secrets::PayloadKey;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

pub(super) struct Secrets;

/// What a task finds as files.
fn used_by(task: &Task) -> impl Iterator<Item = PayloadKey> {
    let container = task.spec.container_spec.as_ref();
    let secrets = container.and_then(|container| container.secrets.as_ref());
    secrets.into_iter().flatten().filter_map(|secret| {
        let (id, version) = (secret.secret_id?.0, secret.version?);
        Some(PayloadKey { kind: Kind::Secret, id, version })
    })
}

impl Invariant for Secrets {
    fn name(&self) -> &'static str {
        "6: a secret is on no node without a task that uses it"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Told { node_id, payloads, state, .. } if !payloads.is_empty() => {
                let is_alive = |task: &Task| {
                    task.node_id == Some(*node_id)
                        && task.status.state >= TaskState::Assigned
                        && !task.status.state.is_terminal()
                };
                let alive = state.tasks().values().filter(|task| is_alive(task));
                let used: BTreeSet<PayloadKey> = alive.flat_map(|task| used_by(task)).collect();
                let unused = payloads.difference(&used).next();
                ensure!(
                    unused.is_none(),
                    "{node_id} is told {unused:?}, and no task of it uses that"
                );
            }
            Seen::Accepted { machine, .. } => {
                let agent = &world.machines[*machine].agent;
                let held = agent.held.values();
                let used: BTreeSet<PayloadKey> =
                    held.flat_map(|held| used_by(&held.task)).collect();
                let unused = agent.payloads.difference(&used).next();
                ensure!(unused.is_none(), "machine {machine} keeps {unused:?} for no task");
            }
            _ => {}
        }
        Ok(())
    }
}
