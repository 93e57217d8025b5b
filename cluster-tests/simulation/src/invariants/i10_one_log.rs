//! 10. Snapshot and log are the live state, byte for byte, on all managers; what was committed once
//!     stays committed.

use std::collections::BTreeMap;

use skep_manager_core::State;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

/// States are compared byte for byte at every entry whose index is a multiple of this.
const COMPARED_EVERY: u64 = 64;

#[derive(Default)]
pub(super) struct OneLog {
    /// What was applied first at each place.
    entries: BTreeMap<u64, (u64, Option<u64>)>,
    digests: BTreeMap<u64, String>,
}

impl OneLog {
    fn compare(&mut self, state: &State, who: &str) -> Result<(), String> {
        let (index, digest) = (state.version().index, state.digest());
        let first = self.digests.entry(index).or_insert_with(|| digest.clone());
        ensure!(
            *first == digest,
            "the state of {who} at {index} is not that of the first one there"
        );
        Ok(())
    }
}

impl Invariant for OneLog {
    fn name(&self) -> &'static str {
        "10: snapshot and log are the live state on all managers"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Applied { manager, term, proposal, state, .. } => {
                let index = state.version().index;
                let first = self.entries.entry(index).or_insert((*term, *proposal));
                let entry = (*term, *proposal);
                ensure!(
                    *first == entry,
                    "{manager} applies {entry:?} at {index}, where {first:?} was committed"
                );
                if index % COMPARED_EVERY == 0 {
                    self.compare(state, &format!("manager {manager}"))?;
                }
            }
            Seen::Restored { manager, state, .. } if state.version().index > 0 => {
                self.compare(state, &format!("the snapshot of manager {manager}"))?;
            }
            Seen::AtRest { .. } => {
                for id in world.managers() {
                    if let Some(manager) = &world.machines[id].manager {
                        self.compare(&manager.state, &format!("manager {id}"))?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
