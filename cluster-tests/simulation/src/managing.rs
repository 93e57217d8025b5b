//! A machine's part as a manager: its replica, what it applies, its leader's loop, its clients.

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use skep_common::NodeId;
use skep_manager_core::liveness::Answer;
use skep_manager_core::{Command, Outcome, State};

use crate::client;
use crate::fault::Fault;
use crate::leader::{self, Leader};
use crate::machine::{Manager, Request, Stage, Waiter};
use crate::message::{MachineId, Message};
use crate::replica::{HEARTBEAT, ManagerId, Outgoing, Payload};
use crate::seen::Seen;
use crate::world::{Event, Timer, World};

/// Entries after which a manager makes a snapshot.
const SNAPSHOT_EVERY: u64 = 64;
/// How long a client's request is tried.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
const REQUEST_RETRY: Duration = Duration::from_millis(300);

impl World {
    fn manager(&mut self, machine: MachineId) -> &mut Manager {
        self.machines[machine].manager.as_mut().expect("only managers are asked")
    }

    /// Begins with what is on the disk.
    pub(crate) fn start_manager(&mut self, machine: MachineId) {
        let now = self.now();
        let one = &mut self.machines[machine];
        let Some(manager) = &mut one.manager else { return };
        manager.replica = manager.replica.restart(now, &mut one.rng);
        manager.state = State::default();
        let snapshot = manager.replica.snapshot().clone();
        if snapshot.index > 0 {
            manager.state = State::decode(&snapshot.bytes).expect("a snapshot is what was encoded");
        }
        manager.leader = None;
        (manager.is_due, manager.is_stopped) = (false, false);
        manager.waiting.clear();
        manager.asked.clear();
        manager.requests.clear();
        (manager.speaks_in, manager.wakes_at) = (0, None);
        let state = manager.state.clone();
        self.see(&Seen::Restored { manager: machine, state });
        self.timer(machine, HEARTBEAT, Timer::Election);
    }

    /// Its disk was full, and has room again: its consensus begins anew.
    pub(crate) fn resume_manager(&mut self, machine: MachineId) {
        self.note(format_args!("{machine} has room on its disk again"));
        self.start_manager(machine);
    }

    /// Its log cannot be written: it takes no part.
    pub(crate) fn stop_manager(&mut self, machine: MachineId, time: Duration) {
        let life = self.machines[machine].life;
        self.manager(machine).is_stopped = true;
        self.stop_leading(machine);
        self.queue.after(time, Event::Resume { machine, life });
    }

    pub(crate) fn handle_manager_timer(&mut self, machine: MachineId, timer: Timer) {
        let (now, clock) = (self.now(), self.machines[machine].clock(self.now()));
        let mut out = Vec::new();
        let one = &mut self.machines[machine];
        let Some(manager) = &mut one.manager else { return };
        match timer {
            Timer::Election => {
                if !manager.replica.is_leader() {
                    manager.replica.tick(now, &mut one.rng, &mut out);
                }
                let delay = Duration::from_millis(one.rng.random_range(80..120));
                self.timer(machine, delay, Timer::Election);
            }
            Timer::Heartbeat { term } => {
                if !manager.replica.is_leader() || manager.replica.term() != term {
                    return;
                }
                manager.replica.tick(now, &mut one.rng, &mut out);
                manager.is_judged = true;
                self.timer(machine, HEARTBEAT, Timer::Heartbeat { term });
            }
            Timer::Synced => manager.replica.end_sync(&mut out),
            Timer::Tick { term } => {
                let Some(leader) = manager.leader.as_mut().filter(|leader| leader.term == term)
                else {
                    return;
                };
                leader.tick(now);
                manager.is_due = true;
                self.timer(machine, leader::TICK, Timer::Tick { term });
            }
            Timer::Wake => (manager.wakes_at, manager.is_due) = (None, true),
            Timer::Probed { node_id } => {
                let answer = self.answer_to_probe(machine, node_id);
                let manager = self.manager(machine);
                if let (Some(leader), Some(answer)) = (&mut manager.leader, answer) {
                    leader.probed(node_id, clock, answer);
                    manager.is_due = true;
                }
            }
            Timer::Request { id } => self.try_request(machine, id, &mut out),
            Timer::RequestDeadline { id } => {
                manager.requests.remove(&id);
            }
            _ => {}
        }
        self.pump(machine, out);
    }

    /// What a connection to a node's address would say; `None` where a machine without a daemon refuses it.
    fn answer_to_probe(&self, machine: MachineId, node_id: NodeId) -> Option<Answer> {
        // A node that was removed and joined again answers at the same address.
        let state = &self.machines[machine].manager.as_ref()?.state;
        let address = &state.node(node_id)?.status.addr;
        let target = (0..self.machines.len()).find(|id| {
            skep_manager_core::testing::node(u16::try_from(id + 1).unwrap_or(0)).status.addr
                == *address
        })?;
        if !self.is_reachable(machine, target) || !self.is_reachable(target, machine) {
            return Some(Answer::None);
        }
        Some(if self.machines[target].is_up { Answer::Accepted } else { Answer::Refused })
    }

    pub(crate) fn handle_manager_message(
        &mut self,
        from: MachineId,
        to: MachineId,
        message: Message,
    ) {
        let now = self.now();
        let one = &mut self.machines[to];
        let Some(manager) = one.manager.as_mut().filter(|manager| !manager.is_stopped) else {
            return;
        };
        let mut out = Vec::new();
        match message {
            Message::Raft(message) => {
                manager.replica.handle(from, message, now, &mut one.rng, &mut out);
            }
            Message::AskIndex { request } => {
                let applied = manager.state.version().index;
                if manager.replica.read(request, applied, now, &mut out) {
                    manager.asked.insert(request, from);
                } else {
                    self.send(to, from, Message::Index { request, index: None });
                }
            }
            Message::Index { request, index } => {
                if let Some(one) = manager.requests.get_mut(&request)
                    && one.stage == Stage::Asking
                    && let Some(index) = index
                {
                    one.stage = Stage::Catching(index);
                }
            }
            Message::Propose { id, command } => {
                if manager.replica.is_leader() {
                    manager.replica.append(Payload::Command { id, command });
                    manager.replica.speak(now, &mut out);
                    manager.waiting.insert(id, Waiter::Remote(from));
                } else {
                    let refused = Message::Proposed { id, outcome: None, may_commit: false };
                    self.send(to, from, refused);
                }
            }
            Message::Proposed { id, outcome, may_commit } => {
                self.finish(to, id, outcome.as_ref(), may_commit);
            }
            other => self.handle_session(from, to, other),
        }
        self.pump(to, out);
    }

    /// A message of an agent.
    fn handle_session(&mut self, from: MachineId, to: MachineId, message: Message) {
        let (now, clock) = (self.now(), self.machines[to].clock(self.now()));
        let node_id = self.machines[from].node_id;
        let manager = self.manager(to);
        let Some(leader) = &mut manager.leader else {
            let leader = manager.replica.leader().filter(|leader| *leader != to);
            match message {
                Message::Hello { session } => {
                    self.send(to, from, Message::Redirect { session, leader });
                }
                Message::Beat { session } => self.send(to, from, Message::End { session }),
                _ => {}
            }
            return;
        };
        match message {
            Message::Hello { session } => {
                let term = leader.term;
                let is_member = leader.open_session(node_id, from, session, clock, now);
                let answer = match is_member {
                    true => Message::Welcome { session, term },
                    false => Message::Removed { session },
                };
                manager.is_due |= is_member;
                self.send(to, from, answer);
            }
            Message::Report { session, tasks } if leader.hear(node_id, session, now) => {
                for (task_id, status) in &*tasks {
                    leader.take_report(node_id, *task_id, status.clone());
                }
                manager.is_due = true;
            }
            Message::MeshApplied { session, version } if leader.hear(node_id, session, now) => {
                leader.acknowledge(node_id, version);
                manager.is_due = true;
            }
            Message::Beat { session } => {
                // A heartbeat names its node; that its session is another one by now does not matter.
                leader.beat(node_id, clock);
                let answer = match leader.hear(node_id, session, now) {
                    true => Message::BeatTaken,
                    false => Message::End { session },
                };
                self.send(to, from, answer);
            }
            _ => {}
        }
    }

    /// The agent's side ended a session.
    pub(crate) fn end_at_manager(&mut self, from: MachineId, to: MachineId, session: u64) {
        let node_id = self.machines[from].node_id;
        let Some(manager) = &mut self.machines[to].manager else { return };
        if let Some(leader) = &mut manager.leader {
            leader.end_session(node_id, session);
            manager.is_due = true;
            self.pump(to, Vec::new());
        }
    }

    /// Whatever follows: syncs, what is applied, answers, what the leader decides and tells.
    fn pump(&mut self, machine: MachineId, mut out: Vec<Outgoing>) {
        loop {
            let manager = self.manager(machine);
            if manager.replica.begin_sync(&mut out) {
                self.schedule_sync(machine);
            }
            for (to, message) in out.drain(..) {
                self.send(machine, to, Message::Raft(message));
            }
            self.apply_committed(machine);
            self.answer_reads(machine);
            self.serve_requests(machine, &mut out);
            self.judge(machine);
            self.lead(machine, &mut out);
            if out.is_empty() {
                break;
            }
        }
    }

    fn schedule_sync(&mut self, machine: MachineId) {
        let (now, rates) = (self.now(), self.rates);
        let one = &mut self.machines[machine];
        let micros = if one.has_slow_disk_until > now { 100_000..1_000_000 } else { 300..4000 };
        let delay = Duration::from_micros(one.rng.random_range(micros));
        if rates.hits(Fault::CrashAtSync, &mut one.rng) {
            let moment = delay.mul_f64(one.rng.random_range(0.0..1.0));
            self.queue.after(moment, Event::PowerLoss { machine });
        }
        self.timer(machine, delay, Timer::Synced);
    }

    fn apply_committed(&mut self, machine: MachineId) {
        loop {
            let manager = self.manager(machine);
            let next = manager.state.version().index + 1;
            if next > manager.replica.commit() {
                break;
            }
            let Some(entry) = manager.replica.committed(next) else {
                let bytes = &manager.replica.snapshot().bytes;
                manager.state = State::decode(bytes).expect("a snapshot is what was encoded");
                let state = manager.state.clone();
                self.see(&Seen::Restored { manager: machine, state });
                continue;
            };
            let before = manager.state.clone();
            let (outcome, changes, proposal) = match &entry.payload {
                Payload::Blank => {
                    manager.state.skip(next);
                    (None, Vec::new(), None)
                }
                Payload::Command { id, command } => {
                    let (outcome, changes) = manager.state.apply(next, command);
                    (Some((outcome, command.clone())), changes, Some(*id))
                }
            };
            let state = manager.state.clone();
            if let Some(leader) = &mut manager.leader {
                leader.take(&state, &changes);
                manager.is_due = true;
            }
            self.note_committed(&before, &state, outcome.as_ref(), changes, proposal);
            self.see(&Seen::Applied { manager: machine, term: entry.term, proposal, state });
            if let (Some(id), Some((outcome, _))) = (proposal, outcome) {
                self.resolve(machine, id, &outcome);
            }
        }
        let manager = self.manager(machine);
        let applied = manager.state.version().index;
        if applied >= manager.replica.snapshot().index + SNAPSHOT_EVERY {
            let bytes = manager.state.encode();
            manager.replica.compact(applied, bytes);
        }
    }

    /// The first manager that applies an entry says what the swarm agreed on.
    fn note_committed(
        &mut self,
        before: &State,
        after: &State,
        outcome: Option<&(Outcome, Arc<Command>)>,
        changes: Vec<skep_manager_core::Change>,
        proposal: Option<u64>,
    ) {
        if after.version() <= self.ledger.version() {
            return;
        }
        self.ledger = after.clone();
        let index = after.version().index;
        let Some((outcome, command)) = outcome else {
            self.note(format_args!("committed {index}: a leader's first"));
            return;
        };
        let n_actions = command.actions.len();
        self.note(format_args!("committed {index}: {n_actions} actions, {outcome:?}, {changes:?}"));
        let (before, after) = (before.clone(), after.clone());
        let (command, outcome) = (command.clone(), outcome.clone());
        let proposal = proposal.unwrap_or(0);
        self.see(&Seen::Committed { proposal, before, after, changes, command, outcome });
    }

    fn resolve(&mut self, machine: MachineId, id: u64, outcome: &Outcome) {
        let manager = self.manager(machine);
        match manager.waiting.remove(&id) {
            Some(Waiter::Loop) => {
                if let Some(leader) = &mut manager.leader {
                    leader.committed(id, matches!(outcome, Outcome::Applied(_)));
                }
            }
            Some(Waiter::Request) => self.finish(machine, id, Some(outcome), true),
            Some(Waiter::Remote(from)) => {
                let outcome = Some(outcome.clone());
                self.send(machine, from, Message::Proposed { id, outcome, may_commit: true });
            }
            None => {}
        }
    }

    fn answer_reads(&mut self, machine: MachineId) {
        for (request, index) in self.manager(machine).replica.take_confirmed() {
            match self.manager(machine).asked.remove(&request) {
                Some(from) => {
                    self.send(machine, from, Message::Index { request, index: Some(index) });
                }
                None => {
                    if let Some(one) = self.manager(machine).requests.get_mut(&request) {
                        one.stage = Stage::Catching(index);
                    }
                }
            }
        }
    }

    /// A client asks this manager for something.
    pub(crate) fn begin_request(&mut self, machine: MachineId, wish: client::Wish) -> u64 {
        let id = self.next_id();
        let (seed, n_granted) = (self.client_rng.random(), self.n_granted);
        self.note(format_args!("{machine} is asked for {wish:?} ({id})"));
        let request = Request { wish, seed, stage: Stage::Asking, n_granted, about: None };
        self.manager(machine).requests.insert(id, request);
        self.timer(machine, Duration::ZERO, Timer::Request { id });
        self.timer(machine, REQUEST_PATIENCE, Timer::RequestDeadline { id });
        id
    }

    fn try_request(&mut self, machine: MachineId, id: u64, out: &mut Vec<Outgoing>) {
        let now = self.now();
        let manager = self.manager(machine);
        if manager.requests.get(&id).is_none_or(|request| request.stage != Stage::Asking) {
            return;
        }
        let applied = manager.state.version().index;
        let leader = manager.replica.leader();
        if manager.replica.is_leader() {
            manager.replica.read(id, applied, now, out);
        } else if let Some(leader) = leader {
            self.send(machine, leader, Message::AskIndex { request: id });
        }
        self.timer(machine, REQUEST_RETRY, Timer::Request { id });
    }

    fn serve_requests(&mut self, machine: MachineId, out: &mut Vec<Outgoing>) {
        let manager = self.manager(machine);
        let applied = manager.state.version().index;
        let is_ready =
            |request: &Request| matches!(request.stage, Stage::Catching(index) if index <= applied);
        let ready = manager.requests.iter().filter(|(_, request)| is_ready(request));
        let ready: Vec<u64> = ready.map(|(id, _)| *id).collect();
        for id in ready {
            self.serve(machine, id, out);
        }
    }

    fn serve(&mut self, machine: MachineId, id: u64, out: &mut Vec<Outgoing>) {
        let (now, clock) = (self.now(), self.machines[machine].clock(self.now()));
        let manager = self.manager(machine);
        let state = manager.state.clone();
        let Some(request) = manager.requests.get_mut(&id) else { return };
        let n_granted = request.n_granted;
        let decided = client::decide(&request.wish, &state, request.seed, clock);
        request.stage = Stage::Proposed;
        self.see(&Seen::Read { state, n_granted });
        let manager = self.manager(machine);
        let (actions, about) = match decided {
            Ok(Some(decision)) => decision,
            Ok(None) => {
                manager.requests.remove(&id);
                return;
            }
            Err(why) => {
                manager.requests.remove(&id);
                self.note(format_args!("{machine} refuses {id}: {why}"));
                return;
            }
        };
        if let Some(request) = manager.requests.get_mut(&id) {
            request.about = about;
        }
        let command = Arc::new(Command::new(clock, actions));
        if manager.replica.is_leader() {
            manager.replica.append(Payload::Command { id, command });
            manager.replica.speak(now, out);
            manager.waiting.insert(id, Waiter::Request);
        } else if let Some(leader) = manager.replica.leader() {
            self.send(machine, leader, Message::Propose { id, command });
        } else {
            manager.requests.remove(&id);
        }
    }

    /// A client's request has its answer.
    fn finish(&mut self, machine: MachineId, id: u64, outcome: Option<&Outcome>, may_commit: bool) {
        let Some(request) = self.manager(machine).requests.remove(&id) else { return };
        self.note(format_args!("{id} ends: {outcome:?}, may still commit: {may_commit}"));
        let Some(Outcome::Applied(version)) = outcome else { return };
        if let Some((kind, id)) = request.about {
            self.n_granted += 1;
            self.see(&Seen::Granted { kind, id, index: version.index });
        }
        let is_stranger =
            |joined: MachineId| self.ledger.node(self.machines[joined].node_id).is_none();
        if let client::Wish::Join(joined, node_id) = request.wish
            && is_stranger(joined)
        {
            self.machines[joined].node_id = node_id;
            self.machines[joined].agent.n_failed = 0;
        }
    }

    /// Begins and ends to lead.
    fn judge(&mut self, machine: MachineId) {
        let (now, clock) = (self.now(), self.machines[machine].clock(self.now()));
        let one = &mut self.machines[machine];
        let Some(manager) = &mut one.manager else { return };
        let (replica, term) = (&manager.replica, manager.replica.term());
        if replica.is_leader() && manager.speaks_in != term {
            manager.speaks_in = term;
            self.timer(machine, HEARTBEAT, Timer::Heartbeat { term });
        }
        let manager = self.manager(machine);
        let leads = manager.replica.leads_surely(manager.state.version().index, now);
        let is_other = manager.leader.as_ref().is_some_and(|leader| leader.term != term);
        // That nobody answers is noticed a little later than what somebody says.
        let is_silent = !leads && (manager.is_judged || !manager.replica.is_leader());
        manager.is_judged = false;
        if manager.leader.is_some() && (is_silent || is_other) {
            self.note(format_args!("{machine} leads no more"));
            self.stop_leading(machine);
        }
        let one = &mut self.machines[machine];
        let Some(manager) = &mut one.manager else { return };
        if !manager.replica.is_leader() {
            self.lose_proposals(machine);
        } else if leads && manager.leader.is_none() {
            let seed = one.rng.random();
            manager.leader = Some(Leader::new(manager.state.clone(), term, clock, now, seed));
            manager.is_due = true;
            self.note(format_args!("{machine} leads in term {term}"));
            self.see(&Seen::Led { manager: machine, term });
            self.timer(machine, leader::TICK, Timer::Tick { term });
        }
    }

    fn stop_leading(&mut self, machine: MachineId) {
        let Some(leader) = self.manager(machine).leader.take() else { return };
        for (to, session) in leader.sessions() {
            self.send(machine, to, Message::End { session });
        }
    }

    /// Whoever waits for a proposal of a lost leadership is told that nobody knows.
    fn lose_proposals(&mut self, machine: MachineId) {
        let waiting = std::mem::take(&mut self.manager(machine).waiting);
        for (id, waiter) in waiting {
            match waiter {
                Waiter::Loop => {}
                Waiter::Request => self.finish(machine, id, None, true),
                Waiter::Remote(from) => self.tell_lost(machine, from, id),
            }
        }
    }

    fn tell_lost(&mut self, machine: MachineId, from: ManagerId, id: u64) {
        self.send(machine, from, Message::Proposed { id, outcome: None, may_commit: true });
    }

    /// The leader's loop: one command, and what is new for the nodes.
    fn lead(&mut self, machine: MachineId, out: &mut Vec<Outgoing>) {
        let (now, clock) = (self.now(), self.machines[machine].clock(self.now()));
        let id = self.next_id();
        let manager = self.manager(machine);
        if !std::mem::take(&mut manager.is_due) {
            return;
        }
        let Some(leader) = &mut manager.leader else { return };
        let mut seen = Vec::new();
        if let Some((command, is_plan)) = leader.decide(clock, now, id, &mut seen) {
            let (command, view) = (Arc::new(command), leader.state.version().index);
            if is_plan {
                seen.push(Seen::Decided { proposal: id, view });
            }
            manager.replica.append(Payload::Command { id, command });
            manager.replica.speak(now, out);
            manager.waiting.insert(id, Waiter::Loop);
        }
        let messages = leader.dispatch(clock, &mut seen);
        let probes = std::mem::take(&mut leader.probes);
        let wake_at = leader.wake_at().map(|at| {
            // Its deadlines are by its own clock.
            let delay = at.since(clock).max(Duration::from_millis(1));
            now.after(delay)
        });
        let is_sooner =
            |at: &skep_common::Timestamp| manager.wakes_at.is_none_or(|known| *at < known);
        if let Some(at) = wake_at.filter(is_sooner) {
            manager.wakes_at = Some(at);
            self.timer(machine, at.since(now), Timer::Wake);
        }
        self.see_all(seen);
        for (to, message) in messages {
            self.send(machine, to, message);
        }
        for node_id in probes {
            let millis = self.machines[machine].rng.random_range(1..500);
            self.timer(machine, Duration::from_millis(millis), Timer::Probed { node_id });
        }
    }
}
