//! Pairs of interfaces that lead into a container.

use std::fs::File;
use std::os::fd::AsRawFd as _;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use skep_worker_core::mesh::{Mac, interface_name};

use super::Error;
use super::rtnetlink::{Mode, RouteChannel};

/// A pair to be made.
#[derive(Debug)]
pub(super) struct Pair<'a> {
    /// The task; the outer end is named after it.
    pub(super) task_id: &'a str,
    /// The name of the end in the container.
    pub(super) interface: &'a str,
    /// The container's network namespace.
    pub(super) container: &'a File,
    /// The Ethernet address in the container; absent is the kernel's choice.
    pub(super) mac: Option<Mac>,
    /// The MTU of both ends, in bytes.
    pub(super) mtu: u32,
    /// What it is, for the refusal of an interface that is something else.
    pub(super) kind: &'static str,
    /// Completes "failed to …".
    pub(super) action: String,
}

impl Pair<'_> {
    /// Makes the pair, unless it is there; returns the index of the outer end. `inside` is a channel in
    /// the container's namespace.
    pub(super) fn ensure(
        self,
        outside: &mut RouteChannel,
        inside: &mut RouteChannel,
    ) -> Result<u32, Error> {
        let Self { task_id, interface, container, mac, mtu, kind, action } = self;
        let name = interface_name(task_id);
        let (outer, inner) = (outside.link(&name)?, inside.link(interface)?);
        if let (Some(outer), Some(inner)) = (&outer, &inner)
            && outer.peer == Some(inner.index)
            && inner.peer == Some(outer.index)
        {
            return Ok(outer.index);
        }
        if inner.is_some() {
            let interface = format!("{interface} of task {task_id}");
            return Err(Error::ForeignInterface { interface, kind });
        }
        if let Some(outer) = outer {
            // Left by an attempt that was cut short, or by an earlier container of this task.
            outside.delete_link(&name, outer.index)?;
        }
        let mut peer = LinkMessage::default();
        peer.attributes.push(LinkAttribute::IfName(interface.to_owned()));
        peer.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        peer.attributes
            .extend([LinkAttribute::Mtu(mtu), LinkAttribute::NetNsFd(container.as_raw_fd())]);
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.clone()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        outside.change(&action, Mode::Create, RouteNetlinkMessage::NewLink(message))?;
        let outer = outside.link(&name)?;
        Ok(outer.ok_or(Error::NoInterface { interface: name })?.index)
    }
}
