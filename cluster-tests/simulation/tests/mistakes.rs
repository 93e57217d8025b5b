//! Planted mistakes, one at a time: each is caught within the seeds of every run, by the invariant that it
//! breaks. That the same seeds pass without it is shown in `seeds`.

use skep_common::mistakes::{Mistake, plant};
use skep_simulation::{Options, run};

const N_SEEDS: u64 = 200;

/// Runs seeds with the mistake until an invariant breaks, which must be one of these numbers.
#[track_caller]
fn expect_caught(mistake: Mistake, by: &[&str]) {
    for seed in 0..N_SEEDS {
        let report = plant(mistake, || run(Options::of(seed)));
        let Some(violation) = &report.violation else { continue };
        let number = violation.split(':').next().unwrap_or_default();
        assert!(by.contains(&number), "{mistake:?} is caught by another invariant: {report}");
        return;
    }
    panic!("{mistake:?} is not caught by {N_SEEDS} seeds");
}

#[test]
fn a_state_that_may_fall_is_caught() {
    expect_caught(Mistake::StateFalls, &["5"]);
}

#[test]
fn an_agent_that_obeys_a_deposed_leader_is_caught() {
    expect_caught(Mistake::DeposedAssignment, &["9"]);
}

#[test]
fn an_address_that_is_freed_before_its_container_stopped_is_caught() {
    expect_caught(Mistake::AddressFreedEarly, &["4"]);
}

#[test]
fn a_task_that_a_new_leader_places_again_is_caught() {
    expect_caught(Mistake::PlacedTwice, &["3", "5"]);
}

#[test]
fn a_secret_for_a_task_that_was_refused_is_caught() {
    expect_caught(Mistake::SecretToRefused, &["6"]);
}

#[test]
fn a_leader_that_counts_a_manager_that_was_taken_out_is_caught() {
    expect_caught(Mistake::RemovedCounted, &["14"]);
}

#[test]
fn a_drain_that_does_not_wait_is_caught() {
    expect_caught(Mistake::DrainWithoutWait, &["7"]);
}

#[test]
fn a_write_that_an_older_manager_does_not_know_is_caught() {
    expect_caught(Mistake::LevelIgnored, &["15"]);
}
