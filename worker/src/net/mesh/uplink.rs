//! Uplinks of tasks: a veth pair from the ingress bridge into the container, where it is the
//! default way out.
//!
//! All calls are idempotent. The node's end carries the task id as its alias. It has hairpin mode
//! set, since a task that is a client of its own published port may be its own backend: the
//! bridge must send the packet out where it came in.
//!
//! What a container sends from the uplink's address leaves by the uplink, wherever else a route leads:
//! an overlay network of the container may have the client's address in its subnet, and would swallow
//! the answers. The kernel's check of reverse paths looks by the same rule.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::link::{
    InfoBridgePort, InfoPortData, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use skep_worker_core::mesh::{Slices, interface_name, twin, twin_net};

use super::links;
use super::options::{BRIDGE, Options};
use crate::net::namespace::Home;
use crate::net::rtnetlink::{Link, Mode, RouteChannel};
use crate::net::veth::Pair;
use crate::net::{Error, sysctl};

const LOOPBACK: &str = "lo";

/// The routes of what is sent from the uplink's address, in a container. No other rule is in there.
const TABLE: u8 = 100;
const RULE_PRIORITY: u32 = 100;

/// The uplinks of the tasks on this node. Lives on a dedicated thread, which enters containers.
#[derive(Debug)]
pub(super) struct Uplinks {
    channel: RouteChannel,
    home: Home,
    options: Options,
    slices: Slices,
}

impl Uplinks {
    /// Opens the node's interfaces in the namespace of the calling thread.
    pub(super) fn open(options: Options, slices: Slices) -> Result<Self, Error> {
        let home = Home::here()?;
        Ok(Self { channel: RouteChannel::open()?, home, options, slices })
    }

    /// Gives the container of a task its uplink, called `interface` in there.
    pub(super) fn attach(
        &mut self,
        task_id: &str,
        pid: u32,
        interface: &str,
        address: Ipv4Addr,
    ) -> Result<(), Error> {
        let number = self.options.self_number;
        if !self.slices.is_task_address(number, address) {
            let slice = self.slices.slice(number);
            return Err(Error::NotATaskAddress { task_id: task_id.to_owned(), address, slice });
        }
        let namespace = self.home.of_container(task_id, pid)?;
        let mut inside = self.home.within(&namespace, RouteChannel::open)??;
        let mtu = links::mesh_mtu(&mut self.channel, &self.options)?;

        let pair = Pair {
            task_id,
            interface,
            container: &namespace,
            mac: None,
            mtu,
            kind: "uplink of this node",
            action: format!("make the uplink of task {task_id}"),
        };
        let outer = pair.ensure(&mut self.channel, &mut inside)?;
        self.ensure_port(task_id, outer, mtu)?;

        let link = inside.link(LOOPBACK)?.filter(|link| !link.is_up);
        link.map_or(Ok(()), |link| set_up(&mut inside, &link, None))?;
        let uplink = inside.link(interface)?;
        let gone = || Error::NoInterface { interface: format!("{interface} of task {task_id}") };
        let uplink = uplink.ok_or_else(gone)?;
        let address = Ipv4Net::new_assert(address, self.slices.slice_prefix());
        links::ensure_address(&mut inside, interface, uplink.index, address)?;
        let has_ipv6 = links::carries_ipv6(&self.options, mtu);
        if has_ipv6 {
            self.home.within(&namespace, || sysctl::ensure_ipv6_at_once(interface))??;
            links::ensure_address(&mut inside, interface, uplink.index, twin_net(address))?;
        }
        set_up(&mut inside, &uplink, Some(mtu))?;
        let (slice, gateway) = (self.slices.slice(number), self.slices.bridge_address(number));
        let (address, index) = (address.addr(), uplink.index);
        ensure_ways(&mut inside, index, slice.into(), gateway.into(), address.into())?;
        if has_ipv6 {
            let (slice, gateway, address) = (twin_net(slice), twin(gateway), twin(address));
            ensure_ways(&mut inside, index, slice.into(), gateway.into(), address.into())?;
        }
        Ok(())
    }

    /// Gives a container that an earlier daemon connected what its uplink lacks by now, as IPv6 where this
    /// node had none then. Nothing to do for a container without an uplink.
    pub(super) fn renew(&mut self, task_id: &str, pid: u32) -> Result<(), Error> {
        let Some(outer) = self.channel.link(&interface_name(task_id))? else { return Ok(()) };
        let namespace = self.home.of_container(task_id, pid)?;
        let mut inside = self.home.within(&namespace, RouteChannel::open)??;
        let inner = inside.links()?.into_iter().find(|link| Some(link.index) == outer.peer);
        let Some(inner) = inner else { return Ok(()) };
        let addresses = links::ipv4_addresses(&mut inside, &inner)?;
        let number = self.options.self_number;
        let own = addresses.into_iter().find(|own| self.slices.is_task_address(number, *own));
        own.map_or(Ok(()), |address| self.attach(task_id, pid, &inner.name, address))
    }

    /// Takes the uplink of a task away; fine where it has none.
    pub(super) fn detach(&mut self, task_id: &str) -> Result<(), Error> {
        let name = interface_name(task_id);
        match self.channel.link(&name)? {
            Some(link) => self.channel.delete_link(&name, link.index),
            None => Ok(()),
        }
    }

    /// Makes the node's end a port of the bridge.
    fn ensure_port(&mut self, task_id: &str, index: u32, mtu: u32) -> Result<(), Error> {
        let bridge = self.channel.link(BRIDGE)?;
        let bridge = bridge.ok_or(Error::NoInterface { interface: BRIDGE.to_owned() })?;
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![
            LinkAttribute::IfAlias(task_id.to_owned()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::Controller(bridge.index),
        ];
        let action = format!("connect task {task_id} to {BRIDGE}");
        self.channel.change(&action, Mode::Change, RouteNetlinkMessage::SetLink(message))?;

        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
        ])];
        let action = format!("set hairpin mode for task {task_id}");
        self.channel.change(&action, Mode::Change, RouteNetlinkMessage::NewLink(message))
    }
}

fn set_up(channel: &mut RouteChannel, link: &Link, mtu: Option<u32>) -> Result<(), Error> {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.extend(mtu.map(LinkAttribute::Mtu));
    let action = format!("set up {} of a container", link.name);
    channel.change(&action, Mode::Change, RouteNetlinkMessage::SetLink(message))
}

/// The ways out of one IP version: to anywhere by the gateway, and for what the uplink's address sends
/// by the uplink alone.
fn ensure_ways(
    inside: &mut RouteChannel,
    index: u32,
    slice: IpNet,
    gateway: IpAddr,
    address: IpAddr,
) -> Result<(), Error> {
    let anywhere: IpNet = match slice {
        IpNet::V4(_) => Ipv4Net::default().into(),
        IpNet::V6(_) => Ipv6Net::default().into(),
    };
    let beside = route(TABLE, slice, None, index);
    let [out, answers] = [RouteHeader::RT_TABLE_MAIN, TABLE]
        .map(|table| route(table, anywhere, Some(gateway), index));
    for route in [out, beside, answers] {
        let message = RouteNetlinkMessage::NewRoute(route);
        inside.change("set a route of a container", Mode::Replace, message)?;
    }
    ensure_answers_by_uplink(inside, address)
}

fn family_of(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn ensure_answers_by_uplink(inside: &mut RouteChannel, address: IpAddr) -> Result<(), Error> {
    let whole_address = IpNet::from(address).prefix_len();
    let mut wanted = RuleMessage::default();
    wanted.header.family = family_of(address);
    wanted.header.src_len = whole_address;
    wanted.header.table = TABLE;
    wanted.header.action = RuleAction::ToTable;
    wanted.attributes =
        vec![RuleAttribute::Source(address), RuleAttribute::Priority(RULE_PRIORITY)];
    let mut query = RuleMessage::default();
    query.header.family = family_of(address);
    let query = RouteNetlinkMessage::GetRule(query);
    let present = inside.dump("list the routing rules of a container", query)?;
    let is_wanted = |message: &RouteNetlinkMessage| match message {
        RouteNetlinkMessage::NewRule(rule) => {
            rule.header.table == TABLE
                && wanted.attributes.iter().all(|a| rule.attributes.contains(a))
        }
        _ => false,
    };
    if present.iter().any(is_wanted) {
        return Ok(());
    }
    let message = RouteNetlinkMessage::NewRule(wanted);
    inside.change("set the routing rule of a container", Mode::Create, message)
}

fn route(table: u8, to: IpNet, gateway: Option<IpAddr>, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(to.addr());
    message.header.destination_prefix_length = to.prefix_len();
    message.header.table = table;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = if gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
    message.header.kind = RouteType::Unicast;
    if to.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(to.network().into()));
    }
    let gateway = gateway.map(|gateway| RouteAttribute::Gateway(gateway.into()));
    message.attributes.extend(gateway);
    message.attributes.push(RouteAttribute::Oif(index));
    message
}
