//! Seeds of every run: no invariant breaks, and the same seed is the same run.

use std::process::Command;

use skep_simulation::seeds::run_all;
use skep_simulation::{Counts, Options, run};

/// Seeds of every run. `make sim SEEDS=2000` runs more.
const N_SEEDS: u64 = 200;

#[test]
fn no_seed_breaks_an_invariant() {
    let reports = run_all(0..N_SEEDS, |seed| run(Options::of(seed)));
    let failed: Vec<String> = reports
        .iter()
        .filter(|report| report.violation.is_some())
        .map(ToString::to_string)
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let n_entries: u64 = reports.iter().map(|report| report.n_entries).sum();
    let counts = reports.iter().map(|report| report.counts).fold(Counts::default(), Counts::and);
    let is_all_tried = counts.n_promoted > N_SEEDS / 4 && counts.n_demoted > N_SEEDS / 4;
    assert!(is_all_tried, "managers hardly change: {counts}");
    assert!(counts.n_attempts > N_SEEDS / 10, "nodes hardly try by themselves: {counts}");
    let are_levels_tried = counts.n_upgraded > N_SEEDS && counts.n_downgraded > N_SEEDS / 10;
    assert!(are_levels_tried, "programs hardly change: {counts}");
    let n_granted: usize = reports.iter().map(|report| report.n_granted).sum();
    assert!(n_entries > 100 * N_SEEDS, "the swarms do little: {n_entries} entries");
    assert!(n_granted as u64 > 10 * N_SEEDS, "clients get little: {n_granted} wishes");
}

#[test]
fn the_same_seed_gives_the_same_trace_also_in_another_process() {
    for seed in [3, 17] {
        let first = run(Options::of(seed));
        assert_eq!(run(Options::of(seed)), first, "seed {seed}");
        let other = Command::new(env!("CARGO_BIN_EXE_skep-sim"))
            .args(["--seed", &seed.to_string()])
            .output()
            .expect("the program runs");
        let line = String::from_utf8_lossy(&other.stdout);
        assert!(line.contains(&first.trace), "seed {seed}: {line} is not of {}", first.trace);
    }
    assert_ne!(run(Options::of(3)).trace, run(Options::of(4)).trace);
}
