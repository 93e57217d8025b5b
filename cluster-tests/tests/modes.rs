//! Services whose tasks are not a number of replicas: global ones, on nodes that come and go.

use skep_cluster_tests::{
    Lab, LabOptions, SETTLES_WITHIN, TaskRow, WHOAMI, is_root_or_skip, wait_until,
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

    let refused = n1.skep(&["service", "scale", "--detach", "agent=2"]).err();
    assert!(refused.contains("scale can only be used with replicated mode"), "{refused}");
    let changed = n1.skep(&["service", "create", "--detach", "--mode", "global-job", WHOAMI]).err();
    assert!(changed.contains("use Replicated or Global"), "{changed}");
    n1.skep(&["service", "rm", "agent"]).ok();
    wait_until(SETTLES_WITHIN, "the service is gone", || {
        let listed = n1.skep(&["service", "ls", "--format", "{{.Name}}"]).ok();
        let whoamis = lab.whoamis_of("agent");
        let is_gone = listed.stdout.trim().is_empty() && whoamis.is_empty();
        (is_gone.then_some(()), format!("{listed}\n{whoamis:#?}"))
    });
    lab.down();
}
