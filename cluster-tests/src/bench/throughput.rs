//! Throughput of one TCP connection between containers on two nodes, beside a VXLAN made by hand.
//!
//! The VXLAN made by hand is what an administrator would set up for two containers: on each node a tunnel and
//! a bridge, and behind it a network namespace, with the same MTU and over the same cable.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use skep_cluster_tests::{Lab, Running, SETTLES_WITHIN, wait_until};

use super::figures::{Samples, Target, Unit, load_average};
use super::place::Place;
use super::{program, start_lab};

const OVERLAY: &str = "overlay";
const ENCRYPTED: &str = "encrypted";
const BY_HAND: &str = "by hand";
const OF_BY_HAND: Target = Target::AtLeast(0.9);
const NODES: [&str; 2] = ["n1", "n2"];

/// A way from a client on n1 to a server on n2.
struct Way<'a> {
    name: &'static str,
    client: Place<'a>,
    server: Ipv4Addr,
    /// The server, and what else must go on meanwhile.
    _running: Vec<Running>,
}

pub(crate) fn run(is_quick: bool) {
    if program("iperf3").is_none() {
        println!("not measured: iperf3 is not installed (apt-get install iperf3)");
        return;
    }
    let (n_rounds, seconds) = if is_quick { (3, "1") } else { (15, "2") };
    let lab = start_lab(1, 1);
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.skep(&["network", "create", OVERLAY]).ok();
    n1.skep(&["network", "create", "--opt", "encrypted=", ENCRYPTED]).ok();
    let overlay = network_way(&lab, OVERLAY);
    let mtu = mtu(&overlay.client);
    let mut ways = vec![overlay, network_way(&lab, ENCRYPTED), way_by_hand(&lab, &mtu)];
    for way in &ways {
        let what = format!("iperf3 answers on the way `{}`", way.name);
        wait_until(SETTLES_WITHIN, &what, || {
            let server = way.server.to_string();
            let connect = ["iperf3", "--connect-timeout", "2000", "-n", "1K", "-c", &server];
            let output = way.client.exec(&connect);
            (output.status.success().then_some(()), output.to_string())
        });
    }
    let mut figures: BTreeMap<&str, [Samples; 2]> = BTreeMap::new();
    for round in 1..=n_rounds {
        // Each round begins with another way.
        ways.rotate_left(1);
        let rates: BTreeMap<&str, f64> =
            ways.iter().map(|way| (way.name, gigabits_per_second(way, seconds))).collect();
        let words: Vec<String> =
            rates.iter().map(|(name, rate)| format!("{name} {rate:.2} Gbit/s")).collect();
        println!("round {round}: {}; load {}", words.join(", "), load_average());
        for (name, rate) in &rates {
            let samples = figures.entry(name);
            let new = || [Unit::GigabitsPerSecond, Unit::Ratio].map(Samples::new);
            let [absolute, ratios] = samples.or_insert_with(new);
            absolute.add(*rate);
            ratios.add(rate / rates[BY_HAND]);
        }
    }
    for (name, [absolute, ratios]) in figures {
        absolute.report(name, None);
        if name != BY_HAND {
            let target = (name == OVERLAY).then_some(OF_BY_HAND);
            ratios.report(&format!("{name} / {BY_HAND}"), target);
        }
    }
    drop(ways);
    lab.down();
}

/// Containers of two services on an overlay network.
fn network_way<'a>(lab: &'a Lab, network: &'static str) -> Way<'a> {
    let places = NODES.map(|node| {
        let service = format!("{network}-{node}");
        let constraint = format!("node.hostname=={node}");
        let flags = ["--network", network, "--constraint", &constraint];
        lab.node("n1").create_whoami(&service, &flags);
        lab.wait_until_settled("n1", &service, 1);
        Place::of_service(lab, &service)
    });
    let [client, server] = places;
    let running = vec![server.start(&["iperf3", "--server"])];
    Way { name: network, client, server: server.address(), _running: running }
}

/// Namespaces behind tunnels and bridges that are made with `ip`.
fn way_by_hand<'a>(lab: &'a Lab, mtu: &str) -> Way<'a> {
    let mut running = Vec::new();
    let mut places = Vec::new();
    for (node, other) in NODES.into_iter().zip(NODES.into_iter().rev()) {
        let hold = "echo $$; exec unshare --net sh -c 'echo ready; exec sleep infinity'";
        let held = Place::on(lab, node).start(&["sh", "-c", hold]);
        held.wait_for_line(SETTLES_WITHIN, "a namespace is there", |line| line == "ready");
        let lines = held.lines();
        let pid = lines.first().and_then(|line| line.parse().ok());
        let pid: u32 = pid.unwrap_or_else(|| panic!("no pid came first: {lines:?}"));
        running.push(held);
        let (own, other) = (lab.node(node).address(), lab.node(other).address());
        let script = format!(
            "set -e
            ip link add hand-vx type vxlan id 77 dstport 8472 local {own} remote {other}
            ip link add hand-br type bridge
            ip link add hand-out type veth peer name eth0 netns {pid}
            for link in hand-vx hand-br hand-out; do ip link set $link mtu {mtu} up; done
            for port in hand-vx hand-out; do ip link set $port master hand-br; done"
        );
        Place::on(lab, node).exec(&["sh", "-c", &script]).ok();
        let place = Place::of_process(lab, node, pid);
        let number = node.trim_start_matches('n');
        let script = format!(
            "set -e
            ip link set eth0 mtu {mtu} up
            ip address add 192.0.2.{number}/24 dev eth0"
        );
        place.exec(&["sh", "-c", &script]).ok();
        places.push(place);
    }
    let server = places.pop().expect("there are two");
    running.push(server.start(&["iperf3", "--server"]));
    let client = places.pop().expect("there are two");
    Way { name: BY_HAND, client, server: server.address(), _running: running }
}

/// The MTU of the first interface.
fn mtu(place: &Place<'_>) -> String {
    let output = place.exec(&["ip", "-oneline", "link", "show", "dev", "eth0"]).ok();
    let mut words = output.stdout.split_whitespace();
    let mtu = words.find(|word| *word == "mtu").and_then(|_| words.next());
    mtu.unwrap_or_else(|| panic!("there is no MTU: {output}")).to_owned()
}

/// What arrives at the server, of one connection.
fn gigabits_per_second(way: &Way<'_>, seconds: &str) -> f64 {
    let server = way.server.to_string();
    let output = way.client.exec(&["iperf3", "--json", "-t", seconds, "-c", &server]).ok();
    let bits = output.json()["end"]["sum_received"]["bits_per_second"].as_f64();
    bits.unwrap_or_else(|| panic!("no rate in what iperf3 printed: {output}")) / 1e9
}
