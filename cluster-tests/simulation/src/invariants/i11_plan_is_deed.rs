//! 11. A plan is what is done when nothing changed between: what a leader decided is not refused then.

use std::collections::BTreeMap;

use skep_manager_core::Outcome;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

#[derive(Default)]
pub(super) struct PlanIsDeed {
    /// The version of the last entry that changed something.
    last_change: u64,
    /// The version of the view that each command of a leader was decided on.
    views: BTreeMap<u64, u64>,
}

impl Invariant for PlanIsDeed {
    fn name(&self) -> &'static str {
        "11: a plan is what is done when nothing changed between"
    }

    fn check(&mut self, _: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Decided { proposal, view } => {
                self.views.insert(*proposal, *view);
            }
            Seen::Committed { after, outcome, proposal, .. } => {
                let view = self.views.remove(proposal);
                if let (Outcome::Refused(refusal), Some(view)) = (outcome, view) {
                    let is_current = self.last_change <= view;
                    ensure!(
                        !is_current,
                        "a decision on the state that it met is refused: {refusal}"
                    );
                }
                if matches!(outcome, Outcome::Applied(_)) {
                    self.last_change = after.version().index;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
