//! A network with a thousand tasks on this one machine. Only `make test-long` runs it.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use skep_cluster_tests::{Lab, LabOptions, Whoami, is_long, is_root_or_skip, wait_until};
use skep_runtime::clock::monotonic;

const N_SERVICES: usize = 50;
const N_REPLICAS: usize = 20;
const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];
/// A thousand containers start and stop within it on two busy cores.
const SETTLES_WITHIN: Duration = Duration::from_secs(600);
/// A node hears of a thousand tasks while it starts two hundred.
const HEARD_WITHIN: Duration = Duration::from_secs(30);

#[test]
fn a_network_holds_a_thousand_tasks() {
    if !is_long() {
        eprintln!("skipped: only make test-long runs it");
        return;
    }
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions::default());
    lab.import_whoami();
    let started = monotonic();
    lab.deploy_whoami("large", &stack());
    let expect: BTreeMap<String, String> =
        (1..=N_SERVICES).map(|n| (name(n), format!("{N_REPLICAS}/{N_REPLICAS}"))).collect();
    wait_until(SETTLES_WITHIN, "all tasks run", || {
        let now = replicas(&lab);
        let missing: Vec<_> =
            now.iter().filter(|(name, n)| expect.get(*name) != Some(*n)).collect();
        ((now == expect).then_some(()), format!("{missing:?}"))
    });
    eprintln!("-- {} tasks run after {:?}", N_SERVICES * N_REPLICAS, started.elapsed());
    let urls: Vec<String> = (1..=N_SERVICES).map(|n| virtual_url(&lab, &name(n))).collect();
    let askers = lab.whoamis_of(&name(1));
    for node in NODES {
        let asker = askers.iter().find(|whoami| whoami.node == node).unwrap();
        every_task_answers_once(asker, &urls);
    }
    let started = monotonic();
    lab.node("n1").skep(&["service", "scale", "--detach", &format!("{}=10", name(1))]).ok();
    wait_until(SETTLES_WITHIN, "half of the tasks of one service are gone", || {
        let left = lab.whoamis_of(&name(1)).len();
        ((left == N_REPLICAS / 2).then_some(()), left.to_string())
    });
    eprintln!("-- scaled down after {:?}", started.elapsed());
    let asker = lab.whoamis_of(&name(2)).remove(0);
    let report = asker.requests(&urls[..1], N_REPLICAS);
    report.assert_none_failed();
    let counts = report.count_by("Slot");
    assert!(counts.len() == N_REPLICAS / 2 && counts.values().all(|n| *n == 2), "{counts:?}");
    lab.down();
}

fn stack() -> String {
    let mut services = String::from("services:\n");
    for n in 1..=N_SERVICES {
        let environment = "TASK_SLOT: \"{{.Task.Slot}}\", SERVICE_NAME: \"{{.Service.Name}}\", \
             NODE_HOSTNAME: \"{{.Node.Hostname}}\"";
        writeln!(services, "  s{n}:").unwrap();
        writeln!(services, "    image: IMAGE").unwrap();
        writeln!(services, "    environment: {{{environment}}}").unwrap();
        writeln!(services, "    deploy: {{replicas: {N_REPLICAS}}}").unwrap();
    }
    services
}

fn name(n: usize) -> String {
    format!("large_s{n}")
}

fn replicas(lab: &Lab) -> BTreeMap<String, String> {
    let output =
        lab.node("n1").skep(&["service", "ls", "--format", "{{.Name}} {{.Replicas}}"]).ok();
    let pairs = output.stdout.lines().filter_map(|line| line.split_once(' '));
    pairs.map(|(name, n)| (name.to_owned(), n.to_owned())).collect()
}

fn virtual_url(lab: &Lab, service: &str) -> String {
    let inspected = lab.node("n1").skep(&["service", "inspect", service]).ok().json();
    let address = inspected[0]["Endpoint"]["VirtualIPs"][0]["Addr"].as_str().unwrap();
    format!("http://{}:8080/", address.split_once('/').unwrap().0)
}

/// As many requests to each address as there are tasks behind it: each takes its turn as soon as the node
/// has heard of the last ones, which managers know before. None fails meanwhile.
fn every_task_answers_once(asker: &Whoami, urls: &[String]) {
    let started = monotonic();
    wait_until(HEARD_WITHIN, &format!("exact turns from {}", asker.node), || {
        let report = asker.requests(urls, urls.len() * N_REPLICAS);
        report.assert_none_failed();
        let mut answers: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for record in &report.records {
            *answers.entry((record.field("Service"), record.field("Slot"))).or_default() += 1;
        }
        let uneven: Vec<_> = answers.iter().filter(|(_, n)| **n != 1).collect();
        let is_exact = answers.len() == N_SERVICES * N_REPLICAS && uneven.is_empty();
        (is_exact.then_some(()), format!("{} tasks answered, {uneven:?}", answers.len()))
    });
    eprintln!("-- exact turns from {} after {:?}", asker.node, started.elapsed());
}
