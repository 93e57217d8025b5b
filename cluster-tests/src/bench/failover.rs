//! The leader's power goes, and stays away, until the next leader has acknowledged a write.

use skep_cluster_tests::{Lab, SETTLES_WITHIN, wait_until};
use skep_runtime::clock::monotonic;

use super::figures::{Samples, Target, Unit, load_average};
use super::start_lab;

const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
const MEDIAN: Target = Target::AtMost(1.5);
const WORST: Target = Target::AtMost(3.0);

pub(crate) fn run(is_quick: bool) {
    let n_rounds = if is_quick { 3 } else { 10 };
    let lab = start_lab(3, 0);
    let mut samples = Samples::new(Unit::Seconds);
    let mut via = "n1";
    for round in 1..=n_rounds {
        wait_until_whole(&lab, via);
        let leader = lab.wait_for_leader(via);
        let others = || MANAGERS.into_iter().filter(|name| *name != leader);
        // Each of the two that stay is asked in turn.
        via = others().nth(round % 2).expect("two of three stay");
        let name = format!("b{round}");
        let load = load_average();
        let started = monotonic();
        lab.kill(&[&leader]);
        let killed = started.elapsed().as_secs_f64();
        lab.node(via).skep(&["debug", "write", "--count", "1", "--name", &name]).ok();
        let acknowledged = started.elapsed().as_secs_f64();
        println!(
            "round {round}: {leader} died, {via} acknowledged a write after {acknowledged:.3} s \
             (the kill returned after {killed:.3} s); load {load}"
        );
        samples.add(acknowledged);
        lab.start_nodes(&[&leader]);
    }
    wait_until_whole(&lab, via);
    samples.report("from the kill to the acknowledgement", Some(MEDIAN));
    samples.report_worst("from the kill to the acknowledgement", WORST);
    lab.down();
}

/// Waits until all managers are reachable and have the same store.
fn wait_until_whole(lab: &Lab, via: &str) {
    wait_until(SETTLES_WITHIN, "all managers are reachable", || {
        let output = lab.node(via).skep(&["node", "ls", "--format", "json"]);
        let rows = if output.status.success() { output.json_lines() } else { Vec::new() };
        let states: Vec<&str> = rows.iter().filter_map(|r| r["ManagerStatus"].as_str()).collect();
        let n_leaders = states.iter().filter(|state| **state == "Leader").count();
        let n_others = states.iter().filter(|state| **state == "Reachable").count();
        let is_whole = n_leaders == 1 && n_leaders + n_others == MANAGERS.len();
        (is_whole.then_some(()), output.to_string())
    });
    lab.wait_until_alike(via, MANAGERS.len());
}
