//! Seeds of every run: no invariant breaks.

use skep_turmoil::{Options, Report, run};

/// Seeds of every run. `make sim RING=turmoil SEEDS=100` runs more.
const N_SEEDS: u64 = 10;
const N_THREADS: u64 = 2;

/// All reports of the seeds whose number leaves `remainder`.
fn run_part(remainder: u64) -> Vec<Report> {
    let seeds = (0..N_SEEDS).filter(|seed| seed % N_THREADS == remainder);
    seeds.map(|seed| run(Options::of(seed))).collect()
}

#[test]
fn no_seed_breaks_an_invariant() {
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let parts: Vec<_> =
            (0..N_THREADS).map(|part| scope.spawn(move || run_part(part))).collect();
        parts.into_iter().flat_map(|part| part.join().expect("a run does not panic")).collect()
    });
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
    assert!(sum(|report| report.counts.n_snapshots) > N_SEEDS, "hardly a snapshot is passed on");
    assert!(sum(|report| report.n_terms as u64) > 2 * N_SEEDS, "hardly a leader changes");
}
