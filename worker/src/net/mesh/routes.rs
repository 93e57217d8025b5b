//! Routes, rules and neighbours of the tunnel: observes them, and carries out operations on them.
//!
//! Routes of ours carry a protocol number of their own, so that nobody else's are touched.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use skep_worker_core::mesh::{NODE_NUMBER_MAX, Objects, Op, RouteKey, RouteTable};

use super::links::Devices;
use super::options::{BRIDGE, MarkField, Options};
use crate::net::neighbour::{entries, forwarding, neighbour};
use crate::net::rtnetlink::{Mode, ROUTE_PROTOCOL, RouteChannel};
use crate::net::{Error, first_failure};

/// Rules of ours come before those of VPN programs (from 5000) and the main table (32766): they
/// match nothing but marked answers of tasks.
const RULE_PRIORITY: u32 = 2000;

/// The tunnel's routing on this node, of one IP version.
#[derive(Debug)]
pub(super) struct Routes {
    family: AddressFamily,
    channel: RouteChannel,
    /// A channel whose dumps the kernel filters: a host may have a million routes.
    filtered: RouteChannel,
    marks: MarkField,
    table_base: u32,
}

impl Routes {
    /// Opens the kernel's routing of IPv4 in the namespace of the calling thread.
    pub(super) fn open(options: &Options) -> Result<Self, Error> {
        Self::open_of(options, AddressFamily::Inet)
    }

    /// Opens that of IPv6.
    pub(super) fn open_ipv6(options: &Options) -> Result<Self, Error> {
        Self::open_of(options, AddressFamily::Inet6)
    }

    fn open_of(options: &Options, family: AddressFamily) -> Result<Self, Error> {
        Ok(Self {
            family,
            channel: RouteChannel::open()?,
            filtered: RouteChannel::open_strict()?,
            marks: options.marks,
            table_base: options.route_table_base,
        })
    }

    /// Reads the routing part of the objects; deletes rules of ours that no options explain.
    pub(super) fn observe(&mut self, devices: Devices) -> Result<Objects, Error> {
        let mut objects = Objects::default();
        self.observe_neighbours(devices, &mut objects)?;
        self.observe_routes(devices, &mut objects)?;
        for rule in self.rules()? {
            match self.rule_number(&rule) {
                Some(number) if objects.return_rules.insert(number) => {}
                _ => self.delete_rule(rule)?,
            }
        }
        Ok(objects)
    }

    /// Carries out one operation on routing; operations on rules change nothing here.
    pub(super) fn change(&mut self, op: &Op, devices: Devices) -> Result<(), Error> {
        let action = op.to_string();
        let (mode, message) = match op {
            Op::SetNeighbour(address, mac) => {
                let message = neighbour(devices.tunnel, *address, Some(*mac));
                (Some(Mode::Replace), RouteNetlinkMessage::NewNeighbour(message))
            }
            Op::DeleteNeighbour(address) => {
                let message = neighbour(devices.tunnel, *address, None);
                (None, RouteNetlinkMessage::DelNeighbour(message))
            }
            Op::SetForwarding(mac, underlay) => {
                let message = forwarding(devices.tunnel, *mac, Some(*underlay));
                (Some(Mode::Replace), RouteNetlinkMessage::NewNeighbour(message))
            }
            Op::DeleteForwarding(mac) => {
                let message = forwarding(devices.tunnel, *mac, None);
                (None, RouteNetlinkMessage::DelNeighbour(message))
            }
            Op::SetRoute(key, via) => {
                let message = self.route(*key, *via, devices);
                (Some(Mode::Replace), RouteNetlinkMessage::NewRoute(message))
            }
            Op::DeleteRoute(key) => {
                let mut message = self.route(*key, None, devices);
                message.header.scope = RouteScope::NoWhere; // Of any scope.
                (None, RouteNetlinkMessage::DelRoute(message))
            }
            Op::AddReturnRule(number) => {
                (Some(Mode::Create), RouteNetlinkMessage::NewRule(self.rule(*number)))
            }
            Op::DeleteReturnRule(number) => {
                (None, RouteNetlinkMessage::DelRule(self.rule(*number)))
            }
            Op::AddNodeAddress(_)
            | Op::DeleteNodeAddress(_)
            | Op::AddPeer(..)
            | Op::DeletePeer(..)
            | Op::AddPort(..)
            | Op::ReplaceBackends(..)
            | Op::DeletePort(_) => return Ok(()),
        };
        tracing::debug!(%op, "mesh routing");
        match mode {
            Some(mode) => self.channel.change(&action, mode, message),
            None => self.channel.delete(&action, message),
        }
    }

    /// Deletes all rules of ours; routes and neighbours go with their interface.
    pub(super) fn remove_rules(&mut self) -> Result<(), Error> {
        first_failure(self.rules()?.into_iter().map(|rule| self.delete_rule(rule)))
    }

    fn observe_neighbours(&mut self, on: Devices, objects: &mut Objects) -> Result<(), Error> {
        let found = entries(&mut self.channel, "list neighbours", on.tunnel, self.family)?;
        objects.neighbours.extend(found.into_iter().map(|(mac, address)| (address, mac)));
        if self.family == AddressFamily::Inet6 {
            return Ok(()); // Forwarding is by Ethernet addresses, and observed with IPv4.
        }
        let bridge = AddressFamily::Bridge;
        for (mac, address) in entries(&mut self.channel, "list neighbours", on.tunnel, bridge)? {
            if let IpAddr::V4(underlay) = address {
                objects.forwarding.insert(mac, underlay);
            }
        }
        Ok(())
    }

    fn observe_routes(&mut self, on: Devices, objects: &mut Objects) -> Result<(), Error> {
        let mut query = RouteMessage::default();
        query.header.address_family = self.family;
        query.attributes.push(RouteAttribute::Oif(on.tunnel));
        let query = RouteNetlinkMessage::GetRoute(query);
        for message in self.filtered.dump("list routes of the tunnel", query)? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            if route.header.protocol != RouteProtocol::Other(ROUTE_PROTOCOL) {
                continue;
            }
            let mut table = u32::from(route.header.table);
            let (mut destination, mut via) = (self.unspecified(), None);
            for attribute in &route.attributes {
                if let RouteAttribute::Table(number) = attribute {
                    table = *number;
                } else if let RouteAttribute::Destination(address) = attribute {
                    destination = ip(address).unwrap_or(destination);
                } else if let RouteAttribute::Gateway(address) = attribute {
                    via = ip(address);
                }
            }
            let prefix = route.header.destination_prefix_length;
            let destination = IpNet::new(destination, prefix).ok();
            if let (Some(destination), Some(table)) = (destination, self.route_table(table)) {
                objects.routes.insert(RouteKey { table, destination }, via);
            }
        }
        Ok(())
    }

    fn route_table(&self, table: u32) -> Option<RouteTable> {
        if table == u32::from(RouteHeader::RT_TABLE_MAIN) {
            return Some(RouteTable::Main);
        }
        let number = u16::try_from(table.checked_sub(self.table_base)?).ok()?;
        (1..=NODE_NUMBER_MAX).contains(&number).then_some(RouteTable::WayBack(number))
    }

    fn unspecified(&self) -> IpAddr {
        match self.family {
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        }
    }

    fn route(&self, key: RouteKey, via: Option<IpAddr>, devices: Devices) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = self.family;
        message.header.destination_prefix_length = key.destination.prefix_len();
        message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
        message.header.kind = RouteType::Unicast;
        message.header.scope = match via {
            Some(_) => RouteScope::Universe,
            None => RouteScope::Link,
        };
        match key.table {
            RouteTable::Main => message.header.table = RouteHeader::RT_TABLE_MAIN,
            RouteTable::WayBack(number) => {
                let table = self.table_base + u32::from(number);
                message.attributes.push(RouteAttribute::Table(table));
            }
        }
        if key.destination.prefix_len() > 0 {
            let destination = RouteAddress::from(key.destination.network());
            message.attributes.push(RouteAttribute::Destination(destination));
        }
        message.attributes.push(RouteAttribute::Oif(devices.tunnel));
        if let Some(via) = via {
            // The next hop is a neighbour by our own word: no route leads to it but ours.
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(via.into()));
        }
        message
    }

    /// All rules of ours, right or not.
    fn rules(&mut self) -> Result<Vec<RuleMessage>, Error> {
        let mut query = RuleMessage::default();
        query.header.family = self.family;
        let query = RouteNetlinkMessage::GetRule(query);
        let found = self.channel.dump("list routing rules", query)?;
        let protocol = RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL));
        let input = RuleAttribute::Iifname(BRIDGE.to_owned());
        let ours = found.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewRule(rule) => Some(rule),
            _ => None,
        });
        let is_ours = |rule: &RuleMessage| {
            rule.header.family == self.family
                && rule.attributes.contains(&protocol)
                && rule.attributes.contains(&input)
        };
        Ok(ours.filter(is_ours).collect())
    }

    /// The peer that a rule is for, if it is exactly the rule that we make for it.
    fn rule_number(&self, rule: &RuleMessage) -> Option<u16> {
        let mark = rule.attributes.iter().find_map(|attribute| match attribute {
            RuleAttribute::FwMark(mark) => Some(*mark),
            _ => None,
        })?;
        let number = self.marks.number(mark)?;
        let wanted = self.rule(number);
        let is_same = wanted.attributes.iter().all(|a| rule.attributes.contains(a));
        is_same.then_some(number)
    }

    fn rule(&self, number: u16) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = self.family;
        message.header.action = RuleAction::ToTable;
        // Without `iif` the encapsulated packet, which carries the mark as well, would be routed
        // into the tunnel again.
        message.attributes = vec![
            RuleAttribute::Iifname(BRIDGE.to_owned()),
            RuleAttribute::Priority(RULE_PRIORITY),
            RuleAttribute::FwMark(self.marks.mark(number)),
            RuleAttribute::FwMask(self.marks.mask()),
            RuleAttribute::Table(self.table_base + u32::from(number)),
            RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL)),
        ];
        message
    }

    fn delete_rule(&mut self, rule: RuleMessage) -> Result<(), Error> {
        self.channel.delete("delete a routing rule of the mesh", RouteNetlinkMessage::DelRule(rule))
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}
