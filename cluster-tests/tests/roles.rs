//! Nodes that become managers, and managers that become workers, while what they run goes on.

use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, SETTLES_WITHIN, is_root_or_skip, wait_until,
};

/// `MANAGER STATUS` of a node, as `via` shows it: empty for a worker.
#[track_caller]
fn wait_for_role(lab: &Lab, via: &str, node: &str, is_wanted: impl Fn(&str) -> bool) {
    wait_until(SETTLES_WITHIN, &format!("{node} has its role"), || {
        let output =
            lab.node(via).skep(&["node", "ls", "--format", "{{.Hostname}}={{.ManagerStatus}}"]);
        let line = output.stdout.lines().find_map(|line| line.strip_prefix(&format!("{node}=")));
        let is_so = line.is_some_and(&is_wanted);
        (is_so.then_some(()), output.to_string())
    });
}

/// Waits until the node's own daemon plays the role.
#[track_caller]
fn wait_until_plays(lab: &Lab, node: &str, is_manager: bool) {
    wait_until(SETTLES_WITHIN, &format!("{node} plays its role"), || {
        let format = "{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}}";
        let output = lab.node(node).skep(&["info", "--format", format]);
        let is_so = output.stdout.trim() == format!("active {is_manager}");
        (is_so.then_some(()), output.to_string())
    });
}

fn is_manager(status: &str) -> bool {
    !status.is_empty()
}

#[test]
fn nodes_change_their_role_and_their_containers_go_on() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").create_whoami("web", &["--publish", "8080:8080", "--replicas", "3"]);
    lab.wait_until_settled("n1", "web", 3);
    let containers = || ["n1", "n2", "n3"].map(|node| lab.containers(node));
    let before = containers();
    let url = format!("http://{}:8080/", lab.node("n3").address());
    let load = lab.load("client", &LoadOptions::to([url]));

    let last = lab.node("n1").skep(&["node", "demote", "n1"]).err();
    assert!(last.contains("last manager of the swarm"), "{last}");

    let promoted = lab.node("n1").skep(&["node", "promote", "n2"]).ok();
    assert_eq!(promoted.text(), "Node n2 promoted to a manager in the swarm.");
    wait_for_role(&lab, "n1", "n2", is_manager);
    wait_until_plays(&lab, "n2", true);
    lab.wait_for_node("n2", "n2", "Ready");

    // The leader of two transfers its leadership, and goes.
    let demoted = lab.node("n2").skep(&["node", "demote", "n1"]).ok();
    assert_eq!(demoted.text(), "Manager n1 demoted in the swarm.");
    wait_for_role(&lab, "n2", "n1", str::is_empty);
    wait_until_plays(&lab, "n1", false);
    lab.wait_for_node("n2", "n1", "Ready");
    let refused = lab.node("n1").skep(&["node", "ls"]).err();
    assert!(refused.contains("not a swarm manager"), "{refused}");
    assert!(!lab.data_dir("n1").join("raft").exists());

    // Another promotion is another member.
    lab.node("n2").skep(&["node", "update", "--role", "manager", "n1"]).ok();
    wait_until_plays(&lab, "n1", true);
    wait_for_role(&lab, "n1", "n1", is_manager);

    load.wait_for_more(100, SETTLES_WITHIN);
    load.stop().assert_none_failed();
    lab.wait_until_settled("n2", "web", 3);
    assert_eq!(containers(), before, "no container was touched");
    lab.down();
}

#[test]
fn a_manager_leaves_the_others_first_and_stays_where_they_need_it() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() });
    let still = lab.node("n1").skep(&["node", "rm", "n2"]).err();
    assert!(still.contains("must be demoted to worker before removal"), "{still}");
    lab.kill_daemon(&["n3"]);
    let address = lab.node("n3").address().to_string();
    for refused in [
        lab.node("n1").skep(&["node", "demote", "n2"]).err(),
        lab.node("n2").skep(&["swarm", "leave"]).err(),
    ] {
        assert!(refused.contains("lose its quorum") && refused.contains(&address), "{refused}");
    }
    // The one that is down is not needed.
    lab.node("n1").skep(&["node", "demote", "n3"]).ok();
    wait_for_role(&lab, "n1", "n3", str::is_empty);
    lab.start_nodes(&["n3"]);
    wait_until_plays(&lab, "n3", false);

    // Two are left, and one of them goes without force: the other leads alone.
    lab.node("n1").skep(&["swarm", "leave"]).ok();
    lab.node("n2").skep(&["node", "update", "--label-add", "a=1", "n2"]).ok();
    wait_for_role(&lab, "n2", "n1", str::is_empty);
    let last = lab.node("n2").skep(&["swarm", "leave"]).err();
    assert!(last.contains("last manager") && last.contains("--force"), "{last}");
    lab.down();
}

/// The Raft id that a node's daemon has written down.
#[track_caller]
fn raft_id(lab: &Lab, node: &str) -> u64 {
    let record = std::fs::read(lab.data_dir(node).join("node.json")).expect("a member's record");
    let record: serde_json::Value = serde_json::from_slice(&record).expect("a record is JSON");
    record["RaftId"].as_u64().expect("a manager has a Raft id")
}

#[test]
fn a_manager_that_missed_its_demotion_is_a_voter_again_once_it_is_promoted() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() });
    let n1 = lab.node("n1");
    assert_eq!(lab.wait_for_leader("n1"), "n1", "the founder leads on");
    let before = raft_id(&lab, "n3");

    // Both while its session is not known to have ended: only a node that is ready is promoted.
    lab.cut(&["n3"]);
    n1.skep(&["node", "demote", "n3"]).ok();
    wait_for_role(&lab, "n1", "n3", str::is_empty);
    n1.skep(&["node", "promote", "n3"]).ok();
    n1.skep(&["node", "update", "--label-add", "written=meanwhile", "n3"]).ok();
    let believes = lab.node("n3").skep(&["info", "--format", "{{.Swarm.ControlAvailable}}"]).ok();
    assert_eq!((believes.text(), raft_id(&lab, "n3")), ("true", before));

    lab.heal(&["n3"]);
    wait_for_role(&lab, "n1", "n3", |status| status == "Reachable");
    assert_ne!(raft_id(&lab, "n3"), before, "a Raft id is never used again");
    wait_until_plays(&lab, "n3", true);
    lab.wait_for_node("n3", "n3", "Ready");
    lab.node("n3").skep(&["node", "update", "--label-add", "through=n3", "n1"]).ok();
    lab.wait_until_alike("n1", 3);

    // It counts as any other: with it, two of three are a majority.
    lab.kill_daemon(&["n2"]);
    n1.skep(&["node", "update", "--label-add", "with=n3", "n3"]).ok();
    lab.start_nodes(&["n2"]);
    lab.wait_until_alike("n1", 3);
    lab.down();
}
