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
//! | `service.slot.task`, the task's short id, its host name | the task's own |
//! | `service.slot` | of the slot's task that serves; where none does, of those that have not ended |
//!
//! `_port._protocol.` before a service's name or alias asks where each serving task answers (SRV): a port
//! by number is that port, whether it is published or not; one by name is the published port of that name.
//!
//! # Invariants
//!
//! - A name that exists is never said not to: without an address of the family that is asked for, the
//!   answer is empty.
//! - Names of networks that the container is not on mean nothing.
//! - Addresses of the container's networks are never asked of other resolvers, whatever is asked of them.
//!
//! # Sources
//!
//! RFC 1035, RFC 2782 (SRV), RFC 6891 (EDNS); moby `libnetwork/resolver.go` for names and for what is not forwarded.
//! Differs from moby: answers of tasks are not to be cached, those of services for seconds only, since
//! addresses pass to other tasks and services.

mod message;
mod names;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use ipnet::IpNet;
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
    Ptr,
    /// Where a service answers.
    Srv,
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
    /// What addresses the name stands for, where it is one of `in-addr.arpa` or `ip6.arpa`.
    pub reversed: Option<IpNet>,
}

/// A task that answers on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Its own name.
    pub target: String,
    /// The port.
    pub port: u16,
    /// Its addresses, so that nobody need ask for them.
    pub addresses: Vec<IpAddr>,
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
    /// These places, in this order; none where nobody serves.
    Locations(Vec<Location>),
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
    if let Some(net) = question.reversed
        && let Some(answer) = reverse(question.kind, net, scope, directory)
    {
        return answer;
    }
    let mut is_known = false;
    for network in directory.of(scope) {
        if let Some(found) = network.located(&question.name) {
            return match (found, question.kind) {
                (None, _) => Answer::Unknown,
                (Some(places), Kind::Srv) => Answer::Locations(rotated(places, turn)),
                (Some(_), Kind::A | Kind::Aaaa | Kind::Ptr | Kind::Other) => nothing(),
            };
        }
        let Some(meaning) = network.find(&question.name) else { continue };
        is_known = true;
        let is_asked = |address: &&IpAddr| match question.kind {
            Kind::A => address.is_ipv4(),
            Kind::Aaaa => address.is_ipv6(),
            Kind::Ptr | Kind::Srv | Kind::Other => false,
        };
        let addresses: Vec<IpAddr> = meaning.addresses.iter().filter(is_asked).copied().collect();
        if !addresses.is_empty() {
            let ttl = if meaning.is_virtual { VIRTUAL_TTL_SECONDS } else { 0 };
            return Answer::Addresses { addresses: rotated(addresses, turn), ttl };
        }
    }
    if is_known { nothing() } else { foreign(question, scope, directory) }
}

/// What is said of a name that stands for addresses; `None` where they are no network's of the container.
fn reverse(kind: Kind, net: IpNet, scope: &Scope, directory: &Directory) -> Option<Answer> {
    let networks = || directory.of(scope);
    if net.prefix_len() < net.max_prefix_len() {
        // It names nobody, but names below it do.
        return networks().any(|network| network.contains(net)).then(nothing);
    }
    let Some(name) = networks().find_map(|network| network.name_of(net.addr())) else {
        return networks().any(|network| network.contains(net)).then_some(Answer::Unknown);
    };
    Some(if kind == Kind::Ptr { Answer::Name(name.to_owned()) } else { nothing() })
}

/// What is said where a name exists and has nothing of what is asked for.
fn nothing() -> Answer {
    Answer::Addresses { addresses: Vec::new(), ttl: 0 }
}

fn rotated<T>(mut list: Vec<T>, turn: u32) -> Vec<T> {
    if !list.is_empty() {
        let n_turns = turn as usize % list.len();
        list.rotate_left(n_turns);
    }
    list
}

/// What becomes of a question that no network of the container answers.
fn foreign(question: &Question, scope: &Scope, directory: &Directory) -> Answer {
    let mut networks = directory.of(scope).peekable();
    let is_address = matches!(question.kind, Kind::A | Kind::Aaaa);
    if scope.dotless_is_local && is_address && !question.name.contains('.') {
        return Answer::Unknown;
    }
    if networks.peek().is_some() && networks.all(|network| network.is_internal()) {
        return Answer::Refuse;
    }
    Answer::Forward
}
