//! Planted mistakes, one at a time: each is caught within a few seeds, by the invariant that it breaks. That
//! seeds pass without it is shown in `seeds`.

use skep_common::mistakes::{Mistake, plant};
use skep_turmoil::{Options, run};

/// The rarest is caught by every second one; a run differs a little from the next.
const N_SEEDS: u64 = 20;

/// Runs seeds with the mistake until an invariant breaks, which must be one of these numbers.
#[track_caller]
fn expect_caught(mistake: Mistake, by: &[&str]) {
    for seed in 0..N_SEEDS {
        let report = plant(mistake, || run(Options::of(seed)));
        let Some(violation) = &report.violation else { continue };
        let number = violation.split(':').next().unwrap_or_default();
        assert!(
            by.contains(&number),
            "{mistake:?} is caught by another invariant: {report} MISTAKE={mistake:?}"
        );
        return;
    }
    panic!("{mistake:?} is not caught by {N_SEEDS} seeds");
}

#[test]
fn a_write_that_is_acknowledged_before_it_is_durable_is_caught() {
    expect_caught(Mistake::AcknowledgedEarly, &["1", "9", "10"]);
}

#[test]
fn a_read_that_asks_no_majority_is_caught() {
    // A read may also be behind where it is to prove that all is well again.
    expect_caught(Mistake::StaleRead, &["1", "12"]);
}

#[test]
fn a_write_of_a_deposed_leader_is_caught() {
    expect_caught(Mistake::DeposedWrite, &["9"]);
}

#[test]
fn a_manager_that_is_called_a_worker_before_the_log_says_so_is_caught() {
    expect_caught(Mistake::RetiredEarly, &["12"]);
}
