//! A node that balances in user space, as on a kernel without nftables or VXLAN, in a swarm with others.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::time::Duration;

use skep_cluster_tests::{
    Lab, LabOptions, Load, LoadOptions, SETTLES_WITHIN, TaskRow, daemon_with_metrics,
    is_root_or_skip, step, wait_until,
};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// The one that balances in user space.
const OTHER: &str = "n3";
const PORT: u16 = 8080;
const EACH_THRICE: [(&str, usize); 3] = [("1", 3), ("2", 3), ("3", 3)];
const WEB: &str = "fallback_web";
/// More than all windows and buffers of a connection hold.
const N_BYTES: usize = 16 << 20;

/// Without a network of its own, which would keep it off that node.
const STACK: &str = r#"
networks:
  default: {external: true, name: bridge}
services:
  web:
    image: IMAGE
    ports: ["8080:8080"]
    environment:
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
      placement: {max_replicas_per_node: 1}
      restart_policy: {delay: 1s}
      update_config: {parallelism: 1, monitor: 1s}
"#;

#[test]
fn a_node_without_the_kernels_balancer_serves_all_the_same() {
    if !is_root_or_skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(LabOptions {
        managers: 1,
        workers: 2,
        user_space: vec![3],
        daemon: Some(daemon_with_metrics(dir.path())),
        ..LabOptions::default()
    });
    step("the node says it");
    the_node_says_it(&lab);
    network_check_tries_its_daemon(&lab);
    lab.import_whoami();
    lab.deploy_whoami("fallback", STACK);
    let tasks = lab.wait_until_settled("n1", WEB, 3);
    assert_eq!(nodes_of(&tasks), BTreeSet::from(NODES));

    step("exact turns through each node, also on loopback");
    exact_turns(&lab);
    step("much of one connection, and ends of one direction");
    much_arrives_whole(&lab);
    half_a_close_is_passed_on(&lab);
    step("what is relayed is counted");
    connections_are_counted(&lab);
    refusals_are_counted(&lab);
    step("a rolling update, and scaling, under load");
    no_request_fails(&lab, |lab| update(lab, &tasks));
    no_request_fails(&lab, |lab| {
        for n_tasks in [1, 3] {
            let scale = format!("{WEB}={n_tasks}");
            lab.node("n1").skep(&["service", "scale", "--detach", &scale]).ok();
            lab.wait_until_settled("n1", WEB, n_tasks);
        }
    });
    exact_turns(&lab);
    step("what it does not carry");
    overlay_networks_do_not_reach_it(&lab);
    other_protocols_are_conditions(&lab);
    step("its task crashes");
    a_crashed_task_comes_back(&lab);
    step("its daemon starts again, as does the node");
    lab.kill(&[OTHER]);
    lab.start_nodes(&[OTHER]);
    lab.wait_until_settled("n1", WEB, 3);
    exact_turns(&lab);
    step("its cable is cut");
    a_cut_is_seen(&lab);
    lab.down();
}

fn the_node_says_it(lab: &Lab) {
    let n1 = lab.node("n1");
    let pretty = n1.skep(&["node", "inspect", "--pretty", OTHER]).ok();
    let setting = "the setting ingress_balancer of its daemon says so";
    let expect = format!(" Balancer:\t\tuser-space\n Reason:\t\t{setting}\n");
    assert!(pretty.text().contains(&expect), "{pretty}");
    for (node, balancer) in [("n1", "kernel"), (OTHER, "user-space")] {
        let format = "{{.Description.Ingress.Balancer}}";
        let output = n1.skep(&["node", "inspect", "--format", format, node]).ok();
        assert_eq!(output.text().trim(), balancer);
    }
    let info = lab.node(OTHER).skep(&["info"]).ok();
    assert!(info.stderr.contains("published ports are balanced in user space"), "{info}");
}

/// There is no tunnel to probe, and what stands between the daemons is named.
fn network_check_tries_its_daemon(lab: &Lab) {
    let check = || {
        let format = "{{.Check}} {{.From}} {{.To}} {{.Result}}: {{.Detail}}";
        lab.node("n1").skep(&["network", "check", "--format", format, "n2", OTHER])
    };
    let says = "balancer n3  ok: balances in user space (the setting ingress_balancer of its daemon says so)";
    let open = check().ok();
    let text = open.text();
    assert!(text.contains(says) && !text.contains("vxlan"), "{open}");
    let other = format!("TCP to {}:2377", lab.node(OTHER).address());
    for expect in [
        "daemon n3  ok".to_owned(),
        format!("passage n2 n3 ok: {other} gets through"),
        format!("passage n3 n2 ok: TCP to {}:2377 gets through", lab.node("n2").address()),
    ] {
        assert!(text.contains(&expect), "{expect}: {open}");
    }
    let address = lab.node(OTHER).address();
    let drop = format!(
        "add table inet hostfw; \
         add chain inet hostfw out {{ type filter hook output priority 0; }}; \
         add rule inet hostfw out ip daddr {address} tcp dport 2377 drop"
    );
    lab.node("n2").exec(&["nft", &drop]).ok();
    let closed = check();
    lab.node("n2").exec(&["nft", "delete table inet hostfw"]).ok();
    assert!(!closed.status.success(), "{closed}");
    let expect = format!("passage n2 n3 failed: {other} does not get through");
    assert!(closed.text().contains(&expect), "{closed}");
    assert!(closed.text().contains("passage n3 n2 ok"), "{closed}");
}

fn exact_turns(lab: &Lab) {
    for node in NODES {
        lab.wait_for_turns("client", &lab.url(node, PORT), "Slot", &EACH_THRICE);
        lab.send("client", &lab.url(node, PORT), 9).assert_none_failed();
        let own = format!("http://127.0.0.1:{PORT}/");
        lab.wait_for_turns(node, &own, "Slot", &EACH_THRICE);
    }
    let rules = lab.node(OTHER).exec(&["nft", "list", "tables"]).ok();
    assert!(!rules.text().contains("skep"), "{rules}");
    let links = lab.node(OTHER).exec(&["ip", "-o", "link"]).ok();
    assert!(!links.text().contains("skep-vx"), "{links}");
}

/// By way of each node, so that some go through two daemons.
fn much_arrives_whole(lab: &Lab) {
    for node in NODES {
        let server = (lab.node(node).address(), PORT);
        for _ in 0..3 {
            let answer = ask(lab, server, &request_for_much(), false);
            let head = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
            assert_eq!(answer.len() - head, N_BYTES, "through {node}");
        }
    }
}

fn request_for_much() -> String {
    format!("GET /bytes/{N_BYTES} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
}

/// Each task's, by the node that the client connects to, whichever way they go on.
fn connections_are_counted(lab: &Lab) {
    let connections = "skep_ingress_connections_total";
    for node in NODES {
        let before = lab.metric(node, connections);
        lab.send("client", &lab.url(node, PORT), 9).assert_none_failed();
        let counted = lab.metric(node, connections);
        assert_eq!(counted.len(), 3, "{counted:?}");
        for (labels, n) in &counted {
            assert!(labels.starts_with(&format!("service=\"{WEB}\",task=")), "{labels}");
            assert_eq!(n - before[labels], 3, "{node}: {labels}");
        }
        let bytes = |direction: &str| -> u64 {
            let all = lab.metric(node, "skep_ingress_bytes_total");
            let direction = format!("direction=\"{direction}\"");
            all.iter().filter(|(labels, _)| labels.contains(&direction)).map(|(_, n)| n).sum()
        };
        let (server, request) = ((lab.node(node).address(), PORT), request_for_much());
        for _ in 0..3 {
            let before = (bytes("in"), bytes("out"));
            let answer = ask(lab, server, &request, false);
            let carried = (bytes("in") - before.0, bytes("out") - before.1);
            assert_eq!(carried, (request.len() as u64, answer.len() as u64), "through {node}");
        }
        let failures = lab.metric(node, "skep_ingress_failures_total");
        assert_eq!(failures.values().sum::<u64>(), 0, "{failures:?}");
    }
}

/// A task that nobody listens in refuses connections: whoami listens on 8080, not on 81.
fn refusals_are_counted(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.create_whoami("deaf", &["--publish", "8081:81", "--constraint", "node.hostname==n1"]);
    lab.wait_until_settled("n1", "deaf", 1);
    let count = |name: &str| -> u64 {
        let all = lab.metric(OTHER, name);
        all.iter().filter(|(labels, _)| labels.contains("deaf")).map(|(_, n)| n).sum()
    };
    let url = lab.url(OTHER, 8081);
    let ask = || lab.client().exec(&["curl", "-sS", "--max-time", "10", &url]);
    wait_until(SETTLES_WITHIN, "a refused connection is counted", || {
        let refused = ask();
        ((count("skep_ingress_failures_total") > 0).then_some(()), refused.to_string())
    });
    let before = count("skep_ingress_failures_total");
    ask().err();
    assert_eq!(count("skep_ingress_failures_total"), before + 1);
    assert_eq!(count("skep_ingress_connections_total"), before + 1);
    n1.skep(&["service", "rm", "deaf"]).ok();
}

/// A client that says that it has sent all gets its answer all the same.
fn half_a_close_is_passed_on(lab: &Lab) {
    for node in NODES {
        let server = (lab.node(node).address(), PORT);
        for _ in 0..3 {
            let answer = ask(lab, server, "GET /slow/300 HTTP/1.1\r\nHost: web\r\n\r\n", true);
            let answer = String::from_utf8(answer).unwrap();
            assert!(answer.contains("Slot: "), "through {node}: {answer}");
        }
    }
}

fn ask(lab: &Lab, server: (Ipv4Addr, u16), request: &str, is_all: bool) -> Vec<u8> {
    lab.in_network_of_client(|| {
        let mut stream = TcpStream::connect(server).unwrap();
        stream.set_read_timeout(Some(SETTLES_WITHIN)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        if is_all {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    })
}

fn no_request_fails(lab: &Lab, act: impl FnOnce(&Lab)) {
    let load = start_load(lab, &NODES);
    load.wait_for_more(20, SETTLES_WITHIN);
    act(lab);
    load.wait_for_more(20, SETTLES_WITHIN);
    let report = load.stop();
    eprintln!("{} requests", report.summary.requests);
    report.assert_none_failed();
}

fn update(lab: &Lab, before: &[TaskRow]) {
    let ids = |tasks: &[TaskRow]| -> BTreeSet<String> {
        tasks.iter().map(|task| task.id.clone()).collect()
    };
    let n1 = lab.node("n1");
    n1.skep(&["service", "update", "--detach", "--env-add", "GREETING=hello", WEB]).ok();
    n1.wait_for_tasks(WEB, "all tasks are new", |tasks| {
        let running: Vec<TaskRow> =
            tasks.iter().filter(|task| task.is_running()).cloned().collect();
        let is_new = running.len() == before.len() && ids(&running).is_disjoint(&ids(before));
        is_new.then_some(())
    });
    lab.wait_until_settled("n1", WEB, 3);
}

fn overlay_networks_do_not_reach_it(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.skep(&["network", "create", "--driver", "overlay", "back"]).ok();
    n1.create_whoami("api", &["--network=back", "--replicas=4"]);
    let tasks = lab.wait_until_settled("n1", "api", 4);
    assert_eq!(nodes_of(&tasks), BTreeSet::from(["n1", "n2"]));
    n1.skep(&["service", "rm", "api"]).ok();
    n1.create_whoami("stuck", &["--network=back", "--constraint=node.hostname==n3"]);
    n1.wait_for_tasks("stuck", "it waits and says why", |tasks| {
        let reason = "1 node cannot carry overlay networks";
        tasks.iter().any(|task| task.error.contains(reason)).then_some(())
    });
    n1.skep(&["service", "rm", "stuck"]).ok();
}

fn other_protocols_are_conditions(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.create_whoami("datagrams", &["--publish=published=8053,target=8080,protocol=udp"]);
    let expect =
        "port 8053/udp on n3 is not served, since this node balances TCP alone, in user space";
    wait_until(SETTLES_WITHIN, "the port's condition is told", || {
        let listed = n1.skep(&["service", "ls"]);
        (listed.stderr.contains(expect).then_some(()), listed.to_string())
    });
    n1.skep(&["service", "rm", "datagrams"]).ok();
}

fn a_crashed_task_comes_back(lab: &Lab) {
    let tasks = lab.wait_until_settled("n1", WEB, 3);
    let its = tasks.iter().find(|task| task.node == OTHER).unwrap();
    let whoami = lab.whoamis_of(WEB).into_iter().find(|one| one.task == its.id).unwrap();
    let pid = nix::unistd::Pid::from_raw(whoami.pid.cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    lab.node("n1").wait_for_tasks(WEB, "another one runs", |tasks| {
        let is_another =
            |task: &TaskRow| task.is_running() && task.slot == its.slot && task.id != its.id;
        tasks.iter().any(is_another).then_some(())
    });
    lab.wait_until_settled("n1", WEB, 3);
    exact_turns(lab);
}

/// Requests fail only until managers have seen it: from then on nobody is sent there.
fn a_cut_is_seen(lab: &Lab) {
    let tasks = lab.wait_until_settled("n1", WEB, 3);
    let its = tasks.iter().find(|task| task.node == OTHER).unwrap().slot.to_string();
    lab.cut(&[OTHER]);
    let others: Vec<String> = ["1", "2", "3"].map(str::to_owned).into();
    let others: Vec<(&str, usize)> =
        others.iter().filter(|slot| **slot != its).map(|slot| (slot.as_str(), 4)).collect();
    for node in ["n1", "n2"] {
        lab.wait_for_turns("client", &lab.url(node, PORT), "Slot", &others);
    }
    let load = start_load(lab, &["n1", "n2"]);
    load.wait_for_more(100, SETTLES_WITHIN);
    load.stop().assert_none_failed();
    lab.heal(&[OTHER]);
    lab.wait_until_settled("n1", WEB, 3);
    exact_turns(lab);
}

fn start_load(lab: &Lab, nodes: &[&str]) -> Load {
    let options = LoadOptions {
        clients: 4,
        timeout: Duration::from_secs(10),
        ..LoadOptions::to(nodes.iter().map(|node| lab.url(node, PORT)))
    };
    lab.load("client", &options)
}

fn nodes_of(tasks: &[TaskRow]) -> BTreeSet<&str> {
    tasks.iter().map(|task| task.node.as_str()).collect()
}
