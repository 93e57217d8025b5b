//! Managers that start locked, and the page that tells how to live with them.

use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, Node, Page, SETTLES_WITHIN, is_root_or_skip, wait_until,
};

const KEY_FILE: &str = "/var/lib/skep/certificates/swarm-node.key";
const LOCKED: &str = "Swarm is encrypted and needs to be unlocked before it can be used. Please use \"skep swarm unlock\" to unlock it.";

fn restart(lab: &Lab, node: &str) {
    lab.kill_daemon(&[node]);
    lab.start_nodes(&[node]);
}

#[track_caller]
fn wait_for_state(lab: &Lab, node: &str, state: &str) {
    wait_until(SETTLES_WITHIN, &format!("{node} is {state}"), || {
        let output = lab.node(node).skep(&["info", "--format", "{{.Swarm.LocalNodeState}}"]);
        ((output.stdout.trim() == state).then_some(()), output.to_string())
    });
}

fn unlock(node: Node<'_>, key: &str) -> skep_cluster_tests::Output {
    node.exec(&["sh", "-c", &format!("echo '{key}' | skep swarm unlock")])
}

#[track_caller]
fn wait_until_sealed(lab: &Lab, node: &str, is_sealed: bool) {
    wait_until(SETTLES_WITHIN, &format!("the key file of {node} is as asked"), || {
        let file = lab.node(node).exec(&["cat", KEY_FILE]);
        let is_so = file.stdout.contains("Sealed: ") == is_sealed
            && file.stdout.contains("BEGIN") != is_sealed
            && file.stdout.contains("Raft-Key: ") != is_sealed;
        (is_so.then_some(()), "its text is a secret".to_owned())
    });
}

#[track_caller]
fn version_of_lock(lab: &Lab, node: &str) -> String {
    let file = lab.node(node).exec(&["head", "-n1", KEY_FILE]).ok();
    file.text().trim_start_matches("Unlock-Key-Version: ").to_owned()
}

/// A change of the key reaches who is away when it is back, with the old key.
#[track_caller]
fn change_the_key_while_one_is_away(lab: &Lab, first: &str) {
    let n1 = lab.node("n1");
    lab.kill_daemon(&["n3"]);
    let second = n1.skep(&["swarm", "unlock-key", "--rotate", "-q"]).ok().text().to_owned();
    assert_ne!(first, second);
    lab.start_nodes(&["n3"]);
    wait_for_state(lab, "n3", "locked");
    let early = unlock(lab.node("n3"), &second).err();
    assert!(early.contains("that is the one from before"), "{early}");
    unlock(lab.node("n3"), first).ok();
    wait_until(SETTLES_WITHIN, "n3 has the new key", || {
        let version = version_of_lock(lab, "n3");
        ((version == "2").then_some(()), version)
    });
    restart(lab, "n3");
    wait_for_state(lab, "n3", "locked");
    unlock(lab.node("n3"), first).err();
    unlock(lab.node("n3"), &second).ok();
    wait_for_state(lab, "n3", "active");
}

#[test]
fn restarted_managers_are_locked_and_their_containers_go_on() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.create_whoami("web", &["--publish", "8080:8080", "--replicas", "4"]);
    lab.wait_until_settled("n1", "web", 4);
    let none = n1.skep(&["swarm", "unlock-key"]).err();
    assert!(none.contains("no unlock key is set"), "{none}");
    let none = n1.skep(&["swarm", "unlock-key", "--rotate"]).err();
    assert!(none.contains("managers do not start locked"), "{none}");

    let said = n1.skep(&["swarm", "update", "--autolock"]).ok();
    assert!(said.stdout.starts_with("Swarm updated.\n"), "{said}");
    let first = n1.skep(&["swarm", "unlock-key", "-q"]).ok().text().to_owned();
    assert!(said.stdout.contains(&first) && first.starts_with("SWMKEY-1-"), "{said}");
    for manager in ["n1", "n2", "n3"] {
        wait_until_sealed(&lab, manager, true);
    }
    wait_until_sealed(&lab, "n4", false);

    // All of them: the swarm is locked, and serves on.
    let before = lab.containers("n1");
    for manager in ["n1", "n2", "n3"] {
        lab.kill_daemon(&[manager]);
    }
    lab.start_nodes(&["n1", "n2", "n3"]);
    for manager in ["n1", "n2", "n3"] {
        wait_for_state(&lab, manager, "locked");
    }
    assert_eq!(lab.containers("n1"), before);
    let url = format!("http://{}:8080/", lab.node("n4").address());
    let mut load = LoadOptions::to([url]);
    load.requests = Some(20);
    let report = lab.load("client", &load).finish();
    report.assert_none_failed();
    let refused = n1.skep(&["node", "ls"]).err();
    assert!(refused.contains(LOCKED), "{refused}");
    let refused = n1.skep(&["swarm", "leave"]).err();
    assert!(refused.contains("locked"), "{refused}");

    let wrong = unlock(n1, "SWMKEY-1-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA").err();
    assert!(
        wrong.contains("invalid unlock key: this manager was locked with another one"),
        "{wrong}"
    );
    let wrong = unlock(n1, "guess").err();
    assert!(wrong.contains("invalid unlock key: one is written SWMKEY-1-"), "{wrong}");
    for manager in ["n1", "n2", "n3"] {
        unlock(lab.node(manager), &first).ok();
        wait_for_state(&lab, manager, "active");
    }
    let again = unlock(n1, &first).err();
    assert!(again.contains("swarm is not locked"), "{again}");
    lab.wait_until_settled("n1", "web", 4);

    change_the_key_while_one_is_away(&lab, &first);
    n1.skep(&["swarm", "update", "--autolock=false"]).ok();
    wait_until_sealed(&lab, "n1", false);
    restart(&lab, "n1");
    wait_for_state(&lab, "n1", "active");
    lab.wait_until_settled("n1", "web", 4);
}

#[test]
fn the_pages_commands_do_what_it_says() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() });
    let mut page = Page::read("autolock.md");
    for section in ["Turning it on", "After a restart", "Changing the key", "Turning it off"] {
        page.run(&lab, section);
    }
    // Of three managers one has an older key than anybody.
    let n1 = lab.node("n1");
    n1.skep(&["swarm", "update", "--autolock"]).ok();
    wait_until_sealed(&lab, "n2", true);
    lab.kill_daemon(&["n2"]);
    lab.wait_for_node("n1", "n2", "Down");
    lab.start_nodes(&["n2"]);
    wait_for_state(&lab, "n2", "locked");
    let token = n1.skep(&["swarm", "join-token", "-q", "manager"]).ok();
    page.set("NODE", "n2");
    page.set("TOKEN", token.text());
    page.set("ADDRESS", &n1.address().to_string());
    page.run(&lab, "A lost key");
    lab.wait_for_node("n1", "n2", "Ready");
    page.finish();
    lab.down();
}
