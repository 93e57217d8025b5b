//! Published ports on the nodes' IPv6 addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use skep_worker_core::mesh::{Protocol, twin, twin_net};

use crate::helper::{LARGE, Request};
use crate::lab::{
    Client, Lab, N, TARGET_PORT, client_address, count, node_address, node_address6, task_name,
    underlay6,
};
use crate::machine::{can_run, skip};
use crate::{ALL, OTHER, PORT, snapshot};

/// The host of the outside client, as that of its IPv4 address.
fn client6() -> Ipv6Addr {
    underlay6(client_address().octets()[3].into())
}

/// A lab whose first nodes have IPv6, started.
fn lab(with_ipv6: u16) -> Lab {
    let mut lab = Lab::bare();
    lab.ipv6 = (1..=with_ipv6).map(|n| (n, BTreeSet::from([underlay6(n)]))).collect();
    for number in 1..=N {
        lab.start(number);
        lab.attach(number);
    }
    lab
}

fn can_run_ipv6() -> bool {
    let has_ipv6 = skep_worker::net::host_has_ipv6();
    if can_run() && !has_ipv6 {
        skip("this machine has no IPv6");
    }
    has_ipv6 && can_run()
}

fn get(lab: &mut Lab, who: Client, address: SocketAddr, n: usize) -> Vec<String> {
    match lab.protocol {
        Protocol::Udp => lab.client(who).get_udp(address, n),
        Protocol::Tcp | Protocol::Sctp => lab.client(who).get_any(address, n),
    }
}

#[track_caller]
fn assert_turns(lab: &mut Lab, who: Client, address: SocketAddr) {
    let answers = get(lab, who, address, 2 * usize::from(N));
    let expect: BTreeMap<String, usize> = (1..=N).map(|number| (number.to_string(), 2)).collect();
    assert_eq!(count(&answers), expect, "{who:?} through {address}: {answers:?}");
    if who == Client::Outside {
        let own = format!(" {}", client6());
        assert!(answers.iter().all(|answer| answer.ends_with(&own)), "{answers:?}");
    }
}

#[test]
fn clients_with_ipv6_reach_every_task_through_every_node() {
    if !can_run_ipv6() {
        return;
    }
    let mut lab = lab(N);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        lab.protocol = protocol;
        assert_eq!(lab.publish(&[(PORT, ALL), (OTHER, &[])]), Vec::<String>::new());
        for through in 1..=N {
            let address = node_address6(through, PORT);
            assert_turns(&mut lab, Client::Outside, address);
            lab.assert_turns(Client::Outside, node_address(through, PORT));
            for number in 1..=N {
                assert_turns(&mut lab, Client::Node(number), address);
                assert_turns(&mut lab, Client::Task(number), address);
            }
            let local = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), PORT);
            assert_turns(&mut lab, Client::Node(through), local);
            let refused = get(&mut lab, Client::Outside, node_address6(through, OTHER), 1);
            assert_eq!(refused, ["ConnectionRefused"], "{protocol} without a healthy task");
        }
    }
}

#[test]
fn a_node_without_ipv6_serves_ipv4_and_its_tasks_are_left_out() {
    if !can_run_ipv6() {
        return;
    }
    let mut lab = lab(2);
    lab.publish(&[(PORT, ALL), (OTHER, &[3])]);
    let answers = lab.client.get_any(node_address6(1, PORT), 4);
    assert_eq!(count(&answers), [("1".to_owned(), 2), ("2".to_owned(), 2)].into());
    let refused = lab.client.get_any(node_address6(1, OTHER), 1);
    assert_eq!(refused, ["ConnectionRefused"], "at once, so that a client tries IPv4");
    let refused = lab.client.get_any(node_address6(3, PORT), 1);
    assert_eq!(refused, ["ConnectionRefused"], "a node without it");
    for through in 1..=N {
        lab.assert_turns(Client::Outside, node_address(through, PORT));
    }
    // The node stops to take part: nothing of it is left there.
    let chains = |lab: &mut Lab| {
        let chains = lab.node(1).host.ask(&Request::ChainsOfIpv6);
        serde_json::from_value::<Vec<String>>(chains).unwrap().len()
    };
    assert_ne!(chains(&mut lab), 0);
    lab.ipv6.clear();
    lab.start(1);
    lab.publish(&[(PORT, ALL)]);
    assert_eq!(chains(&mut lab), 0);
    assert_eq!(lab.node(1).host.ip("-6 rule show iif skep-ing"), "");
    let addresses = lab.node(1).host.ip("-6 -o addr");
    assert!(!addresses.contains("skep-"), "{addresses}");
    lab.assert_turns(Client::Outside, node_address(1, PORT));
}

#[test]
fn what_is_right_already_or_was_broken_is_as_with_ipv4() {
    if !can_run_ipv6() {
        return;
    }
    let mut lab = lab(N);
    lab.node(1).host.ask(&Request::DropForwarded);
    lab.node(1).host.ask(&Request::DropForwardedIpv6);
    lab.publish(&[(PORT, ALL), (OTHER, &[])]);
    let table = lab.table(1, &[(PORT, ALL), (OTHER, &[])]);
    let mut answers = lab.client.get_any(node_address6(1, PORT), 1);
    let generation = lab.node(1).host.ask(&Request::Generation);
    let recorder = lab.node(1).host.record_changes();
    lab.node(1).daemon.ask(&Request::Apply(table.clone()));
    let restart = lab.start_request(1);
    lab.node(1).daemon.ask(&restart);
    lab.node(1).daemon.ask(&Request::Apply(table));
    let mut changes = lab.node(1).host.changes(recorder);
    // The kernel learns its neighbours on the underlay by itself.
    changes.retain(|line| !line.contains("dev eth0"));
    assert_eq!(changes, Vec::<String>::new());
    assert_eq!(lab.node(1).host.ask(&Request::Generation), generation, "no rule was written");
    answers.extend(lab.client.get_any(node_address6(1, PORT), 2));
    assert_eq!(count(&answers).len(), usize::from(N), "the turns go on: {answers:?}");

    for number in 1..=N {
        assert_turns(&mut lab, Client::Outside, node_address6(number, PORT));
    }
    let slice = twin_net(lab.slices.slice(2));
    lab.node(1).host.ip(&format!("-6 route del {slice}"));
    lab.node(1).host.ip("-6 neigh flush dev skep-vx nud permanent");
    lab.node(1).host.ip("-6 rule del fwmark 2/0xfff iif skep-ing");
    lab.node(1).host.ip("-6 addr flush dev skep-ing scope global");
    lab.publish(&[(PORT, ALL)]);
    for through in 1..=N {
        assert_turns(&mut lab, Client::Outside, node_address6(through, PORT));
    }
}

/// The outside client announces itself as a router until node 2 has a route by it; a router says so
/// time and again, and is not heard before its own address is usable.
fn learn_a_router(lab: &mut Lab) {
    let link = lab.client.ip("-j link show eth0");
    let link: serde_json::Value = serde_json::from_str(&link).expect("JSON");
    let interface = u32::try_from(link[0]["ifindex"].as_u64().expect("an index")).expect("small");
    let started = skep_runtime::clock::monotonic();
    while !lab.node(2).host.ip("-6 route show default").contains("proto ra") {
        assert!(started.elapsed() < std::time::Duration::from_secs(20), "no route by the router");
        // Refused as long as the client has no usable address of the link.
        drop(lab.client.try_ask(&Request::Advertise { interface }));
    }
}

#[test]
fn long_answers_and_ways_out_are_as_with_ipv4() {
    if !can_run_ipv6() {
        return;
    }
    let mut lab = Lab::bare();
    lab.ipv6 = (1..=N).map(|n| (n, BTreeSet::from([underlay6(n)]))).collect();
    // The route by a router that announced itself must outlive that the node turns to forwarding, and
    // later announcements must be heard.
    learn_a_router(&mut lab);
    for number in 1..=N {
        lab.start(number);
        lab.attach(number);
    }
    let ways = lab.node(2).host.ip("-6 route show default");
    assert!(ways.contains("proto ra"), "{ways}");
    lab.node(2).host.ip("-6 route flush default");
    learn_a_router(&mut lab);
    lab.publish(&[(PORT, &[1])]);
    let answers = lab.client.get_any(node_address6(2, PORT), 1);
    assert_eq!(answers, [format!("1 {}", client6())]);
    let large = Request::GetLarge { address: node_address6(2, PORT) };
    assert_eq!(lab.client.ask(&large).as_u64(), u64::try_from(LARGE).ok());

    lab.client.ask(&Request::Serve { name: "outside".into(), port: OTHER });
    let out = SocketAddr::new(client6().into(), OTHER);
    let answers = lab.node(1).task.get_any(out, 1);
    assert_eq!(answers, [format!("outside {}", underlay6(1))], "masqueraded at the node");

    // A task is reached by published ports alone.
    let task = SocketAddr::new(twin(lab.task_address(1)).into(), TARGET_PORT);
    let slice = twin_net(lab.slices.slice(1)).trunc();
    lab.client.ip(&format!("-6 route add {slice} via {}", underlay6(1)));
    assert_eq!(lab.client.get_any(task, 1), ["TimedOut"], "not published");

    lab.node(1).daemon.ask(&Request::Detach { task_id: task_name(1) });
    lab.node(2).daemon.ask(&Request::Teardown);
    // What a host that forwards has beside, such as the groups of routers, stays with the forwarding.
    let left =
        |text: &&str| text.contains("skep") || text.contains("fd00:736b") || text.contains("20001");
    let found = snapshot(&mut lab, 2);
    let found: Vec<&str> = found.iter().flat_map(|text| text.lines()).filter(left).collect();
    assert_eq!(found, Vec::<&str>::new());
    assert_eq!(lab.node(2).host.ip("-6 rule show").lines().count(), 2, "of the kernel itself");
    assert_eq!(lab.node(2).host.ask(&Request::ChainsOfIpv6), serde_json::json!([]));
}

#[test]
fn containers_of_the_time_before_get_ipv6_with_their_node() {
    if !can_run_ipv6() {
        return;
    }
    let mut lab = lab(2);
    lab.ipv6.insert(3, BTreeSet::from([underlay6(3)]));
    lab.start(3);
    let (task_id, pid) = (task_name(3), lab.node(3).task.pid());
    for _ in 0..2 {
        lab.node(3).daemon.ask(&Request::Renew { task_id: task_id.clone(), pid });
    }
    let stranger = Request::Renew { task_id: "stranger".into(), pid };
    lab.node(3).daemon.ask(&stranger);
    lab.publish(&[(PORT, ALL)]);
    for through in 1..=N {
        assert_turns(&mut lab, Client::Outside, node_address6(through, PORT));
        lab.assert_turns(Client::Outside, node_address(through, PORT));
    }
}
