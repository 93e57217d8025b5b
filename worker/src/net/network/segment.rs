//! One network on this node: a namespace with a bridge, a tunnel, and a port for each task.
//!
//! ```text
//!  container: eth0 ══ sk-… ┐
//!  container: eth0 ══ sk-… ┼─ br0 ── vx0 ═══ UDP socket in the node's own namespace ═══► other nodes
//!                          └ in RUN_DIR/netns/<network id>
//! ```
//!
//! Nothing of the node is in there, no address and no route: what tasks of the network send stays
//! within it. Nothing is learned or flooded to other nodes either: the bridge knows the tasks beside,
//! and hands all else to the tunnel, which knows the others, answers for them, and drops the rest.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use skep_worker_core::mesh::{Mac, interface_name};
use skep_worker_core::network::{NetworkTable, NetworkTables, Reach};

use super::removal::Target;
use super::{Attachment, NetworkOptions, interface, reach};
use crate::net::mesh::options::VXLAN_OVERHEAD;
use crate::net::namespace::{self, Home};
use crate::net::rtnetlink::{Link, Mode, RouteChannel};
use crate::net::veth::Pair;
use crate::net::{Error, secure, sysctl};

const BRIDGE: &str = "br0";
const TUNNEL: &str = "vx0";
const LOOPBACK: &str = "lo";

/// A network's namespace on this node.
#[derive(Debug)]
pub(super) struct Segment {
    path: PathBuf,
    namespace: File,
    channel: RouteChannel,
    /// The entries that its tunnel was brought to last, and the tunnel's index.
    in_force: Option<(u32, Reach)>,
}

/// What a network's interfaces are made with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    vni: u32,
    mtu: u32,
    /// The address that its tunnel sends from; `None` is that of the route.
    local: Option<Ipv4Addr>,
    port: u16,
}

impl Settings {
    /// Those of a network on an underlay with packets of `underlay_mtu` bytes. The tunnel of an encrypted
    /// one runs within WireGuard, where the route chooses the address: that of the current key.
    pub(super) fn of(table: &NetworkTable, options: &NetworkOptions, underlay_mtu: u32) -> Self {
        if table.encrypted {
            let most = underlay_mtu.saturating_sub(secure::NETWORK_OVERHEAD);
            let mtu = table.mtu.map_or(most, |mtu| mtu.min(most));
            return Self { vni: table.vni, mtu, local: None, port: secure::VXLAN_PORT };
        }
        let mtu = table.mtu.unwrap_or(underlay_mtu.saturating_sub(VXLAN_OVERHEAD));
        let local = Some(options.underlay);
        Self { vni: table.vni, mtu, local, port: options.vxlan_port }
    }
}

impl Segment {
    /// The namespace that `path` keeps, or a new one.
    pub(super) fn open_or_make(home: &Home, path: PathBuf) -> Result<Self, Error> {
        if let Some(segment) = Self::open(home, path.clone())? {
            return Ok(segment);
        }
        // Devices of this namespace speak for nobody.
        let namespace = home.make_kept(&path, sysctl::ensure_no_ipv6_by_default)?;
        let channel = home.within(&namespace, RouteChannel::open)??;
        Ok(Self { path, namespace, channel, in_force: None })
    }

    /// The namespace that `path` keeps, if it does.
    pub(super) fn open(home: &Home, path: PathBuf) -> Result<Option<Self>, Error> {
        let Some(namespace) = namespace::open_kept(&path)? else { return Ok(None) };
        let channel = home.within(&namespace, RouteChannel::open)??;
        Ok(Some(Self { path, namespace, channel, in_force: None }))
    }

    /// Brings interfaces and entries to what the table asks for; looks at the kernel's entries also where
    /// they were brought to a table before, if `is_repair`.
    pub(super) fn converge(
        &mut self,
        (home, host): (&Home, &mut RouteChannel),
        settings: Settings,
        (tables, table): (&NetworkTables, &NetworkTable),
        is_repair: bool,
    ) -> Result<(), Error> {
        let bridge = self.ensure_bridge(settings)?;
        let tunnel = self.ensure_tunnel(host, settings, bridge)?;
        if table.subnets.iter().any(|subnet| subnet.addr().is_ipv6()) {
            // It answers for neighbours with IPv6, though it has no address itself.
            home.within(&self.namespace, || sysctl::ensure_ipv6(TUNNEL))??;
        }
        let present = match self.in_force.take() {
            Some((index, reach)) if index == tunnel && !is_repair => reach,
            _ => reach::observe(&mut self.channel, tunnel)?,
        };
        let wanted = Reach::of(tables, table);
        let ops: Vec<_> = present.diff(&wanted).into_iter().map(|op| (tunnel, op)).collect();
        reach::change(&mut self.channel, &ops)?;
        self.in_force = Some((tunnel, wanted));
        Ok(())
    }

    /// The tasks that have a port, or had one until their container ended a moment ago, each with the index
    /// of its interface in there.
    pub(super) fn ports(&mut self) -> Result<Vec<(String, u32)>, Error> {
        let links = self.channel.links()?.into_iter().filter(|link| link.is_kind(&InfoKind::Veth));
        Ok(links.filter_map(|link| Some((link.alias?, link.peer?))).collect())
    }

    /// Gives a container its interface on the network, and says its index in there. Fine if it has it
    /// already.
    pub(super) fn attach(
        &mut self,
        home: &Home,
        task_id: &str,
        container: &File,
        attachment: &Attachment,
        settings: Settings,
    ) -> Result<u32, Error> {
        let mut inside = home.within(container, RouteChannel::open)??;
        let mac = Mac::of_endpoint(attachment.address.addr());
        let pair = Pair {
            task_id,
            interface: &attachment.interface,
            container,
            mac: Some(mac),
            mtu: settings.mtu,
            kind: "port of this network",
            action: format!("make interface {} of task {task_id}", attachment.interface),
        };
        let outer = pair.ensure(&mut self.channel, &mut inside)?;
        self.ensure_port(task_id, outer, settings.mtu)?;
        reach::set_port(&mut self.channel, outer, mac)?;

        if let Some(loopback) = inside.link(LOOPBACK)?.filter(|link| !link.is_up) {
            interface::set_up(&mut inside, &loopback)?;
        }
        let name = &attachment.interface;
        let has_ipv6 = attachment.ipv6.is_some();
        home.within(container, || sysctl::ensure_ipv6_by_hand(name, has_ipv6))??;
        let missing = || Error::NoInterface { interface: format!("{name} of task {task_id}") };
        let link = inside.link(name)?.ok_or_else(missing)?;
        interface::ensure_addresses(&mut inside, &link, attachment)?;
        interface::set_up(&mut inside, &link)?;
        Ok(link.index)
    }

    /// The port of a task, to be deleted; `None` where it has none.
    pub(super) fn port(&mut self, task_id: &str) -> Result<Option<Target>, Error> {
        let interface = interface_name(task_id);
        let link = self.channel.link(&interface)?;
        let namespace =
            || self.namespace.try_clone().map_err(|e| Error::file("keep", &self.path, e));
        link.map(|_| Ok(Target::Port { namespace: namespace()?, interface })).transpose()
    }

    /// The whole network, to be deleted from this node with the interfaces of all tasks on it.
    pub(super) fn into_target(self) -> Target {
        Target::Network { namespace: self.namespace, path: self.path }
    }

    fn ensure_bridge(&mut self, settings: Settings) -> Result<u32, Error> {
        let data = InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)]);
        let info = vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)];
        let link = match self.channel.link(BRIDGE)? {
            Some(link) => link,
            None => {
                let mut message = LinkMessage::default();
                message.attributes =
                    vec![LinkAttribute::IfName(BRIDGE.to_owned()), LinkAttribute::LinkInfo(info)];
                let message = RouteNetlinkMessage::NewLink(message);
                self.channel.change("make the bridge of a network", Mode::Create, message)?;
                self.expect_link(BRIDGE)?
            }
        };
        if !link.is_up || link.mtu != settings.mtu {
            self.adjust(&link, vec![LinkAttribute::Mtu(settings.mtu)])?;
        }
        Ok(link.index)
    }

    /// Makes the tunnel from the node's own namespace, where its socket stays.
    fn ensure_tunnel(
        &mut self,
        host: &mut RouteChannel,
        settings: Settings,
        bridge: u32,
    ) -> Result<u32, Error> {
        let mut data = vec![
            InfoVxlan::Id(settings.vni),
            InfoVxlan::Port(settings.port),
            InfoVxlan::Learning(false),
            InfoVxlan::Proxy(true),
        ];
        data.extend(settings.local.map(InfoVxlan::Local));
        let present = self.channel.link(TUNNEL)?;
        let present = match present {
            Some(link) if !has_data(&link, &data) => {
                tracing::info!(vni = settings.vni, "a tunnel's settings changed; making it again");
                self.channel.delete_link(TUNNEL, link.index)?;
                None
            }
            present => present,
        };
        let link = match present {
            Some(link) => link,
            None => {
                let mut message = LinkMessage::default();
                message.attributes = vec![
                    LinkAttribute::IfName(TUNNEL.to_owned()),
                    LinkAttribute::NetNsFd(self.namespace.as_raw_fd()),
                    LinkAttribute::LinkInfo(vec![
                        LinkInfo::Kind(InfoKind::Vxlan),
                        LinkInfo::Data(InfoData::Vxlan(data)),
                    ]),
                ];
                let action = format!("make the tunnel of network number {}", settings.vni);
                host.change(&action, Mode::Create, RouteNetlinkMessage::NewLink(message))?;
                self.expect_link(TUNNEL)?
            }
        };
        if !link.is_up || link.mtu != settings.mtu || link.controller != Some(bridge) {
            let port = [LinkAttribute::Mtu(settings.mtu), LinkAttribute::Controller(bridge)];
            self.adjust(&link, port.to_vec())?;
            // The table knows where everything is.
            self.set_port(link.index, vec![InfoBridgePort::Learning(false)])?;
        }
        Ok(link.index)
    }

    /// Makes the network's end a port of the bridge.
    fn ensure_port(&mut self, task_id: &str, index: u32, mtu: u32) -> Result<(), Error> {
        let bridge = self.expect_link(BRIDGE)?.index;
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![
            LinkAttribute::IfAlias(task_id.to_owned()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::Controller(bridge),
        ];
        let action = format!("connect task {task_id} to its network");
        self.channel.change(&action, Mode::Change, RouteNetlinkMessage::SetLink(message))?;
        // What no port is known for is a matter of the tunnel.
        self.set_port(
            index,
            vec![InfoBridgePort::Learning(false), InfoBridgePort::UnicastFlood(false)],
        )
    }

    fn set_port(&mut self, index: u32, settings: Vec<InfoBridgePort>) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(settings)),
        ])];
        let message = RouteNetlinkMessage::NewLink(message);
        self.channel.change("set up a port of a network's bridge", Mode::Change, message)
    }

    fn adjust(&mut self, link: &Link, attributes: Vec<LinkAttribute>) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = link.index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = attributes;
        let action = format!("adjust interface {} of a network", link.name);
        self.channel.change(&action, Mode::Change, RouteNetlinkMessage::SetLink(message))
    }

    fn expect_link(&mut self, name: &str) -> Result<Link, Error> {
        let interface = || format!("{name} of {}", self.path.display());
        let missing = Error::NoInterface { interface: interface() };
        self.channel.link(name)?.ok_or(missing)
    }
}

fn has_data(link: &Link, wanted: &[InfoVxlan]) -> bool {
    link.info.iter().any(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => wanted.iter().all(|one| data.contains(one)),
        _ => false,
    })
}
