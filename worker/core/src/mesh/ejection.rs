//! Which backends a node leaves out because it saw that they refuse or do not answer.
//!
//! Inputs are observations with their times: when each backend was last asked for a connection, when it
//! last answered, and how the node's own attempts to connect ended. The output is what the ports of the
//! managers' table go without ([`Ejections::left_out`]). Why it is so: `docs/decisions/0021`.
//!
//! ```text
//!           asked, no answer          no answer for PATIENCE       refused, or silent
//!  trusted ─────────────────► asked ──────────────────────► tried ──────────────────► out
//!     ▲ ◄──────answered────────┘                              │                        │
//!     └───────────────────────────accepted────────────────────┴──accepted, tried again─┘
//! ```
//!
//! # Invariants
//!
//! - Nothing is left out but by an attempt of the node's own that failed.
//! - A port never loses its last backend: where all are out, all are kept.
//! - A backend that the table replaces, or names no longer, is trusted again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::{Endpoint, MeshTable, Objects, PortKey, Protocol, of_twin};

/// How long a backend may take to answer before the node tries it itself: many times what a network
/// within a swarm takes.
pub const PATIENCE: Duration = Duration::from_millis(50);

/// What two readings of the kernel's clock may differ by: it counts in ticks of up to 10 ms.
const TICK: Duration = Duration::from_millis(10);

/// How long a backend that accepted the node's own attempt is not tried again, whoever it does not answer.
const TRUST: Duration = Duration::from_millis(500);

/// How long after an attempt a backend that is out is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// How an attempt to connect to a backend ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It accepted.
    Accepted,
    /// It, or its network, said no.
    Failed(Reason),
    /// The node could not try.
    Unknown,
}

/// Why a backend is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It refuses connections.
    Refused,
    /// It does not answer.
    Silent,
}

/// What an operator should know about a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A backend gets no connections of the port any more.
    LeftOut(PortKey, Endpoint, Reason),
    /// A backend gets its turn again.
    TakenBack(PortKey, Endpoint),
    /// No backend answers, so all get their turn.
    NoneAnswers(PortKey),
}

/// When backends were last asked or last answered: readings of a clock that never goes back.
pub type Times = BTreeMap<Endpoint, Duration>;

/// What a node knows about the backends of TCP ports that have several.
#[derive(Debug, Clone, Default)]
pub struct Ejections {
    ports: BTreeMap<PortKey, Vec<Endpoint>>,
    backends: BTreeMap<Endpoint, Watched>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Watched {
    task_id: String,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing is said against it; what it was asked up to `until` is not judged.
    Trusted { until: Duration },
    /// It was asked and has not answered since.
    Asked { at: Duration },
    /// The node tries to connect.
    Tried,
    /// Nothing is sent there. The node tries again at `retry_at`; it does so now where that is `None`.
    Out { reason: Reason, retry_at: Option<Duration> },
}

impl Ejections {
    /// Takes over a table, and the ports that this node serves by it, of both IP versions.
    pub fn learn(&mut self, table: &MeshTable, served: [&Objects; 2]) {
        let tasks: BTreeMap<(Ipv4Addr, u16), &str> = table
            .ports
            .iter()
            .flat_map(|port| &port.backends)
            .map(|backend| ((backend.address, backend.target_port), backend.task_id.as_str()))
            .collect();
        let task_of = |endpoint: &Endpoint| {
            let address = match endpoint.address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(address) => of_twin(address),
            };
            let task = address.and_then(|address| tasks.get(&(address, endpoint.port)));
            task.copied().unwrap_or_default()
        };
        self.ports.clear();
        for (key, endpoints) in served.into_iter().flat_map(|objects| &objects.ports) {
            // Without another one there is nothing to decide.
            if key.protocol == Protocol::Tcp && endpoints.len() > 1 {
                self.ports.entry(*key).or_default().extend(endpoints);
            }
        }
        let mut before = std::mem::take(&mut self.backends);
        for endpoint in self.ports.values().flatten() {
            let task_id = task_of(endpoint);
            let known = before.remove(endpoint).filter(|known| known.task_id == task_id);
            self.backends.entry(*endpoint).or_insert_with(|| {
                let state = State::Trusted { until: Duration::ZERO };
                known.unwrap_or_else(|| Watched { task_id: task_id.to_owned(), state })
            });
        }
    }

    /// Whether no port has backends to choose from: nothing needs to be observed.
    pub fn is_idle(&self) -> bool {
        self.ports.is_empty()
    }

    /// The task behind a backend.
    pub fn task_id(&self, endpoint: &Endpoint) -> &str {
        self.backends.get(endpoint).map_or("", |watched| watched.task_id.as_str())
    }

    /// Takes over what the kernel saw; returns which backends the node is to try now. Each attempt's end
    /// is to be told to [`Self::conclude`].
    pub fn observe(&mut self, asked: &Times, answered: &Times, now: Duration) -> Vec<Endpoint> {
        let mut to_try = Vec::new();
        for (endpoint, watched) in &mut self.backends {
            let is_answered_since =
                |at| answered.get(endpoint).is_some_and(|answered| *answered + TICK >= at);
            if let State::Trusted { until } = watched.state
                && let Some(at) = asked.get(endpoint).copied()
                && at > until
            {
                watched.state = State::Asked { at };
            }
            match watched.state {
                State::Asked { at } if is_answered_since(at) => {
                    watched.state = State::Trusted { until: at };
                }
                State::Asked { at } if now >= at + PATIENCE => {
                    watched.state = State::Tried;
                    to_try.push(*endpoint);
                }
                State::Out { reason, retry_at: Some(at) } if now >= at => {
                    watched.state = State::Out { reason, retry_at: None };
                    to_try.push(*endpoint);
                }
                State::Trusted { .. } | State::Asked { .. } | State::Tried | State::Out { .. } => {}
            }
        }
        to_try
    }

    /// Takes over how an attempt ended.
    pub fn conclude(&mut self, endpoint: &Endpoint, outcome: Outcome, now: Duration) {
        // Who is gone, or is another one by now, was not tried.
        let Some(watched) = self.backends.get_mut(endpoint) else { return };
        watched.state = match (watched.state, outcome) {
            (State::Tried, Outcome::Accepted | Outcome::Unknown) => {
                State::Trusted { until: now + TRUST }
            }
            (State::Out { retry_at: None, .. }, Outcome::Accepted) => State::Trusted { until: now },
            (State::Tried | State::Out { retry_at: None, .. }, Outcome::Failed(reason)) => {
                State::Out { reason, retry_at: Some(now + PAUSE) }
            }
            (State::Out { reason, retry_at: None }, Outcome::Unknown) => {
                State::Out { reason, retry_at: Some(now + PAUSE) }
            }
            (state, _) => state,
        };
    }

    /// What ports go without. Ports of both IP versions have the same keys and other backends.
    pub fn left_out(&self) -> BTreeSet<(PortKey, Endpoint)> {
        let of_ports = self.ports.iter().flat_map(|(key, endpoints)| {
            [true, false].into_iter().flat_map(move |is_ipv4| {
                let of_version = endpoints.iter().filter(move |e| e.address.is_ipv4() == is_ipv4);
                let is_out = |endpoint: &&Endpoint| self.reason(endpoint).is_some();
                let is_any_left = !of_version.clone().all(|endpoint| is_out(&endpoint));
                let out = of_version.filter(move |endpoint| is_any_left && is_out(endpoint));
                out.map(|endpoint| (*key, *endpoint))
            })
        });
        of_ports.collect()
    }

    /// What changed for ports, where `before` was left out and `after` is now.
    pub fn changes(
        &self,
        before: &BTreeSet<(PortKey, Endpoint)>,
        after: &BTreeSet<(PortKey, Endpoint)>,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        for (key, endpoint) in after.difference(before) {
            let reason = self.reason(endpoint);
            changes.extend(reason.map(|reason| Change::LeftOut(*key, *endpoint, reason)));
        }
        for (key, endpoint) in before.difference(after) {
            match self.reason(endpoint) {
                Some(_) => changes.push(Change::NoneAnswers(*key)),
                None if self.backends.contains_key(endpoint) => {
                    changes.push(Change::TakenBack(*key, *endpoint));
                }
                // The table names it no longer.
                None => {}
            }
        }
        changes.dedup();
        changes
    }

    fn reason(&self, endpoint: &Endpoint) -> Option<Reason> {
        match self.backends.get(endpoint)?.state {
            State::Out { reason, .. } => Some(reason),
            State::Trusted { .. } | State::Asked { .. } | State::Tried => None,
        }
    }
}

/// Takes what is left out from the ports that a table gives.
pub fn leave_out(
    ports: &mut BTreeMap<PortKey, Vec<Endpoint>>,
    left_out: &BTreeSet<(PortKey, Endpoint)>,
) {
    for (key, endpoints) in ports {
        endpoints.retain(|endpoint| !left_out.contains(&(*key, *endpoint)));
    }
}
