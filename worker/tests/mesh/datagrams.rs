//! Published ports of UDP.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use skep_worker_core::mesh::Protocol;

use crate::helper::Request;
use crate::lab::{Client, Lab, N, client_address, count, node_address};
use crate::machine::can_run;
use crate::{ALL, OTHER, PORT, loopback};

fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.protocol = Protocol::Udp;
    lab
}

fn loopbacks(port: u16) -> [SocketAddr; 2] {
    let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    addresses.map(|address| SocketAddr::new(address, port))
}

#[test]
fn datagrams_of_every_client_reach_every_task_through_every_node() {
    if !can_run() {
        return;
    }
    let mut lab = lab();
    assert_eq!(lab.publish(&[(PORT, ALL)]), Vec::<String>::new());
    for through in 1..=N {
        let address = node_address(through, PORT);
        lab.assert_turns(Client::Outside, address);
        for number in 1..=N {
            lab.assert_turns(Client::Node(number), address);
            lab.assert_turns(Client::Task(number), address);
        }
        lab.assert_turns(Client::Node(through), loopback(PORT));
        let answers = lab.node(through).host.get_udp(loopbacks(PORT)[1], usize::from(N));
        assert_eq!(count(&answers), (1..=N).map(|n| (n.to_string(), 1)).collect(), "{answers:?}");
    }
    // A client that goes on from one port stays with one task.
    for id in ["outside", "other"] {
        lab.client.open_udp(id, node_address(1, PORT).into());
        let first = lab.client.use_udp(id);
        for _ in 0..4 {
            assert_eq!(lab.client.use_udp(id), first);
        }
    }
    // One port of a client through two nodes: a task that gets both still answers both.
    let local = Some(SocketAddr::new(client_address().into(), 45_000));
    for _ in 0..4 {
        for (id, through) in [("1", 1), ("2", 2)] {
            let address = node_address(through, PORT).into();
            lab.client.ask(&Request::OpenUdp { id: id.into(), address, local });
            let answer = lab.client.use_udp(id);
            assert!(answer.ends_with(&client_address().to_string()), "{answer}");
            let close = Request::OpenUdp { id: id.into(), address, local: None };
            lab.client.ask(&close);
        }
    }
}

#[test]
fn a_client_that_keeps_sending_moves_on_as_soon_as_the_table_says_so() {
    if !can_run() {
        return;
    }
    let mut lab = lab();
    lab.publish(&[(PORT, ALL), (OTHER, &[1])]);
    // Flows to each task by every way in, all from ports that are kept.
    let senders = |lab: &mut Lab, act: &mut dyn FnMut(&mut crate::machine::Machine, &str)| {
        for turn in 0..N {
            act(&mut lab.client, &format!("mesh-{turn}"));
            act(&mut lab.node(1).task, &format!("task-{turn}"));
            act(&mut lab.node(1).host, &format!("node-{turn}"));
            act(&mut lab.node(1).host, &format!("loopback-{turn}"));
        }
    };
    senders(&mut lab, &mut |machine, id| {
        let is_loopback = id.starts_with("loopback");
        let address = if is_loopback { loopback(PORT) } else { node_address(1, PORT) };
        machine.open_udp(id, address.into());
    });
    lab.client.open_udp("other", node_address(1, OTHER).into());
    assert!(lab.client.use_udp("other").starts_with("1 "));
    let mut before = BTreeMap::new();
    senders(&mut lab, &mut |machine, id| drop(before.insert(id.to_owned(), machine.use_udp(id))));
    let answers: Vec<String> = before.values().cloned().collect();
    assert!(count(&answers).len() == usize::from(N), "{before:?}");

    // The task of node 2 drains: it still runs and would answer.
    lab.publish(&[(PORT, &[1, 3]), (OTHER, &[1])]);
    senders(&mut lab, &mut |machine, id| {
        let (earlier, answer) = (&before[id], machine.use_udp(id));
        match earlier.starts_with("2 ") {
            true => assert!(answer.starts_with(['1', '3']), "{id} was with {earlier}: {answer}"),
            false => assert_eq!(answer, *earlier, "{id} is disturbed for nothing"),
        }
    });

    // No task at all: every client is refused at once, and once for each datagram.
    lab.publish(&[(PORT, &[]), (OTHER, &[1])]);
    senders(&mut lab, &mut |machine, id| {
        let answer = machine.use_udp(id);
        assert!(
            ["ConnectionRefused", "PermissionDenied"].contains(&answer.as_str()),
            "{id} {answer}"
        );
    });
    for address in loopbacks(PORT) {
        assert_eq!(lab.node(1).host.get_udp(address, 2), ["ConnectionRefused"; 2]);
    }

    // They are served again as soon as there is one, and when the port was not published meanwhile.
    lab.publish(&[(PORT, &[3]), (OTHER, &[1])]);
    senders(&mut lab, &mut |machine, id| {
        // What is left of the refusal may come first.
        let (first, second) = (machine.use_udp(id), machine.use_udp(id));
        assert!(second.starts_with("3 "), "{id}: {first}, then {second}");
    });
    lab.publish(&[(OTHER, &[1])]);
    assert_eq!(lab.client.use_udp("mesh-0"), "ConnectionRefused");
    lab.publish(&[(PORT, &[2]), (OTHER, &[1])]);
    assert!(lab.client.use_udp("mesh-0").starts_with("2 "));
    assert!(lab.client.use_udp("other").starts_with("1 "), "another port is not disturbed");
}

#[test]
fn a_daemon_that_starts_again_forgets_what_changed_meanwhile() {
    if !can_run() {
        return;
    }
    let mut lab = lab();
    lab.publish(&[(PORT, &[1])]);
    lab.client.open_udp("kept", node_address(2, PORT).into());
    assert!(lab.client.use_udp("kept").starts_with("1 "));
    let daemon = lab.node(2).host.beside();
    std::mem::replace(&mut lab.node(2).daemon, daemon).kill();
    lab.start(2);
    assert!(lab.client.use_udp("kept").starts_with("1 "));
    lab.publish(&[(PORT, &[3])]);
    assert!(lab.client.use_udp("kept").starts_with("3 "));
}

#[test]
fn a_port_of_datagrams_is_held_apart_from_that_of_connections() {
    if !can_run() {
        return;
    }
    let mut lab = lab();
    lab.node(1).host.ask(&Request::ListenUdp { port: PORT });
    lab.node(1).host.ask(&Request::Listen { port: OTHER });
    let conditions = lab.publish(&[(PORT, ALL), (OTHER, ALL)]);
    let pid = lab.node(1).host.pid();
    assert_eq!(conditions.len(), 1, "{conditions:?}");
    assert!(conditions[0].starts_with("port 8080/udp is held by "), "{conditions:?}");
    assert!(conditions[0].ends_with(&format!("(pid {pid})")), "{conditions:?}");
    lab.assert_turns(Client::Outside, node_address(1, OTHER));
    lab.assert_turns(Client::Outside, node_address(2, PORT));
    let error = lab.node(2).host.try_ask(&Request::ListenUdp { port: PORT }).unwrap_err();
    assert!(error.contains("Address already in use"), "{error}");
    lab.node(2).host.ask(&Request::Listen { port: PORT });
}
