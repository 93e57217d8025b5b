//! Published ports on the nodes' IPv6 addresses, on a real swarm.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, is_root_or_skip, wait_until};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const PORT: u16 = 8080;
const SERVICE: &str = "both_web";
/// A busy machine answers late; what is lost is not answered at all.
const PATIENCE: Duration = Duration::from_secs(10);

const STACK: &str = r#"
services:
  web:
    image: IMAGE
    ports: ["8080:8080", "8080:8080/udp"]
    environment:
      TASK_SLOT: "{{.Task.Slot}}"
      SERVICE_NAME: "{{.Service.Name}}"
    healthcheck:
      test: ["CMD", "/whoami", "healthcheck"]
      interval: 1s
      timeout: 20s
      retries: 5
    deploy:
      replicas: 3
"#;

#[test]
fn clients_with_ipv6_reach_every_task_through_every_node() {
    if !is_root_or_skip() {
        return;
    }
    if std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6")
        .unwrap_or_default()
        .trim()
        != "0"
    {
        assert!(std::env::var_os("CI").is_none(), "CI must have IPv6");
        return eprintln!("skipped: this machine has no IPv6");
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.deploy_whoami("both", STACK);
    lab.wait_until_settled("n1", SERVICE, NODES.len());
    outside_clients_take_turns_and_are_seen(&lab);
    nodes_are_clients_too(&lab);
    a_node_that_is_gone_is_left_out(&lab);
    lab.down();
}

/// The IPv6 address that a member of a lab has beside its other one.
fn ipv6(of: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = of.octets();
    let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, pair(a, b), pair(c, d))
}

fn url(lab: &Lab, node: &str) -> String {
    format!("http://[{}]:{PORT}/", ipv6(lab.node(node).address()))
}

fn field<'a>(answer: &'a str, name: &str) -> &'a str {
    let line = answer.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
    line.unwrap_or_else(|| panic!("no {name} in {answer:?}"))
}

fn ask(to: SocketAddr) -> String {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn ask_by_datagram(to: SocketAddr) -> String {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send(b"who").unwrap();
    let mut buffer = [0; 2000];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

/// Asks until each of three tasks has answered as often as the others; a node may hear of a task a moment
/// after managers call it running. Gives the answers.
#[track_caller]
fn wait_for_turns(what: &str, ask: impl Fn() -> Vec<String>) -> Vec<String> {
    wait_until(SETTLES_WITHIN, what, || {
        let answers = ask();
        let mut slots: BTreeMap<&str, usize> = BTreeMap::new();
        for answer in &answers {
            *slots.entry(field(answer, "Slot")).or_default() += 1;
        }
        let n_each = answers.len() / 3;
        let is_even = slots == BTreeMap::from(["1", "2", "3"].map(|slot| (slot, n_each)));
        let seen = format!("{answers:#?}");
        (is_even.then_some(answers), seen)
    })
}

fn outside_clients_take_turns_and_are_seen(lab: &Lab) {
    let own = ipv6(lab.client().address());
    for node in NODES {
        let to = SocketAddr::new(ipv6(lab.node(node).address()).into(), PORT);
        for (ask, name) in [(ask as fn(SocketAddr) -> String, "TCP"), (ask_by_datagram, "UDP")] {
            let answers = wait_for_turns(&format!("{name} through {node}"), || {
                lab.in_network_of_client(move || (0..6).map(|_| ask(to)).collect())
            });
            for answer in &answers {
                let client: SocketAddr = field(answer, "Client").parse().unwrap();
                assert_eq!(client.ip(), own, "what tasks see of a client of {name} through {node}");
            }
        }
    }
}

fn nodes_are_clients_too(lab: &Lab) {
    let ask = |from: &str, url: &str| -> Vec<String> {
        let curl =
            ["curl", "--silent", "--show-error", "--fail", "--globoff", "--max-time", "10", url];
        (0..3).map(|_| lab.node(from).exec(&curl).ok().text().to_owned()).collect()
    };
    for from in NODES {
        for through in NODES {
            wait_for_turns(&format!("{from} through {through}"), || ask(from, &url(lab, through)));
        }
        let loopback = format!("http://[::1]:{PORT}/");
        wait_for_turns(&format!("{from} through ::1"), || ask(from, &loopback));
    }
}

/// Its task is withdrawn from the table of IPv6 as from the other.
fn a_node_that_is_gone_is_left_out(lab: &Lab) {
    let on_n3 = lab.whoamis_of(SERVICE).into_iter().find(|task| task.node == "n3").unwrap();
    let slot = on_n3.environment["TASK_SLOT"].clone();
    lab.node("n1").skep(&["node", "update", "--availability", "drain", "n3"]).ok();
    wait_until(SETTLES_WITHIN, "the task of n3 is placed anew", || {
        let tasks = lab.whoamis_of(SERVICE);
        let nodes: Vec<&str> = tasks.iter().map(|task| task.node.as_str()).collect();
        let is_moved = nodes.len() == NODES.len() && !nodes.contains(&"n3");
        (is_moved.then_some(()), format!("slot {slot}: {nodes:?}"))
    });
    lab.wait_until_settled("n1", SERVICE, NODES.len());
    let to = SocketAddr::new(ipv6(lab.node("n3").address()).into(), PORT);
    wait_for_turns("through a node without a task", || {
        lab.in_network_of_client(move || (0..6).map(|_| ask(to)).collect())
    });
}
