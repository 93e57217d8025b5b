//! Rolling updates of twenty tasks under open-loop load, in both orders, while clients with kept connections and
//! clients with a new connection for each request ask all nodes. Nothing is tried twice.

use std::collections::BTreeSet;
use std::time::Duration;

use skep_cluster_tests::{
    Lab, LabOptions, Load, LoadOptions, Report, TaskRow, is_long, is_root_or_skip,
};
use skep_runtime::clock::monotonic;

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const WEB: &str = "rolling_web";
const N_TASKS: usize = 20;
/// In all, over both orders; the long run has as many for each order and kind of connection.
const N_REQUESTS: u64 = 100_000;
/// Requests a second: over new connections, and over kept ones, which cost a fifth. Two cores have time left.
const RATES: [u64; 2] = [300, 1200];
/// Few enough that each connection is in use again before a task that drains thinks that it is idle.
const N_CLIENTS: u32 = 16;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// One task after the other, as is the default.
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
      interval: 5s
      timeout: 20s
      start_period: 20s
      start_interval: 500ms
    stop_grace_period: 20s
    deploy:
      replicas: 20
      update_config: {monitor: 100ms}
"#;

#[test]
fn no_request_fails_while_twenty_tasks_are_replaced() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.deploy_whoami("rolling", STACK);
    lab.wait_until_settled("n1", WEB, N_TASKS);
    let n_requests = if is_long() { 2 * N_REQUESTS } else { N_REQUESTS / 2 };
    let n_sent: u64 =
        ["stop-first", "start-first"].map(|order| update(&lab, order, n_requests)).iter().sum();
    eprintln!("-- {n_sent} requests in all");
    assert!(n_sent >= N_REQUESTS, "{n_sent} requests");
    lab.down();
}

/// Replaces all tasks, again and again, until so many requests were sent meanwhile; gives how many.
fn update(lab: &Lab, order: &str, n_requests: u64) -> u64 {
    let started = monotonic();
    let loads = [false, true].map(|keep_alive| load(lab, keep_alive));
    let n_due = || RATES.iter().sum::<u64>() * started.elapsed().as_secs();
    let mut n_updates = 0;
    while n_updates == 0 || n_due() < n_requests + n_requests / 50 {
        n_updates += 1;
        let before = ids(&lab.wait_until_settled("n1", WEB, N_TASKS));
        let variable = format!("ROUND={order}-{n_updates}");
        let change = ["--update-order", order, "--env-add", &variable];
        // The client waits for the end, and is told of each change: nothing asks again and again.
        lab.node("n1").skep(&[&["service", "update"], &change[..], &[WEB]].concat()).ok();
        let after = ids(&lab.wait_until_settled("n1", WEB, N_TASKS));
        assert!(after.is_disjoint(&before), "{after:?} were {before:?}");
        eprintln!("-- {order}, update {n_updates}: {:?} in all", started.elapsed());
    }
    let reports = loads.map(Load::stop);
    for (what, report) in ["new connections", "kept connections"].iter().zip(&reports) {
        let (n, failed) = (report.summary.requests, report.summary.failed);
        let longest = report.summary.longest_ms;
        eprintln!(
            "-- {order}, {what}: {n} requests, {failed} failed, longest {longest} ms; {n_updates} updates of \
             {N_TASKS} tasks"
        );
    }
    reports.iter().for_each(Report::assert_none_failed);
    reports.iter().map(|report| report.summary.requests).sum()
}

fn load(lab: &Lab, keep_alive: bool) -> Load {
    let options = LoadOptions {
        clients: N_CLIENTS,
        keep_alive,
        rate: Some(RATES[usize::from(keep_alive)]),
        timeout: REQUEST_TIMEOUT,
        ..LoadOptions::to(NODES.map(|node| lab.url(node, 8080)))
    };
    lab.load("client", &options)
}

fn ids(tasks: &[TaskRow]) -> BTreeSet<String> {
    tasks.iter().map(|task| task.id.clone()).collect()
}
