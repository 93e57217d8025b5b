//! What services were before, as the store keeps it.

use std::sync::Arc;

use skep_common::object::Revision;
use skep_common::{Kind, Meta, Service, ServiceId};

use super::{Change, State};

impl State {
    /// The specs that a service had, the oldest first.
    pub fn revisions_of(&self, service_id: ServiceId) -> impl Iterator<Item = &Arc<Revision>> {
        let whole = (service_id, 0)..=(service_id, u64::MAX);
        self.revisions.range(whole).map(|(_, revision)| revision)
    }

    /// Decides whether `old` becomes a revision as `new` takes its place. Nothing does so far.
    pub(super) fn note_revision(&mut self, _old: &Service, _new: &mut Service) {}

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
