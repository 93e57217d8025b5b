//! Names inside containers of a real swarm: what they mean, how soon, and while a daemon is away.
//!
//! A container of busybox asks as any program in it would: by its own `/etc/resolv.conf`.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use skep_cluster_tests::{
    BUSYBOX, Lab, LabOptions, Output, Running, SETTLES_WITHIN, is_root_or_skip, skep_binary,
    wait_until,
};
use skep_common::Timestamp;

const NETWORK: &str = "front";
/// How soon a name is right once its node has the table that says so.
const FOLLOWS_WITHIN: Duration = Duration::from_millis(100);
/// What a daemon logs when it takes over a network's table.
const TABLE_CHANGES: &str = "a network's table changes";

#[test]
fn containers_find_services_by_name() {
    if !is_root_or_skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let daemon = Some(talkative_daemon(dir.path().join("skep")));
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, daemon, ..LabOptions::default() });
    lab.import_busybox("n1");
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.skep(&["network", "create", "--subnet", "10.30.0.0/24", NETWORK]).ok();
    n1.skep(&["network", "create", "other"]).ok();
    let alias = format!("name={NETWORK},alias=www");
    let host = ["--hostname", "{{.Service.Name}}-host-{{.Task.Slot}}"];
    n1.create_whoami("web", &[&["--replicas", "3", "--network", &alias], &host[..]].concat());
    n1.create_whoami("dnsrr", &["--network", NETWORK, "--endpoint-mode", "dnsrr"]);
    n1.create_whoami("hidden", &["--network", "other"]);
    let here = ["--network", NETWORK, "--constraint", "node.hostname==n2"];
    let create = ["service", "create", "--detach", "--name", "asker", "--restart-delay", "1s"];
    n1.skep(&[&create[..], &here, &[BUSYBOX, "sleep", "100000"]].concat()).ok();
    for (service, n_tasks) in [("web", 3), ("dnsrr", 1), ("hidden", 1)] {
        lab.wait_until_settled("n1", service, n_tasks);
    }
    let asker = Asker::of(&lab, "asker");
    step("what names mean");
    names_mean_addresses(&asker);
    step("single tasks");
    names_mean_single_tasks(&asker);
    step("what they do not");
    names_of_others_mean_nothing(&asker);
    step("a name server");
    a_name_server_has_port_53_to_itself(&asker);
    step("names follow tasks");
    names_follow_tasks(&asker);
    step("names are right at once");
    names_follow_tables_at_once(&asker);
    step("a daemon that is away");
    a_question_waits_for_a_daemon_that_is_away(&asker);
    step("the daemon that came back");
    names_mean_addresses(&asker);
    lab.down();
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

/// A container that asks.
struct Asker<'a> {
    lab: &'a Lab,
    /// Its first process, as its node numbers it.
    pid: String,
}

impl<'a> Asker<'a> {
    /// The container of a service with one task, on n2.
    fn of(lab: &'a Lab, service: &str) -> Self {
        let id = wait_until(SETTLES_WITHIN, &format!("{service} runs"), || {
            let tasks = lab.node("n1").tasks(service);
            let running = tasks.iter().find(|task| task.is_running());
            (running.map(|task| task.id.clone()), format!("{tasks:#?}"))
        });
        let pid = lab.containers("n2").remove(&id).expect("its container runs").to_string();
        Self { lab, pid }
    }

    fn command<'b>(&'b self, words: &[&'b str]) -> Vec<&'b str> {
        let enter = ["nsenter", "--target", &self.pid, "--mount", "--net", "--", "/bin/busybox"];
        [&enter[..], words].concat()
    }

    fn nslookup(&self, words: &[&str]) -> Output {
        self.lab.node("n2").exec(&self.command(&[&["nslookup"], words].concat()))
    }

    /// What a name means, IPv4.
    fn find(&self, name: &str) -> BTreeSet<IpAddr> {
        addresses(&self.nslookup(&["-type=a", name]).ok().stdout)
    }
}

/// The addresses behind the names of an answer: that of the resolver comes first, without one.
fn addresses(text: &str) -> BTreeSet<IpAddr> {
    let (_, answer) = text.split_once("Name:").unwrap_or_default();
    let found = answer.lines().filter_map(|line| line.strip_prefix("Address: "));
    found.map(|address| address.parse().unwrap()).collect()
}

fn virtual_ip(lab: &Lab, service: &str) -> IpAddr {
    let service = lab.node("n1").skep(&["service", "inspect", service]).ok().json();
    let address = service[0]["Endpoint"]["VirtualIPs"][0]["Addr"].as_str().unwrap().to_owned();
    address.split_once('/').unwrap().0.parse().unwrap()
}

fn names_mean_addresses(asker: &Asker) {
    let web = virtual_ip(asker.lab, "web");
    for name in ["web", "WEB", "www", "web.front"] {
        assert_eq!(asker.find(name), [web].into(), "{name}");
    }
    let tasks = asker.find("tasks.web");
    assert!(!tasks.is_empty() && !tasks.contains(&web), "{tasks:?}");
    assert_eq!(asker.find("dnsrr"), asker.find("tasks.dnsrr"), "it has no virtual address");
    let reverse = asker.nslookup(&[&web.to_string()]).ok();
    assert!(reverse.stdout.contains("name = web.front"), "{reverse}");
    // The name exists: an answer without addresses, not one that there is no such name.
    let ipv6 = asker.nslookup(&["-type=aaaa", "web"]);
    assert!(!ipv6.to_string().contains("NXDOMAIN"), "{ipv6}");
}

fn names_mean_single_tasks(asker: &Asker) {
    let tasks = asker.find("tasks.web");
    let slot = asker.find("web.2");
    assert!(slot.len() == 1 && slot.is_subset(&tasks), "{slot:?} of {tasks:?}");
    for name in ["web.2.front", "web-host-2", "web-host-2.front"] {
        assert_eq!(asker.find(name), slot, "{name}");
    }
    let places = asker.nslookup(&["-type=srv", "_80._tcp.web"]).ok().stdout;
    let places: BTreeSet<&str> =
        places.lines().filter(|line| line.starts_with("_80._tcp.web\tservice = 0 0 80 ")).collect();
    assert_eq!(places.len(), tasks.len(), "{places:?}");
    let target = places.first().unwrap().rsplit(' ').next().unwrap();
    assert!(asker.find(target).is_subset(&tasks), "{target}");
    // Addresses of the network are never asked of others, who would say that there is no such name.
    let reverse = slot.first().unwrap().to_string();
    let reverse: Vec<&str> = reverse.rsplit('.').collect();
    let reverse = format!("{}.in-addr.arpa", reverse.join("."));
    let answer = asker.nslookup(&["-type=a", &reverse]);
    assert!(!answer.to_string().contains("NXDOMAIN"), "{answer}");
}

fn names_of_others_mean_nothing(asker: &Asker) {
    for name in ["hidden", "nobody"] {
        let answer = asker.nslookup(&["-type=a", name]);
        assert!(answer.to_string().contains("NXDOMAIN"), "{name}: {answer}");
    }
    // Names with a dot may be those of others: what the host's resolvers say depends on the machine.
    let answer = asker.nslookup(&["-type=a", "tasks.hidden"]);
    assert_eq!(addresses(&answer.stdout), BTreeSet::new(), "{answer}");
}

/// An image that is a name server itself, as the questions of its own programs go elsewhere.
fn a_name_server_has_port_53_to_itself(asker: &Asker) {
    let n1 = asker.lab.node("n1");
    let serve = "while :; do echo its own answer | busybox nc -l -p 53; done";
    let here = ["--network", NETWORK, "--constraint", "node.hostname==n2"];
    let create = ["service", "create", "--detach", "--name", "resolver"];
    n1.skep(&[&create[..], &here, &[BUSYBOX, "sh", "-c", serve]].concat()).ok();
    let resolver = Asker::of(asker.lab, "resolver");
    assert_eq!(resolver.find("web"), [virtual_ip(asker.lab, "web")].into());
    let ask = asker.command(&["nc", "-w", "5", "resolver", "53"]);
    wait_until(SETTLES_WITHIN, "the name server answers on port 53", || {
        let answer = asker.lab.node("n2").exec(&ask);
        let is_its_own = answer.stdout == "its own answer\n";
        (is_its_own.then_some(()), answer.to_string())
    });
    n1.skep(&["service", "rm", "resolver"]).ok();
}

fn names_follow_tasks(asker: &Asker) {
    assert_eq!(asker.find("tasks.web").len(), 3);
    for n_tasks in [1, 4] {
        asker
            .lab
            .node("n1")
            .skep(&["service", "scale", "--detach", &format!("web={n_tasks}")])
            .ok();
        wait_until(SETTLES_WITHIN, "tasks.web are those that serve", || {
            let found = asker.find("tasks.web");
            ((found.len() == n_tasks).then_some(()), format!("{found:?}"))
        });
    }
}

/// A program that runs `skep` and has its daemon log what nodes are told of networks.
fn talkative_daemon(path: PathBuf) -> PathBuf {
    let program = skep_binary();
    let script = format!(
        "#!/bin/sh\nSKEP_LOG=info,openraft=error,skep_worker::embedded=debug exec {} \"$@\"\n",
        program.display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Asks without a pause while the service grows. What managers and containers take does not count: from the
/// node's table to the answer is the time.
fn names_follow_tables_at_once(asker: &Asker) {
    const N_TASKS: usize = 5;
    let ask = "while :; do /bin/busybox nslookup -type=a tasks.web 127.0.0.11; \
               date --utc +answered=%Y-%m-%dT%H:%M:%S.%NZ; done";
    let words = ["nsenter", "--target", &asker.pid, "--net", "--", "sh", "-c", ask];
    let asking = asker.lab.start_command("n2", &words);
    let n1 = asker.lab.node("n1");
    n1.skep(&["service", "scale", "--detach", &format!("web={N_TASKS}")]).ok();
    let answered_at = wait_until(SETTLES_WITHIN, "tasks.web has grown", || {
        let lines = asking.lines();
        (first_answer_of(N_TASKS, &lines), format!("it printed {} lines", lines.len()))
    });
    let log = asker.lab.node("n2").log();
    let counts = [format!("network=\"{NETWORK}\""), format!("serving={}", N_TASKS + 2)];
    let is_wanted = |line: &&str| {
        line.contains(TABLE_CHANGES) && counts.iter().all(|count| line.contains(count))
    };
    let lines: Vec<&str> = log.lines().filter(is_wanted).collect();
    // Asker and dnsrr are on the network too; it is scaled to this number once.
    let changed_at: Timestamp = lines[0].split_whitespace().next().unwrap().parse().unwrap();
    let took = answered_at.since(changed_at);
    assert!(took <= FOLLOWS_WITHIN, "answered {took:?} after {}", lines[0]);
}

/// When the first answer came that has so many addresses.
fn first_answer_of(n_addresses: usize, lines: &[String]) -> Option<Timestamp> {
    let mut n_found = 0;
    for line in lines {
        match line.strip_prefix("answered=") {
            Some(at) if n_found == n_addresses => return Some(at.parse().unwrap()),
            Some(_) => n_found = 0,
            None => n_found += usize::from(line.starts_with("Address: ")),
        }
    }
    None
}

fn a_question_waits_for_a_daemon_that_is_away(asker: &Asker) {
    let web = virtual_ip(asker.lab, "web");
    asker.lab.kill_daemon(&["n2"]);
    let words = asker.command(&["nslookup", "-type=a", "web"]);
    let question: Running = asker.lab.start_command("n2", &words);
    asker.lab.start_nodes(&["n2"]);
    let (status, lines) = question.finish(SETTLES_WITHIN);
    assert!(status.success(), "{lines}");
    assert_eq!(addresses(&lines), [web].into(), "{lines}");
}
