//! The leader's one loop: it drives the pure core over snapshots and proposes what that decides.
//!
//! ```text
//! commits ──┐                            ┌─► one command in flight ─► Raft
//! sessions ─┼─► state, dirty ─► decide ──┤
//! ticks ────┘                            └─► sessions: mesh, images, tasks
//! ```
//!
//! # Invariants
//!
//! - Commands are proposed in the term that this loop was started in: a deposed leader writes nothing.
//! - At most one command is in flight; everything that happens meanwhile is one batch for the next.
//! - Nothing is decided while a command is in flight, nor on a state without it; nor while one whose outcome
//!   is not known may still be committed.
//! - The loop never waits for an agent: a session whose queue is full is told later.

mod payloads;
mod role;
mod sessions;
mod tables;
mod trust;

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use skep_common::object::{NodeState, TaskStatus};
use skep_common::{Node, NodeId, TaskId, Timestamp};
use skep_manager_core::endpoints::Drain;
use skep_manager_core::liveness::{Answer, Event, Liveness};
use skep_manager_core::reports::{self, Reports, Statuses};
use skep_manager_core::{
    Action, Command, Dirty, LeaderMemory, Outcome, State, image, kept_out, node_name, plan,
    rotation, store, swarm,
};
use skep_runtime::{TaskSet, clock, transport};
use tokio::sync::mpsc;

use crate::consensus::{Commit, Consensus, Feed, propose};
use crate::dispatcher::{Door, SessionEvent};
use sessions::Sessions;

/// How often liveness is looked at though nothing happens: a fifth of the heartbeat period of most swarms.
const TICK: Duration = Duration::from_millis(200);
/// A machine that does not even refuse a connection within this time counts as a failed probe.
const PROBE_DEADLINE: Duration = Duration::from_millis(500);
/// Events taken in one go: bounds how long a commit waits behind reports.
const EVENTS_AT_ONCE: usize = 512;
/// Facts and nodes written by one command: bounds its size, and what one refusal throws back.
const ACTIONS_AT_ONCE: usize = 256;

/// Leads whenever this manager does, for as long as it runs.
pub(crate) async fn run(consensus: Consensus, door: Door, tasks: TaskSet) {
    let mut leadership = consensus.leadership();
    loop {
        let term = match leadership.wait_for(|leadership| leadership.is_self).await {
            Ok(leadership) => leadership.term,
            Err(_) => return, // Consensus has ended.
        };
        tracing::info!(raft.term = term, "leading");
        let state = consensus.state();
        door.tell(swarm::heartbeat_period(&state), state.nodes().len());
        let events = door.open();
        let probing = tasks.child();
        let lost = async {
            let still = |leadership: &crate::consensus::Leadership| {
                leadership.is_self && leadership.term == term
            };
            // An error means that consensus has ended.
            let _ = leadership.wait_for(|leadership| !still(leadership)).await;
        };
        probing.spawn("roles", crate::roles::run(consensus.clone(), term));
        let leader = Leader::new(consensus.clone(), door.clone(), term, probing.clone());
        tokio::select! {
            () = lost => {}
            () = leader.run(events) => {}
        }
        door.close();
        probing.cancel();
        tracing::info!(raft.term = term, "not leading any more");
    }
}

type InFlight = BoxFuture<'static, Result<Outcome, propose::Error>>;

/// What a command in flight carries beside its actions.
#[derive(Debug, Default)]
struct Carried {
    statuses: Statuses,
    is_plan: bool,
    /// Facts without a precondition, told until they are stored.
    facts: Vec<Action>,
}

/// When nodes were last judged by their liveness. A look at all of them is more than each of a thousand sessions that
/// open at once is worth.
#[derive(Debug)]
struct Judged {
    /// Those that were judged.
    nodes: store::Table<NodeId, Node>,
    /// When to look again though nothing happens.
    until: Option<Timestamp>,
    /// What happened since may decide otherwise, or what was decided is not stored yet.
    is_due: bool,
}

impl Judged {
    fn is_due(&self, state: &State, now: Timestamp) -> bool {
        let is_over = self.until.is_some_and(|until| until <= now);
        self.is_due || is_over || !self.nodes.ptr_eq(state.nodes())
    }
}

struct Leader {
    consensus: Consensus,
    door: Door,
    term: u64,
    tasks: TaskSet,
    feed: Feed,
    state: State,
    dirty: Dirty,
    memory: LeaderMemory,
    rng: StdRng,
    liveness: Liveness,
    not_in_balancer: BTreeSet<NodeId>,
    drain: Drain,
    sessions: Sessions,
    reports: Reports,
    /// What nodes said and has no precondition, in order.
    facts: VecDeque<Action>,
    in_flight: Option<(InFlight, Carried)>,
    /// An earlier command of this term may still be committed: nothing is decided before that is known.
    is_uncertain: bool,
    /// When to plan though nothing happens.
    deadline: Option<Timestamp>,
    judged: Judged,
    probes: mpsc::Receiver<Event>,
    probe_results: mpsc::Sender<Event>,
    next_tick: Instant,
}

impl Leader {
    fn new(consensus: Consensus, door: Door, term: u64, tasks: TaskSet) -> Self {
        let feed = consensus.subscribe();
        let state = consensus.state();
        let now = clock::now();
        let (probe_results, probes) = mpsc::channel(skep_common::limits::QUEUE_LENGTH);
        Self {
            drain: Drain::new(&state, &BTreeSet::new(), now).in_term(term),
            liveness: Liveness::new(&state, now),
            sessions: Sessions::new(term),
            consensus,
            door,
            term,
            tasks,
            feed,
            state,
            dirty: Dirty::all(),
            memory: LeaderMemory::default(),
            rng: StdRng::from_rng(&mut rand::rng()),
            not_in_balancer: BTreeSet::new(),
            reports: Reports::default(),
            facts: VecDeque::new(),
            in_flight: None,
            // A loop of before, of the same term, may have left one.
            is_uncertain: true,
            deadline: None,
            judged: Judged { nodes: store::Table::new(), until: None, is_due: true },
            probes,
            probe_results,
            next_tick: clock::monotonic() + TICK,
        }
    }

    async fn run(mut self, mut events: mpsc::Receiver<SessionEvent>) {
        loop {
            let sleep = tokio::time::sleep_until(self.wake_at().into());
            // Each arm is cancel-safe: what is in flight stays in `self`.
            tokio::select! {
                biased;
                outcome = in_flight(&mut self.in_flight) => self.committed(outcome),
                commit = self.feed.next() => match commit {
                    Some(commit) => self.take(commit),
                    None => return,
                },
                Some(event) = events.recv() => {
                    self.handle(event);
                    for _ in 1..EVENTS_AT_ONCE {
                        let Ok(event) = events.try_recv() else { break };
                        self.handle(event);
                    }
                }
                Some(probed) = self.probes.recv() => self.observe(probed),
                () = sleep => self.tick(),
            }
            self.decide();
            self.dispatch();
        }
    }

    fn wake_at(&self) -> Instant {
        let now = clock::now();
        let until =
            |deadline: Option<Timestamp>| deadline.map(|at| clock::monotonic() + at.since(now));
        // While a command is in flight, a deadline that it may have dealt with must not make the loop spin.
        let own = [self.deadline, self.judged.until].into_iter().flatten().min();
        let own = if self.is_current() { until(own) } else { None };
        let of_nodes = [self.drain.deadline(), self.sessions.deadline()].map(until);
        of_nodes.into_iter().chain([own]).flatten().fold(self.next_tick, Instant::min)
    }

    fn is_current(&self) -> bool {
        self.in_flight.is_none()
    }

    fn tick(&mut self) {
        let now = clock::monotonic();
        if now < self.next_tick {
            return; // Another deadline woke the loop.
        }
        let late_by = now - self.next_tick;
        if late_by > TICK {
            tracing::warn!(
                ?late_by,
                "this manager is short of processor time; nodes are given as much more"
            );
            self.liveness.observe(Event::Tick { late_by });
        }
        self.next_tick = now + TICK;
        self.judged.is_due = true;
    }

    /// What liveness is to decide about at once.
    fn observe(&mut self, event: Event) {
        self.liveness.observe(event);
        self.judged.is_due = true;
    }

    fn take(&mut self, commit: Commit) {
        if commit.state.version() >= self.state.version() {
            self.state = commit.state;
        }
        if commit.all_changed {
            self.dirty = Dirty::all();
        }
        self.dirty.extend(&commit.changes);
    }

    fn handle(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Opened { node_id, session_id, hello, to_agent } => {
                let period = self.liveness.period();
                let opened =
                    self.sessions.open(&self.state, node_id, session_id, period, &hello, to_agent);
                let Some(actions) = opened else { return };
                self.liveness.observe(Event::SessionOpened { node_id, at: clock::now() });
                let node = self.state.node(node_id);
                let is_ready = node.is_some_and(|node| node.status.state == NodeState::Ready);
                self.judged.is_due |= !is_ready || self.not_in_balancer.contains(&node_id);
                self.drain.session_opened(node_id);
                self.facts.extend(actions);
            }
            SessionEvent::Closed { node_id, session_id } => {
                if self.sessions.close(node_id, session_id) {
                    self.observe(Event::SessionClosed { node_id });
                    self.drain.session_closed(node_id);
                }
            }
            SessionEvent::Message { node_id, session_id, message } => {
                if self.sessions.is_current(node_id, session_id) {
                    self.handle_message(node_id, message);
                }
            }
        }
    }

    fn handle_message(&mut self, node_id: NodeId, message: skep_proto::agent_message::Message) {
        use skep_proto::agent_message::Message;
        match message {
            Message::Hello(_) => tracing::warn!(node.id = %node_id, "a second hello is ignored"),
            Message::Report(report) => {
                for report in report.tasks {
                    self.take_report(node_id, &report);
                }
            }
            Message::MeshApplied(applied) => {
                self.drain.acknowledge(node_id, applied.version);
                self.sessions.note_conditions(node_id, applied.conditions);
            }
            Message::Image(report) => {
                if !report.held {
                    let (digest, error) = (&report.digest, &report.error);
                    tracing::warn!(node.id = %node_id, digest, error, "a node cannot get an image");
                }
                let actions = self.sessions.note_image(&self.state, node_id, report);
                self.facts.extend(actions);
            }
            Message::Description(report) => {
                self.sessions.note_description(node_id, &report.description_json);
            }
        }
    }

    fn take_report(&mut self, node_id: NodeId, report: &skep_proto::TaskStatusReport) {
        let parsed = report.task_id.parse::<TaskId>().ok();
        let status = serde_json::from_str::<TaskStatus>(&report.status_json).ok();
        let (Some(task_id), Some(status)) = (parsed, status) else {
            tracing::warn!(node.id = %node_id, task.id = report.task_id, "an unreadable report is ignored");
            return;
        };
        if let Err(error) = self.reports.take(&self.state, node_id, task_id, status) {
            tracing::warn!(node.id = %node_id, task.id = %task_id, "{error}");
        }
    }

    /// Proposes the next command, where none is in flight.
    fn decide(&mut self) {
        if !self.is_current() {
            return;
        }
        let now = clock::now();
        if std::mem::take(&mut self.is_uncertain) {
            // What changes nothing comes behind all that this manager has in its log.
            self.propose(Command::new(now, Vec::new()), Carried::default());
            return;
        }
        let transitions = self.judge(now);
        let mut carried = Carried::default();
        let mut actions = self.next_facts();
        carried.facts.clone_from(&actions);
        if actions.is_empty() {
            // Decided anew at each pass, until it is so.
            actions = self.sessions.descriptions(&self.state, now, ACTIONS_AT_ONCE);
        }
        if actions.is_empty() {
            actions = transitions;
            actions.truncate(ACTIONS_AT_ONCE);
            actions.iter().for_each(log_transition);
        }
        if actions.is_empty()
            && let Some(step) = rotation::advance(&self.state, now)
        {
            tracing::info!("the change of the root goes on: all nodes are ready for its next step");
            actions.push(step);
        }
        if actions.is_empty() {
            actions.extend(kept_out::forget(&self.state, now));
        }
        if actions.is_empty() {
            // A pass over images and tasks, worth it only when one of them may have lost its last use.
            let is_sweep_due = self.dirty.images || !self.dirty.services.is_empty();
            actions = self.plan(now, &mut carried);
            if is_sweep_due {
                actions.extend(image::unused(&self.state));
            }
        }
        carried.statuses = self.reports.next(&self.state);
        actions.extend(reports::patches(&carried.statuses));
        if !actions.is_empty() {
            self.propose(Command::new(now, actions), carried);
        }
    }

    /// Nodes whose state changes by what was heard of them, or was not.
    fn judge(&mut self, now: Timestamp) -> Vec<Action> {
        if !self.judged.is_due(&self.state, now) {
            return Vec::new();
        }
        for entry in self.door.beats.iter() {
            self.liveness.observe(Event::Beat { node_id: *entry.key(), at: *entry.value() });
        }
        let verdict = self.liveness.decide(&self.state, now);
        self.end_sessions(&verdict.actions);
        self.door.tell(self.liveness.period(), self.state.nodes().len());
        self.probe(&verdict.probes);
        self.not_in_balancer = verdict.not_in_balancer;
        self.judged = Judged {
            nodes: self.state.nodes().clone(),
            until: verdict.deadline,
            is_due: !verdict.actions.is_empty(),
        };
        verdict.actions
    }

    /// Ends the sessions of nodes that are called down: the connection of a machine that vanished is open for a while yet,
    /// and stops would wait for its acknowledgement. Who lives after all hears of it, opens another one, and is told
    /// everything.
    fn end_sessions(&mut self, transitions: &[Action]) {
        let nodes = transitions.iter().filter_map(node_of);
        for node_id in nodes.filter(|node| node.status.state == NodeState::Down).map(|node| node.id)
        {
            if self.sessions.end(node_id) {
                self.liveness.observe(Event::SessionClosed { node_id });
                self.drain.session_closed(node_id);
            }
        }
    }

    fn next_facts(&mut self) -> Vec<Action> {
        let n = self.facts.len().min(ACTIONS_AT_ONCE);
        self.facts.drain(..n).collect()
    }

    fn plan(&mut self, now: Timestamp, carried: &mut Carried) -> Vec<Action> {
        let dirty = std::mem::take(&mut self.dirty);
        let plan = plan(&self.state, &mut self.memory, &dirty, now, &mut self.rng);
        self.deadline = plan.deadline.map(|(at, _)| at);
        carried.is_plan = true;
        plan.actions
    }

    fn propose(&mut self, command: Command, carried: Carried) {
        let (consensus, term) = (self.consensus.clone(), self.term);
        let proposal = async move { propose_in(&consensus, term, &command).await };
        self.in_flight = Some((proposal.boxed(), carried));
    }

    fn committed(&mut self, (outcome, carried): (Result<Outcome, propose::Error>, Carried)) {
        match outcome {
            // The feed is silent about a command that changed nothing: the state is taken here, what
            // changed in it comes by the feed.
            Ok(Outcome::Applied(_)) => self.state = self.consensus.state(),
            Ok(Outcome::Refused(refusal)) => {
                tracing::debug!(%refusal, "a decision on an old state was refused, deciding again");
                self.retry(carried);
            }
            Err(error) => {
                tracing::info!(%error, "a decision was not committed");
                self.is_uncertain = true;
                self.retry(carried);
            }
        }
    }

    fn retry(&mut self, carried: Carried) {
        if carried.is_plan {
            self.dirty = Dirty::all();
        }
        for fact in carried.facts.into_iter().rev() {
            self.facts.push_front(fact);
        }
        self.reports.give_back(carried.statuses);
    }

    /// Asks machines whether they live.
    fn probe(&self, nodes: &[NodeId]) {
        for node_id in nodes {
            let Some(node) = self.state.node(*node_id) else { continue };
            let (node_id, address) = (*node_id, node.address());
            let results = self.probe_results.clone();
            self.tasks.spawn("probe", async move {
                let connect = transport::knock(&address);
                let answer = match tokio::time::timeout(PROBE_DEADLINE, connect).await {
                    Ok(Ok(())) => Answer::Accepted,
                    Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                        Answer::Refused
                    }
                    Ok(Err(_)) | Err(_) => Answer::None,
                };
                let probed = Event::Probed { node_id, at: clock::now(), answer };
                let _ = results.send(probed).await; // The loop has ended.
            });
        }
    }

    /// Tells the agents what is new for them.
    fn dispatch(&mut self) {
        let now = clock::now();
        self.drain.update(&self.state, &self.not_in_balancer, now);
        self.sessions.skip_unconcerned(&mut self.drain);
        let held_back = self.drain.held_back(&self.state, now);
        let name =
            |id: &NodeId| self.state.node(*id).map_or_else(|| id.short(), |node| node_name(node));
        for (task_id, nodes) in self.drain.take_missed(&self.state) {
            let names: Vec<String> = nodes.iter().map(name).collect();
            let nodes = names.join(", ");
            tracing::warn!(task.id = %task_id, nodes, "a task is stopped without the acknowledgement of nodes that may still balance to it");
            self.reports.note_missed(task_id, names);
        }
        self.sessions.renew(&self.state, now);
        self.sessions.dispatch(&self.state, &mut self.drain, held_back, now);
    }
}

/// Has a command written in `term`, and says what came of it while that is of use.
///
/// Where the term is over it never returns: [`run`] hears of it and ends the loop. openraft's metrics tell it to a
/// proposal a moment before they tell `run`, and without being asked to wait for anything: a loop that decided again at
/// once would be refused again at once, for ever, and never let `run` look.
async fn propose_in(
    consensus: &Consensus,
    term: u64,
    command: &Command,
) -> Result<Outcome, propose::Error> {
    use propose::Error;
    let outcome = consensus.propose_as_leader(term, command).await;
    match &outcome {
        Err(Error::NotLeader { .. } | Error::Stopped { .. }) => std::future::pending().await,
        // The state at the next tick may make for a smaller one.
        Err(Error::TooLarge { .. }) => tokio::time::sleep(TICK).await,
        // These have waited already.
        Err(Error::NoLeader { .. } | Error::Timeout { .. } | Error::Lost) | Ok(_) => {}
    }
    outcome
}

/// The node that an action writes.
fn node_of(action: &Action) -> Option<&Node> {
    match action {
        Action::Put { object: skep_common::Object::Node(node), .. } => Some(node),
        _ => None,
    }
}

/// A node's state is a fact of the cluster that operators look for.
fn log_transition(action: &Action) {
    if let Some(node) = node_of(action) {
        let state = node.status.state.name();
        let (hostname, message) = (node.hostname(), node.status.message.as_str());
        tracing::info!(node.id = %node.id, hostname, state, message, "a node's state changes");
    }
}

/// The outcome of what is in flight; never returns where nothing is.
async fn in_flight(
    slot: &mut Option<(InFlight, Carried)>,
) -> (Result<Outcome, propose::Error>, Carried) {
    match slot {
        Some((proposal, _)) => {
            let outcome = proposal.await;
            let carried = slot.take().map(|(_, carried)| carried).unwrap_or_default();
            (outcome, carried)
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::consensus::{CallError, DataKey, Options, RaftRequest, RaftTransport};

    #[derive(Debug)]
    struct Nobody;

    impl RaftTransport for Nobody {
        fn call(
            &self,
            _: u64,
            _: &str,
            _: RaftRequest,
            _: Duration,
        ) -> BoxFuture<'static, Result<Bytes, CallError>> {
            std::future::pending().boxed()
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_loop_whose_term_is_over_lets_whoever_ends_it_look() {
        let dir = tempfile::tempdir().unwrap();
        let key = DataKey::new(1, [1; 32]);
        let options = Options::new(1, dir.path().join("raft"), key, Arc::new(Nobody));
        let consensus = Consensus::start(options).await.unwrap();
        let command = Command::new(clock::now(), Vec::new());
        // It is no leader, and that is known without a wait.
        let refused = consensus.propose_as_leader(1, &command).now_or_never();
        assert_eq!(refused, Some(Err(propose::Error::NotLeader { term: 1 })));
        let proposal = tokio::time::timeout(TICK, propose_in(&consensus, 1, &command));
        assert!(proposal.await.is_err(), "it does not come back");
        consensus.shutdown().await;
    }
}
