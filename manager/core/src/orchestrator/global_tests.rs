//! Tables and stories of global services.

use skep_common::spec::{Placement, RestartCondition, RestartPolicy, ServiceMode};
use skep_common::{Object, Service, Task, TaskId, TaskState};

use crate::testing::{World, parse_node, service};

fn global() -> Service {
    let mut service = service(0);
    service.spec.mode =
        Some(ServiceMode { global: Some(Default::default()), ..Default::default() });
    service
}

fn constrained(mut service: Service, constraint: &str) -> Service {
    let constraints = Some(vec![constraint.to_owned()]);
    service.spec.task_template.placement = Some(Placement { constraints, ..Default::default() });
    service
}

#[test]
fn global_services_follow_their_nodes() {
    for (name, nodes, tasks, expect) in [
        ("every node gets one", "1 2 3", "", "+g1@1 +g2@2 +g3@3"),
        ("a node that joins gets one", "1 2", "g1@1:running", "+g2@2"),
        ("steady state proposes nothing", "1 2", "g1@1:running g2@2:running", ""),
        ("no node for those that cannot", "1:down 2:drain 3:pause 4", "", "+g4@4"),
        ("a paused node keeps its task", "1:pause", "g1@1:running", ""),
        ("and gets no other one for it", "1:pause", "g1@1:failed", "!1"),
        ("until it is active again", "1", "g1@1:failed>shutdown", "+g1@1"),
        ("a disconnected node keeps its task", "1:disconnected", "g1@1:running", ""),
        ("one of which nothing is known yet, too", "1:unknown", "g1@1:running", ""),
        ("a drained node: no other takes it", "1:drain 2", "g1@1:running g2@2:running", "!1"),
        ("a node that is down, as well", "1:down 2", "g1@1:running g2@2:running", "!1"),
        (
            "a node that is back: once the old one has stopped",
            "1",
            "g1@1:running>shutdown",
            "+g1@1>ready",
        ),
        (
            "a node that is gone takes its history along",
            "1",
            "g1@1:running g9@9:running g9@9:failed>shutdown",
            "x2 x3",
        ),
        ("a failed task, after the delay", "1 2", "g1@1:failed g2@2:running", "!1 +g1@1>ready"),
        ("a task that waits for a node that is down is none", "1:down", "g1@-:pending", "x1"),
    ] {
        World::new(nodes, global(), tasks).expect_step(name, expect);
    }
}

#[test]
fn constraints_choose_the_nodes_of_global_services() {
    let on_ssd = || constrained(global(), "node.labels.disk==ssd");
    for (name, nodes, tasks, expect) in [
        ("only where they are met", "1:disk=ssd 2", "", "+g1@1"),
        ("a node whose label went gives it up", "1", "g1@1:running", "!1"),
        ("a paused one does not", "1:pause", "g1@1:running", ""),
    ] {
        World::new(nodes, on_ssd(), tasks).expect_step(name, expect);
    }

    let mut world = World::new("1:disk=ssd 2", global(), "g1@1:running g2@2:running");
    let changed = Service { spec: on_ssd().spec, ..world.web() };
    world.replace(Object::Service(Box::new(changed)));
    world.expect_step("a new constraint: those that meet it go on", "!2");
    let mut node = parse_node("2");
    node.spec.labels = Some([("disk".to_owned(), "ssd".to_owned())].into());
    world.report(TaskId(2), TaskState::Shutdown);
    world.step();
    world.replace(Object::Node(Box::new(node)));
    world.expect_step("a label that comes is enough", "+g2@2");
}

#[test]
fn a_tasks_node_is_waited_for_and_named() {
    let mut service = global();
    let resources = serde_json::json!({"Reservations": {"MemoryBytes": 512_u64 << 20}});
    service.spec.task_template.resources = serde_json::from_value(resources).unwrap();
    let mut world = World::new("1:mem=64 2", service, "");
    world.expect_step("one has too little", "+g1@- +g2@2");
    let waiting = |task: &&std::sync::Arc<Task>| task.node_id.is_none();
    let task = world.state.tasks().values().find(waiting).unwrap();
    assert_eq!(
        task.status.err,
        "no suitable node (insufficient resources on 1 node): n1 lacks 448 MiB of memory"
    );
    let waits = task.id;
    world.replace(Object::Node(Box::new(parse_node("1:mem=1024"))));
    world.expect_step("it has enough now", &format!("{}@1", waits.0));
}

#[test]
fn the_restart_policy_holds_for_each_node() {
    let policy = |condition, max_attempts| RestartPolicy {
        condition: Some(condition),
        max_attempts: Some(max_attempts),
        ..RestartPolicy::default()
    };
    for (name, policy, tasks, expect) in [
        ("none", policy(RestartCondition::None, 0), "g1@1:complete", "!1"),
        (
            "attempts are used up",
            policy(RestartCondition::Any, 1),
            "g1@1:failed>shutdown g1@1:failed",
            "!2",
        ),
    ] {
        let mut service = global();
        service.spec.task_template.restart_policy = Some(policy);
        World::new("1", service, tasks).expect_step(name, expect);
    }
}

#[test]
fn a_paused_node_keeps_its_task_as_it_is() {
    let mut world = World::new("1 2:pause", global(), "g1@1:running~98 g2@2:running~98");
    let words = world.step();
    assert_eq!(words, "!1 +g1@1>ready web=updating", "the paused one is not replaced");
    world.report(TaskId(1), TaskState::Shutdown);
    world.step();
    let newest =
        |world: &World| world.state.tasks().values().find(|task| task.id.0 > 2).unwrap().id;
    let new = newest(&world);
    for state in [TaskState::Starting, TaskState::Running] {
        world.report(new, state);
        world.step();
    }
    world.now = world.now.after(std::time::Duration::from_secs(6));
    world.step();
    assert_eq!(world.web().update_status.unwrap().state, "completed", "it is nobody's to wait for");
    world.expect_settled("the paused node");
    world.replace(Object::Node(Box::new(parse_node("2"))));
    assert_eq!(world.step(), "!2 +g2@2>ready web=updating", "it is active again");
}
