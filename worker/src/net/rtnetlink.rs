//! Routing netlink: links, addresses, routes, rules and neighbours of one network namespace.

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkDeserializable as _, NetlinkHeader, NetlinkSerializable as _,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::Error;
use super::channel::{Channel, Refusal};

/// Marks routes and rules as ours; not in use by the daemons of `/etc/iproute2/rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 115;

/// How a new object treats one that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Refuse where one exists.
    Create,
    /// Take its place.
    Replace,
    /// Change one that exists.
    Change,
}

impl Mode {
    fn flags(self) -> u16 {
        match self {
            Self::Create => NLM_F_CREATE | NLM_F_EXCL,
            Self::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Self::Change => 0,
        }
    }
}

/// What matters of a network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is set up.
    pub is_up: bool,
    /// Its MTU.
    pub mtu: u32,
    /// Its Ethernet address.
    pub address: Vec<u8>,
    /// The bridge that it is a port of.
    pub controller: Option<u32>,
    /// The index of its other end, which may be in another namespace.
    pub peer: Option<u32>,
    /// A text that its maker left with it.
    pub alias: Option<String>,
    /// Its kind and settings.
    pub info: Vec<LinkInfo>,
}

impl Link {
    fn read(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            is_up: message.header.flags.contains(LinkFlags::Up),
            mtu: 0,
            address: Vec::new(),
            controller: None,
            peer: None,
            alias: None,
            info: Vec::new(),
        };
        #[expect(clippy::wildcard_enum_match_arm, reason = "a link has a hundred attributes")]
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(address) => link.address = address,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::Link(index) => link.peer = Some(index),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::LinkInfo(info) => link.info = info,
                _ => {}
            }
        }
        link
    }

    /// Whether the interface is of `kind`.
    pub fn is_kind(&self, kind: &InfoKind) -> bool {
        self.info.iter().any(|info| matches!(info, LinkInfo::Kind(k) if k == kind))
    }
}

/// A routing netlink socket in one network namespace.
#[derive(Debug)]
pub struct RouteChannel {
    channel: Channel,
}

impl RouteChannel {
    /// Opens a channel in the namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        let channel = Channel::open(NETLINK_ROUTE);
        let channel = channel.map_err(|e| Error::kernel("open a routing netlink socket", e))?;
        Ok(Self { channel })
    }

    /// Opens a channel whose dumps are filtered by the kernel.
    pub fn open_strict() -> Result<Self, Error> {
        let opened = Self::open()?;
        let strict = opened.channel.set_strict();
        strict.map_err(|e| Error::kernel("have the kernel filter routes", e))?;
        Ok(opened)
    }

    /// Changes one object; `action` completes "failed to …".
    pub fn change(
        &mut self,
        action: &str,
        mode: Mode,
        message: RouteNetlinkMessage,
    ) -> Result<(), Error> {
        let flags = NLM_F_REQUEST | NLM_F_ACK | mode.flags();
        self.exchange(&message, flags).map(drop).map_err(|source| Error::kernel(action, source))
    }

    /// Deletes one object; one that is gone already is fine.
    pub fn delete(&mut self, action: &str, message: RouteNetlinkMessage) -> Result<(), Error> {
        match self.exchange(&message, NLM_F_REQUEST | NLM_F_ACK) {
            Ok(_) => Ok(()),
            Err(refusal) if is_absent(&refusal) => Ok(()),
            Err(source) => Err(Error::kernel(action, source)),
        }
    }

    /// Changes, or deletes where there is no mode, many objects in their order. `describe` says of the
    /// number of one what [`Self::change`] is told. A failure keeps no other from being changed; the
    /// first is returned.
    pub fn change_all(
        &mut self,
        changes: &[(Option<Mode>, RouteNetlinkMessage)],
        describe: impl Fn(usize) -> String,
    ) -> Result<(), Error> {
        let encode = |(mode, message): &(Option<Mode>, RouteNetlinkMessage)| {
            let flags = NLM_F_REQUEST | mode.map_or(0, Mode::flags);
            (message.message_type(), flags, encoded(message))
        };
        let requests: Vec<_> = changes.iter().map(encode).collect();
        let failed = |number: usize, refusal| Error::kernel(describe(number), refusal);
        let refusals = self.channel.request_all(&requests).map_err(|e| failed(0, e.into()))?;
        let mut refusals = refusals.into_iter();
        let first =
            refusals.find(|(number, refusal)| changes[*number].0.is_some() || !is_absent(refusal));
        first.map_or(Ok(()), |(number, refusal)| Err(failed(number, refusal)))
    }

    /// All objects of the message's kind.
    pub fn dump(
        &mut self,
        action: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let answer = self.exchange(&message, NLM_F_REQUEST | NLM_F_DUMP);
        answer.map_err(|source| Error::kernel(action, source))
    }

    /// The interface of that name, if there is one.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.exchange(&RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST | NLM_F_ACK) {
            Ok(answer) => Ok(links(answer).next()),
            Err(refusal) if is_absent(&refusal) => Ok(None),
            Err(source) => Err(Error::kernel(format!("read interface {name}"), source)),
        }
    }

    /// All interfaces of the namespace.
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        Ok(links(self.dump("list interfaces", message)?).collect())
    }

    /// Deletes the interface with that index.
    pub fn delete_link(&mut self, name: &str, index: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let action = format!("delete interface {name}");
        self.delete(&action, RouteNetlinkMessage::DelLink(message))
    }

    fn exchange(
        &mut self,
        message: &RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        let frames = self.channel.request(message.message_type(), flags, &encoded(message))?;
        let decode = |frame: &super::channel::Frame| {
            let mut header = NetlinkHeader::default();
            header.message_type = frame.kind;
            // An object that this library cannot read is not one that skep made.
            let decoded = RouteNetlinkMessage::deserialize(&header, &frame.payload);
            decoded.inspect_err(|error| tracing::debug!(%error, "unreadable object")).ok()
        };
        Ok(frames.iter().filter_map(decode).collect())
    }
}

fn encoded(message: &RouteNetlinkMessage) -> Vec<u8> {
    let mut body = vec![0; message.buffer_len()];
    message.serialize(&mut body);
    body
}

fn links(messages: Vec<RouteNetlinkMessage>) -> impl Iterator<Item = Link> {
    messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(Link::read(link)),
        _ => None,
    })
}

fn is_absent(refusal: &Refusal) -> bool {
    let absent = [libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL];
    refusal.errno().is_some_and(|errno| absent.contains(&errno))
}
