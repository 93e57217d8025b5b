//! Encrypted networks: what is sent between nodes cannot be read, forged, or sent in clear by mistake.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use skep_worker::net::secure::{Implementation, implementation};

use crate::helper::{LARGE, Request, Step};
use crate::lab::{Lab, N, VIP, address, address6, tcp, underlay, vip6};
use crate::machine::{Machine, can_run};
use crate::{BACK, FRONT, forged, get, get_udp, open, using};

/// 1500, less WireGuard's 80 and VXLAN's 50.
const MTU: usize = 1370;

/// What a large answer is made of.
const CLEAR: &str = "xxxxxxxxxxxxxxxx";

/// Tasks 11 on node 1, 12 on node 2, 13 on node 3, and 14 beside 11, on an encrypted network.
fn four_tasks() -> Lab {
    let mut lab = Lab::new();
    lab.add_network(FRONT).encrypted = true;
    for (task, node) in [(11, 1), (12, 2), (13, 3), (14, 1)] {
        lab.add_task(FRONT, task, node);
    }
    lab
}

fn captured(lab: &mut Lab, node: u16) -> BTreeMap<String, usize> {
    let counts = lab.node(node).host.ask(&Request::Captured { clear: CLEAR.to_owned() });
    let mut counts: BTreeMap<String, usize> = serde_json::from_value(counts).expect("counts");
    counts.remove("neighbours");
    counts
}

fn kinds(counts: &BTreeMap<String, usize>) -> Vec<&str> {
    counts.keys().map(String::as_str).collect()
}

#[test]
fn tasks_reach_each_other_and_nobody_reads_along() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    lab.node(1).host.ask(&Request::Capture);
    for from in 11..=14 {
        for to in 11..=14 {
            for address in [address(to), address6(to)] {
                assert_eq!(lab.get(from, &get(address, 1)), [to.to_string()], "{from} to {to}");
                assert_eq!(lab.get(from, &get_udp(address, 1)), [to.to_string()], "{from} to {to}");
            }
        }
    }
    for vip in [VIP, vip6()] {
        let answers = lab.get(11, &get(vip, 8));
        assert_eq!(crate::count(&answers), [("11", 2), ("12", 2), ("13", 2), ("14", 2)].into());
    }
    assert!(lab.task(11).ip("link show eth0").contains(&format!("mtu {MTU} ")));
    lab.task(11).ask(&open("large", tcp(address(12)), false));
    let large = Request::Use { id: "large".into(), text: "large".into() };
    assert_eq!(lab.task(11).ask(&large), LARGE.to_string());
    let heard = captured(&mut lab, 1);
    assert_eq!(kinds(&heard), ["udp 4790"], "{heard:?}");

    // The same without encryption: the capture hears what there is to hear.
    lab.add_network(BACK).subnets = vec!["10.0.1.0/24".parse().expect("CIDR")];
    lab.add_task(BACK, 15, 1);
    lab.add_task(BACK, 16, 2);
    lab.task(15).ask(&open("large", tcp(address(16)), false));
    assert_eq!(lab.task(15).ask(&large), LARGE.to_string());
    let heard = captured(&mut lab, 1);
    assert!(heard.contains_key("clear") && heard.contains_key("udp 4789"), "{heard:?}");
}

#[test]
fn packets_in_clear_are_not_taken_for_those_of_an_encrypted_network() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    let IpAddr::V4(to) = address(11) else { unreachable!("it is one") };
    let forged_to = |address: [u8; 4], port: u16| Request::Send {
        to: SocketAddr::new(address.into(), port),
        bytes: forged(0x5001, to),
    };
    let node = underlay(1).octets();
    lab.outside.ask(&forged_to(node, 4789));
    lab.outside.ask(&forged_to(node, 4792));
    // A member, but not through WireGuard.
    lab.node(2).host.ask(&forged_to(node, 4789));
    let refused = lab.node(2).host.try_ask(&forged_to(node, 4792)).unwrap_err();
    assert!(refused.contains("not permitted"), "{refused}");
    // To the address within the tunnel, by a route that the forger makes.
    lab.outside.ip(&format!("route add 198.18.0.0/15 via {}", underlay(1)));
    lab.outside.ask(&forged_to([198, 18, 0, 1], 4792));
    // Sent later, over the same switch: all others are in by now.
    assert_eq!(lab.get(12, &get_udp(address(11), 1)), ["11"]);
    assert_eq!(lab.task(11).ask(&Request::Datagrams), 1, "the question alone");
}

#[test]
fn nothing_is_sent_in_clear_where_the_tunnel_is_gone() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    lab.node(1).host.ask(&Request::Capture);
    lab.node(1).host.ip("link delete skep-wg0");
    // The route that refuses is gone as well, and the underlay would take it.
    lab.node(1).host.ip("route delete unreachable 198.18.0.0/15 metric 4294967295");
    lab.node(1).host.ip(&format!("route add default via {}", underlay(2)));
    assert!(crate::is_unreached(&lab.get(11, &get(address(12), 1))));
    let heard = captured(&mut lab, 1);
    assert!(!heard.contains_key("clear") && !heard.contains_key("udp 4792"), "{heard:?}");
    lab.node(1).host.ip(&format!("route delete default via {}", underlay(2)));
    lab.apply();
    assert_eq!(lab.get(11, &get(address(12), 1)), ["12"], "repaired");
    assert_eq!(kinds(&captured(&mut lab, 1)), ["udp 4790"]);
}

#[test]
fn a_node_without_a_key_is_not_reached_until_it_has_one() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT).encrypted = true;
    let keys = lab.keys.remove(&2).expect("keys");
    lab.add_task(FRONT, 11, 1);
    lab.add_task(FRONT, 12, 2);
    lab.add_task(FRONT, 13, 3);
    lab.node(1).host.ask(&Request::Capture);
    assert!(crate::is_unreached(&lab.get(11, &get(address(12), 1))));
    assert_eq!(lab.get(11, &get(address(13), 1)), ["13"]);
    assert_eq!(kinds(&captured(&mut lab, 1)), ["udp 4790"]);
    lab.keys.insert(2, keys);
    lab.apply();
    // The container may be about to give up asking for its neighbour.
    lab.task(11).ip("neigh flush all");
    assert_eq!(lab.get(11, &get(address(12), 1)), ["12"]);
}

#[test]
fn a_node_that_cannot_encrypt_refuses_such_networks_and_has_the_others() {
    // What the kernel has cannot be hidden.
    if !can_run() || implementation() == Ok(Implementation::Kernel) {
        return;
    }
    let mut lab = Lab::new();
    hide_tun(&lab.nodes[0].host);
    lab.kill(1);
    lab.start(1);
    lab.add_network(FRONT).encrypted = true;
    lab.add_network(BACK);
    lab.place(FRONT, 11, 1);
    lab.add_task(BACK, 21, 1);
    lab.add_task(BACK, 22, 2);
    let refused = lab.connect(&[FRONT], 11, 1).unwrap_err();
    assert_eq!(
        refused,
        "network network-1 cannot be encrypted on this node: this machine has no /dev/net/tun (CONFIG_TUN; try: \
         modprobe tun), which encrypted networks need: No such file or directory (os error 2)",
    );
    assert!(!lab.task(11).ip("-brief link").contains("eth0"));
    assert_eq!(lab.get(21, &get(address(22), 1)), ["22"]);
}

/// Takes the TUN device away from a machine.
fn hide_tun(machine: &Machine) {
    let mounts = format!("--mount=/proc/{}/ns/mnt", machine.pid());
    let mut command = Command::new("nsenter");
    command.args([&mounts, "mount", "-t", "tmpfs", "none", "/dev/net"]);
    assert!(command.status().expect("nsenter").success());
}

#[test]
fn connections_outlive_the_daemon() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    lab.task(11).ask(&open("there", tcp(address(12)), false));
    lab.task(12).ask(&open("back", tcp(address(11)), false));
    let keys = lab.keys.clone();
    lab.kill(1);
    assert!(lab.node(1).host.ip("link show skep-wg0").contains("skep-wg0"));
    lab.start(1);
    lab.apply();
    assert_eq!(lab.keys, keys, "it has the key of the one before");
    assert_eq!(lab.task(11).ask(&using("there")), "12 10.0.1.11");
    assert_eq!(lab.task(12).ask(&using("back")), "11 10.0.1.12");
    lab.kill(1);
    let run_dir = lab.run_dir(1);
    lab.node(1).daemon.ask(&Request::Remove { run_dir });
    let left = lab.node(1).host.ip("-brief link") + &lab.node(1).host.ip("route show");
    assert!(!left.contains("skep-wg") && !left.contains("198.18."), "{left}");
}

#[test]
fn the_interfaces_go_with_the_last_encrypted_network() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    for task in [11, 14] {
        lab.node(1).daemon.ask(&Request::Detach { task });
    }
    lab.networks.clear();
    lab.apply();
    for node in 1..=N {
        let left = lab.node(node).host.ip("-brief link") + &lab.node(node).host.ip("route show");
        assert!(!left.contains("skep-wg") && !left.contains("198.18."), "{left}");
    }
}

/// Each step is told to one node after the other, as it happens.
#[test]
fn a_key_is_changed_without_losing_a_packet() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    lab.task(11).ask(&open("there", tcp(address(12)), false));
    let first = lab.keys[&1].clone();
    for step in [Step::Begin, Step::Switch, Step::End] {
        let keys = lab.node(1).daemon.ask(&Request::Rotate { step });
        lab.keys.insert(1, serde_json::from_value(keys).expect("keys"));
        for node in [1, 3, 2] {
            lab.apply_on(node);
            for (from, to) in [(11, 12), (12, 11), (13, 11), (11, 13), (12, 13)] {
                let answers = lab.get(from, &get_udp(address(to), 5));
                assert_eq!(answers, vec![to.to_string(); 5], "{step:?} on {node}: {from} to {to}");
            }
            assert_eq!(lab.task(11).ask(&using("there")), "12 10.0.1.11");
        }
    }
    assert_ne!(lab.keys[&1].keys[0].public_key, first.keys[0].public_key);
    let links = lab.node(1).host.ip("-brief link");
    assert!(links.contains("skep-wg1") && !links.contains("skep-wg0"), "{links}");
    lab.node(1).host.ask(&Request::Capture);
    assert_eq!(lab.get(11, &get(address(12), 1)), ["12"]);
    assert_eq!(kinds(&captured(&mut lab, 1)), ["udp 4790"], "the lower port is the other node's");
}

#[test]
fn a_port_that_another_program_has_keeps_no_other_network_from_changing() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    let address_of_wireguard = SocketAddr::new(underlay(1).into(), 4790);
    lab.node(1).host.ask(&Request::HoldUdp { address: Some(address_of_wireguard) });
    lab.add_network(FRONT).encrypted = true;
    lab.add_network(BACK);
    lab.place(FRONT, 11, 1);
    lab.add_task(FRONT, 12, 2);
    lab.add_task(BACK, 21, 1);
    lab.add_task(BACK, 22, 2);
    let expect = "failed to start WireGuard on skep-wg0 at 10.98.0.1:4790: Address already in use (os error 98)";
    assert_eq!(lab.apply_on(1), expect);
    assert_eq!(lab.get(21, &get(address(22), 1)), ["22"]);
    assert_eq!(lab.connect(&[FRONT], 11, 1).unwrap_err(), expect);

    lab.node(1).host.ask(&Request::HoldUdp { address: None });
    assert_eq!(lab.apply_on(1), serde_json::Value::Null);
    lab.connect(&[FRONT], 11, 1).expect("connected");
    assert_eq!(lab.get(11, &get(address(12), 1)), ["12"]);
}

#[test]
fn an_interface_whose_driver_has_failed_is_started_again() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    lab.node(1).host.ip("link delete skep-wg0");
    // Another one of that name, which nobody drives.
    lab.node(1).host.ip("tuntap add dev skep-wg0 mode tun");
    assert!(crate::is_unreached(&lab.get(11, &get(address(12), 1))));
    lab.apply();
    assert_eq!(lab.get(11, &get(address(12), 1)), ["12"]);
}
