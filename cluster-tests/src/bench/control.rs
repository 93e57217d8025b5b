//! A service is created until all of its tasks run, over three managers and ten workers whose daemons run nothing:
//! what managers and agents take, without containers.
//!
//! The client (`cluster-tests/src/bin/clients`) watches tasks through the first manager, so that a figure ends
//! when it has seen the last of them run.

use std::path::Path;

use serde::Deserialize;
use skep_cluster_tests::{BUSYBOX, Lab, LabOptions};

use super::figures::{Samples, Target, Unit, load_average};
use super::usage::{daemons, time_of};
use super::{CLIENTS, PORT, built_program, certificate_of, n_cores, word};

const MANAGERS: u8 = 3;
const WORKERS: u8 = 10;
const N_REPLICAS: usize = 1000;
const ALL_RUN: Target = Target::AtMost(500.0);
const ONE_RUNS: Target = Target::AtMost(30.0);

/// A round, as the client prints it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Round {
    created: f64,
    running: f64,
}

pub(crate) fn run(is_quick: bool) {
    let Some(program) = built_program(CLIENTS) else { return };
    let (n_rounds, n_single) = if is_quick { (2, 10) } else { (7, 50) };
    let options = LabOptions {
        managers: MANAGERS,
        workers: WORKERS,
        no_containers: true,
        ..LabOptions::default()
    };
    let lab = Lab::start(options);
    let nodes: Vec<String> = (1..=MANAGERS + WORKERS).map(|number| format!("n{number}")).collect();
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let [managers, workers] =
        [&nodes[..MANAGERS.into()], &nodes[MANAGERS.into()..]].map(|nodes| daemons(&lab, nodes));
    let [mut many, mut one] = [Unit::Milliseconds; 2].map(Samples::new);
    let [mut of_managers, mut of_workers] = [Unit::Milliseconds; 2].map(Samples::new);
    let mut load = load_average();
    lab.import_busybox("n1");
    // Afterwards every node has the image, which its tasks wait for although nothing is run of it.
    start(&lab, &program, N_REPLICAS, 1);
    for round in 1..=n_rounds {
        let before = [&managers, &workers].map(|processes| time_of(processes));
        let figures = start(&lab, &program, N_REPLICAS, 1);
        let [figures] = &figures[..] else { panic!("one round was asked for: {figures:?}") };
        for ((samples, processes), before) in
            [(&mut of_managers, &managers), (&mut of_workers, &workers)].into_iter().zip(before)
        {
            samples.add((time_of(processes).saturating_sub(before)).as_secs_f64() * 1e3);
        }
        println!(
            "round {round}: all {N_REPLICAS} run after {:.0} ms (created after {:.0} ms); load {load}",
            figures.running * 1e3,
            figures.created * 1e3
        );
        load = load_average();
        many.add(figures.running * 1e3);
    }
    for figures in start(&lab, &program, 1, n_single) {
        one.add(figures.running * 1e3);
    }
    many.report("from `service create` of 1,000 replicas until all run", Some(ALL_RUN));
    let what = "processor time of a round, in which the tasks are removed as well";
    of_managers.report(&format!("{what}: the three managers"), None);
    of_workers.report(&format!("{what}: the ten workers"), None);
    if !ALL_RUN.is_met(many.median()) {
        let work = of_managers.median() + of_workers.median();
        println!(
            "held back by: the processor: a round takes {work:.0} ms of it, {:.0} ms on {} cores",
            work / n_cores() as f64,
            n_cores()
        );
    }
    one.report("from `service create` of one replica until it runs", Some(ONE_RUNS));
    if !ONE_RUNS.is_met(one.median()) {
        println!(
            "held back by: three writes to the log, one after the other, and the way to the worker"
        );
    }
    lab.down();
}

/// Starts a service as often as asked for, and removes it each time.
fn start(lab: &Lab, program: &Path, n_replicas: usize, n_rounds: usize) -> Vec<Round> {
    let address = format!("{}:{PORT}", lab.node("n1").address());
    let (n_replicas, n_rounds) = (n_replicas.to_string(), n_rounds.to_string());
    let certificate = certificate_of(lab, "n1");
    let certificate = word(certificate.path());
    let command = [word(program), "start", certificate, BUSYBOX, &n_replicas, &n_rounds, &address];
    let rows = lab.client().exec(&command).ok().json_lines();
    let read = |row| serde_json::from_value(row).expect("the client prints rounds");
    rows.into_iter().map(read).collect()
}
