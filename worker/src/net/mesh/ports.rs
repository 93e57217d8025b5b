//! The published ports that this node holds, and what stands in the way of others.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use skep_worker_core::mesh::{MeshTable, PortKey, Protocol, PublishedPort, Relay};

use super::hold::{Hold, Listeners, hold};
use super::program::{Program, holder_after};

/// Something about a published port that its service's users should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Another program of this node has the port, so the mesh leaves it alone here. Remedy: stop
    /// that program; the next table, or the same one again, takes the port.
    PortHeld {
        /// The service that publishes the port.
        service_id: String,
        /// The port.
        port: PortKey,
        /// The program, where the kernel shows it.
        program: Option<Program>,
    },
    /// The port could not be taken for another reason, and is not served here. On a kernel without SCTP
    /// a port of it is served all the same to clients elsewhere, by tasks of nodes that have it.
    PortFailed {
        /// The service that publishes the port.
        service_id: String,
        /// The port.
        port: PortKey,
        /// What the kernel said.
        reason: String,
    },
    /// The balancer of this node carries no such protocol: its clients are not served here, and tasks of this
    /// node get none of other nodes. Remedy: keep tasks and clients of the port to other nodes.
    NotCarried {
        /// The service that publishes the port.
        service_id: String,
        /// The port.
        port: PortKey,
    },
}

impl Condition {
    /// The port.
    pub fn port(&self) -> PortKey {
        match self {
            Self::PortHeld { port, .. }
            | Self::PortFailed { port, .. }
            | Self::NotCarried { port, .. } => *port,
        }
    }

    /// The service that publishes it.
    pub fn service_id(&self) -> &str {
        match self {
            Self::PortHeld { service_id, .. }
            | Self::PortFailed { service_id, .. }
            | Self::NotCarried { service_id, .. } => service_id,
        }
    }

    /// What is the matter with the port, and what to do: the end of a sentence about it.
    pub fn advice(&self) -> String {
        match self {
            Self::PortHeld { .. } => {
                format!("{}: stop it or publish another port", self.reason())
            }
            Self::PortFailed { .. } => self.reason(),
            Self::NotCarried { .. } => {
                format!("{}: keep the port's tasks and clients to other nodes", self.reason())
            }
        }
    }

    fn reason(&self) -> String {
        match self {
            Self::PortHeld { program: Some(program), .. } => format!("is held by {program}"),
            Self::PortHeld { program: None, .. } => "is held by another program".to_owned(),
            Self::PortFailed { reason, .. } => format!("could not be taken: {reason}"),
            Self::NotCarried { .. } => {
                "is not served, since this node balances TCP alone, in user space".to_owned()
            }
        }
    }
}

impl std::fmt::Display for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "port {} {}", self.port(), self.reason())
    }
}

/// What changed for the listeners, which live on the runtime.
#[derive(Debug, Default)]
pub(super) struct ListenerChanges {
    /// Ports that are served from now on.
    pub(super) serve: Vec<(PortKey, Listeners)>,
    /// What the daemon balances ports to.
    pub(super) balance: BTreeMap<PortKey, Relay>,
    /// Ports that passed from the daemon to the rules.
    pub(super) by_rules: Vec<PortKey>,
    /// What the rules balance ports to that passed to them before.
    pub(super) in_rules: BTreeMap<PortKey, Relay>,
    /// Ports that are not published any more.
    pub(super) withdraw: Vec<PortKey>,
}

/// Takes over the changes, in the calling thread.
pub(super) type Follow<'a> = &'a mut dyn FnMut(ListenerChanges);

/// The ports that are held, and those that could not be.
#[derive(Debug)]
pub(super) struct Ports {
    /// Whether every IPv6 address of the node is listened on.
    all_ipv6: bool,
    holds: BTreeMap<PortKey, Hold>,
    /// Of the last table.
    conditions: Vec<Condition>,
}

impl Ports {
    /// None yet; see [`hold`] for `all_ipv6`.
    pub(super) fn new(all_ipv6: bool) -> Self {
        Self { all_ipv6, holds: BTreeMap::new(), conditions: Vec::new() }
    }

    /// Holds a port again that an earlier daemon served.
    pub(super) fn hold_again(&mut self, key: PortKey, changes: &mut ListenerChanges) {
        match hold(key, self.all_ipv6) {
            Ok((hold, listeners)) => {
                self.holds.insert(key, hold);
                changes.serve.push((key, listeners));
            }
            Err(error) if is_without_sctp(key, &error) => {}
            Err(error) => tracing::warn!(port = %key, %error, "failed to hold the port again"),
        }
    }

    /// Holds every port of these that is not held yet; returns those that others have, of which some are to be
    /// served nevertheless.
    pub(super) fn take<'a>(
        &mut self,
        ports: impl Iterator<Item = &'a PublishedPort>,
        changes: &mut ListenerChanges,
    ) -> Vec<Refused> {
        let mut refusals = Vec::new();
        for published in ports {
            let key = PortKey { protocol: published.protocol, port: published.published };
            if self.holds.contains_key(&key) {
                continue;
            }
            match hold(key, self.all_ipv6) {
                Ok((hold, listeners)) => {
                    self.holds.insert(key, hold);
                    changes.serve.push((key, listeners));
                }
                Err(error) => {
                    let known = self.conditions.iter().find(|known| known.port() == key);
                    refusals.push(Refused {
                        // A port that no program could take is served by the rules alone.
                        is_served: is_without_sctp(key, &error),
                        condition: refused(published.service_id.clone(), key, &error, known),
                    });
                }
            }
        }
        refusals
    }

    /// Notes what stands in the way of the last table's ports.
    pub(super) fn note(&mut self, conditions: &[Condition]) {
        self.conditions = conditions.to_vec();
    }

    /// Lets go of all ports but those of the table; returns them.
    pub(super) fn keep(&mut self, table: &MeshTable) -> Vec<PortKey> {
        let key = |port: &PublishedPort| PortKey { protocol: port.protocol, port: port.published };
        let published: BTreeSet<PortKey> = table.ports.iter().map(key).collect();
        let gone = self.holds.keys().filter(|key| !published.contains(key));
        let gone = gone.copied().collect();
        self.holds.retain(|key, _| published.contains(key));
        gone
    }

    /// Whether a port that could not be taken is free, or another program has it: the table must be applied
    /// again. Costs nothing where there are none.
    pub(super) fn has_other_conditions(&self) -> bool {
        self.conditions.iter().any(|condition| match condition {
            Condition::PortHeld { program: Some(program), .. } => !program.holds_still(),
            Condition::PortHeld { .. } | Condition::PortFailed { .. } => {
                hold(condition.port(), self.all_ipv6).is_ok()
            }
            Condition::NotCarried { .. } => false,
        })
    }

    /// Lets go of all ports.
    pub(super) fn release(&mut self) {
        self.holds.clear();
    }
}

/// A port that could not be taken.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) condition: Condition,
    /// Whether it is served all the same.
    pub(super) is_served: bool,
}

fn is_without_sctp(port: PortKey, error: &io::Error) -> bool {
    port.protocol == Protocol::Sctp && error.kind() == io::ErrorKind::Unsupported
}

/// Why a port could not be taken; `known` is what was said of it before.
fn refused(
    service_id: String,
    port: PortKey,
    error: &io::Error,
    known: Option<&Condition>,
) -> Condition {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            let known = match known {
                Some(Condition::PortHeld { program, .. }) => program.as_ref(),
                _ => None,
            };
            Condition::PortHeld { service_id, port, program: holder_after(port, known) }
        }
        _ if is_without_sctp(port, error) => {
            let reason = "this kernel has no SCTP (CONFIG_IP_SCTP; try: modprobe sctp)".to_owned();
            Condition::PortFailed { service_id, port, reason }
        }
        _ => Condition::PortFailed { service_id, port, reason: error.to_string() },
    }
}
