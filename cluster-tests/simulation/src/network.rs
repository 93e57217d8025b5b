//! What becomes of a message: lost, late, twice, out of order.
//!
//! The two streams of a session keep their order and lose nothing, or they are broken, which both ends
//! find out by silence; so do connections. All else travels by itself.

use std::time::Duration;

use rand::RngExt as _;
use skep_common::Timestamp;

use crate::fault::Fault;
use crate::message::{MachineId, Message};
use crate::world::{Event, Timer, World};

impl World {
    /// Whether a message gets from one machine to another now.
    pub(crate) fn is_reachable(&self, from: MachineId, to: MachineId) -> bool {
        let now = self.now();
        from == to || self.cuts.get(&(from, to)).is_none_or(|until| *until <= now)
    }

    pub(crate) fn send(&mut self, from: MachineId, to: MachineId, message: Message) {
        let rates = self.rates;
        let is_local = from == to;
        let rng = &mut self.network_rng;
        let micros = if is_local { 10..60 } else { 100..3000 };
        let mut delay = Duration::from_micros(rng.random_range(micros));
        let is_lost = !is_local && rates.hits(Fault::Loss, rng);
        if !is_local && rates.hits(Fault::Delay, rng) {
            delay += Duration::from_millis(rng.random_range(10..2000));
        }
        let is_report = matches!(message, Message::Report { .. });
        if is_report && rates.hits(Fault::LateReport, rng) {
            delay += Duration::from_millis(rng.random_range(500..5000));
        }
        let is_twice = may_come_twice(&message) && rates.hits(Fault::Duplicate, rng);
        let overtakes = may_be_overtaken(&message) && rates.hits(Fault::Reorder, rng);
        if is_lost || !self.is_reachable(from, to) {
            if let Some(session) = message.stream() {
                self.break_session(session, from, to);
            }
            return;
        }
        let mut at = self.now().after(delay);
        if let Some(session) = message.stream() {
            let last = self.streams.entry((session, to)).or_default();
            let earliest = Timestamp(last.0 + 1);
            at = at.max(earliest);
            if !overtakes {
                *last = at;
            }
        }
        if overtakes {
            let millis = self.network_rng.random_range(1..200);
            at = at.after(Duration::from_millis(millis));
        }
        if is_twice {
            self.queue.at(at, Event::Deliver { from, to, message: message.clone() });
        }
        self.queue.at(at, Event::Deliver { from, to, message });
    }
}

impl World {
    /// A connection lost something for good: each end finds out when nothing answers on it any more.
    fn break_session(&mut self, session: u64, one: MachineId, other: MachineId) {
        if self.broken.insert(session) {
            for (machine, peer) in [(one, other), (other, one)] {
                let delay = Duration::from_millis(self.network_rng.random_range(500..4000));
                self.timer(machine, delay, Timer::Broken { session, peer });
            }
        }
    }
}

/// Calls are made once; what a log or a stream guards against may come twice.
fn may_come_twice(message: &Message) -> bool {
    matches!(
        message,
        Message::Raft { .. }
            | Message::Report { .. }
            | Message::Beat { .. }
            | Message::MeshApplied { .. }
            | Message::Assignments { .. }
    )
}

/// What follows may come before it. Tables are numbered and not chained: they keep their order.
fn may_be_overtaken(message: &Message) -> bool {
    match message {
        Message::Raft { .. } | Message::Report { .. } => true,
        Message::Assignments { what, .. } => {
            what.table.is_none() && what.tasks.as_ref().is_some_and(|tasks| tasks.applies_to > 0)
        }
        _ => false,
    }
}
