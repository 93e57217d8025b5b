//! Managers lost for good: one goes on alone, or a backup begins anew on other machines, as the page of backups says.

use std::fs;

use skep_cluster_tests::{
    Lab, LabOptions, Page, SETTLES_WITHIN, WHOAMI, is_root_or_skip, wait_until,
};

const FORCE: [&str; 3] = ["swarm", "init", "--force-new-cluster"];
const BACKUP_FILE: &str = "/root/swarm.backup";
const KEY_FILE: &str = "/root/unlock-key";

fn state(lab: &Lab, node: &str) -> String {
    let format = "{{.Swarm.LocalNodeState}} {{.Swarm.Error}}";
    lab.node(node).skep(&["info", "--format", format]).ok().text().trim().to_owned()
}

#[track_caller]
fn names(lab: &Lab, via: &str) -> Vec<String> {
    let list = lab.node(via).skep(&["node", "ls", "--format", "{{.Hostname}}"]).ok();
    let mut names: Vec<String> = list.stdout.lines().map(str::to_owned).collect();
    names.sort();
    names
}

#[track_caller]
fn join(lab: &Lab, node: &str, via: &str, role: &str) {
    let token = lab.node(via).skep(&["swarm", "join-token", "--quiet", role]).ok();
    let address = format!("{}:2377", lab.node(via).address());
    lab.node(node).skep(&["swarm", "join", "--token", token.text(), &address]).ok();
}

/// Waits until a service has so many tasks, and answers through a node.
#[track_caller]
fn check_service(lab: &Lab, via: &str, n_tasks: usize) {
    lab.wait_until_settled(via, "web", n_tasks);
    let report = lab.send("client", &lab.url(via, 8080), 20);
    report.assert_none_failed();
}

#[test]
fn a_manager_goes_on_alone_where_the_others_are_lost() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.exec(&["sh", "-c", "echo hidden | skep secret create word -"]).ok();
    n1.create_whoami("web", &["--publish", "8080:8080", "--replicas", "5", "--secret", "word"]);
    lab.wait_until_settled("n1", "web", 5);
    let refused = n1.skep(&FORCE).err();
    assert!(refused.contains("a majority of its 3 manager(s) answers"), "{refused}");
    let refused = lab.node("n4").skep(&FORCE).err();
    assert!(refused.contains("is a worker and has nothing"), "{refused}");

    let before = lab.containers("n4");
    lab.kill(&["n2", "n3"]);
    let write = ["service", "update", "--label-add", "lost=1", "--detach", "web"];
    let refused = n1.skep(&write).err();
    assert!(refused.contains("2 of its 3 managers are needed"), "{refused}");
    let list = n1.skep(&["service", "ls"]).ok();
    assert!(list.stdout.contains("web"), "{list}");
    for words in ["what this manager last knew", "this manager hears of no leader"] {
        assert!(list.stderr.contains(words), "{words:?} in {list}");
    }
    let said = n1.skep(&FORCE).ok();
    for words in ["1 service(s), 1 secret(s)", "n2 (", "n3 (", "2 worker(s) come back", "SWMTKN-1-"]
    {
        assert!(said.stdout.contains(words), "{words:?} in {said}");
    }
    assert_eq!(names(&lab, "n1"), ["n1", "n4", "n5"]);
    for node in ["n1", "n4", "n5"] {
        lab.wait_for_node("n1", node, "Ready");
    }
    check_service(&lab, "n1", 5);
    let after = lab.containers("n4");
    assert!(before.iter().all(|(id, pid)| after.get(id) == Some(pid)), "{before:?} {after:?}");

    // A majority of before, and without n1 they would lead.
    lab.start_nodes(&["n2", "n3"]);
    for node in ["n2", "n3"] {
        wait_until(SETTLES_WITHIN, &format!("{node} is refused"), || {
            let state = state(&lab, node);
            // Its agent may hear of it before its Raft does.
            let words = ["swarm", "containers were stopped", "`skep swarm leave", "join"];
            let is_told =
                state.starts_with("error this ") && words.iter().all(|word| state.contains(word));
            (is_told.then_some(()), state)
        });
        assert_eq!(lab.containers(node).len(), 0);
    }
    assert_eq!(names(&lab, "n1"), ["n1", "n4", "n5"]);
    check_service(&lab, "n1", 5);
    for node in ["n2", "n3"] {
        lab.node(node).skep(&["swarm", "leave", "--force"]).ok();
        join(&lab, node, "n1", "manager");
    }
    lab.wait_until_alike("n1", 3);
    // The new quorum does without the manager that it began with, and its term outlives restarts.
    lab.kill(&["n1"]);
    lab.wait_for_leader("n2");
    lab.start_nodes(&["n1"]);
    lab.wait_until_alike("n1", 3);
    check_service(&lab, "n1", 5);
    lab.down();
}

#[test]
fn a_manager_that_takes_no_part_is_not_forced_while_others_lead() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() });
    let n1 = lab.node("n1");
    lab.kill_daemon(&["n1"]);
    let other = "busybox httpd -f -p 2377 -h / >/dev/null 2>&1 & echo $!";
    let other = n1.exec(&["sh", "-c", other]).ok();
    wait_until(SETTLES_WITHIN, "the other program has the port", || {
        let sockets = n1.exec(&["ss", "-Htnl"]);
        (sockets.stdout.contains(":2377").then_some(()), sockets.to_string())
    });
    lab.start_nodes(&["n1"]);
    let kept_out = state(&lab, "n1");
    assert!(kept_out.contains("another program has the port"), "{kept_out}");
    let refused = n1.skep(&FORCE).err();
    assert!(refused.contains("the swarm has a leader, the manager at "), "{refused}");
    n1.exec(&["kill", other.text()]).ok();
    lab.wait_for_node("n2", "n1", "Ready");
    lab.wait_until_alike("n2", 3);
    assert_eq!(names(&lab, "n1"), ["n1", "n2", "n3"]);
    lab.down();
}

#[test]
fn a_stopped_manager_goes_on_alone_at_another_address() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 2, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").create_whoami("web", &["--publish", "8080:8080", "--replicas", "2"]);
    lab.wait_until_settled("n1", "web", 2);
    lab.kill_daemon(&["n1"]);
    lab.kill(&["n2"]);
    lab.start_nodes(&["n1"]);
    let n1 = lab.node("n1");
    let refused = n1.skep(&[&FORCE[..], &["--autolock"]].concat()).err();
    assert!(refused.contains("`skep swarm update` afterwards"), "{refused}");
    let address = format!("{}:2400", n1.address());
    let addresses = ["--listen-addr", "0.0.0.0:2400", "--advertise-addr", &address];
    let said = n1.skep(&[&FORCE[..], &addresses].concat()).ok();
    assert!(said.stdout.contains(&address), "{said}");
    lab.wait_for_node("n1", "n1", "Ready");
    let nodes = n1.skep(&["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"]).ok();
    assert!(nodes.stdout.contains("n1 Leader") && !nodes.stdout.contains("n2"), "{nodes}");
    lab.kill_daemon(&["n1"]);
    lab.start_nodes(&["n1"]);
    lab.wait_for_node("n1", "n1", "Ready");
    lab.down();
}

#[track_caller]
fn refuse_restore(lab: &Lab, node: &str, file: &[u8], words: &str) {
    let path = lab.data_dir(node).join("broken.backup");
    fs::write(&path, file).expect("a test as root may write there");
    let restore = format!("skep swarm restore /var/lib/skep/broken.backup < {KEY_FILE}");
    let refused = lab.node(node).exec(&["sh", "-c", &restore]).err();
    assert!(refused.contains(words), "{words:?} in {refused}");
    assert_eq!(state(lab, node), "inactive");
    let leftovers = ["raft", "node.json", "certificates"].map(|name| lab.data_dir(node).join(name));
    let is_there = |path: &std::path::PathBuf| {
        path.is_file() || fs::read_dir(path).is_ok_and(|mut dir| dir.next().is_some())
    };
    assert!(!leftovers.iter().any(is_there), "{leftovers:?}");
}

/// A good backup, and all that may be wrong with it: the machine stays as it was.
#[track_caller]
fn refuse_what_is_no_backup(lab: &Lab, file: &[u8]) {
    let mut damaged = file.to_vec();
    let middle = damaged.len() - 100;
    damaged[middle] ^= 1;
    refuse_restore(lab, "n3", &damaged, "damaged at byte");
    refuse_restore(lab, "n3", &file[..file.len() - 40], "damaged at byte");
    refuse_restore(lab, "n3", b"services:\n", "is no backup of a swarm");
    let newer = String::from_utf8_lossy(&file[..200]).contains("\"Format\":1,");
    assert!(newer, "the head names the format");
    let at = file.windows(10).position(|part| part == b"\"Format\":1").expect("it does");
    let mut newer = file.to_vec();
    newer[at + 9] = b'7';
    refuse_restore(lab, "n3", &newer, "has format 7");
    let wrong = format!("echo SWMKEY-1-{} | skep swarm restore {BACKUP_FILE}", "A".repeat(43));
    let refused = lab.node("n3").exec(&["sh", "-c", &wrong]).err();
    assert!(refused.contains("sealed with another one"), "{refused}");
    assert_eq!(state(lab, "n3"), "inactive");
}

#[test]
fn a_backup_begins_anew_on_new_machines() {
    if !is_root_or_skip() {
        return;
    }
    let lab =
        Lab::start(LabOptions { managers: 4, workers: 0, swarm: false, ..LabOptions::default() });
    let n1 = lab.node("n1");
    n1.skep(&["swarm", "init"]).ok();
    join(&lab, "n2", "n1", "worker");
    lab.import_whoami();
    n1.exec(&["sh", "-c", "echo hidden | skep secret create word -"]).ok();
    n1.skep(&["network", "create", "--driver", "overlay", "inner"]).ok();
    let flags =
        ["--publish", "8080:8080", "--replicas", "3", "--secret", "word", "--network", "inner"];
    n1.create_whoami("web", &flags);
    lab.wait_until_settled("n1", "web", 3);
    let id = |via: &str| {
        lab.node(via).skep(&["service", "inspect", "--format", "{{.ID}}", "web"]).ok().stdout
    };
    let before = id("n1");

    let mut page = Page::read("backup-restore.md");
    let said = page.run(&lab, "Making one");
    assert!(said[0].stderr.contains("Who can read it has the whole swarm"), "{}", said[0]);
    assert!(said[1].stderr.contains("sealed with the unlock key"), "{}", said[1]);
    let size = n1.exec(&["stat", "-c", "%a %s", BACKUP_FILE]).ok();
    assert!(size.text().starts_with("600 "), "{size}");
    let copy = lab.data_dir("n1").join("copy");
    n1.exec(&["cp", BACKUP_FILE, "/var/lib/skep/copy"]).ok();
    let file = fs::read(copy).expect("it was just written");
    let refused = n1.skep(&["swarm", "restore", BACKUP_FILE]).err();
    assert!(refused.contains("already part of a swarm"), "{refused}");
    lab.kill(&["n1", "n2"]);

    refuse_what_is_no_backup(&lab, &file);

    let said = page.run(&lab, "Restoring it");
    for words in ["1 service(s), 1 secret(s)", "The 2 node(s) that it had are removed"] {
        assert!(said[0].stdout.contains(words), "{words:?} in {}", said[0]);
    }
    join(&lab, "n4", "n3", "worker");
    assert_eq!(id("n3"), before);
    lab.node("n3").wait_for_tasks("web", "they wait for the image", |tasks| {
        let waits = |task: &&skep_cluster_tests::TaskRow| task.error.contains(WHOAMI);
        (tasks.iter().filter(waits).count() == 3).then_some(())
    });
    lab.import_whoami_through("n3");
    check_service(&lab, "n3", 3);
    let secret = lab
        .whoamis_of("web")
        .first()
        .map(|whoami| fs::read_to_string(format!("/proc/{}/root/run/secrets/word", whoami.pid)));
    assert_eq!(secret.and_then(Result::ok).as_deref(), Some("hidden\n"));

    // It starts locked, as the swarm did.
    lab.kill_daemon(&["n3"]);
    lab.start_nodes(&["n3"]);
    assert_eq!(state(&lab, "n3"), "locked");
    lab.node("n3").exec(&["sh", "-c", &format!("skep swarm unlock < {KEY_FILE}")]).ok();
    lab.wait_for_node("n3", "n3", "Ready");
    lab.start_nodes(&["n2"]);
    let token = lab.node("n3").skep(&["swarm", "join-token", "--quiet", "worker"]).ok();
    page.set("TOKEN", token.text());
    page.set("HOST", &lab.node("n3").address().to_string());
    page.run(&lab, "Machines of the swarm as it was");
    lab.wait_for_node("n3", "n2", "Ready");
    page.finish();
    lab.node("n3").exec(&["rm", BACKUP_FILE, KEY_FILE]).ok();
    lab.down();
}

/// Gives a stopped node's Raft data a file system of its own, of so many MiB.
#[track_caller]
fn give_small_disk(lab: &Lab, node: &str, mib: u32) {
    let script = format!(
        "cp -a /var/lib/skep/raft /var/lib/skep/raft.copy && mount -t tmpfs -o size={mib}m,mode=700 tmpfs /var/lib/skep/raft && cp -a /var/lib/skep/raft.copy/. /var/lib/skep/raft/ && rm -r /var/lib/skep/raft.copy"
    );
    lab.node(node).exec(&["sh", "-ec", &script]).ok();
}

#[track_caller]
fn wait_for_status(lab: &Lab, via: &str, node: &str, status: &str) {
    wait_until(SETTLES_WITHIN, &format!("{node} is shown as {status}"), || {
        let format = "{{.Hostname}} {{.Status}}";
        let list = lab.node(via).skep(&["node", "ls", "--format", format]);
        let line = format!("{node} {status}");
        let is_so = list.stdout.lines().any(|shown| shown == line);
        (is_so.then_some(()), list.to_string())
    });
}

#[test]
fn a_full_disk_leaves_a_manager_readable() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() });
    lab.import_whoami();
    lab.node("n1").create_whoami("web", &["--publish", "8080:8080", "--replicas", "3"]);
    lab.wait_until_settled("n1", "web", 3);
    lab.kill_daemon(&["n2"]);
    give_small_disk(&lab, "n2", 200);
    lab.start_nodes(&["n2"]);
    let n2 = lab.node("n2");
    wait_for_status(&lab, "n1", "n2", "Ready");
    lab.wait_until_alike("n1", 3);
    n2.skep(&["service", "update", "--label-add", "a=1", "--detach", "web"]).ok();

    // Little is left: it reads, refuses writes, and says so everywhere.
    let fill = |leave: u32| {
        let script = format!(
            "free=$(df -m /var/lib/skep/raft | tail -n1 | awk '{{print $4}}'); dd if=/dev/zero of=/var/lib/skep/raft/filler bs=1M count=$((free - {leave})) 2>/dev/null; true"
        );
        n2.exec(&["sh", "-c", &script]).ok();
    };
    fill(20);
    // An update that changes nothing is no write.
    let mut n_updates = 0;
    let mut update = |node: &str| {
        n_updates += 1;
        let label = format!("count={n_updates}");
        lab.node(node).skep(&["service", "update", "--label-add", &label, "--detach", "web"])
    };
    wait_until(SETTLES_WITHIN, "n2 refuses a write", || {
        let output = update("n2");
        let is_told = output.stderr.contains("the disk of this manager is full")
            && output.stderr.contains("/var/lib/skep/raft")
            && output.stderr.contains("make room");
        (is_told.then_some(()), output.to_string())
    });
    wait_for_status(&lab, "n1", "n2", "Ready, disk full");
    let info = n2.skep(&["info"]).ok();
    assert!(info.stderr.contains("WARNING: the disk of this manager is full"), "{info}");
    let tasks = n2.skep(&["service", "ps", "web"]).ok();
    assert!(tasks.stdout.contains("web.3"), "{tasks}");
    wait_until(SETTLES_WITHIN, "another one leads", || {
        let leader = lab.wait_for_leader("n1");
        ((leader != "n2").then_some(()), leader)
    });
    update("n1").ok();

    // Nothing is left: Raft ends there, and it shows what it knew.
    n2.exec(&["sh", "-c", "cat /dev/zero > /var/lib/skep/raft/rest 2>/dev/null; true"]).ok();
    let writes = ["debug", "write", "--count", "4000", "--concurrency", "32", "--name", "much"];
    lab.start_skep("n1", &writes).finish(std::time::Duration::from_secs(240));
    wait_until(SETTLES_WITHIN, "n2 shows what it knew", || {
        let output = n2.skep(&["service", "inspect", "web"]);
        let is_told = output.status.success()
            && output.stderr.contains("may be old: the disk of this manager is full");
        (is_told.then_some(()), output.to_string())
    });
    let refused = update("n2").err();
    assert!(refused.contains("the disk of this manager is full"), "{refused}");
    check_service(&lab, "n1", 3);

    n2.exec(&["sh", "-c", "rm /var/lib/skep/raft/filler /var/lib/skep/raft/rest"]).ok();
    wait_for_status(&lab, "n1", "n2", "Ready");
    lab.wait_until_alike("n1", 3);
    update("n2").ok();
    check_service(&lab, "n2", 3);
    lab.kill(&["n2"]); // Its file system goes with it.
    lab.down();
}
