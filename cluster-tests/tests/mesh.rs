//! The routing mesh of a real swarm: published ports on every node, for every kind of client.
//!
//! The matrix is that of the design's proof: an outside client, every node and every task are
//! clients; every node is an entry; every task is a backend, also its own. What follows it moves
//! tasks under load. The load client tries nothing twice, so no failed request means just that.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use skep_cluster_tests::{
    HeldConnection, Lab, LabOptions, Load, LoadOptions, Record, Report, SETTLES_WITHIN, TaskRow,
    WHOAMI, is_root_or_skip, wait_until,
};

const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];
const PORT: u16 = 8080;
/// A service with one task, on [`FAR_NODE`].
const FAR_PORT: u16 = 8081;
const FAR_NODE: &str = "n5";
/// A service with one task, which is replaced start-first.
const SINGLE_PORT: u16 = 8082;
const WEB: &str = "mesh_web";
const SINGLE: &str = "mesh_single";
const N_TASKS: usize = 5;
/// A busy machine answers late; what is lost is not answered at all.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const BRIDGE_FILTER: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

/// A new task takes connections only once it is healthy, and an old one ends when it has answered.
const STACK: &str = r#"
services:
  web:
    image: IMAGE
    ports: ["8080:8080"]
    environment:
      TASK_SLOT: "{{.Task.Slot}}"
      TASK_ID: "{{.Task.ID}}"
      NODE_HOSTNAME: "{{.Node.Hostname}}"
      SERVICE_NAME: "{{.Service.Name}}"
    healthcheck:
      test: ["CMD", "/whoami", "healthcheck"]
      interval: 1s
      timeout: 20s
      retries: 5
    stop_grace_period: 20s
    deploy:
      replicas: 5
      update_config: {parallelism: 1, monitor: 1s}
  single:
    image: IMAGE
    ports: ["8082:8080"]
    environment:
      SERVICE_NAME: "{{.Service.Name}}"
    healthcheck:
      test: ["CMD", "/whoami", "healthcheck"]
      interval: 1s
      timeout: 20s
      retries: 5
    stop_grace_period: 20s
    deploy:
      replicas: 1
      update_config: {order: start-first, monitor: 1s}
"#;

#[test]
fn the_mesh_answers_every_client_through_every_node() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions::default());
    lab.import_whoami();
    lab.deploy_whoami("mesh", STACK);
    lab.node("n1").create_whoami(
        "far",
        &["--publish", "8081:8080", "--constraint", &format!("node.hostname=={FAR_NODE}")],
    );
    lab.wait_until_settled("n1", "far", 1);
    let tasks = lab.wait_until_settled("n1", WEB, N_TASKS);
    let nodes: BTreeSet<&str> = tasks.iter().map(|task| task.node.as_str()).collect();
    assert_eq!(nodes, NODES.into(), "each node has one of five tasks");
    for node in NODES {
        lab.wait_for_outcome(&lab.url(node, PORT), "Ok");
        wait_for_slots(&lab, node);
    }

    for setting in ["0", "1"] {
        if set_bridge_filter(&lab, setting) {
            step(&format!("the matrix, with bridge-nf-call-iptables = {setting}"));
            the_matrix(&lab);
        }
    }
    step("one client port through two nodes");
    one_client_port_through_two_nodes(&lab);
    step("long answers");
    long_answers_through_a_node_without_the_task(&lab);
    step("scaling down with open connections");
    scaling_down_spares_what_is_open(&lab);
    step("scaling up");
    scaling_up_fails_no_request(&lab);
    step("a rolling update");
    a_rolling_update_fails_no_request(&lab);
    step("a start-first update of one task");
    a_start_first_update_of_one_task_fails_no_request(&lab);
    step("a daemon that starts again");
    a_daemon_that_starts_again_disturbs_nothing(&lab);
    step("a node that dies");
    a_dead_node_fails_no_request_of_the_living(&lab);
    step("ports that come and go");
    ports_come_and_go(&lab);
    step("a service that is removed");
    a_removed_service_answers_no_more(&lab);
    step("a port that is taken");
    a_taken_port_is_refused(&lab);
    lab.down();
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

fn url(lab: &Lab, node: &str, port: u16, path: &str) -> String {
    format!("http://{}:{port}{path}", lab.node(node).address())
}

fn urls(lab: &Lab, nodes: &[&str]) -> Vec<String> {
    nodes.iter().map(|node| url(lab, node, PORT, "/")).collect()
}

fn load(lab: &Lab, from: &str, urls: Vec<String>, clients: u32) -> Load {
    lab.load(from, &LoadOptions { clients, timeout: REQUEST_TIMEOUT, ..LoadOptions::to(urls) })
}

/// Sends so many requests, a new connection each, none of which may fail. No two connections of this test have the same
/// port, so that each takes one turn.
#[track_caller]
fn send(lab: &Lab, from: &str, urls: &[String], clients: u32, n_requests: u64) -> Report {
    // Below the ports that the kernel gives to other connections.
    static NEXT_PORT: AtomicU16 = AtomicU16::new(10_000);
    let n_ports = u16::try_from(n_requests).unwrap();
    let options = LoadOptions {
        clients,
        requests: Some(n_requests),
        ports_from: Some(NEXT_PORT.fetch_add(n_ports, Ordering::Relaxed)),
        timeout: REQUEST_TIMEOUT,
        ..LoadOptions::to(urls.iter().cloned())
    };
    let report = lab.load(from, &options).finish();
    report.assert_none_failed();
    report
}

/// Waits until a node balances to each slot; no request fails meanwhile.
#[track_caller]
fn wait_for_slots(lab: &Lab, node: &str) {
    wait_until(SETTLES_WITHIN, &format!("{node} balances to all slots"), || {
        let report = send(lab, "client", &urls(lab, &[node]), 1, N_TASKS as u64);
        ((report.count_by("Slot") == slots(1)).then_some(()), format!("{report:#?}"))
    });
}

/// Sets it in the namespaces of all nodes; tells whether the kernel has it.
fn set_bridge_filter(lab: &Lab, setting: &str) -> bool {
    let script = format!("[ -e {BRIDGE_FILTER} ] || exit 4; echo {setting} >{BRIDGE_FILTER}");
    let codes = NODES.map(|node| lab.node(node).exec(&["sh", "-c", &script]).status.code());
    if codes == [Some(4); 5] {
        eprintln!("no {BRIDGE_FILTER} here: only the kernel's way without it is tested");
        // Then there is one way only, and it is tested once.
        return setting == "0";
    }
    assert_eq!(codes, [Some(0); 5]);
    for node in NODES {
        assert_eq!(lab.node(node).exec(&["cat", BRIDGE_FILTER]).ok().text(), setting, "{node}");
    }
    true
}

fn the_matrix(lab: &Lab) {
    let client = lab.client().address().to_string();
    for node in NODES {
        let urls = urls(lab, &[node]);
        for (clients, n_requests, n_each) in [(1, 50, 10), (3, 150, 30)] {
            let report = send(lab, "client", &urls, clients, n_requests);
            let what = format!("{clients} outside clients through {node}");
            assert_turns(&report, &slots(n_each), &what);
            let seen: BTreeSet<&str> = report.records.iter().map(client_address).collect();
            assert_eq!(seen, [client.as_str()].into(), "what the tasks see: {what}");
        }
    }
    let urls = urls(lab, &NODES);
    for node in NODES {
        assert_all_pairs(&send(lab, node, &urls, 1, 25), &format!("{node} as a client"));
        let loopback = [format!("http://127.0.0.1:{PORT}/")];
        let report = send(lab, node, &loopback, 1, 10);
        assert_eq!(report.count_by("Slot").len(), N_TASKS, "all tasks answer 127.0.0.1 of {node}");
    }
    let tasks = lab.whoamis_of(WEB);
    assert_eq!(tasks.len(), N_TASKS, "{tasks:#?}");
    for task in tasks {
        let report = task.requests(&urls, 25);
        report.assert_none_failed();
        assert_all_pairs(&report, &format!("the task on {} as a client", task.node));
    }
}

/// Each slot had as many of the requests as expected; a failure shows the turns in their order.
#[track_caller]
fn assert_turns(report: &Report, expect: &BTreeMap<&str, usize>, what: &str) {
    let turn = |r: &Record| format!("{}@{}+{}ms", r.field("Slot"), r.sent_at_ms, r.took_ms);
    let turns: Vec<String> = report.records.iter().map(turn).collect();
    assert_eq!(&report.count_by("Slot"), expect, "{what}: {}", turns.join(" "));
}

fn slots(n_each: usize) -> BTreeMap<&'static str, usize> {
    ["1", "2", "3", "4", "5"].map(|slot| (slot, n_each)).into()
}

/// The address that the task saw, without the port.
fn client_address(record: &Record) -> &str {
    record.field("Client").rsplit_once(':').unwrap().0
}

/// Each of five entries brought its five requests to each of the five tasks.
#[track_caller]
fn assert_all_pairs(report: &Report, what: &str) {
    let mut pairs: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for record in &report.records {
        *pairs.entry((&record.server, record.field("Slot"))).or_default() += 1;
    }
    assert_eq!(pairs.len(), 25, "{what}: {pairs:#?}");
    assert!(pairs.values().all(|n| *n == 1), "{what}: {pairs:#?}");
}

/// A connection through n1 stays open while others from the same port go through n2, to each task
/// in turn: one of them meets the first one's task, which sees two clients with one address.
fn one_client_port_through_two_nodes(lab: &Lab) {
    // Below the ports that the kernel gives to other connections of the client, and that `send` uses.
    let from = SocketAddrV4::new(lab.client().address(), 9_000);
    let to = |node: &str| SocketAddrV4::new(lab.node(node).address(), PORT);
    let (first, second) = (to("n1"), to("n2"));
    lab.in_network_of_client(move || {
        let mut held = connect_from(from, first);
        let held_task = hostname(&ask(&mut held));
        let others: Vec<String> = (0..N_TASKS)
            .map(|_| {
                let mut other = connect_from(from, second);
                let task = hostname(&ask(&mut other));
                assert_eq!(hostname(&ask(&mut held)), held_task, "the first one is not disturbed");
                task
            })
            .collect();
        assert!(others.contains(&held_task), "{held_task} is none of {others:?}");
    });
}

/// Connects from an address that another connection may have, too.
fn connect_from(from: SocketAddrV4, to: SocketAddrV4) -> TcpStream {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    let timeout = TimeVal::seconds(i64::try_from(REQUEST_TIMEOUT.as_secs()).unwrap());
    setsockopt(&socket, sockopt::SendTimeout, &timeout).unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).unwrap();
    // Closed by a reset, it leaves no TIME_WAIT behind that would keep the pair of addresses.
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&socket, sockopt::Linger, &linger).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn::from(from)).unwrap();
    if let Err(error) = connect(socket.as_raw_fd(), &SockaddrIn::from(to)) {
        panic!("from {from} to {to}: {error}");
    }
    TcpStream::from(socket)
}

/// Sends a request on a connection that is kept, and gives the whole answer.
fn ask(stream: &mut TcpStream) -> String {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: mesh\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    // whoami sends its answer in one piece, which ends with the path.
    while !answer.ends_with(b"Path: /\n") {
        let length = stream.read(&mut part).unwrap();
        assert!(length > 0, "closed after {:?}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&part[..length]);
    }
    String::from_utf8(answer).unwrap()
}

fn hostname(answer: &str) -> String {
    let line = answer.lines().find_map(|line| line.strip_prefix("Hostname: "));
    line.unwrap_or_else(|| panic!("{answer:?}")).to_owned()
}

fn long_answers_through_a_node_without_the_task(lab: &Lab) {
    const LENGTH: usize = 1_000_000;
    let path = format!("/bytes/{LENGTH}");
    let far = |node: &str| url(lab, node, FAR_PORT, &path);
    let local = format!("http://{}:{FAR_PORT}{path}", Ipv4Addr::LOCALHOST);
    let mut reports = vec![
        ("the client through n1", send(lab, "client", &[far("n1")], 1, 3)),
        ("the client through the task's node", send(lab, "client", &[far(FAR_NODE)], 1, 3)),
        ("n2 through itself", send(lab, "n2", &[far("n2")], 1, 3)),
        ("n2 through n3", send(lab, "n2", &[far("n3")], 1, 3)),
        ("n1 over 127.0.0.1", send(lab, "n1", std::slice::from_ref(&local), 1, 3)),
        ("the task's node over 127.0.0.1", send(lab, FAR_NODE, &[local], 1, 3)),
    ];
    for task in lab.whoamis_of(WEB).into_iter().filter(|task| ["n3", "n5"].contains(&&*task.node)) {
        reports.push(("a task through n1", task.requests(&[far("n1")], 3)));
    }
    for (what, report) in reports {
        report.assert_none_failed();
        let lengths: Vec<usize> =
            report.records.iter().map(|record| record.body.as_ref().unwrap().len()).collect();
        assert_eq!(lengths, [LENGTH; 3], "{what}");
    }
}

fn scaling_down_spares_what_is_open(lab: &Lab) {
    let url = url(lab, "n1", PORT, "/");
    let mut held: BTreeMap<u64, HeldConnection> = BTreeMap::new();
    for _ in 0..N_TASKS {
        let mut connection = lab.hold("client", &url);
        let answer = connection.request("/");
        assert!(answer.is_ok(), "{answer:#?}");
        held.insert(answer.field("Slot").parse().unwrap(), connection);
    }
    assert_eq!(held.len(), N_TASKS, "five connections reach five tasks");
    let load = load(lab, "client", urls(lab, &NODES), 2);
    load.wait_for_more(20, SETTLES_WITHIN);

    // Those that go are in the middle of an answer, and those that stay are not asked anything.
    let leaving = held.split_off(&4);
    let slow: Vec<_> = leaving
        .into_iter()
        .map(|(slot, mut connection)| {
            let request = std::thread::spawn(move || connection.request("/slow/3000"));
            (slot, request)
        })
        .collect();
    wait_until(SETTLES_WITHIN, "both slow requests have reached their tasks", || {
        let tasks = lab.whoamis_of(WEB);
        let asleep = tasks.iter().filter(|task| task.is_sleeping());
        let slots: BTreeSet<&str> = asleep.map(|task| &*task.environment["TASK_SLOT"]).collect();
        ((slots == ["4", "5"].into()).then_some(()), format!("slots {slots:?} sleep"))
    });
    lab.node("n1").skep(&["service", "scale", "--detach", &format!("{WEB}=3")]).ok();
    for (slot, request) in slow {
        let answer = request.join().unwrap();
        assert!(answer.is_ok(), "the request that slot {slot} was answering: {answer:#?}");
        assert_eq!(answer.field("Slot"), slot.to_string());
    }
    let left = lab.wait_until_settled("n1", WEB, 3);
    assert_eq!(left.iter().map(|task| task.slot).collect::<Vec<_>>(), [1, 2, 3]);
    load.wait_for_more(20, SETTLES_WITHIN);
    load.stop().assert_none_failed();
    for (slot, mut connection) in held {
        let answer = connection.request("/");
        assert!(answer.is_ok(), "a connection to slot {slot}, which stayed: {answer:#?}");
        assert_eq!(answer.field("Slot"), slot.to_string());
    }
    let report = send(lab, "client", &urls(lab, &["n2"]), 1, 30);
    assert_turns(&report, &[("1", 10), ("2", 10), ("3", 10)].into(), "through n2");
}

fn scaling_up_fails_no_request(lab: &Lab) {
    let load = load(lab, "client", urls(lab, &NODES), 2);
    lab.node("n2").skep(&["service", "scale", "--detach", &format!("{WEB}=5")]).ok();
    lab.wait_until_settled("n1", WEB, N_TASKS);
    load.wait_for_more(20, SETTLES_WITHIN);
    load.stop().assert_none_failed();
    wait_for_slots(lab, "n4");
    let report = send(lab, "client", &urls(lab, &["n4"]), 1, 50);
    assert_turns(&report, &slots(10), "through n4");
}

fn ids(tasks: &[TaskRow]) -> BTreeSet<&str> {
    tasks.iter().map(|task| task.id.as_str()).collect()
}

fn a_rolling_update_fails_no_request(lab: &Lab) {
    let before = lab.wait_until_settled("n1", WEB, N_TASKS);
    let loads = [
        ("four outside clients", load(lab, "client", urls(lab, &NODES), 4)),
        ("a node", load(lab, "n2", urls(lab, &NODES), 1)),
    ];
    update(lab, WEB, &before);
    assert_loads_did_not_fail(loads);
    for task in lab.whoamis_of(WEB) {
        assert_eq!(task.environment.get("GREETING").map(String::as_str), Some("hello"));
    }
}

fn a_start_first_update_of_one_task_fails_no_request(lab: &Lab) {
    let before = lab.wait_until_settled("n1", SINGLE, 1);
    let urls: Vec<String> = NODES.map(|node| url(lab, node, SINGLE_PORT, "/")).into();
    let loads = [
        ("outside clients", load(lab, "client", urls.clone(), 2)),
        ("a node", load(lab, "n4", urls, 1)),
    ];
    update(lab, SINGLE, &before);
    assert_loads_did_not_fail(loads);
}

/// Updates a service and waits until all its tasks were replaced and the old ones are gone.
#[track_caller]
fn update(lab: &Lab, service: &str, before: &[TaskRow]) {
    let n1 = lab.node("n1");
    n1.skep(&["service", "update", "--detach", "--env-add", "GREETING=hello", service]).ok();
    n1.wait_for_tasks(service, "all tasks are new", |tasks| {
        let running: Vec<TaskRow> =
            tasks.iter().filter(|task| task.is_running()).cloned().collect();
        let is_new = running.len() == before.len() && ids(&running).is_disjoint(&ids(before));
        is_new.then_some(())
    });
    lab.wait_until_settled("n1", service, before.len());
}

/// Each load still goes on, and none of its requests has failed.
#[track_caller]
fn assert_loads_did_not_fail(loads: [(&str, Load); 2]) {
    for (who, load) in loads {
        load.wait_for_more(20, SETTLES_WITHIN);
        let report = load.stop();
        eprintln!("{who}: {} requests", report.summary.requests);
        report.assert_none_failed();
    }
}

/// Rules, connections and tasks stay while a node has no daemon, and when it has one again.
fn a_daemon_that_starts_again_disturbs_nothing(lab: &Lab) {
    let restarted = "n3";
    let mut held = (0..N_TASKS).map(|_| lab.hold("client", &url(lab, restarted, PORT, "/")));
    let mut held: Vec<HeldConnection> = held.by_ref().collect();
    let first: Vec<Record> = held.iter_mut().map(|held| held.request("/")).collect();
    assert!(first.iter().all(Record::is_ok), "{first:#?}");
    let loads = [
        ("outside clients", load(lab, "client", urls(lab, &NODES), 2)),
        ("a node", load(lab, restarted, urls(lab, &NODES), 1)),
    ];
    lab.kill_daemon(&[restarted]);
    for (_, load) in &loads {
        load.wait_for_more(20, SETTLES_WITHIN);
    }
    lab.start_nodes(&[restarted]);
    lab.wait_for_node("n1", restarted, "Ready");
    let tasks = lab.wait_until_settled("n1", WEB, N_TASKS);
    assert_loads_did_not_fail(loads);
    for (held, first) in held.iter_mut().zip(&first) {
        // On a machine so busy that the node was seen down, its task was replaced meanwhile.
        if tasks.iter().any(|task| task.id.starts_with(first.field("Hostname"))) {
            let answer = held.request("/");
            assert!(answer.is_ok(), "a connection of before: {answer:#?}");
            assert_eq!(answer.field("Hostname"), first.field("Hostname"));
        }
    }
    wait_for_slots(lab, restarted);
    let report = send(lab, "client", &urls(lab, &[restarted]), 1, 50);
    assert_turns(&report, &slots(10), "through the restarted node");
}

fn ports_come_and_go(lab: &Lab) {
    let n1 = lab.node("n1");
    let outcomes = |port: u16| -> Vec<String> {
        let urls = NODES.map(|node| url(lab, node, port, "/"));
        let options = LoadOptions { requests: Some(5), ..LoadOptions::to(urls) };
        let records = lab.load("client", &options).finish().records;
        records.into_iter().map(|record| record.outcome).collect()
    };
    let wait_for = |port: u16, outcome: &str| {
        let what = format!("port {port} of every node gives {outcome}");
        wait_until(SETTLES_WITHIN, &what, || {
            let seen = outcomes(port);
            (seen.iter().all(|seen| seen == outcome).then_some(()), format!("{seen:?}"))
        });
    };
    let new_port = 8083;
    assert_eq!(outcomes(new_port), ["Connect"; 5], "nobody has this port yet");
    n1.skep(&["service", "update", "--detach", "--publish-add", "8083:8080", "far"]).ok();
    wait_for(new_port, "Ok");
    wait_for(FAR_PORT, "Ok");
    n1.skep(&["service", "update", "--detach", "--publish-rm", "8080", "far"]).ok();
    wait_for(new_port, "Connect");
    wait_for(FAR_PORT, "Connect");
    n1.skep(&["service", "update", "--detach", "--publish-add", "8081:8080", "far"]).ok();
    wait_for(FAR_PORT, "Ok");
    lab.wait_until_settled("n1", "far", 1);
}

fn a_dead_node_fails_no_request_of_the_living(lab: &Lab) {
    let dead = "n4";
    let living: Vec<&str> = NODES.into_iter().filter(|node| *node != dead).collect();
    lab.kill(&[dead]);
    lab.wait_for_node("n1", dead, "Down");
    let loads = [
        ("outside clients", load(lab, "client", urls(lab, &living), 4)),
        ("a node", load(lab, "n3", urls(lab, &living), 1)),
    ];
    let tasks = lab.wait_until_settled("n1", WEB, N_TASKS);
    assert!(tasks.iter().all(|task| task.node != dead), "{tasks:#?}");
    assert_loads_did_not_fail(loads);
    for node in &living {
        wait_for_slots(lab, node);
        let report = send(lab, "client", &urls(lab, &[node]), 1, 50);
        assert_turns(&report, &slots(10), &format!("through {node}"));
    }
    lab.start_nodes(&[dead]);
    lab.wait_for_node("n1", dead, "Ready");
    lab.wait_for_outcome(&lab.url(dead, PORT), "Ok");
    wait_for_slots(lab, dead);
    let report = send(lab, "client", &urls(lab, &[dead]), 1, 50);
    assert_turns(&report, &slots(10), "through the node that came back");
}

fn a_removed_service_answers_no_more(lab: &Lab) {
    lab.node("n1").skep(&["stack", "rm", "mesh"]).ok();
    wait_until(SETTLES_WITHIN, "every node refuses connections to the port", || {
        let options = LoadOptions { requests: Some(5), ..LoadOptions::to(urls(lab, &NODES)) };
        let report = lab.load("client", &options).finish();
        let n_refused = report.summary.failures.get("Connect").copied().unwrap_or_default();
        ((n_refused == 5).then_some(()), format!("{report:#?}"))
    });
    let report = send(lab, "client", &[url(lab, "n1", FAR_PORT, "/")], 1, 5);
    assert_eq!(report.count_by("Node"), [(FAR_NODE, 5)].into(), "another service is not touched");
}

fn a_taken_port_is_refused(lab: &Lab) {
    let again = ["service", "create", "--detach", "--publish", "8081:80", WHOAMI];
    let error = lab.node("n1").skep(&again).err();
    let told = format!("port '{FAR_PORT}' (tcp) is already in use by service 'far'");
    assert_eq!(error.matches(&told).count(), 1, "said, and said once: {error}");
}
