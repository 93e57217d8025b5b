//! The swarm's settings, changed while it runs.

use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, is_root_or_skip, wait_until};

#[test]
fn settings_take_effect_while_the_swarm_runs() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, ..LabOptions::default() });
    let n1 = lab.node("n1");
    let said =
        n1.skep(&["swarm", "update", "--snapshot-interval", "10", "--max-snapshots", "1"]).ok();
    assert_eq!(said.text(), "Swarm updated.");
    let refused = n1.skep(&["swarm", "update", "--cert-expiry", "30m"]).err();
    assert!(refused.contains("minimum certificate expiry time must be 1h0m0s"), "{refused}");
    let refused = n1.skep(&["swarm", "update", "--dispatcher-heartbeat", "50ms"]).err();
    assert!(refused.contains("from 200ms to 1m0s"), "{refused}");

    // Nodes hear of another period with the answer to a heartbeat, and go on being there.
    for period in ["4s", "500ms"] {
        n1.skep(&["swarm", "update", "--dispatcher-heartbeat", period]).ok();
        let told = format!("told={period}");
        for node in ["n1", "n2"] {
            wait_until(SETTLES_WITHIN, &format!("{node} is told {period}"), || {
                let log = lab.node(node).log();
                (log.contains(&told).then_some(()), log)
            });
        }
    }
    let ready = n1.skep(&["node", "ls", "--format", "{{.Status}}"]).ok();
    assert_eq!(ready.text(), "Ready\nReady");
    let log = n1.log();
    assert!(!log.contains("state=down"), "nobody was taken for dead:\n{log}");
    lab.kill(&["n2"]);
    lab.wait_for_node("n1", "n2", "Down");

    // One task beside the running one is kept, instead of five.
    lab.import_whoami();
    n1.skep(&["swarm", "update", "--task-history-limit", "1"]).ok();
    n1.create_whoami("web", &[]);
    for round in ["1", "2", "3"] {
        n1.skep(&["service", "update", "--env-add", &format!("ROUND={round}"), "web"]).ok();
    }
    wait_until(SETTLES_WITHIN, "the history is short", || {
        let output = n1.skep(&["service", "ps", "web", "--format", "{{.ID}}"]);
        ((output.text().lines().count() == 2).then_some(()), output.to_string())
    });
    wait_until(SETTLES_WITHIN, "an older snapshot is kept", || {
        let files = n1.exec(&["ls", "/var/lib/skep/raft"]);
        let n_old = files.stdout.matches("snapshot.old-").count();
        ((n_old == 1).then_some(()), files.to_string())
    });
}
