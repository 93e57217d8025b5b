//! Seeds of every run: no invariant breaks.

use skep_simulation::seeds::run_all;
use skep_turmoil::{Options, Report, run};

/// Seeds of every run. `make sim RING=turmoil SEEDS=100` runs more.
const N_SEEDS: u64 = 10;

#[test]
fn no_seed_breaks_an_invariant() {
    let reports = run_all(0..N_SEEDS, |seed| run(Options::of(seed)));
    let failed: Vec<String> = reports
        .iter()
        .filter(|report| report.violation.is_some())
        .map(ToString::to_string)
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    let (n_crashes, n_written) =
        (sum(|report| report.counts.n_crashes), sum(|report| report.counts.n_acknowledged));
    assert!(n_crashes > 2 * N_SEEDS, "little happens: {n_crashes} crashes");
    assert!(n_written > 50 * N_SEEDS, "clients get little: {n_written} writes");
    // More than the one that each seed has in the end.
    let (n_added, n_removed) =
        (sum(|report| report.counts.n_added), sum(|report| report.counts.n_removed));
    assert!(n_added > 2 * N_SEEDS, "hardly a manager is added: {n_added}");
    assert!(n_removed > 2 * N_SEEDS, "hardly a manager is taken out: {n_removed}");
    assert!(sum(|report| report.counts.n_snapshots) > N_SEEDS, "hardly a snapshot is passed on");
    assert!(sum(|report| report.n_terms as u64) > 2 * N_SEEDS, "hardly a leader changes");
}
