//! Services and stacks of a real swarm: what users ask for, and what happens when nodes fail.
//!
//! One lab, scenarios in order; each one makes its own services and removes them. Whatever a
//! scenario waits for, it waits until the swarm's list of tasks and the machine's processes agree.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use skep_cluster_tests::{
    Lab, LabOptions, SETTLES_WITHIN, TaskRow, WHOAMI, Whoami, is_root_or_skip, wait_until,
};

const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];

/// Finds no service and leaves none.
type Scenario = fn(&Lab);

#[test]
fn services_are_what_was_asked_whatever_fails() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions::default());
    lab.import_whoami();
    let scenarios: [(&str, Scenario); 14] = [
        ("create, scale, rm", create_scale_and_remove),
        ("update, two at a time", an_update_stops_at_most_two_tasks_at_once),
        ("constraints", constraints_choose_nodes),
        ("preferences and strategies", preferences_and_strategies_order_nodes),
        ("reservations", reservations_that_fit_nowhere_say_why),
        ("drain and pause", drain_moves_tasks_and_pause_keeps_them),
        ("restart policy", restart_policies_are_kept),
        ("logs", logs_come_from_all_nodes),
        ("stack", a_second_deploy_changes_what_differs),
        ("a node that is cut off", a_cut_off_node_runs_nothing_twice),
        ("a node that loses its power", a_dead_node_is_replaced),
        ("a daemon that dies", a_dead_daemon_is_replaced),
        ("a leader that dies", a_deploy_survives_its_leader),
        ("two nodes that lose their power", two_dead_nodes_are_replaced),
    ];
    for (name, scenario) in scenarios {
        eprintln!("-- {name}");
        scenario(&lab);
        assert_eq!(services(&lab), [] as [&str; 0], "{name} leaves no service");
    }
    lab.down();
}

fn services(lab: &Lab) -> Vec<String> {
    let rows = lab.node("n1").skep(&["service", "ls", "--format", "{{.Name}}"]).ok();
    rows.stdout.lines().map(str::to_owned).collect()
}

/// Removes services and waits until neither the managers nor any node have anything of them.
#[track_caller]
fn remove(lab: &Lab, via: &str, names: &[&str]) {
    lab.node(via).skep(&[&["service", "rm"], names].concat()).ok();
    wait_until_gone(lab, via, names);
}

#[track_caller]
fn wait_until_gone(lab: &Lab, via: &str, names: &[&str]) {
    wait_until(SETTLES_WITHIN, &format!("{names:?} are gone"), || {
        let listed = lab.node(via).skep(&["service", "ls", "--format", "{{.Name}}"]);
        let is_listed = listed.stdout.lines().any(|line| names.contains(&line));
        let processes: Vec<_> =
            lab.whoamis().into_iter().filter(|p| names.contains(&p.service())).collect();
        let is_gone = listed.status.success() && !is_listed && processes.is_empty();
        (is_gone.then_some(()), format!("{listed}\n{processes:#?}"))
    });
}

fn ids(tasks: &[TaskRow]) -> BTreeSet<String> {
    tasks.iter().map(|task| task.id.clone()).collect()
}

fn slots(tasks: &[TaskRow]) -> Vec<u64> {
    tasks.iter().map(|task| task.slot).collect()
}

fn nodes(tasks: &[TaskRow]) -> Vec<&str> {
    let mut nodes: Vec<&str> = tasks.iter().map(|task| task.node.as_str()).collect();
    nodes.sort_unstable();
    nodes
}

fn create_scale_and_remove(lab: &Lab) {
    lab.node("n1").create_whoami("life", &["--replicas", "5"]);
    let five = lab.wait_until_settled("n1", "life", 5);
    assert_eq!((slots(&five), nodes(&five)), (vec![1, 2, 3, 4, 5], NODES.to_vec()));
    for whoami in lab.whoamis_of("life") {
        let task = five.iter().find(|task| task.id == whoami.task).unwrap();
        let value = |name: &str| whoami.environment[name].as_str();
        assert_eq!(value("TASK_ID"), task.id, "templates: {whoami:#?}");
        assert_eq!(value("NODE_HOSTNAME"), task.node, "templates: {whoami:#?}");
        assert_eq!(value("TASK_SLOT"), task.slot.to_string(), "templates: {whoami:#?}");
    }

    // Any manager answers; a scale touches no task that may stay.
    lab.node("n2").skep(&["service", "scale", "--detach", "life=8"]).ok();
    let eight = lab.wait_until_settled("n3", "life", 8);
    assert_eq!(slots(&eight), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert!(ids(&eight).is_superset(&ids(&five)), "{five:#?}\n{eight:#?}");
    lab.node("n1").skep(&["service", "scale", "--detach", "life=2"]).ok();
    let two = lab.wait_until_settled("n1", "life", 2);
    assert_eq!(slots(&two), [1, 2]);
    assert!(ids(&five).is_superset(&ids(&two)), "{five:#?}\n{two:#?}");

    let worker = lab.node("n4").skep(&["service", "scale", "--detach", "life=3"]).err();
    assert!(worker.contains("manager"), "a worker refers to a manager: {worker}");
    let again = ["service", "create", "--detach", "--name", "life", WHOAMI];
    assert!(lab.node("n1").skep(&again).err().contains("life"), "a name is taken once");
    remove(lab, "n1", &["life"]);
    let none = lab.node("n1").skep(&["service", "ps", "life"]).err();
    assert!(none.contains("no such service: life"), "{none}");
}

fn an_update_stops_at_most_two_tasks_at_once(lab: &Lab) {
    const N_REPLICAS: usize = 6;
    const PARALLELISM: usize = 2;
    let n1 = lab.node("n1");
    let flags = ["--replicas", "6", "--update-parallelism", "2", "--update-monitor", "500ms"];
    n1.create_whoami("rolling", &[&flags[..], &["--update-order", "stop-first"]].concat());
    let before = lab.wait_until_settled("n1", "rolling", N_REPLICAS);
    n1.skep(&["service", "update", "--detach", "--env-add", "ROUND=2", "rolling"]).ok();
    let mut n_looks = BTreeMap::<usize, usize>::new();
    n1.wait_for_tasks("rolling", "all tasks are new", |tasks| {
        // Processes are not all read in one instant, and pids wrap around: a look that sees too few
        // may have missed one that started behind its back, but two in a row do not.
        let n_processes = (0..2).map(|_| lab.whoamis_of("rolling").len()).max().unwrap();
        let running: Vec<TaskRow> =
            tasks.iter().filter(|task| task.is_running()).cloned().collect();
        let n_least = N_REPLICAS - PARALLELISM;
        assert!(running.len() >= n_least, "only {} run: {tasks:#?}", running.len());
        assert!(running.len() <= N_REPLICAS, "stop-first: {tasks:#?}");
        assert!(n_processes >= n_least, "only {n_processes} processes; {tasks:#?}");
        *n_looks.entry(running.len()).or_default() += 1;
        (running.len() == N_REPLICAS && ids(&running).is_disjoint(&ids(&before))).then_some(())
    });
    eprintln!("looks, by how many ran: {n_looks:?}");
    let after = lab.wait_until_settled("n1", "rolling", N_REPLICAS);
    assert_eq!(slots(&after), [1, 2, 3, 4, 5, 6]);
    for whoami in lab.whoamis_of("rolling") {
        assert_eq!(whoami.environment.get("ROUND").map(String::as_str), Some("2"));
    }
    wait_until(SETTLES_WITHIN, "the update is complete", || {
        let service = n1.skep(&["service", "inspect", "rolling"]).ok();
        let is_complete = service.json()[0]["UpdateStatus"]["State"] == "completed";
        (is_complete.then_some(()), service.stdout)
    });
    remove(lab, "n1", &["rolling"]);
}

fn constraints_choose_nodes(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.create_whoami("pinned", &["--replicas", "3", "--constraint", "node.hostname==n4"]);
    let pinned = lab.wait_until_settled("n1", "pinned", 3);
    assert_eq!(nodes(&pinned), ["n4", "n4", "n4"]);
    n1.create_whoami("workers", &["--replicas", "4", "--constraint", "node.role!=manager"]);
    let workers = lab.wait_until_settled("n1", "workers", 4);
    assert_eq!(nodes(&workers), ["n4", "n4", "n5", "n5"]);

    n1.create_whoami("ssd", &["--replicas", "2", "--constraint", "node.labels.disk==ssd"]);
    let error = n1.wait_for_tasks("ssd", "the tasks say why they wait", |tasks| {
        let waits = |task: &TaskRow| task.state() == "Pending" && !task.error.is_empty();
        (tasks.len() == 2 && tasks.iter().all(waits)).then(|| tasks[0].error.clone())
    });
    let reason = "no suitable node (scheduling constraints not satisfied on 5 nodes)";
    assert!(error.contains(reason), "{error}");
    n1.skep(&["node", "update", "--label-add", "disk=ssd", "n2"]).ok();
    let found = lab.wait_until_settled("n1", "ssd", 2);
    assert_eq!(nodes(&found), ["n2", "n2"]);
    assert!(found.iter().all(|task| task.error.is_empty()), "{found:#?}");

    // A node that fits no more is left for one that does.
    n1.skep(&["node", "update", "--label-add", "disk=ssd", "n5"]).ok();
    n1.skep(&["node", "update", "--label-rm", "disk", "n2"]).ok();
    n1.wait_for_tasks("ssd", "both tasks are on n5", |tasks| {
        let running: Vec<_> = tasks.iter().filter(|task| task.is_running()).collect();
        (running.len() == 2 && running.iter().all(|task| task.node == "n5")).then_some(())
    });
    lab.wait_until_settled("n1", "ssd", 2);
    n1.skep(&["node", "update", "--label-rm", "disk", "n5"]).ok();
    remove(lab, "n1", &["pinned", "workers", "ssd"]);
}

fn preferences_and_strategies_order_nodes(lab: &Lab) {
    let n1 = lab.node("n1");
    for (node, zone) in [("n1", "a"), ("n2", "a"), ("n3", "a"), ("n4", "b")] {
        n1.skep(&["node", "update", "--label-add", &format!("zone={zone}"), node]).ok();
    }
    let over_zones = ["--replicas", "6", "--placement-pref", "spread=node.labels.zone"];
    n1.create_whoami("zoned", &over_zones);
    let zoned = lab.wait_until_settled("n1", "zoned", 6);
    let (in_first, others) = nodes(&zoned).into_iter().partition::<Vec<_>, _>(|node| *node < "n4");
    assert_eq!(others, ["n4", "n4", "n5", "n5"], "two in a zone, and one without a label is one");
    assert!(in_first.len() == 2 && in_first[0] != in_first[1], "on two nodes: {in_first:?}");

    n1.create_whoami("packed", &["--replicas", "3", "--placement-strategy", "binpack"]);
    let packed = lab.wait_until_settled("n1", "packed", 3);
    let fullest = nodes(&packed)[0];
    assert!(["n4", "n5"].contains(&fullest), "{packed:#?}");
    assert_eq!(nodes(&packed), [fullest; 3], "on one of the nodes that have two tasks");

    let command = ["service", "create", "--constraint", "node.zone==a", WHOAMI];
    let error = n1.skep(&command).err();
    assert!(error.contains("invalid constraint key node.zone: use node.id"), "{error}");
    for node in ["n1", "n2", "n3", "n4"] {
        n1.skep(&["node", "update", "--label-rm", "zone", node]).ok();
    }
    remove(lab, "n1", &["zoned", "packed"]);
}

fn reservations_that_fit_nowhere_say_why(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.create_whoami("large", &["--reserve-cpu", "4096"]);
    let error = n1.wait_for_tasks("large", "the task says why it waits", |tasks| {
        let waits = |task: &&TaskRow| task.state() == "Pending" && !task.error.is_empty();
        tasks.iter().find(waits).map(|task| task.error.clone())
    });
    assert!(error.contains("no suitable node (insufficient resources on 5 nodes)"), "{error}");
    n1.skep(&["service", "update", "--detach", "--reserve-cpu", "0.1", "large"]).ok();
    lab.wait_until_settled("n1", "large", 1);
    remove(lab, "n1", &["large"]);
}

fn availability(lab: &Lab, node: &str, availability: &str) {
    lab.node("n1").skep(&["node", "update", "--availability", availability, node]).ok();
}

fn drain_moves_tasks_and_pause_keeps_them(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.create_whoami("moved", &["--replicas", "5"]);
    let before = lab.wait_until_settled("n1", "moved", 5);
    assert_eq!(nodes(&before), NODES);
    availability(lab, "n2", "pause");
    availability(lab, "n3", "drain");
    n1.wait_for_tasks("moved", "the drained node is left", |tasks| {
        let running: Vec<_> = tasks.iter().filter(|task| task.is_running()).collect();
        (running.len() == 5 && running.iter().all(|task| task.node != "n3")).then_some(())
    });
    let drained = lab.wait_until_settled("n1", "moved", 5);
    let on = |tasks: &[TaskRow], node: &str| -> BTreeSet<String> {
        let there = tasks.iter().filter(|task| task.node == node);
        there.map(|task| task.id.clone()).collect()
    };
    let kept = ids(&before).intersection(&ids(&drained)).count();
    assert_eq!(kept, 4, "only the drained node's task was replaced: {before:#?}\n{drained:#?}");
    assert_eq!(on(&drained, "n2"), on(&before, "n2"), "a paused node keeps its task");

    n1.skep(&["service", "scale", "--detach", "moved=9"]).ok();
    let nine = lab.wait_until_settled("n1", "moved", 9);
    assert_eq!(on(&nine, "n2"), on(&before, "n2"), "a paused node gets no other");
    assert_eq!(on(&nine, "n3").len(), 0);
    availability(lab, "n2", "active");
    availability(lab, "n3", "active");
    n1.skep(&["service", "scale", "--detach", "moved=10"]).ok();
    let ten = lab.wait_until_settled("n1", "moved", 10);
    assert!(ids(&ten).is_superset(&ids(&nine)), "what runs is not moved back");
    assert_eq!(on(&ten, "n3").len(), 1, "the new one is where there is most room: {ten:#?}");
    remove(lab, "n1", &["moved"]);
}

/// Asks the one container of a service to exit; it answers on its own loopback.
fn exit(lab: &Lab, service: &str, code: u8) {
    let [whoami] = &lab.whoamis_of(service)[..] else { panic!("one container of {service}") };
    let url = format!("http://127.0.0.1:8080/exit/{code}");
    let report = whoami.requests(&[url], 1);
    report.assert_none_failed();
}

/// Waits until a container's port answers: a task without a health check runs before it listens.
fn wait_until_it_listens(lab: &Lab, service: &str) {
    wait_until(SETTLES_WITHIN, &format!("{service} listens"), || {
        let whoamis = lab.whoamis_of(service);
        let url = ["http://127.0.0.1:8080/".to_owned()];
        let answers = |whoami: &Whoami| whoami.requests(&url, 1).summary.ok == 1;
        let is_listening = !whoamis.is_empty() && whoamis.iter().all(answers);
        (is_listening.then_some(()), format!("{whoamis:#?}"))
    });
}

fn restart_policies_are_kept(lab: &Lab) {
    let n1 = lab.node("n1");
    let policies = ["any", "none", "on-failure"];
    for condition in policies {
        let flags = ["--restart-condition", condition, "--restart-delay", "1s"];
        n1.create_whoami(condition, &flags);
    }
    let before = policies.map(|name| lab.wait_until_settled("n1", name, 1).remove(0));
    policies.iter().for_each(|name| wait_until_it_listens(lab, name));

    exit(lab, "none", 3);
    exit(lab, "on-failure", 0);
    exit(lab, "any", 3);
    // Whether there is a successor is decided with the desired state, in one entry of the log.
    let ended = |service: &str, state: &str| {
        n1.wait_for_tasks(service, &format!("its task is {state}, and decided upon"), |tasks| {
            let is_it = |task: &&TaskRow| task.state() == state && task.desired_state == "Shutdown";
            tasks.iter().find(is_it).cloned()
        })
    };
    let none = ended("none", "Failed");
    assert_eq!(none.error.trim_matches('"'), "task: non-zero exit (3)");
    assert_eq!(none.id, before[1].id);
    assert_eq!(ended("on-failure", "Complete").id, before[2].id);
    assert_eq!(ended("any", "Failed").id, before[0].id);
    let successor = lab.wait_until_settled("n1", "any", 1).remove(0);
    assert_eq!((successor.slot, successor.id == before[0].id), (1, false));
    for service in ["none", "on-failure"] {
        let tasks = n1.tasks(service);
        assert_eq!(tasks.len(), 1, "no successor: {tasks:#?}");
        assert!(lab.whoamis_of(service).is_empty());
    }
    remove(lab, "n1", &policies);
    restarts_end_with_the_attempts(lab);
}

fn restarts_end_with_the_attempts(lab: &Lab) {
    let n1 = lab.node("n1");
    let limit = ["--restart-delay", "0s", "--restart-max-attempts", "2"];
    n1.create_whoami("limited", &limit);
    for n_tasks in 1..=3 {
        lab.wait_until_settled("n1", "limited", 1);
        wait_until_it_listens(lab, "limited");
        exit(lab, "limited", 4);
        n1.wait_for_tasks("limited", "one more failed, and is decided upon", |tasks| {
            let is_over =
                |task: &&TaskRow| task.state() == "Failed" && task.desired_state == "Shutdown";
            (tasks.iter().filter(is_over).count() == n_tasks).then_some(())
        });
    }
    let tasks = n1.tasks("limited");
    assert_eq!(tasks.len(), 3, "the first one and two more: {tasks:#?}");
    assert!(lab.whoamis_of("limited").is_empty());
    remove(lab, "n1", &["limited"]);
}

fn logs_come_from_all_nodes(lab: &Lab) {
    let n1 = lab.node("n1");
    n1.create_whoami("talk", &["--replicas", "5", "--update-monitor", "100ms"]);
    let before = lab.wait_until_settled("n1", "talk", 5);
    assert_eq!(nodes(&before), NODES);
    let prefix = |task: &TaskRow| format!("{}.{}@{}", task.name, &task.id[..12], task.node);
    let has_line = |lines: &[String], task: &TaskRow, text: &str| {
        let is_it = |line: &String| line.starts_with(&prefix(task)) && line.ends_with(text);
        lines.iter().filter(|line| is_it(line)).count() == 1
    };
    let listening = "| listening on port 8080";
    for via in ["n1", "n2"] {
        wait_until(SETTLES_WITHIN, &format!("the logs of all nodes through {via}"), || {
            let output = lab.node(via).skep(&["service", "logs", "talk"]).ok();
            let lines: Vec<String> = output.stdout.lines().map(str::to_owned).collect();
            let is_whole =
                lines.len() == 5 && before.iter().all(|t| has_line(&lines, t, listening));
            (is_whole.then_some(()), format!("{before:#?}\n{}", output.stdout))
        });
    }

    let follower = lab.start_skep("n3", &["service", "logs", "--follow", "talk"]);
    for task in &before {
        follower.wait_for_line(SETTLES_WITHIN, "what was said before", |line| {
            line.starts_with(&prefix(task)) && line.ends_with(listening)
        });
    }
    n1.skep(&["service", "update", "--detach", "--force", "talk"]).ok();
    n1.wait_for_tasks("talk", "all tasks are new", |tasks| {
        let running: Vec<_> = tasks.iter().filter(|task| task.is_running()).cloned().collect();
        (running.len() == 5 && ids(&running).is_disjoint(&ids(&before))).then_some(())
    });
    let after = lab.wait_until_settled("n1", "talk", 5);
    for task in &before {
        follower.wait_for_line(SETTLES_WITHIN, "an old task's last words", |line| {
            line.starts_with(&prefix(task)) && line.ends_with("exiting with 0 requests unanswered")
        });
    }
    for task in &after {
        follower.wait_for_line(SETTLES_WITHIN, "a new task's first words", |line| {
            line.starts_with(&prefix(task)) && line.ends_with(listening)
        });
    }
    let lines = follower.lines();
    let all = before.iter().chain(&after);
    assert!(all.clone().all(|task| has_line(&lines, task, listening)), "once each: {lines:#?}");
    drop(follower);
    let one = n1.skep(&["service", "logs", "--raw", &after[0].id]).ok();
    assert_eq!(one.text(), "listening on port 8080", "the logs of one task");
    remove(lab, "n1", &["talk"]);
}

/// A stack of three services, one of them with a port.
fn stack(round: u32, replicas: u32) -> String {
    let service = |name: &str, more: &str, round: u32, replicas: u32| {
        format!(
            "  {name}:\n    image: {WHOAMI}\n{more}    environment:\n      \
             SERVICE_NAME: '{{{{.Service.Name}}}}'\n      ROUND: '{round}'\n    \
             deploy:\n      replicas: {replicas}\n      \
             update_config: {{parallelism: 0, monitor: 100ms}}\n"
        )
    };
    let port = "    ports: ['8090:8080']\n";
    format!(
        "services:\n{}{}{}",
        service("web", port, round, 3),
        service("worker", "", 1, replicas),
        service("cron", "", 1, 1),
    )
}

const STACK_SERVICES: [&str; 3] = ["shop_web", "shop_worker", "shop_cron"];

fn write_stack(text: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stack.yml");
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap().to_owned();
    (dir, file)
}

fn a_second_deploy_changes_what_differs(lab: &Lab) {
    let n1 = lab.node("n1");
    let deploy = |text: &str| {
        let (_dir, file) = write_stack(text);
        n1.skep(&["stack", "deploy", "--compose-file", &file, "shop"]).ok()
    };
    let settled = |counts: [usize; 3]| {
        let names = STACK_SERVICES.into_iter().zip(counts);
        let tasks = names.map(|(name, n)| (name, lab.wait_until_settled("n1", name, n)));
        tasks.collect::<BTreeMap<_, _>>()
    };
    deploy(&stack(1, 2));
    let first = settled([3, 2, 1]);
    let again = deploy(&stack(1, 2));
    assert_eq!(again.stdout.matches("Unchanged service").count(), 3, "{again}");
    assert_eq!(settled([3, 2, 1]), first, "nothing is touched");

    deploy(&stack(2, 4));
    n1.wait_for_tasks("shop_web", "all tasks are new", |tasks| {
        let running: Vec<_> = tasks.iter().filter(|task| task.is_running()).cloned().collect();
        let is_new = ids(&running).is_disjoint(&ids(&first["shop_web"]));
        (running.len() == 3 && is_new).then_some(())
    });
    let second = settled([3, 4, 1]);
    assert!(ids(&second["shop_worker"]).is_superset(&ids(&first["shop_worker"])), "scaled only");
    assert_eq!(ids(&second["shop_cron"]), ids(&first["shop_cron"]), "untouched");

    let rows = n1.skep(&["stack", "services", "--format", "json", "shop"]).ok().json_lines();
    let counts: BTreeMap<_, _> = rows
        .iter()
        .map(|row| (row["Name"].as_str().unwrap(), row["Replicas"].as_str().unwrap()))
        .collect();
    let expect = [("shop_cron", "1/1"), ("shop_web", "3/3"), ("shop_worker", "4/4")];
    assert_eq!(counts, expect.into());
    let running = ["stack", "ps", "--filter", "desired-state=running", "-q", "--no-trunc", "shop"];
    let listed: BTreeSet<String> =
        n1.skep(&running).ok().stdout.lines().map(str::to_owned).collect();
    assert_eq!(listed, second.values().flat_map(|tasks| ids(tasks)).collect());

    n1.skep(&["stack", "rm", "shop"]).ok();
    wait_until_gone(lab, "n1", &STACK_SERVICES);
    wait_until(SETTLES_WITHIN, "the stack is gone", || {
        let stacks = n1.skep(&["stack", "ls", "--format", "{{.Name}}"]).ok();
        (stacks.text().is_empty().then_some(()), stacks.stdout)
    });
    // A deploy right behind: moby#29293.
    deploy(&stack(1, 1));
    settled([3, 1, 1]);
    n1.skep(&["stack", "rm", "shop"]).ok();
    wait_until_gone(lab, "n1", &STACK_SERVICES);
}

fn a_cut_off_node_runs_nothing_twice(lab: &Lab) {
    lab.node("n1").create_whoami("apart", &["--replicas", "10"]);
    let before = lab.wait_until_settled("n1", "apart", 10);
    let on_n5 = |lab: &Lab| lab.whoamis_of("apart").into_iter().filter(|p| p.node == "n5").count();
    assert_eq!(on_n5(lab), 2);
    lab.cut(&["n5"]);
    lab.wait_for_node("n1", "n5", "Down");
    lab.node("n1").wait_for_tasks("apart", "ten tasks run on the other nodes", |tasks| {
        let running = tasks.iter().filter(|task| task.is_running() && task.node != "n5");
        (running.count() == 10).then_some(())
    });
    assert_eq!(on_n5(lab), 2, "what runs on a node that is cut off goes on");
    let kept: Vec<TaskRow> = before.into_iter().filter(|task| task.node != "n5").collect();
    lab.heal(&["n5"]);
    lab.wait_for_node("n1", "n5", "Ready");
    let after = lab.wait_until_settled("n1", "apart", 10);
    assert_eq!(on_n5(lab), 0, "the old tasks stopped when the node was back");
    assert!(ids(&after).is_superset(&ids(&kept)), "no other task was touched");
    remove(lab, "n1", &["apart"]);
}

fn a_dead_node_is_replaced(lab: &Lab) {
    lab.node("n1").create_whoami("lost", &["--replicas", "10"]);
    let before = lab.wait_until_settled("n1", "lost", 10);
    lab.kill(&["n5"]);
    assert_replaced(lab, "lost", &before, &["n5"]);
    // It is a node as before: new tasks go where there are fewest.
    lab.node("n1").skep(&["service", "scale", "--detach", "lost=12"]).ok();
    let more = lab.wait_until_settled("n1", "lost", 12);
    assert_eq!(more.iter().filter(|task| task.node == "n5").count(), 2, "{more:#?}");
    remove(lab, "n1", &["lost"]);
}

fn a_dead_daemon_is_replaced(lab: &Lab) {
    lab.node("n1").create_whoami("orphan", &["--replicas", "10"]);
    let before = lab.wait_until_settled("n1", "orphan", 10);
    lab.kill_daemon(&["n4"]);
    lab.wait_for_node("n1", "n4", "Down");
    let left = lab.whoamis_of("orphan").into_iter().filter(|whoami| whoami.node == "n4");
    assert_eq!(left.count(), 2, "containers survive their daemon");
    assert_replaced(lab, "orphan", &before, &["n4"]);
    remove(lab, "n1", &["orphan"]);
}

/// Two of five at once: the leader first doubts itself, and then believes it.
fn two_dead_nodes_are_replaced(lab: &Lab) {
    lab.node("n1").create_whoami("both", &["--replicas", "10"]);
    let before = lab.wait_until_settled("n1", "both", 10);
    lab.kill(&["n4", "n5"]);
    assert_replaced(lab, "both", &before, &["n4", "n5"]);
    remove(lab, "n1", &["both"]);
}

/// Nodes are away: all of a service runs on the others, and still does, once, when they are back.
#[track_caller]
fn assert_replaced(lab: &Lab, service: &str, before: &[TaskRow], dead: &[&str]) {
    let is_living = |task: &TaskRow| !dead.contains(&&*task.node);
    for node in dead {
        lab.wait_for_node("n1", node, "Down");
    }
    lab.node("n1").wait_for_tasks(service, "all run on the other nodes", |tasks| {
        let mut running = tasks.iter().filter(|task| task.is_running());
        (running.clone().count() == before.len() && running.all(is_living)).then_some(())
    });
    lab.start_nodes(dead);
    for node in dead {
        lab.wait_for_node("n1", node, "Ready");
    }
    let after = lab.wait_until_settled("n1", service, before.len());
    assert!(after.iter().all(is_living), "nothing is moved back: {after:#?}");
    let kept: BTreeSet<String> =
        before.iter().filter(|task| is_living(task)).map(|task| task.id.clone()).collect();
    assert!(ids(&after).is_superset(&kept), "no other is touched: {before:#?}\n{after:#?}");
}

/// The leader and another manager.
fn leader_and_follower(lab: &Lab) -> (&'static str, &'static str) {
    let managers = ["n1", "n2", "n3"];
    let leader = wait_until(SETTLES_WITHIN, "there is a leader", || {
        let output = lab.node("n1").skep(&["node", "ls", "--format", "json"]);
        let rows = if output.status.success() { output.json_lines() } else { Vec::new() };
        let leader = rows.iter().find(|row| row["ManagerStatus"] == "Leader");
        let name = leader.and_then(|row| managers.into_iter().find(|n| row["Hostname"] == *n));
        (name, output.to_string())
    });
    let follower = managers.into_iter().find(|name| *name != leader).unwrap();
    (leader, follower)
}

fn a_deploy_survives_its_leader(lab: &Lab) {
    let (leader, via) = leader_and_follower(lab);
    let (_dir, file) = write_stack(&stack(1, 9));
    let args = ["stack", "deploy", "--detach=false", "--compose-file", &file, "shop"];
    let deploy = lab.start_skep(via, &args);
    lab.node(via).wait_for_tasks("shop_worker", "there are tasks", |tasks| {
        tasks.iter().any(|task| !task.node.is_empty()).then_some(())
    });
    lab.kill(&[leader]);
    let counts = STACK_SERVICES.into_iter().zip([3, 9, 1]);
    for (name, n_tasks) in counts.clone() {
        // What the dead leader ran is listed as running until it is seen down.
        lab.node(via).wait_for_tasks(name, "all run on living nodes", |tasks| {
            let running: Vec<_> = tasks.iter().filter(|task| task.is_running()).collect();
            let is_left = running.iter().all(|task| task.node != leader);
            (running.len() == n_tasks && is_left).then_some(())
        });
    }
    let (status, printed) = deploy.finish(Duration::from_secs(120));
    assert!(status.success(), "the client of the deploy: {status}\n{printed}");
    lab.start_nodes(&[leader]);
    lab.wait_for_node(via, leader, "Ready");
    for (name, n_tasks) in counts {
        lab.wait_until_settled(via, name, n_tasks);
    }
    lab.node(via).skep(&["stack", "rm", "shop"]).ok();
    wait_until_gone(lab, via, &STACK_SERVICES);
    // The one that was away knows what the others know.
    wait_until_gone(lab, leader, &STACK_SERVICES);
}
