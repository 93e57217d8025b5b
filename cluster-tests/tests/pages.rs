//! Pages of `docs/operations`, each command of them in its order, with what happens between them.
//!
//! Those on autolock and on the root of certificates are beside what else is tested of these.

use std::fs;
use std::path::Path;

use skep_cluster_tests::{
    Lab, LabOptions, Page, SETTLES_WITHIN, WHOAMI, is_root_or_skip, skep_binary, wait_until,
};

const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];

#[track_caller]
fn wait_for_state(lab: &Lab, node: &str, state: &str) {
    wait_until(SETTLES_WITHIN, &format!("{node} is {state:?}"), || {
        let output = lab.node(node).skep(&["info", "--format", "{{.Swarm.LocalNodeState}}"]);
        ((output.stdout.trim() == state).then_some(()), output.to_string())
    });
}

#[track_caller]
fn wait_for_manager(lab: &Lab, node: &str, is_manager: bool) {
    wait_until(SETTLES_WITHIN, &format!("whether {node} is a manager is {is_manager}"), || {
        let format = "{{.Hostname}}={{.ManagerStatus}}";
        let output = lab.node("n1").skep(&["node", "ls", "--format", format]);
        let line = output.stdout.lines().find_map(|line| line.strip_prefix(&format!("{node}=")));
        let is_so = line.is_some_and(|status| status.is_empty() != is_manager);
        (is_so.then_some(()), output.to_string())
    });
}

#[test]
fn ports() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions {
        managers: 1,
        workers: 1,
        user_space: vec![2],
        ..LabOptions::default()
    });
    lab.import_whoami();
    let mut page = Page::read("ports.md");
    page.set("IMAGE", WHOAMI);
    page.set("NODE", "n2");
    page.run(&lab, "Ports");
    page.run(&lab, "The PROXY protocol");
    let shown = page.run(&lab, "A kernel without nftables or VXLAN");
    assert!(shown[0].stdout.contains("user-space"), "{}", shown[0]);
    let shown = page.run(&lab, "A port that answers nothing");
    assert!(shown[0].stdout.contains("*:8000-8002->80/tcp"), "{shown:#?}");
    page.finish();
    lab.down();
}

#[test]
fn upgrade() {
    if !is_root_or_skip() {
        return;
    }
    // What the daemons are is in a directory that each node has in the place of `/usr/local/bin`.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let installed = dir.path().join("skep");
    fs::copy(skep_binary(), &installed).expect("copy skep");
    let daemon = Some(installed.clone());
    let lab = Lab::start(LabOptions { workers: 0, daemon, ..LabOptions::default() });
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.create_whoami("web", &["--replicas", "3"]);
    lab.wait_until_settled("n1", "web", 3);
    let before = lab.containers("n1");
    let assert_untouched = || {
        lab.wait_for_node("n2", "n1", "Ready");
        lab.wait_until_settled("n2", "web", 3);
        let now = lab.containers("n1");
        assert!(before.iter().all(|(id, pid)| now.get(id) == Some(pid)), "{before:?}, {now:?}");
    };
    let text = dir.path().to_str().expect("temporary directories have plain names");
    for node in MANAGERS {
        lab.node(node).exec(&["mount", "--bind", text, "/usr/local/bin"]).ok();
    }

    let mut page = Page::read("upgrade.md");
    page.set("NODE", "n2");
    page.run(&lab, "Restart");
    assert_untouched();

    // What is to be installed is in the directory in which the commands are given.
    let downloads = tempfile::tempdir().expect("a temporary directory");
    fs::copy(skep_binary(), downloads.path().join("skep")).expect("copy skep");
    page.set_dir(downloads.path().to_str().expect("temporary directories have plain names"));
    let old = inode(&installed);
    let shown = page.run(&lab, "Upgrade");
    assert_ne!(inode(&installed), old, "another file is in its place");
    assert!(shown.iter().any(|output| output.stdout.contains("Leader")), "{shown:#?}");
    assert_untouched();
    page.finish();
    lab.down();
}

fn inode(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).expect("it is there").ino()
}

#[test]
fn lost_quorum() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 1, ..LabOptions::default() });
    let mut page = Page::read("lost-quorum.md");

    lab.kill(&["n2", "n3"]);
    let shown = page.run(&lab, "What is so while there is none");
    assert!(shown[0].stdout.contains("Is Manager: true"), "{}", shown[0]);
    lab.start_nodes(&["n2"]);
    lab.wait_for_leader("n1");
    page.run(&lab, "Getting it back");

    // One is lost for good, a worker takes its place, and another one leaves.
    lab.wait_for_node("n1", "n3", "Down");
    page.set("NODE", "n3");
    page.set("WORKER", "n4");
    page.set("MANAGER", "n2");
    page.run(&lab, "A manager that is lost for good");
    wait_for_manager(&lab, "n4", true);
    wait_for_manager(&lab, "n2", false);
    lab.wait_for_node("n1", "n2", "Ready");

    page.run(&lab, "A daemon that is not in its swarm");
    wait_for_state(&lab, "n2", "inactive");
    page.finish();
    lab.down();
}
