//! 16. A node without a leader tries a task no more often than its restart policy allows, and once all has come to rest
//!     the state has every attempt.

use skep_common::limits::MAX_ATTEMPTS_COUNTED;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

pub(super) struct Attempts;

impl Invariant for Attempts {
    fn name(&self) -> &'static str {
        "16: attempts without managers keep to the restart policy, and are counted"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        if !matches!(seen, Seen::Started | Seen::AtRest { .. }) {
            return Ok(());
        }
        for held in world.machines.iter().flat_map(|machine| machine.agent.held.values()) {
            let (task, n_made) = (&held.task, u64::from(held.status.n_attempts));
            let policy = task.spec.restart_policy.as_ref();
            let limit = policy.and_then(|policy| policy.max_attempts).unwrap_or(0);
            let is_limited = (1..=MAX_ATTEMPTS_COUNTED).contains(&limit);
            ensure!(
                !is_limited || n_made <= limit,
                "{} was tried again {n_made} times, {limit} are allowed",
                task.name()
            );
            let stored = world.ledger.task(task.id).filter(|_| matches!(seen, Seen::AtRest { .. }));
            if let Some(stored) = stored {
                ensure!(
                    stored.status.n_attempts == held.status.n_attempts,
                    "{} was tried again {n_made} times, and the state has {}",
                    task.name(),
                    stored.status.n_attempts
                );
            }
        }
        Ok(())
    }
}
