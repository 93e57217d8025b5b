//! Encrypted networks of a real swarm: what can be heard on the wire between the nodes.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

#[path = "../../worker/tests/support/capture.rs"]
mod capture;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, Whoami, is_root_or_skip, wait_until};

use capture::Capture;

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const N_SERVERS: usize = 2;
/// In every answer of whoami.
const CLEAR: &str = "\nSlot: ";

/// The same services twice, on an encrypted network and on one that is not.
const STACK: &str = r#"
x-task: &task
  image: IMAGE
  stop_grace_period: 5s
  environment:
    TASK_SLOT: "{{.Task.Slot}}"
    TASK_ID: "{{.Task.ID}}"
    NODE_HOSTNAME: "{{.Node.Hostname}}"
    SERVICE_NAME: "{{.Service.Name}}"
x-on-n1: &on-n1 {placement: {constraints: [node.hostname==n1]}}
x-elsewhere: &elsewhere
  replicas: 2
  placement: {constraints: [node.hostname!=n1], max_replicas_per_node: 1}
services:
  client: {<<: *task, networks: [secret], deploy: *on-n1}
  server: {<<: *task, networks: [secret], deploy: *elsewhere}
  open-client: {<<: *task, networks: [open], deploy: *on-n1}
  open-server: {<<: *task, networks: [open], deploy: *elsewhere}
networks:
  secret:
    driver_opts: {encrypted: ""}
  open:
"#;

#[test]
fn nobody_reads_along_on_an_encrypted_network() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.deploy_whoami("x", STACK);
    for (service, n_tasks) in
        [("client", 1), ("server", N_SERVERS), ("open-client", 1), ("open-server", N_SERVERS)]
    {
        lab.wait_until_settled("n1", &format!("x_{service}"), n_tasks);
    }
    let wire = listen(&lab, "n1");
    step("what can be heard");
    ask_all(&lab, "x_client", "x_server");
    let heard = heard(&wire);
    assert!(heard.contains_key("udp 4790"), "{heard:?}");
    let is_clear = |kind: &&String| ["clear", "udp 4789", "udp 4792"].contains(&kind.as_str());
    assert_eq!(heard.keys().find(is_clear), None, "{heard:?}");
    ask_all(&lab, "x_open-client", "x_open-server");
    let heard = self::heard(&wire);
    assert!(heard.contains_key("clear") && heard.contains_key("udp 4789"), "{heard:?}");
    step("keys");
    let keys = NODES.map(|node| key(&lab, node));
    assert!(keys[0] != keys[1] && keys[1] != keys[2] && keys[0] != keys[2], "{keys:?}");
    step("what is said of sessions");
    what_stands_in_the_way_of_wireguard_is_named(&lab);
    self::heard(&wire); // The check sends probes of the other tunnel.
    step("daemons that start again");
    let restarted = ["n1", "n2"];
    lab.kill_daemon(&restarted);
    lab.start_nodes(&restarted);
    for node in restarted {
        lab.wait_for_node("n1", node, "Ready");
    }
    wait_until_all_answer(&lab);
    ask_all(&lab, "x_client", "x_server");
    assert_eq!(NODES.map(|node| key(&lab, node)), keys, "they are kept");
    let heard = self::heard(&wire);
    assert_eq!(heard.keys().find(is_clear), None, "{heard:?}");
    step("a key that is old");
    an_old_key_is_changed_and_no_request_fails(&lab);
    let heard = self::heard(&wire);
    assert_eq!(heard.keys().find(is_clear), None, "{heard:?}");
    step("removed");
    lab.node("n1").skep(&["stack", "rm", "x"]).ok();
    for node in NODES {
        wait_until(SETTLES_WITHIN, &format!("{node} has no tunnel any more"), || {
            let links = lab.node(node).exec(&["cat", "/proc/net/dev"]).ok().stdout;
            ((!links.contains("skep-wg")).then_some(()), links)
        });
    }
    assert_eq!(said_of_wireguard(&lab), ["n1 n2 ok: no encrypted network has tasks on both"]);
    lab.down();
}

/// What `network check` says of WireGuard between n1 and n2: `from to result: detail`.
fn said_of_wireguard(lab: &Lab) -> Vec<String> {
    let output = lab.node("n1").skep(&["network", "check", "--format", "json", "n1", "n2"]);
    let rows = output.json_lines();
    let word = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows = rows.iter().filter(|row| row["Check"] == "wireguard").map(|row| {
        let [from, to, result, detail] =
            ["From", "To", "Result", "Detail"].map(|key| word(row, key));
        format!("{from} {to} {result}: {detail}")
    });
    let rows: Vec<String> = rows.collect();
    assert!(!rows.is_empty(), "{output}");
    rows
}

#[track_caller]
fn assert_sessions(rows: &[String]) {
    let [there, back] = rows else { panic!("a row a direction: {rows:?}") };
    for (row, ends) in [(there, "n1 n2"), (back, "n2 n1")] {
        let expect = format!("{ends} ok: UDP 4790 gets through; last handshake ");
        assert!(row.starts_with(&expect) && row.ends_with(" received"), "{row}");
    }
}

fn what_stands_in_the_way_of_wireguard_is_named(lab: &Lab) {
    assert_sessions(&said_of_wireguard(lab));
    let n2 = lab.node("n2");
    let table = "add table inet hostfw; \
        add set inet hostfw blocked { type inet_service; flags interval; }; \
        add element inet hostfw blocked { 4790-4791 }; \
        add chain inet hostfw in { type filter hook input priority 0; }; \
        add rule inet hostfw in udp dport @blocked drop";
    n2.exec(&["nft", table]).ok();
    let rows = said_of_wireguard(lab);
    let expect = "n1 n2 failed: UDP 4790 arrives at the interface and is dropped there: on n2, a rule of chain in in table inet hostfw";
    assert!(rows[0].starts_with(expect), "{rows:?}");
    assert!(rows[1].starts_with("n2 n1 ok: UDP 4790 gets through"), "{rows:?}");
    n2.exec(&["nft", "flush chain inet hostfw in"]).ok();
    let out = "add chain inet hostfw out { type filter hook output priority 0; }; \
        add rule inet hostfw out udp dport { 53, 4790 } drop";
    n2.exec(&["nft", out]).ok();
    let rows = said_of_wireguard(lab);
    let expect = "n2 n1 failed: UDP 4790 does not arrive at the interface: on n2, a rule of chain out in table inet hostfw";
    assert!(rows[1].starts_with(expect), "{rows:?}");
    n2.exec(&["nft", "delete table inet hostfw"]).ok();
    assert_sessions(&said_of_wireguard(lab));
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

fn only(lab: &Lab, service: &str) -> Whoami {
    let [task] = &lab.whoamis_of(service)[..] else { panic!("one container of {service}") };
    task.clone()
}

fn url(lab: &Lab, service: &str) -> Vec<String> {
    let service = lab.node("n1").skep(&["service", "inspect", service]).ok().json();
    let address = service[0]["Endpoint"]["VirtualIPs"][0]["Addr"].as_str().unwrap().to_owned();
    vec![format!("http://{}:8080/", address.split_once('/').unwrap().0)]
}

/// The client reaches each of the servers.
#[track_caller]
fn ask_all(lab: &Lab, client: &str, server: &str) {
    let report = only(lab, client).requests(&url(lab, server), 10 * N_SERVERS);
    report.assert_none_failed();
    assert_eq!(report.count_by("Slot"), [("1", 10), ("2", 10)].into());
}

/// A node is ready when its session is; its tunnels follow with the table.
fn wait_until_all_answer(lab: &Lab) {
    let urls = url(lab, "x_server");
    wait_until(SETTLES_WITHIN, "each server answers again", || {
        let report = only(lab, "x_client").requests(&urls, N_SERVERS);
        let is_over = report.summary.ok == N_SERVERS as u64;
        (is_over.then_some(()), format!("{report:#?}"))
    });
}

fn an_old_key_is_changed_and_no_request_fails(lab: &Lab) {
    let before = key(lab, "n1");
    lab.kill_daemon(&["n1"]);
    let file = lab.data_dir("n1").join("wireguard.json");
    let mut keys: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    keys["keys"]["0"]["made"] = "2020-01-01T00:00:00Z".into();
    fs::write(&file, keys.to_string()).unwrap();
    lab.start_nodes(&["n1"]);
    lab.wait_for_node("n1", "n1", "Ready");
    wait_until_all_answer(lab);
    let (client, urls) = (only(lab, "x_client"), url(lab, "x_server"));
    wait_until(SETTLES_WITHIN, "the node has a new key", || {
        client.requests(&urls, 30).assert_none_failed();
        let wireguard = wireguard(lab, "n1");
        ((wireguard["Current"] == 1).then_some(()), wireguard.to_string())
    });
    client.requests(&urls, 30).assert_none_failed();
    let keys = wireguard(lab, "n1")["Keys"].clone();
    assert_eq!(keys[0]["PublicKey"], before, "the old one is kept for a while");
    assert_ne!(keys[1]["PublicKey"], before);
    assert_eq!(keys[1]["Port"], 4791);
}

/// What a node says of its part in encrypted networks.
fn wireguard(lab: &Lab, node: &str) -> Value {
    let inspected = lab.node("n1").skep(&["node", "inspect", node]).ok().json();
    inspected[0]["Description"]["Wireguard"].clone()
}

/// The public key of a node, which its description has.
fn key(lab: &Lab, node: &str) -> String {
    let wireguard = wireguard(lab, node);
    let implementation = wireguard["Implementation"].as_str();
    assert!(matches!(implementation, Some("kernel" | "user space (boringtun)")), "{wireguard}");
    wireguard["Keys"][0]["PublicKey"].as_str().unwrap().to_owned()
}

fn heard(wire: &Capture) -> BTreeMap<String, usize> {
    wire.counts(CLEAR.as_bytes()).unwrap()
}

/// Listens at the lab's switch to the cable of a node.
fn listen(lab: &Lab, node: &str) -> Capture {
    let link = lab.node("switch").exec(&["readlink", "/proc/self/ns/net"]).ok();
    let link = PathBuf::from(link.text());
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut namespaces = processes.map(|process| process.path().join("ns/net"));
    let namespace = namespaces.find(|path| fs::read_link(path).is_ok_and(|to| to == link));
    let namespace = File::open(namespace.unwrap()).unwrap();
    let port = format!("p-{node}");
    let listening = std::thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        Capture::start(&port).unwrap()
    });
    listening.join().unwrap()
}
