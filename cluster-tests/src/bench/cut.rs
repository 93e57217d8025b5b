//! A worker is cut off, its tasks start elsewhere, and stop on it once it is back.

use std::collections::BTreeSet;

use skep_cluster_tests::{Lab, SETTLES_WITHIN, WHOAMI, wait_until};
use skep_runtime::clock::monotonic;

use super::figures::{Samples, Target, Unit, load_average};
use super::start_lab;

const N_REPLICAS: usize = 10;
const VICTIM: &str = "n5";
const REPLACED: Target = Target::AtMost(6.0);

pub(crate) fn run(is_quick: bool) {
    let n_rounds = if is_quick { 1 } else { 5 };
    let lab = start_lab(3, 2);
    lab.import_whoami();
    let mut replaced = Samples::new(Unit::Seconds);
    let mut healed = Samples::new(Unit::Seconds);
    for round in 1..=n_rounds {
        let service = format!("cut{round}");
        lab.wait_for_node("n1", VICTIM, "Ready");
        lab.node("n1").create_whoami(&service, &["--replicas", &N_REPLICAS.to_string()]);
        let tasks = lab.wait_until_settled("n1", &service, N_REPLICAS);
        let n_lost = tasks.iter().filter(|task| task.node == VICTIM).count();
        assert!(n_lost > 0, "{VICTIM} has no task of {service} to lose: {tasks:#?}");

        let load = load_average();
        let started = monotonic();
        lab.cut(&[VICTIM]);
        wait_until_elsewhere(&lab, &service);
        let elsewhere = started.elapsed().as_secs_f64();
        let started = monotonic();
        lab.heal(&[VICTIM]);
        lab.wait_until_settled("n1", &service, N_REPLICAS);
        let settled = started.elapsed().as_secs_f64();
        println!(
            "round {round}: {n_lost} tasks ran elsewhere {elsewhere:.3} s after the cut; {settled:.3} \
             s after the heal the old ones had stopped and each task ran once; load {load}"
        );
        replaced.add(elsewhere);
        healed.add(settled);
        lab.node("n1").skep(&["service", "rm", &service]).ok();
        wait_until(SETTLES_WITHIN, "the service's containers have ended", || {
            let left = lab.whoamis_of(&service);
            (left.is_empty().then_some(()), format!("{left:#?}"))
        });
    }
    replaced.report("from the cut until all tasks run elsewhere", Some(REPLACED));
    healed.report("from the heal until each task runs once", None);
    lab.down();
}

/// Waits until all replicas run, none of them on the victim, and their processes are there.
fn wait_until_elsewhere(lab: &Lab, service: &str) {
    let what = format!("{service} runs without {VICTIM}");
    wait_until(SETTLES_WITHIN, &what, || {
        let rows = match lab.node("n1").try_tasks(service) {
            Ok(rows) => rows,
            Err(output) => return (None, output.to_string()),
        };
        let running = rows.iter().filter(|row| row.is_running() && row.node != VICTIM);
        let running: BTreeSet<&str> = running.map(|row| row.id.as_str()).collect();
        let processes = lab.whoamis_of(service);
        let real = processes.iter().filter(|process| process.node != VICTIM);
        let real: BTreeSet<&str> = real.map(|process| process.task.as_str()).collect();
        let is_so = running.len() == N_REPLICAS && running == real;
        (is_so.then_some(()), format!("{WHOAMI}: {rows:#?}\nprocesses: {processes:#?}"))
    });
}
