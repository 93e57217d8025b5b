//! A thousand workers have sessions with the leader: what they take of the managers, and how soon all are back when
//! the leader dies.
//!
//! The workers are agents of one process (`cluster-tests/src/bin/workers.rs`), with a certificate and connections
//! each, in the lab's network. `SESSIONS` is how many, 1,000 unless it is set.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use skep_cluster_tests::{Lab, Running, wait_until};
use skep_runtime::clock::{monotonic, now};

use super::figures::{Samples, Target, Unit, load_average};
use super::usage::{daemons, memory, named, time_of};
use super::{CLIENTS, PORT, built_program, certificate_of, n_cores, start_lab, word};

/// Names the workers' program.
const WORKERS: &str = "SKEP_BENCH_WORKERS";
const NUMBER: &str = "SESSIONS";
const DEFAULT_NUMBER: usize = 1000;
const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
const BACK: Target = Target::AtMost(5.0);
/// Each joins, has its certificate signed, and opens two connections: some milliseconds of the processor.
const JOIN_PATIENCE: Duration = Duration::from_secs(600);
/// Whoever is not back by then does not count as late but as lost.
const BACK_PATIENCE: Duration = Duration::from_secs(180);
/// After the sessions are back, a node would still be called down that was to be.
const WATCHED_FOR: Duration = Duration::from_secs(10);
/// What else a process has open.
const OTHER_FILES: u64 = 1000;

pub(crate) fn run(is_quick: bool) {
    let (Some(workers), Some(clients)) = (built_program(WORKERS), built_program(CLIENTS)) else {
        return;
    };
    let given = std::env::var(NUMBER).ok().and_then(|number| number.parse().ok());
    let number: usize = given.unwrap_or(DEFAULT_NUMBER);
    let n_kills = if is_quick { 1 } else { 3 };
    if let Err(most) = raise_file_limit(number) {
        println!(
            "not measured: a process may open {most} files here, {number} workers take two each and some more"
        );
        return;
    }
    let lab = start_lab(3, 0);
    let before = memory(&daemons(&lab, &MANAGERS));
    let fleet = Fleet::start(&lab, workers, number);
    fleet.report_idle(&before);
    let mut back = Samples::new(Unit::Seconds);
    let mut n_down = 0;
    for round in 1..=n_kills {
        let leader = lab.wait_for_leader("n1");
        let via = MANAGERS.into_iter().find(|name| *name != leader).expect("there are three");
        let nodes = follow_nodes(&lab, &clients, via);
        let load = load_average();
        let used = fleet.used_without(&leader);
        let killed_at = now().0;
        lab.kill(&[&leader]);
        let (half, last) = fleet.until_all_back(killed_at);
        let [of_managers, of_workers] = fleet.used_without(&leader).since(used);
        let n_called_down = fleet.n_called_down(&nodes);
        println!(
            "round {round}: {leader} died, half of {number} sessions were back after {half:.2} s and all after \
             {last:.2} s, which took {of_managers:.2} s of processor time of the other managers and {of_workers:.2} s \
             of the workers; {n_called_down} nodes were called down; load {load}"
        );
        back.add(last);
        n_down += n_called_down;
        drop(nodes);
        lab.start_nodes(&[&leader]);
        lab.wait_until_alike("n1", MANAGERS.len());
    }
    back.report(&format!("from the leader's end until all {number} sessions are back"), Some(BACK));
    back.report_worst("the slowest of them", BACK);
    let verdict = if n_down == 0 { "met" } else { "MISSED" };
    println!("nodes that were called down: {n_down}; target 0: {verdict}");
    drop(fleet);
    lab.down();
}

/// Lets this process, and with it daemons and workers, open as many files as the workers' connections take; gives
/// the limit where that is too low.
fn raise_file_limit(n_workers: usize) -> Result<(), u64> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("limits can be read");
    if 2 * n_workers as u64 + OTHER_FILES > most {
        return Err(most);
    }
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
        .expect("a limit may be raised to the highest allowed");
    Ok(())
}

/// Prints each change of a node, as a manager has it.
fn follow_nodes(lab: &Lab, clients: &Path, via: &str) -> Running {
    let address = format!("{}:{PORT}", lab.node(via).address());
    let certificate = certificate_of(lab, via);
    let command = [word(clients), "nodes", word(certificate.path()), &address];
    let running = lab.start_command("client", &command);
    running.wait_for_line(BACK_PATIENCE, "the watch of nodes begins", |line| line == "synced");
    running
}

/// Processor time of managers, and of the workers' process.
struct Used([Duration; 2]);

impl Used {
    /// Seconds of each since then.
    fn since(self, before: Self) -> [f64; 2] {
        let [managers, workers] = self.0;
        let [managers_before, workers_before] = before.0;
        [managers.saturating_sub(managers_before), workers.saturating_sub(workers_before)]
            .map(|time| time.as_secs_f64())
    }
}

/// The workers.
struct Fleet<'a> {
    lab: &'a Lab,
    number: usize,
    running: Running,
    _dir: tempfile::TempDir,
}

impl<'a> Fleet<'a> {
    /// Has them join, and waits until all have sessions.
    fn start(lab: &'a Lab, program: PathBuf, number: usize) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let token = lab.node("n1").skep(&["swarm", "join-token", "--quiet", "worker"]).ok();
        let address = format!("{}:{PORT}", lab.node("n1").address());
        let count = number.to_string();
        let began = monotonic();
        let before = time_of(&daemons(lab, &MANAGERS));
        let command = [word(&program), &address, token.text(), &count, word(dir.path())];
        let running = lab.start_command("client", &command);
        let fleet = Self { lab, number, running, _dir: dir };
        fleet.wait_until_open(JOIN_PATIENCE, 0);
        let used = time_of(&daemons(lab, &MANAGERS)).saturating_sub(before);
        println!(
            "{number} workers joined and have sessions after {:.1} s; the managers took {:.1} s of processor time",
            (monotonic() - began).as_secs_f64(),
            used.as_secs_f64()
        );
        fleet
    }

    /// The time of the first session since `since` of each worker that has one.
    fn opened_since(&self, since: i64) -> BTreeMap<String, i64> {
        let mut opened = BTreeMap::new();
        for line in self.running.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let ["session", worker, time] = words[..] else { continue };
            let time: i64 = time.parse().expect("the workers print nanoseconds");
            if time >= since {
                opened.entry(worker.to_owned()).or_insert(time);
            }
        }
        opened
    }

    fn wait_until_open(&self, patience: Duration, since: i64) -> BTreeMap<String, i64> {
        wait_until(patience, "all workers have sessions", || {
            let opened = self.opened_since(since);
            let (n_open, lines) = (opened.len(), self.running.lines());
            let others = lines.iter().filter(|line| !line.starts_with("session "));
            let others: Vec<&String> = others.rev().take(5).collect();
            let seen = format!("{n_open} of {} have one; {others:#?}", self.number);
            ((n_open == self.number).then_some(opened), seen)
        })
    }

    /// Seconds from `since` until half of the workers had a session again, and until the last had one.
    fn until_all_back(&self, since: i64) -> (f64, f64) {
        let opened = self.wait_until_open(BACK_PATIENCE, since);
        let mut times: Vec<i64> = opened.values().copied().collect();
        times.sort_unstable();
        let seconds = |at: usize| times.get(at).map_or(0.0, |time| (time - since) as f64 / 1e9);
        (seconds(times.len() / 2), seconds(times.len().saturating_sub(1)))
    }

    /// What all managers but one took so far, and the workers.
    fn used_without(&self, leader: &str) -> Used {
        let others: Vec<&str> = MANAGERS.into_iter().filter(|name| *name != leader).collect();
        Used([daemons(self.lab, &others), self.processes()].map(|processes| time_of(&processes)))
    }

    fn processes(&self) -> Vec<PathBuf> {
        named("skep-workers", &format!("{}:{PORT}", self.lab.node("n1").address()))
    }

    /// How many workers were called down since a watch began, once it would have happened.
    fn n_called_down(&self, nodes: &Running) -> usize {
        let until = monotonic() + WATCHED_FOR;
        wait_until(2 * WATCHED_FOR, "the time to watch is over", || {
            ((monotonic() >= until).then_some(()), String::new())
        });
        let lines = nodes.lines();
        let is_down = |line: &&String| line.starts_with('w') && line.ends_with(" down");
        lines.iter().filter(is_down).count()
    }

    /// What the managers take while nothing happens, and the workers.
    fn report_idle(&self, before: &Samples) {
        let (managers, workers) = (daemons(self.lab, &MANAGERS), self.processes());
        let used = [time_of(&managers), time_of(&workers)];
        let began = monotonic();
        let until = began + WATCHED_FOR;
        wait_until(2 * WATCHED_FOR, "the time to watch is over", || {
            ((monotonic() >= until).then_some(()), String::new())
        });
        let time = (monotonic() - began).as_secs_f64();
        let [of_managers, of_workers] = [&managers, &workers].map(|processes| time_of(processes));
        let share =
            |after: Duration, before: Duration| (after - before).as_secs_f64() / time * 100.0;
        println!(
            "idle with {} sessions: the three managers take {:.1} % of a core, the workers' process {:.1} % (of {} \
             cores); load {}",
            self.number,
            share(of_managers, used[0]),
            share(of_workers, used[1]),
            n_cores(),
            load_average()
        );
        println!("memory of a manager before: {before}");
        println!("memory of a manager with all sessions: {}", memory(&managers));
        println!("memory of the workers' process: {}", memory(&workers));
    }
}
