//! Nodes that are members no more: what their certificates are still good for, and what they are told.

use skep_cluster_tests::{
    CERTIFICATES, Caller, Lab, LabOptions, Message, SETTLES_WITHIN, call, is_root_or_skip,
    wait_until,
};

/// Where a test keeps the certificate of a node for later.
const KEPT: &str = "/var/lib/skep/kept";
const PERMISSION_DENIED: &str = "7";
const UNIMPLEMENTED_OR_ANSWERED: [&str; 4] = ["0", "3", "13", "14"];

#[track_caller]
fn keep_certificate(lab: &Lab, node: &str) {
    let copy = format!("cp {CERTIFICATES}.crt {KEPT}.crt && cp {CERTIFICATES}.key {KEPT}.key");
    lab.node(node).exec(&["sh", "-c", &copy]).ok();
}

/// Calls a manager with the certificate that was kept, and gives what it says.
#[track_caller]
fn ask(lab: &Lab, from: &str, to: &str, method: &str) -> (String, String) {
    let caller = Caller { node: from, identity: Some(KEPT) };
    let answer = call(lab, caller, to, method, Message::NONE);
    let answer = answer.unwrap_or_else(|error| panic!("{method} from {from} to {to}: {error}"));
    (answer.code, answer.message)
}

/// Waits until a node knows that it was removed, and checks what it says to all that it is asked.
#[track_caller]
fn wait_until_told(lab: &Lab, node: &str) {
    wait_until(SETTLES_WITHIN, &format!("{node} knows that it was removed"), || {
        let format = "{{.Swarm.LocalNodeState}} {{.Swarm.Error}}";
        let output = lab.node(node).skep(&["info", "--format", format]);
        let is_told = output.stdout.starts_with("error this node was removed from its swarm");
        (is_told.then_some(()), output.to_string())
    });
    for command in [&["node", "ls"][..], &["ps"], &["swarm", "join", "--token", "x", "y"]] {
        let refused = lab.node(node).skep(command).err();
        for word in ["was removed from its swarm", "`skep swarm leave`", "`skep swarm join`"] {
            assert!(refused.contains(word), "{word:?} in {refused}");
        }
    }
}

#[track_caller]
fn rejoin(lab: &Lab, node: &str, role: &str) {
    lab.node(node).skep(&["swarm", "leave"]).ok();
    let token = lab.node("n1").skep(&["swarm", "join-token", "--quiet", role]).ok();
    let address = format!("{}:2377", lab.node("n1").address());
    lab.node(node).skep(&["swarm", "join", "--token", token.text(), &address]).ok();
    lab.wait_for_node("n1", node, "Ready");
}

#[test]
fn a_removed_node_is_refused_by_every_manager_and_says_so() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    let there = "node.hostname==n4";
    lab.node("n1").create_whoami("web", &["--constraint", there]);
    wait_until(SETTLES_WITHIN, "n4 runs the task", || {
        let containers = lab.containers("n4");
        ((containers.len() == 1).then_some(()), format!("{containers:?}"))
    });
    for node in ["n3", "n4"] {
        keep_certificate(&lab, node);
    }
    let (code, _) = ask(&lab, "n3", "n1", "Raft/Status");
    assert!(UNIMPLEMENTED_OR_ANSWERED.contains(&code.as_str()), "a manager may ask: {code}");

    // A worker, while it runs.
    lab.node("n1").skep(&["node", "rm", "--force", "n4"]).ok();
    wait_until_told(&lab, "n4");
    wait_until(SETTLES_WITHIN, "its containers are stopped", || {
        let containers = lab.containers("n4");
        (containers.is_empty().then_some(()), format!("{containers:?}"))
    });
    // A manager that was dead, and comes back.
    lab.kill_daemon(&["n3"]);
    lab.wait_for_node("n1", "n3", "Down");
    lab.node("n1").skep(&["node", "rm", "--force", "n3"]).ok();
    lab.start_nodes(&["n3"]);
    wait_until_told(&lab, "n3");

    for (from, methods) in [
        ("n3", &["Control/List", "Raft/Vote", "Raft/Status", "Dispatcher/Heartbeat"][..]),
        ("n4", &["Dispatcher/Heartbeat", "Ca/Renew", "Containers/List"]),
    ] {
        for to in ["n1", "n2"] {
            for method in methods {
                let (code, message) = ask(&lab, from, to, method);
                assert_eq!(code, PERMISSION_DENIED, "{method} from {from} to {to}: {message}");
                assert!(message.contains("was removed from the swarm"), "{message}");
            }
        }
    }
    // Over a restart as well; and they come back as others.
    lab.kill_daemon(&["n4"]);
    lab.start_nodes(&["n4"]);
    wait_until_told(&lab, "n4");
    rejoin(&lab, "n4", "worker");
    rejoin(&lab, "n3", "manager");
    lab.wait_until_settled("n1", "web", 1);
    let (code, _) = ask(&lab, "n3", "n1", "Raft/Status");
    assert_eq!(code, PERMISSION_DENIED, "the certificate of before stays refused");
    lab.down();
}

#[test]
fn the_certificate_of_a_demoted_manager_is_that_of_a_worker() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() });
    keep_certificate(&lab, "n3");
    lab.node("n1").skep(&["node", "demote", "n3"]).ok();
    wait_until(SETTLES_WITHIN, "n3 is a worker", || {
        let output = lab.node("n3").skep(&["info", "--format", "{{.Swarm.ControlAvailable}}"]);
        ((output.stdout.trim() == "false").then_some(()), output.to_string())
    });
    for to in ["n1", "n2"] {
        for method in ["Control/List", "Control/CreateService"] {
            let (code, message) = ask(&lab, "n3", to, method);
            assert_eq!(code, PERMISSION_DENIED, "{method} to {to}: {message}");
            assert!(message.contains("not for a worker"), "{message}");
        }
        for method in ["Raft/Vote", "Raft/Status"] {
            // A manager that hears of no leader, as on a busy machine, goes by certificates.
            wait_until(SETTLES_WITHIN, &format!("{method} is refused by {to}"), || {
                let (code, message) = ask(&lab, "n3", to, method);
                let is_so = code == PERMISSION_DENIED && message.contains("not for a worker");
                (is_so.then_some(()), message)
            });
        }
    }
    lab.node("n1").skep(&["node", "promote", "n3"]).ok();
    wait_until(SETTLES_WITHIN, "n3 is a manager again", || {
        let output = lab.node("n3").skep(&["node", "ls"]);
        (output.status.success().then_some(()), output.to_string())
    });
    lab.down();
}
