//! Overlay networks in surroundings that have hurt users of others: hosts that drop by default, equal
//! subnets, networks that come back at once, nodes that are cut off.
//!
//! Requests are sent from the network of a task, to virtual addresses; the load client tries nothing
//! twice.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, SETTLES_WITHIN, Whoami, is_root_or_skip, wait_until,
};

const NODES: [&str; 4] = ["n1", "n2", "n3", "n4"];

#[test]
fn networks_hold_in_hostile_surroundings() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 1, ..LabOptions::default() });
    NODES.iter().for_each(|node| drop_by_default(&lab, node));
    lab.import_whoami();
    step("equal subnets");
    networks_of_equal_subnets_are_apart(&lab);
    step("removed and made again at once");
    a_network_is_made_again_at_once(&lab);
    step("a client in the subnet of a network");
    a_client_may_have_an_address_of_the_network(&lab);
    step("IPv6");
    tasks_reach_each_other_over_ipv6(&lab);
    step("a node that is cut off");
    a_node_that_is_cut_off_comes_back(&lab);
    lab.down();
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

/// The firewall of a careful host: only what a swarm needs comes in, nothing is forwarded.
fn drop_by_default(lab: &Lab, node: &str) {
    let rules = "
        table inet firewall {
            chain input {
                type filter hook input priority filter; policy drop;
                ct state established,related accept
                iifname lo accept
                meta l4proto icmp accept
                meta l4proto ipv6-icmp accept
                tcp dport 2377 accept
                udp dport 4789 accept
            }
        }
        table ip filter {
            chain FORWARD { type filter hook forward priority filter; policy drop; }
        }
        table ip6 filter {
            chain FORWARD { type filter hook forward priority filter; policy drop; }
        }";
    lab.node(node).exec(&["nft", rules]).ok();
}

/// Creates a service of whoami with one task on each of the nodes.
fn create(lab: &Lab, name: &str, network: &str, nodes: &[&str], flags: &[&str]) {
    let n_tasks = nodes.len().to_string();
    let not_there = NODES.iter().filter(|node| !nodes.contains(node));
    let constraints: Vec<String> =
        not_there.map(|node| format!("--constraint=node.hostname!={node}")).collect();
    let mut all = vec!["--network", network, "--replicas", &n_tasks];
    all.extend(["--replicas-max-per-node", "1", "--restart-delay", "500ms"]);
    all.extend(constraints.iter().map(String::as_str));
    all.extend(flags);
    lab.node("n1").create_whoami(name, &all);
}

fn network(lab: &Lab, flags: &[&str], name: &str) {
    lab.node("n1").skep(&[&["network", "create"], flags, &[name]].concat()).ok();
}

fn remove(lab: &Lab, services: &[&str], networks: &[&str]) {
    let n1 = lab.node("n1");
    n1.skep(&[&["service", "rm"], services].concat()).ok();
    n1.skep(&[&["network", "rm"], networks].concat()).ok();
}

fn inspect(lab: &Lab, kind: &str, name: &str) -> Value {
    lab.node("n1").skep(&[kind, "inspect", name]).ok().json()[0].clone()
}

/// The virtual addresses of a service, without their prefixes, as URLs.
fn virtual_urls(lab: &Lab, service: &str) -> Vec<String> {
    let inspected = inspect(lab, "service", service);
    let addresses = inspected["Endpoint"]["VirtualIPs"].as_array().unwrap();
    let address = |entry: &Value| {
        let text = entry["Addr"].as_str().unwrap();
        match text.split_once('/').unwrap().0 {
            ipv6 if ipv6.contains(':') => format!("http://[{ipv6}]:8080/"),
            ipv4 => format!("http://{ipv4}:8080/"),
        }
    };
    addresses.iter().map(address).collect()
}

fn on(lab: &Lab, service: &str, node: &str) -> Whoami {
    lab.whoamis_of(service).into_iter().find(|whoami| whoami.node == node).unwrap()
}

/// For an address that is new: a node may hear of a task a moment after managers call it running, and refuses
/// connections until then.
#[track_caller]
fn wait_until_answered(from: &Whoami, url: &str) {
    wait_until(SETTLES_WITHIN, &format!("{url} is answered from {}", from.node), || {
        let report = from.requests(&[url.to_owned()], 1);
        ((report.summary.failed == 0).then_some(()), format!("{report:#?}"))
    });
}

/// Waits until exactly these tasks of a service, by node, answer in turns, `n` each; no request fails meanwhile.
#[track_caller]
fn wait_for_turns(from: &Whoami, url: &str, service: &str, nodes: &[&str], n: usize) {
    let expect: BTreeMap<(&str, &str), usize> =
        nodes.iter().map(|node| ((service, *node), n)).collect();
    wait_until(SETTLES_WITHIN, &format!("{url} from {}: {expect:?}", from.node), || {
        let report = from.requests(&[url.to_owned()], n * nodes.len());
        report.assert_none_failed();
        let mut turns: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for record in &report.records {
            *turns.entry((record.field("Service"), record.field("Node"))).or_default() += 1;
        }
        ((turns == expect).then_some(()), format!("{turns:?}"))
    });
}

/// Each network has four tasks and a virtual address in a range of eight: they share some.
fn networks_of_equal_subnets_are_apart(lab: &Lab) {
    let services = [("left", "one"), ("right", "two")];
    for (service, name) in services {
        network(lab, &["--subnet", "10.61.0.0/24", "--ip-range", "10.61.0.8/29"], name);
        create(lab, service, name, &NODES, &[]);
    }
    for (service, _) in services {
        lab.wait_until_settled("n1", service, NODES.len());
    }
    let range: Vec<String> = (8..16).map(|host| format!("http://10.61.0.{host}:8080/")).collect();
    for (service, _) in services {
        let url = virtual_urls(lab, service).remove(0);
        for node in NODES {
            let from = on(lab, service, node);
            wait_until_answered(&from, &url);
            wait_for_turns(&from, &url, service, &NODES, 2);
        }
        let report = on(lab, service, "n4").requests(&range, range.len());
        let expect = [(service, NODES.len() + 1)].into();
        assert_eq!(report.count_by("Service"), expect, "all that answers is its own");
    }
    remove(lab, &["left", "right"], &["one", "two"]);
}

/// Each time the addresses are the same, and so are the names, while the earlier tasks still stop.
fn a_network_is_made_again_at_once(lab: &Lab) {
    let (nodes, mut ids) = (["n1", "n4"], BTreeSet::new());
    for round in ["1", "2", "3"] {
        network(lab, &["--subnet", "10.62.0.0/24"], "again");
        assert!(ids.insert(inspect(lab, "network", "again")["Id"].to_string()), "a new one");
        create(lab, "web", "again", &nodes, &["--env", &format!("ROUND={round}")]);
        let of_round = wait_until(SETTLES_WITHIN, "the tasks of this round run", || {
            let all = lab.whoamis_of("web");
            let is_new = |whoami: &&Whoami| whoami.environment.get("ROUND").unwrap() == round;
            let new: Vec<Whoami> = all.iter().filter(is_new).cloned().collect();
            ((new.len() == nodes.len()).then_some(new), format!("{all:#?}"))
        });
        lab.wait_until_settled("n1", "web", nodes.len());
        for from in &of_round {
            let url = &virtual_urls(lab, "web")[0];
            wait_until_answered(from, url);
            wait_for_turns(from, url, "web", &nodes, 2);
        }
        remove(lab, &["web"], &["again"]);
    }
}

/// What comes in by the published port is answered by it, although the network has a route to the
/// client's address as well. The hosts drop what they forward, and let the mesh through.
fn a_client_may_have_an_address_of_the_network(lab: &Lab) {
    let of_client = lab.client().address().octets();
    let subnet = format!("{}.{}.{}.0/24", of_client[0], of_client[1], of_client[2]);
    network(lab, &["--subnet", &subnet], "near");
    create(lab, "web", "near", &["n3", "n4"], &["--publish", "8080:8080"]);
    lab.wait_until_settled("n1", "web", 2);
    let urls = NODES.map(|node| lab.url(node, 8080));
    urls.iter().for_each(|url| lab.wait_for_turns("client", url, "Node", &[("n3", 1), ("n4", 1)]));
    let options = LoadOptions { requests: Some(16), ..LoadOptions::to(urls) };
    let report = lab.load("client", &options).finish();
    report.assert_none_failed();
    assert_eq!(report.count_by("Node"), [("n3", 8), ("n4", 8)].into());
    let address = lab.client().address().to_string();
    assert!(report.records.iter().all(|record| record.field("Client").starts_with(&address)));
    remove(lab, &["web"], &["near"]);
}

fn tasks_reach_each_other_over_ipv6(lab: &Lab) {
    network(lab, &["--ipv6", "--subnet", "10.63.0.0/24", "--subnet", "fd63::/64"], "six");
    create(lab, "web", "six", &["n1", "n4"], &[]);
    lab.wait_until_settled("n1", "web", 2);
    let urls = virtual_urls(lab, "web");
    assert!(urls.len() == 2 && urls.iter().any(|url| url.contains("fd63::")), "{urls:?}");
    for node in ["n1", "n4"] {
        for url in &urls {
            let from = on(lab, "web", node);
            wait_until_answered(&from, url);
            wait_for_turns(&from, url, "web", &["n1", "n4"], 2);
        }
    }
    let report = on(lab, "web", "n1").requests(&urls[..], 8);
    let is_ipv6 = |address: &str| address.starts_with("[fd63::");
    let over_ipv6 = report.records.iter().filter(|r| is_ipv6(r.field("Client"))).count();
    assert_eq!(over_ipv6, 4, "half of the requests: {report:#?}");
    remove(lab, &["web"], &["six"]);
}

/// A task on the far side of a cut is replaced; no request goes to it from when the swarm knows, and
/// none when it is back.
fn a_node_that_is_cut_off_comes_back(lab: &Lab) {
    network(lab, &[], "wide");
    create(lab, "web", "wide", &["n2", "n3", "n4"], &[]);
    create(lab, "asker", "wide", &["n1"], &[]);
    lab.wait_until_settled("n1", "web", 3);
    lab.wait_until_settled("n1", "asker", 1);
    let url = virtual_urls(lab, "web").remove(0);
    let (asker, web) = (on(lab, "asker", "n1"), on(lab, "web", "n4"));
    lab.cut(&["n4"]);
    lab.wait_for_node("n1", "n4", "Down");
    wait_for_turns(&asker, &url, "web", &["n2", "n3"], 4);
    // The node itself decides nothing without managers: what it knew goes on.
    assert!(lab.whoamis_of("web").iter().any(|whoami| whoami.task == web.task), "it runs on");
    lab.heal(&["n4"]);
    lab.wait_for_node("n1", "n4", "Ready");
    lab.wait_until_settled("n1", "web", 3);
    for from in [asker, on(lab, "web", "n4")] {
        wait_for_turns(&from, &url, "web", &["n2", "n3", "n4"], 3);
    }
    remove(lab, &["web", "asker"], &["wide"]);
}
