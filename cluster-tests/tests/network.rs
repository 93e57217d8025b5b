//! Overlay networks of a real swarm: who reaches whom by virtual addresses, and what is left after.
//!
//! Tasks are told apart by their answers; the virtual addresses are those that the client shows. The
//! load client tries nothing twice.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, Whoami, is_root_or_skip, wait_until};

const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];
const FRONT: &str = "shop_front";
const BACK: &str = "shop_back";
const WEB: &str = "shop_web";
const API: &str = "shop_api";
const DB: &str = "shop_db";
const N_APIS: usize = 3;
/// Where the daemons keep the namespaces of networks.
const NAMESPACES: &str = "/run/skep/netns";

/// `web` is on one network, `db` on the other, `api` on both; each on nodes of its own.
const STACK: &str = r#"
x-task: &task
  image: IMAGE
  stop_grace_period: 5s
  environment: &environment
    TASK_SLOT: "{{.Task.Slot}}"
    TASK_ID: "{{.Task.ID}}"
    NODE_HOSTNAME: "{{.Node.Hostname}}"
    SERVICE_NAME: "{{.Service.Name}}"
  healthcheck: {test: ["CMD", "/whoami", "healthcheck"], interval: 1s, timeout: 20s, retries: 5}
services:
  web:
    <<: *task
    networks: [front]
    deploy: {placement: {constraints: [node.hostname==n1]}}
  api:
    <<: *task
    networks: [front, back]
    deploy:
      replicas: 3
      placement: {constraints: [node.hostname!=n1, node.hostname!=n5], max_replicas_per_node: 1}
  db:
    <<: *task
    networks: [back]
    deploy: {placement: {constraints: [node.hostname==n5]}}
networks:
  front:
  back:
    internal: true
"#;

#[test]
fn networks_connect_those_that_are_on_them() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions::default());
    lab.import_whoami();
    let links = NODES.map(|node| links(&lab, node));
    step("the client's commands");
    commands_make_show_and_remove_networks(&lab);
    step("a stack with two networks");
    deploy(&lab);
    wait_until_the_stack_runs(&lab);
    let ids = BTreeSet::from([id(&lab, FRONT), id(&lab, BACK)]);
    step("nodes");
    nodes_have_the_networks_of_their_tasks(&lab);
    step("virtual addresses");
    virtual_addresses_lead_to_each_task_in_turn(&lab);
    step("apart");
    tasks_of_different_networks_do_not_reach_each_other(&lab);
    step("a network in use");
    a_network_in_use_is_not_removed(&lab);
    step("services that join and leave");
    services_join_and_leave_networks(&lab);
    step("a rolling update");
    a_rolling_update_fails_no_request(&lab);
    step("a daemon that starts again");
    a_daemon_that_starts_again_disturbs_nothing(&lab);
    step("a node that dies");
    a_dead_node_gets_no_requests(&lab);
    step("removed and deployed at once");
    lab.node("n1").skep(&["stack", "rm", "shop"]).ok();
    deploy(&lab);
    wait_until_the_stack_runs(&lab);
    assert!(ids.is_disjoint(&[id(&lab, FRONT), id(&lab, BACK)].into()), "they are new networks");
    virtual_addresses_lead_to_each_task_in_turn(&lab);
    step("removed");
    lab.node("n1").skep(&["stack", "rm", "shop"]).ok();
    assert_eq!(names(&lab), ["ingress"], "their names are free at once");
    wait_until_nothing_is_left(&lab, &links);
    lab.down();
}

#[test]
fn a_swarm_may_have_a_pool_of_its_own() {
    if !is_root_or_skip() {
        return;
    }
    let lab =
        Lab::start(LabOptions { managers: 1, workers: 0, swarm: false, ..LabOptions::default() });
    let n1 = lab.node("n1");
    let init = ["swarm", "init", "--default-addr-pool", "172.16.0.0/14"];
    let length = |length| [&init[..], &["--default-addr-pool-mask-length", length]].concat();
    let refused = n1.skep(&length("13")).err();
    assert!(refused.contains("mask length 13 is not a number from 14 to 30"), "{refused}");
    n1.skep(&length("24")).ok();
    for (name, subnet) in [("one", "172.16.0.0/24"), ("two", "172.16.1.0/24")] {
        n1.skep(&["network", "create", name]).ok();
        assert_eq!(inspect(&lab, name)["IPAM"]["Config"][0]["Subnet"], subnet);
    }
    lab.down();
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

fn deploy(lab: &Lab) {
    let output = lab.deploy_whoami("shop", STACK);
    assert!(!output.stderr.contains("network"), "no warning: {output}");
}

fn wait_until_the_stack_runs(lab: &Lab) {
    for (service, n_tasks) in [(WEB, 1), (API, N_APIS), (DB, 1)] {
        lab.wait_until_settled("n1", service, n_tasks);
    }
}

fn names(lab: &Lab) -> Vec<String> {
    let list = ["network", "ls", "--filter", "scope=swarm", "--format", "{{.Name}}"];
    let output = lab.node("n1").skep(&list).ok();
    output.stdout.lines().map(str::to_owned).collect()
}

fn inspect(lab: &Lab, network: &str) -> Value {
    lab.node("n1").skep(&["network", "inspect", "--verbose", network]).ok().json()[0].clone()
}

fn id(lab: &Lab, network: &str) -> String {
    inspect(lab, network)["Id"].as_str().unwrap().to_owned()
}

/// The virtual address of a service on a network.
#[track_caller]
fn virtual_ip(lab: &Lab, service: &str, network: &str) -> String {
    let network_id = id(lab, network);
    let service = lab.node("n1").skep(&["service", "inspect", service]).ok().json();
    let all = service[0]["Endpoint"]["VirtualIPs"].as_array().unwrap().clone();
    let found = all.iter().find(|vip| vip["NetworkID"] == network_id.as_str());
    let address = found.unwrap_or_else(|| panic!("none of {all:?} is of {network}"));
    address["Addr"].as_str().unwrap().split_once('/').unwrap().0.to_owned()
}

fn url(address: &str) -> [String; 1] {
    [format!("http://{address}:8080/")]
}

fn only(lab: &Lab, service: &str) -> Whoami {
    let [task] = &lab.whoamis_of(service)[..] else { panic!("one container of {service}") };
    task.clone()
}

fn commands_make_show_and_remove_networks(lab: &Lab) {
    let n1 = lab.node("n1");
    let create = ["network", "create", "--subnet", "10.20.0.0/24", "own"];
    let printed = n1.skep(&create).ok();
    assert_eq!(printed.text(), id(lab, "own"), "it prints the id");
    assert_eq!(names(lab), ["ingress", "own"]);
    assert_eq!(inspect(lab, "own")["IPAM"]["Config"][0]["Subnet"], "10.20.0.0/24");
    let again = n1.skep(&create).err();
    assert!(again.contains("network with name own already exists"), "{again}");
    n1.create_whoami("user", &["--network", "own"]);
    lab.wait_until_settled("n1", "user", 1);
    assert!(virtual_ip(lab, "user", "own").starts_with("10.20.0."));
    let used = n1.skep(&["network", "rm", "own"]).err();
    assert!(used.contains("network own is in use by service user"), "{used}");
    // Any manager answers.
    lab.node("n2").skep(&["service", "rm", "user"]).ok();
    lab.node("n2").skep(&["network", "rm", "own"]).ok();
    assert_eq!(names(lab), ["ingress"]);
    let gone = n1.skep(&["network", "inspect", "own"]).err();
    assert!(gone.contains("network \"own\" not found"), "{gone}");
    let ingress = n1.skep(&["network", "rm", "ingress"]).err();
    assert!(
        ingress.contains("ingress is a pre-defined network and cannot be removed"),
        "{ingress}"
    );
}

/// Others would be told of every task of every network, for nothing.
fn nodes_have_the_networks_of_their_tasks(lab: &Lab) {
    let (front, back) = (id(lab, FRONT), id(lab, BACK));
    for node in NODES {
        let expect = match node {
            "n1" => BTreeSet::from([front.clone()]),
            "n5" => BTreeSet::from([back.clone()]),
            _ => BTreeSet::from([front.clone(), back.clone()]),
        };
        // The network of an earlier service is taken down behind its last task.
        wait_until(SETTLES_WITHIN, &format!("{node} has the networks of its tasks"), || {
            let now = namespaces(lab, node);
            ((now == expect).then_some(()), format!("{now:?}, not {expect:?}"))
        });
    }
}

fn virtual_addresses_lead_to_each_task_in_turn(lab: &Lab) {
    let turns = |from: &Whoami, service: &str, network: &str, n_requests: usize| {
        let report = from.requests(&url(&virtual_ip(lab, service, network)), n_requests);
        report.assert_none_failed();
        let counts = report.count_by("Slot");
        counts.into_iter().map(|(slot, n)| (slot.to_owned(), n)).collect::<BTreeMap<_, _>>()
    };
    let each = |n: usize| ["1", "2", "3"].map(|slot| (slot.to_owned(), n)).into();
    for (from, network) in [(WEB, FRONT), (DB, BACK)] {
        assert_eq!(turns(&only(lab, from), API, network, 10 * N_APIS), each(10), "from {from}");
    }
    for api in lab.whoamis_of(API) {
        for (service, network) in [(WEB, FRONT), (DB, BACK)] {
            let expect = [("1".to_owned(), 5)].into();
            assert_eq!(turns(&api, service, network, 5), expect, "{} to {service}", api.node);
        }
        assert_eq!(turns(&api, API, FRONT, N_APIS), each(1), "its own service too");
    }
}

fn tasks_of_different_networks_do_not_reach_each_other(lab: &Lab) {
    for (from, service, network) in [(WEB, DB, BACK), (DB, WEB, FRONT)] {
        let tasks = inspect(lab, network)["Services"][service]["Tasks"].clone();
        let of_task = tasks[0]["EndpointIP"].as_str().unwrap().to_owned();
        for address in [virtual_ip(lab, service, network), of_task] {
            let report = only(lab, from).requests(&url(&address), 1);
            assert_eq!(report.summary.ok, 0, "{from} reaches {service}: {report:#?}");
        }
    }
    // The other address of a task that is on both.
    let address = virtual_ip(lab, API, BACK);
    assert_eq!(only(lab, WEB).requests(&url(&address), 1).summary.ok, 0, "web is not on back");
}

fn a_network_in_use_is_not_removed(lab: &Lab) {
    let refused = lab.node("n1").skep(&["network", "rm", FRONT]).err();
    assert!(refused.contains(&format!("network {FRONT} is in use by service shop_")), "{refused}");
    assert_eq!(names(lab), ["ingress", BACK, FRONT]);
    virtual_addresses_lead_to_each_task_in_turn(lab);
}

/// As long as `is_over` is not, each request of `web` to the virtual address of `api` is answered.
#[track_caller]
fn answers_until(lab: &Lab, what: &str, mut is_over: impl FnMut() -> bool) {
    let (web, urls) = (only(lab, WEB), url(&virtual_ip(lab, API, FRONT)));
    wait_until(SETTLES_WITHIN, what, || {
        web.requests(&urls, 30).assert_none_failed();
        (is_over().then_some(()), String::new())
    });
    web.requests(&urls, 30).assert_none_failed();
}

fn services_join_and_leave_networks(lab: &Lab) {
    let n1 = lab.node("n1");
    let db = url(&virtual_ip(lab, DB, BACK));
    let before = lab.wait_until_settled("n1", WEB, 1);
    for (flag, n_answers) in [("--network-add", 5), ("--network-rm", 0)] {
        let id = only(lab, WEB).task;
        n1.skep(&["service", "update", "--detach", flag, BACK, WEB]).ok();
        n1.wait_for_tasks(WEB, "the task is a new one", |tasks| {
            tasks.iter().any(|task| task.is_running() && task.id != id).then_some(())
        });
        lab.wait_until_settled("n1", WEB, 1);
        let n_requests = n_answers.max(1);
        assert_eq!(only(lab, WEB).requests(&db, n_requests).summary.ok, n_answers as u64, "{flag}");
    }
    let after = lab.wait_until_settled("n1", WEB, 1);
    assert_ne!(before[0].id, after[0].id);
    virtual_addresses_lead_to_each_task_in_turn(lab);
}

fn a_rolling_update_fails_no_request(lab: &Lab) {
    let n1 = lab.node("n1");
    let before: BTreeSet<String> = lab.whoamis_of(API).into_iter().map(|api| api.task).collect();
    let update = ["service", "update", "--detach", "--env-add", "ROUND=2"];
    n1.skep(&[&update[..], &["--update-monitor", "500ms", API]].concat()).ok();
    answers_until(lab, "the update is complete", || {
        n1.skep(&["service", "inspect", API]).ok().json()[0]["UpdateStatus"]["State"] == "completed"
    });
    let after = lab.wait_until_settled("n1", API, N_APIS);
    assert!(after.iter().all(|task| !before.contains(&task.id)), "{before:?} {after:#?}");
    virtual_addresses_lead_to_each_task_in_turn(lab);
}

/// Both daemons of a connection: the client's and one of a task behind the address.
fn a_daemon_that_starts_again_disturbs_nothing(lab: &Lab) {
    let restarted = ["n1", "n3"];
    let tasks: BTreeSet<String> = lab.whoamis_of(API).into_iter().map(|api| api.task).collect();
    let (web, urls) = (only(lab, WEB), url(&virtual_ip(lab, API, FRONT)));
    lab.kill_daemon(&restarted);
    web.requests(&urls, 100).assert_none_failed();
    lab.start_nodes(&restarted);
    for node in restarted {
        lab.wait_for_node("n2", node, "Ready");
        web.requests(&urls, 100).assert_none_failed();
    }
    lab.wait_until_settled("n1", API, N_APIS);
    let now: BTreeSet<String> = lab.whoamis_of(API).into_iter().map(|api| api.task).collect();
    assert_eq!(now, tasks, "they run on");
    nodes_have_the_networks_of_their_tasks(lab);
    virtual_addresses_lead_to_each_task_in_turn(lab);
}

fn a_dead_node_gets_no_requests(lab: &Lab) {
    let dead = "n4";
    let slot = |node: &str| {
        let tasks = lab.wait_until_settled("n1", API, N_APIS);
        tasks.iter().find(|task| task.node == node).unwrap().slot.to_string()
    };
    let dead_slot = slot(dead);
    lab.kill(&[dead]);
    lab.wait_for_node("n1", dead, "Down");
    let (web, urls) = (only(lab, WEB), url(&virtual_ip(lab, API, FRONT)));
    let report = web.requests(&urls, 30);
    report.assert_none_failed();
    let turns = report.count_by("Slot");
    assert!(turns.len() == 2 && !turns.contains_key(dead_slot.as_str()), "{turns:?}");
    // No other node may have its task.
    lab.start_nodes(&[dead]);
    lab.wait_for_node("n1", dead, "Ready");
    lab.wait_until_settled("n1", API, N_APIS);
    virtual_addresses_lead_to_each_task_in_turn(lab);
}

/// The interfaces of a node.
fn links(lab: &Lab, node: &str) -> BTreeSet<String> {
    let text = lab.node(node).exec(&["cat", "/proc/net/dev"]).ok().stdout;
    let lines = text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    lines.collect()
}

/// The networks that a node has made, by their ids.
fn namespaces(lab: &Lab, node: &str) -> BTreeSet<String> {
    let script = format!("[ ! -d {NAMESPACES} ] || ls {NAMESPACES}");
    let listed = lab.node(node).exec(&["sh", "-c", &script]).ok().stdout;
    listed.lines().map(str::to_owned).collect()
}

fn wait_until_nothing_is_left(lab: &Lab, links_before: &[BTreeSet<String>; 5]) {
    for (node, before) in NODES.into_iter().zip(links_before) {
        wait_until(SETTLES_WITHIN, &format!("nothing of networks is left on {node}"), || {
            let now = links(lab, node);
            let namespaces = namespaces(lab, node);
            let is_clean = now == *before && namespaces.is_empty();
            (is_clean.then_some(()), format!("{now:?} after {before:?}; {namespaces:?}"))
        });
    }
}
