//! A task on another node, reached directly over the tunnel, through the mesh and by HAProxy.
//!
//! The client is in the network of n1, the tasks are on n2. All three ways cross the same tunnel, and
//! take turns, so that what else the machine does meets all of them alike; what is compared is
//! always of the same round.
//!
//! Each way has a task of its own, all alike. A task that closes a connection remembers its ports
//! for a minute, and takes them again from the same client only with a later timestamp (RFC 7323,
//! section 5.2). Linux begins timestamps elsewhere for each pair of addresses, and the address that a
//! client connects to is another one for each way: at one task, each way would lose the first
//! packets of many connections to what another way left behind.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use skep_cluster_tests::{Lab, SETTLES_WITHIN, skep_binary, wait_until};

use super::figures::{Samples, Target, Unit, load_average};
use super::{is_installed, start_lab};

/// The ways, and the service of each.
const DIRECT: &str = "direct";
const MESH: &str = "mesh";
const PROXIED: &str = "haproxy";
const PORT: u16 = 8080;
const PROXY_PORT: u16 = 9080;
const N_CONNECTIONS: &str = "16";
const OF_DIRECT: Target = Target::AtLeast(0.9);
const OF_PROXY: Target = Target::AtLeast(1.1);

/// How requests are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    KeepAlive,
    NewConnections,
}

impl Kind {
    const ALL: [Self; 2] = [Self::KeepAlive, Self::NewConnections];

    fn name(self) -> &'static str {
        match self {
            Self::KeepAlive => "keep-alive requests",
            Self::NewConnections => "new connections",
        }
    }
}

/// A way to the task.
struct Way {
    name: &'static str,
    url: String,
}

pub(crate) fn run(is_quick: bool) {
    if !is_installed("wrk") {
        println!("not measured: wrk is not installed (apt-get install wrk haproxy)");
        return;
    }
    let (n_rounds, seconds) = if is_quick { (5, "1s") } else { (15, "2s") };
    let lab = start_lab(1, 1);
    lab.import_whoami();
    let published = format!("{PORT}:8080");
    for service in [DIRECT, MESH, PROXIED] {
        let target = if service == MESH { &published } else { "8080" };
        let flags = ["--constraint", "node.hostname==n2", "--publish", target];
        lab.node("n1").create_whoami(service, &flags);
    }
    for service in [DIRECT, MESH, PROXIED] {
        lab.wait_until_settled("n1", service, 1);
    }
    let task = task_address(&lab, DIRECT);
    let own = lab.node("n1").address();
    // New connections leave an entry each; with two minutes each, the table would fill.
    for node in ["n1", "n2"] {
        let setting = "net.netfilter.nf_conntrack_tcp_timeout_time_wait=1";
        lab.node(node).exec(&["sysctl", "-qw", setting]).ok();
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut ways = vec![
        Way { name: DIRECT, url: format!("http://{task}:8080/") },
        Way { name: MESH, url: format!("http://{own}:{PORT}/") },
    ];
    let proxy = is_installed("haproxy").then(|| Proxy::start(&lab, dir.path()));
    if proxy.is_some() {
        ways.push(Way { name: PROXIED, url: format!("http://{own}:{PROXY_PORT}/") });
    } else {
        println!("not measured: HAProxy, which is not installed (apt-get install haproxy)");
    }
    for way in &ways {
        wait_for_answer(&lab, &way.url);
    }
    let mut comparison = Comparison::default();
    for round in 1..=n_rounds {
        for kind in Kind::ALL {
            // Each round begins with another way.
            ways.rotate_left(1);
            let mut rates = BTreeMap::new();
            for way in &ways {
                rates.insert(way.name, request_rate(&lab, &way.url, kind, seconds));
            }
            let words: Vec<String> =
                rates.iter().map(|(name, rate)| format!("{name} {rate:.0}/s")).collect();
            let (name, load) = (kind.name(), load_average());
            println!("round {round}: {name}: {}; load {load}", words.join(", "));
            comparison.add(kind, &rates);
        }
    }
    comparison.report();
    drop(proxy);
    lab.down();
}

/// Ratios of the rates of the same round.
#[derive(Debug, Default)]
struct Comparison {
    ratios: BTreeMap<(Kind, &'static str), Samples>,
}

impl Comparison {
    fn add(&mut self, kind: Kind, rates: &BTreeMap<&'static str, f64>) {
        for (name, rate) in rates.iter().filter(|(name, _)| **name != MESH) {
            let samples = self.ratios.entry((kind, *name));
            samples.or_insert_with(|| Samples::new(Unit::Ratio)).add(rates[MESH] / rate);
        }
    }

    fn report(&self) {
        for ((kind, other), samples) in &self.ratios {
            let target = if *other == DIRECT { OF_DIRECT } else { OF_PROXY };
            samples.report(&format!("{}, mesh / {other}", kind.name()), Some(target));
        }
    }
}

/// Requests a second by `wrk`, from n1.
fn request_rate(lab: &Lab, url: &str, kind: Kind, seconds: &str) -> f64 {
    let mut command = vec!["wrk", "-t", "1", "-c", N_CONNECTIONS, "-d", seconds];
    if kind == Kind::NewConnections {
        command.extend(["-H", "Connection: close"]);
    }
    command.push(url);
    let output = lab.node("n1").exec(&command).ok();
    let errors = output.stdout.lines().find(|line| {
        let line = line.trim();
        line.starts_with("Socket errors") || line.starts_with("Non-2xx")
    });
    if let Some(line) = errors {
        println!("{url}, {}: {}", kind.name(), line.trim());
    }
    let rate = output.stdout.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    let rate = rate.and_then(|rate| rate.trim().parse().ok());
    rate.unwrap_or_else(|| panic!("no rate in what wrk printed: {output}"))
}

/// The address of a service's only task in the mesh's network.
fn task_address(lab: &Lab, service: &str) -> Ipv4Addr {
    let tasks = lab.whoamis_of(service);
    let [task] = &tasks[..] else { panic!("one task was asked for: {tasks:#?}") };
    let output = Command::new("nsenter")
        .arg(format!("--net=/proc/{}/ns/net", task.pid))
        .args(["ip", "-4", "-oneline", "address", "show", "scope", "global"])
        .output()
        .expect("nsenter can be started");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.split_whitespace();
    let address = words.find(|word| *word == "inet").and_then(|_| words.next());
    let address = address.and_then(|cidr| cidr.split('/').next()?.parse().ok());
    address.unwrap_or_else(|| panic!("the task has no address: {text:?}"))
}

fn wait_for_answer(lab: &Lab, url: &str) {
    wait_until(SETTLES_WITHIN, &format!("{url} answers"), || {
        let output = lab.node("n1").exec(&["curl", "-sS", "-m", "2", "-o", "/dev/null", url]);
        (output.status.success().then_some(()), output.to_string())
    });
}

/// HAProxy on n1, which forwards connections to the task as they are.
struct Proxy {
    client: Child,
}

impl Proxy {
    fn start(lab: &Lab, dir: &Path) -> Self {
        let task = task_address(lab, PROXIED);
        let own = lab.node("n1").address();
        let config = format!(
            "global\n  maxconn 4096\n\
             defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
             listen bench\n  bind {own}:{PROXY_PORT}\n  server task {task}:8080\n"
        );
        let file = dir.join("haproxy.cfg");
        fs::write(&file, config).expect("write the proxy's configuration");
        let mut command = Command::new(skep_binary());
        command.args(["lab", "--name", lab.name(), "exec", "n1", "--", "sh", "-c"]);
        command.args(["PATH=$PATH:/usr/sbin:/sbin exec haproxy -q -db -f \"$0\""]).arg(&file);
        let client = command.stdin(Stdio::null()).spawn().expect("skep can be started");
        Self { client }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The proxy itself ends with its node.
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}
