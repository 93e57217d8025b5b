//! Permanent entries of a tunnel: who has which address, and behind which node it is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use skep_worker_core::mesh::Mac;

use super::Error;
use super::rtnetlink::RouteChannel;

/// The entry of an address; without `mac` it names the one to delete.
pub(super) fn neighbour(tunnel: u32, address: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
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

/// The entry of an Ethernet address; without `underlay` it names the one to delete.
pub(super) fn forwarding(tunnel: u32, mac: Mac, underlay: Option<Ipv4Addr>) -> NeighbourMessage {
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

/// The permanent entries of a family on the tunnel, whole ones only: the bridge's own entry of its port
/// has no address.
pub(super) fn entries(
    channel: &mut RouteChannel,
    action: &str,
    tunnel: u32,
    family: AddressFamily,
) -> Result<Vec<(Mac, IpAddr)>, Error> {
    let mut query = NeighbourMessage::default();
    query.header.family = family;
    let messages = channel.dump(action, RouteNetlinkMessage::GetNeighbour(query))?;
    let read = |message| {
        let RouteNetlinkMessage::NewNeighbour(entry) = message else { return None };
        let is_permanent = entry.header.state == NeighbourState::Permanent;
        if entry.header.ifindex != tunnel || !is_permanent {
            return None;
        }
        let (mut mac, mut address) = (None, None);
        for attribute in &entry.attributes {
            if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
                mac = bytes.as_slice().try_into().ok().map(Mac);
            } else if let NeighbourAttribute::Destination(found) = attribute {
                address = read_address(found);
            }
        }
        mac.zip(address)
    };
    Ok(messages.into_iter().filter_map(read).collect())
}
