//! Measures how fast the core places tasks, without managers, wire or disk.
//!
//! `place TASKS SERVICES NODES [BOTH|WAITING]` makes a swarm whose tasks exist and wait for a node, as
//! SwarmKit's benchmark of its scheduler has it, and plans and commits passes until nothing is left to do:
//! a new leader's first look at everything is among them. Then one service after the other is scaled up by
//! one task on the swarm that is full by now. Prints a sample a line, `NAME VALUE`, in seconds or MiB;
//! `cpu` is the processor time of the same, which other work on the machine changes less.
//!
//! `cargo run --release -p skep-manager-core --features testing --example place 100000 100 1000`

#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
#![expect(clippy::print_stdout, reason = "a benchmark prints what it measured")]

use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::time::{ClockId, clock_gettime};
use rand::SeedableRng;
use rand::rngs::StdRng;
use skep_common::spec::{
    ContainerSpec, NetworkAttachmentConfig, Replicated, ResourceRequirements, Resources,
    ServiceMode, TaskSpec,
};
use skep_common::{
    Image, ImageId, Meta, NodeId, Object, Service, ServiceId, TaskId, TaskState, Timestamp,
};
use skep_manager_core::testing::{self, World, parse_task};
use skep_manager_core::{Dirty, LeaderMemory, Options};

/// Nodes that the mesh can number: beyond, tasks have no uplink.
const MESH_NODES_MAX: u64 = 4094;
/// Tasks that are made in one command before the measurement.
const BATCH: usize = 1000;
/// How often one task more is asked for.
const N_MORE: usize = 200;

/// What a part of the work took.
#[derive(Clone, Copy, Default)]
struct Took {
    wall: Duration,
    cpu: Duration,
}

impl Took {
    fn of<T>(work: impl FnOnce() -> T) -> (Self, T) {
        let (started, cpu) = (Instant::now(), thread_time());
        let value = work();
        (Self { wall: started.elapsed(), cpu: thread_time() - cpu }, value)
    }

    fn print(self, name: &str) {
        println!("{name} {}", self.wall.as_secs_f64());
        println!("{name}-cpu {}", self.cpu.as_secs_f64());
    }
}

impl std::ops::AddAssign for Took {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    time.expect("Linux has a clock of each thread").into()
}

const IMAGE: &str = "registry.example/app:1";

/// The image of all services, which every node holds.
fn image(n_nodes: u64) -> Image {
    Image {
        id: ImageId(1),
        meta: Meta::default(),
        name: IMAGE.to_owned(),
        digest: digest(),
        size: 1 << 20,
        created: None,
        holders: (1..=n_nodes).map(|number| NodeId(number.into())).collect(),
    }
}

fn digest() -> String {
    format!("sha256:{}", "5".repeat(64))
}

/// The template of the services: with reservations, so that they count in the ranking.
fn template(has_uplink: bool) -> TaskSpec {
    let container = ContainerSpec {
        image: format!("{IMAGE}@{}", digest()),
        env: Some(vec!["MODE=production".to_owned(), "LEVEL=info".to_owned()]),
        ..ContainerSpec::default()
    };
    let reservations = Resources {
        nano_cpus: Some(10_000_000),
        memory_bytes: Some(16 << 20),
        ..Resources::default()
    };
    let host =
        NetworkAttachmentConfig { target: "host".to_owned(), ..NetworkAttachmentConfig::default() };
    TaskSpec {
        container_spec: Some(container),
        resources: Some(ResourceRequirements {
            reservations: Some(reservations),
            ..ResourceRequirements::default()
        }),
        networks: (!has_uplink).then(|| vec![host]),
        ..TaskSpec::default()
    }
}

fn service(number: u64, n_replicas: u64, has_uplink: bool) -> Service {
    let mut service = testing::service(n_replicas);
    service.id = ServiceId(1000 + u128::from(number));
    service.spec.name = format!("service-{number}");
    service.spec.task_template = template(has_uplink);
    service
}

/// A swarm with services; their tasks wait, or are still to be made.
fn world(n_tasks: u64, n_services: u64, n_nodes: u64, has_tasks: bool) -> World {
    let nodes: Vec<String> = (1..=n_nodes).map(|number| number.to_string()).collect();
    let mut world = World::new(&nodes.join(" "), testing::service(0), "");
    let mut cluster = testing::cluster();
    cluster.ingress_pool = "10.0.0.0/8".parse::<Ipv4Net>().expect("this is a network");
    let image = Box::new(image(n_nodes));
    world.put(vec![Object::Cluster(Box::new(cluster)), Object::Image(image)]);
    let mut rng = StdRng::seed_from_u64(2); // Not the leader's, so that it draws other ids.
    let n_replicas = n_tasks / n_services;
    for number in 1..=n_services {
        let service = service(number, n_replicas, n_nodes <= MESH_NODES_MAX);
        let service_id = service.id;
        world.put(vec![Object::Service(Box::new(service))]);
        if !has_tasks {
            continue;
        }
        let service = world.state.service(service_id).expect("it was just made").clone();
        let model = parse_task(&service, 0, "1@-:pending");
        let slots: Vec<u64> = (1..=n_replicas).collect();
        for slots in slots.chunks(BATCH) {
            let mut task = |slot: &u64| {
                let mut task = model.clone(); // One template for all, as the leader's own tasks have it.
                (task.id, task.slot) = (TaskId::random(&mut rng), *slot);
                Object::Task(Box::new(task))
            };
            world.put(slots.iter().map(&mut task).collect());
        }
    }
    world
}

/// Plans and commits until there is nothing left; what the planning took, and the committing.
fn settle(world: &mut World) -> (Took, Took, usize) {
    let (mut planning, mut applying, mut n_passes) = (Took::default(), Took::default(), 0);
    loop {
        let (took, plan) = Took::of(|| world.plan());
        planning += took;
        if plan.actions.is_empty() {
            return (planning, applying, n_passes);
        }
        n_passes += 1;
        applying += Took::of(|| world.apply(plan.actions)).0;
    }
}

/// A new leader places everything.
fn place_all(world: &mut World, name: &str, n_tasks: u64) {
    world.memory = LeaderMemory::new(Options::default());
    world.dirty = Dirty::all();
    let (planning, applying, n_passes) = settle(world);
    let n_placed = world.state.tasks().values().filter(|task| task.node_id.is_some()).count();
    assert_eq!(n_placed as u64, n_tasks, "all tasks must be placed: the nodes have room for them");
    planning.print(name);
    applying.print(&format!("{name}-apply"));
    println!("{name}-passes {n_passes}");
    println!("{name}-memory {}", peak_memory());
}

/// Scales one service after the other up by one task, each time on a settled swarm.
fn one_more(world: &mut World, n_services: u64) {
    for (number, _) in (0..n_services).cycle().zip(0..N_MORE) {
        let service_id = ServiceId(1001 + u128::from(number));
        let mut service = (**world.state.service(service_id).expect("it was made")).clone();
        let replicas = service.spec.replicas().expect("it is replicated") + 1;
        let replicated = Some(Replicated { replicas: Some(replicas) });
        service.spec.mode = Some(ServiceMode { replicated, ..ServiceMode::default() });
        world.now = Timestamp(world.now.0 + 1_000_000);
        world.replace(Object::Service(Box::new(service)));
        let (took, plan) = Took::of(|| world.plan());
        let words = testing::render(&world.state, &plan.actions);
        assert_eq!(words.matches('+').count(), 1, "one task is made: {words}");
        took.print("one-more");
        world.apply(plan.actions);
        settle(world);
    }
}

/// One task fails on a settled swarm.
fn one_fails(world: &mut World) {
    let task_id = *world.state.tasks().keys().next().expect("there are tasks");
    world.now = Timestamp(world.now.0 + 1_000_000);
    world.report(task_id, TaskState::Failed);
    Took::of(|| world.plan()).0.print("one-fails");
}

fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| kib / 1024.0)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let numbers: Vec<u64> = arguments.iter().map_while(|text| text.parse().ok()).collect();
    let [n_tasks, n_services, n_nodes] = numbers[..] else {
        println!("usage: place TASKS SERVICES NODES [BOTH|WAITING]");
        std::process::exit(2);
    };
    let mut waiting = world(n_tasks, n_services, n_nodes, true);
    place_all(&mut waiting, "waiting", n_tasks);
    waiting.dirty = Dirty::all();
    Took::of(|| waiting.plan()).0.print("look");
    one_more(&mut waiting, n_services);
    one_fails(&mut waiting);
    if arguments.last().is_some_and(|word| word == "BOTH") {
        drop(waiting);
        place_all(&mut world(n_tasks, n_services, n_nodes, false), "services", n_tasks);
    }
}
