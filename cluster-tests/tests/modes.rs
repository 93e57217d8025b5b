//! Services whose tasks are not a number of replicas: global ones, on nodes that come and go, and jobs.

use skep_cluster_tests::{
    BUSYBOX, Lab, LabOptions, Output, SETTLES_WITHIN, TaskRow, is_root_or_skip, wait_until,
};

fn nodes(tasks: &[TaskRow]) -> Vec<&str> {
    let mut nodes: Vec<&str> = tasks.iter().map(|task| task.node.as_str()).collect();
    nodes.sort_unstable();
    nodes
}

fn availability(lab: &Lab, node: &str, availability: &str) {
    lab.node("n1").skep(&["node", "update", "--availability", availability, node]).ok();
}

#[test]
fn a_global_service_has_a_task_on_every_node_that_may_have_one() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.create_whoami("agent", &["--mode", "global"]);
    let all = lab.wait_until_settled("n1", "agent", 3);
    assert_eq!(nodes(&all), ["n1", "n2", "n3"]);
    for whoami in lab.whoamis_of("agent") {
        let node_id = n1.skep(&["node", "inspect", "--format", "{{.ID}}", &whoami.node]).ok();
        let node_id = node_id.stdout.trim().to_owned();
        assert_eq!(whoami.environment["TASK_SLOT"], node_id, "the node stands for the slot");
        let task = all.iter().find(|task| task.id == whoami.task);
        assert_eq!(task.map(|task| task.name.clone()), Some(format!("agent.{node_id}")));
    }

    availability(&lab, "n2", "drain");
    assert_eq!(nodes(&lab.wait_until_settled("n1", "agent", 2)), ["n1", "n3"]);
    availability(&lab, "n2", "active");
    let back = lab.wait_until_settled("n1", "agent", 3);
    assert_eq!(nodes(&back), ["n1", "n2", "n3"]);

    // A paused node is left as it is by an update, until it is active again.
    availability(&lab, "n3", "pause");
    let on_n3 = |tasks: &[TaskRow]| tasks.iter().find(|task| task.node == "n3").cloned();
    let update = [
        "service",
        "update",
        "--detach=false",
        "--update-monitor",
        "1s",
        "--env-add",
        "A=B",
        "agent",
    ];
    n1.skep(&update).ok();
    let updated = lab.wait_until_settled("n1", "agent", 3);
    assert_eq!(on_n3(&updated), on_n3(&back), "{updated:#?}");
    assert!(updated.iter().filter(|task| back.contains(task)).count() == 1, "{updated:#?}");
    availability(&lab, "n3", "active");
    wait_until(SETTLES_WITHIN, "n3 has a task of the new spec", || {
        let whoamis = lab.whoamis_of("agent");
        let is_new =
            whoamis.len() == 3 && whoamis.iter().all(|one| one.environment.contains_key("A"));
        (is_new.then_some(()), format!("{whoamis:#?}"))
    });

    a_revision_is_gone_back_to(&lab);
    let refused = n1.skep(&["service", "scale", "--detach", "agent=2"]).err();
    let expect = "scale can only be used with replicated or replicated-job mode";
    assert!(refused.contains(expect), "{refused}");
    n1.skep(&["service", "rm", "agent"]).ok();
    wait_until(SETTLES_WITHIN, "the service is gone", || {
        let listed = n1.skep(&["service", "ls", "--format", "{{.Name}}"]).ok();
        let whoamis = lab.whoamis_of("agent");
        let is_gone = listed.stdout.trim().is_empty() && whoamis.is_empty();
        (is_gone.then_some(()), format!("{listed}\n{whoamis:#?}"))
    });
    lab.down();
}

/// The update above was the first since the nodes said what they know; what was before is revision 1.
fn a_revision_is_gone_back_to(lab: &Lab) {
    let n1 = lab.node("n1");
    let history = || {
        let format = "{{.Revision}} {{.Changed}}";
        let listed = n1.skep(&["service", "history", "--format", format, "agent"]).ok();
        listed.text().lines().map(str::to_owned).collect::<Vec<String>>()
    };
    assert_eq!(history(), ["2 Env, UpdateConfig", "1"]);
    let refused = n1.skep(&["service", "rollback", "--to", "9", "agent"]).err();
    let expect = "service agent has no revision 9 to go back to: choose one of 1";
    assert!(refused.contains(expect), "{refused}");
    n1.skep(&["service", "rollback", "--to", "1", "agent"]).ok();
    assert_eq!(history(), ["3 Env, UpdateConfig", "2 Env, UpdateConfig", "1"]);
    wait_until(SETTLES_WITHIN, "every node has a task of the first spec", || {
        let whoamis = lab.whoamis_of("agent");
        let is_old =
            whoamis.len() == 3 && whoamis.iter().all(|one| !one.environment.contains_key("A"));
        (is_old.then_some(()), format!("{whoamis:#?}"))
    });
}

fn leave(lab: &Lab, node: &str) {
    lab.node(node).skep(&["swarm", "leave"]).ok();
    lab.node("n1").skep(&["node", "rm", "--force", node]).ok();
}

fn join(lab: &Lab, node: &str) {
    let token = lab.node("n1").skep(&["swarm", "join-token", "--quiet", "worker"]).ok();
    let address = format!("{}:2377", lab.node("n1").address());
    lab.node(node).skep(&["swarm", "join", "--token", token.text(), &address]).ok();
}

/// A job of busybox, waited for; its output.
fn create_job(lab: &Lab, name: &str, flags: &[&str], script: &str) -> Output {
    let mut args = vec!["service", "create", "--name", name];
    args.extend(flags);
    args.extend([BUSYBOX, "busybox", "sh", "-c", script]);
    lab.node("n1").skep(&args)
}

fn replicas(lab: &Lab, name: &str) -> String {
    let filter = format!("name={name}");
    let args = ["service", "ls", "--filter", &filter, "--format", "{{.Mode}} {{.Replicas}}"];
    lab.node("n1").skep(&args).ok().text().trim().to_owned()
}

fn wait_for_replicas(lab: &Lab, name: &str, expect: &str) {
    wait_until(SETTLES_WITHIN, expect, || {
        let replicas = replicas(lab, name);
        ((replicas == expect).then_some(()), replicas)
    });
}

#[test]
fn jobs_run_until_they_are_done() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 5, ..LabOptions::default() });
    let n1 = lab.node("n1");
    lab.import_busybox("n1");
    leave(&lab, "n6");
    a_job_of_six(&lab);
    a_job_that_fails(&lab);

    let flags = ["--mode", "global-job", "--quiet"];
    create_job(&lab, "each", &flags, "exit 0").ok();
    assert_eq!(replicas(&lab, "each"), "global job 0/0 (5/5 completed)");
    let ran_on = n1.tasks("each");
    assert_eq!(nodes(&ran_on), ["n1", "n2", "n3", "n4", "n5"]);
    join(&lab, "n6");
    wait_for_replicas(&lab, "each", "global job 0/0 (6/6 completed)");
    let tasks = n1.tasks("each");
    assert!(ran_on.iter().all(|task| tasks.contains(task)), "{ran_on:#?} {tasks:#?}");
    let refused = n1.skep(&["service", "scale", "--detach", "each=2"]).err();
    let expect = "scale can only be used with replicated or replicated-job mode";
    assert!(refused.contains(expect), "{refused}");
    lab.down();
}

/// Never more than two at a time, and all of it again when that is asked.
fn a_job_of_six(lab: &Lab) {
    let n1 = lab.node("n1");
    let flags = ["--mode", "replicated-job", "--replicas", "6", "--max-concurrent", "2"];
    let created = create_job(lab, "six", &[&flags[..], &["--detach"]].concat(), "sleep 1");
    created.ok();
    let done = "replicated job 0/2 (6/6 completed)";
    let all = ["n1", "n2", "n3", "n4", "n5"];
    let mut most = 0;
    let mut run = |iteration: &str| {
        wait_until(SETTLES_WITHIN, iteration, || {
            let n_containers = all.iter().map(|node| lab.containers(node).len()).sum::<usize>();
            let live = n1.tasks("six").iter().filter(|task| task.state() == "Running").count();
            most = most.max(live);
            assert!(live <= 2, "{live} at a time");
            let replicas = replicas(lab, "six");
            let is_over = replicas == done && n_containers == 0;
            (is_over.then_some(()), format!("{replicas}, {n_containers} containers"))
        });
    };
    run("the first iteration");
    let first = n1.tasks("six");
    let mut names: Vec<&str> = first.iter().map(|task| task.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["six.0", "six.1", "six.2", "six.3", "six.4", "six.5"]);

    n1.skep(&["service", "update", "--detach", "--env-add", "A=B", "six"]).ok();
    let forced = n1.skep(&["service", "update", "--force", "six"]).ok();
    assert!(forced.stderr.contains("job complete"), "{forced}");
    run("the third iteration");
    assert_eq!(most, 2);
    let last = n1.tasks("six");
    assert_eq!(last.len(), 6, "{last:#?}");
    assert!(last.iter().all(|task| task.state() == "Complete" && !first.contains(task)));
    let refused = n1.skep(&["service", "update", "--update-delay", "1s", "six"]).err();
    assert!(refused.contains("Jobs may not have an update config"), "{refused}");
}

/// It is over when its attempts are, and says so.
fn a_job_that_fails(lab: &Lab) {
    let flags = ["--mode", "replicated-job", "--replicas", "2"];
    let slot = "SLOT={{.Task.Slot}}";
    let policy = ["--restart-max-attempts", "2", "--restart-delay", "100ms", "--env", slot];
    let script = "test $SLOT = 0";
    let failed = create_job(lab, "bad", &[&flags[..], &policy[..]].concat(), script).err();
    let expect = "1 of 2 tasks of the job failed for good: bad.1: ";
    assert!(failed.contains(expect), "{failed}");
    assert_eq!(replicas(lab, "bad"), "replicated job 0/2 (1/2 completed)");
    let tasks = lab.node("n1").tasks("bad");
    let states = |name: &str| {
        let of = tasks.iter().filter(|task| task.name == name);
        of.map(TaskRow::state).collect::<Vec<&str>>()
    };
    assert_eq!(states("bad.0"), ["Complete"]);
    assert_eq!(states("bad.1"), ["Failed", "Failed", "Failed"]);
}
