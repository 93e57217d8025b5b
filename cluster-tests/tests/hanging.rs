//! A daemon that stands still on a machine that lives, as one that is stopped or starved does.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::time::Duration;

use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, TaskRow, is_root_or_skip, wait_until};
use skep_runtime::clock::monotonic;

const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
const N_TASKS: usize = 8;
const STOPPED_FOR: Duration = Duration::from_secs(5);

#[test]
fn tasks_of_a_daemon_that_hangs_are_replaced_only_when_it_does_not_come_back() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").create_whoami("web", &["--replicas=8"]);
    let before = ids(&lab.wait_until_settled("n1", "web", N_TASKS));
    the_leader_is_stopped_for_a_moment(&lab, &before);
    a_worker_is_stopped_for_good(&lab, &before);
    lab.down();
}

fn the_leader_is_stopped_for_a_moment(lab: &Lab, before: &BTreeSet<String>) {
    let leader = lab.wait_for_leader("n1");
    let via = MANAGERS.into_iter().find(|name| *name != leader).unwrap();
    let started = monotonic();
    lab.node(&leader).signal_daemon("STOP");
    lab.wait_for_node(via, &leader, "Disconnected");
    wait_until(SETTLES_WITHIN, "it is stopped for five seconds", || {
        assert_none_replaced(lab, via, before);
        ((started.elapsed() >= STOPPED_FOR).then_some(()), String::new())
    });
    lab.node(&leader).signal_daemon("CONT");
    lab.wait_for_node(via, &leader, "Ready");
    assert_none_replaced(lab, via, before);
    assert_eq!(ids(&lab.wait_until_settled(via, "web", N_TASKS)), *before);
}

fn a_worker_is_stopped_for_good(lab: &Lab, before: &BTreeSet<String>) {
    let node = lab.node("n1");
    lab.node("n4").signal_daemon("STOP");
    lab.wait_for_node("n1", "n4", "Disconnected");
    let message = node.skep(&["node", "inspect", "--format", "{{.Status.Message}}", "n4"]).ok();
    let expect = "its daemon is silent; its tasks are not replaced yet, since its machine answers";
    assert_eq!(message.text().trim(), expect);
    assert_none_replaced(lab, "n1", before);
    lab.wait_for_node("n1", "n4", "Down");
    node.wait_for_tasks("web", "others run instead", |tasks| {
        let elsewhere = tasks.iter().filter(|task| task.is_running() && task.node != "n4");
        (elsewhere.count() == N_TASKS).then_some(())
    });
    lab.node("n4").signal_daemon("CONT");
    lab.wait_for_node("n1", "n4", "Ready");
    lab.wait_until_settled("n1", "web", N_TASKS);
}

fn ids(tasks: &[TaskRow]) -> BTreeSet<String> {
    tasks.iter().map(|task| task.id.clone()).collect()
}

/// Every task that there ever was is one of these.
#[track_caller]
fn assert_none_replaced(lab: &Lab, via: &str, before: &BTreeSet<String>) {
    let tasks = lab.node(via).tasks("web");
    assert_eq!(ids(&tasks), *before, "{tasks:#?}");
}
