//! Services are created through three managers over TLS by one, 16 and 64 writers, beside etcd in turns.
//!
//! Each write is on two of three disks before it is acknowledged, on both sides; the services have no tasks. The
//! writers are a program of its own (`cluster-tests/src/bin/clients`), built as the daemon is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use skep_cluster_tests::Lab;

use super::etcd::Etcd;
use super::figures::{Samples, Target, Unit, load_average};
use super::usage::{daemons, time_of};
use super::{CLIENTS, PORT, built_program, certificate_of, n_cores, start_lab, word};

const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
const WRITERS: [usize; 3] = [1, 16, 64];
/// Of 64 writers, on two cores.
const AT_64: Target = Target::AtLeast(5000.0);

/// What the writers' program prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Summary {
    writes: f64,
    seconds: f64,
    median_seconds: f64,
    p99_seconds: f64,
    processor_seconds: f64,
}

/// Who is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Skep,
    Etcd,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Skep => "skep",
            Self::Etcd => "etcd",
        }
    }
}

/// Samples of one side with one number of writers.
struct Figures {
    side: Side,
    n_writers: usize,
    rate: Samples,
    /// Of the processors for each write: by the three members, and by the writers.
    members: Samples,
    writers: Samples,
}

pub(crate) fn run(is_quick: bool) {
    let Some(program) = built_program(CLIENTS) else { return };
    let (n_rounds, seconds) = if is_quick { (2, 2) } else { (5, 4) };
    let sides = match Etcd::is_installed_or_say() {
        true => vec![Side::Skep, Side::Etcd],
        false => vec![Side::Skep],
    };
    let each = |n_writers| sides.iter().map(move |side| Figures::new(*side, n_writers));
    let mut all: Vec<Figures> = WRITERS.into_iter().flat_map(each).collect();
    let mut ratio = Samples::new(Unit::Ratio);
    for round in 1..=n_rounds {
        // Each round has a lab of its own: what earlier ones wrote would be part of what managers hold.
        let lab = start_lab(3, 0);
        let etcd = sides.contains(&Side::Etcd).then(|| Etcd::start(&lab, &MANAGERS));
        let certificate = certificate_of(&lab, "n1");
        let bench = Bench {
            lab: &lab,
            etcd: etcd.as_ref(),
            program: &program,
            certificate: certificate.path(),
            seconds,
        };
        for pair in all.chunks_mut(sides.len()) {
            let mut rates = [f64::NAN; 2];
            for turn in 0..sides.len() {
                let at = (turn + round) % sides.len();
                rates[at] = pair[at].measure(round, &bench);
            }
            if etcd.is_some() && pair[0].n_writers == 64 {
                ratio.add(rates[0] / rates[1]);
            }
        }
        drop(etcd);
        lab.down();
    }
    for figures in &all {
        figures.report();
    }
    if !ratio.is_empty() {
        ratio.report("ours to etcd's, 64 writers, of the same round", None);
    }
}

/// Where and how it is measured.
struct Bench<'a> {
    lab: &'a Lab,
    etcd: Option<&'a Etcd>,
    program: &'a Path,
    certificate: &'a Path,
    seconds: u32,
}

impl Bench<'_> {
    fn members(&self, side: Side) -> Vec<PathBuf> {
        match (side, self.etcd) {
            (Side::Etcd, Some(etcd)) => etcd.processes(),
            _ => daemons(self.lab, &MANAGERS),
        }
    }

    fn write(&self, side: Side, n_writers: usize) -> Summary {
        let (n_writers, seconds) = (n_writers.to_string(), self.seconds.to_string());
        let mut command = vec![word(self.program), "write", side.name()];
        let addresses = match (side, self.etcd) {
            (Side::Etcd, Some(etcd)) => etcd.addresses().to_vec(),
            _ => {
                command.push(word(self.certificate));
                let address = |node: &&str| format!("{}:{PORT}", self.lab.node(node).address());
                MANAGERS.iter().map(address).collect()
            }
        };
        command.extend([&*n_writers, &*seconds]);
        command.extend(addresses.iter().map(String::as_str));
        let output = self.lab.client().exec(&command).ok().json();
        serde_json::from_value(output).expect("the writers print a summary")
    }
}

impl Figures {
    fn new(side: Side, n_writers: usize) -> Self {
        let [rate, members, writers] =
            [Unit::PerSecond, Unit::Microseconds, Unit::Microseconds].map(Samples::new);
        Self { side, n_writers, rate, members, writers }
    }

    /// One turn; gives acknowledged writes a second.
    fn measure(&mut self, round: usize, bench: &Bench<'_>) -> f64 {
        let members = bench.members(self.side);
        let load = load_average();
        let before = time_of(&members);
        let summary = bench.write(self.side, self.n_writers);
        let used: Duration = time_of(&members).saturating_sub(before);
        let rate = summary.writes / summary.seconds;
        println!(
            "round {round}: {}, {} writers: {rate:.0} writes/s, half within {:.1} ms, 99 of 100 within \
             {:.1} ms; load {load}",
            self.side.name(),
            self.n_writers,
            summary.median_seconds * 1e3,
            summary.p99_seconds * 1e3
        );
        self.rate.add(rate);
        self.members.add(used.as_secs_f64() * 1e6 / summary.writes);
        self.writers.add(summary.processor_seconds * 1e6 / summary.writes);
        rate
    }

    fn report(&self) {
        let what = format!("{}, {} writers", self.side.name(), self.n_writers);
        let target = (self.side == Side::Skep && self.n_writers == 64).then_some(AT_64);
        self.rate.report(&what, target);
        self.members.report(&format!("{what}: processor time of the three members a write"), None);
        self.writers.report(&format!("{what}: processor time of the writers a write"), None);
        if target.is_some_and(|target| !target.is_met(self.rate.median())) {
            self.say_what_holds_it_back();
        }
    }

    /// How near the machine's processors are to their end.
    fn say_what_holds_it_back(&self) {
        let each = (self.members.median() + self.writers.median()) / 1e6;
        let busy = each * self.rate.median();
        let cores = n_cores();
        println!(
            "held back by: {busy:.2} of {cores} cores are busy with it ({:.0} µs a write, of which the writers \
             take {:.0}); with all cores it would be at most {:.0} writes/s, the rest is waiting for disks and \
             for the processor",
            each * 1e6,
            self.writers.median(),
            cores as f64 / each
        );
    }
}
