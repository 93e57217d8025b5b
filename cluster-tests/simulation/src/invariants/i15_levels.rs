//! 15. No manager is sent or applies what its program does not know, and no command has a higher format level than the
//!     lowest of the managers in the state that it was decided on; and when all has come to rest, the state says of every
//!     machine what its program knows.

use skep_manager_core::command::FORMAT_LEVEL;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

pub(super) struct Levels;

/// Which machine's program is not the newest, or is not what the state says of it; `Ok` where there is none.
pub(crate) fn levels_rest(world: &World) -> Result<(), String> {
    for (id, machine) in world.machines.iter().enumerate() {
        let known = machine.level;
        ensure!(known == FORMAT_LEVEL, "{id} still has the program of level {known}");
        let said = world.ledger.node(machine.node_id).and_then(|node| node.description.as_ref());
        let said = said.map(|said| said.format_level);
        ensure!(said == Some(known), "{id} knows {known}, and the state says {said:?}");
    }
    Ok(())
}

impl Invariant for Levels {
    fn name(&self) -> &'static str {
        "15: no manager meets a format level that its program does not know"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Sent { manager, level } => {
                let known = world.machines[*manager].level;
                ensure!(*level <= known, "{manager}, which knows {known}, is sent level {level}");
            }
            Seen::Applied { manager, level, .. } | Seen::Restored { manager, level, .. } => {
                let known = world.machines[*manager].level;
                ensure!(*level <= known, "{manager}, which knows {known}, applies level {level}");
            }
            Seen::Proposed { manager, level, state } => {
                let own = &world.machines[*manager];
                for node in state.nodes().values().filter(|node| node.manager_status.is_some()) {
                    let said = node.description.as_ref().map_or(0, |said| said.format_level);
                    // Who proposes knows of itself what it has not told yet.
                    let known = if node.id == own.node_id { own.level } else { said.max(1) };
                    ensure!(
                        *level <= known,
                        "{manager} proposes level {level} while a manager knows {known}: {:?}",
                        node.hostname()
                    );
                }
            }
            Seen::AtRest { .. } => levels_rest(world)?,
            _ => {}
        }
        Ok(())
    }
}
