//! The secrets and configs that a node is given.

use skep_common::Kind;
use skep_manager_core::State;
use skep_manager_core::secrets::{self, PayloadKey};
use skep_proto::SecretAssignment;

/// Versions as a node is told them.
pub(super) fn payloads(state: &State, keys: &[PayloadKey]) -> Vec<SecretAssignment> {
    let assigned = |key: &PayloadKey| {
        let found = secrets::find(state, *key)?;
        Some(SecretAssignment {
            id: skep_common::SecretId(key.id).to_string(),
            version: key.version,
            kind: if key.kind == Kind::Config { "config" } else { "secret" }.to_owned(),
            name: found.name.to_owned(),
            data: found.data.to_vec().into(),
            templating: found.templating.to_owned(),
        })
    };
    keys.iter().filter_map(assigned).collect()
}

/// How many bytes one has.
pub(super) fn size(state: &State, key: PayloadKey) -> usize {
    secrets::find(state, key).map_or(0, |found| found.data.len())
}
