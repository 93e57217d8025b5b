//! What is known of a run by whoever watches all managers at once, and what must hold of it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::history::Operation;

const UNPOISONED: &str = "nothing panics while it holds the ledger";

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Phase {
    /// The swarm is being founded.
    #[default]
    Founding,
    /// Anything may fail.
    Faults,
    /// Nothing fails any more.
    Settling,
    /// Everything has to succeed.
    Proof,
}

/// Shared by all that runs in one simulation.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    clock: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    phase: Phase,
    at: Duration,
    violation: Option<String>,
    operations: Vec<Operation>,
    leaders: BTreeMap<u64, u64>,
    current: Option<(u64, u64)>,
    digests: BTreeMap<u64, (u64, String)>,
    fenced: BTreeMap<u64, u64>,
    counts: Counts,
    trace: Sha256,
    n_digests: u64,
    is_printed: bool,
}

/// What happened in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Writes that were acknowledged.
    pub n_acknowledged: u64,
    /// Writes whose outcome stayed unknown.
    pub n_unknown: u64,
    /// Reads that were answered.
    pub n_reads: u64,
    /// Managers that were killed or lost power.
    pub n_crashes: u64,
    /// Managers that stopped because of their disk.
    pub n_stops: u64,
    /// Faults of all kinds.
    pub n_faults: u64,
    /// Snapshots that a manager took over from another one.
    pub n_snapshots: u64,
}

impl Ledger {
    /// An empty one, which prints what happens where that is asked for.
    pub(crate) fn new(is_printed: bool) -> Self {
        let ledger = Self::default();
        ledger.inner().is_printed = is_printed;
        ledger
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect(UNPOISONED)
    }

    /// A moment: later than all that were given out before.
    pub(crate) fn moment(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// Where the run stands.
    pub(crate) fn phase(&self) -> Phase {
        self.inner().phase
    }

    /// The run goes on to another phase.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.note(&format!("phase {phase:?}"));
        self.inner().phase = phase;
    }

    /// Adds a line to the trace.
    pub(crate) fn note(&self, line: &str) {
        let mut inner = self.inner();
        // Between the steps nobody's time passes.
        inner.at = turmoil::sim_elapsed().unwrap_or(inner.at);
        let at = inner.at;
        inner.trace.update(line.as_bytes());
        inner.trace.update(b"\n");
        if inner.is_printed {
            println!("{:9.3} {line}", at.as_secs_f64());
        }
    }

    /// Something that must not be has come to be. The first one counts.
    pub(crate) fn violate(&self, invariant: u32, what: impl AsRef<str>) {
        let what = what.as_ref();
        self.note(&format!("violation of {invariant}: {what}"));
        self.inner().violation.get_or_insert_with(|| format!("{invariant}: {what}"));
    }

    /// What must not be and is.
    pub(crate) fn violation(&self) -> Option<String> {
        self.inner().violation.clone()
    }

    /// Adds to what happened.
    pub(crate) fn count(&self, add: impl FnOnce(&mut Counts)) {
        add(&mut self.inner().counts);
    }

    /// What happened.
    pub(crate) fn counts(&self) -> Counts {
        self.inner().counts
    }

    /// Terms with a leader.
    pub(crate) fn n_terms(&self) -> usize {
        self.inner().leaders.len()
    }

    /// Comparisons of two managers' states.
    pub(crate) fn n_digests(&self) -> u64 {
        self.inner().n_digests
    }

    /// Digest of all that was noted.
    pub(crate) fn trace(&self) -> String {
        let digest = self.inner().trace.clone().finalize();
        digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// An operation of a client has ended.
    pub(crate) fn operation(&self, operation: Operation) {
        self.inner().operations.push(operation);
    }

    /// All operations so far.
    pub(crate) fn operations(&self) -> Vec<Operation> {
        self.inner().operations.clone()
    }

    /// A manager leads a term.
    pub(crate) fn leads(&self, raft_id: u64, term: u64) {
        let other = {
            let mut inner = self.inner();
            inner.current = inner.current.max(Some((term, raft_id)));
            *inner.leaders.entry(term).or_insert(raft_id)
        };
        self.note(&format!("manager {raft_id} leads term {term}"));
        if other != raft_id {
            self.violate(9, format!("managers {other} and {raft_id} both lead term {term}"));
        }
    }

    /// The leader of the newest term.
    pub(crate) fn leader(&self) -> Option<u64> {
        self.inner().current.map(|(_, raft_id)| raft_id)
    }

    /// A command that was decided in `term` is entry `index` of the log.
    pub(crate) fn fenced(&self, index: u64, term: u64) {
        let out_of_order = {
            let mut inner = self.inner();
            let before = inner.fenced.range(..index).next_back().map(|(at, term)| (*at, *term));
            let after = inner.fenced.range(index + 1..).next().map(|(at, term)| (*at, *term));
            inner.fenced.insert(index, term);
            before.filter(|(_, of)| *of > term).or_else(|| after.filter(|(_, of)| *of < term))
        };
        if let Some((at, of)) = out_of_order {
            self.violate(
                9,
                format!("entry {index} was decided in term {term}, and entry {at} in term {of}"),
            );
        }
    }

    /// A manager has the state of `version`.
    pub(crate) fn digest(&self, raft_id: u64, version: u64, digest: &str) {
        let differs = {
            let mut inner = self.inner();
            match inner.digests.get(&version) {
                Some((other, known)) if known != digest => Some(*other),
                Some(_) => {
                    inner.n_digests += 1;
                    None
                }
                None => {
                    inner.digests.insert(version, (raft_id, digest.to_owned()));
                    None
                }
            }
        };
        if let Some(other) = differs {
            self.violate(
                10,
                format!(
                    "managers {other} and {raft_id} have different states of version {version}"
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation_of(acts: impl FnOnce(&Ledger)) -> String {
        let ledger = Ledger::default();
        acts(&ledger);
        ledger.violation().unwrap_or_default()
    }

    #[test]
    fn what_must_not_be_is_told_by_number() {
        let fine = violation_of(|ledger| {
            ledger.leads(1, 4);
            ledger.leads(1, 4);
            ledger.leads(2, 5);
            ledger.fenced(10, 4);
            ledger.fenced(12, 5);
            ledger.fenced(11, 4);
            ledger.digest(1, 7, "a");
            ledger.digest(2, 7, "a");
        });
        assert_eq!(fine, "");
        let two_leaders = violation_of(|ledger| {
            ledger.leads(1, 4);
            ledger.leads(2, 4);
        });
        assert!(two_leaders.starts_with("9: managers 1 and 2 both lead"), "{two_leaders}");
        for (first, second) in [((10, 5), (12, 4)), ((12, 4), (10, 5))] {
            let deposed = violation_of(|ledger| {
                ledger.fenced(first.0, first.1);
                ledger.fenced(second.0, second.1);
            });
            assert!(deposed.starts_with("9: entry"), "{deposed}");
        }
        let differ = violation_of(|ledger| {
            ledger.digest(1, 7, "a");
            ledger.digest(2, 7, "b");
        });
        assert!(differ.starts_with("10: managers 1 and 2"), "{differ}");
    }
}
