//! Start-first updates where two tasks of a slot cannot run at once, and changes that replace nothing.

use skep_common::spec::{
    Placement, PlacementPreference, PlacementStrategy, PortConfig, PublishMode,
    ResourceRequirements, Resources, SpreadOver, UpdateConfig,
};
use skep_common::{NodeId, Object, Service, Task, TaskId, TaskState};

use crate::testing::{World, parse_node, service};

fn start_first() -> Service {
    let mut service = service(1);
    let order = Some("start-first".to_owned());
    service.spec.update_config = Some(UpdateConfig { order, ..UpdateConfig::default() });
    service
}

fn on_host_port() -> Service {
    let mut service = start_first();
    service.endpoint.ports.push(PortConfig {
        target_port: 80,
        published_port: Some(8080),
        publish_mode: Some(PublishMode::Host),
        ..PortConfig::default()
    });
    service
}

fn alone_on_its_node() -> Service {
    let mut service = start_first();
    let placement = Placement { max_replicas: Some(1), ..Placement::default() };
    service.spec.task_template.placement = Some(placement);
    service
}

fn with_memory(mut service: Service, mib: i64) -> Service {
    let reservations = Resources { memory_bytes: Some(mib << 20), ..Resources::default() };
    service.spec.task_template.resources =
        Some(ResourceRequirements { reservations: Some(reservations), ..Default::default() });
    service
}

fn update(world: &mut World) {
    let mut web = world.web();
    web.update_status = None;
    let counter = web.spec.task_template.force_update.get_or_insert(0);
    *counter += 1;
    world.replace(Object::Service(Box::new(web)));
}

fn live(world: &World) -> Vec<Task> {
    let tasks = world.state.tasks().values().filter(|task| task.desired_state.wants_run());
    tasks.map(|task| (**task).clone()).collect()
}

#[test]
fn a_task_gives_way_to_a_successor_that_fits_nowhere_else() {
    for (name, service, nodes, expect) in [
        ("the port is free elsewhere", on_host_port(), "1 2", "+1@2 web=updating"),
        ("it is free nowhere", on_host_port(), "1", "!1 +1@- web=updating"),
        ("nor where no task may go", on_host_port(), "1 2:pause", "!1 +1@- web=updating"),
        ("there is another node", alone_on_its_node(), "1 2", "+1@2 web=updating"),
        ("there is none: it counts no more", alone_on_its_node(), "1", "!1 +1@1 web=updating"),
        ("memory may come", with_memory(start_first(), 700), "1:mem=1024", "+1@- web=updating"),
        (
            "what it has of its node will be free with the port",
            with_memory(on_host_port(), 700),
            "1:mem=1024",
            "!1 +1@- web=updating",
        ),
    ] {
        let mut world = World::new(nodes, service, "1@1:running");
        world.step();
        update(&mut world);
        world.expect_step(name, expect);
        if expect.starts_with("!1 +1@-") {
            world.report(TaskId(1), TaskState::Shutdown);
            let words = world.step();
            assert!(words.ends_with("@1"), "{name}: {words}");
        }
    }
}

#[test]
fn a_slot_has_one_successor_at_most() {
    let service = with_memory(start_first(), 700);
    let mut world = World::new("1:mem=1024", service, "1@1:running");
    world.step();
    for _ in 0..3 {
        update(&mut world);
        world.step();
        world.expect_settled("the new task waits for memory");
        let live = live(&world);
        let newest = world.web().spec_version;
        assert_eq!(live.len(), 2, "{live:#?}");
        assert!(live.iter().any(|task| task.id == TaskId(1)), "the one that serves goes on");
        assert!(live.iter().any(|task| task.spec_version == newest), "the last one follows");
    }
}

#[test]
fn how_nodes_are_chosen_is_for_tasks_to_come() {
    let over = SpreadOver { spread_descriptor: "node.labels.zone".to_owned() };
    let preferences = Some(vec![PlacementPreference { spread: Some(over) }]);
    for (name, placement) in [
        ("preferences", Placement { preferences, ..Placement::default() }),
        (
            "the strategy",
            Placement { strategy: Some(PlacementStrategy::Binpack), ..Placement::default() },
        ),
    ] {
        let mut world = World::new("1 2", service(2), "1@1:running 2@1:running");
        world.step();
        let mut web = world.web();
        web.spec.task_template.placement = Some(placement);
        world.replace(Object::Service(Box::new(web)));
        world.expect_step(name, "");
    }
}

/// Web with a task on node 1 that serves, and one on node 2 that is to follow it.
fn half_updated() -> (World, TaskId) {
    let mut world = World::new("1 2", on_host_port(), "1@1:running");
    world.step();
    update(&mut world);
    world.step();
    let second = live(&world).into_iter().map(|task| task.id).find(|id| *id != TaskId(1)).unwrap();
    world.report(second, TaskState::Starting);
    (world, second)
}

fn serves(world: &World) -> bool {
    live(world).iter().any(|task| task.id == TaskId(1))
}

#[test]
fn what_serves_goes_on_while_a_place_is_about_to_be_free() {
    let (mut world, second) = half_updated();
    update(&mut world);
    world.step();
    world.expect_settled("the third waits until the second has stopped");
    assert!(serves(&world), "{:#?}", live(&world));
    world.report(second, TaskState::Shutdown);
    world.step();
    assert!(serves(&world), "the third has the second's place");
    let newest = world.web().spec_version;
    let third = live(&world).into_iter().find(|task| task.spec_version == newest).unwrap();
    assert_eq!(third.node_id, Some(NodeId(2)));
}

#[test]
fn nothing_gives_way_to_a_paused_update() {
    let (mut world, second) = half_updated();
    let mut web = world.web();
    let status = web.update_status.as_mut().unwrap();
    "paused".clone_into(&mut status.state);
    world.replace(Object::Service(Box::new(web)));
    world.replace(Object::Node(Box::new(parse_node("2:drain"))));
    world.step();
    world.report(second, TaskState::Shutdown);
    world.step();
    world.expect_settled("the new task waits");
    assert!(serves(&world), "{:#?}", live(&world));
}
