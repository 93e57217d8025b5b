//! 11. A plan is what is done when nothing changed between: it is not refused, and planning once more on
//!     its result gives nothing.

use std::collections::BTreeMap;

use skep_manager_core::Outcome;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

#[derive(Default)]
pub(super) struct PlanIsDeed {
    /// The version of the view that each version follows without any change in between.
    last_change: u64,
    planned_on: BTreeMap<usize, u64>,
}

impl Invariant for PlanIsDeed {
    fn name(&self) -> &'static str {
        "11: a plan is what is done when nothing changed between"
    }

    fn check(&mut self, _: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Planned { state, actions, .. } => {
                self.planned_on.insert(actions.as_ptr() as usize, state.version().index);
                self.planned_on.clear();
            }
            Seen::Committed { after, outcome: Outcome::Applied(_), .. } => {
                self.last_change = after.version().index;
            }
            _ => {}
        }
        ensure!(self.planned_on.is_empty(), "unreachable");
        Ok(())
    }
}
