//! Nodes that balance in user space, and ports that pass between rules and daemons.

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};

use skep_common::NodeId;
use skep_worker_core::mesh::{Daemon, MeshTable, Protocol};

use crate::helper::Request;
use crate::lab::{Client, Lab, N, count, node_address, underlay};
use crate::machine::can_run;
use crate::{ALL, OTHER, PORT, loopback};

#[test]
fn a_node_without_nftables_that_leaves_before_it_starts_a_mesh_removes_what_is_there() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::bare();
    // The other one had nftables until its kernel was exchanged.
    let numbers = [1, 2];
    let shown = |lab: &mut Lab, number: u16| {
        ["-o link", "rule"].map(|arguments| lab.node(number).host.ip(arguments))
    };
    let before = numbers.map(|number| shown(&mut lab, number));
    lab.user_space.insert(1);
    for number in 1..=N {
        lab.start(number);
        lab.attach(number);
    }
    lab.publish(&[(PORT, ALL)]);
    for (number, before) in numbers.into_iter().zip(before) {
        let host = &mut lab.node(number).host;
        // Of encrypted networks.
        host.ip("link add skep-wg0 type bridge");
        let daemon = host.beside();
        std::mem::replace(&mut lab.node(number).daemon, daemon).kill();
        let run_dir = lab.run_dir(number);
        lab.node(number).daemon.ask(&Request::LeaveWithoutNftables { run_dir });
        assert_eq!(shown(&mut lab, number), before, "{number}");
    }
}

/// How often the table changes, and how many clients there are at least.
const N_CHANGES: usize = 40;

#[test]
fn a_node_without_rules_and_tunnel_serves_its_tasks_and_has_both_again() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, ALL)]);
    lab.user_space.insert(1);
    lab.start(1);
    assert_eq!(lab.publish(&[(PORT, &[1]), (OTHER, &[])]), Vec::<String>::new());
    let links = lab.node(1).host.ip("-o link");
    assert!(links.contains("skep-ing") && !links.contains("skep-vx"), "{links}");
    assert_eq!(lab.node(1).host.ip("rule show iif skep-ing"), "");
    for (who, address) in [
        (Client::Outside, node_address(1, PORT)),
        (Client::Node(1), node_address(1, PORT)),
        (Client::Node(1), loopback(PORT)),
        (Client::Node(2), node_address(1, PORT)),
        (Client::Task(1), node_address(1, PORT)),
    ] {
        let answers = lab.client(who).get(address, 2);
        assert_eq!(count(&answers), [("1".to_owned(), 2)].into(), "{who:?} {answers:?}");
    }
    let ipv6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), PORT);
    assert_eq!(count(&lab.node(1).host.get_any(ipv6, 1)), [("1".to_owned(), 1)].into());
    let refused = lab.client.get(node_address(1, OTHER), 1);
    assert_eq!(refused.len(), 1);
    assert!(refused[0].starts_with("Connection"), "nobody is behind it: {refused:?}");

    lab.protocol = Protocol::Udp;
    let conditions = lab.publish(&[(PORT, &[2])]);
    let expect = "port 8080/udp is not served, since this node balances TCP alone, in user space";
    assert_eq!(conditions, [expect]);

    lab.protocol = Protocol::Tcp;
    lab.user_space.clear();
    lab.start(1);
    assert_eq!(lab.publish(&[(PORT, ALL)]), Vec::<String>::new());
    for through in 1..=N {
        lab.assert_turns(Client::Outside, node_address(through, PORT));
    }
}

#[test]
fn a_port_passes_between_rules_and_daemon_and_refuses_nobody() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, &[1, 2])]);
    let address: SocketAddrV4 = "10.98.0.3:2377".parse().unwrap();
    let beyond = Daemon { node_id: NodeId(3), address, is_balancer: true };
    assert_eq!(*address.ip(), underlay(3));
    // Node 3 has no passage here, so that its turns go to the others.
    let table = |backends: &[u16]| MeshTable {
        daemons: BTreeMap::from([(3, beyond)]),
        ..lab.table(1, &[(PORT, backends)])
    };
    let (in_rules, relayed) = (table(&[1, 2]), table(ALL));
    let is_over = AtomicBool::new(false);
    let (client, daemon) = (&mut lab.client, &mut lab.nodes[0].daemon);
    let answers = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut answers = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                answers.extend(client.get(node_address(1, PORT), 20));
            }
            answers
        });
        for number in 0..N_CHANGES {
            let table = if number % 2 == 0 { &relayed } else { &in_rules };
            daemon.ask(&Request::Apply(table.clone()));
        }
        is_over.store(true, Ordering::Relaxed);
        asking.join().expect("the client goes on")
    });
    let counts = count(&answers);
    assert!(answers.len() >= N_CHANGES, "{} answers", answers.len());
    assert!(counts.keys().all(|who| who == "1" || who == "2"), "{counts:?}");
    lab.publish(&[(PORT, ALL)]);
    lab.assert_turns(Client::Outside, node_address(1, PORT));
}
