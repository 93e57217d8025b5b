//! What a change does to slots: two states at rest, one without the change and one with it.

use std::collections::BTreeMap;
use std::sync::Arc;

use skep_common::object::Slot;
use skep_common::{ServiceId, Task, TaskId};

use super::{PlannedTask, WhatIf};
use crate::orchestrator::is_live;
use crate::store::State;

/// A place in a service; a task that no service made is one by itself.
type Place<'s> = (&'s str, ServiceId, Slot, Option<TaskId>);
type Places<'s> = BTreeMap<Place<'s>, Vec<&'s Arc<Task>>>;

/// Tasks that are to run, and have not ended.
fn places(state: &State) -> Places<'_> {
    let mut places = Places::new();
    for task in state.tasks().values() {
        if is_live(task) && !task.status.state.is_terminal() {
            let alone = task.standalone.as_ref().map(|_| task.id);
            let place = (task.service_name.as_str(), task.service_id, task.slot_key(), alone);
            places.entry(place).or_default().push(task);
        }
    }
    places
}

/// What `after` has that `without` has not, and the other way round. Tasks that `now` does not have were
/// made on the way, and have no id that would be known to anybody.
pub(super) fn between(now: &State, without: &State, after: &State) -> WhatIf {
    let (before, after) = (places(without), places(after));
    let none = Vec::new();
    let mut answer = WhatIf::default();
    let all = before.keys().chain(after.keys()).collect::<std::collections::BTreeSet<_>>();
    for place in all {
        let old = before.get(place).unwrap_or(&none);
        let new = after.get(place).unwrap_or(&none);
        compare(now, old, new, &mut answer);
    }
    answer
}

fn compare(now: &State, old: &[&Arc<Task>], new: &[&Arc<Task>], answer: &mut WhatIf) {
    let is_real = |task: &Task| now.task(task.id).is_some();
    let is_same = |one: &Task, other: &Task| {
        let are_made = !is_real(one) && !is_real(other);
        let are_one = one.id == other.id || (are_made && one.spec_version == other.spec_version);
        are_one && one.node_id == other.node_id
    };
    let mut new: Vec<&Arc<Task>> = new.to_vec();
    let mut gone = Vec::new();
    for task in old {
        match new.iter().position(|other| is_same(task, other)) {
            Some(index) => {
                new.remove(index);
            }
            None => gone.push(*task),
        }
    }
    let mut gone = gone.into_iter();
    for task in new {
        let old = gone.next();
        let planned = PlannedTask {
            service_id: task.service_id,
            name: task.name(),
            task_id: old.filter(|old| is_real(old)).map(|old| old.id),
            from: old.and_then(|old| old.node_id),
            to: task.node_id,
            reason: String::new(),
        };
        match (task.node_id, old) {
            (None, _) => {
                let reason = task.status.err.clone();
                answer.unplaced.push(PlannedTask { reason, ..planned });
            }
            (Some(_), None) => answer.created.push(planned),
            (Some(_), Some(_)) => answer.moved.push(planned),
        }
    }
    answer.stopped.extend(gone.map(|task| PlannedTask {
        service_id: task.service_id,
        name: task.name(),
        task_id: is_real(task).then_some(task.id),
        from: task.node_id,
        to: None,
        reason: String::new(),
    }));
}
