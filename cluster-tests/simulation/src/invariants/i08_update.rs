//! 8. A rolling update keeps at least replicas − parallelism healthy, and with start-first all of them,
//!    while nothing else goes wrong.

use std::collections::BTreeMap;

use skep_common::{ServiceId, TaskState};
use skep_manager_core::State;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

/// Services that were whole when their update began, with how many tasks must go on.
#[derive(Default)]
pub(super) struct Update {
    promised: BTreeMap<ServiceId, u64>,
}

fn n_healthy(state: &State, service_id: ServiceId) -> u64 {
    let is_healthy = |task: &&std::sync::Arc<skep_common::Task>| {
        task.status.state == TaskState::Running
            && task.desired_state == TaskState::Running
            && !task.status.unhealthy
    };
    let mut slots: Vec<u64> =
        state.tasks_of_service(service_id).filter(is_healthy).map(|task| task.slot).collect();
    slots.dedup();
    slots.len() as u64
}

impl Invariant for Update {
    fn name(&self) -> &'static str {
        "8: a rolling update keeps at least replicas - parallelism healthy"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        let Seen::Committed { before, after, .. } = seen else { return Ok(()) };
        if !world.is_quiet {
            self.promised.clear();
            return Ok(());
        }
        for service in after.services().values() {
            let state = |state: &State| {
                let service = state.service(service.id)?;
                Some(service.update_status.as_ref()?.state.clone())
            };
            let is_updating = state(after).is_some_and(|state| state == "updating");
            if !is_updating {
                self.promised.remove(&service.id);
                continue;
            }
            let healthy = n_healthy(after, service.id);
            let replicas = service.spec.replicas().unwrap_or(0);
            let has_begun = state(before).is_some_and(|state| state == "updating");
            if !has_begun && n_healthy(before, service.id) == replicas {
                let config = service.spec.update_config.as_ref();
                let is_start_first =
                    config.is_some_and(|config| config.order.as_deref() == Some("start-first"));
                let parallelism = config.and_then(|config| config.parallelism).unwrap_or(1);
                let spared = if is_start_first { 0 } else { parallelism };
                self.promised.insert(service.id, replicas.saturating_sub(spared));
            }
            if let Some(promised) = self.promised.get(&service.id) {
                let name = &service.spec.name;
                ensure!(
                    healthy >= *promised,
                    "{name} has {healthy} healthy tasks, {promised} are promised"
                );
            }
        }
        Ok(())
    }
}
