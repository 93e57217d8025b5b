//! 12. When faults end, the swarm settles and serves within a bound; every task that waits has a current
//!     reason.

use std::collections::BTreeSet;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use skep_common::object::{NodeState, Slot, TaskStatus};
use skep_common::spec::{Availability, ModeKind};
use skep_common::{Node, Service, Task, TaskState};
use skep_manager_core::{Dirty, LeaderMemory, State, constraint, plan};

use super::{Invariant, ensure, managers_rest};
use crate::agent::Link;
use crate::seen::Seen;
use crate::world::World;

pub(super) struct ComesToRest;

/// What is not at rest yet; `Ok` where everything is as it should be.
pub(crate) fn unrest(world: &World) -> Result<(), String> {
    let state = &world.ledger;
    let Some((leader_id, leader)) = world.leaders().next() else {
        return Err("nobody leads".into());
    };
    ensure!(leader.state.version() == state.version(), "the leader is behind");
    for (id, machine) in world.machines.iter().enumerate() {
        let node = state.node(machine.node_id);
        let is_ready = node.is_some_and(|node| node.status.state == NodeState::Ready);
        ensure!(is_ready, "the node of {id} is not ready");
        let is_open = matches!(machine.agent.link, Link::Open { term, .. } if term == leader.term);
        ensure!(is_open, "{id} has no session with the leader");
        ensure!(machine.agent.unsent.is_empty(), "{id} has something to report");
        if let Some(manager) = &machine.manager {
            ensure!(manager.state.version() == state.version(), "manager {id} is behind");
        }
        for task_id in &machine.agent.running {
            let task = state.task(*task_id);
            let is_known = task.is_some_and(|task| task.node_id == Some(machine.node_id));
            ensure!(is_known, "{task_id} was forgotten and runs on {id}");
        }
    }
    for service in state.services().values() {
        service_rests(world, service)?;
    }
    for task in state.tasks().values().filter(|task| !task.desired_state.wants_run()) {
        ensure!(
            task.status.state.is_terminal() || task.node_id.is_none(),
            "{} ({} on {:?}) is still stopping: {:?}",
            task.name(),
            task.id,
            task.node_id,
            task.status
        );
    }
    // A leader with an empty memory finds nothing to do either, and no other reason for whom waits.
    let mut rng = StdRng::seed_from_u64(1);
    let clock = world.machines[leader_id].clock(world.now());
    let plan = plan(state, &mut LeaderMemory::default(), &Dirty::all(), clock, &mut rng);
    ensure!(plan.actions.is_empty(), "a new leader would do {:?}", plan.actions);
    Ok(())
}

/// Whether a service is what it was asked to be.
fn service_rests(world: &World, service: &Service) -> Result<(), String> {
    let state = &world.ledger;
    let name = &service.spec.name;
    ensure!(!service.pending_delete, "{name} is not deleted");
    let update = service.update_status.as_ref().map_or("", |status| status.state.as_str());
    let live: Vec<&Task> = state
        .tasks_of_service(service.id)
        .map(|task| &**task)
        .filter(|task| task.desired_state.wants_run())
        .collect();
    let is_over = !matches!(update, "updating" | "rollback_started");
    ensure!(is_over || is_stuck(world, service), "{name} is {update}: {}", words(&live));
    if service.spec.mode_kind().is_some_and(ModeKind::is_job) {
        return job_is_over(state, service, &live);
    }
    let replicas = match service.spec.replicas() {
        Some(replicas) => replicas,
        None => eligible(state, service)?.count() as u64,
    };
    ensure!(
        live.len() as u64 == replicas,
        "{name}, whose update is {update:?}, has {} tasks of {replicas}: {}",
        live.len(),
        words(&live)
    );
    for task in live {
        let is_waiting = task.node_id.is_none() && !task.status.err.is_empty();
        let is_running = task.status.state == TaskState::Running && !task.status.unhealthy;
        ensure!(
            is_waiting || is_running,
            "{} ({} on {:?}) is {:?}",
            task.name(),
            task.id,
            task.node_id,
            task.status
        );
    }
    Ok(())
}

/// The nodes that a global service or job is to have a task on; paused ones, where they have one already.
fn eligible<'s>(
    state: &'s State,
    service: &'s Service,
) -> Result<impl Iterator<Item = &'s Node>, String> {
    let placement = service.spec.task_template.placement.as_ref();
    let words = placement.and_then(|placement| placement.constraints.clone()).unwrap_or_default();
    let constraints = constraint::parse_all(&words).map_err(|error| error.to_string())?;
    let has_one = |node: &Node| {
        let mut tasks = state.tasks_of_slot(service.id, Slot::Node(node.id));
        tasks.any(|task| task.desired_state.wants_run())
    };
    let may_have_one = move |node: &&Node| {
        let is_active = node.spec.availability == Availability::Active;
        let is_paused = node.spec.availability == Availability::Pause;
        node.status.state != NodeState::Down
            && ((is_active && constraint::matches_all(&constraints, node))
                || (is_paused && has_one(node)))
    };
    Ok(state.nodes().values().map(|node| &**node).filter(may_have_one))
}

/// Each slot of a job is done, or failed for good, or waits for a node.
fn job_is_over(state: &State, service: &Service, live: &[&Task]) -> Result<(), String> {
    let is_done = |task: &Task| task.status.state == TaskState::Complete;
    let is_waiting = |task: &Task| task.node_id.is_none() && !task.status.err.is_empty();
    for task in live {
        ensure!(is_done(task) || is_waiting(task), "{} goes on: {:?}", task.name(), task.status);
    }
    if live.iter().any(|task| is_waiting(task)) {
        return Ok(());
    }
    let iteration = service.job_status.map(|status| status.job_iteration);
    let tasks = state.tasks_of_service(service.id);
    let ended = tasks.filter(|task| task.job_iteration == iteration).map(|task| task.slot_key());
    let n_ended = ended.collect::<BTreeSet<Slot>>().len() as u64;
    let total = match service.spec.mode_kind() {
        Some(ModeKind::ReplicatedJob { total, .. }) => total,
        _ => n_ended, // What a node has done stays done, be it paused or drained now.
    };
    ensure!(n_ended == total, "{n_ended} of {total} tasks of {} have ended", service.spec.name);
    Ok(())
}

fn words(tasks: &[&Task]) -> String {
    let word = |task: &&Task| {
        let (state, desired, version) = (task.status.state, task.desired_state, task.spec_version);
        let TaskStatus { err, .. } = &task.status;
        format!("{} {}:{state}>{desired}~{version} {err:?}", task.id, task.slot)
    };
    tasks.iter().map(word).collect::<Vec<String>>().join(" ")
}

/// An update whose next task has no place waits for its deadline.
fn is_stuck(world: &World, service: &Service) -> bool {
    let mut tasks = world.ledger.tasks_of_service(service.id);
    tasks.any(|task| task.desired_state.wants_run() && task.node_id.is_none())
}

impl Invariant for ComesToRest {
    fn name(&self) -> &'static str {
        "12: when faults end, the swarm settles and serves"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::AtRest { is_settled: false } => {
                unrest(world)?;
                // Else the members are what does not rest.
                managers_rest(world).map_or(Ok(()), |()| Err("it settled too late".to_owned()))
            }
            _ => Ok(()),
        }
    }
}
