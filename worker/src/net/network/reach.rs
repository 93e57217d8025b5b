//! Forwarding and neighbour entries of a network's tunnel: observes them, and changes them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use skep_worker_core::mesh::Mac;
use skep_worker_core::network::{Reach, ReachOp};

use crate::net::Error;
use crate::net::rtnetlink::{Mode, RouteChannel};

/// The entries of the tunnel with that index.
pub(super) fn observe(channel: &mut RouteChannel, tunnel: u32) -> Result<Reach, Error> {
    let mut reach = Reach::default();
    for family in [AddressFamily::Inet, AddressFamily::Inet6, AddressFamily::Bridge] {
        let mut query = NeighbourMessage::default();
        query.header.family = family;
        let query = RouteNetlinkMessage::GetNeighbour(query);
        for message in channel.dump("list neighbours of a network", query)? {
            let RouteNetlinkMessage::NewNeighbour(entry) = message else { continue };
            let is_permanent = entry.header.state == NeighbourState::Permanent;
            if entry.header.ifindex != tunnel || !is_permanent {
                continue;
            }
            let (mut mac, mut address) = (None, None);
            for attribute in &entry.attributes {
                if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
                    mac = bytes.as_slice().try_into().ok().map(Mac);
                } else if let NeighbourAttribute::Destination(found) = attribute {
                    address = read_address(found);
                }
            }
            match (mac, address) {
                (Some(mac), Some(IpAddr::V4(underlay))) if family == AddressFamily::Bridge => {
                    reach.forwarding.insert(mac, underlay);
                }
                (Some(mac), Some(address)) if family != AddressFamily::Bridge => {
                    reach.neighbours.insert(address, mac);
                }
                _ => {} // The bridge's own entry of its port.
            }
        }
    }
    Ok(reach)
}

/// Carries out one operation.
pub(super) fn change(channel: &mut RouteChannel, tunnel: u32, op: ReachOp) -> Result<(), Error> {
    let action = op.to_string();
    tracing::debug!(%op, "network");
    match op {
        ReachOp::SetForwarding(mac, underlay) => {
            let message = forwarding(tunnel, mac, Some(underlay));
            channel.change(&action, Mode::Replace, RouteNetlinkMessage::NewNeighbour(message))
        }
        ReachOp::SetNeighbour(address, mac) => {
            let message = neighbour(tunnel, address, Some(mac));
            channel.change(&action, Mode::Replace, RouteNetlinkMessage::NewNeighbour(message))
        }
        ReachOp::DeleteNeighbour(address) => {
            let message = neighbour(tunnel, address, None);
            channel.delete(&action, RouteNetlinkMessage::DelNeighbour(message))
        }
        ReachOp::DeleteForwarding(mac) => {
            let message = forwarding(tunnel, mac, None);
            channel.delete(&action, RouteNetlinkMessage::DelNeighbour(message))
        }
    }
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

fn neighbour(tunnel: u32, address: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = tunnel;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::from(address)));
    let mac = mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    message.attributes.extend(mac);
    message
}

fn forwarding(tunnel: u32, mac: Mac, underlay: Option<Ipv4Addr>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = tunnel;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    let underlay = underlay.map(|address| NeighbourAddress::from(IpAddr::V4(address)));
    message.attributes.extend(underlay.map(NeighbourAttribute::Destination));
    message
}

/// Neighbour messages of the bridge family carry addresses as plain bytes.
fn read_address(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some((*address).into()),
        NeighbourAddress::Inet6(address) => Some((*address).into()),
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(|b| Ipv4Addr::from(b).into()),
            16 => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(|b| Ipv6Addr::from(b).into()),
            _ => None,
        },
        _ => None,
    }
}
