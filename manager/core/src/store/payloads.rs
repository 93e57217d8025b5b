//! Secrets and configs in the store: which of them stay while somebody uses them.
//!
//! Bytes are written once: an object that replaces another has them of new versions only, and takes the
//! others from the one that is there. A version that somebody uses stays, whoever leaves it out: who
//! decided so had not seen that use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use skep_common::object::DataVersion;
use skep_common::{Kind, Object, Task, TaskId};

use super::State;
use crate::command::Refusal;
use crate::secrets::{self, PayloadKey};

impl State {
    /// The versions that services name, or named before: what they are, and what they may go back to.
    pub(crate) fn payloads_of_specs(&self) -> BTreeSet<PayloadKey> {
        let staying = self.services.values().filter(|service| !service.pending_delete);
        let current = staying.flat_map(|service| {
            let specs = [Some(&service.spec), service.previous_spec.as_ref()];
            specs.into_iter().flatten().flat_map(|spec| secrets::keys_of(&spec.task_template))
        });
        let before = self.revisions.values();
        let before = before.flat_map(|revision| secrets::keys_of(&revision.spec.task_template));
        current.chain(before).collect()
    }

    /// Of some versions, those that tasks use which have not ended, each with one such task.
    pub(crate) fn payloads_of_tasks(
        &self,
        keys: &BTreeSet<PayloadKey>,
    ) -> BTreeMap<PayloadKey, TaskId> {
        let live = |task: &&Arc<Task>| !task.status.state.is_terminal();
        let used = self
            .tasks
            .values()
            .filter(live)
            .flat_map(|task| secrets::keys_of(&task.spec).map(move |key| (key, task.id)));
        used.filter(|(key, _)| keys.contains(key)).collect()
    }

    /// The versions of an object that takes the place of another.
    pub(super) fn merged_versions(
        &self,
        kind: Kind,
        id: u128,
        old: &BTreeMap<u64, DataVersion>,
        mut new: BTreeMap<u64, DataVersion>,
    ) -> BTreeMap<u64, DataVersion> {
        for (number, version) in &mut new {
            if version.data.is_none()
                && let Some(known) = old.get(number)
            {
                version.clone_from(known);
            }
        }
        new.retain(|_, version| version.data.is_some());
        let is_left_out = |number: &&u64| !new.contains_key(*number);
        let left_out = old.keys().filter(is_left_out);
        let left_out: BTreeSet<PayloadKey> =
            left_out.map(|version| PayloadKey { kind, id, version: *version }).collect();
        if left_out.is_empty() {
            return new;
        }
        let mut used = self.payloads_of_specs();
        used.extend(self.payloads_of_tasks(&left_out).into_keys());
        for key in left_out.intersection(&used) {
            new.insert(key.version, old[&key.version].clone());
        }
        new
    }

    /// Refuses to erase a secret or a config that a service uses.
    pub(super) fn refuse_used_payload(&self, kind: Kind, id: u128) -> Result<(), Refusal> {
        let name = match kind {
            Kind::Secret => self.secrets.get(&skep_common::SecretId(id)).map(|o| &o.spec.name),
            Kind::Config => self.configs.get(&skep_common::ConfigId(id)).map(|o| &o.spec.name),
            _ => None,
        };
        let Some(name) = name.cloned() else { return Ok(()) };
        let users = secrets::users(self, kind, id);
        let services: Vec<String> = users.map(|service| service.spec.name.clone()).collect();
        match (services.is_empty(), kind) {
            (true, _) => Ok(()),
            (false, Kind::Config) => Err(Refusal::ConfigInUse { name, services }),
            (false, _) => Err(Refusal::SecretInUse { name, services }),
        }
    }

    /// Refuses a service that newly names what is not there: it was erased after the request was read.
    pub(super) fn check_payloads(&self, object: &Object) -> Result<(), Refusal> {
        let Object::Service(service) = object else { return Ok(()) };
        if service.pending_delete {
            return Ok(());
        }
        let old = self.services.get(&service.id).filter(|old| !old.pending_delete);
        let is_old = |key: &PayloadKey| {
            old.is_some_and(|old| secrets::keys_of(&old.spec.task_template).any(|one| one == *key))
        };
        let mut new = secrets::keys_of(&service.spec.task_template).filter(|key| !is_old(key));
        match new.find(|key| secrets::find(self, *key).is_none()) {
            Some(key) => {
                let name = secrets::name_of(&service.spec.task_template, key);
                Err(Refusal::PayloadNotFound { kind: key.kind, name, version: key.version })
            }
            None => Ok(()),
        }
    }
}
