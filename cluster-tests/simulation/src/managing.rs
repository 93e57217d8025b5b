//! A machine's role as a manager: its replica, what it applies, its leader's loop, its clients.

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use skep_common::NodeId;
use skep_common::spec::NodeRole;
use skep_manager_core::liveness::Answer;
use skep_manager_core::{Action, Command, Outcome, State, kept_out, level};

use crate::changing::{Changes, Verdict};
use crate::client::{self, Decision};
use crate::fault::Fault;
use crate::leader::{self, Leader};
use crate::log::Payload;
use crate::machine::{Manager, Request, Stage, Waiter};
use crate::membership::ManagerId;
use crate::message::{MachineId, Message};
use crate::replica::{HEARTBEAT, Outgoing};
use crate::role::Answer as RoleAnswer;
use crate::seen::Seen;
use crate::world::{Event, Timer, World};

/// Entries after which a manager makes a snapshot.
const SNAPSHOT_EVERY: u64 = 64;
/// How long a client's request is tried.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
const REQUEST_RETRY: Duration = Duration::from_millis(300);

impl World {
    pub(crate) fn manager(&mut self, machine: MachineId) -> &mut Manager {
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
        manager.changes = Changes::default();
        let state = manager.state.clone();
        self.see(&Seen::Restored { manager: machine, level: snapshot.level, state });
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
            Timer::Changes => manager.changes.is_waiting = false,
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
            Timer::RequestDeadline { id } => self.end_request(machine, id, None),
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
            Message::Raft { from: from_id, to: to_id, message } => {
                if to_id != manager.replica.id() || self.is_turned_away(from, to) {
                    return;
                }
                if message.level() > 0 && self.is_member(from, to_id) {
                    self.see(&Seen::Sent { manager: to, level: message.level() });
                }
                let one = &mut self.machines[to];
                let Some(manager) = &mut one.manager else { return };
                manager.replica.handle(from_id, message, now, &mut one.rng, &mut out);
            }
            Message::Change { id, change } => self.take_change(to, id, Some(from), change),
            Message::Changed { id, verdict } => self.changed(to, id, &verdict, &mut out),
            Message::Renew { request, node_id } => {
                self.begin_asked(to, client::Wish::Renew(node_id), (from, request));
            }
            Message::Admit { request, node_id, manager, level } => {
                let wish = client::Wish::Admit(node_id, manager, level);
                self.begin_asked(to, wish, (from, request));
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

    /// Whether a leader counts another manager, as a voter or a learner.
    fn is_member(&self, leader: MachineId, id: ManagerId) -> bool {
        let leader = self.machines[leader].manager.as_ref();
        leader.is_some_and(|leader| leader.replica.membership().members().contains(&id))
    }

    /// Whether a manager refuses another one: it was removed, or is to its knowledge no manager. One that has
    /// not heard of a leader may know too little for that.
    fn is_turned_away(&self, from: MachineId, to: MachineId) -> bool {
        let Some(manager) = &self.machines[to].manager else { return true };
        let node_id = self.machines[from].node_id;
        if kept_out::is_kept_out(&manager.state, node_id) {
            return true;
        }
        let role = manager.state.node(node_id).map(|node| node.observed_role());
        let applied = manager.state.version().index;
        role == Some(NodeRole::Worker) && manager.replica.is_current(applied, self.now())
    }

    /// A message of an agent.
    fn handle_session(&mut self, from: MachineId, to: MachineId, message: Message) {
        let (now, clock) = (self.now(), self.machines[to].clock(self.now()));
        let node_id = self.machines[from].node_id;
        let manager = self.manager(to);
        let Some(leader) = &mut manager.leader else {
            let leader = manager.replica.leader().map(ManagerId::machine);
            let leader = leader.filter(|leader| *leader != to);
            match message {
                Message::Hello { session, .. } => {
                    self.send(to, from, Message::Redirect { session, leader });
                }
                Message::Beat { session } => self.send(to, from, Message::End { session }),
                _ => {}
            }
            return;
        };
        match message {
            Message::Hello { session, level } => {
                let term = leader.term;
                let is_member = leader.open_session(node_id, (from, level), session, clock, now);
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
            let from = self.manager(machine).replica.id();
            for (to, message) in out.drain(..) {
                self.send(machine, to.machine(), Message::Raft { from, to, message });
            }
            self.apply_committed(machine);
            self.answer_reads(machine);
            self.serve_requests(machine, &mut out);
            self.judge(machine);
            self.lead(machine, &mut out);
            self.change_members(machine, &mut out);
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
                let snapshot = manager.replica.snapshot().clone();
                manager.state =
                    State::decode(&snapshot.bytes).expect("a snapshot is what was encoded");
                let (level, state) = (snapshot.level, manager.state.clone());
                self.see(&Seen::Restored { manager: machine, level, state });
                continue;
            };
            let before = manager.state.clone();
            let level = entry.level();
            let (outcome, changes, proposal) = match &entry.payload {
                Payload::Blank | Payload::Membership(_) => {
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
            self.see(&Seen::Applied { manager: machine, term: entry.term, proposal, level, state });
            if let (Some(id), Some((outcome, _))) = (proposal, outcome) {
                self.resolve(machine, id, &outcome);
            }
        }
        let manager = self.manager(machine);
        let applied = manager.state.version().index;
        if applied >= manager.replica.snapshot().index + SNAPSHOT_EVERY {
            let (level, bytes) = (manager.state.level(), manager.state.encode());
            manager.replica.compact(applied, level, bytes);
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
            self.note(format_args!("committed {index}: no command"));
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
            Some(Waiter::Retirement) => self.manager(machine).changes.is_noting = false,
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
        self.begin(machine, wish, None)
    }

    /// Another machine asks this manager for something, and has a number for it.
    fn begin_asked(&mut self, machine: MachineId, wish: client::Wish, by: (MachineId, u64)) {
        self.begin(machine, wish, Some(by));
    }

    fn begin(
        &mut self,
        machine: MachineId,
        wish: client::Wish,
        asked_by: Option<(MachineId, u64)>,
    ) -> u64 {
        let id = self.next_id();
        let (seed, n_granted) = (self.client_rng.random(), self.n_granted);
        self.note(format_args!("{machine} is asked for {wish:?} ({id})"));
        let request = Request {
            wish,
            seed,
            stage: Stage::Asking,
            n_granted,
            about: None,
            then: None,
            has_changed: false,
            goes_on: false,
            asked_by,
        };
        self.manager(machine).requests.insert(id, request);
        self.timer(machine, Duration::ZERO, Timer::Request { id });
        self.timer(machine, REQUEST_PATIENCE, Timer::RequestDeadline { id });
        id
    }

    fn try_request(&mut self, machine: MachineId, id: u64, out: &mut Vec<Outgoing>) {
        let now = self.now();
        let manager = self.manager(machine);
        let Some(stage) = manager.requests.get(&id).map(|request| request.stage) else { return };
        if let Stage::Changing(change) = stage {
            self.ask_for_change(machine, id, change);
            self.timer(machine, REQUEST_RETRY, Timer::Request { id });
            return;
        }
        if stage != Stage::Asking {
            return;
        }
        let applied = manager.state.version().index;
        let leader = manager.replica.leader();
        if manager.replica.is_leader() {
            manager.replica.read(id, applied, now, out);
        } else if let Some(leader) = leader.map(ManagerId::machine) {
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
        let clock = self.machines[machine].clock(self.now());
        let manager = self.manager(machine);
        let state = manager.state.clone();
        let Some(request) = manager.requests.get_mut(&id) else { return };
        let n_granted = request.n_granted;
        let decided =
            client::decide(&request.wish, &state, request.seed, clock, request.has_changed);
        self.see(&Seen::Read { state, n_granted });
        let decision = match decided {
            Ok(decision) => decision,
            Err(why) => {
                self.note(format_args!("{machine} refuses {id}: {why}"));
                self.end_request(machine, id, None);
                return;
            }
        };
        let Some(request) = self.manager(machine).requests.get_mut(&id) else { return };
        match decision {
            Decision::Nothing => self.end_request(machine, id, Some(RoleAnswer::Member)),
            Decision::Role(role, raft_id) => {
                self.end_request(machine, id, Some(RoleAnswer::Role(role, raft_id)));
            }
            Decision::Write { actions, about, goes_on } => {
                (request.about, request.goes_on) = (about, goes_on);
                self.propose(machine, id, actions, out);
            }
            Decision::Change { change, then, about } => {
                (request.about, request.then) = (about, then);
                request.stage = Stage::Changing(change);
                self.ask_for_change(machine, id, change);
                self.timer(machine, REQUEST_RETRY, Timer::Request { id });
            }
        }
    }

    /// Proposes what a client's request came to.
    fn propose(
        &mut self,
        machine: MachineId,
        id: u64,
        actions: Vec<Action>,
        out: &mut Vec<Outgoing>,
    ) {
        let (now, clock) = (self.now(), self.machines[machine].clock(self.now()));
        let manager = self.manager(machine);
        let Some(request) = manager.requests.get_mut(&id) else { return };
        request.stage = Stage::Proposed;
        let is_own = request.asked_by.is_none();
        let command = Arc::new(Command::new(clock, actions));
        let (level, state) = (command.level, manager.state.clone());
        let own = &self.machines[machine];
        if is_own {
            let checked = level::check(&state, level, own.node_id).map_err(|why| why.to_string());
            let is_known = level <= own.level;
            if let Err(why) = checked.and_then(|()| {
                is_known.then_some(()).ok_or_else(|| "an older program does not know it".to_owned())
            }) {
                self.note(format_args!("{machine} refuses {id}: {why}"));
                self.end_request(machine, id, None);
                return;
            }
        }
        self.see(&Seen::Proposed { manager: machine, level, state });
        let manager = self.manager(machine);
        if manager.replica.is_leader() {
            manager.replica.append(Payload::Command { id, command });
            manager.replica.speak(now, out);
            manager.waiting.insert(id, Waiter::Request);
        } else if let Some(leader) = manager.replica.leader().map(ManagerId::machine) {
            self.send(machine, leader, Message::Propose { id, command });
        } else {
            self.end_request(machine, id, None);
        }
    }

    /// The members are changed as a request needs it, or are not.
    pub(crate) fn changed(
        &mut self,
        machine: MachineId,
        id: u64,
        verdict: &Verdict,
        out: &mut Vec<Outgoing>,
    ) {
        let manager = self.manager(machine);
        let Some(request) = manager.requests.get_mut(&id) else { return };
        if !matches!(request.stage, Stage::Changing(_)) {
            return;
        }
        match verdict {
            Verdict::Done => match request.then.take() {
                Some(actions) => self.propose(machine, id, actions, out),
                None => {
                    (request.has_changed, request.stage) = (true, Stage::Asking);
                    self.timer(machine, Duration::ZERO, Timer::Request { id });
                }
            },
            Verdict::Refused(why) => {
                self.note(format_args!("{machine} refuses {id}: {why}"));
                self.end_request(machine, id, None);
            }
            Verdict::NotTaken => {} // It is asked for again.
        }
    }

    /// Whoever waits for a request here has its answer.
    fn end_request(&mut self, machine: MachineId, id: u64, answer: Option<RoleAnswer>) {
        let Some(request) = self.manager(machine).requests.remove(&id) else { return };
        let Some((to, number)) = request.asked_by else { return };
        let message = match (&request.wish, answer) {
            (client::Wish::Renew(_), Some(RoleAnswer::Role(role, raft_id))) => {
                Message::Renewed { request: number, role: Some((role, raft_id)) }
            }
            (client::Wish::Renew(_), _) => Message::Renewed { request: number, role: None },
            (_, answer) => {
                let is_member = answer == Some(RoleAnswer::Member);
                Message::Admitted { request: number, is_member }
            }
        };
        self.send(machine, to, message);
    }

    /// A client's request has its answer.
    fn finish(&mut self, machine: MachineId, id: u64, outcome: Option<&Outcome>, may_commit: bool) {
        let Some(request) = self.manager(machine).requests.get_mut(&id) else { return };
        if request.stage != Stage::Proposed {
            return;
        }
        if request.goes_on {
            // Whatever became of it, it is looked at anew.
            request.stage = Stage::Asking;
            self.timer(machine, Duration::ZERO, Timer::Request { id });
            return;
        }
        let request = request.clone();
        self.end_request(machine, id, None);
        self.note(format_args!("{id} ends: {outcome:?}, may still commit: {may_commit}"));
        let Some(Outcome::Applied(version)) = outcome else { return };
        if let Some((kind, id)) = request.about {
            self.n_granted += 1;
            self.see(&Seen::Granted { kind, id, index: version.index });
        }
        if let client::Wish::Join(joined, node_id, role) = request.wish {
            self.join(joined, node_id, role);
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
                Waiter::Loop | Waiter::Retirement => {}
                Waiter::Request => self.finish(machine, id, None, true),
                Waiter::Remote(from) => self.tell_lost(machine, from, id),
            }
        }
    }

    fn tell_lost(&mut self, machine: MachineId, from: MachineId, id: u64) {
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
            let (level, state) = (command.level, leader.state.clone());
            seen.push(Seen::Proposed { manager: machine, level, state });
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
