//! A container's interface on a network, seen from inside of the container.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv6Net};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Attachment;
use crate::net::Error;
use crate::net::mesh::links;
use crate::net::rtnetlink::{Link, Mode, RouteChannel};

/// Gives an interface the addresses of its attachment.
pub(super) fn ensure_addresses(
    inside: &mut RouteChannel,
    link: &Link,
    attachment: &Attachment,
) -> Result<(), Error> {
    links::ensure_address(inside, &link.name, link.index, attachment.address)?;
    match attachment.ipv6 {
        Some(address) => add_ipv6(inside, link, address),
        None => Ok(()),
    }
}

fn add_ipv6(inside: &mut RouteChannel, link: &Link, address: Ipv6Net) -> Result<(), Error> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.prefix_len = address.prefix_len();
    message.header.index = link.index;
    // The allocator knows that nobody else has it: usable at once.
    message.header.flags = AddressHeaderFlags::Nodad;
    let ip = IpAddr::V6(address.addr());
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    let action = format!("give {} the address {}", link.name, IpNet::V6(address));
    inside.change(&action, Mode::Replace, RouteNetlinkMessage::NewAddress(message))
}

/// Sets an interface up.
pub(super) fn set_up(inside: &mut RouteChannel, link: &Link) -> Result<(), Error> {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let action = format!("set up {} of a container", link.name);
    inside.change(&action, Mode::Change, RouteNetlinkMessage::SetLink(message))
}
