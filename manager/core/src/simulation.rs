//! A swarm in one thread, under one seed: the pure core, and workers that obey, fail, vanish, return.
//!
//! Each tick of 250 ms something may happen, then the leader looks, decides and tells. Checked at every
//! tick are the invariants of ARCHITECTURE.md, "Invariants", that the core answers for: 2 (one unfenced
//! task a slot), 3 (placements keep to the filters), 4 (no address twice: the store would refuse), 5
//! (states only grow), 8 (an update keeps its promise) and, when the faults end, 12 (all settles, and
//! who waits says why). The seed is the test's name for what happened: it repeats it exactly.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use skep_common::object::{NodeState, Slot, TaskStatus};
use skep_common::spec::{
    Availability, ContainerSpec, Nanos, Placement, PortConfig, ResourceRequirements, Resources,
    RestartPolicy, TaskSpec, UpdateConfig,
};
use skep_common::{Node, NodeId, Object, Service, ServiceId, Task, TaskId, TaskState, Timestamp};

use crate::assignments::{CopyDuties, for_node};
use crate::command::{Action, TaskPatch};
use crate::constraint;
use crate::container;
use crate::endpoints::Drain;
use crate::liveness::{Answer, Event, Liveness};
use crate::plan::{Dirty, LeaderMemory};
use crate::scheduler::{Amounts, Index};
use crate::store::State;
use crate::testing::{NOW, World, parse_node, service};

const TICK: Duration = Duration::from_millis(250);
/// After this a node that was cut off has been told, has withdrawn and has stopped what was replaced.
const HEAL_WAIT: Duration = Duration::from_secs(20);

/// Seeds of every run. More find more: raise it for a night after a change of the orchestrator.
const N_SEEDS: u64 = 12;

/// One machine: what it was told, and what it does.
#[derive(Debug, Default)]
struct Worker {
    is_connected: bool,
    /// Since when; what ran through a partition has a moment to be stopped.
    connected_at: Timestamp,
    told: BTreeMap<TaskId, TaskState>,
    tasks: BTreeMap<TaskId, TaskStatus>,
}

struct Simulation {
    world: World,
    rng: StdRng,
    workers: BTreeMap<NodeId, Worker>,
    liveness: Liveness,
    drain: Drain,
    /// Whether things still go wrong.
    is_rough: bool,
    /// Containers that no service made and whose end somebody wished.
    unwanted: BTreeSet<TaskId>,
}

fn mib(mib: i64) -> Option<Resources> {
    Some(Resources { memory_bytes: Some(mib << 20), ..Resources::default() })
}

/// Services 1 to 3: plain; constrained and sized; start-first.
fn sample_service(number: u128, replicas: u64) -> Service {
    let mut service = service(replicas);
    service.id = ServiceId(number);
    service.spec.name = format!("s{number}");
    let template = &mut service.spec.task_template;
    template.restart_policy = Some(RestartPolicy {
        delay: Some(Nanos::from(Duration::from_secs(1))),
        ..RestartPolicy::default()
    });
    if number == 1 {
        service.endpoint.ports = vec![PortConfig {
            target_port: 80,
            published_port: Some(8080),
            ..PortConfig::default()
        }];
    }
    if number == 2 {
        template.placement = Some(Placement {
            constraints: Some(vec!["node.labels.disk == ssd".to_owned()]),
            max_replicas: Some(2),
            ..Placement::default()
        });
        template.resources = Some(ResourceRequirements {
            reservations: mib(300),
            ..ResourceRequirements::default()
        });
    }
    service.spec.update_config = Some(UpdateConfig {
        order: (number == 3).then(|| "start-first".to_owned()),
        failure_action: Some("continue".to_owned()),
        ..UpdateConfig::default()
    });
    service
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let nodes = "1:mem=1024 2:mem=1024:disk=ssd 3:mem=1024:disk=ssd 4:mem=512:disk=ssd 5";
        let world = World::new(nodes, sample_service(1, 4), "");
        let liveness = Liveness::new(&world.state, NOW);
        let drain = Drain::new(&world.state, &BTreeSet::new(), NOW);
        let workers = world.state.nodes().keys().map(|id| (*id, Worker::default())).collect();
        let rng = StdRng::seed_from_u64(seed);
        let mut simulation = Self {
            world,
            rng,
            workers,
            liveness,
            drain,
            is_rough: true,
            unwanted: BTreeSet::new(),
        };
        let services = [sample_service(2, 5), sample_service(3, 3)];
        let services = services.map(|service| Object::Service(Box::new(service)));
        simulation.world.put(services.into());
        for node_id in simulation.node_ids() {
            simulation.connect(node_id);
        }
        simulation
    }

    fn node_ids(&self) -> Vec<NodeId> {
        self.workers.keys().copied().collect()
    }

    fn chance(&mut self, per_mille: u32) -> bool {
        self.rng.random_range(0..1000) < per_mille
    }

    fn connect(&mut self, node_id: NodeId) {
        let worker = self.workers.get_mut(&node_id).unwrap();
        if !worker.is_connected {
            (worker.is_connected, worker.connected_at) = (true, self.world.now);
        }
        self.liveness.observe(Event::SessionOpened { node_id, at: self.world.now });
        self.drain.session_opened(node_id);
    }

    /// One tick: faults, wishes, workers, then the leader.
    fn tick(&mut self) {
        self.world.now = self.world.now.after(TICK);
        if self.is_rough {
            self.fault();
            self.wish();
            self.wish_about_containers();
        }
        for node_id in self.node_ids() {
            self.work(node_id);
        }
        self.lead();
        self.tell();
        self.check_slots();
    }

    fn fault(&mut self) {
        for node_id in self.node_ids() {
            let is_connected = self.workers[&node_id].is_connected;
            if is_connected && self.chance(4) {
                let worker = self.workers.get_mut(&node_id).unwrap();
                worker.is_connected = false;
                if self.rng.random_bool(0.5) {
                    // It died; what ran there is gone, and it will say so.
                    for status in self.workers.get_mut(&node_id).unwrap().tasks.values_mut() {
                        if !status.state.is_terminal() {
                            status.state = TaskState::Failed;
                        }
                    }
                }
                if self.rng.random_bool(0.5) {
                    self.liveness.observe(Event::SessionClosed { node_id });
                }
                self.drain.session_closed(node_id);
            } else if !is_connected && self.chance(40) {
                self.connect(node_id);
            }
        }
        if self.chance(5) {
            self.world.memory = LeaderMemory::default();
            self.world.dirty = Dirty::all();
            self.liveness = Liveness::new(&self.world.state, self.world.now);
            self.drain = Drain::new(&self.world.state, &BTreeSet::new(), self.world.now);
            let connected = self.node_ids().into_iter().filter(|id| self.workers[id].is_connected);
            for node_id in connected.collect::<Vec<NodeId>>() {
                self.connect(node_id);
            }
        }
    }

    /// What users and operators do.
    fn wish(&mut self) {
        if self.chance(10) {
            let number = self.rng.random_range(1..=5_u16);
            let node = self.world.state.node(NodeId(number.into())).unwrap();
            let mut node = Node::clone(node);
            node.spec.availability = match self.rng.random_range(0..4) {
                0 => Availability::Drain,
                1 => Availability::Pause,
                _ => Availability::Active,
            };
            if self.rng.random_bool(0.3) {
                let word = if self.rng.random_bool(0.5) { "1:disk=hdd" } else { "1:disk=ssd" };
                node.spec.labels = parse_node(word).spec.labels;
            }
            self.world.replace(Object::Node(Box::new(node)));
        }
        if self.chance(20) {
            let id = ServiceId(self.rng.random_range(1..=3));
            let kind = self.rng.random_range(0..10);
            let replicas = self.rng.random_range(0..6);
            let Some(service) = self.world.state.service(id).cloned() else {
                let service = sample_service(id.0, replicas);
                self.world.put(vec![Object::Service(Box::new(service))]);
                return;
            };
            let mut service = Service::clone(&service);
            match kind {
                0 => service.pending_delete = true,
                1..=4 if !service.pending_delete => {
                    let replicated = &mut service.spec.mode.as_mut().unwrap().replicated;
                    replicated.as_mut().unwrap().replicas = Some(replicas);
                }
                _ if !service.pending_delete => {
                    service.previous_spec = Some(service.spec.clone());
                    service.update_status = None;
                    let counter = &mut service.spec.task_template.force_update;
                    *counter = Some(counter.unwrap_or(0) + 1);
                }
                _ => return,
            }
            self.world.replace(Object::Service(Box::new(service)));
        }
    }

    /// Somebody runs, stops or removes a container of a node.
    fn wish_about_containers(&mut self) {
        if !self.chance(30) {
            return;
        }
        let node_id = NodeId(self.rng.random_range(1..=5));
        let of_node = container::of_node(&self.world.state, node_id);
        let found: Vec<TaskId> = of_node.map(|task| task.id).collect();
        let kind = self.rng.random_range(0..4);
        let Some(task_id) = found.first().copied().filter(|_| kind > 0) else {
            let id = TaskId(self.rng.random_range(u128::from(u64::MAX)..u128::MAX));
            let image = format!("i@sha256:{}", "1".repeat(64));
            let container_spec = Some(ContainerSpec { image, ..ContainerSpec::default() });
            let request = container::Request {
                name: String::new(),
                spec: TaskSpec { container_spec, ..TaskSpec::default() },
                auto_remove: self.rng.random_bool(0.5),
            };
            let action = container::run(&self.world.state, id, node_id, request, self.world.now);
            return self.apply(vec![action.unwrap()]);
        };
        let task = self.world.state.task(task_id).unwrap();
        let action = match kind {
            1 => container::stop(task),
            _ => match container::remove(task, kind == 2) {
                Ok(action) => action,
                Err(_) => return, // It runs.
            },
        };
        self.unwanted.insert(task_id);
        self.apply(vec![action]);
    }

    /// A worker does what it was told, at its own pace, and reports when it can.
    fn work(&mut self, node_id: NodeId) {
        let told = self.workers[&node_id].told.clone();
        for (task_id, desired) in told {
            let now = self.world.now;
            // To stop takes longer than to start: a grace period is for that.
            let is_stop = !desired.wants_run();
            let moves = self.chance(if is_stop { 150 } else { 600 });
            let fails = self.is_rough && self.chance(8);
            let sickens = self.is_rough && self.chance(3);
            let worker = self.workers.get_mut(&node_id).unwrap();
            let status = worker.tasks.entry(task_id).or_default();
            if status.state.is_terminal() || !moves {
                continue;
            }
            status.timestamp = now;
            status.state = match (desired, status.state) {
                (desired, _) if !desired.wants_run() => TaskState::Shutdown,
                (_, TaskState::Running) if fails => TaskState::Failed,
                (_, TaskState::Preparing) if fails => TaskState::Rejected,
                (TaskState::Ready, state) if state >= TaskState::Ready => state,
                (_, state) if state < TaskState::Accepted => TaskState::Accepted,
                (_, TaskState::Accepted) => TaskState::Preparing,
                (_, TaskState::Preparing) => TaskState::Ready,
                (_, TaskState::Ready) => TaskState::Starting,
                (_, state) if state == TaskState::Running => {
                    status.unhealthy |= sickens;
                    state
                }
                _ => TaskState::Running,
            };
        }
        if !self.workers[&node_id].is_connected {
            return;
        }
        self.liveness.observe(Event::Beat { node_id, at: self.world.now });
        let reports: Vec<Action> = self.workers[&node_id]
            .tasks
            .iter()
            .filter(|(task_id, status)| {
                let stored = self.world.state.task(**task_id);
                stored.is_some_and(|task| {
                    task.status.state < status.state || task.status.unhealthy != status.unhealthy
                })
            })
            .map(|(task_id, status)| {
                let status = Some(status.clone());
                Action::PatchTask(TaskPatch { status, ..TaskPatch::of(*task_id) })
            })
            .collect();
        self.apply(reports);
    }

    /// Commits, and checks that states only grow.
    fn apply(&mut self, actions: Vec<Action>) {
        let before = self.world.state.clone();
        self.world.apply(actions);
        for (task_id, old) in before.tasks() {
            if let Some(new) = self.world.state.task(*task_id) {
                assert!(new.status.state >= old.status.state, "{task_id}: state fell");
                assert!(new.desired_state >= old.desired_state, "{task_id}: desired state fell");
                assert!(old.node_id.is_none() || old.node_id == new.node_id, "{task_id} was moved");
            }
        }
    }

    fn lead(&mut self) {
        let verdict = self.liveness.decide(&self.world.state, self.world.now);
        for node_id in verdict.probes {
            let is_connected = self.workers[&node_id].is_connected;
            let answer = if is_connected { Answer::Accepted } else { Answer::None };
            self.liveness.observe(Event::Probed { node_id, at: self.world.now, answer });
        }
        self.apply(verdict.actions);
        let plan = self.world.plan();
        if plan.actions.is_empty() && self.rng.random_bool(0.05) {
            let anew = Index::rebuild(&self.world.state).describe();
            assert_eq!(self.world.memory.index().describe(), anew, "the index is stale");
        }
        if self.is_rough && self.chance(50) {
            return; // The entry was lost; the next pass must see to it.
        }
        let before = self.world.state.clone();
        self.apply(plan.actions);
        self.check_placements(&before);
        let silent = &verdict.not_in_balancer;
        self.drain.update(&self.world.state, silent, self.world.now);
    }

    /// What was placed fits: nodes ready and active, constraints met, nothing over-reserved.
    fn check_placements(&self, before: &State) {
        let state = &self.world.state;
        let is_placed_now = |task: &&std::sync::Arc<Task>| {
            let old = before.task(task.id);
            task.node_id.is_some() && old.is_none_or(|old| old.node_id.is_none())
        };
        for task in state.tasks().values().filter(is_placed_now) {
            let node_id = task.node_id.unwrap();
            let node = state.node(node_id).unwrap();
            assert_eq!(node.status.state, NodeState::Ready);
            assert_eq!(node.spec.availability, Availability::Active);
            let placement = task.spec.placement.clone().unwrap_or_default();
            let constraints = constraint::parse_all(&placement.constraints.unwrap_or_default());
            assert!(constraint::matches_all(&constraints.unwrap(), node), "{}", task.name());
            let present: Vec<&Task> = state
                .tasks_of_node(node_id)
                .map(|task| &**task)
                .filter(|task| !task.status.state.is_terminal())
                .collect();
            let mut free = Amounts::of(node.description.as_ref().map(|d| &d.resources));
            for task in &present {
                free.take(&Amounts::reserved_by(&task.spec));
            }
            let is_sized = Amounts::reserved_by(&task.spec).memory_bytes > 0;
            assert!(!is_sized || free.memory_bytes >= 0, "node {node_id} is over-reserved");
            let of_service = present.iter().filter(|other| {
                other.service_id == task.service_id && other.desired_state.wants_run()
            });
            let max = placement.max_replicas.filter(|max| *max > 0).unwrap_or(u64::MAX);
            assert!(of_service.count() as u64 <= max, "{}: too many on one node", task.name());
        }
    }

    fn tell(&mut self) {
        let held = self.drain.held_back(&self.world.state, self.world.now);
        for (node_id, worker) in self.workers.iter_mut().filter(|(_, worker)| worker.is_connected) {
            let set =
                for_node(&self.world.state, *node_id, &CopyDuties::new(), &BTreeSet::new(), &held);
            for status in worker.tasks.iter_mut().filter(|(id, _)| !set.tasks.contains_key(id)) {
                status.1.state = status.1.state.max(TaskState::Shutdown);
            }
            worker.told = set.tasks.iter().map(|(id, task)| (*id, task.desired_state)).collect();
            self.drain.acknowledge(*node_id, self.drain.version());
        }
    }

    /// Of a slot, at most one container runs on nodes that are in reach, stopping ones included; with
    /// start-first updates, two that were not told to stop.
    fn check_slots(&self) {
        let healed_before = Timestamp(self.world.now.0 - HEAL_WAIT.as_nanos() as i64);
        let is_healed =
            |worker: &&Worker| worker.is_connected && worker.connected_at <= healed_before;
        let mut running: BTreeMap<(ServiceId, Slot), Vec<TaskId>> = BTreeMap::new();
        for worker in self.workers.values().filter(is_healed) {
            for (task_id, desired) in &worker.told {
                let state = worker.tasks.get(task_id).map(|status| status.state);
                let task = self.world.state.task(*task_id);
                let Some(task) = task.filter(|_| state == Some(TaskState::Running)) else {
                    continue;
                };
                let is_start_first = task.service_id == ServiceId(3);
                if !is_start_first || desired.wants_run() {
                    running.entry((task.service_id, task.slot_key())).or_default().push(*task_id);
                }
            }
        }
        for ((service_id, slot), tasks) in running {
            let limit = if service_id == ServiceId(3) { 2 } else { 1 };
            assert!(tasks.len() <= limit, "service {service_id} slot {slot}: {tasks:?}");
        }
    }

    /// Ends the faults and checks that everything comes to rest as it should.
    fn settle(&mut self) {
        self.is_rough = false;
        for node_id in self.node_ids() {
            if !self.workers[&node_id].is_connected {
                self.connect(node_id);
            }
            let mut node = Node::clone(self.world.state.node(node_id).unwrap());
            node.spec.availability = Availability::Active;
            self.world.replace(Object::Node(Box::new(node)));
        }
        // A minute of patience with predecessors, the slots of an update one by one, their monitors.
        for _ in 0..(4 * 180) {
            self.tick();
        }
        self.world.expect_settled("at rest");
        for service in self.world.state.services().values() {
            assert!(!service.pending_delete, "{} was not deleted", service.spec.name);
            let state = service.update_status.as_ref().map_or("completed", |s| s.state.as_str());
            assert!(matches!(state, "completed" | "updating"), "{}: {state}", service.spec.name);
            let live = self.world.state.tasks_of_service(service.id);
            let live: Vec<&Task> =
                live.map(|t| &**t).filter(|t| t.desired_state.wants_run()).collect();
            assert_eq!(Some(live.len() as u64), service.spec.replicas(), "{}", service.spec.name);
            for task in live {
                let is_waiting = task.node_id.is_none() && !task.status.err.is_empty();
                let is_running = task.status.state == TaskState::Running && !task.status.unhealthy;
                assert!(is_waiting || is_running, "{}: {:?}", task.name(), task.status);
                assert!(state == "updating" || *task.spec == service.spec.task_template);
            }
        }
        for task in self.world.state.tasks().values() {
            let Some(standalone) = &task.standalone else { continue };
            let is_wanted = task.desired_state.wants_run();
            assert!(is_wanted || self.unwanted.contains(&task.id), "{} was stopped", task.name());
            let has_ended = task.status.state.is_terminal();
            assert!(!(standalone.auto_remove && has_ended), "{} is still there", task.name());
        }
        for worker in self.workers.values() {
            for (task_id, status) in &worker.tasks {
                let is_wanted = self.world.state.task(*task_id).is_some();
                assert!(
                    is_wanted || status.state.is_terminal(),
                    "{task_id} was forgotten but runs"
                );
            }
        }
    }
}

#[test]
fn no_sequence_of_faults_and_wishes_breaks_an_invariant() {
    for seed in 0..N_SEEDS {
        let mut simulation = Simulation::new(seed);
        let run = std::panic::AssertUnwindSafe(|| {
            for _ in 0..400 {
                simulation.tick();
            }
            simulation.settle();
        });
        let outcome = std::panic::catch_unwind(run);
        assert!(outcome.is_ok(), "seed {seed} breaks an invariant: see the message above");
    }
}

#[test]
fn an_update_keeps_all_but_its_parallelism_running() {
    for (seed, parallelism) in (0..12).zip([1, 2, 3].into_iter().cycle()) {
        let mut simulation = Simulation::new(seed);
        simulation.is_rough = false;
        for _ in 0..80 {
            simulation.tick();
        }
        let count = |simulation: &Simulation| {
            let tasks = simulation.world.state.tasks_of_service(ServiceId(1));
            let up = tasks.filter(|task| {
                task.status.state == TaskState::Running && task.desired_state == TaskState::Running
            });
            up.count()
        };
        assert_eq!(count(&simulation), 4);
        let mut service = Service::clone(simulation.world.state.service(ServiceId(1)).unwrap());
        service.spec.task_template.force_update = Some(1);
        service.spec.update_config.as_mut().unwrap().parallelism = Some(parallelism);
        simulation.world.replace(Object::Service(Box::new(service)));
        let mut lowest = usize::MAX;
        for _ in 0..400 {
            simulation.tick();
            lowest = lowest.min(count(&simulation));
        }
        let service = simulation.world.state.service(ServiceId(1)).unwrap();
        let status = service.update_status.as_ref().unwrap();
        assert_eq!(status.state, "completed", "seed {seed}: {}", status.message);
        assert_eq!(lowest as u64, 4 - parallelism, "seed {seed}");
    }
}
