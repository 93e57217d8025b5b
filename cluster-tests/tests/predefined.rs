//! The networks that every node has: what containers on them see, reach, and are reached by.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::fs;

use skep_cluster_tests::{Lab, LabOptions, LoadOptions, Whoami, is_root_or_skip};

/// `agent` as Swarm's users write it, `batch` as Compose's do.
const STACK: &str = r#"
x-task: &task
  image: IMAGE
  environment:
    TASK_ID: "{{.Task.ID}}"
    SERVICE_NAME: "{{.Service.Name}}"
  deploy: {placement: {constraints: [node.hostname==n2]}}
services:
  agent:
    <<: *task
    networks: [outer]
  batch:
    <<: *task
    network_mode: none
networks:
  outer:
    external: true
    name: host
"#;
/// The port of whoami.
const PORT: u16 = 8080;

#[test]
fn containers_have_of_their_node_what_their_network_says() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, ..LabOptions::default() });
    lab.import_whoami();
    networks_are_there_without_being_made(&lab);
    lab.deploy_whoami("shop", STACK);
    let n1 = lab.node("n1");
    n1.create_whoami("plain", &["--network", "bridge"]);
    for service in ["shop_agent", "shop_batch", "plain"] {
        lab.wait_until_settled("n1", service, 1);
    }
    host_is_the_node_itself(&lab);
    none_is_a_loopback(&lab);
    bridge_is_a_way_out(&lab);

    let what_is_not = ["--network", "host", "--publish", "80:80"];
    let create = ["service", "create", "--detach", "--name", "wrong"];
    let refused = n1.skep(&[&create[..], &what_is_not, &["whoami"]].concat()).err();
    assert!(refused.contains("cannot be published on network host"), "{refused}");

    // A service moves from one to the other as between networks that were made.
    let change = ["--network-rm", "host", "--network-add", "bridge", "shop_agent"];
    n1.skep(&[&["service", "update"][..], &change].concat()).ok();
    lab.wait_until_settled("n1", "shop_agent", 1);
    assert_eq!(interfaces(&whoami(&lab, "shop_agent")), ["eth0", "lo"]);
    lab.down();
}

fn networks_are_there_without_being_made(lab: &Lab) {
    let n1 = lab.node("n1");
    let format = "{{.Name}} {{.Driver}} {{.Scope}}";
    let list = n1.skep(&["network", "ls", "--format", format]).ok();
    let expect =
        ["bridge bridge local", "host host local", "ingress overlay swarm", "none null local"];
    assert_eq!(list.stdout.lines().collect::<Vec<_>>(), expect);
    assert_eq!(n1.skep(&["network", "inspect", "host"]).ok().json()[0]["Driver"], "host");
    let removed = n1.skep(&["network", "rm", "host"]).err();
    assert!(removed.contains("host is a pre-defined network and cannot be removed"), "{removed}");
    let made = n1.skep(&["network", "create", "none"]).err();
    assert!(made.contains("operation is not permitted on predefined none network"), "{made}");
    assert_eq!(n1.skep(&["network", "prune", "--force"]).ok().stdout, "", "nothing to prune");
}

fn whoami(lab: &Lab, service: &str) -> Whoami {
    lab.whoamis_of(service).pop().unwrap()
}

/// The names of a container's interfaces.
fn interfaces(whoami: &Whoami) -> Vec<String> {
    let table = fs::read_to_string(format!("/proc/{}/net/dev", whoami.pid)).unwrap();
    let names = table.lines().filter_map(|line| line.split_once(':'));
    let names: BTreeSet<String> = names.map(|(name, _)| name.trim().to_owned()).collect();
    names.into_iter().collect()
}

fn host_is_the_node_itself(lab: &Lab) {
    let agent = whoami(lab, "shop_agent");
    let namespace = fs::read_link(format!("/proc/{}/ns/net", agent.pid)).unwrap();
    let of_node = lab.node("n2").exec(&["readlink", "/proc/self/ns/net"]).ok();
    assert_eq!(namespace.to_str().unwrap(), of_node.stdout.trim());
    let url = format!("http://{}:{PORT}/", lab.node("n2").address());
    let report = lab.load("client", &LoadOptions { requests: Some(3), ..LoadOptions::to([url]) });
    let report = report.finish();
    report.assert_none_failed();
    assert_eq!(report.count_by("Service"), [("shop_agent", 3)].into());
    let root = format!("/proc/{}/root", agent.pid);
    let read = |path: &str| fs::read_to_string(path).unwrap();
    assert_eq!(read(&format!("{root}/etc/hostname")), "n2\n");
    assert_eq!(read(&format!("{root}/etc/resolv.conf")), read("/etc/resolv.conf"));
}

fn none_is_a_loopback(lab: &Lab) {
    let batch = whoami(lab, "shop_batch");
    assert_eq!(interfaces(&batch), ["lo"]);
    batch.requests(&[format!("http://127.0.0.1:{PORT}/")], 1).assert_none_failed();
}

fn bridge_is_a_way_out(lab: &Lab) {
    let plain = whoami(lab, "plain");
    assert_eq!(interfaces(&plain), ["eth0", "lo"]);
    let url = format!("http://{}:{PORT}/", lab.node("n2").address());
    let report = plain.requests(&[url], 1);
    report.assert_none_failed();
    assert_eq!(report.count_by("Service"), [("shop_agent", 1)].into());
}
