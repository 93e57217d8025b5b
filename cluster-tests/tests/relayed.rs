//! Published ports that the nodes' daemons balance, in a real swarm: those with the PROXY protocol.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::time::Duration;

use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, Report, SETTLES_WITHIN, is_root_or_skip, step,
};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const PORT: u16 = 8080;
const EACH_THRICE: [(&str, usize); 3] = [("1", 3), ("2", 3), ("3", 3)];
const WEB: &str = "relayed_web";

const STACK: &str = r#"
services:
  web:
    image: IMAGE
    ports:
      - {target: 8080, published: 8080, x-skep-proxy-protocol: v2}
    environment:
      PROXY_PROTOCOL: v2
      TASK_SLOT: "{{.Task.Slot}}"
      NODE_HOSTNAME: "{{.Node.Hostname}}"
      SERVICE_NAME: "{{.Service.Name}}"
    healthcheck:
      test: ["CMD", "/whoami", "healthcheck"]
      interval: 1s
      timeout: 20s
      retries: 2
    stop_grace_period: 20s
    deploy:
      replicas: 3
      restart_policy: {delay: 1s}
"#;

#[test]
fn the_proxy_protocol_tells_tasks_of_every_client() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.deploy_whoami("relayed", STACK);
    lab.wait_until_settled("n1", WEB, 3);
    let inspected = lab.node("n1").skep(&["service", "inspect", "--pretty", WEB]).ok();
    assert!(inspected.text().contains("ProxyProtocol = v2"), "{inspected}");

    step("exact turns and the client's address, through each node");
    for node in NODES {
        let url = lab.url(node, PORT);
        lab.wait_for_turns("client", &url, "Slot", &EACH_THRICE);
        let client = lab.client().address();
        assert_clients(&lab.send("client", &url, 9), client);
    }
    step("clients that are nodes, also on loopback");
    for node in NODES {
        let own = lab.node(node).address();
        assert_clients(&lab.send(node, &lab.url("n1", PORT), 3), own);
        assert_clients(&lab.send(node, "http://127.0.0.1:8080/", 3), Ipv4Addr::LOCALHOST);
    }
    step("an end of one direction is passed on");
    half_a_close_is_passed_on(&lab);
    step("clients with IPv6");
    clients_with_ipv6_are_named(&lab);
    step("scaling down and up under load");
    scaling_fails_no_request(&lab);
    step("a port of a single node");
    a_port_of_a_single_node_has_the_header_too(&lab);
    step("a service whose last task is gone");
    lab.node("n1").skep(&["service", "scale", "--detach", &format!("{WEB}=0")]).ok();
    lab.wait_until_settled("n1", WEB, 0);
    let report = lab.send("client", &lab.url("n2", PORT), 1);
    assert_ne!(report.records[0].outcome, "Ok", "{report:#?}");
    step("the port passes to the rules, and back");
    the_port_changes_hands(&lab);
    lab.node("n1").skep(&["stack", "rm", "relayed"]).ok();
    lab.wait_for_outcome(&lab.url("n3", PORT), "Connect");
    lab.down();
}

fn scaling_fails_no_request(lab: &Lab) {
    let options = LoadOptions {
        clients: 4,
        timeout: Duration::from_secs(10),
        ..LoadOptions::to(NODES.map(|node| lab.url(node, PORT)))
    };
    let load = lab.load("client", &options);
    load.wait_for_more(20, SETTLES_WITHIN);
    for n_tasks in [1, 3] {
        let scale = format!("{WEB}={n_tasks}");
        lab.node("n1").skep(&["service", "scale", "--detach", &scale]).ok();
        lab.wait_until_settled("n1", WEB, n_tasks);
        load.wait_for_more(20, SETTLES_WITHIN);
    }
    load.stop().assert_none_failed();
    for node in NODES {
        lab.wait_for_turns("client", &lab.url(node, PORT), "Slot", &EACH_THRICE);
    }
}

fn a_port_of_a_single_node_has_the_header_too(lab: &Lab) {
    lab.node("n1").create_whoami(
        "single",
        &[
            "--constraint=node.hostname==n2",
            "--env=PROXY_PROTOCOL=v2",
            "--publish=mode=host,target=8080,published=8070,proxy-protocol=v2",
        ],
    );
    lab.wait_until_settled("n1", "single", 1);
    let url = format!("http://{}:8070/", lab.node("n2").address());
    lab.wait_for_outcome(&url, "Ok");
    assert_clients(&lab.send("client", &url, 3), lab.client().address());
}

/// A client that says that it has sent all gets its answer all the same.
fn half_a_close_is_passed_on(lab: &Lab) {
    let server = (lab.node("n2").address(), PORT);
    let answer = lab.in_network_of_client(|| {
        let mut stream = TcpStream::connect(server).unwrap();
        stream.set_read_timeout(Some(SETTLES_WITHIN)).unwrap();
        stream.write_all(b"GET /slow/300 HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    assert!(answer.contains(&format!("Client: {}:", lab.client().address())), "{answer}");
}

fn clients_with_ipv6_are_named(lab: &Lab) {
    let is_off = std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    if is_off.unwrap_or_default().trim() != "0" {
        assert!(std::env::var_os("CI").is_none(), "CI must have IPv6");
        return eprintln!("skipped: this machine has no IPv6");
    }
    for node in NODES {
        let server = (ipv6(lab.node(node).address()), PORT);
        let answer = lab.in_network_of_client(|| {
            let mut stream = TcpStream::connect(server).unwrap();
            stream.set_read_timeout(Some(SETTLES_WITHIN)).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        let client = format!("Client: [{}]:", ipv6(lab.client().address()));
        assert!(answer.contains(&client), "{client} through {node}: {answer}");
    }
}

fn the_port_changes_hands(lab: &Lab) {
    let change = |publish: &str, environment: &str| {
        lab.node("n1").skep(&["service", "update", "--detach", publish, environment, WEB]).ok();
    };
    change("--publish-add=published=8080,target=8080", "--env-rm=PROXY_PROTOCOL");
    lab.node("n1").skep(&["service", "scale", "--detach", &format!("{WEB}=3")]).ok();
    for node in NODES {
        lab.wait_for_turns("client", &lab.url(node, PORT), "Slot", &EACH_THRICE);
        assert!(is_in_rules(lab, node), "the kernel of {node} balances");
        let own = "http://127.0.0.1:8080/";
        lab.send(node, own, 3).assert_none_failed();
    }
    change(
        "--publish-add=published=8080,target=8080,proxy-protocol=v2",
        "--env-add=PROXY_PROTOCOL=v2",
    );
    for node in NODES {
        lab.wait_for_turns("client", &lab.url(node, PORT), "Slot", &EACH_THRICE);
        assert!(!is_in_rules(lab, node), "the daemon of {node} balances");
        assert_clients(&lab.send("client", &lab.url(node, PORT), 3), lab.client().address());
    }
    let listed = lab.node("n1").skep(&["service", "ls"]).ok();
    assert!(!listed.stderr.contains("WARNING"), "{listed}");
}

/// Whether a node's rules lead somewhere from the port.
fn is_in_rules(lab: &Lab, node: &str) -> bool {
    let rules = lab.node(node).exec(&["nft", "list", "table", "ip", "skep-mesh"]).ok();
    rules.text().contains("chain tcp-8080 {")
}

/// The IPv6 address that a member of a lab has beside its other one.
fn ipv6(of: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = of.octets();
    let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, pair(a, b), pair(c, d))
}

#[track_caller]
fn assert_clients(report: &Report, expect: Ipv4Addr) {
    report.assert_none_failed();
    let expect = format!("{expect}:");
    let is_it = |client: &str| client.starts_with(&expect);
    assert!(report.records.iter().all(|record| is_it(record.field("Client"))), "{report:#?}");
}
