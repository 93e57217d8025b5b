//! 15. No manager is sent or applies what its program does not know, and no command has a higher format level than
//!     the managers in the state that it was decided on know and said, but where that state is of that level already;
//!     and when all has come to rest, the state says of every machine what its program knows.

use skep_manager_core::State;
use skep_manager_core::command::FORMAT_LEVEL;

use super::{Invariant, ensure};
use crate::message::MachineId;
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
                check_proposal(world, *manager, *level, state)?;
            }
            Seen::AtRest { .. } => levels_rest(world)?,
            _ => {}
        }
        Ok(())
    }
}

fn check_proposal(world: &World, by: MachineId, level: u32, state: &State) -> Result<(), String> {
    for node in state.nodes().values().filter(|node| node.manager_status.is_some()) {
        let name = node.hostname();
        let machine = world.machine_of(node.id).map(|id| &world.machines[id]);
        let known = machine.map_or(level, |machine| machine.level);
        ensure!(level <= known, "{by} proposes level {level}, and {name:?} knows {known}");
        // Who proposes knows of itself what it has not told yet; and what follows from what is there waits for nobody.
        let said = node.description.as_ref().map_or(1, |said| said.format_level.max(1));
        let is_said = level <= said || node.id == world.machines[by].node_id;
        ensure!(
            is_said || level <= state.level(),
            "{by} proposes level {level}, and {name:?} has said that it knows {said}"
        );
    }
    Ok(())
}
