//! The routing mesh on three nodes in network namespaces, over real packets.
//!
//! Needs root. Each test makes a lab of its own, whose kernel objects end with its processes.

#[path = "mesh/associations.rs"]
mod associations;
#[path = "mesh/datagrams.rs"]
mod datagrams;
#[path = "mesh/ejection.rs"]
mod ejection;
#[path = "mesh/helper.rs"]
mod helper;
#[path = "mesh/ipv6.rs"]
mod ipv6;
#[path = "mesh/lab.rs"]
mod lab;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/storm.rs"]
mod storm;
#[path = "mesh/user_space.rs"]
mod user_space;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};

use helper::{LARGE, Request};
use lab::{Client, Lab, N, TARGET_PORT, client_address, count, node_address, task_name, underlay};
use machine::{can_run, skip};
use skep_worker_core::mesh::{Backend, Mac, Peer, interface_name};
use storm::Refused;

const PORT: u16 = 8080;
const OTHER: u16 = 8081;
const LARGE_PORT: u16 = 8082;
const ALL: &[u16] = &[1, 2, 3];

/// Not a test: what a helper process of the others runs.
#[test]
fn helper_process() {
    helper::run_if_asked();
}

fn loopback(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

#[test]
fn every_client_reaches_every_task_through_every_node() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    assert_eq!(lab.publish(&[(PORT, ALL)]), Vec::<String>::new());
    for is_on in [false, true] {
        if !lab.set_bridge_netfilter(is_on) && is_on {
            skip("the kernel has no br_netfilter, so it cannot be on");
            continue;
        }
        for through in 1..=N {
            let address = node_address(through, PORT);
            lab.assert_turns(Client::Outside, address);
            for number in 1..=N {
                lab.assert_turns(Client::Node(number), address);
                lab.assert_turns(Client::Task(number), address);
            }
            lab.assert_turns(Client::Node(through), loopback(PORT));
        }
        one_client_port_through_two_nodes(&mut lab);
        large_answers(&mut lab);
    }
}

/// Round-robin brings both connections to the same task within a few tries.
fn one_client_port_through_two_nodes(lab: &mut Lab) {
    let local = Some(SocketAddrV4::new(client_address(), 45_000));
    for _ in 0..4 {
        for through in [1, 2] {
            let address = node_address(through, PORT);
            lab.client.ask(&Request::Open { id: through.to_string(), address, local });
        }
        for through in ["1", "2"] {
            let answer = lab.client.use_connection(through, "/");
            assert!(answer.ends_with(&client_address().to_string()), "{answer}");
        }
        for through in ["1", "2"] {
            lab.client.ask(&Request::Close { id: through.into() });
        }
    }
}

/// What administrators do with every host: list the rules, and save them to load them again.
#[test]
fn the_tools_of_the_host_can_read_our_rules() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.node(1).host.ask(&Request::DropForwarded);
    lab.publish(&[(PORT, ALL), (OTHER, &[])]);
    let run = |lab: &mut Lab, command: &str| {
        let mut nsenter = std::process::Command::new("nsenter");
        nsenter.arg(lab.node(1).host.namespace()).args(["sh", "-c", command]).output().unwrap()
    };
    if !run(&mut lab, "command -v nft && command -v iptables-nft").status.success() {
        return skip("nft and iptables-nft are not installed");
    }
    let listed = run(&mut lab, "nft list ruleset");
    let text = String::from_utf8_lossy(&listed.stdout);
    for part in [
        "numgen inc mod 3 map { 0 : 10.192.4.1 . 80, 1 : 10.192.8.1 . 80, 2 : 10.192.12.1 . 80 }",
        "iifname \"skep-vx\" ether saddr vmap @zones",
        "ct original zone set 2",
        "reject with tcp reset",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let loaded = run(&mut lab, "nft list ruleset | nft --check --file -");
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    let listed = run(&mut lab, "iptables-nft -S FORWARD");
    let text = String::from_utf8_lossy(&listed.stdout);
    let ours = text.lines().filter(|line| line.contains("--comment \"skep mesh ["));
    assert_eq!(ours.count(), 4, "{text}{}", String::from_utf8_lossy(&listed.stderr));
}

/// Each task in turn answers with 1 MiB, two of three from another node.
fn large_answers(lab: &mut Lab) {
    for turn in 0..N {
        let id = format!("large-{turn}");
        lab.client.open(&id, node_address(1, PORT));
        assert_eq!(lab.client.use_connection(&id, "/large").len(), LARGE);
    }
}

/// The tasks refuse all of them. What passed by would be accepted by the daemon, which holds the port.
#[test]
fn no_connection_passes_by_the_rules_of_a_port_while_they_change() {
    if !can_run() {
        return;
    }
    const N_CHANGES: u32 = 500;
    let mut lab = Lab::new();
    lab.publish(&[(PORT, ALL)]);
    for number in 1..=N {
        lab.node(number).task.ask(&Request::Refuse { port: TARGET_PORT });
    }
    lab.client.ask(&Request::BeginStorm { address: node_address(1, PORT).into() });
    for change in 0..N_CHANGES {
        lab.version += 1;
        let backends = if change % 2 == 0 { &ALL[..2] } else { ALL };
        let table = lab.table(1, &[(PORT, backends)]);
        lab.node(1).daemon.ask(&Request::Apply(table));
    }
    let refused: Refused = serde_json::from_value(lab.client.ask(&Request::EndStorm)).unwrap();
    refused.assert_all(N_CHANGES);
}

#[test]
fn outside_and_local_clients_take_turns_together() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, ALL)]);
    let address = node_address(1, PORT);
    for _ in 0..2 {
        let mut answers = Vec::new();
        answers.extend(lab.client.get(address, 1));
        answers.extend(lab.node(1).host.get(address, 1));
        answers.extend(lab.node(1).host.get(loopback(PORT), 1));
        let expect: BTreeMap<String, usize> = (1..=N).map(|n| (n.to_string(), 1)).collect();
        assert_eq!(count(&answers), expect, "{answers:?}");
    }
}

#[test]
fn a_withdrawn_backend_keeps_its_connections_and_gets_no_new_one() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, ALL)]);
    // One connection to each task, by both ways in.
    for turn in 0..N {
        lab.client.open(&format!("mesh-{turn}"), node_address(1, PORT));
        let id = format!("loopback-{turn}");
        lab.node(1).host.open(&id, loopback(PORT));
        // The daemon takes the turn only after it has accepted.
        lab.node(1).host.use_connection(&id, "/");
    }
    let before: Vec<String> =
        (0..N).map(|n| lab.client.use_connection(&format!("mesh-{n}"), "/")).collect();
    assert_eq!(count(&before).len(), usize::from(N), "{before:?}");

    lab.publish(&[(PORT, &[1, 3])]);
    let answers = lab.client.get(node_address(1, PORT), 6);
    let expect = BTreeMap::from([("1".to_owned(), 3), ("3".to_owned(), 3)]);
    assert_eq!(count(&answers), expect);

    lab.publish(&[(PORT, &[])]);
    for who in [Client::Outside, Client::Node(1), Client::Task(1)] {
        let answers = lab.client(who).get(node_address(1, PORT), 1);
        assert_eq!(answers, ["ConnectionRefused"], "{who:?}");
    }
    let answers = lab.node(1).host.get(loopback(PORT), 1);
    assert_eq!(answers, ["ConnectionReset"]);

    lab.publish(&[]);
    let answers = lab.node(1).host.get(loopback(PORT), 1);
    assert_eq!(answers, ["ConnectionRefused"]);
    for (turn, answer) in before.iter().enumerate() {
        assert_eq!(lab.client.use_connection(&format!("mesh-{turn}"), "/"), *answer);
        lab.node(1).host.use_connection(&format!("loopback-{turn}"), "/");
    }
}

#[test]
fn a_change_of_another_port_does_not_restart_the_turns() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, ALL)]);
    let address = node_address(1, PORT);
    let mut answers = lab.client.get(address, 1);
    lab.publish(&[(PORT, ALL), (OTHER, &[2])]);
    answers.extend(lab.client.get(address, 1));
    assert_eq!(count(&lab.client.get(node_address(3, OTHER), 2)), [("2".to_owned(), 2)].into());
    lab.publish(&[(PORT, ALL), (OTHER, &[1])]);
    lab.publish(&[(PORT, ALL)]);
    answers.extend(lab.client.get(address, 1));
    let expect: BTreeMap<String, usize> = (1..=N).map(|n| (n.to_string(), 1)).collect();
    assert_eq!(count(&answers), expect, "{answers:?}");
}

#[test]
fn what_is_right_already_is_not_touched() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[]); // The other nodes must know their peers.
    lab.node(1).host.ask(&Request::DropForwarded);
    let mut table = lab.table(1, &[(PORT, ALL), (OTHER, &[])]);
    // More backends than fit in one message.
    let mut many = lab.table(1, &[(LARGE_PORT, &[1])]).ports.remove(0);
    let addresses = lab.slices.task_addresses(2).take(1000);
    many.backends =
        addresses.map(|address| Backend { address, ..many.backends[0].clone() }).collect();
    table.ports.push(many);
    lab.node(1).daemon.ask(&Request::Apply(table.clone()));
    let mut answers = lab.client.get(node_address(1, PORT), 1);

    let generation = lab.node(1).host.ask(&Request::Generation);
    let recorder = lab.node(1).host.record_changes();
    lab.node(1).daemon.ask(&Request::Apply(table.clone()));
    let restart = lab.start_request(1);
    lab.node(1).daemon.ask(&restart);
    lab.node(1).daemon.ask(&Request::Apply(table));
    let changes = lab.node(1).host.changes(recorder);
    assert_eq!(changes, Vec::<String>::new());
    assert_eq!(lab.node(1).host.ask(&Request::Generation), generation, "no rule was written");

    answers.extend(lab.client.get(node_address(1, PORT), 2));
    let expect: BTreeMap<String, usize> = (1..=N).map(|n| (n.to_string(), 1)).collect();
    assert_eq!(count(&answers), expect, "the turns go on: {answers:?}");
}

#[test]
fn a_refused_batch_names_the_message_that_was_wrong() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::bare();
    let request = Request::Damage { table: "skep-mesh".into(), chain: Some("none".into()) };
    let error = lab.node(1).host.try_ask(&request).unwrap_err();
    assert!(error.starts_with("failed to flush chain skep-mesh none: No such file"), "{error}");
}

#[test]
fn a_daemon_that_crashed_is_replaced_without_a_trace() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, ALL)]);
    for turn in 0..N {
        lab.client.open(&turn.to_string(), node_address(1, PORT));
    }
    let before: Vec<String> =
        (0..N).map(|turn| lab.client.use_connection(&turn.to_string(), "/")).collect();

    let daemon = lab.node(1).host.beside();
    std::mem::replace(&mut lab.node(1).daemon, daemon).kill();
    lab.assert_turns(Client::Outside, node_address(1, PORT)); // Nobody drives node 1 now.
    lab.start(1);
    lab.attach(1); // What the agent does for each task that it finds running.
    lab.assert_turns(Client::Outside, node_address(1, PORT));
    lab.assert_turns(Client::Node(1), loopback(PORT)); // Before any table has come.
    lab.publish(&[(PORT, ALL)]);
    for turn in 0..N {
        let answer = lab.client.use_connection(&turn.to_string(), "/");
        assert_eq!(answer, before[usize::from(turn)]);
    }

    // What someone else broke is repaired by the same table.
    let damages = [
        (Some("source"), "skep-mesh"),
        (Some("tcp-8080"), "skep-mesh"),
        (Some("from-2"), "skep-mesh"),
        (None, "skep-mesh"),
    ];
    for (chain, table) in damages {
        let chain = chain.map(str::to_owned);
        lab.node(1).host.ask(&Request::Damage { table: table.into(), chain });
        lab.publish(&[(PORT, ALL)]);
        lab.assert_turns(Client::Outside, node_address(1, PORT));
        lab.assert_turns(Client::Task(1), node_address(2, PORT));
    }
    let slice = lab.slices.slice(2);
    lab.node(1).host.ip(&format!("route del {slice}"));
    lab.node(1).host.ip("neigh flush dev skep-vx nud permanent");
    lab.node(1).host.ip("rule del fwmark 2/0xfff iif skep-ing");
    lab.node(1).host.ip("link set skep-ing down");
    lab.publish(&[(PORT, ALL)]);
    for through in 1..=N {
        lab.assert_turns(Client::Outside, node_address(through, PORT));
    }
}

#[test]
fn a_host_that_drops_what_is_forwarded_lets_the_mesh_through() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, ALL)]);
    for number in 1..=N {
        lab.node(number).host.ask(&Request::DropForwarded);
    }
    let refused = lab.client.get(node_address(1, PORT), 1);
    assert_eq!(refused, ["TimedOut"], "the policy must be in force");
    lab.publish(&[(PORT, ALL)]);
    for through in 1..=N {
        lab.assert_turns(Client::Outside, node_address(through, PORT));
        lab.assert_turns(Client::Task(1), node_address(through, PORT));
    }
    // Someone flushes the chain: the next table, or the same one again, puts the rules back.
    for number in 1..=N {
        let chain = Some("FORWARD".to_owned());
        lab.node(number).host.ask(&Request::Damage { table: "filter".into(), chain });
    }
    lab.publish(&[(PORT, ALL)]);
    lab.assert_turns(Client::Outside, node_address(2, PORT));
}

#[test]
fn a_port_of_another_program_is_left_to_it_and_reported() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.node(1).host.ask(&Request::Listen { port: PORT });
    let conditions = lab.publish(&[(PORT, ALL), (OTHER, ALL)]);
    let pid = lab.node(1).host.pid();
    assert_eq!(conditions.len(), 1, "{conditions:?}");
    assert!(conditions[0].starts_with("port 8080/tcp is held by "), "{conditions:?}");
    assert!(conditions[0].ends_with(&format!("(pid {pid})")), "{conditions:?}");
    assert!(conditions[0].contains("helper_process"), "{conditions:?}");
    lab.assert_turns(Client::Outside, node_address(1, OTHER));
    lab.assert_turns(Client::Outside, node_address(2, PORT));

    // The other way round: a published port is refused to other programs.
    let error = lab.node(2).host.try_ask(&Request::Listen { port: PORT }).unwrap_err();
    assert!(error.contains("Address already in use"), "{error}");
    lab.publish(&[(OTHER, ALL)]);
    lab.node(2).host.ask(&Request::Listen { port: PORT });
}

#[test]
fn tasks_reach_out_and_are_reached_by_published_ports_alone() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, &[1])]);
    lab.client.ask(&Request::Serve { name: "outside".into(), port: OTHER });
    let out = SocketAddrV4::new(client_address(), OTHER);
    let answers = lab.node(1).task.get(out, 1);
    assert_eq!(answers, [format!("outside {}", underlay(1))], "masqueraded at the node");

    let slice = lab.slices.slice(1);
    lab.client.ip(&format!("route add {slice} via {}", underlay(1)));
    let task = SocketAddrV4::new(lab.task_address(1), TARGET_PORT);
    assert_eq!(lab.client.get(task, 1), ["TimedOut"], "not published");
    let (name, own) = ("1".to_owned(), client_address());
    assert_eq!(lab.client.get(node_address(1, PORT), 1), [format!("{name} {own}")]);
    // Nodes and tasks of the cluster may reach a task directly.
    assert_eq!(count(&lab.node(1).host.get(task, 1)), [(name.clone(), 1)].into());
    assert_eq!(count(&lab.node(2).host.get(task, 1)), [(name.clone(), 1)].into());
    assert_eq!(count(&lab.node(3).task.get(task, 1)), [(name, 1)].into());
}

#[test]
fn tunnel_packets_are_taken_from_members_alone() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, ALL)]);
    // The outside client behaves as a node number 4 would.
    let (number, node) = (4, 1);
    let (own, gateway) = (lab.slices.tunnel_address(number), lab.slices.tunnel_address(node));
    let (own_mac, node_mac) = (Mac::tunnel(number), Mac::tunnel(node));
    let client = &lab.client;
    let local = client_address();
    client.ip(&format!(
        "link add vx0 address {own_mac} type vxlan id 9001 local {local} dstport 4789 nolearning"
    ));
    client.ip("link set vx0 mtu 1450 up");
    client.ip(&format!("addr add {own}/32 dev vx0"));
    client.ip(&format!("neigh add {gateway} lladdr {node_mac} dev vx0 nud permanent"));
    let fdb = format!("fdb add {node_mac} dev vx0 dst {}", underlay(node));
    let net = client.namespace();
    let mut command = std::process::Command::new("nsenter");
    let status = command.arg(net).arg("bridge").args(fdb.split(' ')).status().unwrap();
    assert!(status.success(), "bridge {fdb}");
    client.ip(&format!("route add {} via {gateway} dev vx0 onlink", lab.slices.slice(node)));

    let task = SocketAddrV4::new(lab.task_address(node), TARGET_PORT);
    let mut table = lab.table(node, &[(PORT, ALL)]);
    table.version += 1;
    let strangers = table.clone();
    table.peers.push(Peer { number, underlay: local });
    for _ in 0..2 {
        lab.node(node).daemon.ask(&Request::Apply(strangers.clone()));
        let before = lab.node(node).host.received("skep-vx");
        assert_eq!(lab.client.get(task, 1), ["TimedOut"], "not a member");
        let after = lab.node(node).host.received("skep-vx");
        assert_eq!(after, before, "a stranger's packets do not even enter the tunnel");
        lab.node(node).daemon.ask(&Request::Apply(table.clone()));
        assert_eq!(lab.client.get(task, 1), [format!("{node} {own}")], "a member");
    }
}

#[test]
fn teardown_leaves_nothing_of_ours_and_everything_else() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::bare();
    lab.node(1).host.ask(&Request::DropForwarded);
    lab.node(1).host.ip("rule add fwmark 7 lookup 20007 pref 1999");
    lab.node(1).host.ip("route add blackhole 192.0.2.0/24 table 20007");
    let before = snapshot(&mut lab, 1);
    for number in 1..=N {
        lab.start(number);
        lab.attach(number);
    }
    lab.publish(&[(PORT, ALL)]);
    lab.assert_turns(Client::Outside, node_address(1, PORT));
    assert_ne!(snapshot(&mut lab, 1), before);
    lab.node(1).daemon.ask(&Request::Teardown);
    assert_eq!(snapshot(&mut lab, 1), before);
    lab.node(1).host.ask(&Request::Listen { port: PORT });
    // The other nodes go on with the tasks that are left.
    lab.publish_without_node_1();
    let answers = lab.client.get(node_address(2, PORT), 4);
    assert_eq!(count(&answers), [("2".to_owned(), 2), ("3".to_owned(), 2)].into());
}

#[test]
fn a_daemon_that_never_started_the_mesh_removes_what_another_left() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::bare();
    // One whose number and marks are not those that a removal assumes.
    let number = 2;
    lab.node(number).host.ask(&Request::DropForwarded);
    let before = snapshot(&mut lab, number);
    let run_dir = lab.run_dir(number);
    let remove = || Request::Remove { run_dir: run_dir.clone() };
    lab.node(number).daemon.ask(&remove());
    assert_eq!(snapshot(&mut lab, number), before, "nothing was there");

    for number in 1..=N {
        lab.start(number);
        lab.attach(number);
    }
    lab.publish(&[(PORT, ALL)]);
    lab.assert_turns(Client::Outside, node_address(number, PORT));
    let daemon = lab.node(number).host.beside();
    std::mem::replace(&mut lab.node(number).daemon, daemon).kill();
    assert_ne!(snapshot(&mut lab, number), before);
    lab.node(number).daemon.ask(&remove());
    assert_eq!(snapshot(&mut lab, number), before);
    lab.node(number).daemon.ask(&remove());
    assert_eq!(snapshot(&mut lab, number), before, "and again");
}

/// Links, addresses, rules, routes, neighbours and chains of a node.
fn snapshot(lab: &mut Lab, number: u16) -> Vec<String> {
    let host = &mut lab.node(number).host;
    let mut found: Vec<String> =
        ["-o link", "-o addr", "rule", "route show table all", "-o maddr show dev eth0"]
            .iter()
            .map(|arguments| host.ip(arguments))
            .collect();
    found.push(host.ask(&Request::Chains).to_string());
    found
}

#[test]
fn uplinks_are_attached_and_detached_any_number_of_times() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.publish(&[(PORT, &[1])]);
    let name = interface_name(&task_name(1));
    let mtu = lab.node(1).task.ip("-o link show eth0");
    assert!(mtu.contains("mtu 1450"), "{mtu}");
    let link = lab.node(1).host.ip(&format!("-o -d link show {name}"));
    assert!(link.contains("hairpin on") && link.contains(&task_name(1)), "{link}");

    lab.client.open("kept", node_address(2, PORT));
    lab.attach(1);
    let kept = lab.client.use_connection("kept", "/");
    assert_eq!(kept, format!("1 {}", client_address()), "attached again without disturbance");

    for _ in 0..2 {
        lab.node(1).daemon.ask(&Request::Detach { task_id: task_name(1) });
    }
    let links = lab.node(1).host.ip("-o link");
    assert!(!links.contains(&name), "{links}");
    lab.attach(1);
    assert_eq!(lab.client.get(node_address(2, PORT), 1), [kept]);

    let node = lab.node(1);
    let (pid, foreign) = (node.host.pid(), Ipv4Addr::new(10, 192, 8, 1));
    let attach = |pid, address| Request::Attach { task_id: "other".into(), pid, address };
    let own = Ipv4Addr::new(10, 192, 4, 9);
    for (request, expect) in [
        (attach(pid, own), "is in the node's own network namespace"),
        (attach(node.task.pid(), foreign), "it is not a task address of 10.192.4.0/22"),
        (attach(node.task.pid(), own), "interface eth0 of task other exists"),
        (attach(u32::MAX >> 1, own), "is gone"),
    ] {
        let error = node.daemon.try_ask(&request).unwrap_err();
        assert!(error.contains(expect), "{request:?}: {error}");
    }
}

#[test]
fn a_start_that_would_do_harm_is_refused() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::bare();
    let request = lab.start_request(1);
    lab.node(1).host.ip("route add 10.200.0.0/16 via 10.98.0.2 dev eth0");
    let error = lab.node(1).daemon.try_ask(&request).unwrap_err();
    let expect = "the address pool 10.192.0.0/10 overlaps the route to 10.200.0.0/16 through eth0; \
                  choose another pool";
    assert_eq!(error, expect);
    let untouched = lab.node(1).host.ip("-o link");
    assert!(!untouched.contains("skep"), "{untouched}");
    lab.node(1).host.ip("route del 10.200.0.0/16");
    lab.node(1).host.ip("route add default via 10.98.0.2");
    lab.node(1).daemon.ask(&request);

    let mut second = lab.node(1).host.beside();
    let error = second.try_ask(&request).unwrap_err();
    assert!(error.starts_with("another process holds the lock "), "{error}");

    let other = lab.table(2, &[]);
    let error = lab.node(1).daemon.try_ask(&Request::Apply(other)).unwrap_err();
    assert!(error.starts_with("mesh table 0 is for node number 2 of "), "{error}");
}
