//! Reasons beyond what nodes have, and that none is older than its cause.

use proptest::prelude::*;
use serde_json::json;
use skep_common::object::{Image, NodeState, Secret, UpdateStatus};
use skep_common::spec::{Availability, PortConfig, PublishMode, TaskSpec};
use skep_common::{
    ImageId, Kind, NetworkId, NodeId, Object, SecretId, Service, ServiceId, Task, TaskId, TaskState,
};

use super::{Index, explain};
use crate::command::{Action, Expect};
use crate::explain::Explainer;
use crate::secrets;
use crate::testing::{NOW, World, node, service};

fn named(id: u128, name: &str, replicas: u64) -> Service {
    let mut service = service(replicas);
    service.id = ServiceId(id);
    service.spec.name = name.to_owned();
    service
}

fn template(service: &mut Service, template: serde_json::Value) {
    service.spec.task_template = serde_json::from_value(template).unwrap();
}

/// A service that takes port 80 of its nodes, at most one task on each.
fn with_port(id: u128, name: &str, replicas: u64) -> Service {
    let mut service = named(id, name, replicas);
    service.endpoint.ports = vec![PortConfig {
        target_port: 80,
        published_port: Some(80),
        publish_mode: Some(PublishMode::Host),
        ..PortConfig::default()
    }];
    service
}

fn image(holder: u128) -> Image {
    Image {
        id: ImageId(1),
        meta: skep_common::Meta::default(),
        name: "docker.io/library/whoami:latest".into(),
        digest: "sha256:12".into(),
        size: 1,
        created: None,
        holders: [NodeId(holder)].into(),
    }
}

/// Reasons of the tasks that wait, by service.
fn reasons(world: &World) -> Vec<(String, String)> {
    let waiting =
        world.state.tasks().values().filter(|task| task.status.state < TaskState::Assigned);
    let mut reasons: Vec<(String, String)> =
        waiting.map(|task| (task.service_name.clone(), task.status.err.clone())).collect();
    reasons.sort();
    reasons.dedup();
    reasons
}

#[test]
fn who_holds_a_port_is_named_also_in_the_pass_that_gives_it() {
    let mut world = World::new("1 2:pause", with_port(7, "web", 2), "");
    world.put(vec![Object::Service(Box::new(with_port(8, "other", 1)))]);
    world.expect_step("one has the port", "+1@- +1@1 +2@-");
    let words = "no suitable node (1 node not available for new tasks; host-mode port already in use \
                 on 1 node): port 80/tcp of n1 is held by web.1";
    let expect = ["other", "web"].map(|name| (name.to_owned(), words.to_owned()));
    assert_eq!(reasons(&world), expect);
}

#[test]
fn each_filter_says_what_it_ruled_out() {
    let mut web = with_port(7, "web", 4);
    let limits = json!({"Placement": {"MaxReplicas": 1, "Constraints": ["node.labels.a == b"]},
                        "Resources": {"Reservations": {"MemoryBytes": 200 << 20}}});
    template(&mut web, limits);
    let mut world = World::new("1:a=b 2:a=b:down 3 4:a=b:mem=150 5:a=b:mem=100", web, "");
    world.step();
    let task = world.state.tasks().values().find(|task| task.node_id.is_none()).unwrap();
    let reason = Explainer::new(&world.state).task(task);
    assert_eq!(reason.text, task.status.err, "what is written is what is found");
    let rows: Vec<String> = reason
        .filters
        .iter()
        .map(|row| format!("{} {}: {}", row.filter, row.n_nodes, row.nearest))
        .collect();
    assert_eq!(
        rows,
        [
            "ready 1: n2 is down",
            "constraint 1: n3 does not meet node.labels.a == b",
            "resource 2: n4 lacks 50 MiB of memory",
            "host-port 1: port 80/tcp of n1 is held by web.1",
        ]
    );
    let mut web = named(7, "web", 2);
    template(&mut web, json!({"Placement": {"MaxReplicas": 1}}));
    let mut world = World::new("1", web, "");
    world.step();
    let expect =
        "no suitable node (max replicas per node limit exceeded on 1 node): n1 has 1 of at most 1";
    assert_eq!(reasons(&world), [("web".to_owned(), expect.to_owned())]);
}

#[test]
fn a_version_of_a_secret_that_is_gone_is_a_reason() {
    // Its service names another one by now, and its update is paused.
    let mut web = service(1);
    let paused = UpdateStatus { state: "paused".to_owned(), ..UpdateStatus::default() };
    web.update_status = Some(paused);
    let mut world = World::new("1", web, "");
    let mut task: Task = crate::testing::parse_task(&service(1), 5, "1@-:new~1");
    let secret = json!({"SecretID": SecretId(9), "SecretName": "key", "Version": 1, "File": {"Name": "key"}});
    let spec = json!({"ContainerSpec": {"Image": "", "Secrets": [secret]}});
    task.spec = serde_json::from_value::<TaskSpec>(spec).unwrap().into();
    world.put(vec![Object::Task(Box::new(task))]);
    world.expect_step("it waits", "5?");
    let task = || world.state.task(TaskId(5)).unwrap().clone();
    assert_eq!(task().status.err, "secret not found: key (version 1)");
    let spec = serde_json::from_value(json!({"Name": "key", "Data": "YQ=="})).unwrap();
    let action = secrets::create::<Secret>(&world.state, 9, spec, NOW).unwrap();
    world.apply(vec![action]);
    world.expect_step("it is there now", "5@1");
}

#[test]
fn a_long_reason_is_cut() {
    let long = "x".repeat(600);
    let mut web = service(1);
    template(&mut web, json!({"Placement": {"Constraints": [format!("node.labels.{long} == ä")]}}));
    let mut world = World::new("1", web, "");
    world.expect_step("a constraint that cannot be read", "+1@-");
    let reason = reasons(&world).remove(0).1;
    assert!(reason.len() <= 512 && reason.ends_with('…'), "{} {reason}", reason.len());
}

#[test]
fn who_has_a_node_says_what_else_it_waits_for() {
    let tasks = "1@1:running>shutdown 1@1:assigned>ready 2@2:starting 3@3:unhealthy";
    let mut world = World::new("1 2:down 3", service(3), tasks);
    let mut failed = crate::testing::parse_task(&service(3), 8, "4@1:failed>shutdown");
    failed.status.err = "task: non-zero exit (1)".to_owned();
    let mut late = crate::testing::parse_task(&service(3), 9, "4@1:assigned>ready");
    late.start_after = Some(NOW);
    world.put(vec![Object::Task(Box::new(failed)), Object::Task(Box::new(late))]);
    let explainer = Explainer::new(&world.state);
    for (id, expect) in [
        (2, format!("it starts once task {} has stopped", TaskId(1))),
        (3, "its node n2 is down".to_owned()),
        (4, "its health check fails".to_owned()),
        (
            9,
            format!(
                "it starts at {NOW}, when the delay of its restart is over; the task before it ended: task: \
                 non-zero exit (1)"
            ),
        ),
    ] {
        assert_eq!(explainer.task(world.state.task(TaskId(id)).unwrap()).text, expect, "{id}");
    }
}

#[test]
fn a_service_says_why_it_has_no_tasks() {
    let mut paused = named(1, "paused", 1);
    paused.update_status = Some(UpdateStatus {
        state: "paused".to_owned(),
        message: "update paused due to failure of task x".to_owned(),
        ..UpdateStatus::default()
    });
    let mut global = named(2, "global", 0);
    global.spec.mode = serde_json::from_value(json!({"Global": {}})).unwrap();
    let mut leaving = named(3, "leaving", 1);
    leaving.pending_delete = true;
    let mut world = World::new("1:pause", named(4, "none", 0), "");
    world.put([paused, global, leaving].map(|service| Object::Service(Box::new(service))).into());
    let explainer = Explainer::new(&world.state);
    for (id, expect) in [
        (1, "update paused due to failure of task x"),
        (2, "no node is active, up and meets its constraints"),
        (3, "it is being removed, and waits for its tasks to stop"),
        (4, "it is to have no tasks"),
    ] {
        assert_eq!(
            explainer.service(world.state.service(ServiceId(id)).unwrap()),
            [expect],
            "{id}"
        );
    }
}

#[test]
fn a_task_that_runs_again_waits_for_nothing() {
    let mut world = World::new("1", service(1), "");
    let mut task = crate::testing::parse_task(&service(1), 5, "1@1:running");
    task.status.n_attempts = 1;
    world.put(vec![Object::Task(Box::new(task))]);
    let explainer = Explainer::new(&world.state);
    assert_eq!(explainer.task(world.state.task(TaskId(5)).unwrap()).text, "");
}

#[test]
fn slots_that_ended_for_good_are_named() {
    let once = json!({"RestartPolicy": {"Condition": "none"}});
    let twice = json!({"RestartPolicy": {"MaxAttempts": 1}});
    let job = json!({"ReplicatedJob": {"MaxConcurrent": 2, "TotalCompletions": 2}});
    let failed = "slot 1 has ended (failed): its restart policy makes no other task";
    let ends =
        |slot| format!("slot {slot} has ended (complete): its restart policy makes no other task");
    let many = "1@1:complete>shutdown 2@1:complete>shutdown 3@1:complete>shutdown 4@1:complete>shutdown \
                5@1:complete>shutdown 6@1:complete>shutdown";
    let many_notes: Vec<String> =
        (1..=5).map(ends).chain(["so it is with 1 more slot".to_owned()]).collect();
    for (name, policy, mode, tasks, expect) in [
        ("no restarts", &once, None, "1@1:failed>shutdown 2@1:running", vec![failed.to_owned()]),
        (
            "all attempts",
            &twice,
            None,
            "1@1:failed>shutdown 1@1:failed>shutdown 2@1:failed>shutdown 2@1:running",
            vec![failed.to_owned()],
        ),
        ("an attempt is left", &twice, None, "1@1:failed>shutdown 2@1:running", vec![]),
        ("its end is not looked at yet", &once, None, "1@1:failed>running", vec![]),
        ("it still stops", &once, None, "1@1:running>shutdown", vec![]),
        (
            "it was on a node that is down",
            &once,
            None,
            "1@2:running>shutdown",
            vec![
                "slot 1 has ended (its node n2 is down): its restart policy makes no other task"
                    .to_owned(),
            ],
        ),
        ("it is to be gone", &once, None, "1@1:failed>remove", vec![]),
        ("many", &once, None, many, many_notes),
        (
            "a job that is done in one slot alone",
            &once,
            Some(job),
            "0@1:complete 1@1:failed>shutdown",
            vec![failed.to_owned()],
        ),
    ] {
        let mut web = service(6);
        template(&mut web, policy.clone());
        if let Some(mode) = mode {
            web.spec.mode = serde_json::from_value(mode).unwrap();
        }
        let world = World::new("1 2:down", web, tasks);
        let notes = Explainer::new(&world.state).service(&world.web());
        assert_eq!(notes, expect, "{name}");
    }
}

/// Services of every kind of reason, on three small nodes.
fn busy_world() -> World {
    let mut web = named(7, "web", 3);
    template(
        &mut web,
        json!({"Placement": {"Constraints": ["node.labels.disk == ssd"], "MaxReplicas": 2},
               "Resources": {"Reservations": {"MemoryBytes": 300 << 20}}}),
    );
    let mut world = World::new("1:mem=1000 2:mem=1000:disk=ssd 3:mem=1000:disk=ssd", web, "");
    let spec = json!({"Name": "small", "IPAM": {"Config": [{"Subnet": "10.7.0.0/29"}]}});
    let small = NetworkId(100);
    let made = crate::network::create(&world.state, small, serde_json::from_value(spec).unwrap());
    world.apply(vec![made.unwrap().1]);
    let mut imaged = named(9, "imaged", 1);
    template(&mut imaged, json!({"ContainerSpec": {"Image": "whoami"}}));
    let mut crowded = named(10, "crowded", 5);
    template(&mut crowded, json!({"Networks": [{"Target": small}]}));
    let mut global = with_port(11, "global", 0);
    global.spec.mode = serde_json::from_value(json!({"Global": {}})).unwrap();
    let services = [with_port(8, "port", 2), imaged, crowded, global];
    world.put(services.map(|service| Object::Service(Box::new(service))).into());
    world
}

/// Something that may be a cause, done to the store.
fn disturb(world: &mut World, kind: u8, number: u128) {
    let id = NodeId(number % 3 + 1);
    let mut changed = world.state.node(id).map_or_else(|| node(1), |node| (**node).clone());
    let label = |on: bool| on.then(|| [("disk".to_owned(), "ssd".to_owned())].into());
    match kind {
        0 => changed.status.state = NodeState::Down,
        1 => changed.status.state = NodeState::Ready,
        2 => changed.spec.availability = Availability::Pause,
        3 => changed.spec.availability = Availability::Active,
        4 => changed.spec.labels = label(number < 20),
        5 => {
            let description = changed.description.as_mut().unwrap();
            description.resources.memory_bytes = Some((number as i64 * 40) << 20);
        }
        6 => {
            let expect = match world.state.image(ImageId(1)) {
                Some(_) => Expect::Present,
                None => Expect::Absent,
            };
            let object = Object::Image(Box::new(image(id.0)));
            world.apply(vec![Action::Put { object, expect }]);
        }
        7 if world.state.image(ImageId(1)).is_some() => {
            world.apply(vec![Action::Delete { kind: Kind::Image, id: 1 }]);
        }
        8 | 9 => {
            let tasks: Vec<TaskId> = world.state.tasks().keys().copied().collect();
            let Some(task) = tasks.get(number as usize % tasks.len().max(1)) else { return };
            let task = world.state.task(*task).unwrap().clone();
            let state = if kind == 8 { TaskState::Running } else { TaskState::Failed };
            if task.node_id.is_some() && task.status.state < state {
                world.report(task.id, state);
            }
        }
        10 => {
            let service = world.state.service(ServiceId(7 + number % 4)).unwrap();
            let mut service = (**service).clone();
            let mode = service.spec.mode.as_mut().unwrap().replicated.as_mut().unwrap();
            mode.replicas = Some(number as u64 % 6);
            world.replace(Object::Service(Box::new(service)));
        }
        _ => {}
    }
    if kind < 6 {
        world.replace(Object::Node(Box::new(changed)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever changes, a task that waits says why as of now once the leader has looked.
    #[test]
    fn reasons_are_never_older_than_their_cause(
        steps in proptest::collection::vec((0_u8..11, 0_u128..40), 1..40)
    ) {
        let mut world = busy_world();
        for (kind, number) in steps {
            disturb(&mut world, kind, number);
            let n_passes = (0..20).take_while(|_| !world.step().is_empty()).count();
            prop_assert!(n_passes < 20, "it comes to rest");
            let index = Index::rebuild(&world.state);
            for task in world.state.tasks().values() {
                let is_waiting = task.node_id.is_none() && task.desired_state.wants_run();
                if !is_waiting || task.status.state.is_terminal() {
                    continue;
                }
                let anew = explain(&world.state, &index, task).map(|found| found.text);
                prop_assert_eq!(task.status.state, TaskState::Pending);
                prop_assert_eq!(anew.as_deref(), Some(task.status.err.as_str()), "{}", task.name());
            }
        }
    }
}
