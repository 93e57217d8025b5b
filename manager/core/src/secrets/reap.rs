//! Erases versions of secrets and configs that nobody needs any more.
//!
//! The newest version stays, and whatever a service's spec, a spec that it had, or a task that has not
//! ended names. Services and their specs are looked at when one of them has changed. Where a version is
//! left to a task alone, that task is remembered: until it changes, nothing can have come of it.

use std::collections::{BTreeMap, BTreeSet};

use skep_common::object::{Config, Secret};
use skep_common::{ServiceId, TaskId};

use super::{Payload, PayloadKey};
use crate::fork::Fork;
use crate::plan::Dirty;
use crate::store::State;

/// What a leader remembers of versions.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Whether a version may have become useless.
    is_due: bool,
    /// Of each version that only tasks need, one that does.
    witnesses: BTreeSet<TaskId>,
}

impl Memory {
    /// Takes note of what changed.
    pub(crate) fn note(&mut self, dirty: &Dirty) {
        let is_witness = |task: (&TaskId, &ServiceId)| self.witnesses.contains(task.0);
        self.is_due |= dirty.all
            || dirty.payloads
            || !dirty.services.is_empty()
            || (!self.witnesses.is_empty() && dirty.tasks.iter().any(is_witness));
    }
}

/// Erases versions that nobody uses any more.
pub(crate) fn reap(fork: &mut Fork<'_>, memory: &mut Memory) {
    if !std::mem::take(&mut memory.is_due) {
        return;
    }
    memory.witnesses.clear();
    let state = fork.state();
    let mut old: BTreeSet<PayloadKey> = BTreeSet::new();
    old.extend(state.secrets().values().flat_map(|secret| old_versions(&**secret)));
    old.extend(state.configs().values().flat_map(|config| old_versions(&**config)));
    if old.is_empty() {
        return;
    }
    let by_specs = state.payloads_of_specs();
    old.retain(|key| !by_specs.contains(key));
    if old.is_empty() {
        return;
    }
    let by_tasks = state.payloads_of_tasks(&old);
    memory.witnesses.extend(by_tasks.values());
    old.retain(|key| !by_tasks.contains_key(key));
    let mut unused: BTreeMap<PayloadKey, Vec<u64>> = BTreeMap::new();
    for key in &old {
        unused.entry(PayloadKey { version: 0, ..*key }).or_default().push(key.version);
    }
    for (key, versions) in unused {
        fork.forget_versions(key.kind, key.id, &versions);
        // If this plan is not committed, the next pass decides again.
        memory.is_due = true;
    }
}

/// All versions but the newest.
fn old_versions<P: Payload>(payload: &P) -> Vec<PayloadKey> {
    let key = |version: &u64| PayloadKey { kind: P::KIND, id: payload.raw_id(), version: *version };
    payload.versions().keys().rev().skip(1).map(key).collect()
}

/// The payload without some versions, and without bytes: the store has those of the others.
fn without<P: Payload>(state: &State, id: u128, versions: &[u64]) -> Option<skep_common::Object> {
    let mut payload = (**P::find(state, id)?).clone();
    payload.versions_mut().retain(|number, _| !versions.contains(number));
    payload.versions_mut().values_mut().for_each(|version| version.data = None);
    Some(payload.into_object())
}

/// The same of either kind.
pub(crate) fn without_versions(
    state: &State,
    key: (skep_common::Kind, u128),
    versions: &[u64],
) -> Option<skep_common::Object> {
    match key.0 {
        skep_common::Kind::Config => without::<Config>(state, key.1, versions),
        _ => without::<Secret>(state, key.1, versions),
    }
}
