//! Rules as `nft` writes them, in network namespaces of this kernel.

use std::io::Write as _;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;

use super::*;

/// A packet of the tunnel to the other node, or from it.
fn packet(is_incoming: bool) -> Packet {
    let (own, peer) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
    let (source, destination) = if is_incoming { (peer, own) } else { (own, peer) };
    Packet {
        source,
        destination,
        source_port: None,
        port: 4790,
        interface: Interface { name: "eth0".into(), index: 2 },
        is_incoming,
    }
}

fn feed(program: &str, arguments: &[&str], input: &str) {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{input}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What is in the way in a namespace with these rules, the incoming direction first. Handles are cut out.
fn found(
    program: &'static str,
    arguments: &'static [&'static str],
    rules: &str,
) -> [Vec<String>; 2] {
    let rules = rules.to_owned();
    let read = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        feed(program, arguments, &rules);
        let ruleset = Ruleset::read().unwrap();
        [true, false].map(|is_incoming| {
            let obstacles = ruleset.obstacles(&packet(is_incoming)).into_iter();
            let without_handle = |text: String| match text.split_once(" (handle ") {
                Some((before, rest)) => format!("{before}{}", rest.split_once(')').unwrap().1),
                None => text,
            };
            obstacles.map(without_handle).collect()
        })
    };
    std::thread::spawn(read).join().unwrap()
}

fn is_root() -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        eprintln!("skipped: needs root");
    }
    is_root
}

const SETS: &str = "
    set blocked { type inet_service; elements = { 53, 4790 }; }
    set others { type inet_service; elements = { 53, 123 }; }
    set ranges { type inet_service; flags interval; elements = { 1000-2000, 4700-4800 }; }
    set gap { type inet_service; flags interval; elements = { 1000-4789, 4791-5000 }; }
    set bad { type ipv4_addr; flags interval; elements = { 198.51.100.0/24, 192.0.2.2 }; }
    set good { type ipv4_addr; elements = { 192.0.2.7 }; }
    set pairs { type ipv4_addr . inet_service; elements = { 192.0.2.2 . 4790 }; }
    set boxes { type ipv4_addr . inet_service; flags interval; elements = { 192.0.2.0/24 . 4700-4800 }; }
    map ports { type inet_service : verdict; elements = { 53 : accept, 4790 : drop }; }
    map from { type ipv4_addr : verdict; flags interval; elements = { 192.0.2.0/30 : jump inner }; }
    chain inner { udp dport 4000-5000 drop; }
";

/// The first rule of `chain in`, as a decision about the packet that comes in.
#[test]
fn a_rule_drops_what_it_is_about() {
    if !is_root() {
        return;
    }
    const IN: &str = "a rule of chain in in table inet fw drops UDP 4790";
    const INNER: &str = "a rule of chain inner in table inet fw drops UDP 4790";
    for (rules, expect) in [
        ("udp dport 4790 drop", IN),
        ("udp dport 4790 reject", IN),
        ("udp dport 4791 drop", ""),
        ("udp dport != 4790 drop", ""),
        ("udp dport >= 4790 counter drop", IN),
        ("udp dport 4791-4795 drop", ""),
        ("tcp dport 4790 drop", ""),
        ("th dport 4790 drop", IN),
        ("udp dport @blocked drop", IN),
        ("udp dport @others drop", ""),
        ("udp dport != @others drop", IN),
        ("udp dport @ranges drop", IN),
        ("udp dport @gap drop", ""),
        ("udp dport { 53, 4790 } drop", IN),
        ("udp dport { 53, 4000-5000 } drop", IN),
        ("udp dport { 53, 4000-4789 } drop", ""),
        ("udp dport != { 53, 4790 } drop", ""),
        ("ip saddr @bad drop", IN),
        ("ip saddr @good drop", ""),
        ("ip saddr != @good drop", IN),
        ("ip daddr @bad drop", ""),
        ("ip saddr 192.0.2.0/28 drop", IN),
        ("ip saddr 192.0.2.16/28 drop", ""),
        ("ip saddr . udp dport @pairs drop", IN),
        ("ip daddr . udp dport @pairs drop", ""),
        ("ip saddr . udp dport @boxes drop", IN),
        ("udp dport vmap @ports", IN),
        ("udp dport vmap { 53 : drop, * : accept } drop", ""),
        ("udp dport vmap { 53 : accept, * : drop }", IN),
        ("ip saddr vmap @from", INNER),
        ("iifname eth0 drop", IN),
        ("iifname \"eth*\" drop", IN),
        ("iifname eth1 udp dport 4790 drop", ""),
        ("iifname != lo drop", IN),
        ("ct state invalid drop", ""),
        ("ct state vmap { established : accept, invalid : drop }", ""),
        ("ct state new meta l4proto udp drop", IN),
        ("meta mark 7 drop", ""),
        ("meta mark 7 udp dport 4790 drop", IN),
        ("limit rate 5/second accept; drop", IN),
        ("udp dport 4790 accept; udp dport 4790 drop", ""),
        ("meta mark 7 udp dport 4790 accept; drop", ""),
        ("meta mark 7 udp sport 9 accept; drop", IN),
        ("jump inner; accept", INNER),
        ("udp dport 53 jump inner", ""),
        ("udp dport 4790 return; drop", ""),
    ] {
        let body = rules.replace("; ", "\n");
        let text = format!(
            "table inet fw {{ {SETS}\n chain in {{ type filter hook input priority 0;\n {body}\n }}\n }}"
        );
        let [incoming, outgoing] = found("nft", &["-f", "-"], &text);
        assert_eq!(incoming.join(", "), expect, "{rules}");
        assert_eq!(outgoing, [""; 0], "{rules}");
    }
}

#[test]
fn a_policy_is_in_the_way_where_nothing_accepts() {
    if !is_root() {
        return;
    }
    const POLICY: &str =
        "chain in in table ip fw has the policy drop, and no rule there accepts UDP 4790";
    for (rules, expect) in [
        ("", POLICY),
        ("iif lo accept; ct state established,related accept; tcp dport 22 accept", POLICY),
        ("udp dport 4789-4791 accept", ""),
        ("udp dport { 53, 4790 } accept", ""),
        ("meta mark 7 udp dport 4790 accept", ""),
        ("ip saddr 192.0.2.0/24 accept", ""),
        ("iifname eth0 accept", ""),
        ("udp dport 4791 accept", POLICY),
    ] {
        let body = rules.replace("; ", "\n");
        let text = format!(
            "table ip fw {{ chain in {{ type filter hook input priority 0; policy drop;\n {body}\n }}\n }}"
        );
        let [incoming, _] = found("nft", &["-f", "-"], &text);
        assert_eq!(incoming.join(", "), expect, "{rules}");
    }
}

#[test]
fn obstacles_stand_in_the_way_of_their_own_direction() {
    if !is_root() {
        return;
    }
    let rules = "table ip fw {
        chain early { type filter hook prerouting priority -300; udp dport 4790 drop; }
        chain through { type filter hook forward priority 0; policy drop; }
        chain out { type filter hook output priority 0; oifname eth0 ip daddr 192.0.2.2 drop; }
        chain unused { udp dport 4790 drop; }
    }
    table ip skep-mesh { chain own { type filter hook input priority 0; policy drop; }
    }";
    let [incoming, outgoing] = found("nft", &["-f", "-"], rules);
    assert_eq!(incoming, ["a rule of chain early in table ip fw drops UDP 4790"]);
    assert_eq!(outgoing, ["a rule of chain out in table ip fw drops UDP 4790"]);
}

#[test]
fn rules_of_iptables_are_read() {
    if !is_root() {
        return;
    }
    const QUEUE: &str =
        "UDP 4790 may be dropped by target NFQUEUE of a rule of chain INPUT in table ip filter";
    const IN: &str = "a rule of chain INPUT in table ip filter drops UDP 4790";
    for (rules, expect) in [
        ("-A INPUT -p udp --dport 4790 -j DROP", IN),
        ("-A INPUT -p udp --dport 4790:4799 -m comment --comment x -j REJECT", IN),
        ("-A INPUT -s 192.0.2.2 -j DROP", IN),
        ("-A INPUT -s 192.0.2.3 -p udp --dport 4790 -j DROP", ""),
        ("-A INPUT -p udp -m multiport --dports 53,4790 -j ACCEPT\n-A INPUT -j DROP", ""),
        ("-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\n-A INPUT -j DROP", IN),
        ("-A INPUT -p tcp --dport 4790 -j DROP", ""),
        ("-A INPUT -p udp --dport 4790 -j NFQUEUE --queue-num 1", QUEUE),
        ("-A INPUT -p udp --dport 4791 -j NFQUEUE --queue-num 1", ""),
    ] {
        let text = format!("*filter\n{rules}\nCOMMIT\n");
        let [incoming, _] = found("iptables-nft-restore", &[], &text);
        assert_eq!(incoming.join(", "), expect, "{rules}");
    }
}

#[test]
fn a_target_that_is_not_known_may_drop_what_it_is_given() {
    let attribute = |value: &[u8]| {
        let length = u16::try_from(value.len() + 4).unwrap();
        let mut bytes = [length.to_ne_bytes(), 1_u16.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let rule = |handle: u64, kind: &str, target: &str| {
        let name = [target.as_bytes(), &[0]].concat();
        RuleRecord {
            chain: "INPUT".into(),
            handle,
            comment: None,
            expressions: vec![(kind.into(), attribute(&name))],
        }
    };
    const DROPS: &str = "a rule of chain INPUT in table ip filter (handle 2) drops UDP 4790";
    for (kind, target, expect) in [
        (
            "queue",
            "",
            "UDP 4790 may be dropped by target queue of a rule of chain INPUT in table ip filter (handle 1)",
        ),
        (
            "target",
            "TARPIT",
            "UDP 4790 may be dropped by target TARPIT of a rule of chain INPUT in table ip filter (handle 1)",
        ),
        ("target", "TTL", DROPS),
        ("target", "MASQUERADE", ""),
    ] {
        let table = Table {
            name: "ip filter".into(),
            chains: vec![ChainRecord {
                name: "INPUT".into(),
                table: "filter".into(),
                hook: Some((INPUT, 0)),
                drops_by_default: true,
            }],
            rules: vec![rule(1, kind, target), rule(2, "target", "DROP")],
            sets: BTreeMap::new(),
        };
        assert_eq!(Ruleset(vec![table]).obstacles(&packet(true)).join(", "), expect, "{target}");
    }
}
