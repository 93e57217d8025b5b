//! What operators are shown of a real swarm's networks: who is where, and who was not waited for.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use serde_json::Value;
use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, SETTLES_WITHIN, daemon_with_metrics, is_root_or_skip, wait_until,
};

const WEB: &str = "web";
const N_TASKS: usize = 2;
/// A busy machine answers late; what is lost is not answered at all.
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn operators_see_who_is_where() {
    if !is_root_or_skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let daemon = Some(daemon_with_metrics(dir.path()));
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, daemon, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").skep(&["network", "create", "front"]).ok();
    lab.node("n1").create_whoami(
        WEB,
        &[
            "--replicas",
            "2",
            "--publish",
            "8080:8080",
            "--network",
            "front",
            "--constraint",
            "node.hostname!=n3",
        ],
    );
    lab.wait_until_settled("n1", WEB, N_TASKS);
    step("endpoints");
    endpoints_are_listed(&lab);
    step("counts");
    connections_are_counted_by_task(&lab);
    step("a node that does not acknowledge");
    a_node_that_does_not_acknowledge_is_named(&lab);
    step("checks between nodes");
    what_stands_between_two_nodes_is_named(&lab);
    lab.down();
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

fn endpoints(lab: &Lab) -> Vec<Value> {
    lab.node("n1").skep(&["service", "endpoints", "--format", "json", WEB]).ok().json_lines()
}

fn endpoints_are_listed(lab: &Lab) {
    let rows = wait_until(SETTLES_WITHIN, "both tasks are in the balancer", || {
        let rows = endpoints(lab);
        let is_so = rows.len() == N_TASKS && rows.iter().all(|row| row["InBalancer"] == "yes");
        (is_so.then(|| rows.clone()), format!("{rows:#?}"))
    });
    let inspect = ["network", "inspect", "--verbose", "front"];
    let network = lab.node("n1").skep(&inspect).ok().json()[0].clone();
    for (row, task) in rows.iter().zip(network["Services"][WEB]["Tasks"].as_array().unwrap()) {
        let node = row["Node"].as_str().unwrap();
        assert_eq!(task["Info"]["Host IP"], lab.node(node).address().to_string());
        assert_eq!(row["Networks"], format!("front={}", task["EndpointIP"].as_str().unwrap()));
        assert!(row["Ingress"].as_str().unwrap().starts_with("10."), "{row}");
    }
}

/// n3 has no task: what it gives away is counted there, and nowhere else.
fn connections_are_counted_by_task(lab: &Lab) {
    const N_REQUESTS: u64 = 40;
    let connections = "skep_ingress_connections_total";
    let before = lab.metric("n3", connections);
    assert_eq!(before.values().copied().collect::<Vec<u64>>(), [0, 0], "{before:?}");
    let url = format!("http://{}:8080/", lab.node("n3").address());
    let options = LoadOptions { requests: Some(N_REQUESTS), ..LoadOptions::to([url]) };
    lab.load("client", &options).finish().assert_none_failed();
    let counted = lab.metric("n3", connections);
    assert_eq!(counted.values().copied().collect::<Vec<u64>>(), [20, 20], "{counted:?}");
    for labels in counted.keys() {
        assert!(labels.starts_with("service=\"web\",task="), "{labels}");
        assert!(labels.contains("port=\"8080\",protocol=\"tcp\""), "{labels}");
    }
    for node in ["n1", "n2"] {
        assert_eq!(lab.metric(node, connections).values().sum::<u64>(), 0, "{node}");
    }
    let bytes = lab.metric("n3", "skep_ingress_bytes_total");
    assert_eq!(bytes.len(), 4, "{bytes:?}");
    // An answer of whoami is longer than its request; a handshake alone takes 20 * 3 * 40 bytes.
    let of = |direction: &str| -> u64 {
        bytes.iter().filter(|(labels, _)| labels.contains(direction)).map(|(_, n)| n).sum()
    };
    assert!(of("direction=\"in\"") > 40 * 3 * 40, "{bytes:?}");
    assert!(of("direction=\"out\"") > 40 * 3 * 40, "{bytes:?}");
    assert_eq!(lab.metric("n3", "skep_ingress_failures_total").values().sum::<u64>(), 0);
    refusals_are_counted(lab);
    datagrams_and_ipv6_are_counted(lab);
}

/// A task that nobody listens in refuses connections: whoami listens on 8080, not on 81.
fn refusals_are_counted(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.create_whoami("deaf", &["--publish", "8081:81", "--constraint", "node.hostname==n1"]);
    lab.wait_until_settled("n1", "deaf", 1);
    let failures = || -> u64 {
        let all = lab.metric("n3", "skep_ingress_failures_total");
        all.iter().filter(|(labels, _)| labels.contains("deaf")).map(|(_, n)| n).sum()
    };
    let url = format!("http://{}:8081/", lab.node("n3").address());
    wait_until(SETTLES_WITHIN, "a refused connection is counted", || {
        let refused = lab.client().exec(&["curl", "-sS", "--max-time", "10", &url]);
        ((failures() > 0).then_some(()), refused.to_string())
    });
    let before = failures();
    lab.client().exec(&["curl", "-sS", "--max-time", "10", &url]).err();
    assert_eq!(failures(), before + 1);
    n1.skep(&["service", "rm", "deaf"]).ok();
}

/// A flow of datagrams is one connection, and one by IPv6 counts with the same task.
fn datagrams_and_ipv6_are_counted(lab: &Lab) {
    const N_FLOWS: usize = 3;
    let n1 = lab.node("n1");
    let ports = ["--publish", "8082:8080", "--publish", "8082:8080/udp"];
    n1.create_whoami("more", &[&ports[..], &["--constraint", "node.hostname==n1"]].concat());
    lab.wait_until_settled("n1", "more", 1);
    let of = |name: &str, protocol: &str, more: &str| -> u64 {
        let (protocol, port) = (format!("protocol=\"{protocol}\""), "port=\"8082\"");
        let all = lab.metric("n3", name);
        let are_of =
            |labels: &str| [port, &protocol, more].iter().all(|part| labels.contains(part));
        all.iter().filter(|(labels, _)| are_of(labels)).map(|(_, n)| n).sum()
    };
    let connections = |protocol: &str| of("skep_ingress_connections_total", protocol, "");
    let address = lab.node("n3").address();
    // n3 may hear of the task a moment later.
    wait_until(SETTLES_WITHIN, "n3 balances to the task", || {
        let rows = n1.skep(&["service", "endpoints", "--format", "json", "more"]).ok().json_lines();
        let seen = format!("{rows:?}");
        (rows.iter().all(|row| row["InBalancer"] == "yes").then_some(()), seen)
    });
    lab.in_network_of_client(move || {
        for _ in 0..N_FLOWS {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.connect((address, 8082)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            for _ in 0..2 {
                socket.send(b"who").unwrap();
                socket.recv(&mut [0; 2000]).unwrap();
            }
        }
    });
    assert_eq!(connections("udp"), N_FLOWS as u64);
    let bytes = |protocol: &str, direction: &str| {
        of("skep_ingress_bytes_total", protocol, &format!("direction=\"{direction}\""))
    };
    // Each datagram of three bytes has headers of IP and UDP.
    assert_eq!(bytes("udp", "in"), N_FLOWS as u64 * 2 * (20 + 8 + 3));
    assert!(bytes("udp", "out") > bytes("udp", "in"));
    let has_ipv6 = fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    if has_ipv6.is_ok_and(|text| text.trim() == "0") {
        assert_eq!((connections("tcp"), bytes("tcp", "in")), (0, 0));
        let [a, b, c, d] = address.octets().map(u16::from);
        let of_ipv6 = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, a << 8 | b, c << 8 | d);
        let url = format!("http://[{of_ipv6}]:8082/");
        for _ in 0..N_FLOWS {
            lab.client().exec(&["curl", "-sS", "--max-time", "10", &url]).ok();
        }
        assert_eq!(connections("tcp"), N_FLOWS as u64);
        // A handshake and the request alone: four packets with headers of IPv6 and TCP.
        assert!(bytes("tcp", "in") > N_FLOWS as u64 * 4 * (40 + 20));
        assert!(bytes("tcp", "out") > N_FLOWS as u64 * 4 * (40 + 20));
    }
    n1.skep(&["service", "rm", "more"]).ok();
}

/// n3 has no task of the service, but balances to it as every node does.
fn a_node_that_does_not_acknowledge_is_named(lab: &Lab) {
    lab.node("n3").signal_daemon("STOP");
    lab.node("n1").skep(&["service", "update", "--detach", "--force", WEB]).ok();
    let expect = "\"stopped without the acknowledgement of n3\"";
    lab.node("n1").wait_for_tasks(WEB, "the first stopped task says who was missing", |tasks| {
        tasks.iter().any(|task| task.state() == "Shutdown" && task.error == expect).then_some(())
    });
    let log = lab.node("n1").log();
    let said = "a task is stopped without the acknowledgement of nodes";
    assert!(log.lines().any(|line| line.contains(said) && line.contains("n3")), "{log}");
    lab.node("n3").signal_daemon("CONT");
    lab.wait_for_node("n1", "n3", "Ready");
    lab.wait_until_settled("n1", WEB, N_TASKS);
}

/// The checks of n2 and n3 that failed, as `check from to: detail`.
fn failed_checks(lab: &Lab) -> Vec<String> {
    let output = lab.node("n1").skep(&["network", "check", "--format", "json", "n2", "n3"]);
    let word = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows = output.json_lines();
    let failed = rows.iter().filter(|row| row["Result"] == "failed");
    let failed = failed.map(|row| {
        assert_ne!(word(row, "WhatToDo"), "", "{row}");
        let [check, from, to, detail] = ["Check", "From", "To", "Detail"].map(|key| word(row, key));
        format!("{check} {from} {to}: {detail}")
    });
    let failed: Vec<String> = failed.collect();
    assert!(!rows.is_empty() && output.status.success() == failed.is_empty(), "{output}");
    failed
}

fn what_stands_between_two_nodes_is_named(lab: &Lab) {
    let n3 = lab.node("n3");
    assert_eq!(failed_checks(lab), [""; 0], "a healthy pair");
    let chain =
        "add table inet hostfw; add chain inet hostfw in { type filter hook input priority 0; }";
    n3.exec(&["nft", chain]).ok();
    let named = "add set inet hostfw bad { type ipv4_addr; flags interval; }; \
        add element inet hostfw bad { 0.0.0.0/1, 128.0.0.0/1 }; \
        add rule inet hostfw in ip saddr @bad udp dport { 53, 4780-4789 } drop";
    n3.exec(&["nft", named]).ok();
    let [dropped] = &failed_checks(lab)[..] else { panic!("one direction fails") };
    let expect = "vxlan n2 n3: UDP 4789 arrives at the interface and is dropped there: on n3, a rule of chain in in table inet hostfw";
    assert!(dropped.starts_with(expect), "{dropped}");
    n3.exec(&["nft", "delete table inet hostfw"]).ok();
    n3.exec(&["iptables-nft", "-A", "INPUT", "-p", "udp", "--dport", "4789", "-j", "DROP"]).ok();
    let dropped = failed_checks(lab).join("\n");
    assert!(dropped.contains("a rule of chain INPUT in table ip filter"), "{dropped}");
    n3.exec(&["iptables-nft", "-F", "INPUT"]).ok();
    assert_eq!(failed_checks(lab), [""; 0], "nothing is in the way any more");

    n3.exec(&["ip", "link", "set", "eth0", "mtu", "1400"]).ok();
    let failed = failed_checks(lab);
    let expect = "mtu n2 n3: packets of 1500 bytes do not arrive, of 1400 do, of 1450 do not";
    assert!(failed.iter().any(|line| line == expect), "{failed:?}");
    n3.exec(&["ip", "link", "set", "eth0", "mtu", "1500"]).ok();

    let chain =
        "add table ip lossy; add chain ip lossy out { type filter hook output priority 0; }";
    n3.exec(&["nft", chain]).ok();
    let some = "add rule ip lossy out udp dport 4789 numgen inc mod 10 < 4 drop";
    n3.exec(&["nft", some]).ok();
    let failed = failed_checks(lab);
    assert!(failed.iter().any(|line| line.starts_with("loss n3 n2: ")), "{failed:?}");
    n3.exec(&["nft", "delete table ip lossy"]).ok();

    lab.cut(&["n3"]);
    let failed = failed_checks(lab);
    assert!(failed.len() == 1 && failed[0].starts_with("daemon n3 : no answer: "), "{failed:?}");
    lab.heal(&["n3"]);
    lab.wait_for_node("n1", "n3", "Ready");
    wait_until(SETTLES_WITHIN, "the healed pair is well", || {
        let failed = failed_checks(lab);
        (failed.is_empty().then_some(()), format!("{failed:?}"))
    });
}
