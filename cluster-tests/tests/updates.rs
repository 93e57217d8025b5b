//! Start-first updates: of a service that is being asked, and of one whose tasks cannot run twice on a node.

use std::collections::BTreeSet;

use skep_cluster_tests::{
    Lab, LabOptions, Load, LoadOptions, SETTLES_WITHIN, TaskRow, is_root_or_skip, wait_until,
};

const NODES: [&str; 3] = ["n1", "n2", "n3"];

fn ids(tasks: &[TaskRow]) -> BTreeSet<&str> {
    tasks.iter().map(|task| task.id.as_str()).collect()
}

fn urls(lab: &Lab, port: u16) -> Vec<String> {
    let url = |node| format!("http://{}:{port}/", lab.node(node).address());
    NODES.map(url).into()
}

fn load(lab: &Lab, keep_alive: bool) -> Load {
    lab.load("client", &LoadOptions { keep_alive, clients: 2, ..LoadOptions::to(urls(lab, 8080)) })
}

#[test]
fn start_first_updates_lose_nothing() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    a_port_is_added_under_load(&lab);
    a_task_gives_way_where_its_successor_fits_nowhere_else(&lab);
    lab.down();
}

/// With a port and a variable more at once, which replaces every task.
fn a_port_is_added_under_load(lab: &Lab) {
    let n1 = lab.node("n1");
    let order = ["--update-order", "start-first", "--update-monitor", "1s"];
    let flags = ["--replicas", "3", "--publish", "8080:8080"];
    n1.create_whoami("web", &[&flags[..], &order[..]].concat());
    let before = lab.wait_until_settled("n1", "web", 3);
    let loads = [false, true].map(|keep_alive| load(lab, keep_alive));
    loads.iter().for_each(|load| load.wait_for_more(50, SETTLES_WITHIN));

    n1.skep(&["service", "update", "--publish-add", "8081:8080", "web"]).ok();
    let added =
        lab.load("client", &LoadOptions { requests: Some(30), ..LoadOptions::to(urls(lab, 8081)) });
    added.finish().assert_none_failed();
    assert_eq!(lab.wait_until_settled("n1", "web", 3), before, "a port alone replaces nothing");

    let change = ["--publish-add", "8082:8080", "--env-add", "A=B"];
    n1.skep(&[&["service", "update"], &change[..], &["web"]].concat()).ok();
    let after = lab.wait_until_settled("n1", "web", 3);
    assert!(ids(&after).is_disjoint(&ids(&before)), "{after:#?}");
    let added =
        lab.load("client", &LoadOptions { requests: Some(30), ..LoadOptions::to(urls(lab, 8082)) });
    added.finish().assert_none_failed();
    for load in loads {
        load.wait_for_more(50, SETTLES_WITHIN);
        let report = load.stop();
        eprintln!("{} requests", report.summary.requests);
        report.assert_none_failed();
    }
    n1.skep(&["service", "rm", "web"]).ok();
}

/// A port in host mode on each node: the update of each task is a stop-first one, and ends.
fn a_task_gives_way_where_its_successor_fits_nowhere_else(lab: &Lab) {
    let n1 = lab.node("n1");
    let port = ["--publish", "mode=host,published=9000,target=8080"];
    let order = ["--update-order", "start-first", "--update-monitor", "1s"];
    n1.create_whoami("held", &[&["--replicas", "3"], &port[..], &order[..]].concat());
    let before = lab.wait_until_settled("n1", "held", 3);
    let updated = n1.skep(&["service", "update", "--env-add", "A=B", "held"]).ok();
    assert!(updated.stderr.contains("start-first stops the old task first"), "{updated}");
    let after = lab.wait_until_settled("n1", "held", 3);
    assert!(ids(&after).is_disjoint(&ids(&before)), "{after:#?}");
    wait_until(SETTLES_WITHIN, "the port answers on every node", || {
        let options = LoadOptions { requests: Some(6), ..LoadOptions::to(urls(lab, 9000)) };
        let report = lab.load("client", &options).finish();
        ((report.summary.failed == 0).then_some(()), format!("{:?}", report.summary))
    });
}
