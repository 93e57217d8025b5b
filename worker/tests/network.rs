//! Overlay networks on three nodes in network namespaces, over real packets.
//!
//! Needs root. Each test makes a lab of its own, whose kernel objects end with its processes.

#[path = "support/capture.rs"]
mod capture;
#[path = "network/connections.rs"]
mod connections;
#[path = "network/encrypted.rs"]
mod encrypted;
#[path = "network/helper.rs"]
mod helper;
#[path = "network/lab.rs"]
mod lab;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/storm.rs"]
mod storm;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;

use helper::{LARGE, Request};
use lab::{Lab, VIP, address, address6, tcp, udp, underlay, vip6};
use machine::can_run;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::sched::{CloneFlags, unshare};
use skep_worker::net::rtnetlink::{Mode, RouteChannel};
use skep_worker_core::mesh::{MeshTable, Slices};
use storm::Refused;

const FRONT: u128 = 1;
const BACK: u128 = 2;
const MTU: usize = 1450;

/// Not a test: what a helper process of the others runs.
#[test]
fn helper_process() {
    helper::run_if_asked();
}

/// Tasks 11 on node 1, 12 on node 2, 13 on node 3, and 14 beside 11.
fn four_tasks() -> Lab {
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    for (task, node) in [(11, 1), (12, 2), (13, 3), (14, 1)] {
        lab.add_task(FRONT, task, node);
    }
    lab
}

fn get(address: IpAddr, count: usize) -> Request {
    Request::Get { address: tcp(address), count }
}

fn get_udp(address: IpAddr, count: usize) -> Request {
    Request::GetUdp { address: udp(address), count }
}

fn count(answers: &[String]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.as_str()).or_default() += 1;
    }
    counts
}

/// Nobody answers, not even to refuse.
fn is_unreached(answers: &[String]) -> bool {
    answers.iter().all(|answer| answer == "TimedOut" || answer == "HostUnreachable")
}

fn open(id: &str, address: SocketAddr, is_udp: bool) -> Request {
    Request::Open { id: id.into(), address, is_udp }
}

fn using(id: &str) -> Request {
    Request::Use { id: id.into(), text: "name".into() }
}

#[test]
fn every_task_reaches_every_other_by_its_address() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    for from in 11..=14 {
        for to in 11..=14 {
            for address in [address(to), address6(to)] {
                assert_eq!(lab.get(from, &get(address, 1)), [to.to_string()], "{from} to {to}");
                assert_eq!(lab.get(from, &get_udp(address, 1)), [to.to_string()], "{from} to {to}");
            }
        }
    }
    let seen = lab.task(11).ask(&get(address(13), 1));
    assert_eq!(seen[0], "13 10.0.1.11", "a task sees who connects");
    // An address that no task has: nobody answers, and the tunnel floods nothing.
    assert!(is_unreached(&lab.get(11, &get(address(99), 1))));
}

#[test]
fn packets_are_as_large_as_the_tunnel_leaves_or_users_say() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    lab.add_network(BACK).mtu = Some(1300);
    for (network, one, other, mtu) in [(FRONT, 11, 12, MTU), (BACK, 21, 22, 1300)] {
        lab.add_task(network, one, 1);
        lab.add_task(network, other, 2);
        assert!(lab.task(one).ip("link show eth0").contains(&format!("mtu {mtu} ")), "{mtu}");
        lab.task(one).ask(&open("large", tcp(address(other)), false));
        let large = Request::Use { id: "large".into(), text: "large".into() };
        assert_eq!(lab.task(one).ask(&large), LARGE.to_string());
    }
}

#[test]
fn networks_are_apart_from_each_other_and_from_the_node() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    // The same subnet, and the same addresses in it.
    lab.add_network(FRONT);
    lab.add_network(BACK);
    lab.add_task(FRONT, 11, 1);
    lab.add_task(FRONT, 12, 2);
    lab.add_task(BACK, 21, 1);
    lab.place(BACK, 12, 3);
    lab.apply();
    assert_eq!(lab.get(11, &get(address(12), 1)), ["12"]);
    assert!(is_unreached(&lab.get(21, &get(address(11), 1))));
    assert!(is_unreached(&lab.get(21, &get(address(12), 1))), "that is another network's");
    for number in 1..=lab::N {
        let links = lab.node(number).host.ip("-brief link");
        assert!(!links.contains("vx0") && !links.contains("br0"), "{links}");
        let request = get(address(11), 1);
        let answer = lab.node(number).host.ask(&request);
        assert_eq!(answer[0], "NetworkUnreachable", "node {number}");
    }
}

#[test]
fn a_task_on_two_networks_has_the_virtual_addresses_of_both() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    let back = lab.add_network(BACK);
    back.subnets = vec!["10.0.2.0/24".parse().unwrap()];
    back.vips = vec!["10.0.2.2".parse().unwrap()];
    lab.add_task(FRONT, 12, 2);
    lab.add_task(BACK, 22, 2);
    for network in [FRONT, BACK] {
        lab.place(network, 11, 1);
    }
    lab.apply();
    lab.connect(&[BACK, FRONT], 11, 1).unwrap();
    let addresses = lab.task(11).ip("-brief -4 addr");
    let order = ["eth0@", "10.0.2.11/24", "eth1@", "10.0.1.11/24"];
    let places = order.map(|part| addresses.find(part));
    assert!(places.is_sorted() && places[0].is_some(), "{addresses}");
    // Nothing leads out, and IPv6 is where the network has it only.
    assert_eq!(lab.task(11).ip("route show default"), "");
    assert_eq!(lab.task(11).ip("-6 addr show eth0"), "");
    let vip = |last: u8| IpAddr::from([10, 0, last, 2]);
    assert_eq!(lab.get(11, &get(vip(1), 2)), ["12", "12"]);
    assert_eq!(lab.get(11, &get(vip(2), 2)), ["22", "22"]);
    assert_eq!(lab.get(12, &get(vip(2), 1)), ["NetworkUnreachable"]);

    // The next daemon finds both.
    lab.kill(1);
    lab.start(1);
    lab.add_task(FRONT, 13, 3);
    lab.add_task(BACK, 23, 3);
    assert_eq!(count(&lab.get(11, &get(vip(1), 4))), [("12", 2), ("13", 2)].into());
    assert_eq!(count(&lab.get(11, &get(vip(2), 4))), [("22", 2), ("23", 2)].into());
}

#[test]
fn a_virtual_address_takes_exact_turns_over_all_serving_tasks() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    let expect: BTreeMap<&str, usize> = ["11", "12", "13", "14"].map(|task| (task, 3)).into();
    for from in 11..=14 {
        for vip in [VIP, vip6()] {
            let answers = lab.get(from, &get(vip, 12));
            assert_eq!(count(&answers), expect, "{from} over TCP to {vip}: {answers:?}");
            let answers = lab.get(from, &get_udp(vip, 12));
            assert_eq!(count(&answers), expect, "{from} over UDP to {vip}: {answers:?}");
        }
    }
    let IpAddr::V4(address) = VIP else { unreachable!("it is one") };
    let echoes = |lab: &mut Lab| -> Vec<u64> {
        (11..=14).map(|task| lab.task(task).ask(&Request::Echoes).as_u64().unwrap()).collect()
    };
    let before = echoes(&mut lab);
    assert_eq!(lab.task(11).ask(&Request::Ping { address, count: 8 }), 8);
    let after = echoes(&mut lab);
    let each: Vec<u64> = after.iter().zip(before).map(|(after, before)| after - before).collect();
    assert_eq!(each, [2; 4]);
}

#[test]
fn an_address_without_a_serving_task_refuses_at_once() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    lab.add_task(FRONT, 11, 1);
    lab.endpoint(FRONT, 11).serving = false;
    lab.apply();
    for vip in [VIP, vip6()] {
        assert_eq!(lab.get(11, &get(vip, 20)), vec!["ConnectionRefused"; 20], "{vip}");
        // The kernel says so to whoever sends.
        assert_eq!(lab.get(11, &get_udp(vip, 1)), ["PermissionDenied"]);
    }
    lab.endpoint(FRONT, 11).serving = true;
    lab.apply();
    assert_eq!(lab.get(11, &get(VIP, 1)), ["11"]);
}

/// Nobody listens on that port. What passed by would be for an address that nobody has.
#[test]
fn no_connection_passes_by_the_rules_of_an_address_while_they_change() {
    if !can_run() {
        return;
    }
    const N_CHANGES: u32 = 150;
    let mut lab = four_tasks();
    let address = SocketAddr::new(VIP, 4444);
    lab.task(11).ask(&Request::BeginStorm { address });
    for change in 0..N_CHANGES {
        lab.endpoint(FRONT, 14).serving = change % 2 != 0;
        lab.version += 1;
        lab.apply_on(1);
    }
    let refused: Refused = serde_json::from_value(lab.task(11).ask(&Request::EndStorm)).unwrap();
    refused.assert_all(N_CHANGES);
}

#[test]
fn an_unrelated_change_does_not_restart_turns() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    let first = lab.get(11, &get(VIP, 1));
    lab.add_network(BACK);
    lab.add_task(BACK, 21, 1);
    // Not yet serving, and on the same network.
    lab.place(FRONT, 15, 2);
    lab.apply();
    let mut answers = lab.get(11, &get(VIP, 3));
    answers.extend(first);
    assert_eq!(count(&answers).len(), 4, "{answers:?}");
}

#[test]
fn a_withdrawn_task_keeps_its_tcp_and_loses_all_else() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    lab.add_task(FRONT, 11, 1);
    lab.add_task(FRONT, 12, 2);
    lab.endpoint(FRONT, 11).serving = false;
    lab.apply();
    lab.task(11).ask(&open("tcp", tcp(VIP), false));
    lab.task(11).ask(&open("udp", udp(VIP), true));
    for id in ["tcp", "udp"] {
        assert_eq!(lab.task(11).ask(&using(id)), "12 10.0.1.11");
    }
    lab.add_task(FRONT, 13, 3);
    for id in ["tcp", "udp"] {
        assert_eq!(lab.task(11).ask(&using(id)), "12 10.0.1.11", "{id} stays where it was");
    }
    lab.endpoint(FRONT, 12).serving = false;
    lab.apply();
    assert_eq!(lab.get(11, &get(VIP, 3)), ["13", "13", "13"]);
    assert_eq!(lab.task(11).ask(&using("tcp")), "12 10.0.1.11", "it drains");
    assert_eq!(lab.task(11).ask(&using("udp")), "13 10.0.1.11", "it moved on");

    // The task has ended, and its node may have gone without a word.
    lab.remove_endpoint(FRONT, 12);
    lab.apply();
    assert_eq!(lab.task(11).ask(&using("tcp")), "ConnectionReset");
}

#[test]
fn a_request_that_was_lost_goes_elsewhere_when_its_task_is_withdrawn() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    lab.add_task(FRONT, 11, 1);
    lab.add_task(FRONT, 12, 2);
    lab.endpoint(FRONT, 11).serving = false;
    lab.apply();
    lab.task(12).ip("link set eth0 down");
    let SocketAddr::V4(address) = tcp(VIP) else { panic!("of IPv4") };
    lab.task(11).ask(&Request::Begin { id: "lost".into(), address });
    lab.add_task(FRONT, 13, 3);
    lab.endpoint(FRONT, 12).serving = false;
    lab.apply();
    let are_needed = [(); 2].map(|()| lab.node(1).daemon.ask(&Request::Settle));
    assert_eq!(are_needed, [true, false]);
    assert_eq!(lab.task(11).ask(&using("lost")), "13 10.0.1.11");
}

#[test]
fn a_second_daemon_takes_over_without_disturbing() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    lab.task(11).ask(&open("tcp", tcp(VIP), false));
    let before = lab.task(11).ask(&using("tcp"));
    let first = lab.get(11, &get(VIP, 1));

    lab.kill(1);
    assert_eq!(lab.task(11).ask(&using("tcp")), before, "no daemon is needed");
    lab.start(1);
    let links = lab.task(11).ip("link show eth0");
    lab.apply();
    assert_eq!(lab.task(11).ask(&using("tcp")), before);
    assert_eq!(lab.task(11).ip("link show eth0"), links, "the interface is the same");
    let mut answers = lab.get(11, &get(VIP, 3));
    answers.extend(first);
    assert_eq!(count(&answers).len(), 4, "turns went on: {answers:?}");

    // It found the containers, and drives them from now on.
    for task in 12..=14 {
        lab.endpoint(FRONT, task).serving = false;
    }
    lab.apply();
    assert_eq!(lab.get(11, &get(VIP, 2)), ["11", "11"]);
    lab.node(1).daemon.ask(&Request::Detach { task: 14 });
    assert!(!lab.task(14).ip("-brief link").contains("eth0"));
}

#[test]
fn what_other_programs_broke_is_repaired() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    let netns = format!("{}/netns/{}", lab.run_dir(1), skep_common::NetworkId(FRONT));
    let inside = |lab: &mut Lab, command: &str| {
        let mut nsenter = std::process::Command::new("nsenter");
        let mounts = format!("--mount=/proc/{}/ns/mnt", lab.node(1).host.pid());
        let shell = format!("nsenter --net={netns} {command}");
        let output = nsenter.args([&mounts, "sh", "-c", &shell]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    inside(&mut lab, "ip link del vx0");
    assert!(is_unreached(&lab.get(11, &get(address(12), 1))));
    let nsenter = lab.task(11).namespace();
    let mut flush = std::process::Command::new("nsenter");
    assert!(flush.args([&nsenter, "nft", "flush", "ruleset"]).status().unwrap().success());
    lab.apply_on(1);
    lab.apply_on(1);
    // One that it has not asked for in vain a moment ago.
    assert_eq!(lab.get(11, &get(address(13), 1)), ["13"]);
    assert_eq!(count(&lab.get(11, &get(VIP, 4))).len(), 4);
}

#[test]
fn a_network_goes_with_its_last_container_and_teardown_leaves_nothing() {
    if !can_run() {
        return;
    }
    let mut lab = four_tasks();
    let files = |lab: &Lab| kept_namespaces(lab, 1);
    assert_eq!(files(&lab), 1);
    lab.networks.clear();
    lab.apply();
    assert_eq!(files(&lab), 1, "containers are on it");
    lab.node(1).daemon.ask(&Request::Detach { task: 11 });
    assert_eq!(files(&lab), 1);
    lab.node(1).daemon.ask(&Request::Detach { task: 14 });
    assert_eq!(files(&lab), 0);

    // The same number is free again at once.
    lab.add_network(FRONT);
    lab.add_task(FRONT, 15, 1);
    lab.add_task(FRONT, 16, 2);
    assert_eq!(lab.get(15, &get(address(16), 1)), ["16"]);
    lab.node(1).daemon.ask(&Request::Teardown);
    assert_eq!(files(&lab), 0);
    assert!(!lab.task(15).ip("-brief link").contains("eth0"));
    let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", lab.node(1).host.pid()));
    assert!(!mounts.unwrap().contains(&format!("{}/netns", lab.run_dir(1))));
}

#[test]
fn a_node_that_leaves_removes_what_an_earlier_daemon_left() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    lab.add_task(FRONT, 11, 1);
    lab.kill(1);
    assert_eq!(kept_namespaces(&lab, 1), 1);
    let run_dir = lab.run_dir(1);
    lab.node(1).daemon.ask(&Request::Remove { run_dir });
    assert_eq!(kept_namespaces(&lab, 1), 0);
    assert!(!lab.task(11).ip("-brief link").contains("eth0"));
}

fn kept_namespaces(lab: &Lab, node: u16) -> usize {
    let dir = format!("{}/netns", lab.run_dir(node));
    std::fs::read_dir(dir).map_or(0, |entries| entries.count())
}

#[test]
fn a_network_that_was_not_told_is_refused() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    assert_eq!(
        lab.connect(&[BACK], 12, 1).unwrap_err(),
        format!("network {} is not known on this node", skep_common::NetworkId(BACK)),
    );
}

#[test]
fn packets_that_outsiders_forge_are_dropped() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    lab.add_task(FRONT, 11, 1);
    lab.add_task(FRONT, 12, 2);
    let IpAddr::V4(to) = address(11) else { unreachable!("it is one") };
    let forged =
        Request::Send { to: SocketAddr::new(underlay(1).into(), 4789), bytes: forged(0x5001, to) };
    lab.outside.ask(&forged);
    lab.node(2).host.ask(&forged);
    // Sent later than the one from outside, over the same switch: both are in by now.
    assert_eq!(lab.get(12, &get_udp(address(11), 1)), ["11"]);
    let seen = lab.task(11).ask(&Request::Datagrams);
    assert_eq!(seen, 2, "the one from a node, and the question");
}

#[test]
fn a_task_has_its_uplink_beside_and_forges_nothing_by_it() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.add_network(FRONT);
    lab.add_task(FRONT, 11, 1);
    lab.add_task(FRONT, 12, 2);
    lab.add_task(FRONT, 13, 2);
    let pid = lab.task(11).pid();
    let slices = Slices::new(MeshTable::default_pool(), 22).unwrap();
    let uplink = slices.task_addresses(1).next().unwrap();
    let interface = "eth1".to_owned();
    lab.node(1).daemon.ask(&Request::Uplink { task: 11, pid, interface, address: uplink });
    assert!(lab.task(11).ip("route show default").contains("dev eth1"));
    assert_eq!(lab.get(11, &get(address(12), 1)), ["12"]);

    // To the other node, whose guard would take it for the word of this one.
    let IpAddr::V4(to) = address(12) else { unreachable!("it is one") };
    let node = SocketAddr::new(underlay(2).into(), 4789);
    let request = Request::Send { to: node, bytes: forged(0x5001, to) };
    lab.task(11).ask(&request);
    // With the address of a third node as well.
    lab.task(11).ip(&format!("addr add {}/32 dev eth1", underlay(3)));
    let (gateway, own) = (slices.bridge_address(1), underlay(3));
    let rule = format!("route add {} dev eth1 via {gateway} onlink src {own}", underlay(2));
    lab.task(11).ip(&rule);
    lab.task(11).ask(&request);
    lab.node(1).host.ask(&request);
    assert_eq!(lab.get(13, &get_udp(address(12), 1)), ["12"]);
    assert_eq!(lab.task(12).ask(&Request::Datagrams), 2, "the one of the node, and the question");
}

/// A VXLAN packet with a datagram to the container at `to`.
fn forged(vni: u32, to: Ipv4Addr) -> Vec<u8> {
    let payload = b"forged";
    let udp_length = u16::try_from(8 + payload.len()).expect("short");
    let mut udp = Vec::new();
    udp.extend(1234u16.to_be_bytes());
    udp.extend(helper::UDP_PORT.to_be_bytes());
    udp.extend(udp_length.to_be_bytes());
    udp.extend([0, 0]); // No checksum.
    udp.extend(payload);

    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_length).to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 1, 77]);
    ip.extend(to.octets());
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded");
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());

    let mut packet = vec![0x08, 0, 0, 0];
    packet.extend((vni << 8).to_be_bytes());
    packet.extend([0x02, 0x42]);
    packet.extend(to.octets());
    packet.extend([0x02, 0x42, 10, 0, 1, 77, 0x08, 0x00]);
    packet.extend(ip);
    packet.extend(udp);
    packet
}

/// More than one datagram has room for; each change stands for itself.
#[test]
fn many_changes_are_made_at_once_and_a_refused_one_is_named() {
    if !can_run() {
        return;
    }
    let changed = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("root may");
        let mut channel = RouteChannel::open().expect("a channel");
        let add_cable = ["link", "add", "cable", "type", "veth"];
        assert!(Command::new("ip").args(add_cable).status().expect("ip").success());
        let cable = channel.link("cable").expect("a list").expect("it was added").index;
        let entry = |number: u8| {
            let mut entry = NeighbourMessage::default();
            entry.header.family = AddressFamily::Inet;
            // No interface has that index.
            entry.header.ifindex = if number % 100 == 50 { 7_777 } else { cable };
            entry.header.state = NeighbourState::Permanent;
            let address = NeighbourAddress::from(IpAddr::from([10, 0, 0, number]));
            entry.attributes.push(NeighbourAttribute::Destination(address));
            entry
                .attributes
                .push(NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, number]));
            entry
        };
        let add = |number| (Some(Mode::Create), RouteNetlinkMessage::NewNeighbour(entry(number)));
        let delete = |number| (None, RouteNetlinkMessage::DelNeighbour(entry(number)));
        let count = |channel: &mut RouteChannel| {
            let mut query = NeighbourMessage::default();
            query.header.family = AddressFamily::Inet;
            channel.dump("list", RouteNetlinkMessage::GetNeighbour(query)).expect("a list").len()
        };
        let added: Vec<_> = (1..=250).map(add).collect();
        let error = channel.change_all(&added, |number| format!("add number {number}"));
        assert!(error.expect_err("refused").to_string().contains("add number 49"));
        assert_eq!(count(&mut channel), 247, "all but 50, 150 and 250");
        let deleted: Vec<_> = (1..=250).map(delete).collect();
        channel.change_all(&deleted, |_| "delete".to_owned()).expect("what is absent is fine");
        assert_eq!(count(&mut channel), 0);
        channel.change_all(&[], |_| unreachable!("there is none")).expect("nothing to do");
    };
    std::thread::spawn(changed).join().expect("a thread in a namespace of its own");
}
