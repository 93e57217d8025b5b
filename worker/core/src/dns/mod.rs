//! Names in containers: what each question of a container is answered with.
//!
//! [`Request::read`] takes a message apart, [`answer`] decides by the container's [`Scope`] and the
//! [`Directory`] of networks, [`Request::reply`] writes the message that says so. A shell has the sockets,
//! and asks other resolvers where the answer is [`Answer::Forward`].
//!
//! On each network of the container these names mean, with and without `.<network>` behind them:
//!
//! | name | addresses |
//! |---|---|
//! | a service's name and aliases | its virtual addresses; where it has none, its serving tasks' |
//! | `tasks.` before one of these | its serving tasks' |
//! | `service.slot.task`, the task's short id | the task's own |
//!
//! # Invariants
//!
//! - A name that exists is never said not to: without an address of the family that is asked for, the
//!   answer is empty.
//! - Names of networks that the container is not on mean nothing.
//! - Addresses of the container's networks are never asked of other resolvers.
//!
//! # Sources
//!
//! RFC 1035, RFC 6891 (EDNS); moby `libnetwork/resolver.go` for names and for what is not forwarded.
//! Differs from moby: answers of tasks are not to be cached, those of services for seconds only, since
//! addresses pass to other tasks and services.

mod message;
mod names;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use skep_common::NetworkId;

pub use message::{Received, Request, Transport, answers, cut, is_failure, with_id};
pub use names::Directory;

/// How long a virtual address may be remembered: a service that is removed and made again has others.
const VIRTUAL_TTL_SECONDS: u32 = 5;

/// Whose questions are answered: what a container may know, and whom else it asks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Scope {
    /// The overlay networks that the container is on, in its order: the first that has a name decides.
    pub networks: Vec<NetworkId>,
    /// Resolvers that the service names; empty is the host's.
    pub nameservers: Vec<IpAddr>,
    /// Whether a name without a dot is complete. Where the service sets `ndots`, the container asks for
    /// the domains that it searches itself.
    pub dotless_is_local: bool,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// IPv4 addresses of a name.
    A,
    /// IPv6 addresses of a name.
    Aaaa,
    /// The name of an address.
    Ptr(IpAddr),
    /// Anything else, which no name of ours has.
    Other,
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    /// The name in lower case, without its final dot.
    pub name: String,
    /// What is asked for.
    pub kind: Kind,
}

/// What is to be done about a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// These addresses, in this order; none where the name has none of this kind.
    Addresses {
        /// The addresses, all of one family.
        addresses: Vec<IpAddr>,
        /// How long they may be remembered, in seconds.
        ttl: u32,
    },
    /// This name.
    Name(String),
    /// There is no such name.
    Unknown,
    /// Nobody in here knows: others may.
    Forward,
    /// Nobody in here knows, and others must not be asked.
    Refuse,
}

/// The answer to a question from a container of `scope`. `turn` chooses the address that comes first; give
/// a random number, since many clients ask for both families at once and take the first.
pub fn answer(question: &Question, scope: &Scope, directory: &Directory, turn: u32) -> Answer {
    let networks = || scope.networks.iter().filter_map(|id| directory.network(*id));
    if let Kind::Ptr(address) = question.kind {
        if let Some(name) = networks().find_map(|network| network.name_of(address)) {
            return Answer::Name(name.to_owned());
        }
        if networks().any(|network| network.contains(address)) {
            return Answer::Unknown;
        }
        return foreign(question, scope, directory);
    }
    let mut is_known = false;
    for network in networks() {
        let Some(meaning) = network.find(&question.name) else { continue };
        is_known = true;
        let is_asked = |address: &&IpAddr| match question.kind {
            Kind::A => address.is_ipv4(),
            Kind::Aaaa => address.is_ipv6(),
            Kind::Ptr(_) | Kind::Other => false,
        };
        let mut addresses: Vec<IpAddr> =
            meaning.addresses.iter().filter(is_asked).copied().collect();
        if !addresses.is_empty() {
            let n_addresses = addresses.len();
            addresses.rotate_left(turn as usize % n_addresses);
            let ttl = if meaning.is_virtual { VIRTUAL_TTL_SECONDS } else { 0 };
            return Answer::Addresses { addresses, ttl };
        }
    }
    if is_known {
        return Answer::Addresses { addresses: Vec::new(), ttl: 0 };
    }
    foreign(question, scope, directory)
}

/// What becomes of a question that no network of the container answers.
fn foreign(question: &Question, scope: &Scope, directory: &Directory) -> Answer {
    let mut networks = scope.networks.iter().filter_map(|id| directory.network(*id)).peekable();
    let is_address = matches!(question.kind, Kind::A | Kind::Aaaa);
    if scope.dotless_is_local && is_address && !question.name.contains('.') {
        return Answer::Unknown;
    }
    if networks.peek().is_some() && networks.all(|network| network.is_internal()) {
        return Answer::Refuse;
    }
    Answer::Forward
}
