//! In a swarm or out of it: clients that go away in the middle, and machines that cannot take part any more.

use std::fs;

use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, is_root_or_skip, wait_until};

/// What `skep info` says of a node's part in the swarm: a word, and why.
fn state(lab: &Lab, node: &str) -> String {
    let format = "{{.Swarm.LocalNodeState}} {{.Swarm.Error}}";
    let output = lab.node(node).skep(&["info", "--format", format]).ok();
    output.text().trim().to_owned()
}

#[track_caller]
fn check_error(lab: &Lab, node: &str, words: &[&str]) {
    let state = state(lab, node);
    let refused = lab.node(node).skep(&["node", "ls"]).err();
    let log = lab.node(node).log();
    assert!(state.starts_with("error "), "{state}");
    for word in words.iter().chain(&["`skep swarm leave --force`"]) {
        assert!(state.contains(word), "{word:?} in {state}");
        assert!(refused.contains(word), "{word:?} in {refused}");
        let is_told = |line: &str| line.contains("ERROR") && line.contains(word);
        assert!(log.lines().any(is_told), "{word:?} in\n{log}");
    }
}

#[track_caller]
fn wait_until_active(lab: &Lab, node: &str) {
    wait_until(SETTLES_WITHIN, &format!("{node} is in its swarm again"), || {
        let state = state(lab, node);
        ((state == "active").then_some(()), state)
    });
    lab.wait_for_node("n1", node, "Ready");
}

#[track_caller]
fn join_command(lab: &Lab) -> [String; 5] {
    let token = lab.node("n1").skep(&["swarm", "join-token", "--quiet", "worker"]).ok();
    let address = format!("{}:2377", lab.node("n1").address());
    ["swarm", "join", "--token", token.text(), &address].map(str::to_owned)
}

#[test]
fn a_join_goes_on_when_its_client_goes_away() {
    if !is_root_or_skip() {
        return;
    }
    let lab =
        Lab::start(LabOptions { managers: 2, workers: 0, swarm: false, ..LabOptions::default() });
    lab.node("n1").skep(&["swarm", "init"]).ok();
    let command = join_command(&lab);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();

    // A manager that stands still holds the join up in its middle.
    lab.node("n1").signal_daemon("STOP");
    let client = lab.start_skep("n2", &command);
    wait_until(SETTLES_WITHIN, "n2 asks n1", || {
        let sockets = lab.node("n2").exec(&["ss", "-Htn", "state", "established"]);
        let asks = sockets.stdout.contains(":2377");
        (asks.then_some(()), sockets.to_string())
    });
    drop(client);
    lab.node("n1").signal_daemon("CONT");
    wait_until_active(&lab, "n2");
    lab.down();
}

#[test]
fn a_machine_whose_data_is_damaged_can_still_leave() {
    const NODE: &str = "n2";
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    let here = format!("node.hostname=={NODE}");
    lab.node("n1").create_whoami("web", &["--publish", "8080:8080", "--constraint", &here]);
    lab.wait_until_settled("n1", "web", 1);
    let containers = lab.containers(NODE);
    let rules = || lab.node(NODE).exec(&["nft", "list", "tables"]).ok().stdout;
    let links = || lab.node(NODE).exec(&["ip", "-o", "link"]).ok().stdout;
    assert!(rules().contains("skep-mesh") && links().contains("skep-ing"));

    lab.kill_daemon(&[NODE]);
    let record = lab.data_dir(NODE).join("node.json");
    fs::write(&record, "{").expect("a test as root may write there");
    lab.start_nodes(&[NODE]);
    check_error(&lab, NODE, &["node.json", "damaged", "restart"]);
    assert_eq!(lab.containers(NODE), containers, "until somebody decides, they run");
    let leave = lab.node(NODE).skep(&["swarm", "leave"]).err();
    assert!(leave.contains("--force"), "{leave}");

    lab.node(NODE).skep(&["swarm", "leave", "--force"]).ok();
    assert_eq!(state(&lab, NODE), "inactive");
    assert_eq!(lab.containers(NODE).len(), 0);
    assert!(!rules().contains("skep-mesh"), "{}", rules());
    assert!(!links().contains("skep-"), "{}", links());
    assert!(!record.exists());

    let command = join_command(&lab);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    lab.node(NODE).skep(&command).ok();
    wait_until(SETTLES_WITHIN, "the new node runs the task", || {
        let containers = lab.containers(NODE);
        ((containers.len() == 1).then_some(()), format!("{containers:?}"))
    });
    assert!(state(&lab, NODE).starts_with("active"));
    lab.down();
}

#[test]
fn what_goes_away_by_itself_is_waited_for() {
    const NODE: &str = "n2";
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, ..LabOptions::default() });
    let node = lab.node(NODE);
    let address = node.address().to_string();
    let ip = |verb: &str| {
        node.exec(&["ip", "address", verb, &format!("{address}/24"), "dev", "eth0"]).ok();
    };
    lab.kill_daemon(&[NODE]);
    ip("del");
    lab.start_nodes(&[NODE]);
    check_error(&lab, NODE, &[&address, "tried again"]);
    ip("add");
    wait_until_active(&lab, NODE);

    lab.kill_daemon(&[NODE]);
    let other = "busybox httpd -f -p 2377 -h / >/dev/null 2>&1 & echo $!";
    let other = node.exec(&["sh", "-c", other]).ok();
    wait_until(SETTLES_WITHIN, "the other program has the port", || {
        let sockets = node.exec(&["ss", "-Htnl"]);
        (sockets.stdout.contains(":2377").then_some(()), sockets.to_string())
    });
    lab.start_nodes(&[NODE]);
    check_error(&lab, NODE, &["2377", "another program", "tried again"]);
    node.exec(&["kill", other.text()]).ok();
    wait_until_active(&lab, NODE);

    // A daemon that cannot serve at all ends, and so does the command that started it, in failure.
    lab.kill_daemon(&[NODE]);
    let images = lab.data_dir(NODE).join("images");
    let away = lab.data_dir(NODE).join("away");
    fs::rename(&images, &away).expect("images are a directory");
    fs::write(&images, "no directory").expect("a test as root may write there");
    let failed = lab.command(&["start", NODE]).err();
    assert!(failed.contains("exited with code 1") && failed.contains("images"), "{failed}");
    fs::remove_file(&images).expect("it was just written");
    fs::rename(&away, &images).expect("it was just renamed");
    lab.start_nodes(&[NODE]);
    wait_until_active(&lab, NODE);
    lab.down();
}
