//! What services were before, as the store keeps it.

use std::sync::Arc;

use skep_common::object::Revision;
use skep_common::{Kind, Meta, Service, ServiceId};

use super::{Change, State};

/// Earlier specs that a service keeps: as many as Kubernetes' `revisionHistoryLimit`. Each may name versions
/// of secrets, which are kept for it.
const REVISIONS_MAX: usize = 10;

impl State {
    /// The specs that a service had, the oldest first.
    pub fn revisions_of(&self, service_id: ServiceId) -> impl Iterator<Item = &Arc<Revision>> {
        let whole = (service_id, 0)..=(service_id, u64::MAX);
        self.revisions.range(whole).map(|(_, revision)| revision)
    }

    /// Keeps what `old` was as a revision, where `new` has another spec, and numbers that of `new`. A service
    /// that takes the place of one on its way out has no part in its history.
    pub(super) fn note_revision(&mut self, old: &Service, new: &mut Service, meta: Meta) {
        if old.pending_delete && !new.pending_delete {
            self.delete_revisions(old.id);
            return;
        }
        if old.spec == new.spec {
            new.revision = old.revision;
            return;
        }
        let number = old.revision.max(1); // Of a service from before there were numbers.
        new.revision = number + 1;
        let revision = Revision {
            service_id: old.id,
            number,
            meta: Meta { created_at: meta.updated_at, ..meta },
            spec: old.spec.clone(),
            spec_version: old.spec_version,
            replaced_at: meta.updated_at,
        };
        self.revisions.insert((old.id, number), Arc::new(revision));
        let numbers: Vec<u64> = self.revisions_of(old.id).map(|found| found.number).collect();
        let n_surplus = numbers.len().saturating_sub(REVISIONS_MAX);
        for number in &numbers[..n_surplus] {
            self.revisions.remove(&(old.id, *number));
        }
    }

    pub(super) fn put_revision(&mut self, mut revision: Revision, meta: Meta) -> Change {
        let service_id = revision.service_id;
        revision.meta = meta;
        self.revisions.insert((service_id, revision.number), Arc::new(revision));
        Change {
            kind: Kind::Revision,
            id: service_id.0,
            service_id: Some(service_id),
            node_id: None,
        }
    }

    /// Erases what a service was before.
    pub(super) fn delete_revisions(&mut self, service_id: ServiceId) {
        let numbers: Vec<u64> = self.revisions_of(service_id).map(|found| found.number).collect();
        for number in numbers {
            self.revisions.remove(&(service_id, number));
        }
    }
}
