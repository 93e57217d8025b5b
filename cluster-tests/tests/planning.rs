//! What a swarm says beforehand, and of what waits; and that it then does what it said.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeMap;

use serde_json::Value;
use skep_cluster_tests::{
    Lab, LabOptions, Output, SETTLES_WITHIN, TaskRow, WHOAMI, is_root_or_skip, step, wait_until,
};

const WEB: &str = "web";
/// More than any machine has.
const MUCH: &str = "64TiB";

#[test]
fn the_swarm_does_what_it_says_it_would() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    step("a task that waits says why, until it does not");
    reasons_are_found_anew(&lab);
    step("a service that is not there yet");
    a_service_is_created_as_planned(&lab);
    step("an update");
    an_update_is_done_as_planned(&lab);
    step("a stack");
    a_stack_is_planned_as_a_whole(&lab);
    step("nodes that are down");
    a_node_is_lost_as_foreseen(&lab);
    lab.down();
}

#[test]
fn who_only_looks_needs_no_leader() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 2, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    let flags = ["--constraint=node.hostname==n3", "--restart-delay=1s"];
    let n1 = lab.node("n1");
    n1.create_whoami(WEB, &flags);
    n1.create_whoami("ssd", &["--constraint=node.labels.disk==ssd"]);
    lab.wait_until_settled("n1", WEB, 1);
    let pid = || lab.containers("n3").into_values().next();
    let first = pid().unwrap();

    lab.kill(&["n2"]);
    wait_until(SETTLES_WITHIN, "reasons are told, and that they may be old", || {
        let output = n1.skep(&["service", "explain", "ssd"]);
        let is_told = output.status.success()
            && output.stdout.contains("does not meet node.labels.disk == ssd")
            && output.stderr.contains("may be old");
        (is_told.then_some(()), output.to_string())
    });
    let follower = lab.start_skep("n1", &["service", "logs", "--raw", "--follow", WEB]);
    let wait_for_starts = |n_starts: usize, what: &str| {
        wait_until(SETTLES_WITHIN, what, || {
            let lines = follower.lines();
            let starts = lines.iter().filter(|line| line.contains("listening on port"));
            ((starts.count() == n_starts).then_some(()), format!("{lines:#?}"))
        });
    };
    wait_for_starts(1, "the log without a leader");
    lab.node("n3").exec(&["kill", "-KILL", &first.to_string()]).ok();
    wait_until(SETTLES_WITHIN, "another container of the task runs", || {
        let found = pid();
        (found.filter(|pid| *pid != first), format!("{found:?}"))
    });
    wait_for_starts(2, "what the container writes that followed");
    lab.down();
}

/// The exit code and the rows of a plan.
fn plan(output: &Output) -> (Option<i32>, Vec<Value>) {
    (output.status.code(), output.json_lines())
}

/// `action name from to` of each row.
fn words(rows: &[Value]) -> Vec<String> {
    let word = |row: &Value| {
        let parts = ["Action", "Name", "From", "To"].map(|key| row[key].as_str().unwrap());
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<&str>>().join(" ")
    };
    rows.iter().map(word).collect()
}

/// Where each task is to be, by its name.
fn places(rows: &[Value]) -> BTreeMap<String, String> {
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    rows.iter().map(|row| (text(row, "Name"), text(row, "To"))).collect()
}

fn real_places(tasks: &[TaskRow]) -> BTreeMap<String, String> {
    tasks.iter().map(|task| (task.name.clone(), task.node.clone())).collect()
}

fn version(lab: &Lab, service: &str) -> Value {
    lab.node("n1").skep(&["service", "inspect", service]).ok().json()[0]["Version"].clone()
}

fn reasons_are_found_anew(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.create_whoami("ssd", &["--replicas", "2", "--constraint", "node.labels.disk==ssd"]);
    let rows = wait_until(SETTLES_WITHIN, "both tasks say why they wait", || {
        let rows = n1.skep(&["service", "explain", "--format", "json", "ssd"]).ok().json_lines();
        let is_pending = rows.len() == 2 && rows.iter().all(|row| row["State"] == "Pending");
        (is_pending.then(|| rows.clone()), format!("{rows:#?}"))
    });
    let tasks = n1.tasks("ssd");
    for (row, task) in rows.iter().zip(&tasks) {
        let miss = &row["Filters"][0];
        assert_eq!(
            (miss["Filter"].as_str(), miss["Nodes"].as_u64()),
            (Some("constraint"), Some(3))
        );
        let nearest = miss["Nearest"].as_str().unwrap();
        assert!(nearest.contains("does not meet node.labels.disk == ssd"), "{nearest}");
        let reason = row["Reason"].as_str().unwrap();
        assert!(reason.ends_with(nearest), "{reason}");
        assert_eq!(task.error, format!("\"{reason}\""), "what is found is what is written");
    }
    let table = n1.skep(&["service", "explain", "ssd.2"]).ok();
    assert!(table.stdout.contains("FILTER") && table.stdout.contains("ssd.2"), "{table}");
    n1.skep(&["node", "update", "--label-add", "disk=ssd", "n2"]).ok();
    lab.wait_until_settled("n1", "ssd", 2);
    let none = n1.skep(&["service", "explain", "ssd"]).ok();
    assert_eq!((none.text(), none.stderr.trim()), ("", "No task of ssd waits."));
    n1.skep(&["service", "rm", "ssd"]).ok();
}

fn a_service_is_created_as_planned(lab: &Lab) {
    let n1 = lab.node("n1");
    let asked = ["service", "create", "--plan=json", "--name", WEB, "--replicas", "4"];
    let (code, rows) = plan(&n1.skep(&[&asked[..], &[WHOAMI]].concat()));
    assert_eq!(code, Some(0), "{rows:#?}");
    assert!(rows.iter().all(|row| row["Action"] == "create"), "{rows:#?}");
    n1.skep(&["service", "inspect", WEB]).err();
    let much = ["--reserve-memory", MUCH, WHOAMI];
    let (code, too_large) = plan(&n1.skep(&[&asked[..], &much].concat()));
    assert_eq!((code, too_large.len()), (Some(2), 4), "{too_large:#?}");
    let reason = too_large[0]["Reason"].as_str().unwrap();
    assert!(reason.contains("insufficient resources on 3 nodes") && reason.contains(" lacks "));
    let unknown = n1.skep(&["service", "create", "--plan", "--name", WEB, "unheard:1"]);
    assert_eq!(unknown.status.code(), Some(2), "{unknown}");
    assert!(unknown.stderr.contains("no image named unheard:1 in this swarm"), "{unknown}");
    n1.create_whoami(WEB, &["--replicas", "4"]);
    let tasks = lab.wait_until_settled("n1", WEB, 4);
    assert_eq!(real_places(&tasks), places(&rows));
}

fn an_update_is_done_as_planned(lab: &Lab) {
    let n1 = lab.node("n1");
    let before = version(lab, WEB);
    let stuck = n1.skep(&["service", "update", "--plan", "--reserve-memory", MUCH, WEB]);
    assert_eq!(stuck.status.code(), Some(2), "{stuck}");
    assert!(stuck.stdout.contains("no place"), "{stuck}");
    assert!(stuck.stderr.contains("4 tasks are replaced, 1 at a time"), "{stuck}");
    assert!(stuck.stderr.contains("the update is paused when that takes 10 min"), "{stuck}");
    // One at a time: of two, the one that runs first would decide where the next one goes.
    let flags = ["--env-add", "A=b", "--constraint-add", "node.role==worker"];
    let planned = n1.skep(&[&["service", "update", "--plan=json"][..], &flags, &[WEB]].concat());
    let (code, rows) = plan(&planned);
    assert_eq!((code, rows.len()), (Some(0), 4), "{planned}");
    assert!(planned.stderr.contains("4 tasks are replaced, 1 at a time"), "{planned}");
    assert_eq!(version(lab, WEB), before, "nothing is written");
    n1.skep(&[&["service", "update", "--quiet"][..], &flags, &[WEB]].concat()).ok();
    let tasks = lab.wait_until_settled("n1", WEB, 4);
    assert_eq!(real_places(&tasks), places(&rows));
}

fn a_stack_is_planned_as_a_whole(lab: &Lab) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stack.yml");
    let compose = format!(
        "services:\n  a:\n    image: {WHOAMI}\n    deploy: {{replicas: 2}}\n  b:\n    image: {WHOAMI}\n"
    );
    std::fs::write(&file, compose).unwrap();
    let file = file.to_str().unwrap();
    let n1 = lab.node("n1");
    let planned = n1.skep(&["stack", "deploy", "--plan=json", "--compose-file", file, "s"]);
    let (code, rows) = plan(&planned);
    let names: Vec<String> = places(&rows).into_keys().collect();
    assert_eq!((code, names), (Some(0), ["s_a.1", "s_a.2", "s_b.1"].map(str::to_owned).to_vec()));
    assert_eq!(n1.skep(&["stack", "services", "--quiet", "s"]).text(), "", "nothing is written");
}

fn a_node_is_lost_as_foreseen(lab: &Lab) {
    let n1 = lab.node("n1");
    let what_if =
        |node: &str| plan(&n1.skep(&["node", "what-if", "--format", "json", "--down", node]));
    let (code, rows) = what_if("n1");
    assert_eq!(code, Some(2), "{rows:#?}");
    let loss = rows[0]["Reason"].as_str().unwrap();
    assert!(loss.starts_with("the majority of managers: 0 of 1 would be left"), "{loss}");
    let before = n1.tasks(WEB);
    let on_n3 = before.iter().filter(|task| task.is_running() && task.node == "n3").count();
    let (code, rows) = what_if("n3");
    assert_eq!((code, rows.len()), (Some(0), on_n3), "{rows:#?}");
    let expect: Vec<String> =
        places(&rows).into_iter().map(|(name, to)| format!("move {name} n3 {to}")).collect();
    assert_eq!(words(&rows), expect);
    assert!(on_n3 > 0 && expect.iter().all(|word| word.ends_with(" n2")), "{expect:?}");
    lab.kill(&["n3"]);
    n1.wait_for_tasks(WEB, "all are on n2", |tasks| {
        let on_n2 = tasks.iter().filter(|task| task.is_running() && task.node == "n2").count();
        (on_n2 == 4).then_some(())
    });
    let (code, rows) = what_if("n2");
    assert_eq!(code, Some(2), "{rows:#?}");
    let unplaced = rows.iter().filter(|row| row["Action"] == "no place");
    assert_eq!(unplaced.count(), 4, "the manager is not for them: {rows:#?}");
}
