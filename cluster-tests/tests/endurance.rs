//! A million requests while a hundred tasks are replaced, for every reason that tasks are replaced for; and
//! a node that dies under the same load. Only `make test-long` runs it.
//!
//! The load is open-loop: requests are due at even intervals whatever becomes of those before, and nothing is
//! tried twice.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use skep_cluster_tests::{
    Lab, LabOptions, Load, LoadOptions, Report, SETTLES_WITHIN, Whoami, is_long, is_root_or_skip,
    wait_until,
};
use skep_runtime::clock::monotonic;

const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];
const WEB: &str = "long_web";
const N_TASKS: usize = 5;
const N_REQUESTS: u64 = 1_000_000;
const N_REPLACEMENTS: usize = 100;
/// Requests a second of each of the two loads.
const RATE: u64 = 1500;
/// Enough to have a request under way while others wait, and few enough that each connection is in use again
/// before a task that drains thinks that it is idle.
const N_CLIENTS: u32 = 64;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Within which a dead node is seen and left out.
const SEEN_WITHIN: Duration = Duration::from_secs(3);

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
      retries: 2
    stop_grace_period: 20s
    deploy:
      replicas: 5
      restart_policy: {delay: 500ms}
      update_config: {parallelism: 1, monitor: 500ms}
"#;

#[test]
fn no_request_fails_while_tasks_are_replaced() {
    if !is_long() {
        eprintln!("skipped: only make test-long runs it");
        return;
    }
    if !is_root_or_skip() {
        return;
    }
    let lab = deployed();
    let started = monotonic();
    let loads = [false, true].map(|keep_alive| load(&lab, &NODES, keep_alive));
    let mut seen = Replaced::default();
    seen.look(&lab);
    let n_due = |elapsed: Duration| 2 * RATE * elapsed.as_secs();
    while seen.count() < N_REPLACEMENTS || n_due(started.elapsed()) < N_REQUESTS + N_REQUESTS / 50 {
        let round = seen.n_rounds;
        seen.n_rounds += 1;
        match round % 5 {
            0 => update(&lab, round),
            1 => scale(&lab, &mut seen),
            2 => drain(&lab, NODES[round / 5 % NODES.len()]),
            3 => fall_ill(&lab),
            _ => restart_daemons(&lab, round / 5),
        }
        lab.wait_until_settled("n1", WEB, N_TASKS);
        seen.look(&lab);
        eprintln!("-- round {round}: {} tasks replaced, {:?}", seen.count(), started.elapsed());
    }
    let reports = loads.map(Load::stop);
    let n_requests: u64 = reports.iter().map(|report| report.summary.requests).sum();
    for (what, report) in ["new connections", "kept connections"].iter().zip(&reports) {
        let (n, longest) = (report.summary.requests, report.summary.longest_ms);
        eprintln!(
            "-- {what}: {n} requests, {} failed, longest {longest} ms",
            report.summary.failed
        );
    }
    reports.iter().for_each(Report::assert_none_failed);
    assert!(n_requests >= N_REQUESTS, "{n_requests} requests");
    lab.down();
}

fn deployed() -> Lab {
    let lab = Lab::start(LabOptions::default());
    lab.import_whoami();
    lab.deploy_whoami("long", STACK);
    lab.wait_until_settled("n1", WEB, N_TASKS);
    lab
}

fn load(lab: &Lab, nodes: &[&str], keep_alive: bool) -> Load {
    let url = |node: &&str| format!("http://{}:8080/", lab.node(node).address());
    let options = LoadOptions {
        clients: N_CLIENTS,
        keep_alive,
        rate: Some(RATE),
        timeout: REQUEST_TIMEOUT,
        ..LoadOptions::to(nodes.iter().map(url))
    };
    lab.load("client", &options)
}

/// The tasks that ran at any time.
#[derive(Default)]
struct Replaced {
    ids: BTreeSet<String>,
    n_rounds: usize,
}

impl Replaced {
    fn look(&mut self, lab: &Lab) {
        self.ids.extend(lab.whoamis_of(WEB).into_iter().map(|whoami| whoami.task));
    }

    fn count(&self) -> usize {
        self.ids.len() - N_TASKS
    }
}

fn tasks(lab: &Lab) -> Vec<Whoami> {
    lab.whoamis_of(WEB)
}

#[track_caller]
fn wait_until_gone(lab: &Lab, gone: &[Whoami]) {
    wait_until(SETTLES_WITHIN, "tasks are replaced", || {
        let now = tasks(lab);
        let is_left = |old: &Whoami| now.iter().any(|task| task.task == old.task);
        let left: Vec<&Whoami> = gone.iter().filter(|old| is_left(old)).collect();
        (left.is_empty().then_some(()), format!("{left:#?}"))
    });
}

fn update(lab: &Lab, round: usize) {
    let old = tasks(lab);
    let variable = format!("ROUND={round}");
    let n1 = lab.node("n1");
    n1.skep(&["service", "update", "--detach", "--env-add", &variable, WEB]).ok();
    wait_until_gone(lab, &old);
}

/// Those that come and go again count, too: they are given connections, and are taken out again.
fn scale(lab: &Lab, seen: &mut Replaced) {
    for n_tasks in [N_TASKS + 3, N_TASKS] {
        lab.node("n1").skep(&["service", "scale", "--detach", &format!("{WEB}={n_tasks}")]).ok();
        lab.wait_until_settled("n1", WEB, n_tasks);
        seen.look(lab);
    }
}

fn drain(lab: &Lab, node: &str) {
    let mut old = tasks(lab);
    old.retain(|task| task.node == node);
    let set = |availability: &str| {
        lab.node("n1").skep(&["node", "update", "--availability", availability, node]).ok();
    };
    set("drain");
    wait_until_gone(lab, &old);
    lab.wait_until_settled("n1", WEB, N_TASKS);
    set("active");
}

/// A task says that it is ill, and goes on answering.
fn fall_ill(lab: &Lab) {
    let ill = tasks(lab).remove(0);
    let curl = ["curl", "-sS", "--fail", "-X", "POST", "http://127.0.0.1:8080/health/fail"];
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{}/ns/net", ill.pid)).args(curl);
    assert!(command.status().unwrap().success());
    wait_until_gone(lab, &[ill]);
}

/// A worker's daemon, and that of a manager.
fn restart_daemons(lab: &Lab, round: usize) {
    let nodes = [NODES[3 + round % 2], NODES[round % 3]];
    lab.kill_daemon(&nodes);
    lab.start_nodes(&nodes);
    let via = NODES[(round + 1) % 3];
    for node in nodes {
        lab.wait_for_node(via, node, "Ready");
    }
}

/// Those that were on their way to its tasks, and those that go there until it is seen.
#[test]
fn a_dead_node_fails_requests_until_it_is_seen() {
    if !is_long() {
        eprintln!("skipped: only make test-long runs it");
        return;
    }
    if !is_root_or_skip() {
        return;
    }
    let lab = deployed();
    let dead =
        tasks(&lab).into_iter().find(|task| ["n4", "n5"].contains(&&*task.node)).unwrap().node;
    let others: Vec<&str> = NODES.into_iter().filter(|node| *node != dead).collect();
    let started = monotonic();
    let loads = [false, true].map(|keep_alive| load(&lab, &others, keep_alive));
    // So that kept connections are there.
    wait_until(SETTLES_WITHIN, "the loads run", || {
        ((started.elapsed() > Duration::from_secs(2)).then_some(()), String::new())
    });
    let killed_at = started.elapsed();
    lab.kill(&[&dead]);
    lab.wait_for_node("n1", &dead, "Down");
    lab.wait_until_settled("n1", WEB, N_TASKS);
    let reports = loads.map(Load::stop);
    for (what, report) in ["new connections", "kept connections"].iter().zip(&reports) {
        let late = |record: &&skep_cluster_tests::Record| {
            Duration::from_millis(record.sent_at_ms) > killed_at + SEEN_WITHIN
        };
        let last = report.records.iter().map(|record| record.sent_at_ms).max();
        let window = last.map(|last| Duration::from_millis(last).saturating_sub(killed_at));
        let (n, n_failed) = (report.summary.requests, report.summary.failed);
        eprintln!(
            "-- a dead node, {what}: {n} requests, {n_failed} failed, the last sent {window:?} after"
        );
        for record in report.records.iter().filter(|record| !record.is_ok()) {
            let after = Duration::from_millis(record.sent_at_ms).saturating_sub(killed_at);
            eprintln!("   {after:?} after, {} ms: {}", record.took_ms, record.outcome);
        }
        let late: Vec<_> = report.records.iter().filter(late).take(5).collect();
        assert!(late.is_empty(), "{what}: failed after the node was seen: {late:#?}");
    }
    lab.down();
}
