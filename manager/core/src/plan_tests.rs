//! How much one pass decides.

use skep_common::{Object, Service};

use crate::command::{Action, Command};
use crate::plan::{Dirty, LeaderMemory, Options, plan};
use crate::testing::{World, parse_node, render, service};

/// What a step may decide in these tests.
const ACTIONS_MAX: usize = 5;

/// Plans and commits until nothing is left; the number of passes, and the longest one.
fn settle(world: &mut World) -> (usize, usize) {
    let (mut n_passes, mut longest) = (0, 0);
    loop {
        let plan = world.plan();
        if plan.actions.is_empty() {
            return (n_passes, longest);
        }
        (n_passes, longest) = (n_passes + 1, longest.max(plan.actions.len()));
        assert!(n_passes < 1000, "it must come to an end");
        // Nothing else may have to happen for the rest to be decided.
        let is_full = plan.actions.len() >= ACTIONS_MAX;
        let is_due = plan.deadline.is_some_and(|(at, _)| at <= world.now);
        assert!(is_due || !is_full, "the rest is due at once: {:?}", plan.deadline);
        world.apply(plan.actions);
    }
}

/// What each task came to, but for its id, which is drawn.
fn outcome(world: &World) -> Vec<String> {
    let tasks = world.state.tasks().values();
    let mut lines: Vec<String> = tasks
        .map(|task| {
            let (state, err) = (task.status.state, &task.status.err);
            let node = task.node_id.map_or(0, |node_id| node_id.0);
            let addresses = &task.networks_attachments;
            let (slot, desired) = (task.slot, task.desired_state);
            format!("{slot}@{node}:{state}>{desired} {err} {addresses:?}")
        })
        .collect();
    lines.sort();
    lines
}

/// Two worlds that are equal but for the room of their passes come to the same.
#[track_caller]
fn check(name: &str, make: impl Fn() -> World, n_passes_min: usize) {
    let mut bounded = make();
    let options = Options { actions_max: ACTIONS_MAX, ..Options::default() };
    bounded.memory = LeaderMemory::new(options);
    bounded.dirty = Dirty::all();
    let (n_passes, longest) = settle(&mut bounded);
    assert!(longest <= 3 * ACTIONS_MAX, "{name}: {longest} actions in a pass");
    assert!(n_passes >= n_passes_min, "{name}: {n_passes} passes");
    let mut whole = make();
    settle_whole(&mut whole);
    assert_eq!(outcome(&bounded), outcome(&whole), "{name}");
    bounded.expect_settled(name);
}

fn settle_whole(world: &mut World) {
    while !world.step().is_empty() {}
}

fn tasks(n_tasks: usize, word: &str) -> String {
    let words: Vec<String> = (1..=n_tasks).map(|slot| format!("{slot}@{word}")).collect();
    words.join(" ")
}

#[test]
fn a_pass_is_bounded_in_actions() {
    let world = |nodes: &'static str, replicas: u64, tasks: String| {
        move || World::new(nodes, service(replicas), &tasks)
    };
    check("tasks that wait are placed", world("1 2 3", 23, tasks(23, "-:pending")), 5);
    check("tasks are made", world("1 2 3", 23, String::new()), 5);
    check("tasks wait for a node", world("1:down", 23, tasks(23, "-:new")), 5);
    check("surplus tasks are given up", world("1 2", 2, tasks(23, "1:running")), 5);
    check("tasks leave a node that is down", world("1:down 2", 23, tasks(23, "1:running")), 5);
    check("tasks of a node that is gone are lost", world("2", 23, tasks(23, "1:running")), 5);
    check("what has ended is erased", world("1", 0, tasks(23, "1:shutdown>remove")), 5);
    check("an evicted task is moved", world("1:drain 2", 23, tasks(23, "1:running")), 5);
    check(
        "a removed service's tasks go",
        || {
            let mut world = World::new("1", service(23), &tasks(23, "1:shutdown"));
            let web = Service { pending_delete: true, ..world.web() };
            world.replace(Object::Service(Box::new(web)));
            world
        },
        5,
    );
}

#[test]
fn a_pass_that_was_lost_is_planned_again() {
    let mut world = World::new("1 2", service(23), &tasks(23, "-:pending"));
    let options = Options { actions_max: ACTIONS_MAX, ..Options::default() };
    world.memory = LeaderMemory::new(options);
    let lost = world.plan();
    assert_eq!(lost.actions.len(), ACTIONS_MAX);
    let words = |actions: &[Action]| render(&world.state, actions);
    let lost = words(&lost.actions);
    let again = plan(&world.state, &mut world.memory, &Dirty::default(), world.now, &mut world.rng);
    assert_eq!(words(&again.actions), lost);
    settle(&mut world);
    assert!(world.state.tasks().values().all(|task| task.node_id.is_some()));
}

#[test]
fn a_pass_is_bounded_in_bytes() {
    let mut web = service(40);
    let container = web.spec.task_template.container_spec.get_or_insert_default();
    container.env = Some(vec![format!("TEXT={}", "x".repeat(1 << 20))]);
    let mut world = World::new("1 2", web, "");
    world.dirty = Dirty::all();
    loop {
        let actions = world.plan().actions;
        if actions.is_empty() {
            break;
        }
        let command = Command::new(world.now, actions);
        let bytes = serde_json::to_vec(&command).unwrap().len();
        assert!(bytes < 16 << 20, "{bytes} bytes in a command");
        world.apply(command.actions);
    }
    assert_eq!(world.state.tasks().len(), 40);
}

#[test]
fn a_node_that_is_too_small_is_left_by_as_many_as_without_a_bound() {
    let make = || {
        let mut web = service(23);
        let resources = web.spec.task_template.resources.get_or_insert_default();
        resources.reservations.get_or_insert_default().memory_bytes = Some(100 << 20);
        let mut world = World::new("1 2", web, &tasks(23, "1:running"));
        settle_whole(&mut world);
        world.replace(Object::Node(Box::new(parse_node("1:mem=500"))));
        world
    };
    check("a node became too small", make, 3);
}

#[test]
fn patches_are_not_longer_than_estimated() {
    let mut world = World::new("1 2 3", service(9), &tasks(9, "-:pending"));
    let actions = world.plan().actions;
    let longest = actions.iter().map(|action| {
        assert!(matches!(action, Action::PatchTask(_)));
        serde_json::to_vec(action).unwrap().len()
    });
    assert!(longest.max().unwrap() <= 512 + 256);
}
