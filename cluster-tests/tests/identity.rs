//! Who may join, and who may talk: tokens, certificates of another swarm, and workers.
//!
//! Two swarms live on one network here, so that nothing but their identities keeps them apart. Which
//! caller may use which method is a table of its own, tested where it stands.

use skep_cluster_tests::{CERTIFICATES, Caller, Lab, LabOptions, Message, call, is_root_or_skip};

const NO_MANAGER: &str = "Error response from daemon: This node is not a swarm manager. Worker \
                          nodes can't be used to view or modify cluster state. Please run this \
                          command on a manager node.\n";

/// n1 and n2 each found a swarm; the other nodes belong to none.
#[track_caller]
fn two_swarms() -> Lab {
    let lab =
        Lab::start(LabOptions { managers: 4, workers: 0, swarm: false, ..LabOptions::default() });
    lab.node("n1").skep(&["swarm", "init"]).ok();
    lab.node("n2").skep(&["swarm", "init"]).ok();
    lab
}

#[track_caller]
fn token(lab: &Lab, node: &str, role: &str) -> String {
    let output = lab.node(node).skep(&["swarm", "join-token", "--quiet", role]).ok();
    output.text().to_owned()
}

fn join(lab: &Lab, node: &str, token: &str, to: &str) -> skep_cluster_tests::Output {
    let address = format!("{}:2377", lab.node(to).address());
    lab.node(node).skep(&["swarm", "join", "--token", token, &address])
}

#[track_caller]
fn check_refused(output: skep_cluster_tests::Output, words: &[&str]) {
    let error = output.err();
    assert_eq!(error.trim_end().lines().count(), 1, "one sentence: {error}");
    for word in words {
        assert!(error.contains(word), "{word:?} in {error}");
    }
}

/// The names of a swarm's nodes and their states.
#[track_caller]
fn nodes(lab: &Lab, via: &str) -> Vec<String> {
    let format = "{{.Hostname}} {{.Status}}";
    let output = lab.node(via).skep(&["node", "ls", "--format", format]).ok();
    output.stdout.lines().map(str::to_owned).collect()
}

/// The token with its last character changed.
fn mistyped(token: &str) -> String {
    let (start, last) = token.split_at(token.len() - 1);
    format!("{start}{}", if last == "0" { "1" } else { "0" })
}

#[test]
fn only_the_swarms_own_present_token_lets_a_node_in() {
    if !is_root_or_skip() {
        return;
    }
    let lab = two_swarms();
    let own = token(&lab, "n1", "worker");
    let foreign = token(&lab, "n2", "worker");

    check_refused(join(&lab, "n3", &foreign, "n1"), &["another swarm", "swarm join-token worker"]);
    check_refused(join(&lab, "n3", &mistyped(&own), "n1"), &["mistyped", "swarm join-token"]);
    check_refused(join(&lab, "n3", &own[..own.len() - 3], "n1"), &["invalid join token", "SWMTKN"]);
    check_refused(join(&lab, "n3", "nonsense", "n1"), &["invalid join token", "SWMTKN"]);
    check_refused(join(&lab, "n3", &own, "n4"), &[&lab.node("n4").address().to_string()]);
    check_refused(join(&lab, "n1", &foreign, "n2"), &["already part of a swarm"]);
    check_refused(lab.node("n1").skep(&["swarm", "init"]), &["already part of a swarm"]);
    assert_eq!(nodes(&lab, "n1"), ["n1 Ready"], "no attempt left anything");
    check_refused(lab.node("n3").skep(&["swarm", "leave"]), &["not part of a swarm"]);

    join(&lab, "n3", &own, "n1").ok();
    lab.wait_for_node("n1", "n3", "Ready");
    lab.node("n1").skep(&["swarm", "join-token", "--rotate", "worker"]).ok();
    let rotated = token(&lab, "n1", "worker");
    assert_ne!(rotated, own);
    check_refused(join(&lab, "n4", &own, "n1"), &["rotated", "swarm join-token"]);
    // Who is in stays in, over a restart as well.
    lab.kill_daemon(&["n3"]);
    lab.start_nodes(&["n3"]);
    lab.wait_for_node("n1", "n3", "Ready");
    join(&lab, "n4", &rotated, "n1").ok();
    lab.wait_for_node("n1", "n4", "Ready");

    lab.node("n3").skep(&["swarm", "leave"]).ok();
    lab.wait_for_node("n1", "n3", "Down");
    let error = lab.node("n3").skep(&["node", "ls"]).err();
    assert!(error.contains("swarm init") && error.contains("swarm join"), "{error}");
    join(&lab, "n3", &foreign, "n2").ok();
    lab.wait_for_node("n2", "n3", "Ready");
    assert_eq!(nodes(&lab, "n2"), ["n2 Ready", "n3 Ready"]);
    lab.down();
}

#[test]
fn a_certificate_counts_in_its_own_swarm_and_role_only() {
    const OK: &str = "0";
    const PERMISSION_DENIED: &str = "7";
    const UNAUTHENTICATED: &str = "16";
    if !is_root_or_skip() {
        return;
    }
    let lab = two_swarms();
    join(&lab, "n3", &token(&lab, "n1", "worker"), "n1").ok();
    join(&lab, "n4", &token(&lab, "n2", "manager"), "n2").ok();
    lab.wait_for_node("n1", "n3", "Ready");
    lab.wait_for_node("n2", "n4", "Ready");

    let check = |caller, method, message, expect: &str| {
        let answer = call(&lab, caller, "n1", method, message);
        let code = answer.map(|answer| answer.code);
        assert_eq!(code.as_deref(), Ok(expect), "{method} from {caller:?}");
    };
    let certified = |node| Caller { node, identity: Some(CERTIFICATES) };
    let anonymous = |node| Caller { node, identity: None };
    let (own, worker) = (certified("n1"), certified("n3"));
    check(own, "Control/Digest", Message::EMPTY, OK);
    check(anonymous("n4"), "Ca/Root", Message::EMPTY, OK);
    for method in ["Control/Digest", "Control/List", "Raft/Status", "Dispatcher/Heartbeat"] {
        check(anonymous("n3"), method, Message::NONE, UNAUTHENTICATED);
        // Managers of another swarm are no better than anybody, or not let in at all.
        for foreign in ["n2", "n4"] {
            let answer = call(&lab, certified(foreign), "n1", method, Message::NONE);
            let is_refused = answer.as_ref().ok().is_none_or(|it| it.code == UNAUTHENTICATED);
            assert!(is_refused, "{method} from {foreign}: {answer:?}");
        }
    }
    for method in ["Control/Digest", "Control/List", "Control/CreateService", "Raft/Status"] {
        check(worker, method, Message::NONE, PERMISSION_DENIED);
    }
    check(own, "Machine/Info", Message::NONE, PERMISSION_DENIED);

    let worker = lab.node("n3");
    for args in [
        &["node", "ls"][..],
        &["service", "ls"],
        &["service", "create", "--detach", "none:latest"],
        &["swarm", "join-token", "worker"],
        &["stack", "ls"],
    ] {
        assert_eq!(worker.skep(args).err(), NO_MANAGER, "{args:?}");
    }
    worker.skep(&["info"]).ok();
    let leave = lab.node("n1").skep(&["swarm", "leave"]);
    check_refused(leave, &["manager", "--force"]);
    assert_eq!(nodes(&lab, "n1"), ["n1 Ready", "n3 Ready"]);
    lab.down();
}
