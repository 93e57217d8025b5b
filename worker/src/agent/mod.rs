//! The worker's side of the session: applies assignments, runs tasks, reports.
//!
//! ```text
//! leader ══ session ══► Agent ──► Runner (one a task) ──► Executor
//!        ◄═ reports ══╝   │  └──► images: fetches what assignments name
//!                         └─────► balancers: the mesh table, acknowledged when the kernel has it
//! ```
//!
//! The agent is one loop that owns its state. It goes on alone when no manager answers: containers run
//! on, health checks and balancing go on.
//!
//! Reading order: [`Agent`], `runner`, `session`, `search`, `mesh`, `networks`, `host_ports`, `images`, `payloads`, `task_store`.
//!
//! # Invariants
//!
//! - An update of assignments is applied whole and in the order mesh, images, secrets, tasks; one that does not
//!   follow from the set at hand ends the session, and the next begins with the whole set.
//! - A table version is acknowledged only when the kernel's rules are those of that version.
//! - Every status is reported again in a new session: the leader that took it may be gone.

mod balancers;
mod host_ports;
mod images;
mod mesh;
mod networks;
mod payloads;
mod runner;
mod search;
mod session;
mod task_store;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use ipnet::Ipv4Net;
use prost::Message as _;
use skep_common::limits::QUEUE_LENGTH;
use skep_common::object::{NodeDescription, TaskStatus};
use skep_common::spec::PortProtocol;
use skep_common::{Task, TaskId};
use skep_proto::agent_message::Message;
use skep_proto::{
    AgentMessage, Assignments, DescriptionReport, Hello, MeshUpdate, TaskReport, TaskStatusReport,
    Welcome,
};
use skep_runtime::TaskSet;
use skep_runtime::transport::ChannelPool;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use balancers::Balancers;
pub use images::{ImageHolding, Images};
pub use payloads::Payloads;
pub use session::{Beats, Managers, TermKeeper, ToldRole};
pub use task_store::{Remembered, TaskStore};

use crate::executor::{Executor, Found};
use balancers::{Applied, BalancerHandle, Tables};
use runner::{Assigned, Report, Runner};
use session::{FromSession, SessionOptions};

/// What an agent needs.
#[derive(Debug)]
pub struct AgentOptions {
    /// What this node says of itself, which may change.
    pub description: watch::Receiver<NodeDescription>,
    /// `ip:port` at which other nodes reach this one.
    pub addr: String,
    /// Where task records are kept.
    pub tasks_dir: PathBuf,
    /// Runs the containers.
    pub executor: Arc<dyn Executor>,
    /// Has the images; absent where nothing is fetched (tests).
    pub images: Option<Images>,
    /// Holds the secrets and configs.
    pub payloads: Payloads,
    /// Programs the kernel's balancers; absent where there is no mesh (tests).
    pub balancers: Option<Box<dyn Balancers>>,
    /// Where the leader may be found.
    pub managers: Managers,
    /// Channels to other nodes.
    pub pool: ChannelPool,
    /// What sends heartbeats.
    pub beats: Beats,
    /// What the agent's tasks belong to.
    pub tasks: TaskSet,
}

/// The agent's loop and its state.
#[derive(Debug)]
pub struct Agent {
    executor: Arc<dyn Executor>,
    images: Option<Images>,
    payloads: Payloads,
    balancers: BalancerHandle,
    store: TaskStore,
    tasks: TaskSet,
    held: BTreeMap<TaskId, Held>,
    reports: mpsc::Sender<Report>,
    sequence: u64,
    /// Counts sessions.
    session: u64,
    /// Whether the leader of an open session has said what this node is to run.
    is_led: watch::Sender<bool>,
    to_leader: Option<mpsc::Sender<AgentMessage>>,
    end_session: CancellationToken,
    /// Changed since their records were written.
    unwritten: BTreeSet<TaskId>,
    unsent: BTreeSet<TaskId>,
    mesh: mesh::MeshState,
    /// Which peers and ports the mesh has, as the leader that told them named it; empty: those of no leader.
    table_digest: watch::Sender<Bytes>,
    unsent_mesh: Option<skep_proto::MeshApplied>,
    unsent_images: BTreeMap<String, ImageHolding>,
    unsent_description: Option<NodeDescription>,
}

#[derive(Debug)]
struct Held {
    assigned: watch::Sender<Assigned>,
    status: TaskStatus,
}

/// Why an agent cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The records of its tasks cannot be read.
    #[error("failed to read this node's tasks")]
    Tasks(#[from] task_store::Error),
    /// Its containers cannot be found.
    #[error("failed to find this node's containers")]
    Containers(#[from] crate::executor::Error),
}

impl Agent {
    /// Takes up the tasks and containers of the last daemon, and starts to look for a leader.
    pub async fn start(options: AgentOptions) -> Result<(), StartError> {
        let store = TaskStore::open(&options.tasks_dir)?;
        let remembered = store.load()?;
        let mut found: BTreeMap<TaskId, Found> =
            options.executor.find().await?.into_iter().collect();
        let (reports, reported) = mpsc::channel(QUEUE_LENGTH);
        let (applied, balancer_events) = mpsc::channel(QUEUE_LENGTH);
        let (fetched, image_events) = mpsc::channel(QUEUE_LENGTH);
        if let Some(images) = &options.images {
            images.report_to(fetched);
        }
        let mut agent = Self {
            executor: options.executor,
            images: options.images.clone(),
            payloads: options.payloads,
            balancers: BalancerHandle::start(options.balancers, applied, &options.tasks),
            store,
            tasks: options.tasks.clone(),
            held: BTreeMap::new(),
            reports,
            sequence: 0,
            session: 0,
            is_led: watch::channel(false).0,
            to_leader: None,
            end_session: CancellationToken::new(),
            unwritten: BTreeSet::new(),
            unsent: BTreeSet::new(),
            mesh: mesh::MeshState::default(),
            table_digest: watch::Sender::default(),
            unsent_mesh: None,
            unsent_images: BTreeMap::new(),
            unsent_description: None,
        };
        for record in remembered {
            let container = found.remove(&record.task.id);
            agent.run_task(record, container);
        }
        agent.note_images_in_use(&[]);
        agent.forget_strangers(found.into_keys().collect());
        let (events, session_events) = mpsc::channel(QUEUE_LENGTH);
        let session = SessionOptions {
            pool: options.pool,
            managers: options.managers,
            tasks: options.tasks.clone(),
            beats: options.beats,
        };
        let description = options.description.clone();
        let has_table = agent.table_digest.subscribe();
        let hello = hello_maker(options.description, options.addr, options.images, has_table);
        options.tasks.spawn("session", session::run(session, hello, events));
        let inputs =
            Inputs { session_events, reported, balancer_events, image_events, description };
        options.tasks.spawn("agent", agent.run(inputs));
        Ok(())
    }

    /// Erases containers that no record names: left by a daemon that was killed before it wrote one.
    fn forget_strangers(&self, strangers: Vec<TaskId>) {
        let executor = Arc::clone(&self.executor);
        self.tasks.spawn("erase strangers", async move {
            for task_id in strangers {
                if let Err(error) = executor.remove(task_id).await {
                    tracing::warn!(task.id = %task_id, %error, "failed to erase a container without a task");
                }
            }
        });
    }

    async fn run(mut self, mut inputs: Inputs) {
        loop {
            // Each arm is cancel-safe: all of them receive from channels.
            tokio::select! {
                Some(event) = inputs.session_events.recv() => self.handle_session(event),
                Some(report) = inputs.reported.recv() => {
                    self.handle_report(report);
                    // All that is waiting travels in one message.
                    while let Ok(report) = inputs.reported.try_recv() {
                        self.handle_report(report);
                    }
                }
                Some(applied) = inputs.balancer_events.recv() => self.handle_applied(applied),
                Some((digest, holding)) = inputs.image_events.recv() => {
                    self.unsent_images.insert(digest, holding);
                }
                Ok(()) = inputs.description.changed() => {
                    let description = inputs.description.borrow_and_update().clone();
                    self.unsent_description = Some(description);
                }
                () = self.room_for_reports() => {}
            }
            // Once for all that came: a task on its way to running changes its state several times at once.
            self.write_records();
            self.flush();
        }
    }

    /// Returns when something waits to be sent and the session's queue has room again.
    async fn room_for_reports(&self) {
        let has_unsent = !self.unsent.is_empty()
            || self.unsent_mesh.is_some()
            || self.unsent_description.is_some()
            || !self.unsent_images.is_empty();
        match &self.to_leader {
            Some(to_leader) if has_unsent => {
                let _ = to_leader.reserve().await; // A closed queue is a session that ends: told apart.
            }
            _ => std::future::pending().await,
        }
    }

    fn handle_session(&mut self, event: FromSession) {
        match event {
            FromSession::Opened { welcome, to_leader, end } => {
                self.end_session = end;
                self.open_session(&welcome, to_leader);
            }
            // What still comes of a session that is being ended is not applied.
            FromSession::Assignments(_) if self.to_leader.is_none() => {}
            FromSession::Assignments(assignments) => {
                if let Err(why) = self.apply(*assignments) {
                    tracing::warn!(why, "asking the leader for everything again");
                    self.table_digest.send_replace(Bytes::new());
                    self.lose_leader();
                    self.end_session.cancel();
                }
            }
            FromSession::Closed => self.lose_leader(),
            FromSession::Removed => {
                tracing::error!(
                    "this node was removed from the swarm: its tasks are stopped; let it leave and join again"
                );
                self.payloads.clear();
                for task_id in self.held.keys().copied().collect::<Vec<_>>() {
                    self.remove(task_id);
                }
            }
        }
    }

    fn lose_leader(&mut self) {
        self.to_leader = None;
        self.is_led.send_replace(false);
    }

    fn open_session(&mut self, welcome: &Welcome, to_leader: mpsc::Sender<AgentMessage>) {
        self.sequence = 0;
        self.session += 1;
        self.unsent_mesh = None; // It was for another leader's count.
        self.unsent = self.held.keys().copied().collect();
        match (u16::try_from(welcome.node_number), welcome.ingress_pool.parse::<Ipv4Net>()) {
            (Ok(number), Ok(pool)) => {
                self.mesh.place(number, pool);
                self.to_leader = Some(to_leader);
            }
            _ => {
                tracing::error!(?welcome, "the leader's welcome cannot be read");
                self.end_session.cancel();
            }
        }
    }

    fn apply(&mut self, assignments: Assignments) -> Result<(), String> {
        let is_whole = assignments.applies_to == 0;
        if !is_whole && assignments.applies_to != self.sequence {
            return Err(format!(
                "assignments for set {}, this is {}",
                assignments.applies_to, self.sequence
            ));
        }
        let tasks: Vec<Task> = assignments
            .task_jsons
            .iter()
            .map(|json| {
                serde_json::from_str(json).map_err(|error| format!("an unreadable task: {error}"))
            })
            .collect::<Result<_, _>>()?;
        let removed: Vec<TaskId> = assignments
            .removed_tasks
            .iter()
            .map(|id| id.parse().map_err(|error| format!("an unreadable task id: {error}")))
            .collect::<Result<_, _>>()?;
        let update = Some(assignments.mesh).filter(|encoded| !encoded.is_empty());
        let update = update.map(MeshUpdate::decode).transpose();
        let update = update.map_err(|error| format!("an unreadable table: {error}"))?;
        let kept = update.as_ref().filter(|update| update.kept);
        // What Hello said may have been out of date when it was sent.
        if kept.is_some_and(|update| update.digest != *self.table_digest.borrow()) {
            return Err("the leader keeps another table than the one at hand".to_owned());
        }
        self.sequence = assignments.results_in;
        if let Some(update) = update {
            self.table_digest.send_replace(update.digest.clone());
            self.mesh.update(update);
            self.settle_host_ports(&[]);
            self.apply_tables();
        }
        self.note_images_in_use(&tasks);
        if let Some(images) = &self.images {
            images.assign(is_whole, assignments.images, &assignments.removed_images);
        }
        self.payloads.add(is_whole, assignments.secrets);
        let named: BTreeSet<TaskId> = tasks.iter().map(|task| task.id).collect();
        for task in tasks {
            self.assign(task);
        }
        for task_id in removed {
            self.remove(task_id);
        }
        self.payloads.forget(&assignments.removed_secrets);
        if is_whole {
            let unnamed: Vec<TaskId> =
                self.held.keys().filter(|id| !named.contains(id)).copied().collect();
            for task_id in unnamed {
                self.remove(task_id);
            }
            // What is not wanted any more has been told so before a runner hears that managers decide again.
            self.is_led.send_replace(true);
        }
        Ok(())
    }

    fn apply_tables(&self) -> u64 {
        let tables = || Some(Tables { mesh: self.mesh.table()?, networks: self.mesh.networks() });
        self.balancers.apply(self.session, self.mesh.version(), tables)
    }

    /// Takes a task that is to end out of what this node alone publishes; returns the table to wait for.
    fn withdraw_host_ports(&mut self, task_id: TaskId) -> u64 {
        if self.mesh.host.withdraw(task_id) { self.apply_tables() } else { 0 }
    }

    /// Publishes what a task that runs has in host mode; whether that is new.
    fn publish_host_ports(&mut self, task_id: TaskId, status: &TaskStatus) -> bool {
        let Some(held) = self.held.get(&task_id) else { return false };
        if !host_ports::runs(status) || held.assigned.borrow().is_ending() {
            return false;
        }
        let task = Arc::clone(&held.assigned.borrow().task);
        let earlier = held.status.port_status.as_ref();
        let published = self.mesh.host.publish(&task, earlier, &mut Kernel);
        let is_new = published.is_some();
        self.note_host_ports(&published.unwrap_or_default());
        is_new
    }

    /// Has the numbers of these tasks' ports reported.
    fn note_host_ports(&mut self, changed: &BTreeSet<TaskId>) {
        for task_id in changed {
            let Some(held) = self.held.get_mut(task_id) else { continue };
            held.status.port_status = self.mesh.host.status(*task_id);
            self.unsent.insert(*task_id);
            self.remember(*task_id);
        }
    }

    /// Gives ports that this node numbers another number where theirs is not to be had, by the mesh's
    /// table or for another program.
    fn settle_host_ports(&mut self, conditions: &[skep_proto::PortCondition]) {
        let mut taken = self.mesh.ingress_ports();
        let refused = |(protocol, port): (PortProtocol, u16)| {
            let is_it = |one: &skep_proto::PortCondition| {
                one.port == u32::from(port) && one.protocol == protocol.name()
            };
            conditions.iter().any(is_it)
        };
        taken.extend(self.mesh.host.numbers().filter(|key| refused(*key)));
        let changed = self.mesh.host.settle(&taken, &mut Kernel);
        self.note_host_ports(&changed);
        if !changed.is_empty() {
            self.apply_tables();
        }
    }

    fn assign(&mut self, task: Task) {
        let task_id = task.id;
        if let Some(held) = self.held.get(&task_id) {
            let is_removed = held.assigned.borrow().removed;
            if !is_removed && *held.assigned.borrow().task != task {
                let withdrawn_by = match !task.desired_state.wants_run() {
                    true => self.withdraw_host_ports(task_id),
                    false => 0,
                };
                self.change_assigned(task_id, withdrawn_by, |assigned| {
                    assigned.task = Arc::new(task);
                });
            }
            return;
        }
        // What managers know of the task's past on this node is in the task.
        let status = task.status.clone();
        self.run_task(Remembered { task, status, removed: false }, None);
        self.remember(task_id);
    }

    fn remove(&mut self, task_id: TaskId) {
        let withdrawn_by = self.withdraw_host_ports(task_id);
        self.change_assigned(task_id, withdrawn_by, |assigned| assigned.removed = true);
    }

    fn change_assigned(
        &mut self,
        task_id: TaskId,
        withdrawn_by: u64,
        change: impl FnOnce(&mut Assigned),
    ) {
        let Some(held) = self.held.get(&task_id) else { return };
        held.assigned.send_modify(|assigned| {
            assigned.withdrawn_by = assigned.withdrawn_by.max(withdrawn_by);
            change(assigned);
        });
        self.remember(task_id);
    }

    fn run_task(&mut self, record: Remembered, found: Option<Found>) {
        let task_id = record.task.id;
        let (sender, assigned) = watch::channel(Assigned {
            task: Arc::new(record.task),
            removed: record.removed,
            withdrawn_by: 0,
        });
        let runner = Runner::new(
            assigned,
            (Arc::clone(&self.executor), self.payloads.clone()),
            self.reports.clone(),
            (self.balancers.in_force(), self.is_led.subscribe()),
            record.status.clone(),
        );
        let status = record.status.clone();
        self.held.insert(task_id, Held { assigned: sender, status: record.status });
        if matches!(found, Some(Found::Started(_))) {
            self.publish_host_ports(task_id, &status);
        }
        self.tasks.spawn("task", runner.run(found));
    }

    fn handle_report(&mut self, report: Report) {
        match report {
            Report::Status(task_id, mut status) => {
                let has_ended = status.state.is_terminal();
                let is_withdrawn =
                    has_ended && (self.mesh.withdraw(task_id) | self.mesh.host.withdraw(task_id));
                if self.publish_host_ports(task_id, &status) || is_withdrawn {
                    self.apply_tables();
                }
                status.port_status = self.mesh.host.status(task_id);
                if let Some(held) = self.held.get_mut(&task_id) {
                    held.status = status;
                    self.unsent.insert(task_id);
                    self.remember(task_id);
                }
            }
            Report::Erased(task_id) => {
                self.held.remove(&task_id);
                self.unsent.remove(&task_id);
                self.note_images_in_use(&[]);
                if let Err(error) = self.store.erase(task_id) {
                    tracing::warn!(task.id = %task_id, %error, "failed to forget a task");
                }
            }
        }
    }

    /// Says which images the tasks of this node need, with those that are `coming`.
    fn note_images_in_use(&self, coming: &[Task]) {
        let Some(images) = &self.images else { return };
        let held = self.held.values().filter_map(|held| {
            let assigned = held.assigned.borrow();
            images::image_of(&assigned.task)
        });
        images.note_in_use(held.chain(coming.iter().filter_map(images::image_of)).collect());
    }

    fn handle_applied(&mut self, applied: Applied) {
        if applied.session != self.session {
            return;
        }
        self.settle_host_ports(&applied.conditions);
        self.unsent_mesh = Some(skep_proto::MeshApplied {
            version: applied.version,
            conditions: applied.conditions,
        });
    }

    /// Has a task's record written before anything else is received or sent.
    fn remember(&mut self, task_id: TaskId) {
        self.unwritten.insert(task_id);
    }

    fn write_records(&mut self) {
        for task_id in std::mem::take(&mut self.unwritten) {
            self.write_record(task_id);
        }
    }

    fn write_record(&self, task_id: TaskId) {
        let Some(held) = self.held.get(&task_id) else { return };
        let assigned = held.assigned.borrow();
        let record = Remembered {
            task: (*assigned.task).clone(),
            status: held.status.clone(),
            removed: assigned.removed,
        };
        if let Err(error) = self.store.store(&record) {
            tracing::error!(task.id = %task_id, error = %skep_runtime::telemetry::Chain(&error), "failed to record a task");
        }
    }

    /// Sends what waits to be sent, as far as the session's queue has room.
    fn flush(&mut self) {
        let Some(to_leader) = &self.to_leader else { return };
        let send = |message| {
            let permit = to_leader.try_reserve().ok()?;
            permit.send(AgentMessage { message: Some(message) });
            Some(())
        };
        if let Some(applied) = self.unsent_mesh.clone()
            && send(Message::MeshApplied(applied)).is_some()
        {
            self.unsent_mesh = None;
        }
        if let Some(description) = &self.unsent_description {
            let description_json = json(description);
            if send(Message::Description(DescriptionReport { description_json })).is_some() {
                self.unsent_description = None;
            }
        }
        while let Some((digest, holding)) = self.unsent_images.first_key_value() {
            let report = images::report(digest, holding);
            if send(Message::Image(report)).is_none() {
                return;
            }
            self.unsent_images.pop_first();
        }
        if self.unsent.is_empty() {
            return;
        }
        let reports = self.unsent.iter().filter_map(|task_id| {
            let status = &self.held.get(task_id)?.status;
            let status_json = serde_json::to_string(status).expect("a status has no failing parts");
            Some(TaskStatusReport { task_id: task_id.to_string(), status_json })
        });
        let report = TaskReport { tasks: reports.collect() };
        if send(Message::Report(report)).is_some() {
            self.unsent.clear();
        }
    }
}

/// The node's own kernel.
struct Kernel;

impl host_ports::FreePorts for Kernel {
    fn free_port(&mut self, protocol: PortProtocol) -> Option<u16> {
        crate::net::free_port(protocol).ok()
    }
}

struct Inputs {
    session_events: mpsc::Receiver<FromSession>,
    reported: mpsc::Receiver<Report>,
    balancer_events: mpsc::Receiver<Applied>,
    image_events: mpsc::Receiver<(String, ImageHolding)>,
    description: watch::Receiver<NodeDescription>,
}

fn json(description: &NodeDescription) -> String {
    serde_json::to_string(description).expect("a description has no failing parts")
}

fn hello_maker(
    description: watch::Receiver<NodeDescription>,
    addr: String,
    images: Option<Images>,
    has_table: watch::Receiver<Bytes>,
) -> impl Fn() -> Hello + Send + 'static {
    move || Hello {
        description_json: json(&description.borrow()),
        addr: addr.clone(),
        image_digests: images.as_ref().map(Images::held).unwrap_or_default(),
        table_digest: has_table.borrow().clone(),
    }
}
