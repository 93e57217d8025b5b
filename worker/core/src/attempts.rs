//! What follows the end of a container while no manager leads.
//!
//! Managers replace a task that ended by another one, by its restart policy. Where none is in reach the node
//! runs the same task again, by the same policy; managers hear of it as an *attempt* when they are back, and
//! count it.

use std::time::Duration;

use skep_common::limits::{MAX_ATTEMPTS_COUNTED, defaults};
use skep_common::object::TaskStatus;
use skep_common::spec::{RestartCondition, RestartPolicy};
use skep_common::{Task, TaskState, Timestamp};

/// How long a node waits for a leader at least before it decides by itself: as long as leaders give a silent
/// node before they call it down and place its tasks elsewhere.
pub const LEADERLESS_AFTER: Duration = Duration::from_secs(3);

/// How long after the end of its container a task is tried again without managers; `None`: it is not.
///
/// `ended` is the state that the end would give it, `status` what came of it before. The limit of attempts
/// holds for this task alone: a node does not know those of its slot.
pub fn pause(
    task: &Task,
    status: &TaskStatus,
    ended: TaskState,
    now: Timestamp,
) -> Option<Duration> {
    // One that has not been started waits for managers, who may choose another node.
    let has_started = status.state >= TaskState::Starting;
    let is_done = task.job_iteration.is_some() && ended == TaskState::Complete;
    if !has_started || is_done || task.standalone.is_some() {
        return None;
    }
    let unset = RestartPolicy::default();
    let policy = task.spec.restart_policy.as_ref().unwrap_or(&unset);
    let is_wanted = match policy.condition.unwrap_or_default() {
        RestartCondition::None => false,
        RestartCondition::OnFailure => ended != TaskState::Complete,
        RestartCondition::Any => true,
    };
    let limit = limit(task);
    let window = policy.window.map(|window| window.duration()).filter(|window| !window.is_zero());
    let is_left = limit.is_none_or(|limit| status.attempts_within(window, now) < limit);
    let delay = policy.delay.map_or(defaults::RESTART_DELAY, |delay| delay.duration());
    (is_wanted && is_left).then(|| delay.max(LEADERLESS_AFTER))
}

/// The most attempts that the policy of a task allows, within its window where it has one; `None`: any number.
pub fn limit(task: &Task) -> Option<u64> {
    let limit = task.spec.restart_policy.as_ref().and_then(|policy| policy.max_attempts);
    limit.filter(|limit| (1..=MAX_ATTEMPTS_COUNTED).contains(limit))
}

#[cfg(test)]
mod tests {
    use skep_common::object::{Attempt, Standalone};
    use skep_common::spec::{Nanos, TaskSpec};
    use skep_common::{Meta, ServiceId, TaskId, Version};

    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000_000_000);

    fn task(policy: RestartPolicy) -> Task {
        let spec = TaskSpec { restart_policy: Some(policy), ..TaskSpec::default() };
        Task {
            id: TaskId(7),
            meta: Meta::default(),
            spec: spec.into(),
            spec_version: Version::default(),
            service_id: ServiceId(1),
            slot: 1,
            node_id: None,
            status: TaskStatus::default(),
            desired_state: TaskState::Running,
            networks_attachments: Vec::new(),
            service_name: "web".into(),
            start_after: None,
            host_ports: Vec::new(),
            standalone: None,
            job_iteration: None,
            preset_node: None,
            assigned_generic_resources: Vec::new(),
            service_labels: None,
        }
    }

    fn status(state: TaskState, n_attempts: u32) -> TaskStatus {
        let mut status = TaskStatus { state, ..TaskStatus::default() };
        for _ in 0..n_attempts {
            status.note_attempt(Attempt { ended_at: NOW, ..Attempt::default() }, 0);
        }
        status
    }

    #[test]
    fn the_restart_policy_holds_without_managers() {
        use RestartCondition::{Any, None as Never, OnFailure};
        use TaskState::{Complete, Failed, Preparing, Running, Starting};
        let seconds = Duration::from_secs;
        let policy = |condition, delay: u64, max_attempts| RestartPolicy {
            condition: Some(condition),
            delay: Some(Nanos::from(seconds(delay))),
            max_attempts: Some(max_attempts),
            ..RestartPolicy::default()
        };
        for (name, policy, reached, n_attempts, ended, expect) in [
            ("the defaults", RestartPolicy::default(), Running, 9, Failed, Some(seconds(5))),
            ("a long delay", policy(Any, 60, 0), Running, 0, Complete, Some(seconds(60))),
            (
                "a leader may be elected",
                policy(Any, 0, 0),
                Running,
                0,
                Failed,
                Some(LEADERLESS_AFTER),
            ),
            ("never", policy(Never, 5, 0), Running, 0, Failed, None),
            ("it did what it should", policy(OnFailure, 5, 0), Running, 0, Complete, None),
            ("it failed", policy(OnFailure, 5, 0), Running, 0, Failed, Some(seconds(5))),
            ("attempts are left", policy(Any, 5, 2), Running, 1, Failed, Some(seconds(5))),
            ("attempts are used up", policy(Any, 5, 2), Running, 2, Failed, None),
            ("a limit that is none", policy(Any, 5, 101), Running, 101, Failed, Some(seconds(5))),
            ("before its first check", policy(Any, 5, 0), Starting, 0, Failed, Some(seconds(5))),
            ("it was not started yet", policy(Any, 5, 0), Preparing, 0, Failed, None),
        ] {
            let pause = pause(&task(policy), &status(reached, n_attempts), ended, NOW);
            assert_eq!(pause, expect, "{name}");
        }
    }

    #[test]
    fn jobs_that_are_done_and_single_containers_are_not_tried_again() {
        let job =
            Task { job_iteration: Some(Version::default()), ..task(RestartPolicy::default()) };
        let running = status(TaskState::Running, 0);
        assert_eq!(pause(&job, &running, TaskState::Complete, NOW), None);
        assert!(pause(&job, &running, TaskState::Failed, NOW).is_some());
        let single = Task {
            standalone: Some(Standalone { auto_remove: false }),
            ..task(RestartPolicy::default())
        };
        assert_eq!(pause(&single, &running, TaskState::Failed, NOW), None);
    }
}
