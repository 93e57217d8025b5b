//! The scenarios, and what they have in common.
//!
//! Each starts a lab of its own, and prints every round as it was measured and a summary against the
//! target. Clocks start before the command that causes what is measured, so that the client's own
//! time counts as well.

mod control;
mod cut;
mod docker;
mod etcd;
mod failover;
mod figures;
mod mesh;
mod place;
mod placement;
mod relays;
mod requests;
mod rules;
mod saturation;
mod sessions;
mod start;
mod throughput;
mod usage;
mod vip;
mod write;

use std::fs;
use std::path::{Path, PathBuf};

use skep_cluster_tests::{Lab, LabOptions, skep_binary};

/// A measurement that can be asked for by name.
pub(crate) struct Scenario {
    /// What it is asked for by.
    pub(crate) name: &'static str,
    /// What it measures.
    pub(crate) what: &'static str,
    /// Measures and prints; the argument says whether fewer and shorter rounds are enough.
    pub(crate) run: fn(bool),
}

/// All scenarios, in the order in which they run.
pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "failover",
        what: "the leader dies: how long until another manager acknowledges a write",
        run: failover::run,
    },
    Scenario {
        name: "saturation",
        what: "every core is busy with other work: does the leader stay",
        run: saturation::run,
    },
    Scenario {
        name: "cut",
        what: "a worker's cable is pulled: how long until its tasks run elsewhere",
        run: cut::run,
    },
    Scenario {
        name: "start",
        what: "60 replicas over five nodes, beside five Docker Engines: how long until all run, and memory",
        run: start::run,
    },
    Scenario {
        name: "mesh",
        what: "requests through the routing mesh, beside a direct connection, HAProxy and nginx",
        run: mesh::run,
    },
    Scenario {
        name: "vip",
        what: "requests to a virtual address of a network, beside the same others",
        run: vip::run,
    },
    Scenario {
        name: "throughput",
        what: "one connection between containers of two nodes, beside a VXLAN made by hand",
        run: throughput::run,
    },
    Scenario {
        name: "rules",
        what: "rules of 1,000 services with 10 backends each: how long until they are in force",
        run: rules::run,
    },
    Scenario {
        name: "write",
        what: "services created through three managers by 1, 16 and 64 writers, beside etcd",
        run: write::run,
    },
    Scenario {
        name: "control",
        what: "1,000 tasks and single ones over 3 managers and 10 workers that run nothing",
        run: control::run,
    },
    Scenario {
        name: "sessions",
        what: "1,000 workers: what they take of the managers, and their sessions when the leader dies",
        run: sessions::run,
    },
    Scenario {
        name: "placement",
        what: "100,000 and 1,000,000 tasks are placed by the managers' core: how long, and memory",
        run: placement::run,
    },
];

/// Prints what figures depend on.
pub(crate) fn describe_machine() {
    let version = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let binary = skep_binary();
    let size = fs::metadata(&binary).map(|metadata| metadata.len()).unwrap_or_default();
    println!(
        "{} cores, Linux {}, load average {}",
        n_cores(),
        version.trim(),
        figures::load_average()
    );
    println!("skep: {} ({:.1} MiB)", binary.display(), bytes_as_mib(size));
    println!(
        "load: the machine's load average over one minute when a figure was taken. Figures that were"
    );
    println!("taken beside other work say little about the swarm.");
}

fn n_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn start_lab(managers: u8, workers: u8) -> Lab {
    Lab::start(LabOptions { managers, workers, ..LabOptions::default() })
}

/// A size for people.
fn bytes_as_mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Names the program of clients (`cluster-tests/src/bin/clients`).
const CLIENTS: &str = "SKEP_BENCH_CLIENTS";

/// Where nodes answer each other, and clients with a node's certificate.
const PORT: u16 = 2377;

/// A copy of a node's certificate for the clients' program: members do not see each other's files.
fn certificate_of(lab: &Lab, node: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let stored = format!("/var/lib/skep-lab/{}/{node}/data/certificates", lab.name());
    let copy = dir.path().join("certificates");
    fs::create_dir(&copy).expect("make a directory in an empty one");
    for entry in fs::read_dir(&stored).expect("the node has certificates").flatten() {
        fs::copy(entry.path(), copy.join(entry.file_name())).expect("copy a certificate");
    }
    dir
}

/// A path as a word of a command.
fn word(path: &Path) -> &str {
    path.to_str().expect("paths of builds and temporary directories are plain")
}

/// A program that `make bench` builds and names in a variable; says so where it is not there.
fn built_program(variable: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let found = named.filter(|program| program.is_file());
    if found.is_none() {
        println!("not measured: {variable} names no program; `make bench` builds it");
    }
    found
}

fn is_installed(name: &str) -> bool {
    program(name).is_some()
}

/// Where a program is.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let root_only = ["/usr/sbin", "/sbin"].map(Path::new).map(Path::to_owned);
    let dirs = std::env::split_paths(&path).chain(root_only);
    dirs.map(|dir| dir.join(name)).find(|path| path.is_file())
}
