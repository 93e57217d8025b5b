//! Managers that do not answer: who is shown as such, what is said without a majority, and what goes on all the same.

use std::time::Duration;

use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, Output, SETTLES_WITHIN, is_root_or_skip, wait_until,
};
use skep_runtime::clock;

/// A request that is refused in words does not take as long as one that hopes for a leader.
const REFUSED_WITHIN: Duration = Duration::from_secs(8);

/// `NAME MANAGER-STATUS TLS-STATUS` of each node, as `via` shows it.
fn parts(lab: &Lab, via: &str) -> Output {
    let format = "{{.Hostname}} {{.ManagerStatus}} {{.TLSStatus}}";
    lab.node(via).skep(&["node", "ls", "--format", format])
}

#[track_caller]
fn wait_for_parts(lab: &Lab, via: &str, expect: &[&str]) -> Output {
    wait_until(SETTLES_WITHIN, &format!("{via} shows {expect:?}"), || {
        let output = parts(lab, via);
        let is_so = output.stdout.lines().eq(expect.iter().copied());
        (is_so.then(|| output.clone()), output.to_string())
    })
}

/// Checks that a sentence names the missing, what goes on and the remedy.
#[track_caller]
fn check_words(lab: &Lab, text: &str, missing: &[&str]) {
    let needed = "2 of its 3 managers are needed and 1 answers";
    for word in [needed, "containers and published ports go on", "--force-new-cluster"] {
        assert!(text.contains(word), "{word:?} in {text}");
    }
    for node in missing {
        let named = format!("{node} ({}:2377) silent for ", lab.node(node).address());
        assert!(text.contains(&named), "{named:?} in {text}");
    }
}

#[track_caller]
fn wait_until_warned(lab: &Lab, via: &str, missing: &[&str]) {
    let output = wait_until(SETTLES_WITHIN, &format!("{via} says that it is alone"), || {
        let output = lab.node(via).skep(&["info"]).ok();
        let is_said = output.stderr.contains("WARNING: this manager hears of no leader");
        (is_said.then(|| output.clone()), output.to_string())
    });
    check_words(lab, &output.stderr, missing);
}

#[track_caller]
fn check_without_majority(lab: &Lab, via: &str, missing: &[&str]) {
    wait_until_warned(lab, via, missing);
    let begun = clock::monotonic();
    let label = ["node", "update", "--label-add", "a=1", via];
    let refused = lab.node(via).skep(&label).err();
    assert!(begun.elapsed() < REFUSED_WITHIN, "{:?}", begun.elapsed());
    check_words(lab, &refused, missing);
    for command in [&["service", "ls", "--format", "{{.Name}}"][..], &["service", "ps", "web"]] {
        let looked = lab.node(via).skep(command).ok();
        assert!(looked.stdout.contains("web"), "{looked}");
        assert!(looked.stderr.contains("what this manager last knew"), "{looked}");
        check_words(lab, &looked.stderr, missing);
    }
    let unknown = lab.node(via).skep(&["service", "inspect", "later"]).err();
    assert!(unknown.contains("not found; this is what this manager last knew"), "{unknown}");
    check_words(lab, &unknown, missing);
}

#[test]
fn a_lost_majority_is_said_in_words_and_what_is_known_is_shown() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    let on_worker = ["--constraint", "node.hostname==n4"];
    lab.node("n1").create_whoami("web", &[&["--publish", "8080:8080"], &on_worker[..]].concat());
    lab.wait_until_settled("n1", "web", 1);
    let load = lab.load("client", &LoadOptions::to([lab.url("n4", 8080)]));
    let leader = lab.wait_for_leader("n1");
    let [second, third] = match leader.as_str() {
        "n1" => ["n2", "n3"],
        "n2" => ["n1", "n3"],
        _ => ["n1", "n2"],
    };
    let shown = |words: [(&str, &str); 3]| {
        let mut lines: Vec<String> =
            words.iter().map(|(node, word)| format!("{node} {word} Ready")).collect();
        lines.push("n4  Ready".to_owned());
        lines.sort();
        lines
    };
    let wait = |via: &str, words: [(&str, &str); 3]| {
        let lines = shown(words);
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        wait_for_parts(&lab, via, &lines)
    };
    for via in ["n1", "n2", "n3"] {
        let all = [(&*leader, "Leader"), (second, "Reachable"), (third, "Reachable")];
        assert_eq!(wait(via, all).stderr, "");
    }
    // What counts is Raft: the machine of a manager whose daemon hangs answers, and so does its agent's node.
    lab.node(third).signal_daemon("STOP");
    for via in [&*leader, second] {
        wait(via, [(&*leader, "Leader"), (second, "Reachable"), (third, "Unreachable")]);
    }
    lab.node(third).signal_daemon("CONT");
    wait(second, [(&*leader, "Leader"), (second, "Reachable"), (third, "Reachable")]);

    lab.kill_daemon(&[&leader, third]);
    check_without_majority(&lab, second, &[&leader, third]);
    let alone = [(&*leader, "Unreachable"), (second, "Reachable"), (third, "Unreachable")];
    assert!(wait(second, alone).stderr.contains("WARNING"));
    load.wait_for_more(50, SETTLES_WITHIN);

    lab.start_nodes(&[&leader, third]);
    lab.wait_until_settled(second, "web", 1);
    wait_until(SETTLES_WITHIN, "nothing is said any more", || {
        let output = lab.node(second).skep(&["info"]).ok();
        (output.stderr.is_empty().then_some(()), output.to_string())
    });
    lab.node(second).skep(&["node", "update", "--label-add", "a=1", second]).ok();
    load.stop().assert_none_failed();
    lab.down();
}

#[test]
fn a_leader_in_the_minority_says_so_and_the_others_go_on() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    let on_workers = ["--constraint", "node.role==worker", "--replicas", "2"];
    lab.node("n1").create_whoami("web", &[&["--publish", "8080:8080"], &on_workers[..]].concat());
    lab.wait_until_settled("n1", "web", 2);
    let containers = || ["n4", "n5"].map(|node| lab.containers(node));
    let before = containers();
    let leader = lab.wait_for_leader("n1");
    let others: Vec<&str> = ["n1", "n2", "n3"].into_iter().filter(|node| *node != leader).collect();
    let urls = ["n4", "n5", others[0]].map(|node| lab.url(node, 8080));
    let load = lab.load("client", &LoadOptions::to(urls));

    lab.cut(&[&leader]);
    wait_until(SETTLES_WITHIN, "the others have a leader", || {
        let label = ["node", "update", "--label-add", "part=majority", others[0]];
        let output = lab.node(others[0]).skep(&label);
        (output.status.success().then_some(()), output.to_string())
    });
    check_without_majority(&lab, &leader, &others);
    lab.wait_for_node(others[0], &leader, "Down");
    lab.node(others[0]).skep(&["service", "scale", "--detach", "web=3"]).ok();
    lab.wait_until_settled(others[0], "web", 3);
    load.wait_for_more(50, SETTLES_WITHIN);

    lab.heal(&[&leader]);
    lab.wait_for_node(&leader, &leader, "Ready");
    lab.wait_until_alike(&leader, 3);
    let looked = lab.node(&leader).skep(&["service", "ps", "web"]).ok();
    assert_eq!(looked.stderr, "", "it knows all again");
    let label = "{{index .Spec.Labels \"part\"}}";
    let inspected = lab.node(&leader).skep(&["node", "inspect", "--format", label, others[0]]).ok();
    assert_eq!(inspected.text(), "majority");
    load.stop().assert_none_failed();
    for (now, before) in containers().iter().zip(&before) {
        let runs_on = |(task, pid): (&String, &i64)| now.get(task) == Some(pid);
        assert!(before.iter().all(runs_on), "{now:?} {before:?}");
    }
    lab.down();
}
