//! The node's own two interfaces: the ingress bridge and the tunnel to the other nodes.
//!
//! Both are left as they are where they are right, so that a restart of the daemon disturbs no
//! connection. The tunnel is made again when its settings differ, since the kernel cannot change
//! them; the bridge is only ever adjusted.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use skep_worker_core::mesh::{Mac, Slices, twin_net};

use super::options::{BRIDGE, Options, TUNNEL, VXLAN_OVERHEAD};
use crate::net::rtnetlink::{Link, Mode, RouteChannel};
use crate::net::{Error, first_failure, sysctl};

/// The kernel's table of local addresses, which repeats what other tables say.
const TABLE_LOCAL: u32 = 255;

/// Routes with a shorter prefix are default routes; VPN programs write theirs as two halves.
const DEFAULT_ROUTE_PREFIX_MAX: u8 = 1;

/// The kernel refuses IPv6 on interfaces with a smaller MTU.
const IPV6_MTU_MIN: u32 = 1280;

/// The indexes of the node's own interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Devices {
    pub(super) bridge: u32,
    pub(super) tunnel: u32,
    /// Whether they carry IPv6, too.
    pub(super) has_ipv6: bool,
}

/// Refuses a pool whose addresses the host reaches in another way already.
pub(super) fn check_pool(channel: &mut RouteChannel, pool: Ipv4Net) -> Result<(), Error> {
    let links = channel.links()?;
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    for message in channel.dump("list routes", RouteNetlinkMessage::GetRoute(message))? {
        let RouteNetlinkMessage::NewRoute(route) = message else { continue };
        let mut destination = Ipv4Addr::UNSPECIFIED;
        let (mut table, mut index) = (u32::from(route.header.table), None);
        for attribute in &route.attributes {
            if let RouteAttribute::Destination(RouteAddress::Inet(address)) = attribute {
                destination = *address;
            } else if let RouteAttribute::Table(number) = attribute {
                table = *number;
            } else if let RouteAttribute::Oif(number) = attribute {
                index = Some(*number);
            }
        }
        let prefix = route.header.destination_prefix_length;
        let Ok(destination) = Ipv4Net::new(destination, prefix) else { continue };
        let is_overlap = destination.contains(&pool) || pool.contains(&destination);
        if table == TABLE_LOCAL || prefix <= DEFAULT_ROUTE_PREFIX_MAX || !is_overlap {
            continue;
        }
        let interface = links.iter().find(|link| Some(link.index) == index);
        let interface = interface.map(|link| link.name.as_str());
        if interface.is_some_and(|name| name == BRIDGE || name == TUNNEL) {
            continue;
        }
        let through = interface
            .map_or("that leads to no interface".to_owned(), |name| format!("through {name}"));
        return Err(Error::PoolOverlap { pool, route: destination, through });
    }
    Ok(())
}

/// The MTU of everything that the mesh carries: that of the underlay less the tunnel's overhead.
pub(super) fn mesh_mtu(channel: &mut RouteChannel, options: &Options) -> Result<u32, Error> {
    let link = channel.link(&options.interface)?;
    let interface = options.interface.clone();
    let link = link.ok_or(Error::NoInterface { interface })?;
    Ok(link.mtu.saturating_sub(VXLAN_OVERHEAD))
}

/// Makes both interfaces what they must be.
pub(super) fn ensure(
    channel: &mut RouteChannel,
    options: &Options,
    slices: &Slices,
) -> Result<Devices, Error> {
    let mtu = mesh_mtu(channel, options)?;
    let number = options.self_number;
    let address = slices.bridge_address(number);

    let (bridge, on_bridge) = ensure_bridge_only(channel, slices, number, mtu)?;
    delete_other_tunnel(channel, options)?;
    let (mac, info) = (Mac::tunnel(number), tunnel_info(options));
    let tunnel = ensure_link(channel, TUNNEL, "VXLAN device", mac, mtu, info)?;
    ensure_address(channel, TUNNEL, tunnel, Ipv4Net::from(slices.tunnel_address(number)))?;

    let has_ipv6 = carries_ipv6(options, mtu);
    for (device, index, prefix) in
        [(BRIDGE, bridge, on_bridge), (TUNNEL, tunnel, Ipv4Net::from(address))]
    {
        sysctl::ensure_loose_reverse_path(device)?;
        if !has_ipv6 {
            sysctl::ensure_no_ipv6(device)?;
        } else {
            sysctl::ensure_ipv6_at_once(device)?;
            ensure_address(channel, device, index, twin_net(prefix))?;
        }
    }
    Ok(Devices { bridge, tunnel, has_ipv6 })
}

/// Makes the bridge what it must be, where there is no tunnel.
pub(super) fn ensure_bridge(
    channel: &mut RouteChannel,
    options: &Options,
    slices: &Slices,
) -> Result<(), Error> {
    let mtu = mesh_mtu(channel, options)?;
    ensure_bridge_only(channel, slices, options.self_number, mtu)?;
    sysctl::ensure_no_ipv6(BRIDGE)
}

fn ensure_bridge_only(
    channel: &mut RouteChannel,
    slices: &Slices,
    number: u16,
    mtu: u32,
) -> Result<(u32, Ipv4Net), Error> {
    let (mac, info) = (Mac::bridge(number), vec![LinkInfo::Kind(InfoKind::Bridge)]);
    let bridge = ensure_link(channel, BRIDGE, "bridge", mac, mtu, info)?;
    let on_bridge = Ipv4Net::new_assert(slices.bridge_address(number), slices.slice_prefix());
    ensure_address(channel, BRIDGE, bridge, on_bridge)?;
    Ok((bridge, on_bridge))
}

/// Whether the mesh of a node carries IPv6.
pub(super) fn carries_ipv6(options: &Options, mtu: u32) -> bool {
    options.ipv6 && mtu >= IPV6_MTU_MIN
}

/// Whether a mesh over an interface with that MTU can carry IPv6.
pub(in crate::net) fn has_room_for_ipv6(underlay_mtu: u32) -> bool {
    underlay_mtu.saturating_sub(VXLAN_OVERHEAD) >= IPV6_MTU_MIN
}

/// Removes both interfaces, and the uplinks of tasks, with everything that depends on them.
pub(super) fn remove(channel: &mut RouteChannel) -> Result<(), Error> {
    let links = channel.links()?;
    let bridge = links.iter().find(|link| link.name == BRIDGE).map(|link| link.index);
    let is_uplink = |link: &&Link| bridge.is_some() && link.controller == bridge;
    let is_own = |link: &&Link| link.name == BRIDGE || link.name == TUNNEL;
    let uplinks = links.iter().filter(is_uplink);
    let doomed = uplinks.chain(links.iter().filter(is_own));
    first_failure(doomed.map(|link| channel.delete_link(&link.name, link.index)))
}

/// Removes the tunnel alone; fine where there is none.
pub(super) fn remove_tunnel(channel: &mut RouteChannel) -> Result<(), Error> {
    match channel.link(TUNNEL)? {
        Some(link) => channel.delete_link(TUNNEL, link.index),
        None => Ok(()),
    }
}

fn tunnel_info(options: &Options) -> Vec<LinkInfo> {
    let data = vec![
        InfoVxlan::Id(options.vni),
        InfoVxlan::Local(options.underlay),
        InfoVxlan::Port(options.vxlan_port),
        InfoVxlan::Learning(false),
    ];
    vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))]
}

/// Deletes a tunnel with other settings, which the kernel cannot change in place.
fn delete_other_tunnel(channel: &mut RouteChannel, options: &Options) -> Result<(), Error> {
    let Some(link) = channel.link(TUNNEL)? else { return Ok(()) };
    if !link.is_kind(&InfoKind::Vxlan) {
        return Ok(()); // `ensure_link` refuses it.
    }
    let has = |wanted: &InfoVxlan| {
        link.info.iter().any(|info| match info {
            LinkInfo::Data(InfoData::Vxlan(data)) => data.contains(wanted),
            _ => false,
        })
    };
    let wanted = tunnel_info(options);
    let is_same = wanted.iter().all(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => data.iter().all(has),
        _ => true,
    });
    if is_same {
        return Ok(());
    }
    tracing::info!(interface = TUNNEL, "the tunnel's settings changed; making it again");
    channel.delete_link(TUNNEL, link.index)
}

fn ensure_link(
    channel: &mut RouteChannel,
    name: &str,
    kind: &'static str,
    mac: Mac,
    mtu: u32,
    info: Vec<LinkInfo>,
) -> Result<u32, Error> {
    let is_right_kind = |link: &Link| {
        info.iter().all(|i| match i {
            LinkInfo::Kind(kind) => link.is_kind(kind),
            _ => true,
        })
    };
    let settings = [LinkAttribute::Address(mac.0.to_vec()), LinkAttribute::Mtu(mtu)];
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.extend(settings);
    match channel.link(name)? {
        Some(link) if !is_right_kind(&link) => {
            return Err(Error::ForeignInterface { interface: name.to_owned(), kind });
        }
        Some(link) if link.is_up && link.mtu == mtu && link.address == mac.0 => {
            return Ok(link.index);
        }
        Some(link) => {
            // Without its name: older kernels take that for a change of it, and refuse while it is up. A
            // bridge without ports has another MTU than it was given.
            message.header.index = link.index;
            let action = format!("adjust interface {name}");
            channel.change(&action, Mode::Change, RouteNetlinkMessage::SetLink(message))?;
        }
        None => {
            message.attributes.push(LinkAttribute::IfName(name.to_owned()));
            message.attributes.push(LinkAttribute::LinkInfo(info));
            let action = format!("make interface {name}");
            channel.change(&action, Mode::Create, RouteNetlinkMessage::NewLink(message))?;
        }
    }
    let link = channel.link(name)?;
    Ok(link.ok_or(Error::NoInterface { interface: name.to_owned() })?.index)
}

/// The IPv4 addresses of an interface.
pub(super) fn ipv4_addresses(
    channel: &mut RouteChannel,
    link: &Link,
) -> Result<Vec<Ipv4Addr>, Error> {
    let mut query = AddressMessage::default();
    query.header.family = AddressFamily::Inet;
    let action = format!("list addresses of {}", link.name);
    let messages = channel.dump(&action, RouteNetlinkMessage::GetAddress(query))?;
    let addresses = messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewAddress(found) if found.header.index == link.index => {
            found.attributes.into_iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(address)) => Some(address),
                _ => None,
            })
        }
        _ => None,
    });
    Ok(addresses.collect())
}

/// Gives an interface exactly one address of the IP version, but for those of the link.
pub(in crate::net) fn ensure_address(
    channel: &mut RouteChannel,
    name: &str,
    index: u32,
    address: impl Into<IpNet>,
) -> Result<(), Error> {
    let address: IpNet = address.into();
    let ip = address.addr();
    let family = match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let mut query = AddressMessage::default();
    query.header.family = family;
    let action = format!("list addresses of {name}");
    let mut is_present = false;
    for message in channel.dump(&action, RouteNetlinkMessage::GetAddress(query))? {
        let RouteNetlinkMessage::NewAddress(found) = message else { continue };
        if found.header.index != index || found.header.family != family {
            continue;
        }
        // IPv6 has no other attribute for it, and IPv4 has both.
        let own = match ip {
            IpAddr::V4(_) => AddressAttribute::Local(ip),
            IpAddr::V6(_) => AddressAttribute::Address(ip),
        };
        let is_same = found.header.prefix_len == address.prefix_len();
        if is_same && found.attributes.contains(&own) {
            is_present = true;
            continue;
        }
        if ip.is_ipv6() && found.header.scope == AddressScope::Link {
            continue;
        }
        let action = format!("delete another address of {name}");
        channel.delete(&action, RouteNetlinkMessage::DelAddress(found))?;
    }
    if is_present {
        return Ok(());
    }
    let mut message = AddressMessage::default();
    message.header.family = family;
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    match address {
        IpNet::V4(net) if net.prefix_len() < 31 => {
            message.attributes.push(AddressAttribute::Broadcast(net.broadcast()));
        }
        IpNet::V4(_) => {}
        // Whoever gave it knows that nobody else has it: usable at once.
        IpNet::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
    }
    let action = format!("give {name} the address {address}");
    channel.change(&action, Mode::Replace, RouteNetlinkMessage::NewAddress(message))
}
