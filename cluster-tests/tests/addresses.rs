//! Machines that get another address: they stay the nodes that they are.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io::Write as _};

use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, SETTLES_WITHIN, is_root_or_skip, skep_binary, wait_until,
};

/// A program that runs the daemon, and has it advertise what `advertise` in its data directory says, if it is there.
fn daemon(dir: &Path) -> PathBuf {
    const SCRIPT: &str = r#"
file=/var/lib/skep/advertise
if [ "$1" = daemon ] && [ -e $file ]; then
    words=("$@")
    for i in "${!words[@]}"; do
        if [ "${words[$i]}" = --advertise-addr ]; then words[$((i + 1))]=$(cat $file); fi
    done
    set -- "${words[@]}"
fi
"#;
    let path = dir.join("skep");
    let mut file = fs::File::create(&path).expect("the directory can be written to");
    let run = format!("#!/bin/bash{SCRIPT}exec {} \"$@\"\n", skep_binary().display());
    file.write_all(run.as_bytes()).expect("the directory can be written to");
    drop(file);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is the test's own");
    path
}

/// The address that a node gets in place of its own.
fn next_address(lab: &Lab, node: &str) -> Ipv4Addr {
    let [a, b, c, d] = lab.node(node).address().octets();
    Ipv4Addr::new(a, b, c, d + 100)
}

/// Gives the machine its other address, and takes its own away.
#[track_caller]
fn move_machine(lab: &Lab, node: &str) -> Ipv4Addr {
    let (old, new) = (lab.node(node).address(), next_address(lab, node));
    let script = format!(
        "ip address add {new}/24 dev eth0 && ip address del {old}/24 dev eth0 && \
         (ip address show dev eth0 | grep -q {new} || ip address add {new}/24 dev eth0)"
    );
    lab.node(node).exec(&["sh", "-c", &script]).ok();
    new
}

#[track_caller]
fn advertise(lab: &Lab, node: &str, text: &str) {
    fs::write(lab.data_dir(node).join("advertise"), text).expect("a test as root may write there");
}

/// Waits until the managers know a node at an address: as a node, and as a manager where it is one.
#[track_caller]
fn wait_until_known_at(lab: &Lab, via: &str, node: &str, address: Ipv4Addr, is_manager: bool) {
    wait_until(SETTLES_WITHIN, &format!("{via} knows {node} at {address}"), || {
        let output = lab.node(via).skep(&["node", "inspect", node]);
        let text = output.stdout.replace(' ', "");
        let is_known = text.contains(&format!("\"Addr\":\"{address}\""))
            && text.contains("\"State\":\"ready\"")
            && (!is_manager
                || text.contains(&format!("\"Addr\":\"{address}:2377\""))
                    && !text.contains("unreachable"));
        (is_known.then_some(()), output.to_string())
    });
}

/// Every task answers at an address, over the mesh where it is another node's.
#[track_caller]
fn wait_until_all_answer(lab: &Lab, at: Ipv4Addr, n_tasks: usize) {
    wait_until(SETTLES_WITHIN, &format!("all tasks answer at {at}"), || {
        let report = lab.send("client", &format!("http://{at}:8080/"), 2 * n_tasks as u64);
        let n_slots = match report.summary.failed {
            0 => report.count_by("Slot").len(),
            _ => 0,
        };
        ((n_slots == n_tasks).then_some(()), format!("{report:?}"))
    });
}

#[test]
fn a_machine_with_another_address_stays_the_node_that_it_is() {
    if !is_root_or_skip() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = LabOptions { managers: 3, workers: 1, ..LabOptions::default() };
    let lab = Lab::start(LabOptions { daemon: Some(daemon(dir.path())), ..options });
    lab.import_whoami();
    let flags = ["--publish", "8080:8080", "--replicas", "4", "--replicas-max-per-node", "1"];
    lab.node("n1").create_whoami("web", &flags);
    lab.wait_until_settled("n1", "web", 4);
    let containers = || ["n1", "n2", "n3", "n4"].map(|node| lab.containers(node));
    let before = containers();
    let follower = if lab.wait_for_leader("n1") == "n3" { "n2" } else { "n3" };

    // A worker that is told an interface, and whose address changes under the daemon.
    lab.kill_daemon(&["n4"]);
    advertise(&lab, "n4", "eth0");
    lab.start_nodes(&["n4"]);
    wait_until_known_at(&lab, "n1", "n4", lab.node("n4").address(), false);
    let of_worker = move_machine(&lab, "n4");
    wait_until_known_at(&lab, "n1", "n4", of_worker, false);
    for at in [of_worker, lab.node("n1").address()] {
        wait_until_all_answer(&lab, at, 4);
    }

    // A manager that is started with another address.
    lab.kill_daemon(&[follower]);
    let of_manager = move_machine(&lab, follower);
    advertise(&lab, follower, &of_manager.to_string());
    lab.start_nodes(&[follower]);
    for via in ["n1", follower] {
        wait_until_known_at(&lab, via, follower, of_manager, true);
    }
    // Its vote counts again: without it there would be no majority.
    let leader = lab.wait_for_leader("n1");
    let third = ["n1", "n2", "n3"].into_iter().find(|node| *node != leader && *node != follower);
    let third = third.expect("there are three managers");
    lab.kill_daemon(&[third]);
    lab.node(follower).skep(&["node", "update", "--label-add", "a=1", "n4"]).ok();
    lab.start_nodes(&[third]);
    for at in [of_worker, of_manager, lab.node(third).address()] {
        wait_until_all_answer(&lab, at, 4);
    }
    let load = lab.load("client", &LoadOptions::to([format!("http://{of_worker}:8080/")]));
    load.wait_for_more(50, SETTLES_WITHIN);
    load.stop().assert_none_failed();
    lab.wait_until_settled("n1", "web", 4);
    assert_eq!(containers(), before, "no container was touched");
    lab.down();
}

#[test]
fn one_of_two_managers_moves_and_so_does_a_leader() {
    if !is_root_or_skip() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = LabOptions { managers: 2, workers: 1, ..LabOptions::default() };
    let lab = Lab::start(LabOptions { daemon: Some(daemon(dir.path())), ..options });
    lab.kill_daemon(&["n1", "n2"]);
    advertise(&lab, "n1", "eth0");
    advertise(&lab, "n2", "eth0");
    lab.start_nodes(&["n1", "n2"]);
    let leader = lab.wait_for_leader("n1");
    let follower = if leader == "n1" { "n2" } else { "n1" };
    for node in [&*leader, follower] {
        let address = move_machine(&lab, node);
        for via in ["n1", "n2"] {
            wait_until_known_at(&lab, via, node, address, true);
        }
        lab.node(node).skep(&["node", "update", "--label-add", &format!("{node}=1"), "n3"]).ok();
        // Workers learn it of a manager: they must not lose both at once.
        wait_until(SETTLES_WITHIN, &format!("n3 knows {node} at {address}"), || {
            let output = lab.node("n3").skep(&["info"]).ok();
            (output.stdout.contains(&format!("{address}:2377")).then_some(()), output.to_string())
        });
    }
    lab.wait_until_alike("n1", 2);
    lab.wait_for_node("n1", "n3", "Ready");
    lab.down();
}
