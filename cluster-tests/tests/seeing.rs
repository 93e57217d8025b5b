//! What operators are shown of a real swarm's networks: who is where, and who was not waited for.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use serde_json::Value;
use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, is_root_or_skip, wait_until};

const WEB: &str = "web";
const N_TASKS: usize = 2;

#[test]
fn operators_see_who_is_where() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").skep(&["network", "create", "front"]).ok();
    lab.node("n1").create_whoami(
        WEB,
        &[
            "--replicas",
            "2",
            "--publish",
            "8080:8080",
            "--network",
            "front",
            "--constraint",
            "node.hostname!=n3",
        ],
    );
    lab.wait_until_settled("n1", WEB, N_TASKS);
    step("endpoints");
    endpoints_are_listed(&lab);
    step("a node that does not acknowledge");
    a_node_that_does_not_acknowledge_is_named(&lab);
    lab.down();
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

fn endpoints(lab: &Lab) -> Vec<Value> {
    lab.node("n1").skep(&["service", "endpoints", "--format", "json", WEB]).ok().json_lines()
}

fn endpoints_are_listed(lab: &Lab) {
    let rows = wait_until(SETTLES_WITHIN, "both tasks are in the balancer", || {
        let rows = endpoints(lab);
        let is_so = rows.len() == N_TASKS && rows.iter().all(|row| row["InBalancer"] == "yes");
        (is_so.then(|| rows.clone()), format!("{rows:#?}"))
    });
    let inspect = ["network", "inspect", "--verbose", "front"];
    let network = lab.node("n1").skep(&inspect).ok().json()[0].clone();
    for (row, task) in rows.iter().zip(network["Services"][WEB]["Tasks"].as_array().unwrap()) {
        let node = row["Node"].as_str().unwrap();
        assert_eq!(task["Info"]["Host IP"], lab.node(node).address().to_string());
        assert_eq!(row["Networks"], format!("front={}", task["EndpointIP"].as_str().unwrap()));
        assert!(row["Ingress"].as_str().unwrap().starts_with("10."), "{row}");
    }
}

/// n3 has no task of the service, but balances to it as every node does.
fn a_node_that_does_not_acknowledge_is_named(lab: &Lab) {
    lab.node("n3").signal_daemon("STOP");
    lab.node("n1").skep(&["service", "update", "--detach", "--force", WEB]).ok();
    let expect = "\"stopped without the acknowledgement of n3\"";
    lab.node("n1").wait_for_tasks(WEB, "the first stopped task says who was missing", |tasks| {
        tasks.iter().any(|task| task.state() == "Shutdown" && task.error == expect).then_some(())
    });
    let log = lab.node("n1").log();
    let said = "a task is stopped without the acknowledgement of nodes";
    assert!(log.lines().any(|line| line.contains(said) && line.contains("n3")), "{log}");
    lab.node("n3").signal_daemon("CONT");
    lab.wait_for_node("n1", "n3", "Ready");
    lab.wait_until_settled("n1", WEB, N_TASKS);
}
