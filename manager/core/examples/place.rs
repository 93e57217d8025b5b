//! Places 100,000 tasks of 100 services on 1,000 nodes, and prints the time and memory it took.
//!
//! SwarmKit's scheduler needs 9.6 s and 1.5 GB for its part of this on the machine where that was
//! measured; run both on one machine before you compare. Three ways are measured: tasks that exist
//! already and wait for a node, as SwarmKit's benchmark has it; everything from the services on, in
//! passes of the size that a leader commits; and one pass over the settled swarm, as after an event.
//!
//! `cargo run --release -p skep-manager-core --features testing --example place`

#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
#![expect(clippy::print_stdout, reason = "a benchmark prints what it measured")]

use std::time::{Duration, Instant};

use skep_common::{Object, ServiceId, TaskId, Timestamp};
use skep_manager_core::testing::{self, World, parse_task};
use skep_manager_core::{Dirty, LeaderMemory, Options};

const N_NODES: u16 = 1000;
const N_SERVICES: u128 = 100;
const N_REPLICAS: u64 = 1000;

fn world(with_tasks: bool) -> World {
    let nodes: Vec<String> = (1..=N_NODES).map(|number| number.to_string()).collect();
    let mut world = World::new(&nodes.join(" "), testing::service(0), "");
    for number in 1..=N_SERVICES {
        let mut service = testing::service(N_REPLICAS);
        service.id = ServiceId(1000 + number);
        service.spec.name = format!("service-{number}");
        world.put(vec![Object::Service(Box::new(service.clone()))]);
        if with_tasks {
            let service = world.state.service(service.id).expect("it was just made").clone();
            let task = |slot: u64| {
                let mut task = parse_task(&service, 0, &format!("{slot}@-:pending"));
                task.id = TaskId(number << 64 | u128::from(slot));
                Object::Task(Box::new(task))
            };
            world.put((1..=N_REPLICAS).map(task).collect());
        }
    }
    world
}

/// Plans and commits until there is nothing left; the time of the planning and of the whole.
fn run(world: &mut World) -> (Duration, Duration, usize) {
    let (mut planning, mut n_passes) = (Duration::ZERO, 0);
    let begin = Instant::now();
    loop {
        let started = Instant::now();
        let plan = world.plan();
        planning += started.elapsed();
        if plan.actions.is_empty() {
            return (planning, begin.elapsed(), n_passes);
        }
        n_passes += 1;
        world.apply(plan.actions);
    }
}

fn report(name: &str, world: &mut World, options: Options) {
    world.memory = LeaderMemory::new(options);
    world.dirty = Dirty::all();
    let (planning, whole, n_passes) = run(world);
    let tasks = world.state.tasks();
    let n_placed = tasks.values().filter(|task| task.node_id.is_some()).count();
    println!(
        "{name}: {n_placed} of {} tasks placed in {n_passes} passes; planning {planning:.2?}, with apply {whole:.2?}; peak memory {}",
        tasks.len(),
        peak_memory()
    );
}

fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    line.trim_start_matches("VmHWM:").trim().to_owned()
}

fn main() {
    let mut waiting = world(true);
    report("tasks that wait", &mut waiting, Options::default());

    let started = Instant::now();
    waiting.dirty = Dirty::all();
    let plan = waiting.plan();
    println!(
        "a new leader looks at everything: {:.2?}, {} actions",
        started.elapsed(),
        plan.actions.len()
    );

    let task = waiting.state.tasks().values().next().expect("they were placed").clone();
    waiting.now = Timestamp(waiting.now.0 + 1);
    waiting.report(task.id, skep_common::TaskState::Failed);
    let started = Instant::now();
    let plan = waiting.plan();
    println!("one task fails: {:.2?}, {} actions", started.elapsed(), plan.actions.len());

    drop(waiting);
    let mut world = world(false);
    report("from the services on", &mut world, Options::default());
}
