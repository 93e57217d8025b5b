//! `skep run`: containers that no service made, asked for on a worker.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use skep_cluster_tests::{
    BUSYBOX, Lab, LabOptions, Output, SETTLES_WITHIN, WHOAMI, is_root_or_skip, wait_until,
};

#[test]
fn a_node_runs_containers_of_its_own_on_attachable_networks() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, ..LabOptions::default() });
    lab.import_busybox("n1");
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.skep(&["network", "create", "--attachable", "--subnet", "10.31.0.0/29", "front"]).ok();
    n1.skep(&["network", "create", "closed"]).ok();
    let here = ["--network", "front", "--constraint", "node.hostname==n1"];
    n1.create_whoami("web", &here);
    let sleep = [&["--network", "front", BUSYBOX][..], &["sleep", "100000"]].concat();
    let create = ["service", "create", "--detach", "--name", "asker"];
    n1.skep(&[&create[..], &here[2..], &sleep].concat()).ok();
    lab.wait_until_settled("n1", "web", 1);
    step("in the foreground");
    it_asks_a_service_and_ends_as_its_program(&lab);
    step("what is refused");
    what_cannot_run_is_refused(&lab);
    step("in the background");
    it_is_found_by_name_until_it_is_removed(&lab, &sleep);
    step("an interrupt");
    an_interrupt_stops_it(&lab);
    step("the node's own network");
    let host = n2(
        &lab,
        &["run", "--rm", "--network", "host", BUSYBOX, "/bin/busybox", "cat", "/etc/hostname"],
    )
    .ok();
    assert_eq!(host.text(), "n2");
    lab.down();
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

fn n2(lab: &Lab, words: &[&str]) -> Output {
    lab.node("n2").skep(words)
}

/// The names that `skep ps` shows on the worker.
fn names(lab: &Lab, flags: &[&str]) -> Vec<String> {
    let list = ["ps", "--format", "{{.Names}} {{.Status}}"];
    let output = n2(lab, &[&list[..], flags].concat()).ok();
    output.stdout.lines().map(str::to_owned).collect()
}

fn it_asks_a_service_and_ends_as_its_program(lab: &Lab) {
    let ask = "wget -qO- http://web:8080/ && echo no >&2 && exit 7";
    let on_front = ["run", "--name", "once", "--network", "front", BUSYBOX, "sh", "-c", ask];
    let output = n2(lab, &on_front);
    assert_eq!(output.status.code(), Some(7), "{output}");
    assert!(output.stdout.contains("Service: web\n"), "{output}");
    assert_eq!(output.stderr, "no\n");
    assert_eq!(names(lab, &[]), [""; 0], "it does not run");
    let all = names(lab, &["--all"]);
    assert!(all.len() == 1 && all[0].starts_with("once Exited (7) "), "{all:?}");
    assert_eq!(n2(lab, &["rm", "once"]).ok().text(), "once");
    assert_eq!(names(lab, &["--all"]), [""; 0]);
    let output = n2(lab, &["run", "--rm", "--env", "A=b", BUSYBOX, "sh", "-c", "echo $A"]).ok();
    assert_eq!(output.text(), "b");
    assert_eq!(names(lab, &["--all"]), [""; 0]);
}

fn what_cannot_run_is_refused(lab: &Lab) {
    for (words, expect) in [
        (&["--network", "closed", BUSYBOX][..], "network closed is not manually attachable"),
        (&["nobody"], "no image named \"nobody\" in this swarm"),
        (&[BUSYBOX, "/nothing"], "/nothing"),
    ] {
        let output = n2(lab, &[&["run", "--rm"], words].concat());
        assert_eq!(output.status.code(), Some(125), "{output}");
        assert!(output.stderr.contains(expect), "{output}");
    }
    let error = n2(lab, &["stop", "nobody"]).err();
    assert!(error.contains("No such container: nobody"), "{error}");
}

fn it_is_found_by_name_until_it_is_removed(lab: &Lab, sleep: &[&str]) {
    let detached = [&["run", "--detach", "--name", "box"], sleep].concat();
    let id = n2(lab, &detached).ok().text().to_owned();
    let taken = n2(lab, &detached);
    assert!(taken.stderr.contains("The container name \"box\" is already in use"), "{taken}");
    let asker = lab.node("n1").tasks("asker").remove(0).id;
    let pid = lab.containers("n1")[&asker].to_string();
    let enter = ["nsenter", "--target", &pid, "--mount", "--net", "--", "/bin/busybox"];
    let find =
        |name: &str| lab.node("n1").exec(&[&enter[..], &["nslookup", "-type=a", name]].concat());
    assert!(find("box.front").ok().stdout.contains("Address: 10.31.0."), "a task finds it");
    let ping = ["ping", "-c", "1", "-W", "5", "box"];
    lab.node("n1").exec(&[&enter[..], &ping].concat()).ok();
    let error = lab.node("n1").skep(&["network", "rm", "front"]).err();
    assert!(error.contains("network front is in use by"), "{error}");
    let error = n2(lab, &["rm", &id[..12]]).err();
    assert!(error.contains("container is running"), "{error}");
    let elsewhere = lab.node("n1").skep(&["rm", "--force", "box"]).err();
    assert!(elsewhere.contains("No such container: box"), "of another node: {elsewhere}");

    // It outlives its daemon.
    lab.kill_daemon(&["n2"]);
    lab.start_nodes(&["n2"]);
    assert!(lab.containers("n2").contains_key(&id));
    n2(lab, &["rm", "--force", "box"]).ok();
    wait_until(SETTLES_WITHIN, "its address is free", || {
        let network = lab.node("n1").skep(&["network", "inspect", "front"]).ok().json();
        let containers = network[0]["Containers"].as_object().unwrap().clone();
        let is_gone = !containers.keys().any(|container| container.contains(&id))
            && !lab.containers("n2").contains_key(&id);
        (is_gone.then_some(()), format!("{containers:?}"))
    });
    assert!(find("box.front").stdout.lines().all(|line| !line.starts_with("Address: ")));
}

fn an_interrupt_stops_it(lab: &Lab) {
    let words = ["run", "--name", "long", "--rm", WHOAMI];
    let running = lab.start_skep("n2", &words);
    wait_until(SETTLES_WITHIN, "it runs", || {
        let names = names(lab, &[]);
        let is_up = names.iter().any(|name| name.starts_with("long Up"));
        (is_up.then_some(()), format!("{names:?}"))
    });
    lab.node("n2").exec(&["pkill", "--full", "--signal", "INT", "run --name lon[g]"]).ok();
    let (status, lines) = running.finish(SETTLES_WITHIN);
    assert_eq!(status.code(), Some(0), "{lines}");
    assert_eq!(names(lab, &["--all"]), [""; 0], "it is removed");
}
