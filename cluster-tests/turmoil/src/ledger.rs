//! What is known of a run by whoever watches all managers at once, and what must hold of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tonic::Status;

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
    /// So have changes of the managers, one at a time.
    Changes,
}

/// What a manager says of the managers when nothing changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The term that it is in.
    pub(crate) term: u64,
    /// Who votes by the log, by Raft id.
    pub(crate) voters: BTreeSet<u64>,
    /// Who gets the log and has no vote.
    pub(crate) learners: BTreeSet<u64>,
    /// Who is a manager by the state.
    pub(crate) managers: BTreeSet<u64>,
    /// Who is on the way to be a manager no more.
    pub(crate) retiring: BTreeSet<u64>,
}

/// What was acknowledged of who is a manager.
#[derive(Debug, Default)]
struct Roles {
    /// Joined, and nobody has asked for anything else since.
    joined: BTreeSet<u64>,
    /// To be a manager no more; it may take a while.
    leaving: BTreeSet<u64>,
    /// A manager no more.
    left: BTreeSet<u64>,
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
    roles: Roles,
    seen: BTreeMap<u64, Seen>,
    proved: BTreeSet<u64>,
    /// The managers of a swarm at rest, by Raft id.
    members: Option<BTreeSet<u64>>,
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
    /// Managers that joined after the swarm was founded.
    pub n_added: u64,
    /// Managers that were taken out.
    pub n_removed: u64,
    /// Changes of the managers that were refused.
    pub n_refused: u64,
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

    /// This client has proved that all is well.
    pub(crate) fn proved(&self, client: u64) {
        self.inner().proved.insert(client);
    }

    /// Clients that have.
    pub(crate) fn n_proved(&self) -> u64 {
        self.inner().proved.len() as u64
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
        if self.inner().roles.left.contains(&raft_id) {
            self.violate(9, format!("manager {raft_id}, which was taken out, leads term {term}"));
        }
    }

    /// A manager was told that it is one.
    pub(crate) fn joined(&self, raft_id: u64) {
        self.inner().roles.joined.insert(raft_id);
    }

    /// Somebody asks for a manager to be none: from now on nobody may count on it. True: it was counted on.
    pub(crate) fn asked_out(&self, raft_id: u64) -> bool {
        self.inner().roles.joined.remove(&raft_id)
    }

    /// A change of the managers was refused, or its outcome is not known. Where nothing fails, none is.
    pub(crate) fn refuse_change(&self, status: &Status) {
        self.count(|counts| counts.n_refused += 1);
        if self.phase() == Phase::Changes {
            self.violate(12, format!("a change of the managers is refused: {}", status.message()));
        }
    }

    /// It was acknowledged that a manager is to be one no more.
    pub(crate) fn leaving(&self, raft_id: u64) {
        self.inner().roles.leaving.insert(raft_id);
    }

    /// It was acknowledged that a manager is one no more.
    pub(crate) fn left(&self, raft_id: u64) {
        self.leaving(raft_id);
        self.inner().roles.left.insert(raft_id);
    }

    /// What a manager says of all.
    pub(crate) fn sees(&self, raft_id: u64, seen: Seen) {
        self.inner().seen.insert(raft_id, seen);
    }

    /// Forgets what managers have said so far.
    pub(crate) fn look_anew(&self) {
        self.inner().seen.clear();
    }

    /// The managers of a swarm at rest, where it is: each of them says the same, log and state agree, and all that was
    /// acknowledged of roles is so. The error says what is otherwise.
    pub(crate) fn at_rest(&self) -> Result<BTreeSet<u64>, String> {
        judge(&self.inner())
    }

    /// The newest term that a manager at rest is in.
    pub(crate) fn term(&self) -> u64 {
        let inner = self.inner();
        let of_members = inner.members.iter().flatten().filter_map(|id| inner.seen.get(id));
        of_members.map(|seen| seen.term).max().unwrap_or(0)
    }

    /// These are the managers, and nothing changes that.
    pub(crate) fn set_members(&self, members: BTreeSet<u64>) {
        self.note(&format!("the managers are {members:?}"));
        self.inner().members = Some(members);
    }

    /// The managers of the swarm at rest, once it is.
    pub(crate) fn members(&self) -> Option<BTreeSet<u64>> {
        self.inner().members.clone()
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

/// Managers that were taken out and have not heard of it say what was, so that only those are asked whom a set names.
fn judge(inner: &Inner) -> Result<BTreeSet<u64>, String> {
    let is_settled = |members: &BTreeSet<u64>| {
        let says_so = |raft_id: &u64| inner.seen.get(raft_id).is_some_and(|seen| seen.is(members));
        !members.is_empty() && members.iter().all(says_so)
    };
    let sets: BTreeSet<&BTreeSet<u64>> = inner.seen.values().map(|seen| &seen.managers).collect();
    let settled: Vec<&BTreeSet<u64>> = sets.into_iter().filter(|set| is_settled(set)).collect();
    let [members] = settled.as_slice() else {
        return Err(format!("the managers do not agree who they are: {:?}", inner.seen));
    };
    let Roles { joined, leaving, .. } = &inner.roles;
    if let Some(lost) = joined.difference(members).next() {
        return Err(format!("manager {lost} has joined, and {members:?} are the managers"));
    }
    if let Some(kept) = leaving.intersection(members).next() {
        return Err(format!("manager {kept} was to be one no more, and {members:?} are"));
    }
    Ok((*members).clone())
}

impl Seen {
    /// It says that these are the managers, and nothing else.
    fn is(&self, members: &BTreeSet<u64>) -> bool {
        let is_quiet = self.learners.is_empty() && self.retiring.is_empty();
        is_quiet && self.voters == *members && self.managers == *members
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(voters: &[u64], managers: &[u64]) -> Seen {
        let set = |ids: &[u64]| ids.iter().copied().collect();
        let (learners, retiring) = (BTreeSet::new(), BTreeSet::new());
        Seen { term: 3, voters: set(voters), learners, managers: set(managers), retiring }
    }

    fn rest_of(acts: impl FnOnce(&Ledger)) -> String {
        let ledger = Ledger::default();
        ledger.sees(1, seen(&[1, 2], &[1, 2]));
        ledger.sees(2, seen(&[1, 2], &[1, 2]));
        acts(&ledger);
        ledger.at_rest().map_or_else(|why| why, |members| format!("{members:?}"))
    }

    #[test]
    fn a_swarm_is_at_rest_where_log_state_and_what_was_acknowledged_agree() {
        let fine = "{1, 2}";
        assert_eq!(rest_of(|_| {}), fine);
        assert_eq!(rest_of(|ledger| ledger.sees(9, seen(&[1, 2, 9], &[1, 2, 9]))), fine);
        assert_eq!(rest_of(|ledger| ledger.left(9)), fine);
        let asked_out = rest_of(|ledger| {
            ledger.joined(9);
            ledger.asked_out(9);
        });
        assert_eq!(asked_out, fine);
        let differ = "do not agree";
        let retiring = Seen { retiring: BTreeSet::from([2]), ..seen(&[1, 2], &[1, 2]) };
        let learning = Seen { learners: BTreeSet::from([9]), ..seen(&[1, 2], &[1, 2]) };
        for (why, wrong) in [
            (differ, rest_of(|ledger| ledger.sees(2, seen(&[1, 2, 9], &[1, 2])))),
            (differ, rest_of(|ledger| ledger.sees(2, seen(&[1, 2], &[1])))),
            (differ, rest_of(|ledger| ledger.sees(2, retiring))),
            (differ, rest_of(|ledger| ledger.sees(2, learning))),
            (differ, rest_of(|ledger| ledger.sees(9, seen(&[9], &[9])))),
            (differ, Ledger::default().at_rest().unwrap_err()),
            ("manager 9 has joined", rest_of(|ledger| ledger.joined(9))),
            ("manager 2 was to be one no more", rest_of(|ledger| ledger.leaving(2))),
        ] {
            assert!(wrong.contains(why), "{why:?} in {wrong:?}");
        }
    }

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
        let removed = violation_of(|ledger| {
            ledger.left(2);
            ledger.leads(2, 4);
        });
        assert!(removed.starts_with("9: manager 2, which was taken out"), "{removed}");
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
