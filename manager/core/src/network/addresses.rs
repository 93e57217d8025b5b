//! Which address of a network is next.
//!
//! Tasks get addresses next-fit, so that one is used again as late as possible and nobody meets the
//! successor of the task that it knew. Services get theirs from a place that their id chooses:
//! managers that create two services at the same time seldom choose the same address, and an address
//! that is free again is not the next one given.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use skep_common::object::Subnet;
use skep_common::{Network, NetworkId, ServiceId};

use crate::store::{AddressOwner, State};

/// Where virtual addresses begin: among so many, so that those of a wide subnet stay short.
const VIRTUAL_WINDOW: u128 = 1 << 16;

/// Where the search for tasks' addresses goes on: the last one granted, by network and family.
pub(crate) type Cursors = BTreeMap<(NetworkId, bool), u128>;

/// Addresses of one subnet that tasks and services can have, but for those that are reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    first: u128,
    last: u128,
    is_v6: bool,
}

impl Span {
    /// `None` where the subnet's range leaves none.
    fn of(subnet: &Subnet) -> Option<Self> {
        let whole = Self::bounds(subnet.subnet);
        // The first is the subnet's name, in IPv4 the last is its broadcast address.
        let (first, last) = (whole.first + 1, whole.last - u128::from(!whole.is_v6));
        let range = subnet.ip_range.map_or(whole, Self::bounds);
        let (first, last) = (first.max(range.first), last.min(range.last));
        (first <= last).then_some(Self { first, last, is_v6: whole.is_v6 })
    }

    fn bounds(net: IpNet) -> Self {
        let (first, last) = (bits(net.network()), bits(net.broadcast()));
        Self { first, last, is_v6: matches!(net, IpNet::V6(_)) }
    }

    fn address(self, bits: u128) -> IpAddr {
        if self.is_v6 {
            return IpAddr::V6(Ipv6Addr::from_bits(bits));
        }
        let bits = u32::try_from(bits).expect("an IPv4 span has IPv4 addresses");
        IpAddr::V4(Ipv4Addr::from_bits(bits))
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The first free address from `first` to `last`: walks over those that are taken, not over the span.
fn gap(state: &State, network_id: NetworkId, span: Span, first: u128, last: u128) -> Option<u128> {
    if first > last {
        return None;
    }
    let mut wanted = first;
    let taken = state.network_addresses(network_id, span.address(first), span.address(last));
    for (address, _) in taken {
        if bits(address) != wanted {
            return Some(wanted);
        }
        wanted += 1;
    }
    (wanted <= last).then_some(wanted)
}

/// The first free address of the span from `start` on, and round again.
fn next(state: &State, network_id: NetworkId, span: Span, start: u128) -> Option<u128> {
    let start = if (span.first..=span.last).contains(&start) { start } else { span.first };
    gap(state, network_id, span, start, span.last)
        .or_else(|| gap(state, network_id, span, span.first, start.checked_sub(1)?))
}

/// The next address for a task; the cursor moves to it.
pub(super) fn for_task(
    state: &State,
    cursors: &mut Cursors,
    network_id: NetworkId,
    subnet: &Subnet,
) -> Option<IpAddr> {
    let span = Span::of(subnet)?;
    let cursor = cursors
        .entry((network_id, span.is_v6))
        .or_insert_with(|| newest(state, network_id, span).unwrap_or(span.first - 1));
    let found = next(state, network_id, span, *cursor + 1)?;
    *cursor = found;
    Some(span.address(found))
}

/// A leader without memory goes on after the address of the task that was made last.
fn newest(state: &State, network_id: NetworkId, span: Span) -> Option<u128> {
    let taken =
        state.network_addresses(network_id, span.address(span.first), span.address(span.last));
    let of_tasks = taken.filter_map(|(address, owner)| match owner {
        AddressOwner::Task(task_id) => Some((state.task(task_id)?.meta.created_at, bits(address))),
        AddressOwner::Network | AddressOwner::Service(_) => None,
    });
    of_tasks.max().map(|(_, address)| address)
}

/// A free address for a service.
pub(super) fn for_service(
    state: &State,
    network_id: NetworkId,
    subnet: &Subnet,
    service_id: ServiceId,
) -> Option<IpAddr> {
    let span = Span::of(subnet)?;
    let window = (span.last - span.first + 1).min(VIRTUAL_WINDOW);
    let start = span.first + service_id.0 % window;
    next(state, network_id, span, start).map(|found| span.address(found))
}

/// Why a network has no address: how many there are, all of them in use.
pub(super) fn exhausted(state: &State, network: &Network, subnet: &Subnet) -> String {
    let n_used = Span::of(subnet).map_or(0, |span| {
        let (first, last) = (span.address(span.first), span.address(span.last));
        let taken = state.network_addresses(network.id, first, last);
        taken.filter(|(_, owner)| *owner != AddressOwner::Network).count()
    });
    let name = &network.spec.name;
    format!("network {name} has no free address ({n_used} of {n_used} in use)")
}
