//! Forwarding and neighbour entries of an interface: observes them, and changes them.

use std::net::IpAddr;

use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use skep_worker_core::mesh::Mac;
use skep_worker_core::network::{Reach, ReachOp};

use crate::net::Error;
use crate::net::neighbour::{entries, forwarding, neighbour};
use crate::net::rtnetlink::{Mode, RouteChannel};

/// The entries of the interface with that index.
pub(super) fn observe(channel: &mut RouteChannel, index: u32) -> Result<Reach, Error> {
    let mut reach = Reach::default();
    for family in [AddressFamily::Inet, AddressFamily::Inet6, AddressFamily::Bridge] {
        for (mac, address) in entries(channel, "list neighbours of a network", index, family)? {
            match address {
                IpAddr::V4(underlay) if family == AddressFamily::Bridge => {
                    reach.forwarding.insert(mac, underlay);
                }
                address if family != AddressFamily::Bridge => {
                    reach.neighbours.insert(address, mac);
                }
                _ => {} // The tunnels of this program end at addresses of IPv4.
            }
        }
    }
    Ok(reach)
}

/// Carries out operations in their order, each on the interface with the index beside it. A failure keeps no
/// other from being carried out.
pub(super) fn change(channel: &mut RouteChannel, ops: &[(u32, ReachOp)]) -> Result<(), Error> {
    let message = |(index, op): &(u32, ReachOp)| {
        tracing::debug!(%op, "network");
        match *op {
            ReachOp::SetForwarding(mac, underlay) => {
                let message = forwarding(*index, mac, Some(underlay));
                (Some(Mode::Replace), RouteNetlinkMessage::NewNeighbour(message))
            }
            ReachOp::SetNeighbour(address, mac) => {
                let message = neighbour(*index, address, Some(mac));
                (Some(Mode::Replace), RouteNetlinkMessage::NewNeighbour(message))
            }
            ReachOp::DeleteNeighbour(address) => {
                let message = neighbour(*index, address, None);
                (None, RouteNetlinkMessage::DelNeighbour(message))
            }
            ReachOp::DeleteForwarding(mac) => {
                let message = forwarding(*index, mac, None);
                (None, RouteNetlinkMessage::DelNeighbour(message))
            }
        }
    };
    let changes: Vec<_> = ops.iter().map(message).collect();
    channel.change_all(&changes, |number| ops[number].1.to_string())
}

/// Has the bridge know which of its ports leads to an Ethernet address, whatever it learned before.
pub(super) fn set_port(channel: &mut RouteChannel, port: u32, mac: Mac) -> Result<(), Error> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    message.header.state = NeighbourState::Noarp;
    message.header.flags = NeighbourFlags::Controller;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    let action = format!("set the bridge's port for {mac}");
    channel.change(&action, Mode::Replace, RouteNetlinkMessage::NewNeighbour(message))
}
