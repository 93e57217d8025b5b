//! 14. What is committed is on the disks of a majority of the voters, whoever else has it; and when all has come to
//!     rest, each node has the role that the state says, and the voters are the managers of the state.

use std::collections::BTreeSet;

use skep_common::spec::NodeRole;

use super::{Invariant, ensure};
use crate::membership::ManagerId;
use crate::seen::Seen;
use crate::world::World;

pub(super) struct Members;

/// What of the managers is not as the state says; `Ok` where all is.
pub(crate) fn managers_rest(world: &World) -> Result<(), String> {
    let mut managers: BTreeSet<ManagerId> = BTreeSet::new();
    let nodes = world.machines.iter().filter_map(|machine| world.ledger.node(machine.node_id));
    let n_managers = nodes.filter(|node| node.observed_role() == NodeRole::Manager).count();
    for (id, machine) in world.machines.iter().enumerate() {
        let Some(node) = world.ledger.node(machine.node_id) else {
            return Err(format!("{id} is no member"));
        };
        let (asked, observed) = (node.spec.role, node.observed_role());
        // The last one stays, whatever it is asked, and says so: those that were to follow it were removed before.
        let is_last = observed == NodeRole::Manager && n_managers == 1;
        ensure!(
            asked == observed || is_last,
            "{id} is asked to be a {} and is none yet",
            asked.name()
        );
        let plays = world.role(id);
        let (is, said) = (plays.name(), observed.name());
        ensure!(plays == observed, "{id} plays the {is}, the state says {said}");
        let noted =
            node.manager_status.as_ref().map(|status| ManagerId::of_raft_id(status.raft_id));
        ensure!(noted.is_some() == (observed == NodeRole::Manager), "{id} is noted as {noted:?}");
        let own = machine.manager.as_ref().map(|manager| manager.replica.id());
        ensure!(own == noted, "{id} is {own:?}, and noted as {noted:?}");
        managers.extend(noted);
    }
    for id in &managers {
        let Some(manager) = &world.machines[id.machine()].manager else { continue };
        let membership = manager.replica.membership();
        ensure!(
            !membership.is_joint(),
            "{id:?} knows of a change that is half done: {membership:?}"
        );
        let is_exact = membership.voters() == managers && *membership.members() == managers;
        ensure!(is_exact, "the managers are {managers:?}, and {id:?} knows of {membership:?}");
    }
    Ok(())
}

impl Invariant for Members {
    fn name(&self) -> &'static str {
        "14: a majority of the voters decides, and those are the managers of the state"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Applied { manager, term, state, .. }
                if state.version() == world.ledger.version() =>
            {
                let index = state.version().index;
                let Some(applying) = &world.machines[*manager].manager else { return Ok(()) };
                let has_it = |id: ManagerId| {
                    let machine = world.machines.get(id.machine());
                    let replica =
                        machine.and_then(|one| one.manager.as_ref()).map(|one| &one.replica);
                    replica.is_some_and(|one| one.id() == id && one.has_synced(index, *term))
                };
                // A leader counts by what its log says last, which the applying one may know already.
                let mut memberships = applying.replica.memberships_from(index);
                ensure!(
                    memberships.any(|membership| membership.is_quorum(has_it)),
                    "entry {index} is committed, and no majority of {:?} has it",
                    applying.replica.membership()
                );
            }
            Seen::AtRest { .. } => managers_rest(world)?,
            _ => {}
        }
        Ok(())
    }
}
