//! 1. An acknowledged spec is never lost, and versions never go back.

use std::collections::BTreeSet;

use skep_common::{Kind, NetworkId, NodeId, ServiceId, TaskId, Version};
use skep_manager_core::State;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

#[derive(Default)]
pub(super) struct Acknowledged {
    /// What clients were told, in that order: the object and the version that their write gave it.
    granted: Vec<(Kind, u128, u64)>,
    /// Objects that were erased; ids are not used again.
    erased: BTreeSet<(Kind, u128)>,
}

fn version_of(state: &State, kind: Kind, id: u128) -> Option<Version> {
    match kind {
        Kind::Service => state.service(ServiceId(id)).map(|one| one.meta.version),
        Kind::Network => state.network(NetworkId(id)).map(|one| one.meta.version),
        Kind::Node => state.node(NodeId(id)).map(|one| one.meta.version),
        Kind::Task => state.task(TaskId(id)).map(|one| one.meta.version),
        _ => None,
    }
}

impl Acknowledged {
    /// Whether a state has what was granted, or something later of that object.
    fn holds(&self, state: &State, (kind, id, index): (Kind, u128, u64)) -> Result<(), String> {
        let at = state.version().index;
        ensure!(at >= index, "a view is at {at}, but {index} was acknowledged before");
        let is_erased = self.erased.contains(&(kind, id));
        match version_of(state, kind, id) {
            Some(version) => ensure!(
                version.index >= index,
                "{kind:?} {id:x} is at version {version}, but {index} was acknowledged"
            ),
            None => ensure!(
                is_erased,
                "{kind:?} {id:x} of version {index} was acknowledged and is lost"
            ),
        }
        Ok(())
    }
}

impl Invariant for Acknowledged {
    fn name(&self) -> &'static str {
        "1: an acknowledged spec is never lost, and versions never go back"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Committed { before, after, changes, .. } => {
                for change in changes {
                    let old = version_of(before, change.kind, change.id);
                    let new = version_of(after, change.kind, change.id);
                    if new.is_none() {
                        self.erased.insert((change.kind, change.id));
                    }
                    let falls = matches!((old, new), (Some(old), Some(new)) if new <= old);
                    ensure!(
                        !falls,
                        "the version of {:?} {:x} does not grow",
                        change.kind,
                        change.id
                    );
                }
            }
            Seen::Granted { kind, id, index } => {
                self.granted.push((*kind, *id, *index));
                self.holds(&world.ledger, (*kind, *id, *index))?;
            }
            // Whoever asks after an acknowledgement sees what was acknowledged.
            Seen::Read { state, n_granted } => {
                for granted in self.granted.iter().take(*n_granted) {
                    self.holds(state, *granted)?;
                }
            }
            Seen::AtRest { .. } => {
                for granted in &self.granted {
                    self.holds(&world.ledger, *granted)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
