//! The rules of the mesh as expressions: what is always there, and what each operation adds.
//!
//! ```text
//! guard         prerouting -300  drop VXLAN of our networks from tasks, and from outside of the cluster
//! guard-out     output     -300  drop VXLAN of encrypted networks that would leave in clear
//! separate      prerouting -300  connections through each peer live in a conntrack zone of their own
//! remember      prerouting -150  note which backend took a connection; mark connections by the peer they
//!                                came through, and their answers
//! publish       prerouting -100  ┐ (protocol, port) ──@ports──► chain tcp-8080: dnat to
//! publish-local output     -100  ┘                              numgen inc mod N map {...},
//!                                                               dnat to the first of them
//! ask           postrouting  99  note which backend a connection is asked of, once for each connection
//! protect       forward       0  from outside, only published ports of tasks are reachable
//! source        postrouting 100  masquerade clients inside the cluster, and what tasks send out
//! ```
//!
//! A rule and the anonymous map it uses never change in the kernel; they can only be replaced. A
//! rule of ours carries a fingerprint of its expressions in its comment, so a rule that has the
//! right comment is the right rule.
//!
//! IPv6 has a table of its own with the same, but for the guard: tunnels end at addresses of IPv4.
//!
//! The second rule of a port is for packets that are in the chain while it is replaced: the kernel takes the elements
//! of a map out of force before the last of them has looked there, and such a packet would go on to the node itself
//! (ADR 0038).
//!
//! Both publishing chains go to the same chain of a port, so that outside and local clients take
//! turns together. A port without backends refuses: with a TCP reset, or as a host does where nothing
//! listens.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use skep_common::wireguard::SLOTS;
use skep_worker_core::mesh::{Endpoint, Mac, Op, PortKey, Protocol};

use super::options::{BRIDGE, MarkField, Options, TABLE, TUNNEL};
use crate::net::nft::expression as rule;
use crate::net::nft::{Batch, Element, Expression, Family, Hook, SetKind, Value};
use crate::net::secure;

/// The lowest network number of overlay networks, which managers count up from.
const OVERLAY_NUMBER_MIN: u32 = 0x5000;

/// The comment of the rule for packets that find a port's map out of force.
pub(super) const MISSED: &str = "a healthy task, when a turn is missed";

/// The set of the underlay addresses of all nodes.
pub(super) const NODES: &str = "nodes";
/// The map from a peer's Ethernet address to the chain that sets the zone of connections.
pub(super) const ZONES: &str = "zones";
/// The map from a peer's Ethernet address to the chain that marks connections.
pub(super) const SENDERS: &str = "senders";
/// The map from a connection's mark to the chain that marks its answers.
pub(super) const WAYS_BACK: &str = "ways-back";
/// The set of backends that connections were asked of, for as long as [`NOTED`].
pub(super) const ASKED: &str = "asked";
/// The set of backends that took connections, likewise.
pub(super) const ANSWERED: &str = "answered";
/// How long a note stays.
pub(super) const NOTED: Duration = Duration::from_secs(1);
/// Backends that are noted at a time; more are served all the same.
const NOTED_MAX: u32 = 1 << 16;

/// The map from protocol and port to the port's chain.
pub(super) const PORTS: &str = "ports";

// Data types as `nft` numbers them (`include/datatype.h` of nftables).
const TYPE_INTEGER: u32 = 4;
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;
const TYPE_ETHERNET: u32 = 9;
const TYPE_PROTOCOL: u32 = 12;
const TYPE_SERVICE: u32 = 13;
const TYPE_MARK: u32 = 19;
const CONCATENATION_BITS: u32 = 6;

const UDP: u8 = 17;

const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

/// A rule and the comment that identifies it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) expressions: Vec<Expression>,
    pub(super) comment: String,
}

impl Rule {
    fn new(text: &str, parts: impl IntoIterator<Item = Vec<Expression>>) -> Self {
        let expressions: Vec<Expression> = parts.into_iter().flatten().collect();
        // Differs between any two versions of a rule, also those of two releases of skep.
        let hash = expressions
            .iter()
            .flat_map(Expression::as_bytes)
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        Self { expressions, comment: format!("{text} [{hash:016x}]") }
    }
}

/// A chain that is hooked into the path of packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BaseChain {
    pub(super) name: &'static str,
    pub(super) hook: Hook,
    pub(super) rules: Vec<Rule>,
}

/// The rules of one node, of one IP version.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    slice: IpNet,
    marks: MarkField,
    vni: u32,
    vxlan_port: u16,
}

impl Layout {
    /// The rules of the IP version that the node's slice is of.
    pub(super) fn new(options: &Options, slice: IpNet) -> Self {
        Self { slice, marks: options.marks, vni: options.vni, vxlan_port: options.vxlan_port }
    }

    /// The family of the table.
    pub(super) fn family(&self) -> Family {
        if self.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
    }

    fn is_ipv4(&self) -> bool {
        matches!(self.slice, IpNet::V4(_))
    }

    /// The data type of addresses, and their length in bytes.
    fn address_type(&self) -> (u32, u32) {
        if self.is_ipv4() { (TYPE_IPV4, 4) } else { (TYPE_IPV6, 16) }
    }

    /// The sets and maps that are always there.
    pub(super) fn sets(&self) -> [(&'static str, SetKind); 5] {
        let kind = |key_type, key_length, value| SetKind {
            key_type,
            key_length,
            is_host_order: false,
            value,
        };
        let marks = SetKind { is_host_order: true, ..kind(TYPE_MARK, 4, Value::Verdict) };
        let port = TYPE_PROTOCOL << CONCATENATION_BITS | TYPE_SERVICE;
        let (address_type, length) = self.address_type();
        [
            (NODES, kind(address_type, length, Value::None)),
            (ZONES, kind(TYPE_ETHERNET, 6, Value::Verdict)),
            (SENDERS, kind(TYPE_ETHERNET, 6, Value::Verdict)),
            (WAYS_BACK, marks),
            (PORTS, kind(port, 8, Value::Verdict)),
        ]
    }

    /// The sets that rules note backends in, and their kind.
    fn notes(&self) -> ([&'static str; 2], SetKind) {
        let (address_type, length) = self.address_type();
        let kind = SetKind {
            key_type: address_type << CONCATENATION_BITS | TYPE_SERVICE,
            key_length: length + 4,
            is_host_order: false,
            value: Value::None,
        };
        ([ASKED, ANSWERED], kind)
    }

    /// The names of all sets that are always there.
    pub(super) fn set_names(&self) -> BTreeSet<&'static str> {
        self.sets().map(|(name, _)| name).into_iter().chain(self.notes().0).collect()
    }

    /// The chains that are always there.
    pub(super) fn base_chains(&self) -> Vec<BaseChain> {
        let chain = |name, kind, number, priority, rules| BaseChain {
            name,
            hook: Hook { kind, number, priority, drops_by_default: false },
            rules,
        };
        let guards = [
            chain("guard", "filter", PREROUTING, -300, self.guard()),
            chain("guard-out", "filter", OUTPUT, -300, vec![Self::guard_out()]),
        ];
        let others = [
            chain("separate", "filter", PREROUTING, -300, vec![Self::separate()]),
            chain("remember", "filter", PREROUTING, -150, self.remember()),
            chain("publish", "nat", PREROUTING, -100, vec![self.publish(false)]),
            chain("publish-local", "nat", OUTPUT, -100, vec![self.publish(true)]),
            chain("ask", "nat", POSTROUTING, 99, vec![self.ask()]),
            chain("protect", "filter", FORWARD, 0, Self::protect().to_vec()),
            chain("source", "nat", POSTROUTING, 100, self.source().to_vec()),
        ];
        self.is_ipv4().then_some(guards).into_iter().flatten().chain(others).collect()
    }

    /// The ingress network has a number of its own; those of overlay networks begin at
    /// [`OVERLAY_NUMBER_MIN`], also of those that are made later. Other tunnels on the same port, as
    /// Docker's own, have lower ones.
    ///
    /// A task may write any source address, and what it sends to another node would be taken for the
    /// node's word there.
    ///
    /// Tunnels of encrypted networks have a port of their own, on which nothing comes but through
    /// WireGuard; and nothing else comes through WireGuard.
    fn guard(&self) -> Vec<Rule> {
        let numbers = [rule::vxlan_number(self.vni), rule::vxlan_number_from(OVERLAY_NUMBER_MIN)];
        let rules = |sender: Vec<Expression>, text: &'static str| {
            numbers.clone().map(|number| {
                let parts = [
                    rule::transport_protocol(UDP).to_vec(),
                    rule::destination_port(self.vxlan_port).to_vec(),
                    number.to_vec(),
                    sender.clone(),
                    vec![rule::discard()],
                ];
                Rule::new(text, parts)
            })
        };
        let outside = rule::source_in(false, NODES).to_vec();
        let [ingress, overlay] = rules(outside, "tunnel packets from outside of the cluster");
        let [of_task, of_task_overlay] = rules(input(BRIDGE), "tunnel packets from a task");
        let clear = secure_interfaces().flat_map(|name| rule::input_interface(false, &name));
        let clear = [secure_tunnel(), clear.collect(), vec![rule::discard()]];
        let clear = Rule::new("tunnel packets of encrypted networks in clear", clear);
        let within = secure_interfaces().flat_map(|name| {
            let tunnel = [input(&name), secure_tunnel(), vec![rule::accept()]];
            let other = [input(&name), vec![rule::discard()]];
            [
                Rule::new("tunnel packets of encrypted networks", tunnel),
                Rule::new("other packets through WireGuard", other),
            ]
        });
        let mut rules = vec![ingress, overlay, of_task, of_task_overlay, clear];
        rules.extend(within);
        rules
    }

    fn guard_out() -> Rule {
        let clear = secure_interfaces().flat_map(|name| rule::output_interface(false, &name));
        let parts = [secure_tunnel(), clear.collect(), vec![rule::discard()]];
        Rule::new("tunnel packets of encrypted networks in clear", parts)
    }

    fn separate() -> Rule {
        let parts = [input(TUNNEL), rule::sender_to_verdict(ZONES).to_vec()];
        Rule::new("one client port used through two nodes", parts)
    }

    fn remember(&self) -> Vec<Rule> {
        let new = [
            input(TUNNEL),
            rule::connection_is_new().to_vec(),
            rule::sender_to_verdict(SENDERS).to_vec(),
        ];
        let answer = [
            input(BRIDGE),
            rule::connection_is_reply().to_vec(),
            rule::connection_mark_to_verdict(self.marks.mask(), WAYS_BACK).to_vec(),
        ];
        // Most packets go past this rule at its third expression.
        let taken = [
            rule::tcp_handshake(true).to_vec(),
            rule::connection_is_reply().to_vec(),
            rule::connection_is_published(true).to_vec(),
            rule::note_source_in(self.is_ipv4(), ANSWERED).to_vec(),
        ];
        vec![
            Rule::new("backends that answer", taken),
            Rule::new("the peer that a connection came through", new),
            Rule::new("answers go back through that peer", answer),
        ]
    }

    /// Chains of translation see the first packet of a connection alone. This one comes before those of
    /// other programs, of which the first that translates is the last that sees the packet.
    fn ask(&self) -> Rule {
        let parts = [
            rule::tcp_handshake(false).to_vec(),
            rule::connection_is_published(true).to_vec(),
            rule::note_destination_in(self.is_ipv4(), ASKED).to_vec(),
        ];
        Rule::new("backends that are asked", parts)
    }

    fn publish(&self, is_local: bool) -> Rule {
        let not_loopback = match self.is_ipv4() {
            true => rule::destination_is_not_loopback().to_vec(),
            false => rule::destination6_is_not_loopback().to_vec(),
        };
        let parts = [
            rule::destination_is_local().to_vec(),
            if is_local { not_loopback } else { Vec::new() },
            rule::port_to_verdict(PORTS).to_vec(),
        ];
        Rule::new("published ports", parts)
    }

    fn protect() -> [Rule; 2] {
        [BRIDGE, TUNNEL].map(|device| {
            let parts = [
                rule::output_interface(true, device).to_vec(),
                rule::input_interface(false, BRIDGE).to_vec(),
                rule::input_interface(false, TUNNEL).to_vec(),
                rule::connection_is_new().to_vec(),
                rule::connection_is_published(false).to_vec(),
                vec![rule::discard()],
            ];
            Rule::new("outside clients of ports that are not published", parts)
        })
    }

    fn source(&self) -> [Rule; 3] {
        let slice = rule::source_network(self.slice).to_vec();
        let published = rule::connection_is_published(true).to_vec();
        let masquerade = vec![rule::masquerade()];
        let nodes = match self.is_ipv4() {
            true => rule::source_in(true, NODES).to_vec(),
            false => rule::source6_in(NODES).to_vec(),
        };
        let outbound = [
            slice.clone(),
            rule::output_interface(false, TUNNEL).to_vec(),
            rule::output_interface(false, BRIDGE).to_vec(),
            masquerade.clone(),
        ];
        let beside = rule::output_interface(true, BRIDGE).to_vec();
        [
            Rule::new(
                "the client is a node of the cluster",
                [nodes, published.clone(), masquerade.clone()],
            ),
            Rule::new(
                "the client is a task beside, or the task itself",
                [slice, beside, published, masquerade],
            ),
            Rule::new("what tasks send out", outbound),
        ]
    }

    /// The chains of a peer, each with the one rule in it: of [`ZONES`], [`SENDERS`] and
    /// [`WAYS_BACK`].
    pub(super) fn peer_chains(&self, number: u16) -> [(String, Rule); 3] {
        let zone = Rule::new("separate the connection", [rule::set_zone(number).to_vec()]);
        [
            (zone_chain(number), zone),
            (format!("from-{number}"), self.sender_rule(number)),
            (format!("back-{number}"), self.way_back_rule(number)),
        ]
    }

    /// The keys that lead to the chains of a peer.
    pub(super) fn peer_keys(&self, number: u16, mac: Mac) -> [(&'static str, Vec<u8>); 3] {
        let mark = self.marks.mark(number).to_ne_bytes();
        [(ZONES, mac.0.to_vec()), (SENDERS, mac.0.to_vec()), (WAYS_BACK, mark.to_vec())]
    }

    fn sender_rule(&self, number: u16) -> Rule {
        let set = rule::set_connection_mark(self.marks.mask(), self.marks.mark(number));
        Rule::new("mark the connection", [set.to_vec()])
    }

    fn way_back_rule(&self, number: u16) -> Rule {
        let set = rule::set_packet_mark(self.marks.mask(), self.marks.mark(number));
        Rule::new("mark the answer", [set.to_vec()])
    }

    /// Accepts what the mesh forwards, in a chain whose policy may be to drop it.
    ///
    /// Only plain matches: iptables-nft must be able to list the rules of its own tables.
    pub(super) fn accept_rules() -> Vec<Rule> {
        let devices = [BRIDGE, TUNNEL];
        let inward = devices.map(|device| rule::input_interface(true, device).to_vec());
        let outward = devices.map(|device| rule::output_interface(true, device).to_vec());
        let parts = inward.into_iter().chain(outward);
        parts.map(|matches| Rule::new("skep mesh", [matches, vec![rule::accept()]])).collect()
    }

    /// Adds the table with everything that is always there.
    pub(super) fn build(&self, batch: &mut Batch) {
        // Deleting a table needs it to exist; adding one that exists is fine.
        batch.add_table(TABLE);
        batch.delete_table(TABLE);
        batch.add_table(TABLE);
        for (name, kind) in self.sets() {
            batch.add_set(TABLE, name, &kind);
        }
        let (notes, kind) = self.notes();
        for name in notes {
            batch.add_expiring_set(TABLE, name, &kind, NOTED_MAX, NOTED);
        }
        for chain in self.base_chains() {
            batch.add_chain(TABLE, chain.name, Some(&chain.hook));
            for rule in &chain.rules {
                batch.add_rule(TABLE, chain.name, &rule.expressions, &rule.comment);
            }
        }
    }

    /// Adds what an operation on rules changes; operations on routing change nothing here.
    pub(super) fn change(&self, op: &Op, batch: &mut Batch) {
        match op {
            Op::AddNodeAddress(address) => {
                batch.add_elements(TABLE, NODES, &[Element::key(address_bytes(*address))]);
            }
            Op::DeleteNodeAddress(address) => {
                batch.delete_elements(TABLE, NODES, &[Element::key(address_bytes(*address))]);
            }
            Op::AddPeer(number, mac) => self.add_peer(*number, *mac, batch),
            Op::DeletePeer(number, mac) => self.delete_peer(*number, *mac, batch),
            Op::AddPort(key, backends) => {
                let chain = port_chain(*key);
                batch.add_chain(TABLE, &chain, None);
                self.balance(*key, backends, batch);
                batch.add_elements(TABLE, PORTS, &[Element::goto(port_key(*key), &chain)]);
            }
            Op::ReplaceBackends(key, backends) => {
                batch.flush_chain(TABLE, &port_chain(*key));
                self.balance(*key, backends, batch);
            }
            Op::DeletePort(key) => {
                batch.delete_elements(TABLE, PORTS, &[Element::key(port_key(*key))]);
                batch.flush_chain(TABLE, &port_chain(*key));
                batch.delete_chain(TABLE, &port_chain(*key));
            }
            Op::SetNeighbour(..)
            | Op::SetForwarding(..)
            | Op::SetRoute(..)
            | Op::AddReturnRule(_)
            | Op::DeleteReturnRule(_)
            | Op::DeleteRoute(_)
            | Op::DeleteForwarding(_)
            | Op::DeleteNeighbour(_) => {}
        }
    }

    fn add_peer(&self, number: u16, mac: Mac, batch: &mut Batch) {
        let chains = self.peer_chains(number);
        for ((chain, rule), (map, key)) in chains.iter().zip(self.peer_keys(number, mac)) {
            batch.add_chain(TABLE, chain, None);
            batch.add_rule(TABLE, chain, &rule.expressions, &rule.comment);
            batch.add_elements(TABLE, map, &[Element::goto(key, chain)]);
        }
    }

    fn delete_peer(&self, number: u16, mac: Mac, batch: &mut Batch) {
        let chains = self.peer_chains(number);
        for ((chain, _), (map, key)) in chains.iter().zip(self.peer_keys(number, mac)) {
            batch.delete_elements(TABLE, map, &[Element::key(key)]);
            batch.flush_chain(TABLE, chain);
            batch.delete_chain(TABLE, chain);
        }
    }

    /// Adds the rules of a port's chain.
    fn balance(&self, key: PortKey, backends: &[Endpoint], batch: &mut Batch) {
        let chain = port_chain(key);
        let protocol = rule::transport_protocol(key.protocol.number()).to_vec();
        if backends.is_empty() {
            let rule = [protocol, vec![self.reject(key.protocol)]];
            batch.add_rule(TABLE, &chain, &rule.concat(), "no healthy task");
            return;
        }
        let (address_type, length) = self.address_type();
        let kind = SetKind {
            key_type: TYPE_INTEGER,
            key_length: 4,
            is_host_order: true,
            value: Value::Data {
                kind: address_type << CONCATENATION_BITS | TYPE_SERVICE,
                length: length + 4,
                is_host_order: false,
            },
        };
        let element = |(index, endpoint): (u32, &Endpoint)| {
            Element::data(index.to_ne_bytes(), &endpoint_bytes(*endpoint))
        };
        let elements: Vec<Element> = (0u32..).zip(backends).map(element).collect();
        let (map, id) = batch.add_anonymous_map(TABLE, &kind, &elements);
        let modulus = u32::try_from(backends.len()).expect("a port has under 2^32 backends");
        let rule = [protocol.clone(), rule::round_robin(self.is_ipv4(), modulus, map, id).to_vec()];
        batch.add_rule(TABLE, &chain, &rule.concat(), "healthy tasks, in turn");
        let first = SocketAddr::new(backends[0].address, backends[0].port);
        let rule = [protocol, rule::translate_to(first).to_vec()];
        batch.add_rule(TABLE, &chain, &rule.concat(), MISSED);
    }

    fn reject(&self, protocol: Protocol) -> Expression {
        match protocol {
            Protocol::Tcp => rule::reject_with_reset(),
            Protocol::Udp | Protocol::Sctp if self.is_ipv4() => rule::reject_as_unreachable_ipv4(),
            Protocol::Udp | Protocol::Sctp => rule::reject_as_unreachable_ipv6(),
        }
    }
}

/// Matches packets of the tunnels of encrypted networks.
fn secure_tunnel() -> Vec<Expression> {
    let port = rule::destination_port(secure::VXLAN_PORT);
    rule::transport_protocol(UDP).into_iter().chain(port).collect()
}

fn secure_interfaces() -> impl Iterator<Item = String> {
    (0..SLOTS).map(secure::interface_name)
}

fn input(device: &str) -> Vec<Expression> {
    rule::input_interface(true, device).to_vec()
}

/// The chain of a published port.
pub(super) fn port_chain(key: PortKey) -> String {
    format!("{}-{}", key.protocol, key.port)
}

const ZONE_CHAIN: &str = "zone-";

fn zone_chain(number: u16) -> String {
    format!("{ZONE_CHAIN}{number}")
}

/// The peer whose chain of [`ZONES`] has that name.
pub(super) fn zone_chain_number(chain: &str) -> Option<u16> {
    chain.strip_prefix(ZONE_CHAIN)?.parse().ok()
}

/// A key of [`PORTS`]: each part of a concatenation fills 4 bytes.
pub(super) fn port_key(key: PortKey) -> [u8; 8] {
    let [high, low] = key.port.to_be_bytes();
    [key.protocol.number(), 0, 0, 0, high, low, 0, 0]
}

/// A key of [`NODES`].
fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The address that such bytes stand for.
pub(super) fn read_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
        16 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// A value of a port's anonymous map, or a key of [`ASKED`] and [`ANSWERED`].
pub(super) fn endpoint_bytes(endpoint: Endpoint) -> Vec<u8> {
    let mut bytes = address_bytes(endpoint.address);
    bytes.extend(endpoint.port.to_be_bytes());
    bytes.extend([0, 0]);
    bytes
}

/// The endpoint that such bytes stand for.
pub(super) fn read_endpoint(bytes: &[u8]) -> Option<Endpoint> {
    let (address, port) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    let port = u16::from_be_bytes(*port.first_chunk()?);
    Some(Endpoint { address: read_address(address)?, port })
}
