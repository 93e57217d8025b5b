//! 5. State and desired state of a task only grow, and a task is never moved.

use skep_common::{Kind, TaskId};

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

pub(super) struct OnlyGrows;

impl Invariant for OnlyGrows {
    fn name(&self) -> &'static str {
        "5: task state only grows"
    }

    fn check(&mut self, _: &World, seen: &Seen) -> Result<(), String> {
        let Seen::Committed { before, after, changes, .. } = seen else { return Ok(()) };
        for change in changes.iter().filter(|change| change.kind == Kind::Task) {
            let id = TaskId(change.id);
            let (Some(old), Some(new)) = (before.task(id), after.task(id)) else { continue };
            let (was, is) = (old.status.state, new.status.state);
            ensure!(is >= was, "{id} falls from {was} to {is}");
            let (was, is) = (old.desired_state, new.desired_state);
            ensure!(is >= was, "the desired state of {id} falls from {was} to {is}");
            let is_moved = old.node_id.is_some() && old.node_id != new.node_id;
            ensure!(!is_moved, "{id} is moved from {:?} to {:?}", old.node_id, new.node_id);
            let has_moved_address = old.node_id.is_some()
                && !old.networks_attachments.is_empty()
                && old.networks_attachments != new.networks_attachments;
            ensure!(!has_moved_address, "the addresses of {id} change while it has a node");
        }
        Ok(())
    }
}
