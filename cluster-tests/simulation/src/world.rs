//! A whole swarm in one thread, under one seed: machines, what goes between them, and what goes wrong.
//!
//! Reading order: this file (what there is, and who is handed which event), `network` (what becomes of a
//! message), `managing` and `working` (a machine's two roles), `trouble` (faults and wishes).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use skep_common::{NodeId, TaskId, Timestamp};
use skep_manager_core::command::FORMAT_LEVEL;
use skep_manager_core::{Action, Command, Expect, State};

use crate::agent::Agent;
use crate::fault::Rates;
use crate::invariants::{self, Invariant};
use crate::log::{Entry, Payload};
use crate::machine::{Machine, Manager};
use crate::membership::{ManagerId, Membership};
use crate::message::{MachineId, Message};
use crate::queue::{Queue, START};
use crate::role::RoleChange;
use crate::run::Counts;
use crate::seen::Seen;
use crate::service;
use crate::trace::Trace;

/// What is asked of one machine's daemon for later. It dies with that daemon.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Timer {
    Election,
    Heartbeat {
        term: u64,
    },
    Synced,
    /// The leader's tick.
    Tick {
        term: u64,
    },
    /// Another of its deadlines.
    Wake,
    Probed {
        node_id: NodeId,
    },
    Connect,
    /// Nobody said welcome.
    WelcomeDeadline {
        session: u64,
    },
    Beat {
        session: u64,
    },
    Step {
        task_id: TaskId,
    },
    Program {
        session: u64,
        version: u64,
    },
    /// Another role is asked for once more.
    Role {
        request: u64,
    },
    /// The leader looks at what changes the members.
    Changes,
    /// A session's connection is found broken.
    Broken {
        session: u64,
        peer: MachineId,
    },
    /// A client's request is tried again.
    Request {
        id: u64,
    },
    RequestDeadline {
        id: u64,
    },
}

/// One thing to happen.
#[derive(Debug)]
pub(crate) enum Event {
    Deliver {
        from: MachineId,
        to: MachineId,
        message: Message,
    },
    Timer {
        machine: MachineId,
        life: u32,
        timer: Timer,
    },
    /// Faults are drawn, wishes are made, invariants look at everything.
    Second,
    Wish,
    /// A daemon starts again.
    Start {
        machine: MachineId,
    },
    /// A disk has room again.
    Resume {
        machine: MachineId,
        life: u32,
    },
    PowerLoss {
        machine: MachineId,
    },
}

/// A swarm and its clock.
pub(crate) struct World {
    pub(crate) queue: Queue<Event>,
    pub(crate) trace: Trace,
    pub(crate) rates: Rates,
    /// Whether wishes are made and faults drawn.
    pub(crate) is_rough: bool,
    /// Whether everything has come to rest once: what happens from then on is asked for.
    pub(crate) is_quiet: bool,
    pub(crate) machines: Vec<Machine>,
    /// The format level that programs knew at first.
    pub(crate) first_level: u32,
    /// What happened, by kind.
    pub(crate) counts: Counts,
    /// Until when a machine does not hear another: (from, to).
    pub(crate) cuts: BTreeMap<(MachineId, MachineId), Timestamp>,
    /// When the last message of each stream arrives.
    pub(crate) streams: BTreeMap<(u64, MachineId), Timestamp>,
    pub(crate) network_rng: StdRng,
    pub(crate) trouble_rng: StdRng,
    pub(crate) client_rng: StdRng,
    pub(crate) upgrade_rng: StdRng,
    pub(crate) n_ids: u64,
    /// The state that the swarm agreed on, by whoever was first.
    pub(crate) ledger: State,
    /// Wishes that were granted.
    pub(crate) n_granted: usize,
    /// Sessions that lost a message.
    pub(crate) broken: std::collections::BTreeSet<u64>,
    invariants: Vec<Box<dyn Invariant>>,
    pub(crate) violation: Option<String>,
    pub(crate) n_events: u64,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World at {} with {} machines", self.queue.now(), self.machines.len())
    }
}

impl World {
    /// The swarm of a seed, founded and calm.
    pub(crate) fn new(seed: u64, is_printed: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let n_managers = if rng.random_bool(0.6) { 3 } else { 5 };
        let n_machines = n_managers.max(rng.random_range(5..=8));
        let count = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        // Some swarms are upgraded, from an earlier level or the one before that.
        let mut upgrade_rng = StdRng::seed_from_u64(seed ^ u64::from_be_bytes(*b"upgrades"));
        let first_level = if upgrade_rng.random_bool(0.3) {
            upgrade_rng.random_range(FORMAT_LEVEL - 2..FORMAT_LEVEL)
        } else {
            FORMAT_LEVEL
        };
        let objects = service::founding(count(n_managers), count(n_machines), first_level);
        let put = |object| Action::Put { object, expect: Expect::Absent };
        let command = Arc::new(Command::new(START, objects.into_iter().map(put).collect()));
        let payload = Payload::Command { id: 0, command };
        let voters = (0..n_managers).map(|id| ManagerId::new(id, 0)).collect();
        let members = Payload::Membership(Membership::of(voters));
        let founding: Vec<Arc<Entry>> = (1..)
            .zip([members, payload])
            .map(|(index, payload)| Arc::new(Entry { index, term: 1, payload }))
            .collect();
        let machines = (0..n_machines).map(|id| Machine {
            node_id: NodeId(id as u128 + 1),
            level: first_level,
            is_up: true,
            life: 0,
            paused_until: START,
            clock_offset: rng.random_range(-200_000_000..200_000_000),
            has_slow_disk_until: START,
            flaps_until: START,
            disturbed_at: START,
            session_since: START,
            manager: (id < n_managers)
                .then(|| Manager::new(ManagerId::new(id, 0), founding.clone(), START)),
            role_change: RoleChange::default(),
            agent: Agent::new((0..n_managers).collect()),
            rng: StdRng::seed_from_u64(rng.random()),
        });
        let machines: Vec<Machine> = machines.collect();
        let mut world = Self {
            queue: Queue::default(),
            trace: Trace::new(is_printed),
            rates: Rates::NONE,
            is_rough: false,
            is_quiet: false,
            machines,
            first_level,
            counts: Counts::default(),
            cuts: BTreeMap::new(),
            streams: BTreeMap::new(),
            network_rng: StdRng::seed_from_u64(rng.random()),
            trouble_rng: StdRng::seed_from_u64(rng.random()),
            client_rng: StdRng::seed_from_u64(rng.random()),
            upgrade_rng,
            n_ids: 0,
            ledger: State::default(),
            n_granted: 0,
            broken: std::collections::BTreeSet::new(),
            invariants: invariants::all(),
            violation: None,
            n_events: 0,
        };
        for machine in 0..n_machines {
            world.start_daemon(machine);
        }
        world.queue.after(Duration::from_secs(1), Event::Second);
        world
    }

    /// True time.
    pub(crate) fn now(&self) -> Timestamp {
        self.queue.now()
    }

    pub(crate) fn next_id(&mut self) -> u64 {
        self.n_ids += 1;
        self.n_ids
    }

    /// The machines that are managers now, as their certificates say.
    pub(crate) fn managers(&self) -> Vec<MachineId> {
        let is_manager = |id: &MachineId| self.machines[*id].manager.is_some();
        (0..self.machines.len()).filter(is_manager).collect()
    }

    /// The machine that is a node now.
    pub(crate) fn machine_of(&self, node_id: NodeId) -> Option<MachineId> {
        self.machines.iter().position(|machine| machine.node_id == node_id)
    }

    /// The managers that lead, as they believe.
    pub(crate) fn leaders(&self) -> impl Iterator<Item = (MachineId, &crate::leader::Leader)> {
        let leads = |(id, machine): (MachineId, &'_ Machine)| {
            machine.manager.as_ref()?.leader.as_ref().map(|_| id)
        };
        let ids: Vec<MachineId> = self.machines.iter().enumerate().filter_map(leads).collect();
        ids.into_iter()
            .filter_map(|id| Some((id, self.machines[id].manager.as_ref()?.leader.as_ref()?)))
    }

    pub(crate) fn note(&mut self, what: fmt::Arguments<'_>) {
        self.trace.note(self.queue.now(), what);
    }

    /// Shows a fact to every invariant.
    pub(crate) fn see(&mut self, seen: &Seen) {
        let mut invariants = std::mem::take(&mut self.invariants);
        for invariant in &mut invariants {
            if let Err(why) = invariant.check(self, seen)
                && self.violation.is_none()
            {
                let violation = format!("{}: {why}", invariant.name());
                self.note(format_args!("violation: {violation}"));
                self.violation = Some(violation);
            }
        }
        self.invariants = invariants;
    }

    pub(crate) fn see_all(&mut self, seen: Vec<Seen>) {
        for one in &seen {
            self.see(one);
        }
    }

    pub(crate) fn timer(&mut self, machine: MachineId, delay: Duration, timer: Timer) {
        let life = self.machines[machine].life;
        self.queue.after(delay, Event::Timer { machine, life, timer });
    }

    /// The daemon of a machine begins its work, also after a crash.
    pub(crate) fn start_daemon(&mut self, machine: MachineId) {
        let now = self.now();
        let one = &mut self.machines[machine];
        one.is_up = true;
        let delay = Duration::from_millis(one.rng.random_range(1..200));
        let clock = one.clock(now);
        for task_id in one.agent.restart(now, clock) {
            self.timer(machine, Duration::ZERO, Timer::Step { task_id });
        }
        self.timer(machine, delay, Timer::Connect);
        self.start_manager(machine);
        self.start_role(machine);
    }

    /// The next event. False: there is none.
    pub(crate) fn step(&mut self) -> bool {
        let Some(event) = self.queue.pop() else { return false };
        self.n_events += 1;
        let now = self.now();
        let concerned = match &event {
            Event::Deliver { to, .. } => Some(*to),
            Event::Timer { machine, .. } => Some(*machine),
            _ => None,
        };
        if let Some(machine) = concerned {
            let one = &self.machines[machine];
            if one.is_up && one.paused_until > now {
                // Who goes on sees its timers and what came on its connections in any order.
                let has_no_order = match &event {
                    Event::Deliver { message, .. } => message.stream().is_none(),
                    _ => true,
                };
                let mut at = one.paused_until;
                if has_no_order {
                    let millis = self.machines[machine].rng.random_range(0..100);
                    at = at.after(Duration::from_millis(millis));
                }
                self.queue.at(at, event);
                return true;
            }
        }
        match event {
            Event::Deliver { from, to, message } => self.deliver(from, to, message),
            Event::Timer { machine, life, timer } => {
                if self.machines[machine].is_up && self.machines[machine].life == life {
                    self.handle_timer(machine, timer);
                }
            }
            Event::Second => {
                self.trouble();
                self.upgrade_sometimes();
                self.see(&Seen::Second);
                self.queue.after(Duration::from_secs(1), Event::Second);
            }
            Event::Wish => self.draw_wish(),
            Event::Start { machine } => {
                self.note(format_args!("{machine} starts"));
                if !self.machines[machine].is_up {
                    self.start_daemon(machine);
                }
            }
            Event::Resume { machine, life } => {
                if self.machines[machine].life == life && self.machines[machine].is_up {
                    self.resume_manager(machine);
                }
            }
            Event::PowerLoss { machine } => self.lose_power(machine),
        }
        true
    }

    fn handle_timer(&mut self, machine: MachineId, timer: Timer) {
        match timer {
            Timer::Election
            | Timer::Heartbeat { .. }
            | Timer::Synced
            | Timer::Tick { .. }
            | Timer::Wake
            | Timer::Probed { .. }
            | Timer::Request { .. }
            | Timer::Changes
            | Timer::RequestDeadline { .. } => {
                let is_stopped = self.machines[machine]
                    .manager
                    .as_ref()
                    .is_none_or(|manager| manager.is_stopped);
                if !is_stopped {
                    self.handle_manager_timer(machine, timer);
                }
            }
            Timer::Broken { session, peer } => {
                self.end_at_agent(machine, session);
                self.end_at_manager(peer, machine, session);
            }
            Timer::Role { request } => self.take_up_role(machine, request),
            Timer::Connect
            | Timer::WelcomeDeadline { .. }
            | Timer::Beat { .. }
            | Timer::Step { .. }
            | Timer::Program { .. } => self.handle_agent_timer(machine, timer),
        }
    }

    fn deliver(&mut self, from: MachineId, to: MachineId, message: Message) {
        let is_broken = message.stream().is_some_and(|session| self.broken.contains(&session));
        if !self.machines[to].is_up || is_broken {
            return;
        }
        self.note(format_args!("{from} -> {to} {}", message.name()));
        let is_for_agent = matches!(
            message,
            Message::Welcome { .. }
                | Message::Redirect { .. }
                | Message::Removed { .. }
                | Message::Role { .. }
                | Message::Renewed { .. }
                | Message::Admitted { .. }
                | Message::Assignments { .. }
                | Message::BeatTaken
        );
        match (is_for_agent, message) {
            (_, Message::End { session }) => {
                self.end_at_agent(to, session);
                self.end_at_manager(from, to, session);
            }
            (true, message) => self.handle_agent_message(from, to, message),
            (false, message) => self.handle_manager_message(from, to, message),
        }
    }

    /// A container of this task runs on a machine, whoever asked for it.
    #[cfg(test)]
    pub(crate) fn place_for_test(
        &mut self,
        machine: MachineId,
        task: &skep_manager_core::assignments::AssignedTask,
    ) {
        let agent = &mut self.machines[machine].agent;
        agent.running.insert(task.task.id);
        agent.assign(task.to_task(), START, START);
    }
}
