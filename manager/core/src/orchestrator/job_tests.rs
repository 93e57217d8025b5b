//! Tables and stories of jobs.

use std::time::Duration;

use skep_common::object::{JobStatus, TaskStatus};
use skep_common::spec::{ReplicatedJob, RestartCondition, RestartPolicy, ServiceMode};
use skep_common::{Object, Service, TaskId, TaskState, Version};

use crate::store::State;
use crate::testing::{World, parse_node, service};

/// A job; the tables' words are of its iteration, which is the first write's version.
fn with_mode(mode: ServiceMode) -> Service {
    let mut service = service(0);
    service.spec.mode = Some(mode);
    service.job_status = Some(JobStatus::default());
    service
}

fn job(total: u64, concurrent: u64) -> Service {
    with_mode(ServiceMode {
        replicated_job: Some(ReplicatedJob {
            total_completions: Some(total),
            max_concurrent: Some(concurrent),
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn global_job() -> Service {
    with_mode(ServiceMode { global_job: Some(Default::default()), ..Default::default() })
}

fn with_attempts(mut service: Service, condition: RestartCondition, max_attempts: u64) -> Service {
    service.spec.task_template.restart_policy = Some(RestartPolicy {
        condition: Some(condition),
        max_attempts: Some(max_attempts),
        ..RestartPolicy::default()
    });
    service
}

#[test]
fn jobs_run_to_their_number_and_never_beyond_the_concurrency() {
    for (name, total, concurrent, nodes, tasks, expect) in [
        ("as many as may run at once", 3, 2, "1 2", "", "+0@1 +1@2"),
        ("no more than there are", 2, 5, "1 2", "", "+0@1 +1@2"),
        ("one that is done makes room", 3, 2, "1", "0@1:complete 1@1:running", "+2@1"),
        ("all are done", 2, 2, "1", "0@1:complete 1@1:complete", ""),
        ("gaps come first", 4, 2, "1", "1@1:complete 2@1:running", "+0@1"),
        ("one that failed keeps its place", 3, 1, "1", "0@1:failed", "!1 +0@1>ready"),
        ("what waits for a node counts", 3, 1, "", "0@-:pending", "1?"),
        ("a node that is down: at once", 1, 1, "1:down 2", "0@1:running", "!1 +0@2"),
        ("but not what was done there", 1, 1, "1:down 2", "0@1:complete", ""),
        ("nor on one that is gone", 1, 1, "2", "0@1:complete", ""),
        ("a drained node: once it stopped", 2, 1, "1:drain 2", "0@1:running", "!1 +0@2>ready"),
        ("what still stops counts", 2, 1, "1", "0@1:complete 1@1:running>shutdown 1@1:ready", ""),
        ("done while it was to be stopped", 1, 1, "1", "0@1:complete>shutdown", ""),
        (
            "and then its successor is not needed",
            1,
            1,
            "1",
            "0@1:complete>shutdown 0@1:starting",
            "!2",
        ),
    ] {
        World::new(nodes, job(total, concurrent), tasks).expect_step(name, expect);
    }
}

#[test]
fn the_restart_policy_ends_a_job() {
    use RestartCondition::{Any, None, OnFailure};
    for (name, condition, max_attempts, tasks, expect) in [
        ("none: it is over, the next has its place", None, 0, "0@1:failed", "!1 +1@1"),
        ("on failure", OnFailure, 0, "0@1:failed", "!1 +0@1>ready"),
        ("any is no more than that", Any, 0, "0@1:complete", "+1@1"),
        ("attempts are left", Any, 2, "0@1:failed>shutdown 0@1:failed", "!2 +0@1>ready"),
        ("none is left", Any, 1, "0@1:failed>shutdown 0@1:failed", "!2 +1@1"),
        ("it stays over", Any, 1, "0@1:failed>shutdown 0@1:failed>shutdown 1@1:complete", ""),
    ] {
        let job = with_attempts(job(2, 1), condition, max_attempts);
        World::new("1", job, tasks).expect_step(name, expect);
    }
}

#[test]
fn a_global_job_has_a_task_on_each_node_that_may_have_one() {
    for (name, nodes, tasks, expect) in [
        ("on all of them at once", "1 2 3:pause 4:drain 5:down", "", "+g1@1 +g2@2"),
        ("also on those that join later", "1 2", "g1@1:complete", "+g2@2"),
        ("a node that is down: no other takes it", "1:down 2", "g1@1:running g2@2:complete", "!1"),
        ("one that is back runs it", "1", "g1@1:shutdown", "+g1@1"),
        ("but not again", "1", "g1@1:complete", ""),
        ("what was done is kept", "1:drain 2:down", "g1@1:complete g2@2:complete", ""),
        ("but of a node that is gone", "1", "g1@1:complete g2@2:complete", "x2"),
        ("a failed one, after the delay", "1", "g1@1:failed", "!1 +g1@1>ready"),
    ] {
        World::new(nodes, global_job(), tasks).expect_step(name, expect);
    }
    let limited = with_attempts(global_job(), RestartCondition::Any, 1);
    World::new("1", limited, "g1@1:failed>shutdown g1@1:failed")
        .expect_step("attempts are counted on each node", "!2");
}

/// Workers obey: what is to run runs, what is to stop stops.
fn obey(world: &mut World) {
    for task in world.state.tasks().values().cloned().collect::<Vec<_>>() {
        let state = match task.desired_state {
            TaskState::Complete if task.node_id.is_some() => TaskState::Running,
            desired if !desired.wants_run() => TaskState::Shutdown,
            _ => continue,
        };
        if task.status.state < state {
            world.report(task.id, state);
        }
    }
}

#[test]
fn a_new_iteration_waits_for_the_old() {
    let mut world = World::new("1 2", job(6, 2), "");
    world.step();
    obey(&mut world);
    for _ in 0..2 {
        let running =
            |task: &&std::sync::Arc<skep_common::Task>| task.status.state == TaskState::Running;
        let first = world.state.tasks().values().filter(running).map(|task| (task.slot, task.id));
        let (_, first) = first.min().unwrap();
        world.report(first, TaskState::Complete);
        world.step();
        obey(&mut world);
    }
    let old = world.web().job_status.unwrap();
    let mut web = world.web();
    web.spec.task_template.force_update = Some(1);
    world.now = world.now.after(Duration::from_secs(1));
    world.replace(Object::Service(Box::new(web)));
    let new = world.web().job_status.unwrap();
    assert_eq!(new.job_iteration, world.web().spec_version);
    assert_eq!(new.last_execution, Some(world.now));
    assert!(new.job_iteration > old.job_iteration);
    let words = world.step();
    assert_eq!(words.matches('x').count(), 2, "what was done is forgotten: {words}");
    assert_eq!(words.matches('-').count(), 2, "what runs is stopped: {words}");
    assert_eq!(words.matches('+').count(), 0, "the rest waits: {words}");
    world.expect_settled("two still stop");
    let stopping = world.state.tasks().values().next().unwrap().id;
    world.report(stopping, TaskState::Shutdown);
    let words = world.step();
    assert_eq!(words.matches('+').count(), 1, "one has stopped, one may start: {words}");
    let started = world.state.tasks().values().filter(|task| task.desired_state.wants_run());
    let iterations: Vec<_> = started.map(|task| (task.slot, task.job_iteration)).collect();
    assert_eq!(iterations, [(0, Some(new.job_iteration))]);
}

#[test]
fn an_old_task_that_never_stops_is_not_waited_for_for_ever() {
    let mut world = World::new("1", job(1, 1), "5@1:running>remove");
    world.expect_step("it stops", "");
    let (at, _) = world.plan().deadline.unwrap();
    world.now = at;
    world.expect_step("it was told so long ago", "+0@1");
}

#[test]
fn an_iteration_is_told_by_the_spec_alone() {
    let mut world = World::new("1", job(1, 1), "");
    let begun = world.web().job_status.unwrap();
    assert_ne!(begun.job_iteration, Version::default());
    let web = world.web();
    world.replace(Object::Service(Box::new(web)));
    assert_eq!(world.web().job_status, Some(begun), "nothing changed");
    let bytes = world.state.encode();
    assert_eq!(State::decode(&bytes).unwrap().encode(), bytes, "a snapshot keeps it");
    let leaving = Service { pending_delete: true, ..world.web() };
    world.replace(Object::Service(Box::new(leaving)));
    let again = Service { pending_delete: false, ..world.web() };
    world.replace(Object::Service(Box::new(again)));
    assert!(world.web().job_status.unwrap().job_iteration > begun.job_iteration, "another one");

    let mut plain = service(1);
    plain.job_status = Some(begun);
    let world = World::new("1", plain, "");
    assert_eq!(world.web().job_status, None, "it is no job");
}

#[test]
fn a_job_that_is_rolled_back_begins_anew() {
    let mut world = World::new("1", job(1, 1), "0@1:complete");
    let mut web = world.web();
    web.previous_spec = Some(web.spec.clone());
    web.spec.task_template.force_update = Some(1);
    world.replace(Object::Service(Box::new(web)));
    world.expect_step("an update", "+0@1 x1");
    let web = world.web();
    let back = crate::service::rollback(&world.state, &web, web.meta.version, world.now).unwrap();
    world.apply(vec![back]);
    assert_eq!(world.web().update_status, None, "nothing would ever complete it");
    assert!(world.web().job_status.unwrap().job_iteration > web.job_status.unwrap().job_iteration);
}

#[test]
fn what_a_job_has_done_is_never_erased() {
    let tasks = "0@1:complete>shutdown ".to_owned() + &"0@1:failed>shutdown ".repeat(8);
    let mut world = World::new("1", job(1, 1), &tasks);
    world.step();
    assert!(world.state.task(TaskId(1)).is_some(), "it tells that the job is done");
    assert!(world.state.tasks().len() < 9, "the rest is history");
}

#[test]
fn a_node_that_is_up_again_ends_the_wait_of_a_global_job() {
    let mut world = World::new("1:down", global_job(), "g1@1:running");
    world.expect_step("down", "!1");
    let status =
        TaskStatus { timestamp: world.now, state: TaskState::Shutdown, ..TaskStatus::default() };
    world.replace(Object::Node(Box::new(parse_node("1"))));
    world.step();
    world.report(TaskId(1), status.state);
    world.step();
    obey(&mut world);
    let live = world.state.tasks().values().filter(|task| task.desired_state.wants_run());
    assert_eq!(live.count(), 1);
}

#[test]
fn what_a_job_has_done_on_a_node_that_is_removed_is_not_done_again() {
    let mut world = World::new("1 2", job(2, 1), "0@1:complete 1@1:running");
    let actions = crate::remove_node(&world.state, skep_common::NodeId(1), world.now);
    world.apply(actions);
    while !world.step().is_empty() {}
    let tasks = world.state.tasks_of_service(crate::testing::WEB);
    let states: Vec<_> = tasks.map(|task| (task.slot_key(), task.status.state)).collect();
    let in_slot = |slot: u64| -> Vec<TaskState> {
        let of_slot =
            states.iter().filter(|(key, _)| *key == skep_common::object::Slot::Replica(slot));
        of_slot.map(|(_, state)| *state).collect()
    };
    assert_eq!(in_slot(0), [TaskState::Complete], "{states:?}");
    assert!(in_slot(1).contains(&TaskState::Orphaned), "{states:?}");
    assert!(in_slot(1).contains(&TaskState::Assigned), "it is made good for: {states:?}");
}
