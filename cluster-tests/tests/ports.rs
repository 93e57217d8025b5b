//! Published ports of single nodes in a real swarm: who answers where, and what stands in the way.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, Running, SETTLES_WITHIN, TaskRow, WHOAMI, is_root_or_skip, step,
    wait_until,
};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const TASK_NODES: [&str; 2] = ["n1", "n2"];
const PORT: u16 = 8080;

#[test]
fn ports_of_single_nodes() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").create_whoami(
        "web",
        &[
            "--replicas=2",
            "--constraint=node.hostname!=n3",
            "--publish=mode=host,target=8080,published=8080",
            "--publish=mode=host,target=8080",
        ],
    );
    let tasks = lab.wait_until_settled("n1", "web", 2);
    step("each node's task alone answers, on that node alone");
    each_task_answers_on_its_node_alone(&lab, &tasks);
    step("the node's own clients, also on loopback");
    clients_of_the_node_itself(&lab, &tasks);
    step("a daemon that starts again");
    a_daemon_that_starts_again_keeps_the_numbers(&lab, &tasks);
    step("an update replaces each task on its node");
    an_update_moves_the_ports(&lab);
    step("removal");
    lab.node("n1").skep(&["service", "rm", "web"]).ok();
    for node in TASK_NODES {
        lab.wait_for_outcome(&lab.url(node, PORT), "Connect");
    }
}

#[test]
fn ranges_free_numbers_and_policies_of_ingress_ports() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").create_whoami(
        "web",
        &[
            "--replicas=2",
            "--replicas-max-per-node=1",
            "--constraint=node.hostname!=n3",
            "--publish=8100-8101:8080",
            "--publish=0:8080",
        ],
    );
    lab.wait_until_settled("n1", "web", 2);
    step("every port of the range, and the one that managers chose");
    let inspected = lab.node("n1").skep(&["service", "inspect", "web"]).ok().json();
    let ports = inspected[0]["Endpoint"]["Ports"].as_array().unwrap();
    let numbers: BTreeSet<u64> =
        ports.iter().map(|port| port["PublishedPort"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [8100, 8101, 30000].into());
    for number in numbers {
        let url = lab.url("n3", u16::try_from(number).unwrap());
        let each = TASK_NODES.map(|node| (node, 5));
        lab.wait_for_turns("client", &url, "Node", &each);
        assert_eq!(lab.send("client", &url, 10).count_by("Node"), each.into());
    }
    step("a local policy keeps connections on their node");
    lab.node("n1").skep(&["service", "update", "--detach", "--ingress-policy=local", "web"]).ok();
    for node in TASK_NODES {
        lab.wait_for_turns("client", &lab.url(node, 8100), "Node", &[(node, 10)]);
    }
    lab.wait_for_turns("client", &lab.url("n3", 8100), "Node", &[("n1", 5), ("n2", 5)]);
    step("a node that loses its task uses the other's");
    let scaled = ["--replicas=1", "--constraint-add=node.hostname==n2"];
    let update = [&["service", "update", "--detach"], &scaled[..], &["web"]].concat();
    lab.node("n1").skep(&update).ok();
    for node in NODES {
        lab.wait_for_turns("client", &lab.url(node, 8100), "Node", &[("n2", 10)]);
    }
}

const HELD_PORT: u16 = 8090;
/// From the end of the program that holds a port to the end of the condition, and to an answer.
const CONDITION_ENDS_WITHIN: Duration = Duration::from_secs(2);

#[test]
fn a_port_that_a_program_holds_is_a_condition_of_its_service() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 2, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").create_whoami("plain", &["--constraint=node.hostname==n1"]);
    lab.wait_until_settled("n1", "plain", 1);
    let holder = Holder::start(&lab, "n3");
    step("creating a service tells of it");
    let created = lab.node("n2").skep(&[
        "service",
        "create",
        "--name=held",
        "--constraint=node.hostname==n1",
        "--publish=8090:8080",
        WHOAMI,
    ]);
    let created = created.ok();
    let told = created.stderr.lines().find_map(|line| line.strip_prefix("warning: "));
    let message = told.unwrap_or_else(|| panic!("no warning: {created}")).to_owned();
    let (start, end) = ("port 8090/tcp on n3 is held by ", "): stop it or publish another port");
    assert!(message.starts_with(start) && message.ends_with(end), "{message}");
    assert!(message.contains(&holder.program), "{message}");
    let (_, pid) = message.strip_suffix(end).unwrap().rsplit_once("(pid ").unwrap();

    step("every manager tells of it, in every form");
    for via in ["n1", "n2"] {
        wait_until(SETTLES_WITHIN, &format!("{via} knows"), || {
            let listed = lab.node(via).skep(&["service", "ls"]).ok();
            let is_told = listed.stderr.contains(&format!("WARNING: held: {message}"));
            (is_told.then_some(()), listed.to_string())
        });
        let ps = lab.node(via).skep(&["service", "ps", "held"]).ok();
        assert!(ps.stderr.contains(&message), "{ps}");
        let pretty = lab.node(via).skep(&["service", "inspect", "--pretty", "held"]).ok();
        assert!(pretty.text().contains(&format!("Conditions:\n {message}")), "{pretty}");
        assert_eq!(conditions(&lab, via), [message.as_str()]);
    }
    for node in ["n1", "n2"] {
        lab.wait_for_outcome(&lab.url(node, HELD_PORT), "Ok");
    }

    step("it ends with the program");
    lab.node("n3").exec(&["kill", pid]).ok();
    wait_until(CONDITION_ENDS_WITHIN, "the condition is gone", || {
        let seen = conditions(&lab, "n2");
        (seen.is_empty().then_some(()), format!("{seen:?}"))
    });
    let report = lab.send("client", &lab.url("n3", HELD_PORT), 5);
    report.assert_none_failed();

    step("a node that joins later tells of it too");
    lab.node("n3").skep(&["swarm", "leave", "--force"]).ok();
    let holder = Holder::start(&lab, "n3");
    let token = lab.node("n1").skep(&["swarm", "join-token", "--quiet", "worker"]).ok();
    let address = format!("{}:2377", lab.node("n1").address());
    lab.node("n3").skep(&["swarm", "join", "--token", token.text(), &address]).ok();
    wait_until(SETTLES_WITHIN, "the condition is there", || {
        let seen = conditions(&lab, "n2");
        let is_told = |one: &String| one.starts_with(start) && one.contains(&holder.program);
        (seen.iter().any(is_told).then_some(()), format!("{seen:?}"))
    });
}

#[track_caller]
fn conditions(lab: &Lab, via: &str) -> Vec<String> {
    let inspected = lab.node(via).skep(&["service", "inspect", "held"]).ok().json();
    let conditions = inspected[0]["Conditions"].as_array().cloned().unwrap_or_default();
    conditions.iter().filter_map(|one| Some(one["Message"].as_str()?.to_owned())).collect()
}

/// A program of the node itself that has the port: whoami, run outside of any container.
struct Holder {
    program: String,
    _running: Running,
    _dir: tempfile::TempDir,
}

impl Holder {
    fn start(lab: &Lab, node: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("holder");
        let whoami = lab.whoamis_of("plain").remove(0);
        fs::copy(format!("/proc/{}/exe", whoami.pid), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let program = program.to_str().unwrap().to_owned();
        let port = format!("PORT={HELD_PORT}");
        let running = lab.start_command(node, &["env", &port, &program]);
        running.wait_for_line(SETTLES_WITHIN, "the program listens", |line| {
            line.starts_with("listening")
        });
        Self { program, _running: running, _dir: dir }
    }
}

/// The number that its node chose, by the column of `service ps`.
#[track_caller]
fn chosen_port(lab: &Lab, task: &TaskRow) -> u16 {
    let what = format!("{} shows its ports", task.id);
    wait_until(SETTLES_WITHIN, &what, || {
        let output = lab.node("n1").skep(&["service", "ps", "--format", "json", "web"]);
        let rows = output.ok().json_lines();
        let is_it = |id: &str| task.id.starts_with(id) || id.starts_with(&task.id);
        let row = rows.iter().find(|row| row["ID"].as_str().is_some_and(is_it));
        let column = row.and_then(|row| row["Ports"].as_str()).unwrap_or_default().to_owned();
        let ports: Vec<&str> = column
            .split(',')
            .filter_map(|port| port.strip_prefix("*:")?.strip_suffix("->8080/tcp"))
            .collect();
        let is_asked = ports.contains(&"8080");
        let chosen = ports.iter().find(|port| **port != "8080").and_then(|port| port.parse().ok());
        (chosen.filter(|_| is_asked), format!("{rows:#?}"))
    })
}

fn each_task_answers_on_its_node_alone(lab: &Lab, tasks: &[TaskRow]) {
    let nodes: BTreeSet<&str> = tasks.iter().map(|task| task.node.as_str()).collect();
    assert_eq!(nodes, TASK_NODES.into(), "one port is for one task a node");
    for task in tasks {
        for port in [PORT, chosen_port(lab, task)] {
            let url = lab.url(&task.node, port);
            lab.wait_for_outcome(&url, "Ok");
            let report = lab.send("client", &url, 10);
            assert_eq!(report.count_by("Node"), [(task.node.as_str(), 10)].into(), "{report:#?}");
            let client = lab.client().address().to_string();
            assert!(
                report.records.iter().all(|record| record.field("Client").starts_with(&client))
            );
        }
    }
    lab.wait_for_outcome(&lab.url("n3", PORT), "Connect");
}

fn clients_of_the_node_itself(lab: &Lab, tasks: &[TaskRow]) {
    for task in tasks {
        let own = lab.url(&task.node, PORT);
        for client in NODES {
            let report = lab.send(client, &own, 3);
            assert_eq!(report.count_by("Node"), [(task.node.as_str(), 3)].into(), "from {client}");
        }
        let report = lab.send(&task.node, "http://127.0.0.1:8080/", 3);
        assert_eq!(report.count_by("Node"), [(task.node.as_str(), 3)].into(), "{report:#?}");
    }
}

fn a_daemon_that_starts_again_keeps_the_numbers(lab: &Lab, tasks: &[TaskRow]) {
    let task = tasks.iter().find(|task| task.node == "n2").unwrap();
    let chosen = chosen_port(lab, task);
    let urls = [PORT, chosen].map(|port| lab.url("n2", port));
    let load = lab.load("client", &LoadOptions::to(urls));
    lab.kill_daemon(&["n2"]);
    load.wait_for_more(10, SETTLES_WITHIN);
    lab.start_nodes(&["n2"]);
    lab.wait_for_node("n1", "n2", "Ready");
    load.wait_for_more(10, SETTLES_WITHIN);
    load.stop().assert_none_failed();
    assert_eq!(chosen_port(lab, task), chosen);
}

fn an_update_moves_the_ports(lab: &Lab) {
    lab.node("n1").skep(&["service", "update", "--detach", "--env-add=A=1", "web"]).ok();
    let tasks = wait_until(SETTLES_WITHIN, "both tasks are new", || {
        let processes = lab.whoamis_of("web");
        let n_new = processes.iter().filter(|one| one.environment.contains_key("A")).count();
        let is_done = n_new == 2 && processes.len() == 2;
        (is_done.then(|| lab.wait_until_settled("n1", "web", 2)), format!("{processes:#?}"))
    });
    each_task_answers_on_its_node_alone(lab, &tasks);
}
