//! Containers of real daemons: what confines them, how their ends are told, and what they live through.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::fs;

use skep_cluster_tests::{
    BUSYBOX, Lab, LabOptions, LoadOptions, Running, SETTLES_WITHIN, TaskRow, WHOAMI,
    is_root_or_skip, wait_until,
};

/// A whoami that tells whether it is healthy; `IMAGE` is replaced.
const HEALTH_STACK: &str = r#"
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
    deploy:
      replicas: 2
      restart_policy: {delay: 1s}
"#;

fn url(lab: &Lab, node: &str, port: u16, path: &str) -> String {
    format!("http://{}:{port}{path}", lab.node(node).address())
}

/// Creates a service of busybox that runs a shell's command.
#[track_caller]
fn create_shell(lab: &Lab, name: &str, flags: &[&str], command: &str) {
    let mut args = vec!["service", "create", "--detach", "--name", name];
    args.extend(flags);
    args.extend([BUSYBOX, "sh", "-c", command]);
    lab.node("n1").skep(&args).ok();
}

/// Waits until a task of a service runs.
#[track_caller]
fn wait_for_running(lab: &Lab, service: &str) -> TaskRow {
    lab.node("n1").wait_for_tasks(service, "its task runs", |tasks| {
        tasks.iter().find(|task| task.is_running()).cloned()
    })
}

/// Waits until the only task of a service has ended.
#[track_caller]
fn wait_for_end(lab: &Lab, service: &str) -> TaskRow {
    let has_ended = |task: &&TaskRow| ["Complete", "Failed", "Rejected"].contains(&task.state());
    lab.node("n1").wait_for_tasks(service, "its task has ended", |tasks| {
        tasks.iter().find(has_ended).cloned()
    })
}

#[test]
fn a_task_is_confined_and_how_it_ended_is_told() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, ..LabOptions::default() });
    lab.import_busybox("n1");
    lab.import_whoami();
    let once = ["--restart-condition", "none"];

    create_shell(&lab, "confined", &once, "cat /proc/1/status; echo to stderr >&2");
    let task = wait_for_end(&lab, "confined");
    assert_eq!((task.state(), task.error.as_str()), ("Complete", ""));
    let logs = lab.node("n1").skep(&["service", "logs", "--raw", "confined"]).ok();
    let lines: BTreeSet<&str> = logs.stdout.lines().collect();
    for line in ["Seccomp:\t2", "CapBnd:\t00000000a80425fb", "CapEff:\t00000000a80425fb"] {
        assert!(lines.contains(line), "{line:?} in {logs}");
    }
    assert_eq!(logs.stderr, "to stderr\n", "each stream comes out where it went in");

    create_shell(&lab, "failing", &once, "exit 3");
    let task = wait_for_end(&lab, "failing");
    assert_eq!((task.state(), task.error.as_str()), ("Failed", "\"task: non-zero exit (3)\""));

    let mut flags = vec!["--limit-memory", "64M", "--publish", "8080:8080"];
    flags.extend(once);
    lab.node("n1").create_whoami("hungry", &flags);
    lab.wait_until_settled("n1", "hungry", 1);
    let mut held = lab.hold("client", &url(&lab, "n1", 8080, "/"));
    assert!(held.request("/alloc/8").is_ok(), "what is within the limit is given");
    assert!(!held.request("/alloc/128").is_ok(), "what is beyond it ends the process");
    let task = wait_for_end(&lab, "hungry");
    assert_eq!(task.state(), "Failed");
    assert!(task.error.contains("137") && task.error.contains("out of memory"), "{task:?}");
    lab.down();
}

#[test]
fn an_unhealthy_task_gets_no_new_connection_and_is_replaced() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stack.yml");
    fs::write(&file, HEALTH_STACK.replace("IMAGE", WHOAMI)).unwrap();
    lab.node("n1").skep(&["stack", "deploy", "-c", file.to_str().unwrap(), "health"]).ok();
    let before = lab.wait_until_settled("n1", "health_web", 2);

    let mut options = LoadOptions::to(["n1", "n2", "n3"].map(|node| url(&lab, node, 8080, "/")));
    options.timeout = SETTLES_WITHIN;
    let load = lab.load("client", &options);
    load.wait_for_more(10, SETTLES_WITHIN);
    let fail = ["curl", "-sS", "--fail", "-X", "POST", &url(&lab, "n2", 8080, "/health/fail")];
    lab.client().exec(&fail).ok();

    let failed = lab.node("n1").wait_for_tasks("health_web", "one was found unhealthy", |tasks| {
        tasks.iter().find(|task| task.state() == "Failed").cloned()
    });
    assert_eq!(failed.error, "\"unhealthy container\"");
    assert!(before.iter().any(|task| task.id == failed.id), "{failed:?} in {before:?}");
    // Everything from here on is answered by the others.
    let n_before = load.records().len();
    let after = lab.wait_until_settled("n1", "health_web", 2);
    load.wait_for_more(30, SETTLES_WITHIN);
    let report = load.stop();
    report.assert_none_failed();
    let replacement = after.iter().find(|task| task.slot == failed.slot).unwrap();
    assert_ne!(replacement.id, failed.id, "{after:?}");
    // A request that was sent before it was found unhealthy may be answered after; none is sent.
    let sent: Vec<_> = report.records.iter().skip(n_before + 1).collect();
    let hostname = &failed.id[..12];
    let by_failed = sent.iter().filter(|record| record.field("Hostname") == hostname).count();
    assert_eq!(by_failed, 0, "answers of {failed:?} after it was found unhealthy");
    let other = before.iter().find(|task| task.id != failed.id).unwrap();
    assert!(after.iter().any(|task| task.id == other.id), "{after:?}");
    lab.down();
}

/// Checks that a counter's log has every number from 1 on, once and in order; gives the last one.
#[track_caller]
fn check_counter(lab: &Lab, service: &str) -> u64 {
    let logs = lab.node("n1").skep(&["service", "logs", "--raw", service]).ok();
    let numbers: Vec<u64> = logs.stdout.lines().map(|line| line.parse().unwrap()).collect();
    let n_lines = u64::try_from(numbers.len()).unwrap();
    let expect: Vec<u64> = (1..=n_lines).collect();
    assert_eq!(numbers, expect, "no line of the log is lost, doubled or moved");
    n_lines
}

/// Waits until a counter's log, whole, has a number above `above`.
#[track_caller]
fn wait_for_count(lab: &Lab, service: &str, above: u64) -> u64 {
    wait_until(SETTLES_WITHIN, "the log goes on", || {
        let count = check_counter(lab, service);
        ((count > above).then_some(count), format!("{count} lines; {above} before"))
    })
}

/// Counts, and is alive for as long as nobody ends it.
const COUNT: &str = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.02; done";

/// Starts a counter whose log is rotated, and a follower of it.
#[track_caller]
fn follow_bounded(lab: &Lab, flags: &[&str]) -> (TaskRow, Running) {
    // A file is full in less than a second, and the daemon is away for a few.
    let bounded = ["--log-opt", "max-size=2k", "--log-opt", "max-file=100"];
    create_shell(lab, "bounded", &[flags, &bounded].concat(), COUNT);
    let task = wait_for_running(lab, "bounded");
    (task, lab.start_skep("n1", &["service", "logs", "--raw", "--follow", "bounded"]))
}

/// Waits until a follower of a counter has printed so many more lines: every number from 1 on, once.
#[track_caller]
fn wait_for_followed(follower: &Running, n_more: usize) {
    let n_before = follower.lines().len();
    wait_until(SETTLES_WITHIN, "the follower goes on", || {
        let lines = follower.lines();
        let wrong = lines.iter().zip(1..).find(|(line, n)| **line != n.to_string());
        assert_eq!(wrong, None, "no line is lost, doubled or moved");
        let has_more = lines.len() >= n_before + n_more;
        (has_more.then_some(()), format!("{} lines; {n_before} before", lines.len()))
    });
}

#[test]
fn containers_outlive_their_daemon() {
    const NODE: &str = "n4";
    const SHORT: &str = "trap 'exit 7' TERM; echo ready; while true; do sleep 0.02; done";
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 1, ..LabOptions::default() });
    lab.import_busybox("n1");
    lab.import_whoami();
    let here = ["--constraint", &format!("node.hostname=={NODE}")];
    let mut flags = vec!["--publish", "8080:8080"];
    flags.extend(here);
    lab.node("n1").create_whoami("web", &flags);
    create_shell(&lab, "counter", &here, COUNT);
    create_shell(&lab, "short", &[&here[..], &["--restart-condition", "none"]].concat(), SHORT);
    let web = lab.wait_until_settled("n1", "web", 1);
    let (counter, short) = (wait_for_running(&lab, "counter"), wait_for_running(&lab, "short"));
    let (bounded, follower) = follow_bounded(&lab, &here);
    wait_until(SETTLES_WITHIN, "its trap is set", || {
        let logs = lab.node("n1").skep(&["service", "logs", "--raw", "short"]);
        ((logs.text() == "ready").then_some(()), logs.to_string())
    });
    let count = wait_for_count(&lab, "counter", 10);
    let containers = lab.containers(NODE);
    assert_eq!(containers.len(), 4, "{containers:?}");
    wait_for_followed(&follower, 50);
    let pid = containers[&short.id].to_string();
    let mut through_other = lab.hold("client", &url(&lab, "n1", 8080, "/"));
    let mut through_own = lab.hold("client", &url(&lab, NODE, 8080, "/"));
    let mut check_held = |when: &str| {
        for (held, way) in [(&mut through_other, "another node"), (&mut through_own, "its node")] {
            let record = held.request("/");
            assert!(record.is_ok(), "{when}, through {way}: {record:?}");
        }
    };
    check_held("before");

    lab.kill_daemon(&[NODE]);
    let end = format!("kill -s TERM {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.01; done");
    lab.node(NODE).exec(&["sh", "-c", &end]).ok();
    check_held("without the daemon");
    lab.start_nodes(&[NODE]);
    check_held("with the new daemon");

    let ended = wait_for_end(&lab, "short");
    assert_eq!((&ended.id, ended.error.as_str()), (&short.id, "\"task: non-zero exit (7)\""));
    let count = wait_for_count(&lab, "counter", count);
    wait_for_followed(&follower, 50);
    let mut expect = containers;
    expect.remove(&short.id);
    assert_eq!(lab.containers(NODE), expect, "the same processes");

    lab.node(NODE).signal_daemon("TERM");
    assert_eq!(lab.wait_for_daemon_end(NODE), "exited with code 0");
    check_held("after SIGTERM");
    assert_eq!(lab.containers(NODE), expect, "a daemon that stops leaves its containers alone");
    lab.start_nodes(&[NODE]);
    check_held("with the third daemon");
    wait_for_count(&lab, "counter", count);
    wait_for_followed(&follower, 50);
    assert_eq!(lab.containers(NODE), expect);

    lab.wait_for_node("n1", NODE, "Ready");
    let ids = |service: &str| -> Vec<String> {
        lab.node("n1").tasks(service).into_iter().map(|task| task.id).collect()
    };
    for (service, id) in [("web", &web[0].id), ("counter", &counter.id), ("bounded", &bounded.id)] {
        assert_eq!(ids(service), [id.as_str()], "no task of {service} was replaced");
    }
    lab.wait_until_settled("n1", "web", 1);
    lab.down();
}
