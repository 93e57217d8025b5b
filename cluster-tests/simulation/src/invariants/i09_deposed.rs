//! 9. No assignment of a deposed leader takes effect, and no term has two leaders.

use std::collections::BTreeMap;

use super::{Invariant, ensure};
use crate::message::MachineId;
use crate::seen::Seen;
use crate::world::World;

#[derive(Default)]
pub(super) struct Deposed {
    leaders: BTreeMap<u64, MachineId>,
    /// The highest term whose assignments a machine took.
    obeyed: BTreeMap<MachineId, u64>,
}

impl Invariant for Deposed {
    fn name(&self) -> &'static str {
        "9: no assignment of a deposed leader takes effect"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Led { manager, term } => {
                let first = *self.leaders.entry(*term).or_insert(*manager);
                ensure!(first == *manager, "{first} and {manager} lead in term {term}");
            }
            Seen::Accepted { machine, term, what } => {
                let obeyed = self.obeyed.entry(*machine).or_default();
                ensure!(*term >= *obeyed, "{machine} obeys term {term} after term {obeyed}");
                *obeyed = *term;
                for one in what.tasks.iter().flat_map(|message| &message.changes.tasks) {
                    let version = one.task.meta.version;
                    let is_agreed = version <= world.ledger.version();
                    ensure!(
                        is_agreed,
                        "{machine} is told of {}, which nobody committed",
                        one.task.name()
                    );
                }
            }
            _ => {}
        }
        Ok(())
    }
}
