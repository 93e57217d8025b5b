//! Whether a rule is about a packet, and what it does then.
//!
//! # Sources
//!
//! `include/uapi/linux/netfilter/nf_tables.h` of the kernel (expressions and their attributes),
//! `net/netfilter/nf_tables_api.c`, `nft_parse_register` (registers of 16 bytes and of four are the same
//! bytes); `xt_tcpudp.h` and `xt_multiport.h` for matches of iptables.

use std::collections::BTreeMap;

use super::packet::{CT_STATE, Known, Packet, known};
use super::set::{Found, Set, loaded};
use crate::net::nft::{RuleRecord, VerdictRecord, attributes, be32, find, text};

const DROP: u32 = 0;
const ACCEPT: u32 = 1;
const CONTINUE: u32 = (-1_i32).cast_unsigned();
const JUMP: u32 = (-3_i32).cast_unsigned();
const GOTO: u32 = (-4_i32).cast_unsigned();
const RETURN: u32 = (-5_i32).cast_unsigned();

const REGISTERS_LENGTH: usize = 80;
const REGISTER_VERDICT: u32 = 0;
const LOOKUP_INVERTED: u32 = 1;

/// Matches of iptables that every packet passes.
const ALWAYS: [&str; 1] = ["comment"];
/// Targets of iptables after which the next rule follows.
const GOES_ON: [&str; 22] = [
    "AUDIT",
    "CHECKSUM",
    "CLASSIFY",
    "CONNMARK",
    "CONNSECMARK",
    "CT",
    "DSCP",
    "ECN",
    "HL",
    "HMARK",
    "LED",
    "LOG",
    "MARK",
    "NFLOG",
    "RATEEST",
    "SECMARK",
    "SET",
    "TCPMSS",
    "TEE",
    "TOS",
    "TRACE",
    "TTL",
];
/// Targets of iptables that translate an address and let the packet through.
const ACCEPTS: [&str; 5] = ["DNAT", "MASQUERADE", "NETMAP", "REDIRECT", "SNAT"];

/// What a rule does with a packet that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing, or it is not about this packet.
    None,
    Accepts,
    Drops,
    /// What it hands the packet to decides: a program, or a target of iptables of which nothing is known here.
    Decides(String),
    Returns,
    Jumps(String),
    GoesTo(String),
}

/// What a rule means for a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Weight {
    /// Whether it is known that the rule is about the packet.
    pub(super) is_certain: bool,
    /// Whether it compares the destination port with something that is true of the packet.
    pub(super) names_port: bool,
    pub(super) effect: Effect,
}

/// The kernel's registers, as far as they are known, and where they have the destination port.
struct Registers {
    bytes: [Option<u8>; REGISTERS_LENGTH],
    port_at: Option<usize>,
}

impl Registers {
    fn place(register: u32) -> Option<usize> {
        let place = match register {
            1..=4 => register as usize * 16,
            8..=23 => (register as usize - 4) * 4,
            _ => return None,
        };
        Some(place)
    }

    /// Loads what the last word of is filled with zeros.
    fn load(&mut self, register: u32, bytes: &[Option<u8>], is_port: bool) {
        let Some(place) = Self::place(register) else { return };
        let end = place + bytes.len().next_multiple_of(4);
        let Some(room) = self.bytes.get_mut(place..end) else { return };
        room.fill(Some(0));
        room[..bytes.len()].copy_from_slice(bytes);
        if is_port {
            self.port_at = Some(place);
        } else if self.port_at.is_some_and(|at| (place..end).contains(&at)) {
            self.port_at = None;
        }
    }

    fn from(&self, register: u32) -> &[Option<u8>] {
        let place = Self::place(register).unwrap_or(REGISTERS_LENGTH);
        self.bytes.get(place..).unwrap_or_default()
    }

    /// Whether the port is among the `length` bytes of a register.
    fn has_port(&self, register: u32, length: usize) -> bool {
        let Some(place) = Self::place(register) else { return false };
        self.port_at.is_some_and(|at| (place..place + length).contains(&at))
    }

    fn forget(&mut self) {
        self.bytes = [None; REGISTERS_LENGTH];
        self.port_at = None;
    }
}

/// What one expression says.
enum Step {
    /// It is true of the packet, or says nothing of it.
    Passes,
    /// It is true of the packet, and about its port.
    NamesPort,
    /// It is not true of the packet.
    Fails,
    /// It may be true; of its port, or of something else.
    Perhaps {
        is_about_port: bool,
    },
    Ends(Effect),
}

/// What a rule means for a packet.
pub(super) fn weigh(rule: &RuleRecord, packet: &Packet, sets: &BTreeMap<String, Set>) -> Weight {
    let mut registers = Registers { bytes: [None; REGISTERS_LENGTH], port_at: None };
    let (mut is_certain, mut names_port, mut may_name_port) = (true, false, false);
    for (name, data) in &rule.expressions {
        match step(name, data, packet, sets, &mut registers) {
            Step::Passes => {}
            Step::NamesPort => names_port = true,
            Step::Perhaps { is_about_port } => {
                is_certain = false;
                may_name_port |= is_about_port;
            }
            Step::Fails => break,
            Step::Ends(Effect::None) => {}
            Step::Ends(effect) => {
                // What looks the port up in what is not known may accept it, and is not said to drop it.
                let names_port = match effect {
                    Effect::Accepts | Effect::Decides(_) => names_port || may_name_port,
                    _ => names_port && !may_name_port,
                };
                return Weight { is_certain, names_port, effect };
            }
        }
    }
    Weight { is_certain, names_port, effect: Effect::None }
}

fn number(data: &[u8], kind: u16) -> Option<u32> {
    find(data, kind).and_then(be32)
}

fn bytes(data: &[u8], kind: u16) -> Option<&[u8]> {
    find(find(data, kind)?, 1)
}

fn step(
    name: &str,
    data: &[u8],
    packet: &Packet,
    sets: &BTreeMap<String, Set>,
    registers: &mut Registers,
) -> Step {
    const PERHAPS: Step = Step::Perhaps { is_about_port: false };
    match name {
        "payload" | "meta" | "ct" => {
            load(name, data, packet, registers);
            Step::Passes
        }
        "bitwise" => {
            bitwise(data, registers);
            Step::Passes
        }
        "cmp" => compare(data, registers),
        "range" => range(data, registers),
        "lookup" => lookup(data, sets, registers),
        "immediate" => match number(data, 1) {
            Some(REGISTER_VERDICT) | None => {
                let verdict = find(data, 2).and_then(VerdictRecord::read);
                Step::Ends(verdict.map_or(Effect::None, |verdict| effect(&verdict)))
            }
            Some(register) => {
                registers.load(register, &known(bytes(data, 2).unwrap_or_default()), false);
                Step::Passes
            }
        },
        "reject" => Step::Ends(Effect::Drops),
        "nat" | "masq" | "redir" | "fwd" | "synproxy" => Step::Ends(Effect::Accepts),
        "queue" => Step::Ends(Effect::Decides(name.to_owned())),
        "match" => matches(data, packet.port),
        "target" => Step::Ends(match find(data, 1).and_then(text) {
            Some("REJECT" | "DROP") => Effect::Drops,
            Some(name) if GOES_ON.contains(&name) => Effect::None,
            Some(name) if ACCEPTS.contains(&name) => Effect::Accepts,
            name => Effect::Decides(name.unwrap_or_default().to_owned()),
        }),
        "counter" | "log" | "notrack" | "last" | "objref" | "dup" | "tproxy" | "offload" => {
            Step::Passes
        }
        "limit" | "quota" | "connlimit" | "dynset" | "osf" => PERHAPS,
        // Loads something of which nothing is known here.
        _ => {
            registers.forget();
            Step::Passes
        }
    }
}

fn effect(verdict: &VerdictRecord) -> Effect {
    let chain = || verdict.chain.clone().unwrap_or_default();
    match verdict.code {
        DROP => Effect::Drops,
        RETURN => Effect::Returns,
        JUMP => Effect::Jumps(chain()),
        GOTO => Effect::GoesTo(chain()),
        CONTINUE => Effect::None,
        // A queue's program may accept it.
        ACCEPT.. => Effect::Accepts,
    }
}

/// Loads bytes of the packet, or what the kernel knows of it.
fn load(name: &str, data: &[u8], packet: &Packet, registers: &mut Registers) {
    const PAYLOAD_LENGTH_MAX: u32 = 64;
    let Some(register) = number(data, 1) else { return }; // It sets something.
    if name == "payload" {
        let length = number(data, 4).unwrap_or(0).min(PAYLOAD_LENGTH_MAX);
        let (base, offset) = (number(data, 2).unwrap_or(0), number(data, 3).unwrap_or(0));
        let offset = offset.min(u32::from(u16::MAX));
        let is_port = (base, offset, length) == (2, 2, 2);
        let bytes = packet.payload(base, offset as usize, length as usize);
        return registers.load(register, &bytes, is_port);
    }
    let value = match (name, number(data, 2)) {
        ("meta", Some(key)) => packet.meta(key),
        ("ct", Some(CT_STATE)) => Some(Packet::state()),
        _ => None,
    };
    match value {
        Some(value) => registers.load(register, &value, false),
        None => registers.load(register, &[None; 16], false),
    }
}

/// Masks a register. A bit that the mask clears is known.
fn bitwise(data: &[u8], registers: &mut Registers) {
    const MASK_AND_XOR: u32 = 0;
    let (source, target) = (number(data, 1).unwrap_or(0), number(data, 2).unwrap_or(0));
    let length = number(data, 3).unwrap_or(0) as usize;
    let (mask, xor) = (bytes(data, 4).unwrap_or_default(), bytes(data, 5).unwrap_or_default());
    if number(data, 6).unwrap_or(MASK_AND_XOR) != MASK_AND_XOR || mask.len() != xor.len() {
        return registers.load(target, &vec![None; length.min(16)], false);
    }
    let operands = registers.from(source).iter().zip(mask.iter().zip(xor));
    let masked: Known = operands
        .map(|(byte, (mask, xor))| match (byte, mask) {
            (_, 0) => Some(*xor),
            (Some(byte), mask) => Some((byte & mask) ^ xor),
            (None, _) => None,
        })
        .collect();
    let is_port = registers.has_port(source, mask.len());
    registers.load(target, &masked, is_port);
}

/// Compares bytes as the kernel does: as one number, the first byte the highest. `None` where unknown ones
/// decide.
fn order(left: &[Option<u8>], right: &[u8]) -> Option<std::cmp::Ordering> {
    for (left, right) in left.iter().zip(right) {
        match (*left)?.cmp(right) {
            std::cmp::Ordering::Equal => {}
            other => return Some(other),
        }
    }
    Some(std::cmp::Ordering::Equal)
}

fn judged(is_it: Option<bool>, is_about_port: bool) -> Step {
    match is_it {
        Some(true) if is_about_port => Step::NamesPort,
        Some(true) => Step::Passes,
        Some(false) => Step::Fails,
        None => Step::Perhaps { is_about_port },
    }
}

fn compare(data: &[u8], registers: &Registers) -> Step {
    let (register, operator) = (number(data, 1).unwrap_or(0), number(data, 2));
    let Some(wanted) = bytes(data, 3) else { return judged(None, false) };
    let have = registers.from(register);
    let order = order(have, wanted);
    let differs = || have.iter().zip(wanted).any(|(a, b)| a.is_some_and(|a| a != *b));
    let is_it = match operator {
        Some(0) => order.map(std::cmp::Ordering::is_eq).or_else(|| differs().then_some(false)),
        Some(1) => order.map(std::cmp::Ordering::is_ne).or_else(|| differs().then_some(true)),
        Some(2) => order.map(std::cmp::Ordering::is_lt),
        Some(3) => order.map(std::cmp::Ordering::is_le),
        Some(4) => order.map(std::cmp::Ordering::is_gt),
        Some(5) => order.map(std::cmp::Ordering::is_ge),
        _ => None,
    };
    // A rule about all other ports names none.
    judged(is_it, operator != Some(1) && registers.has_port(register, wanted.len()))
}

fn range(data: &[u8], registers: &Registers) -> Step {
    let (register, operator) = (number(data, 1).unwrap_or(0), number(data, 2));
    let (Some(from), Some(to)) = (bytes(data, 3), bytes(data, 4)) else {
        return judged(None, false);
    };
    let have = registers.from(register);
    let is_inside =
        order(have, from).zip(order(have, to)).map(|(from, to)| from.is_ge() && to.is_le());
    let is_it = if operator == Some(0) { is_inside } else { is_inside.map(|inside| !inside) };
    judged(is_it, operator == Some(0) && registers.has_port(register, from.len()))
}

fn lookup(data: &[u8], sets: &BTreeMap<String, Set>, registers: &mut Registers) -> Step {
    const KEY_LENGTH_MAX: usize = 64;
    let register = number(data, 2).unwrap_or(0);
    let is_inverted = number(data, 5).is_some_and(|flags| flags & LOOKUP_INVERTED != 0);
    let set = find(data, 1).and_then(text).and_then(|name| sets.get(name));
    let key = registers.from(register);
    let names_port = registers.has_port(register, key.len().min(KEY_LENGTH_MAX));
    match (set.map_or(Found::Unknown, |set| set.find(key)), is_inverted) {
        (Found::Unknown, _) => Step::Perhaps { is_about_port: names_port },
        (Found::Absent, false) | (Found::Member(..), true) => Step::Fails,
        (Found::Absent, true) => Step::Passes,
        (Found::Member(verdict, value), false) => match (number(data, 3), verdict) {
            (Some(REGISTER_VERDICT), Some(verdict)) => Step::Ends(effect(verdict)),
            (Some(target), _) => {
                registers.load(target, &loaded(value.unwrap_or_default()), false);
                judged(Some(true), names_port)
            }
            (None, _) => judged(Some(true), names_port),
        },
    }
}

/// A match of iptables.
fn matches(data: &[u8], port: u16) -> Step {
    let info = find(data, 3).unwrap_or_default();
    match find(data, 1).and_then(text) {
        // `struct xt_udp`: two source ports, two destination ports, in the host's order; what is inverted.
        Some("udp") => {
            let ports = info.get(4..8).and_then(|ports| ports.first_chunk::<4>());
            let Some([low0, low1, high0, high1]) = ports else { return judged(None, true) };
            let low = u16::from_ne_bytes([*low0, *low1]);
            let high = u16::from_ne_bytes([*high0, *high1]);
            let [source_low, source_high] = [info.get(..2), info.get(2..4)];
            let any_source =
                (source_low, source_high) == (Some(&[0, 0][..]), Some(&[255, 255][..]));
            let is_inverted = info.get(8).is_some_and(|flags| *flags != 0);
            match (any_source && !is_inverted, (low, high)) {
                // A rule about every port names none.
                (true, (0, u16::MAX)) => Step::Passes,
                (true, _) => judged(Some((low..=high).contains(&port)), true),
                (false, _) => judged(None, false),
            }
        }
        Some("multiport") => judged(None, true),
        Some("tcp" | "sctp" | "icmp" | "icmp6" | "dccp") => Step::Fails,
        Some(name) if ALWAYS.contains(&name) => Step::Passes,
        _ => judged(None, false),
    }
}

/// Whether a rule looks something up in the set of that name.
pub(super) fn looks_up(rule: &RuleRecord, set: &str) -> bool {
    let lookups = rule.expressions.iter().filter(|(name, _)| name == "lookup");
    let mut names = lookups.filter_map(|(_, data)| find(data, 1).and_then(text));
    names.any(|name| name == set)
}

impl VerdictRecord {
    /// A verdict among data.
    fn read(value: &[u8]) -> Option<Self> {
        attributes(value).find_map(|(_, verdict)| Self::of(verdict))
    }
}
