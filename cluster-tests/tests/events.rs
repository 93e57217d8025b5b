//! `skep events` across the end of a leader and of the daemon that tells them.

use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, WHOAMI, is_root_or_skip};

const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
/// What is followed: its lines do not differ between managers.
const SHOWN: [&str; 3] =
    ["--format", "{{.Version}} {{.Type}} {{.Action}} {{.Actor.ID}}", "--filter=service=web"];

#[test]
fn a_follower_misses_nothing_and_sees_nothing_twice() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() });
    lab.import_whoami();
    let leader = lab.wait_for_leader("n1");
    let via = MANAGERS.into_iter().find(|name| *name != leader).unwrap();
    let node = lab.node(via);
    let follower = lab.start_skep(via, &[&["events", "-f", "--since=1h"], &SHOWN[..]].concat());
    let wait_for = |what: &str, parts: &[&str]| {
        let is_it = |line: &str| parts.iter().all(|part| line.contains(part));
        follower.wait_for_line(SETTLES_WITHIN, what, is_it)
    };
    node.create_whoami("web", &["--replicas=3"]);
    wait_for("the service is told", &[" service create "]);
    let tasks = lab.wait_until_settled(via, "web", 3);
    for task in &tasks {
        for action in ["create", "assign", "start"] {
            wait_for("its life is told", &[&format!(" task {action} {}", task.id)]);
        }
    }
    lab.kill(&[&leader]);
    node.skep(&["service", "scale", "--detach", "web=5"]).ok();
    let of_dead = tasks.iter().find(|task| task.node == leader).unwrap();
    node.wait_for_tasks("web", "five run on the others", |tasks| {
        let others = tasks.iter().filter(|task| task.is_running() && task.node != leader);
        (others.count() == 5).then_some(())
    });
    lab.start_nodes(&[&leader]);
    lab.wait_until_settled(via, "web", 5);
    wait_for("its end is told", &[&format!(" task die {}", of_dead.id)]);

    // The follower goes on with the next daemon, which has the events from its log.
    lab.kill_daemon(&[via]);
    lab.start_nodes(&[via]);
    lab.wait_until_settled(via, "web", 5);
    node.skep(&["service", "rm", "web"]).ok();
    let removed = wait_for("the end is told", &[" service remove "]);

    let followed: Vec<String> = up_to(follower.lines(), &removed);
    for name in MANAGERS {
        let kept = lab.node(name).skep(&[&["events"], &SHOWN[..]].concat()).ok();
        let kept = up_to(kept.text().lines().map(str::to_owned).collect(), &removed);
        assert_eq!(kept, followed, "as {name} has it");
    }
    let version = |line: &String| line.split(' ').next().unwrap().parse::<u64>().unwrap();
    assert!(followed.is_sorted_by_key(version), "{followed:#?}");
    who_wrote_is_in_the_log(&lab, via);
    lab.down();
}

fn who_wrote_is_in_the_log(lab: &Lab, via: &str) {
    let refused = lab.node(via).skep(&["node", "rm", &lab.wait_for_leader(via)]).err();
    assert_ne!(refused, "");
    lab.node(via).skep(&["run", "--detach", "--name", "alone", WHOAMI]).ok();
    lab.node(via).skep(&["rm", "--force", "alone"]).ok();
    let log = lab.node(via).log();
    for parts in [
        ["method=\"CreateService\"", "object=\"service/web\"", "outcome=\"applied\""],
        ["method=\"RemoveService\"", "object=\"service/", "outcome=\"applied\""],
        ["method=\"RemoveNode\"", "object=\"node/", "outcome=\"refused\""],
    ] {
        let is_it = |line: &&str| {
            line.contains(" audit: caller=\"socket:uid=0,pid=")
                && parts.iter().all(|part| line.contains(part))
        };
        assert!(log.lines().any(|line| is_it(&line)), "{parts:?}\n{log}");
    }
    // What nodes ask of managers; the first manager is asked by those that join.
    let logs: String = MANAGERS.map(|name| lab.node(name).log()).concat();
    for parts in [
        ["caller=\"anonymous\" method=\"Issue\"", "object=\"node/"],
        ["caller=\"node:", "method=\"AddManager\""],
        ["caller=\"node:", "method=\"RunContainer\" object=\"container/alone\""],
        ["caller=\"node:", "method=\"RemoveContainer\" object=\"container/alone\""],
    ] {
        let is_it = |line: &str| {
            line.contains(" audit: ")
                && line.contains("outcome=\"applied\"")
                && parts.iter().all(|part| line.contains(part))
        };
        assert!(logs.lines().any(is_it), "{parts:?}\n{logs}");
    }
}

/// The lines until that one.
fn up_to(mut lines: Vec<String>, last: &str) -> Vec<String> {
    let end = lines.iter().position(|line| line == last).expect("it is told") + 1;
    lines.truncate(end);
    lines
}
