//! One seed: a swarm is founded, things fail, nothing fails any more, and everything must be as it was said.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use skep_common::spec::NodeRole;
use skep_common::{ClusterId, NodeId};
use skep_runtime::clock;
use skep_runtime::identity::{Authority, Credentials, Csr};
use skep_runtime::transport::Tls;
use turmoil::Sim;

use crate::client::{Client, Owed};
use crate::disk::ForgetfulDisk;
use crate::fault::Fault;
use crate::history;
use crate::host::Host;
use crate::ledger::{Counts, Ledger, Phase};
use crate::machines::{Machines, machine_of};
use crate::network::{self, ip_of};
use crate::operator::Operator;
use crate::panics;

/// How long things fail, unless told otherwise.
pub const FAULTS: Duration = Duration::from_secs(20);
/// After the last fault everything works within this time: hanging connections are given up, managers whose
/// disk failed are started again, a leader is found and the others catch up.
const SETTLE: Duration = Duration::from_secs(12);
/// When that has passed, changes of the managers that were under way are complete within this time.
const COMPLETE: Duration = Duration::from_secs(60);
/// Within which a swarm is founded.
const FOUND: Duration = Duration::from_secs(30);
/// Within which all is proved.
const PROVE: Duration = Duration::from_secs(60);
const N_CLIENTS: u64 = 3;
const TICK: Duration = Duration::from_millis(1);
/// Messages are this slow where nothing is wrong.
const LATENCY: Duration = Duration::from_millis(3);
const LATENCY_SLOW: Duration = Duration::from_millis(330);
/// Of the messages of a line that loses some.
const LOSS: f64 = 0.03;
/// A line that lost a message works again with the next one, mostly.
const REPAIR: f64 = 0.7;
/// Certificates are not looked at; they live as long as any run.
const LIFE: Duration = Duration::from_secs(90 * 86_400);

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Decides all.
    pub seed: u64,
    /// How long things fail.
    pub faults: Duration,
    /// Print each event.
    pub is_printed: bool,
}

impl Options {
    /// A seed with the usual length.
    pub fn of(seed: u64) -> Self {
        Self { seed, faults: FAULTS, is_printed: false }
    }
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Of what.
    pub seed: u64,
    /// How long things failed.
    pub faults: Duration,
    /// How long it was, in virtual time.
    pub time: Duration,
    /// What happened.
    pub counts: Counts,
    /// Terms with a leader.
    pub n_terms: usize,
    /// States of one version that were compared.
    pub n_digests: u64,
    /// Syncs of all disks.
    pub n_syncs: u64,
    /// Digest of all that was noted.
    pub trace: String,
    /// What must not be and was: the number of an invariant, and what.
    pub violation: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts {
            n_acknowledged,
            n_unknown,
            n_reads,
            n_crashes,
            n_stops,
            n_faults,
            n_snapshots,
            n_added,
            n_removed,
            n_refused,
        } = self.counts;
        let (seed, time, seconds) = (self.seed, self.time.as_secs_f64(), self.faults.as_secs());
        if let Some(violation) = &self.violation {
            writeln!(f, "seed {seed}: {violation}")?;
            write!(f, "make sim RING=turmoil SEED={seed} SECONDS={seconds} PRINT=1")
        } else {
            write!(
                f,
                "seed {seed}: {time:.1} s, {n_faults} faults, {n_crashes} crashes, {n_stops} stops, \
                 {n_added} managers added, {n_removed} removed, {n_refused} changes refused, {terms} terms, \
                 {n_acknowledged} writes acknowledged, {n_unknown} unknown, {n_reads} reads, \
                 {digests} digests, {n_snapshots} snapshots, {syncs} syncs, trace {trace}",
                terms = self.n_terms,
                digests = self.n_digests,
                syncs = self.n_syncs,
                trace = self.trace
            )
        }
    }
}

/// Runs a seed.
pub fn run(options: Options) -> Report {
    panics::watch();
    network::install(options.seed);
    let dir = data_dir();
    let swarm = Swarm::new(options, dir.path());
    let (time, violation) = swarm.run();
    let ledger = &swarm.ledger;
    if let Some(why) = violation {
        ledger.violate(12, why);
    }
    if let Err(why) = history::check(&ledger.operations()) {
        ledger.violate(1, why);
    }
    if let Some(panic) = panics::take() {
        ledger.violate(1, format!("a panic: {panic}"));
    }
    Report {
        seed: options.seed,
        faults: options.faults,
        time,
        counts: ledger.counts(),
        n_terms: ledger.n_terms(),
        n_digests: ledger.n_digests(),
        n_syncs: swarm.hosts.values().map(|host| host.disk.n_syncs()).sum(),
        trace: ledger.trace(),
        violation: ledger.violation(),
    }
}

/// Where data lies for the time of a run: in memory, where there is such a place.
fn data_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("there is a temporary directory")
}

struct Swarm {
    options: Options,
    machines: Arc<Machines>,
    hosts: BTreeMap<u64, Arc<Host>>,
    tls: Tls,
    ledger: Arc<Ledger>,
}

impl Swarm {
    fn new(options: Options, dir: &Path) -> Self {
        let ledger = Arc::new(Ledger::new(options.is_printed));
        let (n_founders, n_spares) = if options.seed % 5 == 4 { (5, 1) } else { (3, 2) };
        let machines = Arc::new(Machines::new(n_founders, n_spares));
        let authority = Authority::generate(clock::now()).expect("keys can be made");
        let tls = credentials(&authority);
        let host = |number: u64| {
            let dir = dir.join(format!("n{number}"));
            let disk_seed = options.seed.wrapping_mul(31).wrapping_add(number);
            let host = Host {
                number,
                machines: Arc::clone(&machines),
                disk: ForgetfulDisk::new(disk_seed, &dir.join("trash"))
                    .expect("the directory is there"),
                dir,
                tls: tls.clone(),
                authority: (authority.root_pem().to_owned(), authority.key_pem().to_owned()),
                ledger: Arc::clone(&ledger),
            };
            (number, Arc::new(host))
        };
        let hosts = machines.numbers().map(host).collect();
        Self { options, machines, hosts, tls, ledger }
    }

    /// Runs it to the end; gives the time that it took, and why it did not come to one.
    fn run(&self) -> (Duration, Option<String>) {
        let mut sim = turmoil::Builder::new()
            .rng_seed(self.options.seed)
            .tick_duration(TICK)
            .simulation_duration(FOUND + self.options.faults + SETTLE + COMPLETE + PROVE)
            .min_message_latency(Duration::ZERO)
            .max_message_latency(LATENCY)
            .repair_rate(REPAIR)
            .tcp_capacity(4096)
            .build();
        for host in self.hosts.values() {
            let host = Arc::clone(host);
            sim.host(ip_of(host.number), move || Arc::clone(&host).run());
        }
        let owed = Arc::new(Mutex::new(Owed::default()));
        for number in 0..N_CLIENTS {
            let (tls, ledger, owed) =
                (self.tls.clone(), Arc::clone(&self.ledger), Arc::clone(&owed));
            let machines = Arc::clone(&self.machines);
            let client = Client::new(number, machines, self.options.seed, tls, ledger, owed);
            sim.client(client_name(number), client.run());
        }
        let (machines, ledger) = (Arc::clone(&self.machines), Arc::clone(&self.ledger));
        let operator = Operator::new(self.options.seed, self.tls.clone(), machines, ledger);
        sim.client("operator", operator.run());
        let mut trouble = Trouble::new(self);
        loop {
            match sim.step() {
                Ok(true) => return (sim.elapsed(), None),
                Ok(false) if self.ledger.violation().is_some() => return (sim.elapsed(), None),
                Ok(false) => trouble.act(&mut sim),
                Err(error) => return (sim.elapsed(), Some(error.to_string())),
            }
        }
    }
}

fn client_name(number: u64) -> String {
    format!("client-{number}")
}

fn credentials(authority: &Authority) -> Tls {
    let csr = Csr::generate().expect("keys can be made");
    let (now, role) = (clock::now(), NodeRole::Manager);
    let certificate_pem = authority
        .sign(&csr.csr_pem, NodeId(1), role, ClusterId(1), now, LIFE)
        .expect("it is its own request");
    let (key_pem, root_pem) = (csr.key_pem, authority.root_pem().to_owned());
    Tls::new(Credentials { certificate_pem, key_pem, root_pem }).expect("they are good credentials")
}

/// Makes things fail and ends that again, between the steps of the simulation.
struct Trouble<'a> {
    swarm: &'a Swarm,
    rng: StdRng,
    next_fault: Duration,
    next_phase: Duration,
    ends: Vec<(Duration, End)>,
}

/// How a fault ends.
#[derive(Debug, Clone, Copy)]
enum End {
    /// Lines between managers are as good as new.
    Line(u64, u64),
    /// So are all that a manager has.
    Lines(u64),
    Disk(u64),
    Bounce(u64),
}

impl<'a> Trouble<'a> {
    fn new(swarm: &'a Swarm) -> Self {
        let rng = StdRng::seed_from_u64(swarm.options.seed ^ 0x5bd1_e995);
        let (next_fault, next_phase) = (Duration::ZERO, FOUND);
        Self { swarm, rng, next_fault, next_phase, ends: Vec::new() }
    }

    fn act(&mut self, sim: &mut Sim<'_>) {
        let now = sim.elapsed();
        let ledger = &self.swarm.ledger;
        match ledger.phase() {
            Phase::Founding => {
                let inside = self.swarm.machines.inside();
                if inside.iter().all(|(_, identity)| identity.is_voter) {
                    ledger.set_phase(Phase::Faults);
                    self.next_phase = now + self.swarm.options.faults;
                } else if now > self.next_phase {
                    ledger.violate(12, "the swarm cannot be founded");
                }
            }
            Phase::Faults => {
                self.fail_powerless(sim);
                self.end_due(sim, now);
                if now >= self.next_phase {
                    self.heal(sim);
                    self.next_phase = now + SETTLE;
                    self.swarm.ledger.set_phase(Phase::Settling);
                } else if now >= self.next_fault {
                    let fault = Fault::draw(&mut self.rng);
                    self.begin(sim, fault, now);
                    self.next_fault = now + Fault::pause(&mut self.rng);
                }
            }
            Phase::Settling if now >= self.next_phase + COMPLETE => {
                let why = ledger.at_rest().map_or_else(
                    |why| why,
                    |_| "a machine is neither a manager nor outside".to_owned(),
                );
                ledger.violate(12, format!("the managers do not come to rest: {why}"));
            }
            Phase::Settling if now >= self.next_phase && ledger.members().is_some() => {
                ledger.set_phase(Phase::Proof);
            }
            Phase::Proof if ledger.n_proved() == N_CLIENTS => ledger.set_phase(Phase::Changes),
            Phase::Changes => self.switch(sim),
            Phase::Settling | Phase::Proof => {}
        }
    }

    /// Machines are off or on, as the operator wants.
    fn switch(&self, sim: &mut Sim<'_>) {
        for number in self.swarm.machines.numbers() {
            match (self.swarm.machines.is_off(number), sim.is_host_running(ip_of(number))) {
                (true, true) => self.swarm.crash(sim, number, false),
                (false, false) => self.end(sim, End::Bounce(number)),
                (true, false) | (false, true) => {}
            }
        }
    }

    /// A machine that is in the swarm, or was a moment ago.
    fn machine_drawn(&mut self) -> u64 {
        let inside = self.swarm.machines.inside();
        let drawn = inside.get(self.rng.random_range(0..inside.len().max(1)));
        drawn.map_or(1, |(number, _)| *number)
    }

    fn others(&self, number: u64) -> impl Iterator<Item = u64> + use<> {
        self.swarm.machines.numbers().filter(move |other| *other != number)
    }

    /// Ends machines whose power failed in the middle of a sync.
    fn fail_powerless(&mut self, sim: &mut Sim<'_>) {
        for (number, host) in &self.swarm.hosts {
            if host.disk.has_failed() {
                let length = Fault::CrashAtSync.length(&mut self.rng);
                self.swarm.crash(sim, *number, true);
                self.ends.push((sim.elapsed() + length, End::Bounce(*number)));
            }
        }
    }

    fn end_due(&mut self, sim: &mut Sim<'_>, now: Duration) {
        let (due, rest) =
            std::mem::take(&mut self.ends).into_iter().partition(|(at, _)| *at <= now);
        self.ends = rest;
        let due: Vec<(Duration, End)> = due;
        for (_, end) in due {
            self.end(sim, end);
        }
    }

    fn end(&self, sim: &mut Sim<'_>, end: End) {
        match end {
            End::Line(a, b) => repair(sim, a, b),
            End::Lines(number) => {
                self.others(number).for_each(|other| repair(sim, number, other));
                (0..N_CLIENTS).for_each(|client| sim.release(ip_of(number), client_name(client)));
                self.swarm.hosts[&number].disk.set_slow(false);
            }
            End::Disk(number) => {
                let disk = &self.swarm.hosts[&number].disk;
                disk.set_slow(false);
                disk.set_space(None);
            }
            End::Bounce(number) => {
                if !sim.is_host_running(ip_of(number)) {
                    self.swarm.ledger.note(&format!("machine {number} starts again"));
                    sim.bounce(ip_of(number));
                }
            }
        }
    }

    /// Ends all that is wrong, also what was to fail at a sync that has not come yet.
    fn heal(&mut self, sim: &mut Sim<'_>) {
        for number in self.swarm.machines.numbers() {
            let disk = &self.swarm.hosts[&number].disk;
            disk.set_crash(None);
            disk.set_next_sync_fails(false);
            for end in [End::Lines(number), End::Disk(number), End::Bounce(number)] {
                self.end(sim, end);
            }
        }
        self.ends.clear();
    }

    fn begin(&mut self, sim: &mut Sim<'_>, fault: Fault, now: Duration) {
        let number = match fault {
            Fault::IsolateLeader | Fault::DeafLeader => {
                self.swarm.ledger.leader().map_or(1, machine_of)
            }
            _ => self.machine_drawn(),
        };
        let others: Vec<u64> = self.others(number).collect();
        let other = others[self.rng.random_range(0..others.len())];
        let length = fault.length(&mut self.rng);
        let (ip, ip_other) = (ip_of(number), ip_of(other));
        let disk = &self.swarm.hosts[&number].disk;
        self.swarm
            .ledger
            .note(&format!("{fault:?} at {number} ({other}) for {} ms", length.as_millis()));
        self.swarm.ledger.count(|counts| counts.n_faults += 1);
        let end = match fault {
            Fault::Loss => {
                sim.set_link_fail_rate(ip, ip_other, LOSS);
                End::Line(number, other)
            }
            Fault::Delay => {
                sim.set_link_max_message_latency(ip, ip_other, LATENCY_SLOW);
                End::Line(number, other)
            }
            Fault::Hold => {
                sim.hold(ip, ip_other);
                End::Line(number, other)
            }
            Fault::Cut => {
                sim.partition(ip, ip_other);
                End::Line(number, other)
            }
            Fault::HalfCut => {
                sim.partition_oneway(ip, ip_other);
                End::Line(number, other)
            }
            Fault::IsolateLeader => {
                self.others(number).for_each(|other| sim.partition(ip, ip_of(other)));
                End::Lines(number)
            }
            Fault::DeafLeader => {
                self.others(number).for_each(|other| sim.partition_oneway(ip_of(other), ip));
                End::Lines(number)
            }
            Fault::Pause => {
                self.others(number).for_each(|other| sim.hold(ip, ip_of(other)));
                (0..N_CLIENTS).for_each(|client| sim.hold(ip, client_name(client)));
                disk.set_slow(true);
                End::Lines(number)
            }
            Fault::Kill | Fault::PowerLoss => {
                self.swarm.crash(sim, number, fault == Fault::PowerLoss);
                End::Bounce(number)
            }
            Fault::CrashAtSync => return disk.set_crash(Some(self.rng.random_range(0..12))),
            Fault::SlowDisk => {
                disk.set_slow(true);
                End::Disk(number)
            }
            Fault::FullDisk => {
                disk.set_space(Some(self.rng.random_range(0..4096)));
                End::Disk(number)
            }
            Fault::BrokenSync => return disk.set_next_sync_fails(true),
        };
        self.ends.push((now + length, end));
    }
}

impl Swarm {
    /// Ends a manager at once, with its machine where that loses power.
    fn crash(&self, sim: &mut Sim<'_>, number: u64, loses_power: bool) {
        self.ledger.note(&format!("machine {number} crashes, power lost: {loses_power}"));
        if sim.is_host_running(ip_of(number)) {
            self.ledger.count(|counts| counts.n_crashes += 1);
            sim.crash(ip_of(number));
        }
        if loses_power {
            let disk = &self.hosts[&number].disk;
            disk.lose_power().expect("the files are the simulation's own");
        }
    }
}

/// A line between two managers is as good as new.
fn repair(sim: &mut Sim<'_>, a: u64, b: u64) {
    let (a, b) = (ip_of(a), ip_of(b));
    sim.release(a, b);
    sim.repair(a, b);
    sim.set_link_fail_rate(a, b, 0.0);
    sim.set_link_max_message_latency(a, b, LATENCY);
}
