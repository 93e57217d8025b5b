//! Expressions of nftables rules: small instructions over 128-bit registers.
//!
//! Only what skep's rules need. Register 1 is the one that all of them work in; a concatenation
//! goes on in register 9, the second 32-bit part of register 1.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use super::attribute::Attributes;
use super::uapi::{
    NFPROTO_IPV4, NFPROTO_IPV6, NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_EXPR_DATA, NFTA_EXPR_NAME,
    NFTA_VERDICT_CHAIN, NFTA_VERDICT_CODE,
};

const REGISTER_VERDICT: u32 = 0;
const REGISTER: u32 = 1;
const REGISTER_SECOND: u32 = 9;
/// Behind the four parts of register 1, which an IPv6 address fills.
const REGISTER_FIFTH: u32 = 12;

const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_IIFTYPE: u32 = 8;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
/// The type of an Ethernet interface, which has Ethernet addresses to match.
const ARPHRD_ETHER: u16 = 1;

const CT_STATE: u32 = 0;
const CT_DIRECTION: u32 = 1;
const CT_STATUS: u32 = 2;
const CT_MARK: u32 = 3;
const CT_PROTOCOL: u32 = 10;
const CT_PROTO_SRC: u32 = 11;
const CT_PROTO_DST: u32 = 12;
const CT_ZONE: u32 = 17;
const CT_SRC_IP: u32 = 19;
const CT_SRC_IP6: u32 = 21;
/// `NF_CT_STATE_BIT(IP_CT_RELATED)`.
const CT_STATE_RELATED: u32 = 1 << 2;
/// `NF_CT_STATE_BIT(IP_CT_NEW)`.
const CT_STATE_NEW: u32 = 1 << 3;
/// `IPS_ASSURED`: the handshake was completed.
const CT_STATUS_ASSURED: u32 = 1 << 2;
/// `IPS_DST_NAT`.
const CT_STATUS_DNAT: u32 = 1 << 5;
const DIRECTION_ORIGINAL: u8 = 0;
const DIRECTION_REPLY: u8 = 1;

const LINK_HEADER: u32 = 0;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

const INTERFACE_NAME_LENGTH: usize = 16;
const VERDICT_DROP: u32 = 0;
const VERDICT_ACCEPT: u32 = 1;
/// `NFT_GOTO`, -4.
const VERDICT_GOTO: u32 = 0xffff_fffc;

/// One expression of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expression(pub(super) Attributes);

impl Expression {
    /// The expression's encoding.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

fn named(name: &str, data: &Attributes) -> Expression {
    Expression(Attributes::new().text(NFTA_EXPR_NAME, name).nested(NFTA_EXPR_DATA, data))
}

fn value(bytes: &[u8]) -> Attributes {
    Attributes::new().raw(NFTA_DATA_VALUE, bytes)
}

/// The encoding of a verdict that goes to another chain for good.
pub fn goto(chain: &str) -> Attributes {
    let code = Attributes::new().be32(NFTA_VERDICT_CODE, VERDICT_GOTO);
    Attributes::new().nested(NFTA_DATA_VERDICT, &code.text(NFTA_VERDICT_CHAIN, chain))
}

fn compare(is_equal: bool, bytes: &[u8]) -> Expression {
    let list = Attributes::new().be32(1, REGISTER).be32(2, u32::from(!is_equal));
    named("cmp", &list.nested(3, &value(bytes)))
}

fn meta(key: u32) -> Expression {
    named("meta", &Attributes::new().be32(2, key).be32(1, REGISTER))
}

fn connection(key: u32) -> Expression {
    named("ct", &Attributes::new().be32(2, key).be32(1, REGISTER))
}

/// A part of a connection's addresses in one direction.
fn connection_of(register: u32, key: u32, direction: u8) -> Expression {
    named("ct", &Attributes::new().be32(2, key).be32(1, register).raw(3, &[direction]))
}

fn payload(register: u32, base: u32, offset: u32, length: u32) -> Expression {
    let list = Attributes::new().be32(1, register).be32(2, base).be32(3, offset);
    named("payload", &list.be32(4, length))
}

fn bitwise(mask: &[u8], xor: &[u8]) -> Expression {
    let length = u32::try_from(mask.len()).expect("masks have 16 bytes at most");
    let list = Attributes::new().be32(1, REGISTER).be32(2, REGISTER).be32(3, length);
    named("bitwise", &list.nested(4, &value(mask)).nested(5, &value(xor)))
}

fn lookup(set: &str, destination: Option<u32>, is_inverted: bool) -> Expression {
    let mut list = Attributes::new().text(1, set).be32(2, REGISTER);
    if let Some(destination) = destination {
        list = list.be32(3, destination);
    }
    named("lookup", &if is_inverted { list.be32(5, 1) } else { list })
}

fn verdict(code: u32) -> Expression {
    let code = Attributes::new().be32(NFTA_VERDICT_CODE, code);
    let data = Attributes::new().nested(NFTA_DATA_VERDICT, &code);
    named("immediate", &Attributes::new().be32(1, REGISTER_VERDICT).nested(2, &data))
}

fn name_bytes(name: &str) -> [u8; INTERFACE_NAME_LENGTH] {
    let mut bytes = [0; INTERFACE_NAME_LENGTH];
    let length = name.len().min(INTERFACE_NAME_LENGTH - 1);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

/// `iifname NAME` or `iifname != NAME`.
pub fn input_interface(is_equal: bool, name: &str) -> [Expression; 2] {
    [meta(META_IIFNAME), compare(is_equal, &name_bytes(name))]
}

/// `oifname NAME` or `oifname != NAME`.
pub fn output_interface(is_equal: bool, name: &str) -> [Expression; 2] {
    [meta(META_OIFNAME), compare(is_equal, &name_bytes(name))]
}

/// `meta l4proto NUMBER`.
pub fn transport_protocol(number: u8) -> [Expression; 2] {
    [meta(META_L4PROTO), compare(true, &[number])]
}

/// `th dport PORT`.
pub fn destination_port(port: u16) -> [Expression; 2] {
    [payload(REGISTER, TRANSPORT_HEADER, 2, 2), compare(true, &port.to_be_bytes())]
}

/// The network number in a VXLAN header.
pub fn vxlan_number(vni: u32) -> [Expression; 2] {
    let [_, number @ ..] = vni.to_be_bytes();
    [payload(REGISTER, TRANSPORT_HEADER, 12, 3), compare(true, &number)]
}

/// A network number in a VXLAN header that is `vni` or higher.
pub fn vxlan_number_from(vni: u32) -> [Expression; 2] {
    const GREATER_OR_EQUAL: u32 = 5;
    let [_, number @ ..] = vni.to_be_bytes();
    let list = Attributes::new().be32(1, REGISTER).be32(2, GREATER_OR_EQUAL);
    let at_least = named("cmp", &list.nested(3, &value(&number)));
    [payload(REGISTER, TRANSPORT_HEADER, 12, 3), at_least]
}

/// `ip daddr vmap @MAP` or `ip6 daddr vmap @MAP`, in a table of both families.
pub fn destination_to_verdict(is_ipv4: bool, map: &str) -> [Expression; 4] {
    let (family, offset, length) =
        if is_ipv4 { (NFPROTO_IPV4, 16, 4) } else { (NFPROTO_IPV6, 24, 16) };
    [
        meta(META_NFPROTO),
        compare(true, &[family]),
        payload(REGISTER, NETWORK_HEADER, offset, length),
        lookup(map, Some(REGISTER_VERDICT), false),
    ]
}

/// `ip saddr`, in a table of IPv4.
fn source() -> Expression {
    payload(REGISTER, NETWORK_HEADER, 12, 4)
}

/// `ip6 saddr`, in a table of IPv6.
fn source6() -> Expression {
    payload(REGISTER, NETWORK_HEADER, 8, 16)
}

/// `ip saddr @SET` or `ip saddr != @SET`.
pub fn source_in(is_member: bool, set: &str) -> [Expression; 2] {
    [source(), lookup(set, None, !is_member)]
}

/// `ip6 saddr @SET`, in a table of IPv6.
pub fn source6_in(set: &str) -> [Expression; 2] {
    [source6(), lookup(set, None, false)]
}

/// `ip saddr NETWORK` or `ip6 saddr NETWORK`, in a table of its family.
pub fn source_network(network: IpNet) -> [Expression; 3] {
    match network {
        IpNet::V4(network) => [
            source(),
            bitwise(&network.netmask().octets(), &[0; 4]),
            compare(true, &network.network().octets()),
        ],
        IpNet::V6(network) => [
            source6(),
            bitwise(&network.netmask().octets(), &[0; 16]),
            compare(true, &network.network().octets()),
        ],
    }
}

/// `ip daddr ADDRESS`.
pub fn destination(address: Ipv4Addr) -> [Expression; 2] {
    [payload(REGISTER, NETWORK_HEADER, 16, 4), compare(true, &address.octets())]
}

/// `dnat to ADDRESS:PORT`.
pub fn translate_to(address: SocketAddr) -> [Expression; 3] {
    let (family, second) = address_and_port(address.is_ipv4());
    let nat = destination_nat(family).be32(5, second);
    let port = load(second, &address.port().to_be_bytes());
    [load_address(address.ip()), port, named("nat", &nat)]
}

/// `dnat to ADDRESS`: protocol and port stay as they are.
pub fn translate_to_address(address: IpAddr) -> [Expression; 2] {
    let (family, _) = address_and_port(address.is_ipv4());
    [load_address(address), named("nat", &destination_nat(family))]
}

fn load_address(address: IpAddr) -> Expression {
    match address {
        IpAddr::V4(address) => load(REGISTER, &address.octets()),
        IpAddr::V6(address) => load(REGISTER, &address.octets()),
    }
}

fn load(register: u32, bytes: &[u8]) -> Expression {
    named("immediate", &Attributes::new().be32(1, register).nested(2, &value(bytes)))
}

/// The protocol family of an address in [`REGISTER`], and the register of a port behind it.
fn address_and_port(is_ipv4: bool) -> (u8, u32) {
    if is_ipv4 { (NFPROTO_IPV4, REGISTER_SECOND) } else { (NFPROTO_IPV6, REGISTER_FIFTH) }
}

/// `ip daddr != 127.0.0.0/8`.
pub fn destination_is_not_loopback() -> [Expression; 2] {
    let first_byte = Ipv4Addr::LOCALHOST.octets()[0];
    [payload(REGISTER, NETWORK_HEADER, 16, 1), compare(false, &[first_byte])]
}

/// `ip6 daddr != ::1`, in a table of IPv6.
pub fn destination6_is_not_loopback() -> [Expression; 2] {
    [payload(REGISTER, NETWORK_HEADER, 24, 16), compare(false, &Ipv6Addr::LOCALHOST.octets())]
}

/// `@th,OFFSET,LENGTH BYTES`, where the offset is in bytes.
pub fn transport_bytes(offset: u32, bytes: &[u8]) -> [Expression; 2] {
    let length = u32::try_from(bytes.len()).expect("a register has 16 bytes");
    [payload(REGISTER, TRANSPORT_HEADER, offset, length), compare(true, bytes)]
}

/// `add @SET { @th,OFFSET,LENGTH counter }`, in bytes.
pub fn count_transport_bytes_in(set: &str, offset: u32, length: u32) -> [Expression; 2] {
    let counter = Attributes::new().text(NFTA_EXPR_NAME, "counter");
    let list = Attributes::new().text(1, set).be32(3, 0).be32(4, REGISTER);
    [
        payload(REGISTER, TRANSPORT_HEADER, offset, length),
        named("dynset", &list.nested(7, &counter)),
    ]
}

/// `fib daddr type local`.
pub fn destination_is_local() -> [Expression; 2] {
    const RESULT_ADDRTYPE: u32 = 3;
    const FLAG_DADDR: u32 = 2;
    const RTN_LOCAL: u32 = 2;
    let list = Attributes::new().be32(1, REGISTER).be32(2, RESULT_ADDRTYPE).be32(3, FLAG_DADDR);
    [named("fib", &list), compare(true, &RTN_LOCAL.to_ne_bytes())]
}

/// `ct state new`.
pub fn connection_is_new() -> [Expression; 3] {
    let mask = CT_STATE_NEW.to_ne_bytes();
    [connection(CT_STATE), bitwise(&mask, &[0; 4]), compare(false, &[0; 4])]
}

/// `ct status dnat` or `ct status ! dnat`.
pub fn connection_is_published(is_published: bool) -> [Expression; 3] {
    let mask = CT_STATUS_DNAT.to_ne_bytes();
    [connection(CT_STATUS), bitwise(&mask, &[0; 4]), compare(!is_published, &[0; 4])]
}

/// `ct direction reply`.
pub fn connection_is_reply() -> [Expression; 2] {
    [connection(CT_DIRECTION), compare(true, &[DIRECTION_REPLY])]
}

/// `ct direction original`.
pub fn connection_is_original() -> [Expression; 2] {
    [connection(CT_DIRECTION), compare(true, &[DIRECTION_ORIGINAL])]
}

/// `ct reply ip saddr NETWORK`, or `ct reply ip6 saddr NETWORK`.
pub fn connection_is_answered_from(network: IpNet) -> [Expression; 3] {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (mask, network_address) = (bytes(network.netmask()), bytes(network.network()));
    [
        connection_of(REGISTER, source_key(network.addr().is_ipv4()), DIRECTION_REPLY),
        bitwise(&mask, &vec![0; mask.len()]),
        compare(true, &network_address),
    ]
}

fn source_key(is_ipv4: bool) -> u32 {
    if is_ipv4 { CT_SRC_IP } else { CT_SRC_IP6 }
}

/// `add @SET { ct reply ip saddr . ct reply proto-src . ct original proto-dst . ct protocol counter }`, in a
/// table of IPv4, or of IPv6 with `ct reply ip6 saddr`.
pub fn count_connection_in(is_ipv4: bool, set: &str) -> [Expression; 5] {
    const OPERATION_ADD: u32 = 0;
    let counter = Attributes::new().text(NFTA_EXPR_NAME, "counter");
    let list = Attributes::new().text(1, set).be32(3, OPERATION_ADD).be32(4, REGISTER);
    let behind = if is_ipv4 { REGISTER_SECOND } else { REGISTER_FIFTH };
    [
        connection_of(REGISTER, source_key(is_ipv4), DIRECTION_REPLY),
        connection_of(behind, CT_PROTO_SRC, DIRECTION_REPLY),
        connection_of(behind + 1, CT_PROTO_DST, DIRECTION_ORIGINAL),
        connection_of(behind + 2, CT_PROTOCOL, DIRECTION_ORIGINAL),
        named("dynset", &list.nested(7, &counter)),
    ]
}

/// `tcp flags rst`, of a connection whose handshake was not completed.
pub fn connection_is_refused() -> [Expression; 8] {
    const TCP: u8 = 6;
    const RST: u8 = 1 << 2;
    let [protocol, is_tcp] = transport_protocol(TCP);
    let assured = CT_STATUS_ASSURED.to_ne_bytes();
    [
        protocol,
        is_tcp,
        payload(REGISTER, TRANSPORT_HEADER, 13, 1),
        bitwise(&[RST], &[0]),
        compare(true, &[RST]),
        connection(CT_STATUS),
        bitwise(&assured, &[0; 4]),
        compare(true, &[0; 4]),
    ]
}

/// `tcp flags & (fin | syn | rst | ack) == syn`: a request for a connection; or `== syn | ack`: the answer
/// that takes it.
pub fn tcp_handshake(is_answer: bool) -> [Expression; 5] {
    const TCP: u8 = 6;
    const FIN: u8 = 1;
    const SYN: u8 = 1 << 1;
    const RST: u8 = 1 << 2;
    const ACK: u8 = 1 << 4;
    let [protocol, is_tcp] = transport_protocol(TCP);
    [
        protocol,
        is_tcp,
        payload(REGISTER, TRANSPORT_HEADER, 13, 1),
        bitwise(&[FIN | SYN | RST | ACK], &[0]),
        compare(true, &[if is_answer { SYN | ACK } else { SYN }]),
    ]
}

/// `update @SET { ip daddr . th dport }`, in a table of IPv4, or of IPv6 with `ip6 daddr`.
pub fn note_destination_in(is_ipv4: bool, set: &str) -> [Expression; 3] {
    note_in(is_ipv4, if is_ipv4 { 16 } else { 24 }, 2, set)
}

/// `update @SET { ip saddr . th sport }`, in a table of IPv4, or of IPv6 with `ip6 saddr`.
pub fn note_source_in(is_ipv4: bool, set: &str) -> [Expression; 3] {
    note_in(is_ipv4, if is_ipv4 { 12 } else { 8 }, 0, set)
}

fn note_in(is_ipv4: bool, address: u32, port: u32, set: &str) -> [Expression; 3] {
    const OPERATION_UPDATE: u32 = 1;
    let (length, register) = if is_ipv4 { (4, REGISTER_SECOND) } else { (16, REGISTER_FIFTH) };
    let list = Attributes::new().text(1, set).be32(3, OPERATION_UPDATE).be32(4, REGISTER);
    [
        payload(REGISTER, NETWORK_HEADER, address, length),
        payload(register, TRANSPORT_HEADER, port, 2),
        named("dynset", &list),
    ]
}

/// `ct state related icmp type destination-unreachable icmp code != frag-needed`, or in a table of IPv6
/// `ct state related icmpv6 type destination-unreachable`: a packet that is too big has a type of its own.
pub fn connection_is_unreachable(is_ipv4: bool) -> Vec<Expression> {
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;
    const DESTINATION_UNREACHABLE: u8 = 3;
    const DESTINATION_UNREACHABLE_6: u8 = 1;
    const FRAGMENTATION_NEEDED: u8 = 4;
    let (protocol, unreachable) = match is_ipv4 {
        true => (ICMP, DESTINATION_UNREACHABLE),
        false => (ICMPV6, DESTINATION_UNREACHABLE_6),
    };
    let mut expressions = transport_protocol(protocol).to_vec();
    expressions.extend([
        connection(CT_STATE),
        bitwise(&CT_STATE_RELATED.to_ne_bytes(), &[0; 4]),
        compare(false, &[0; 4]),
        payload(REGISTER, TRANSPORT_HEADER, 0, 1),
        compare(true, &[unreachable]),
    ]);
    if is_ipv4 {
        let code = payload(REGISTER, TRANSPORT_HEADER, 1, 1);
        expressions.extend([code, compare(false, &[FRAGMENTATION_NEEDED])]);
    }
    expressions
}

/// `meta l4proto . th dport vmap @MAP`.
pub fn port_to_verdict(map: &str) -> [Expression; 3] {
    [
        meta(META_L4PROTO),
        payload(REGISTER_SECOND, TRANSPORT_HEADER, 2, 2),
        lookup(map, Some(REGISTER_VERDICT), false),
    ]
}

/// `ether saddr vmap @MAP`.
pub fn sender_to_verdict(map: &str) -> [Expression; 4] {
    [
        meta(META_IIFTYPE),
        compare(true, &ARPHRD_ETHER.to_ne_bytes()),
        payload(REGISTER, LINK_HEADER, 6, 6),
        lookup(map, Some(REGISTER_VERDICT), false),
    ]
}

/// `ct mark & MASK vmap @MAP`.
pub fn connection_mark_to_verdict(mask: u32, map: &str) -> [Expression; 3] {
    [
        connection(CT_MARK),
        bitwise(&mask.to_ne_bytes(), &[0; 4]),
        lookup(map, Some(REGISTER_VERDICT), false),
    ]
}

/// `ct original zone set ZONE`.
pub fn set_zone(zone: u16) -> [Expression; 2] {
    let set = Attributes::new().be32(2, CT_ZONE).be32(4, REGISTER);
    let zone = Attributes::new().be32(1, REGISTER).nested(2, &value(&zone.to_ne_bytes()));
    [named("immediate", &zone), named("ct", &set.raw(3, &[DIRECTION_ORIGINAL]))]
}

/// `ct mark set ct mark & ~MASK | MARK`.
pub fn set_connection_mark(mask: u32, mark: u32) -> [Expression; 3] {
    let set = Attributes::new().be32(2, CT_MARK).be32(4, REGISTER);
    [connection(CT_MARK), bitwise(&(!mask).to_ne_bytes(), &mark.to_ne_bytes()), named("ct", &set)]
}

/// `meta mark set meta mark & ~MASK | MARK`.
pub fn set_packet_mark(mask: u32, mark: u32) -> [Expression; 3] {
    let set = Attributes::new().be32(2, META_MARK).be32(3, REGISTER);
    [meta(META_MARK), bitwise(&(!mask).to_ne_bytes(), &mark.to_ne_bytes()), named("meta", &set)]
}

/// `dnat to numgen inc mod MODULUS map @MAP`, where the map is an anonymous one of this batch, to
/// addresses of one family and ports.
pub fn round_robin(is_ipv4: bool, modulus: u32, map: &str, map_id: u32) -> [Expression; 3] {
    let (family, port) = address_and_port(is_ipv4);
    let [numgen, lookup] = take_turns(modulus, map, map_id);
    [numgen, lookup, named("nat", &destination_nat(family).be32(5, port))]
}

/// The same to addresses alone: protocol and port stay as they are.
pub fn round_robin_addresses(
    is_ipv4: bool,
    modulus: u32,
    map: &str,
    map_id: u32,
) -> [Expression; 3] {
    let [numgen, lookup] = take_turns(modulus, map, map_id);
    let (family, _) = address_and_port(is_ipv4);
    let nat = destination_nat(family);
    [numgen, lookup, named("nat", &nat)]
}

fn take_turns(modulus: u32, map: &str, map_id: u32) -> [Expression; 2] {
    const INCREMENTAL: u32 = 0;
    let numgen = Attributes::new().be32(1, REGISTER).be32(2, modulus).be32(3, INCREMENTAL);
    let lookup = Attributes::new().text(1, map).be32(2, REGISTER).be32(3, REGISTER);
    [named("numgen", &numgen.be32(4, 0)), named("lookup", &lookup.be32(4, map_id))]
}

fn destination_nat(family: u8) -> Attributes {
    const NAT_DESTINATION: u32 = 1;
    let nat = Attributes::new().be32(1, NAT_DESTINATION).be32(2, u32::from(family));
    nat.be32(3, REGISTER)
}

/// `masquerade`.
pub fn masquerade() -> Expression {
    named("masq", &Attributes::new())
}

/// `reject with tcp reset`.
pub fn reject_with_reset() -> Expression {
    const TCP_RESET: u32 = 1;
    named("reject", &Attributes::new().be32(1, TCP_RESET).raw(2, &[0]))
}

/// `reject with icmpv6 port-unreachable`, in a table of IPv6.
pub fn reject_as_unreachable_ipv6() -> Expression {
    const ICMP_UNREACHABLE: u32 = 0;
    const PORT_UNREACHABLE: u8 = 4;
    let list = Attributes::new().be32(1, ICMP_UNREACHABLE);
    named("reject", &list.raw(2, &[PORT_UNREACHABLE]))
}

/// `reject with icmp port-unreachable`.
pub fn reject_as_unreachable_ipv4() -> Expression {
    const ICMP_UNREACHABLE: u32 = 0;
    const PORT_UNREACHABLE: u8 = 3;
    let list = Attributes::new().be32(1, ICMP_UNREACHABLE);
    named("reject", &list.raw(2, &[PORT_UNREACHABLE]))
}

/// `reject with icmpx port-unreachable`, in a table of both families.
pub fn reject_as_unreachable() -> Expression {
    const ICMPX_UNREACHABLE: u32 = 2;
    const PORT_UNREACHABLE: u8 = 1;
    let list = Attributes::new().be32(1, ICMPX_UNREACHABLE);
    named("reject", &list.raw(2, &[PORT_UNREACHABLE]))
}

/// `accept`.
pub fn accept() -> Expression {
    verdict(VERDICT_ACCEPT)
}

/// `drop`.
pub fn discard() -> Expression {
    verdict(VERDICT_DROP)
}
