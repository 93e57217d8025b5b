//! A machine's role as a worker: its agent's session, and the tasks that it runs.

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use skep_common::TaskId;
use skep_common::object::TaskStatus;

use crate::agent::{Link, Stepped};
use crate::message::{MachineId, Message};
use crate::seen::Seen;
use crate::world::{Timer, World};

const WELCOME_DEADLINE: Duration = Duration::from_secs(3);
const BEAT: Duration = Duration::from_secs(1);
/// When the first one of a session is sent, in periods, as agents do.
const FIRST_BEAT: std::ops::Range<f64> = 0.25..1.0;
/// A session whose leader is silent for so long is over.
const KEEP_ALIVE: Duration = Duration::from_millis(1500);

/// The longest time between two heartbeats of a node at the edge of being silent.
const FLAP_MAX: Duration = Duration::from_millis(3100);

impl World {
    pub(crate) fn handle_agent_timer(&mut self, machine: MachineId, timer: Timer) {
        match timer {
            Timer::Connect => self.connect(machine),
            Timer::WelcomeDeadline { session } => {
                let link = self.machines[machine].agent.link;
                if matches!(link, Link::Asked { session: asked, .. } if asked == session) {
                    self.connect_later(machine);
                }
            }
            Timer::Beat { session } => self.beat(machine, session),
            Timer::Step { task_id } => self.step_task(machine, task_id),
            Timer::Program { session, version }
                if self.machines[machine].agent.program(session, version) =>
            {
                self.see(&Seen::Programmed { machine });
                self.flush(machine);
            }
            _ => {}
        }
    }

    /// Asks a manager for a session.
    fn connect(&mut self, machine: MachineId) {
        if self.machines[machine].agent.link != Link::None {
            return;
        }
        let session = self.next_id();
        let hint = self.machines[machine].agent.hint.take();
        let manager = hint.unwrap_or_else(|| self.some_manager_known_to(machine));
        let one = &mut self.machines[machine];
        one.agent.link = Link::Asked { session, manager };
        let level = one.level;
        self.send(machine, manager, Message::Hello { session, level });
        self.timer(machine, WELCOME_DEADLINE, Timer::WelcomeDeadline { session });
    }

    /// Tries again after a while that grows.
    fn connect_later(&mut self, machine: MachineId) {
        let one = &mut self.machines[machine];
        one.agent.lose_leader();
        let millis =
            if one.agent.hint.is_some() { 0 } else { (100 << one.agent.n_failed.min(5)).min(2000) };
        one.agent.n_failed += 1;
        let delay = Duration::from_millis(millis).mul_f64(one.rng.random_range(0.5..1.0));
        self.timer(machine, delay, Timer::Connect);
    }

    fn end_session(&mut self, machine: MachineId) {
        if let Some((session, manager, _)) = self.machines[machine].agent.session() {
            self.send(machine, manager, Message::End { session });
            self.connect_later(machine);
        }
    }

    /// The leader's side ended a session.
    pub(crate) fn end_at_agent(&mut self, machine: MachineId, session: u64) {
        let is_current =
            self.machines[machine].agent.session().is_some_and(|(current, ..)| current == session);
        if is_current {
            self.connect_later(machine);
        }
    }

    fn beat(&mut self, machine: MachineId, session: u64) {
        let now = self.now();
        let one = &mut self.machines[machine];
        let Link::Open { session: current, manager, heard_at, .. } = one.agent.link else { return };
        if current != session {
            return;
        }
        let is_flapping = one.flaps_until.after(FLAP_MAX) > now;
        if now > heard_at.after(KEEP_ALIVE) && !is_flapping {
            self.end_session(machine);
            return;
        }
        let period = match one.flaps_until > now {
            true => Duration::from_millis(one.rng.random_range(2900..3100)),
            false => BEAT,
        };
        self.send(machine, manager, Message::Beat { session });
        self.timer(machine, period, Timer::Beat { session });
    }

    pub(crate) fn handle_agent_message(
        &mut self,
        from: MachineId,
        to: MachineId,
        message: Message,
    ) {
        let now = self.now();
        let link = self.machines[to].agent.link;
        let is_asked =
            |session: u64| matches!(link, Link::Asked { session: asked, .. } if asked == session);
        match message {
            Message::Welcome { session, term } if is_asked(session) => {
                let one = &mut self.machines[to];
                if one.agent.welcome(session, term, now) {
                    one.session_since = now;
                    let first = BEAT.mul_f64(one.rng.random_range(FIRST_BEAT));
                    self.timer(to, first, Timer::Beat { session });
                    self.flush(to);
                } else {
                    self.note(format_args!("{to} ignores a deposed leader of term {term}"));
                    self.connect_later(to);
                }
            }
            Message::Redirect { session, leader } if is_asked(session) => {
                self.machines[to].agent.hint = leader.filter(|leader| *leader != from);
                self.connect_later(to);
            }
            Message::Removed { session } if is_asked(session) => {
                for task_id in self.machines[to].agent.remove_all() {
                    self.timer(to, Duration::ZERO, Timer::Step { task_id });
                }
                self.connect_later(to);
                self.leave_managers(to);
            }
            Message::Role { session, role, raft_id, managers }
                if self.machines[to].agent.session().is_some_and(|(open, ..)| open == session) =>
            {
                self.hear(to);
                self.machines[to].agent.managers = managers;
                self.hear_role(to, role, raft_id);
            }
            Message::Renewed { request, role } => self.renewed(to, request, role),
            Message::Admitted { request, is_member } => self.admitted(to, request, is_member),
            Message::Assignments { session, what } => {
                let open = self.machines[to].agent.session();
                let Some((_, _, term)) = open.filter(|(current, ..)| *current == session) else {
                    return;
                };
                self.hear(to);
                let clock = self.machines[to].clock(now);
                match self.machines[to].agent.apply(&what, now, clock) {
                    Err(()) => {
                        self.note(format_args!("{to} asks for everything again"));
                        self.end_session(to);
                    }
                    Ok(touched) => {
                        if let Some((version, _)) = &what.table {
                            let version = *version;
                            let millis = self.machines[to].rng.random_range(1..40);
                            let delay = Duration::from_millis(millis);
                            self.timer(to, delay, Timer::Program { session, version });
                        }
                        self.see(&Seen::Accepted { machine: to, term, what });
                        for task_id in touched {
                            self.timer(to, Duration::ZERO, Timer::Step { task_id });
                        }
                    }
                }
            }
            Message::BeatTaken => self.hear(to),
            _ => {}
        }
    }

    fn hear(&mut self, machine: MachineId) {
        let now = self.now();
        if let Link::Open { heard_at, .. } = &mut self.machines[machine].agent.link {
            *heard_at = now;
        }
    }

    pub(crate) fn step_task(&mut self, machine: MachineId, task_id: TaskId) {
        let (now, rates) = (self.now(), self.rates);
        let one = &mut self.machines[machine];
        let clock = one.clock(now);
        let (stepped, next) = one.agent.step(task_id, &rates, (now, clock), &mut one.rng);
        if let Some(delay) = next {
            self.timer(machine, delay, Timer::Step { task_id });
        }
        if stepped == Stepped::Nothing {
            return;
        }
        self.note(format_args!("{machine} {task_id}: {stepped:?}"));
        if matches!(stepped, Stepped::TriedAgain { .. }) {
            self.counts.n_attempts += 1;
        }
        if matches!(stepped, Stepped::Started | Stepped::TriedAgain { runs: true }) {
            self.see(&Seen::Started);
        }
        self.flush(machine);
    }

    /// Sends what waits to be sent.
    pub(crate) fn flush(&mut self, machine: MachineId) {
        let agent = &mut self.machines[machine].agent;
        let Some((session, manager, _)) = agent.session() else { return };
        let unsent = std::mem::take(&mut agent.unsent);
        let status = |task_id: &TaskId| Some((*task_id, agent.held.get(task_id)?.status.clone()));
        let tasks: Vec<(TaskId, TaskStatus)> = unsent.iter().filter_map(status).collect();
        if let Some(version) = agent.unsent_mesh.take() {
            self.send(machine, manager, Message::MeshApplied { session, version });
        }
        if !tasks.is_empty() {
            let tasks = Arc::new(tasks);
            self.send(machine, manager, Message::Report { session, tasks });
        }
    }
}
