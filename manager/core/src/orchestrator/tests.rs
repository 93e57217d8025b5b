//! Tables of one pass and, for what takes time, stories of several.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use skep_common::object::{Attempt, NetworkAttachment, NodeState, Slot, TaskStatus};
use skep_common::spec::{
    Availability, ContainerSpec, Nanos, RestartCondition, RestartPolicy, UpdateConfig,
};
use skep_common::{NetworkId, NodeId, Object, Service, Task, TaskId, TaskState};

use crate::command::{Action, TaskPatch};
use crate::image;
use crate::testing::{World, parse_node, service};

fn with_policy(mut service: Service, policy: RestartPolicy) -> Service {
    service.spec.task_template.restart_policy = Some(policy);
    service
}

/// Words of one pass over `web`, checked to settle in one step.
#[track_caller]
fn check(name: &str, replicas: u64, nodes: &str, tasks: &str, expect: &str) {
    World::new(nodes, service(replicas), tasks).expect_step(name, expect);
}

#[test]
fn replicated_converges_to_the_replica_count() {
    for (name, replicas, tasks, expect) in [
        ("a new service starts every slot", 3, "", "+1@1 +2@2 +3@3"),
        ("steady state proposes nothing", 2, "1@1:running 2@2:running", ""),
        ("a gap is filled before the end grows", 3, "1@1:running 3@2:running", "+2@3"),
        ("a second copy on a node goes first", 2, "1@1:running 2@1:running 3@2:running", "-2"),
        ("an unplaced slot goes before a placed one, whole", 1, "1@-:new 2@2:pending", "x1"),
        ("a slot that does not run goes before one that does", 1, "1@1:starting 2@2:running", "-1"),
        ("on a tie, low slots stay", 1, "1@1:running 2@2:running", "-2"),
        ("a slot mid-update goes whole", 1, "1@1:running 2@2:running 2@3:assigned", "-2 -3"),
        ("stopped tasks do not count", 1, "1@1:shutdown", "+1@1"),
        ("zero replicas remove all", 0, "1@1:running 2@2:running", "-1 -2"),
        ("a removed slot takes its history along", 0, "1@1:running 1@2:shutdown", "-1 x2"),
        (
            "a slot whose task still stops is started after it",
            1,
            "1@1:running>remove",
            "+1@1>ready",
        ),
    ] {
        check(name, replicas, "1 2 3", tasks, expect);
    }
}

#[test]
fn what_fails_is_replaced() {
    for (name, nodes, tasks, expect) in [
        ("a failed task, after the delay", "1 2", "1@1:failed", "!1 +1@1>ready"),
        ("a completed one too", "1 2", "1@1:complete", "!1 +1@1>ready"),
        ("an unhealthy one counts as failed", "1 2", "1@1:unhealthy", "!1 +1@1>ready"),
        ("a node that is down: at once", "1:down 2", "1@1:running", "!1 +1@2"),
        ("a node that is gone: its task is lost", "2", "1@1:running", "!1 +1@2"),
        ("a drained node: once it has stopped", "1:drain 2", "1@1:running", "!1 +1@2>ready"),
        ("an unplaced task of no node is left", "", "1@-:pending", "1?"),
        ("a disconnected node keeps its tasks", "1:disconnected 2", "1@1:running", ""),
        ("a paused node keeps its tasks", "1:pause 2", "1@1:running", ""),
        ("a task that stops already is let be", "1:down 2", "1@1:running>shutdown 1@2:running", ""),
    ] {
        check(name, 1, nodes, tasks, expect);
    }
}

#[test]
fn tasks_on_overlays_leave_a_node_that_does_not_carry_them() {
    for (name, nodes, is_on_overlay, leaves) in [
        ("it carries them", "1:pause 2", true, false),
        ("it does not", "1:user-space 2", true, true),
        ("nor does a paused one, which cannot run it", "1:user-space:pause 2", true, true),
        ("others stay", "1:user-space 2", false, false),
        ("also while it is paused", "1:user-space:pause 2", false, false),
    ] {
        let mut world = World::new(nodes, service(1), "1@1:running");
        let mut task = Task::clone(world.state.task(TaskId(1)).unwrap());
        task.networks_attachments = vec![NetworkAttachment {
            ingress: !is_on_overlay,
            address: [10, 0, 1, 2].into(),
            prefix: 24,
            network_id: is_on_overlay.then_some(NetworkId(1)),
            ipv6: None,
            aliases: Vec::new(),
        }];
        world.replace(Object::Task(Box::new(task)));
        assert_eq!(world.step().starts_with("!1 "), leaves, "{name}");
    }
}

#[test]
fn the_restart_policy_decides() {
    let policy = |condition, max_attempts| RestartPolicy {
        condition: Some(condition),
        max_attempts: Some(max_attempts),
        ..RestartPolicy::default()
    };
    use RestartCondition::{Any, None, OnFailure};
    for (name, policy, tasks, expect) in [
        ("none", policy(None, 0), "1@1:failed", "!1"),
        ("on failure, failed", policy(OnFailure, 0), "1@1:failed", "!1 +1@1>ready"),
        ("on failure, completed", policy(OnFailure, 0), "1@1:complete", "!1"),
        ("attempts are left", policy(Any, 2), "1@1:failed>shutdown 1@1:failed", "!2 +1@1>ready"),
        ("none is left", policy(Any, 1), "1@1:failed>shutdown 1@1:failed", "!2"),
        (
            "another spec has its own",
            policy(Any, 1),
            "1@1:failed>shutdown~99 1@1:failed",
            "!2 +1@1>ready",
        ),
        ("a slot that ended stays", policy(None, 0), "1@1:complete>shutdown", ""),
    ] {
        World::new("1", with_policy(service(1), policy), tasks).expect_step(name, expect);
    }
}

#[test]
fn attempts_count_within_the_window() {
    let policy = RestartPolicy {
        max_attempts: Some(1),
        window: Some(Nanos::from(Duration::from_secs(60))),
        delay: Some(Nanos(0)),
        ..RestartPolicy::default()
    };
    let mut world = World::new("1", with_policy(service(1), policy), "");
    world.step();
    let fail = |world: &mut World, after_secs: u64| {
        world.now = world.now.after(Duration::from_secs(after_secs));
        let live = world.state.tasks().values().find(|task| task.desired_state.wants_run());
        let task_id = live.unwrap().id;
        world.report(task_id, TaskState::Failed);
        world.step().matches('+').count()
    };
    assert_eq!(fail(&mut world, 1), 1, "the first attempt");
    assert_eq!(fail(&mut world, 61), 1, "the first attempt was made before the window");
    assert_eq!(fail(&mut world, 30), 0, "the second was not");
    world.now = world.now.after(Duration::from_secs(1000));
    world.expect_settled("a slot that has used its attempts stays as it is");
}

#[test]
fn attempts_that_a_node_made_without_managers_count() {
    for (max_attempts, n_attempts, expect) in
        [(2, 1, "!1 +1@1>ready"), (2, 2, "!1"), (0, 9, "!1 +1@1>ready")]
    {
        let policy = RestartPolicy { max_attempts: Some(max_attempts), ..RestartPolicy::default() };
        let mut world = World::new("1", with_policy(service(1), policy), "1@1:failed");
        let mut task = (**world.state.tasks().values().next().unwrap()).clone();
        for _ in 0..n_attempts {
            task.status.note_attempt(Attempt::default(), 0);
        }
        world.replace(Object::Task(Box::new(task)));
        world.expect_step(&format!("{n_attempts} of {max_attempts}"), expect);
    }
}

#[test]
fn a_successor_waits_for_the_delay_and_for_its_predecessor() {
    let mut world = World::new("1 2", service(1), "1@1:unhealthy");
    world.expect_step("both wait", "!1 +1@1>ready");
    let deadline = world.plan().deadline;
    assert_eq!(deadline.map(|(at, _)| at), Some(world.now.after(Duration::from_secs(60))));
    let new = world.state.tasks().values().find(|task| task.id != TaskId(1)).unwrap().id;
    world.now = world.now.after(Duration::from_secs(5));
    world.expect_step("the delay is over, the old one runs", "");
    world.report(TaskId(1), TaskState::Shutdown);
    world.expect_step("it stopped", &format!(">{}", new.0));

    let mut world = World::new("1 2", service(1), "1@1:failed");
    world.step();
    let deadline = world.plan().deadline;
    assert_eq!(
        deadline,
        Some((
            world.now.after(Duration::from_secs(5)),
            "restart delay or the stop of an older task"
        ))
    );
    let new = world.state.tasks().values().find(|task| task.id != TaskId(1)).unwrap().id;
    world.now = deadline.unwrap().0;
    world.expect_step("the delay is over, the timer is due", &format!(">{}", new.0));

    let mut world = World::new("1 2", service(1), "1@1:unhealthy");
    world.step();
    let new = world.state.tasks().values().find(|task| task.id != TaskId(1)).unwrap().id;
    world.now = world.now.after(Duration::from_secs(60));
    world.expect_step(
        "an old task that does not stop is waited for a minute",
        &format!(">{}", new.0),
    );
}

#[test]
fn a_node_that_no_longer_fits_loses_its_tasks() {
    let mut web = service(1);
    web.spec.task_template.placement = Some(skep_common::spec::Placement {
        constraints: Some(vec!["node.labels.disk == ssd".to_owned()]),
        ..skep_common::spec::Placement::default()
    });
    let mut world = World::new("1:disk=ssd 2:disk=ssd", web, "1@1:running");
    world.expect_step("it fits", "");
    world.replace(Object::Node(Box::new(parse_node("1:disk=hdd"))));
    world.expect_step("its label changed", "!1 +1@2>ready");

    let mut web = service(2);
    let reservations =
        skep_common::spec::Resources { memory_bytes: Some(1 << 30), ..Default::default() };
    web.spec.task_template.resources = Some(skep_common::spec::ResourceRequirements {
        reservations: Some(reservations),
        ..Default::default()
    });
    let mut world = World::new("1:mem=4096 2:mem=4096", web, "1@1:running 2@1:running");
    world.expect_step("two fit", "");
    world.replace(Object::Node(Box::new(parse_node("1:mem=1500"))));
    world.expect_step("the newest leaves", "!2 +2@2>ready");
}

#[test]
fn the_reaper_keeps_history_and_erases_the_rest() {
    for (name, nodes, replicas, tasks, expect) in [
        ("removed and stopped", "1", 0, "1@1:shutdown>remove", "x1"),
        ("removed, not stopped yet", "1", 0, "1@1:running>remove", ""),
        ("removed, its node is down", "1:down", 0, "1@1:running>remove", "x1"),
        ("removed, its node is gone", "", 0, "1@1:running>remove", "x1"),
        ("never placed", "1", 0, "1@-:pending>shutdown", "x1"),
        ("history", "1", 1, &("1@1:shutdown ".repeat(7) + "1@1:running"), "x1 x2"),
    ] {
        check(name, replicas, nodes, tasks, expect);
    }
}

#[test]
fn a_removed_service_goes_with_its_last_task() {
    let mut web = service(2);
    web.pending_delete = true;
    let mut world = World::new("1 2:down", web, "1@1:running 2@2:running 2@2:shutdown");
    world.expect_step("what runs is stopped first", "-1 x2 x3");
    world.report(TaskId(1), TaskState::Shutdown);
    world.expect_step("the last task", "x1 xweb");
}

#[test]
fn a_lost_node_orphans_its_tasks() {
    let mut world = World::new("1 2", service(1), "1@2:running>shutdown 1@1:running");
    world.apply(vec![Action::Delete { kind: skep_common::Kind::Node, id: 2 }]);
    world.expect_step("removed", "1:orphaned");

    let mut world = World::new("1 2:down", service(1), "1@2:running>shutdown 1@1:running");
    assert_eq!(world.step(), "");
    let (at, why) = world.plan().deadline.unwrap();
    assert_eq!((at, why), (world.now.after(Duration::from_hours(24)), "node down for a day"));
    world.now = at;
    world.expect_step("down for a day", "1:orphaned");
}

#[test]
fn a_node_that_comes_back_is_told_to_stop_what_was_replaced() {
    let mut world = World::new("1 2", service(1), "1@1:running");
    let mut node = parse_node("1");
    node.status.state = NodeState::Down;
    world.replace(Object::Node(Box::new(node.clone())));
    world.expect_step("down", "!1 +1@2");
    node.status.state = NodeState::Ready;
    world.replace(Object::Node(Box::new(node)));
    world.expect_step("back", "");
}

fn status(world: &World) -> (String, String) {
    let status = world.web().update_status.unwrap_or_default();
    (status.state, status.message)
}

fn update(world: &mut World, edit: impl FnOnce(&mut UpdateConfig)) {
    let mut web = world.web();
    web.previous_spec = Some(web.spec.clone());
    web.update_status = None;
    edit(web.spec.update_config.get_or_insert_default());
    web.spec.task_template.force_update =
        Some(web.spec.task_template.force_update.unwrap_or(0) + 1);
    world.replace(Object::Service(Box::new(web)));
}

fn tasks_of_slot(world: &World, slot: u64) -> Vec<Task> {
    let mut tasks: Vec<Task> = world
        .state
        .tasks_of_slot(crate::testing::WEB, Slot::Replica(slot))
        .map(|task| (**task).clone())
        .collect();
    tasks.sort_by_key(|task| (task.meta.created_at, task.spec_version, task.id));
    tasks
}

fn live(world: &World, slot: u64) -> Task {
    let mut live = tasks_of_slot(world, slot);
    live.retain(|task| task.desired_state.wants_run());
    live.pop().unwrap()
}

/// Workers do as they are told: old tasks stop, new ones run.
fn obey(world: &mut World) {
    for task in world.state.clone().tasks().values().filter(|task| task.node_id.is_some()) {
        if task.desired_state > TaskState::Running && !task.status.state.is_terminal() {
            world.report(task.id, TaskState::Shutdown);
        } else if task.desired_state == TaskState::Running && task.status.state < TaskState::Running
        {
            world.report(task.id, TaskState::Running);
        }
    }
}

fn wait(world: &mut World, secs: u64) {
    world.now = world.now.after(Duration::from_secs(secs));
}

#[test]
fn an_update_replaces_slot_after_slot_and_completes() {
    let mut world = World::new("1 2", service(2), "1@1:running 2@2:running");
    world.expect_step("before", "");
    update(&mut world, |_| {});
    world.expect_step("stop-first, one at a time", "!1 +1@1>ready web=updating");
    assert_eq!(status(&world).1, "update in progress");
    let first = live(&world, 1).id;
    world.report(TaskId(1), TaskState::Shutdown);
    world.expect_step("released once the old one stopped", &format!(">{}", first.0));
    world.report(first, TaskState::Running);
    world.expect_step("the next slot", "!2 +2@2>ready");
    obey(&mut world);
    world.step();
    obey(&mut world);
    world.expect_step("all are new; failures are watched for", "");
    let deadline = world.plan().deadline.unwrap();
    assert_eq!(
        deadline,
        (world.now.after(Duration::from_secs(5)), "update to be watched for failures")
    );
    world.now = deadline.0;
    world.expect_step("nothing failed", "web=completed");
    let done = world.web().update_status.unwrap();
    assert_eq!((done.message.as_str(), done.completed_at), ("update completed", Some(world.now)));
}

#[test]
fn another_bound_of_the_log_needs_new_tasks() {
    let mut world = World::new("1", service(1), "1@1:running");
    world.expect_step("before", "");
    let mut web = world.web();
    let options = [("max-size".to_owned(), "1m".to_owned())].into();
    let driver = skep_common::spec::LogDriver { name: None, options: Some(options) };
    web.spec.task_template.log_driver = Some(driver);
    world.replace(Object::Service(Box::new(web)));
    world.expect_step("it is replaced", "!1 +1@1>ready web=updating");
}

#[test]
fn a_change_that_needs_no_new_task_makes_no_update() {
    let mut world = World::new("1:disk=ssd", service(1), "1@1:running");
    let mut web = world.web();
    web.spec.labels = Some([("a".to_owned(), "b".to_owned())].into());
    web.spec.task_template.placement = Some(skep_common::spec::Placement {
        constraints: Some(vec!["node.labels.disk == ssd".to_owned()]),
        ..skep_common::spec::Placement::default()
    });
    world.replace(Object::Service(Box::new(web.clone())));
    world.expect_step("labels, and a constraint that the node meets", "");
    web.spec.task_template.placement.as_mut().unwrap().constraints =
        Some(vec!["node.labels.disk == hdd".to_owned()]);
    world.replace(Object::Service(Box::new(web)));
    world.expect_step("one that it does not meet", "!1 +1@->ready web=updating");
}

#[test]
fn start_first_adds_before_it_takes_away() {
    let mut world = World::new("1 2 3", service(2), "1@1:running 2@2:running");
    world.step();
    update(&mut world, |config| {
        config.order = Some("start-first".to_owned());
        config.parallelism = Some(0);
    });
    world.expect_step("all at once, nothing is stopped", "+1@3 +2@1 web=updating");
    let first = live(&world, 1);
    assert_eq!(first.desired_state, TaskState::Running);
    world.report(first.id, TaskState::Starting);
    world.expect_step("not yet healthy", "");
    world.report(first.id, TaskState::Running);
    world.expect_step("healthy", "!1");
}

#[test]
fn parallelism_and_delay_pace_an_update() {
    let tasks = "1@1:running 2@2:running 3@1:running 4@2:running";
    let mut world = World::new("1 2", service(4), tasks);
    world.step();
    update(&mut world, |config| {
        config.parallelism = Some(2);
        config.delay = Some(Nanos::from(Duration::from_secs(10)));
    });
    assert_eq!(world.step().matches('+').count(), 2);
    obey(&mut world);
    world.step();
    obey(&mut world);
    world.expect_step("both run; the delay is on", "");
    assert_eq!(
        world.plan().deadline,
        Some((world.now.after(Duration::from_secs(10)), "update delay"))
    );
    wait(&mut world, 10);
    assert_eq!(world.step().matches('+').count(), 2, "the delay is over");
}

fn fail_first(world: &mut World, secs_after_running: Option<u64>) -> TaskId {
    obey(world);
    world.step();
    let task_id = live(world, 1).id;
    if let Some(secs) = secs_after_running {
        world.report(task_id, TaskState::Running);
        world.step();
        wait(world, secs);
    }
    world.report(task_id, TaskState::Failed);
    world.step();
    task_id
}

#[test]
fn a_failed_update_takes_its_failure_action() {
    for (action, ratio, ran, expect) in [
        (None, None, None, "paused"),
        (None, None, Some(1), "paused"),
        (None, None, Some(6), "updating"),
        (Some("continue"), None, Some(1), "updating"),
        (None, Some(0.5), Some(1), "updating"),
        (None, Some(0.4), Some(1), "paused"),
        (Some("rollback"), None, Some(1), "rollback_started"),
    ] {
        let mut world = World::new("1 2", service(2), "1@1:running 2@2:running");
        world.step();
        update(&mut world, |config| {
            config.failure_action = action.map(str::to_owned);
            config.max_failure_ratio = ratio;
        });
        world.step();
        let failed = fail_first(&mut world, ran);
        let (state, message) = status(&world);
        assert_eq!(state, expect, "{action:?} {ratio:?} {ran:?}");
        match expect {
            "paused" => assert_eq!(
                message,
                format!("update paused due to failure or early termination of task {failed}")
            ),
            "rollback_started" => assert_eq!(
                message,
                format!("update rolled back due to failure or early termination of task {failed}")
            ),
            _ => {}
        }
    }
}

#[test]
fn a_task_that_never_runs_fails_the_update_with_its_reason() {
    let mut world = World::new("1:mem=2048", service(1), "1@1:running");
    world.step();
    let mut web = world.web();
    web.spec.task_template.resources = Some(skep_common::spec::ResourceRequirements {
        reservations: Some(skep_common::spec::Resources {
            memory_bytes: Some(4 << 30),
            ..Default::default()
        }),
        ..Default::default()
    });
    world.replace(Object::Service(Box::new(web)));
    world.step();
    obey(&mut world);
    world.step();
    let (at, why) = world.plan().deadline.unwrap();
    assert_eq!(why, "progress deadline of an update");
    world.now = at;
    world.expect_step("the deadline", "web=paused");
    assert_eq!(
        status(&world).1,
        format!(
            "update paused due to task {} not running within 600 s: no suitable node (insufficient \
             resources on 1 node): n1 lacks 2 GiB of memory",
            live(&world, 1).id
        )
    );
}

#[test]
fn a_paused_update_goes_on_when_asked() {
    let digest = format!("sha256:{}", "1".repeat(64));
    let image = format!("i:latest@{digest}");
    let mut web = service(2);
    web.spec.task_template.container_spec = Some(ContainerSpec { image, ..Default::default() });
    let mut world = World::new("1 2", web, "1@1:running 2@2:running");
    let (names, size, created) = (vec!["i".to_owned()], 1, None);
    let image = image::Registration { names, digest, size, created };
    world.apply(image::register(&world.state, NodeId(1), &image, &mut StdRng::seed_from_u64(1)));
    world.step();
    update(&mut world, |config| {
        config.progress_deadline = Some(Nanos::from(Duration::from_secs(30)));
    });
    world.step();
    fail_first(&mut world, None);
    assert_eq!(status(&world).0, "paused");
    world.expect_settled("a paused update");
    let asked = |world: &mut World| {
        let web = world.web();
        let spec = web.spec.clone();
        crate::service::update(&world.state, &web, web.meta.version, spec).unwrap()
    };
    wait(&mut world, 60);
    let previous = world.web().previous_spec;
    let again = asked(&mut world).expect("the same spec lets it go on");
    world.apply(vec![again]);
    for _ in 0..20 {
        world.step();
        obey(&mut world);
        wait(&mut world, 6);
    }
    assert_eq!(status(&world).0, "completed", "{}", status(&world).1);
    assert_eq!(world.web().previous_spec, previous, "a rollback still knows where to");
    assert!([1, 2].iter().all(|slot| live(&world, *slot).spec.force_update.is_some()));
    assert_eq!(asked(&mut world), None, "there is nothing to go on with");
}

#[test]
fn a_service_has_a_progress_deadline_of_its_own() {
    let mut world = World::new("1", service(1), "1@1:running");
    world.step();
    update(&mut world, |config| {
        config.progress_deadline = Some(Nanos::from(Duration::from_secs(30)));
    });
    world.step();
    world.report(TaskId(1), TaskState::Shutdown);
    world.step();
    wait(&mut world, 31);
    world.step();
    let (state, message) = status(&world);
    assert_eq!(state, "paused");
    assert!(message.ends_with("not running within 30 s: assigned"), "{message}");
}

#[test]
fn a_rollback_brings_the_previous_spec_back() {
    let mut world = World::new("1 2", service(2), "1@1:running 2@2:running");
    world.step();
    update(&mut world, |config| config.failure_action = Some("rollback".to_owned()));
    world.step();
    fail_first(&mut world, None);
    assert_eq!(status(&world).0, "rollback_started");
    assert_eq!(world.web().previous_spec, None);
    for _ in 0..10 {
        world.step();
        obey(&mut world);
        wait(&mut world, 6);
    }
    assert_eq!(status(&world), ("rollback_completed".to_owned(), "rollback completed".to_owned()));
    assert_eq!(world.web().spec.task_template.force_update, None);
    for slot in [1, 2] {
        assert_eq!(live(&world, slot).spec.force_update, None, "slot {slot}");
    }
    assert_eq!(live(&world, 2).id, TaskId(2), "a slot that was not updated is left alone");
}

#[test]
fn an_automatic_rollback_is_a_revision_too() {
    let mut web = service(2);
    web.revision = 1;
    let mut world = World::new("1 2", web, "1@1:running 2@2:running");
    world.step();
    update(&mut world, |config| config.failure_action = Some("rollback".to_owned()));
    let failing = world.web().spec;
    world.step();
    fail_first(&mut world, None);
    let web = world.web();
    assert_eq!((status(&world).0.as_str(), web.revision), ("rollback_started", 3));
    let kept: Vec<_> = world.state.revisions_of(web.id).collect();
    assert_eq!(kept.iter().map(|revision| revision.number).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((&kept[0].spec, &kept[1].spec), (&web.spec, &failing));
}

#[test]
fn a_rollback_that_fails_is_paused() {
    let mut world = World::new("1", service(1), "1@1:running");
    world.step();
    update(&mut world, |config| config.failure_action = Some("rollback".to_owned()));
    world.step();
    fail_first(&mut world, Some(1));
    world.step();
    fail_first(&mut world, Some(1));
    assert_eq!(status(&world).0, "rollback_paused");
}

#[test]
fn a_paused_update_leaves_old_tasks_and_restarts_with_the_new_spec() {
    let mut world = World::new("1 2", service(2), "1@1:running 2@2:running");
    world.step();
    update(&mut world, |_| {});
    world.step();
    fail_first(&mut world, None);
    assert_eq!(status(&world).0, "paused");
    assert_eq!(live(&world, 2).id, TaskId(2));
    world.report(TaskId(2), TaskState::Failed);
    world.step();
    assert_eq!(live(&world, 2).spec.force_update, Some(1));
}

#[test]
fn an_unhealthy_new_task_fails_the_update() {
    let mut world = World::new("1", service(1), "1@1:running");
    world.step();
    update(&mut world, |_| {});
    world.step();
    obey(&mut world);
    world.step();
    let task_id = live(&world, 1).id;
    world.report(task_id, TaskState::Running);
    world.step();
    wait(&mut world, 2);
    let status_now =
        TaskStatus { state: TaskState::Running, unhealthy: true, ..TaskStatus::default() };
    let patch = TaskPatch { status: Some(status_now), ..TaskPatch::of(task_id) };
    world.apply(vec![Action::PatchTask(patch)]);
    world.step();
    assert_eq!(status(&world).0, "paused");
}

#[test]
fn a_drained_node_is_emptied_even_mid_update() {
    let mut world = World::new("1 2", service(2), "1@1:running 2@2:running");
    world.step();
    update(&mut world, |_| {});
    world.step();
    let mut node = parse_node("2");
    node.spec.availability = Availability::Drain;
    world.replace(Object::Node(Box::new(node)));
    for _ in 0..6 {
        world.step();
        obey(&mut world);
        wait(&mut world, 6);
    }
    world.step();
    assert_eq!(status(&world).0, "completed");
    for slot in [1, 2] {
        let task = live(&world, slot);
        assert_eq!((task.node_id.unwrap().0, task.status.state), (1, TaskState::Running));
    }
}
