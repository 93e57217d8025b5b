//! Every core has twice as much to do as it can, at normal priority, and the leader must stay.

use std::time::Duration;

use skep_cluster_tests::{Busy, Lab};
use skep_runtime::clock::monotonic;

use super::figures::{Samples, Unit, load_average};
use super::start_lab;

const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
/// What the daemons log, each once, for every election that changed something.
const ELECTION: &str = "the leader of the swarm changed";
/// Between two writes; they show what the saturation does to a client.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

pub(crate) fn run(is_quick: bool) {
    let duration = Duration::from_secs(if is_quick { 20 } else { 120 });
    if is_quick {
        println!("shortened: 20 s instead of 120 s");
    }
    let lab = start_lab(3, 0);
    let leader = lab.wait_for_leader("n1");
    lab.wait_until_alike("n1", MANAGERS.len());
    let before = MANAGERS.map(|node| n_elections(&lab, node));
    let busy = Busy::start();
    let n_threads = busy.n_threads();
    let mut writes = Samples::new(Unit::Seconds);
    let started = monotonic();
    for number in 0.. {
        if started.elapsed() >= duration {
            break;
        }
        let asked = monotonic();
        let name = format!("w{number}");
        lab.node("n1").skep(&["debug", "write", "--count", "1", "--name", &name]).ok();
        writes.add(asked.elapsed().as_secs_f64());
        std::thread::sleep(WRITE_INTERVAL.saturating_sub(asked.elapsed()));
    }
    let load = load_average();
    let after = MANAGERS.map(|node| n_elections(&lab, node));
    drop(busy);
    let n_changes: usize = after.iter().sum::<usize>() - before.iter().sum::<usize>();
    let verdict = if n_changes == 0 { "met" } else { "MISSED" };
    println!(
        "{n_threads} busy threads for {} s: {n_changes} changes of the leader in the logs; target \
         none: {verdict}; load {load}",
        duration.as_secs()
    );
    println!("the leader was {leader}, and is {}", lab.wait_for_leader("n1"));
    writes.report("a write meanwhile, with its client", None);
    lab.down();
}

fn n_elections(lab: &Lab, node: &str) -> usize {
    lab.node(node).log().lines().filter(|line| line.contains(ELECTION)).count()
}
