//! The leader's loop around the real core: what its shell does, without sockets and threads.
//!
//! Who drives it: the machine, at every message, commit and tick; after each, [`Leader::decide`] and
//! [`Leader::dispatch`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use skep_common::object::{NodeDescription, TaskStatus};
use skep_common::spec::NodeRole;
use skep_common::{Node, NodeId, Object, TaskId, Timestamp};
use skep_manager_core::assignments::{self, CopyDuties, Stream, for_node};
use skep_manager_core::description::describe;
use skep_manager_core::endpoints::{Drain, News, NodeTable, PeerNews, Round};
use skep_manager_core::liveness::{Answer, Event, Liveness};
use skep_manager_core::reports::{self, Reports, Statuses};
use skep_manager_core::{
    Action, Change, Command, Dirty, Expect, LeaderMemory, State, level, plan, roles,
};

use crate::membership::ManagerId;
use crate::message::{Assignments, MachineId, Message};
use crate::seen::Seen;
use crate::service as samples;

/// How often liveness is looked at though nothing happens.
pub(crate) const TICK: Duration = Duration::from_millis(200);
/// A session that is silent for so long is closed by the leader's side.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// How long a command may take before its leader decides anew.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Session {
    id: u64,
    machine: MachineId,
    /// What it says of itself.
    said: NodeDescription,
    stream: Stream,
    told_table: Option<(u64, NodeTable)>,
    /// What is new since then is of other nodes alone.
    lacks_peers_alone: bool,
    is_dirty: bool,
    told_role: Option<(NodeRole, u64, Vec<MachineId>)>,
    opened_at: Timestamp,
    heard_at: Timestamp,
}

/// What a command in flight carries beside its actions.
#[derive(Debug, Default)]
struct Carried {
    statuses: Statuses,
    is_plan: bool,
}

/// One leadership of one manager.
#[derive(Debug)]
pub(crate) struct Leader {
    pub(crate) term: u64,
    pub(crate) began_at: Timestamp,
    pub(crate) state: State,
    /// The newest state that was looked at for what it has for whom.
    looked_at: State,
    dirty: Dirty,
    memory: LeaderMemory,
    rng: StdRng,
    liveness: Liveness,
    not_in_balancer: BTreeSet<NodeId>,
    drain: Drain,
    peer_news: PeerNews,
    seen_version: u64,
    sessions: BTreeMap<NodeId, Session>,
    held_back: BTreeSet<TaskId>,
    reports: Reports,
    in_flight: Option<(u64, Timestamp, Carried)>,
    /// A command of before may still be committed: nothing is decided on a state without it.
    is_uncertain: bool,
    deadline: Option<Timestamp>,
    tick_at: Timestamp,
    /// Nodes to probe, taken by the machine.
    pub(crate) probes: Vec<NodeId>,
}

impl Leader {
    pub(crate) fn new(
        state: State,
        term: u64,
        now: Timestamp,
        monotonic: Timestamp,
        seed: u64,
    ) -> Self {
        Self {
            term,
            began_at: monotonic,
            dirty: Dirty::all(),
            memory: LeaderMemory::default(),
            rng: StdRng::seed_from_u64(seed),
            liveness: Liveness::new(&state, now),
            not_in_balancer: BTreeSet::new(),
            drain: Drain::new(&state, &BTreeSet::new(), now),
            peer_news: PeerNews::default(),
            seen_version: 0,
            looked_at: State::default(),
            state,
            sessions: BTreeMap::new(),
            held_back: BTreeSet::new(),
            reports: Reports::default(),
            in_flight: None,
            is_uncertain: true,
            deadline: None,
            tick_at: monotonic.after(TICK),
            probes: Vec::new(),
        }
    }

    /// The sessions that are open, with their machines.
    pub(crate) fn sessions(&self) -> impl Iterator<Item = (MachineId, u64)> {
        self.sessions.values().map(|session| (session.machine, session.id))
    }

    /// Nodes that have a session, since when.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (NodeId, Timestamp)> {
        self.sessions.iter().map(|(node_id, session)| (*node_id, session.opened_at))
    }

    /// Takes what was applied on this manager.
    pub(crate) fn take(&mut self, state: &State, changes: &[Change]) {
        self.state = state.clone();
        self.dirty.extend(changes);
    }

    /// Marks the nodes that the newest state has something new for.
    fn look_at_state(&mut self) {
        let concerned = assignments::concerned(&self.looked_at, &self.state);
        for (node_id, session) in &mut self.sessions {
            session.is_dirty |= concerned.as_ref().is_none_or(|nodes| nodes.contains(node_id));
        }
        self.looked_at = self.state.clone();
    }

    /// Time has passed; what it passed too much is the leader's own fault.
    pub(crate) fn tick(&mut self, monotonic: Timestamp) {
        let late_by = monotonic.since(self.tick_at);
        if late_by > TICK {
            self.liveness.observe(Event::Tick { late_by });
        }
        self.tick_at = monotonic.after(TICK);
        let silent = |session: &Session| monotonic > session.heard_at.after(KEEP_ALIVE);
        let gone: Vec<NodeId> = self
            .sessions
            .iter()
            .filter(|(_, session)| silent(session))
            .map(|(id, _)| *id)
            .collect();
        for node_id in gone {
            self.close(node_id);
        }
        if self.in_flight.as_ref().is_some_and(|(_, since, _)| monotonic > since.after(PATIENCE)) {
            self.is_uncertain = true;
            self.retry();
        }
    }

    fn close(&mut self, node_id: NodeId) {
        self.sessions.remove(&node_id);
        self.liveness.observe(Event::SessionClosed { node_id });
        self.drain.session_closed(node_id);
    }

    /// An agent said hello. False: it is no member.
    pub(crate) fn open_session(
        &mut self,
        node_id: NodeId,
        (machine, level): (MachineId, u32),
        id: u64,
        now: Timestamp,
        monotonic: Timestamp,
    ) -> bool {
        if self.state.node(node_id).is_none() {
            return false;
        }
        let session = Session {
            id,
            machine,
            said: samples::description(machine, level),
            stream: Stream::default(),
            told_table: None,
            lacks_peers_alone: false,
            is_dirty: true,
            told_role: None,
            opened_at: monotonic,
            heard_at: monotonic,
        };
        self.sessions.insert(node_id, session);
        self.liveness.observe(Event::Beat { node_id, at: now });
        self.liveness.observe(Event::SessionOpened { node_id, at: now });
        self.drain.session_opened(node_id);
        true
    }

    /// Whether that is a node's session here; notes that it was heard of.
    pub(crate) fn hear(&mut self, node_id: NodeId, id: u64, monotonic: Timestamp) -> bool {
        let session = self.sessions.get_mut(&node_id).filter(|session| session.id == id);
        session.map(|session| session.heard_at = monotonic).is_some()
    }

    pub(crate) fn beat(&mut self, node_id: NodeId, now: Timestamp) {
        self.liveness.observe(Event::Beat { node_id, at: now });
    }

    pub(crate) fn probed(&mut self, node_id: NodeId, at: Timestamp, answer: Answer) {
        self.liveness.observe(Event::Probed { node_id, at, answer });
    }

    pub(crate) fn end_session(&mut self, node_id: NodeId, id: u64) {
        if self.sessions.get(&node_id).is_some_and(|session| session.id == id) {
            self.close(node_id);
        }
    }

    pub(crate) fn acknowledge(&mut self, node_id: NodeId, version: u64) {
        self.drain.acknowledge(node_id, version);
    }

    pub(crate) fn take_report(&mut self, node_id: NodeId, task_id: TaskId, status: TaskStatus) {
        // A report on another node's task is ignored.
        let _ = self.reports.take(&self.state, node_id, task_id, status);
    }

    /// The next command, where none is in flight, and whether it was decided on this very state; `id` names it.
    pub(crate) fn decide(
        &mut self,
        now: Timestamp,
        monotonic: Timestamp,
        id: u64,
        seen: &mut Vec<Seen>,
    ) -> Option<(Command, bool)> {
        if self.in_flight.is_some() {
            return None;
        }
        if std::mem::take(&mut self.is_uncertain) {
            self.in_flight = Some((id, monotonic, Carried::default()));
            return Some((Command::new(now, Vec::new()), false));
        }
        let described = self.descriptions();
        let verdict = self.liveness.decide(&self.state, now);
        self.probes.extend(verdict.probes);
        self.not_in_balancer = verdict.not_in_balancer;
        self.deadline = verdict.deadline;
        let mut carried = Carried::default();
        let mut actions = described;
        if actions.is_empty() {
            actions = verdict.actions;
        }
        if actions.is_empty() {
            actions = self.plan(now, seen);
            carried.is_plan = true;
        }
        carried.statuses = self.reports.next(&self.state);
        actions.extend(reports::patches(&carried.statuses));
        if actions.is_empty() {
            return None;
        }
        let is_plan = carried.is_plan;
        self.in_flight = Some((id, monotonic, carried));
        Some((Command::new(now, actions), is_plan))
    }

    /// What nodes with a session say of themselves, where the store has something else.
    fn descriptions(&self) -> Vec<Action> {
        let (level, mut actions) = (level::of_managers(&self.state), Vec::new());
        for (node_id, session) in &self.sessions {
            let Some(node) = self.state.node(*node_id) else { continue };
            if node.description.as_ref() == Some(&session.said) {
                continue; // Nearly always: nothing is cloned for that.
            }
            let changed = describe(node, session.said.clone(), None, level);
            if changed == **node {
                continue;
            }
            let expect = Expect::Version(node.meta.version);
            actions.push(Action::Put { object: Object::Node(Box::new(changed)), expect });
        }
        actions
    }

    fn plan(&mut self, now: Timestamp, seen: &mut Vec<Seen>) -> Vec<Action> {
        let dirty = std::mem::take(&mut self.dirty);
        let plan = plan(&self.state, &mut self.memory, &dirty, now, &mut self.rng);
        let wake = plan.deadline.map(|(at, _)| at);
        self.deadline = [self.deadline, wake].into_iter().flatten().min();
        if !plan.actions.is_empty() {
            let actions = Arc::new(plan.actions.clone());
            seen.push(Seen::Planned { state: self.state.clone(), actions, now });
        }
        plan.actions
    }

    /// What became of the command with that name.
    pub(crate) fn committed(&mut self, id: u64, is_applied: bool) {
        if self.in_flight.as_ref().is_some_and(|(in_flight, ..)| *in_flight == id) {
            if is_applied {
                self.in_flight = None;
            } else {
                self.retry();
            }
        }
    }

    fn retry(&mut self) {
        let Some((_, _, carried)) = self.in_flight.take() else { return };
        if carried.is_plan {
            self.dirty = Dirty::all();
        }
        self.reports.give_back(carried.statuses);
    }

    /// What is new for each node.
    pub(crate) fn dispatch(
        &mut self,
        now: Timestamp,
        seen: &mut Vec<Seen>,
    ) -> Vec<(MachineId, Message)> {
        self.drain.update(&self.state, &self.not_in_balancer, now);
        if self.drain.version() != self.seen_version {
            self.seen_version = self.drain.version();
            let table = self.drain.table().clone();
            let (term, version, state) = (self.term, self.seen_version, self.state.clone());
            let silent = self.not_in_balancer.clone();
            seen.push(Seen::Tabled { term, version, table, state, silent });
        }
        self.look_at_state();
        self.skip_unconcerned();
        let held_back = self.drain.held_back(&self.state, now);
        for (task_id, nodes) in self.drain.take_missed(&self.state) {
            self.reports.note_missed(task_id, nodes.iter().map(ToString::to_string).collect());
        }
        for task_id in held_back.symmetric_difference(&self.held_back) {
            let node_id = self.state.task(*task_id).and_then(|task| task.node_id);
            if let Some(session) = node_id.and_then(|node_id| self.sessions.get_mut(&node_id)) {
                session.is_dirty = true;
            }
        }
        self.held_back = held_back;
        let state = &self.state;
        let mut out = Vec::new();
        let drain = &mut self.drain;
        self.sessions.retain(|node_id, session| {
            let is_member = state.node(*node_id).is_some();
            if !is_member {
                drain.session_closed(*node_id);
                out.push((session.machine, Message::End { session: session.id }));
            }
            is_member
        });
        out.extend(self.role_messages());
        let nodes: Vec<NodeId> = self.sessions.keys().copied().collect();
        let mut round = self.peer_news.begin(now);
        for node_id in nodes {
            out.extend(self.news(node_id, &mut round, seen));
        }
        self.peer_news.end(&round, now);
        out
    }

    /// Which role each node has, and where managers are, where that is news to it.
    fn role_messages(&mut self) -> Vec<(MachineId, Message)> {
        let status = |node: &Arc<Node>| node.manager_status.as_ref().map(|one| one.raft_id);
        let managers = self.state.nodes().values().filter_map(status);
        let managers: Vec<MachineId> =
            managers.map(|raft_id| ManagerId::of_raft_id(raft_id).machine()).collect();
        let mut out = Vec::new();
        for (node_id, session) in &mut self.sessions {
            let Some(node) = self.state.node(*node_id) else { continue };
            let (role, raft_id) = (node.observed_role(), roles::raft_id_of(node));
            let told = Some((role, raft_id, managers.clone()));
            if session.told_role != told {
                session.told_role = told;
                let (session, machine) = (session.id, session.machine);
                let managers = managers.clone();
                out.push((machine, Message::Role { session, role, raft_id, managers }));
            }
        }
        out
    }

    fn skip_unconcerned(&mut self) {
        let newest = self.drain.version();
        for (node_id, session) in &mut self.sessions {
            let Some((version, told)) = &mut session.told_table else { continue };
            if *version == newest {
                continue;
            }
            let news = self.drain.news_for(*node_id, told);
            session.lacks_peers_alone = news == News::OfPeersAlone;
            if news == News::None {
                *version = newest;
            }
        }
    }

    fn news(
        &mut self,
        node_id: NodeId,
        round: &mut Round,
        seen: &mut Vec<Seen>,
    ) -> Option<(MachineId, Message)> {
        let session = self.sessions.get_mut(&node_id)?;
        let version = self.drain.version();
        let is_stale = session.told_table.as_ref().is_none_or(|(told, _)| *told != version);
        let is_news = is_stale && round.tells(session.lacks_peers_alone);
        if !session.is_dirty && !is_news {
            return None;
        }
        session.is_dirty = false;
        let (duties, reported) = (CopyDuties::new(), BTreeSet::new());
        let set = for_node(&self.state, node_id, &duties, &reported, &self.held_back);
        let payloads = set.payloads.clone();
        let tasks = session.stream.next(set);
        let table = is_news.then(|| (version, self.drain.of_node(node_id)));
        if is_news {
            session.told_table.clone_from(&table);
            // No stop waits for news of peers alone.
            if !std::mem::take(&mut session.lacks_peers_alone) {
                self.drain.sent(node_id);
            }
        }
        if tasks.is_none() && table.is_none() {
            return None;
        }
        let (machine, id) = (session.machine, session.id);
        let what = Arc::new(Assignments { tasks, table });
        let (term, state) = (self.term, self.state.clone());
        seen.push(Seen::Told { term, node_id, what: what.clone(), payloads, state });
        Some((machine, Message::Assignments { session: id, what }))
    }

    /// When to look again though nothing happens.
    pub(crate) fn wake_at(&self) -> Option<Timestamp> {
        let own = self.deadline.filter(|_| self.in_flight.is_none());
        [own, self.drain.deadline(), self.peer_news.deadline()].into_iter().flatten().min()
    }
}
