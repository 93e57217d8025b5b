//! A swarm whose only manager is gone: nodes go on alone.

use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, is_root_or_skip, wait_until};

#[test]
fn a_container_that_ends_while_no_manager_leads_is_followed_by_another_one() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    let flags = ["--constraint=node.hostname==n2", "--restart-delay=1s", "--publish=8080:8080"];
    lab.node("n1").create_whoami("web", &flags);
    let [before] = &lab.wait_until_settled("n1", "web", 1)[..] else { panic!("one task") };
    let first = pid(&lab).unwrap();
    let log = lab.node("n1").skep(&["service", "logs", "--raw", "web"]).ok().stdout;
    assert!(!log.is_empty(), "the container says that it serves");

    lab.kill_daemon(&["n1"]);
    wait_until(SETTLES_WITHIN, "the node knows that nobody leads", || {
        let log = lab.node("n2").log();
        (log.contains("the session with the leader ended").then_some(()), log)
    });
    lab.node("n2").exec(&["kill", "-KILL", &first.to_string()]).ok();
    let second = wait_until(SETTLES_WITHIN, "another container of the task runs", || {
        let found = pid(&lab);
        (found.filter(|pid| *pid != first), format!("{found:?}"))
    });
    wait_until(SETTLES_WITHIN, "it serves the port", || {
        let report = lab.send("n2", &lab.url("n2", 8080), 1);
        ((report.summary.failed == 0).then_some(()), format!("{report:?}"))
    });

    lab.start_nodes(&["n1"]);
    let manager = lab.node("n1");
    lab.wait_for_node("n1", "n2", "Ready");
    let task = wait_until(SETTLES_WITHIN, "the manager hears of the attempt", || {
        let output = manager.skep(&["inspect", &before.id]);
        let told = output.status.success().then(|| output.json()[0].clone());
        let told = told.filter(|task| task["Status"]["NAttempts"] == 1);
        (told, output.to_string())
    });
    assert_eq!(task["Status"]["State"], "running", "{task:#}");
    assert_eq!(task["Status"]["ContainerStatus"]["PID"], second, "{task:#}");
    let attempt = &task["Status"]["Attempts"][0];
    assert_eq!(attempt["ExitCode"], 137, "{task:#}");
    let tasks = lab.wait_until_settled("n1", "web", 1);
    assert_eq!(tasks.len(), 1, "no task was made: {tasks:#?}");
    assert_eq!(tasks[0].id, before.id);
    let both = manager.skep(&["service", "logs", "--raw", "web"]).ok().stdout;
    assert!(both.starts_with(&log) && both.len() > log.len(), "one log: {both:?} after {log:?}");

    // Managers decide again.
    lab.node("n2").exec(&["kill", "-KILL", &second.to_string()]).ok();
    manager.wait_for_tasks("web", "the task is replaced", |tasks| {
        let next = tasks.iter().find(|task| task.is_running() && task.id != before.id);
        next.map(|_| ())
    });
    lab.down();
}

/// The first process of the container on the worker.
fn pid(lab: &Lab) -> Option<i64> {
    lab.containers("n2").into_values().next()
}
