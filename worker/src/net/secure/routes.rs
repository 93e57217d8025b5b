//! Routes to the addresses within tunnels: by WireGuard, and by nothing else.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::net::Error;
use crate::net::rtnetlink::{Mode, ROUTE_PROTOCOL, RouteChannel};

/// Marks routes as ours.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(ROUTE_PROTOCOL);

/// All addresses within tunnels.
const ALL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 15);

/// The last to be looked at: whoever has a route of his own to these addresses keeps it.
const LAST: u32 = u32::MAX;

/// Has exactly these addresses reached by an interface, from `source`.
pub(super) fn converge(
    host: &mut RouteChannel,
    interface: u32,
    source: Ipv4Addr,
    wanted: &BTreeSet<Ipv4Addr>,
) -> Result<(), Error> {
    let mut present = BTreeSet::new();
    for route in ours(host)? {
        let (Some(to), Some(by)) = (destination(&route), output(&route)) else { continue };
        if by != interface {
            continue;
        }
        if wanted.contains(&to) && has_source(&route, source) {
            present.insert(to);
        } else if !wanted.contains(&to) {
            host.delete("delete a route of a tunnel", RouteNetlinkMessage::DelRoute(route))?;
        }
    }
    for to in wanted.difference(&present) {
        let mut message = message(Ipv4Net::from(*to), RouteType::Unicast);
        message.header.scope = RouteScope::Link;
        message.attributes.push(RouteAttribute::Oif(interface));
        message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet(source)));
        let action = format!("route {to} by WireGuard");
        // It takes the place of one by another slot's interface.
        host.change(&action, Mode::Replace, RouteNetlinkMessage::NewRoute(message))?;
    }
    Ok(())
}

/// Has the host refuse addresses within tunnels that no interface takes: they must not follow the default
/// route.
pub(super) fn refuse_others(host: &mut RouteChannel) -> Result<(), Error> {
    let message = RouteNetlinkMessage::NewRoute(refusal());
    host.change("refuse addresses within tunnels", Mode::Replace, message)
}

/// Takes that back; fine if it is not there.
pub(super) fn refuse_no_others(host: &mut RouteChannel) -> Result<(), Error> {
    let message = RouteNetlinkMessage::DelRoute(refusal());
    host.delete("refuse addresses within tunnels no longer", message)
}

fn refusal() -> RouteMessage {
    let mut message = message(ALL, RouteType::Unreachable);
    message.attributes.push(RouteAttribute::Priority(LAST));
    message
}

fn message(to: Ipv4Net, kind: RouteType) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = to.prefix_len();
    message.header.protocol = PROTOCOL;
    message.header.kind = kind;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(to.network())));
    message
}

fn ours(host: &mut RouteChannel) -> Result<Vec<RouteMessage>, Error> {
    let mut query = RouteMessage::default();
    query.header.address_family = AddressFamily::Inet;
    let query = RouteNetlinkMessage::GetRoute(query);
    let found = host.dump("list routes of tunnels", query)?.into_iter();
    let routes = found.filter_map(|message| match message {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    });
    let is_ours = |route: &RouteMessage| {
        route.header.protocol == PROTOCOL && destination(route).is_some_and(|to| ALL.contains(&to))
    };
    Ok(routes.filter(is_ours).collect())
}

fn destination(route: &RouteMessage) -> Option<Ipv4Addr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })
}

fn output(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn has_source(route: &RouteMessage, source: Ipv4Addr) -> bool {
    route.attributes.contains(&RouteAttribute::PrefSource(RouteAddress::Inet(source)))
}
