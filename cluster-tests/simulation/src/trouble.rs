//! Faults and wishes, as they come.

use std::time::Duration;

use rand::RngExt as _;
use skep_common::spec::NodeRole;
use skep_common::{NodeId, TaskId};

use crate::client::Wish;
use crate::fault::Fault;
use crate::message::MachineId;
use crate::world::{Event, World};

impl World {
    /// The faults of one second.
    pub(crate) fn trouble(&mut self) {
        if !self.is_rough {
            return;
        }
        for fault in Fault::ALL {
            let rates = self.rates;
            let hits = rates.hits(fault, &mut self.trouble_rng);
            if hits {
                self.cause(fault);
            }
        }
    }

    fn any_machine(&mut self) -> MachineId {
        self.trouble_rng.random_range(0..self.machines.len())
    }

    fn any_manager(&mut self) -> MachineId {
        let managers = self.managers();
        managers[self.trouble_rng.random_range(0..managers.len())]
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.trouble_rng.random_range(range))
    }

    fn cause(&mut self, fault: Fault) {
        match fault {
            Fault::Cut | Fault::HalfCut => {
                let (one, other) = (self.any_machine(), self.any_machine());
                let time = self.millis(500..12_000);
                self.note(format_args!("{fault:?} {one} {other}"));
                self.cut(one, other, time);
                if fault == Fault::Cut {
                    self.cut(other, one, time);
                }
            }
            Fault::Isolate => self.isolate(),
            Fault::Kill => {
                let machine = self.any_machine();
                let time = self.millis(100..6000);
                self.kill(machine, time);
            }
            Fault::PowerLoss => {
                let machine = self.any_machine();
                self.lose_power(machine);
            }
            Fault::SlowDisk | Fault::FullDisk => self.hit_disk(fault),
            Fault::ClockJump => {
                let machine = self.any_machine();
                let millis = self.trouble_rng.random_range(-20_000..20_000_i64);
                self.note(format_args!("the clock of {machine} jumps by {millis} ms"));
                self.machines[machine].clock_offset += millis * 1_000_000;
                self.disturb(machine);
            }
            Fault::Pause => {
                // A leader that is paused is deposed, and does not know it when it goes on.
                let leader = self.leaders().next().map(|(id, _)| id);
                let machine = match leader {
                    Some(leader) if self.trouble_rng.random_bool(0.7) => leader,
                    _ => self.any_machine(),
                };
                let time = self.millis(500..15_000);
                self.note(format_args!("{machine} is paused for {time:?}"));
                self.machines[machine].paused_until = self.now().after(time);
                self.machines[machine].disturbed_at = self.now().after(time);
            }
            Fault::Flap => {
                let machine = self.any_machine();
                let time = self.millis(3000..20_000);
                self.machines[machine].flaps_until = self.now().after(time);
                self.machines[machine].disturbed_at = self.now().after(time);
            }
            Fault::Reset => {
                for _ in 0..3 {
                    let machine = self.any_machine();
                    self.reset(machine);
                }
            }
            Fault::Exit | Fault::Sicken => self.harm(fault),
            Fault::Loss
            | Fault::Delay
            | Fault::Reorder
            | Fault::Duplicate
            | Fault::LateReport
            | Fault::CrashAtSync
            | Fault::Reject => {} // Of single messages, syncs and tasks.
        }
    }

    /// The connection to the leader ends, and the agent looks for a leader anew.
    fn reset(&mut self, machine: MachineId) {
        let session = self.machines[machine].agent.session();
        let is_running =
            self.machines[machine].is_up && self.machines[machine].paused_until <= self.now();
        if let Some((session, ..)) = session.filter(|_| is_running) {
            self.note(format_args!("the session of {machine} is reset"));
            self.end_at_agent(machine, session);
        }
    }

    /// A manager's disk is slow for a while, or full.
    fn hit_disk(&mut self, fault: Fault) {
        let machine = self.any_manager();
        let time = self.millis(1000..10_000);
        let now = self.now();
        let one = &mut self.machines[machine];
        let is_running = one.is_up
            && one.paused_until <= now
            && one.manager.as_ref().is_some_and(|manager| !manager.is_stopped);
        if fault == Fault::SlowDisk {
            one.has_slow_disk_until = now.after(time);
            self.note(format_args!("{machine} has a slow disk"));
        } else if is_running {
            self.note(format_args!("{machine} has a full disk"));
            self.stop_manager(machine, time);
        }
    }

    fn disturb(&mut self, machine: MachineId) {
        let now = self.now();
        let one = &mut self.machines[machine];
        one.disturbed_at = one.disturbed_at.max(now);
    }

    fn cut(&mut self, from: MachineId, to: MachineId, time: Duration) {
        let until = self.now().after(time);
        self.cuts.insert((from, to), until);
        for machine in [from, to] {
            let one = &mut self.machines[machine];
            one.disturbed_at = one.disturbed_at.max(until);
        }
    }

    /// A leader and fewer managers than a majority are cut off from the others, in one direction or both.
    fn isolate(&mut self) {
        let Some(leader) = self.leaders().next().map(|(id, _)| id) else { return };
        let managers = self.managers();
        let n_with = self.trouble_rng.random_range(0..(managers.len() / 2).max(1));
        let n_nodes_with = self.trouble_rng.random_range(0..=self.machines.len() - managers.len());
        let is_worker = |id: &MachineId| !managers.contains(id);
        let nodes = (0..self.machines.len()).filter(is_worker).take(n_nodes_with);
        let managers = managers.iter().copied().filter(|id| *id != leader).take(n_with);
        let inside: Vec<MachineId> = std::iter::once(leader).chain(managers).chain(nodes).collect();
        let time = self.millis(1000..12_000);
        let kind = self.trouble_rng.random_range(0..4);
        self.note(format_args!("{inside:?} are cut off for {time:?}, kind {kind}"));
        for outside in (0..self.machines.len()).filter(|id| !inside.contains(id)) {
            for one in inside.iter().copied() {
                if kind != 1 {
                    self.cut(one, outside, time);
                }
                if kind != 2 {
                    self.cut(outside, one, time);
                }
            }
        }
    }

    pub(crate) fn go_down(&mut self, machine: MachineId, time: Duration) {
        let one = &mut self.machines[machine];
        (one.is_up, one.life) = (false, one.life + 1);
        one.paused_until = crate::queue::START;
        if let Some(manager) = &mut one.manager {
            manager.leader = None;
        }
        self.disturb(machine);
        self.queue.after(time, Event::Start { machine });
    }

    fn kill(&mut self, machine: MachineId, time: Duration) {
        if self.machines[machine].is_up {
            self.note(format_args!("{machine} is killed"));
            self.go_down(machine, time);
        }
    }

    pub(crate) fn lose_power(&mut self, machine: MachineId) {
        if !self.machines[machine].is_up {
            return;
        }
        self.note(format_args!("{machine} loses power"));
        let time = self.millis(2000..20_000);
        self.go_down(machine, time);
        let one = &mut self.machines[machine];
        one.agent.lose_power(&mut one.rng);
    }

    /// A container ends, or its health check fails.
    fn harm(&mut self, fault: Fault) {
        let now = self.now();
        let is_able =
            |id: &MachineId| self.machines[*id].is_up && self.machines[*id].paused_until <= now;
        let able = (0..self.machines.len()).filter(is_able);
        let running: Vec<(MachineId, TaskId)> = able
            .flat_map(|id| {
                self.machines[id].agent.running.iter().map(move |task_id| (id, *task_id))
            })
            .collect();
        if running.is_empty() {
            return;
        }
        let (machine, task_id) = running[self.trouble_rng.random_range(0..running.len())];
        let is_failure = self.trouble_rng.random_bool(0.8);
        let one = &mut self.machines[machine];
        let clock = one.clock(now);
        if fault == Fault::Sicken {
            if one.agent.sicken(task_id) {
                self.note(format_args!("{task_id} is unhealthy"));
            }
        } else if let Some(state) = one.agent.exit(task_id, is_failure, (now, clock)) {
            self.note(format_args!("{task_id} ends: {state}"));
            self.step_task(machine, task_id);
        }
        self.flush(machine);
    }

    /// A user asks for something at random.
    pub(crate) fn draw_wish(&mut self) {
        if !self.is_rough {
            return;
        }
        // A node whose machine never heard that it had joined is nobody's.
        let is_somebody = |node_id: &NodeId| self.machine_of(*node_id).is_some();
        let nodes: Vec<NodeId> = self.ledger.nodes().keys().copied().filter(is_somebody).collect();
        let workers = self.ledger.nodes().values().filter(|node| node.manager_status.is_none());
        let workers: Vec<NodeId> = workers.map(|node| node.id).collect();
        let managers = self.ledger.nodes().values().filter(|node| node.manager_status.is_some());
        let managers: Vec<NodeId> = managers.map(|node| node.id).collect();
        let strangers: Vec<MachineId> = self.strangers();
        if !nodes.is_empty() {
            let rng = &mut self.client_rng;
            let wish = match strangers.first() {
                Some(machine) if rng.random_bool(0.2) => {
                    let is_manager = rng.random_bool(0.3);
                    let role = if is_manager { NodeRole::Manager } else { NodeRole::Worker };
                    Wish::Join(*machine, NodeId::random(rng), role)
                }
                _ => Wish::draw(rng, &nodes, &workers, &managers),
            };
            let is_removal = matches!(wish, Wish::RemoveNode(..));
            if !is_removal || !(0..self.machines.len()).any(|id| self.is_going_back(id)) {
                self.ask_somebody(wish);
            }
        }
        let delay = self.client_rng.random_range(50..1200);
        self.queue.after(Duration::from_millis(delay), Event::Wish);
    }

    /// Machines whose node was removed.
    pub(crate) fn strangers(&self) -> Vec<MachineId> {
        let is_stranger = |id: &MachineId| {
            self.ledger.version().index > 0
                && self.ledger.node(self.machines[*id].node_id).is_none()
        };
        (0..self.machines.len()).filter(is_stranger).collect()
    }

    /// A manager that runs is asked; none where none does.
    pub(crate) fn ask_somebody(&mut self, wish: Wish) -> Option<u64> {
        let is_able = |id: &MachineId| {
            let one = &self.machines[*id];
            one.is_up && one.manager.as_ref().is_some_and(|one| !one.is_stopped && one.is_member)
        };
        let able: Vec<MachineId> = self.managers().into_iter().filter(is_able).collect();
        if able.is_empty() {
            return None;
        }
        let machine = able[self.client_rng.random_range(0..able.len())];
        Some(self.begin_request(machine, wish))
    }

    /// Nothing goes wrong any more: what was broken is mended.
    pub(crate) fn calm(&mut self) {
        self.note(format_args!("calm"));
        self.is_rough = false;
        self.rates = crate::fault::Rates::NONE;
        self.cuts.clear();
        let now = self.now();
        for machine in 0..self.machines.len() {
            let one = &mut self.machines[machine];
            one.has_slow_disk_until = now;
            one.flaps_until = now;
            if !one.is_up {
                self.queue.after(Duration::from_millis(1), Event::Start { machine });
            }
        }
    }
}
