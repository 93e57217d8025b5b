//! The secrets and configs that a service names, and the versions that it means.

use std::collections::BTreeMap;

use skep_common::object::{Config, Secret};
use skep_common::spec::{
    ConfigReference, ContainerSpec, FileTarget, SecretReference, ServiceSpec, TaskSpec,
};
use skep_common::{ConfigId, Kind, SecretId, Service};

use super::{Payload, PayloadKey, PayloadSpec};
use crate::store::State;
use crate::validate::Error;

/// A reference of either kind.
struct Reference {
    kind: Kind,
    id: Option<u128>,
    name: String,
    version: Option<u64>,
    is_pinned: bool,
}

impl Reference {
    fn of_secret(reference: &SecretReference) -> Self {
        Self {
            kind: Kind::Secret,
            id: reference.secret_id.map(|id| id.0),
            name: reference.secret_name.clone(),
            version: reference.version,
            is_pinned: reference.pinned.unwrap_or_default(),
        }
    }

    fn of_config(reference: &ConfigReference) -> Self {
        Self {
            kind: Kind::Config,
            id: reference.config_id.map(|id| id.0),
            name: reference.config_name.clone(),
            version: reference.version,
            is_pinned: reference.pinned.unwrap_or_default(),
        }
    }

    /// What a text for people says of it.
    fn label(&self) -> String {
        let id = || self.id.map(|id| SecretId(id).to_string()).unwrap_or_default();
        if self.name.is_empty() { id() } else { self.name.clone() }
    }
}

/// Changes each reference of a container.
fn edit<E>(
    container: &mut ContainerSpec,
    mut change: impl FnMut(&mut Reference) -> Result<(), E>,
) -> Result<(), E> {
    for target in container.secrets.iter_mut().flatten() {
        let mut reference = Reference::of_secret(target);
        change(&mut reference)?;
        target.secret_id = reference.id.map(SecretId);
        target.secret_name = reference.name;
        target.version = reference.version;
    }
    for target in container.configs.iter_mut().flatten() {
        let mut reference = Reference::of_config(target);
        change(&mut reference)?;
        target.config_id = reference.id.map(ConfigId);
        target.config_name = reference.name;
        target.version = reference.version;
    }
    Ok(())
}

/// Whether containers find the same: that a version is pinned shows only when there is another one.
pub(crate) fn is_same_container(wanted: &ContainerSpec, task: &ContainerSpec) -> bool {
    let unpinned = |container: &ContainerSpec| {
        let mut container = container.clone();
        container.secrets.iter_mut().flatten().for_each(|secret| secret.pinned = None);
        container.configs.iter_mut().flatten().for_each(|config| config.pinned = None);
        container.secrets = container.secrets.filter(|list| !list.is_empty());
        container.configs = container.configs.filter(|list| !list.is_empty());
        container
    };
    unpinned(wanted) == unpinned(task)
}

/// The versions that a stored spec names.
pub fn keys_of(spec: &TaskSpec) -> impl Iterator<Item = PayloadKey> {
    let container = spec.container_spec.as_ref();
    let secrets = container.and_then(|container| container.secrets.as_ref());
    let secrets = secrets.into_iter().flatten().filter_map(|reference| {
        let (id, version) = (reference.secret_id?.0, reference.version?);
        Some(PayloadKey { kind: Kind::Secret, id, version })
    });
    let configs = container.and_then(|container| container.configs.as_ref());
    let configs = configs.into_iter().flatten().filter_map(|reference| {
        let (id, version) = (reference.config_id?.0, reference.version?);
        Some(PayloadKey { kind: Kind::Config, id, version })
    });
    secrets.chain(configs)
}

/// Fills in the id, the name and the version of each secret and config that a service names: the newest
/// version, but where the reference is pinned to one. Source: SwarmKit `manager/controlapi/service.go`,
/// `checkSecretExistence`.
pub fn resolve(state: &State, spec: &mut ServiceSpec) -> Result<(), Error> {
    let Some(container) = &mut spec.task_template.container_spec else { return Ok(()) };
    check_targets(container)?;
    edit(container, |reference| match reference.kind {
        Kind::Config => resolve_one::<Config>(state, reference),
        _ => resolve_one::<Secret>(state, reference),
    })
}

fn resolve_one<P: Payload>(state: &State, reference: &mut Reference) -> Result<(), Error> {
    let what = P::KIND.name();
    let label = reference.label();
    let id = match reference.id {
        Some(id) => Some(id),
        None => state.id_by_name(P::KIND, &reference.name),
    };
    let payload = id.and_then(|id| P::find(state, id));
    let payload =
        payload.filter(|found| reference.name.is_empty() || found.spec().name() == reference.name);
    let payload = payload.ok_or_else(|| Error(format!("{what} not found: {label}")))?;
    reference.id = id;
    payload.spec().name().clone_into(&mut reference.name);
    if reference.is_pinned {
        let number = reference.version.unwrap_or_default();
        if !payload.versions().contains_key(&number) {
            return Err(Error(format!(
                "{what} {label} has no version {number}: {}",
                known(&**payload)
            )));
        }
    } else {
        reference.version = payload.versions().last_key_value().map(|(number, _)| *number);
    }
    Ok(())
}

fn known<P: Payload>(payload: &P) -> String {
    let numbers: Vec<String> = payload.versions().keys().map(ToString::to_string).collect();
    format!("there are {}", numbers.join(", "))
}

/// Refuses a spec of before that names what is not there any more. Its versions stay as they are.
pub fn are_there(state: &State, spec: &ServiceSpec) -> Result<(), Error> {
    missing(state, &spec.task_template).map_or(Ok(()), |text| Err(Error(text)))
}

/// What tasks of this spec lack: the reason for them to wait.
pub(crate) fn missing(state: &State, spec: &TaskSpec) -> Option<String> {
    let key = keys_of(spec).find(|key| super::find(state, *key).is_none())?;
    let (what, name) = (key.kind.name(), name_of(spec, key));
    Some(format!("{what} not found: {name} (version {})", key.version))
}

/// The name by which a spec refers to a secret or a config.
pub(crate) fn name_of(spec: &TaskSpec, key: PayloadKey) -> String {
    let container = spec.container_spec.as_ref();
    let secrets = container.into_iter().flat_map(|container| container.secrets.iter().flatten());
    let configs = container.into_iter().flat_map(|container| container.configs.iter().flatten());
    let references = secrets.map(Reference::of_secret).chain(configs.map(Reference::of_config));
    let is_it = |reference: &Reference| reference.kind == key.kind && reference.id == Some(key.id);
    let found = references.into_iter().find(is_it);
    found.map_or_else(|| SecretId(key.id).to_string(), |reference| reference.name)
}

/// The service with another version in each reference that is not pinned; `None` where it has none.
pub(super) fn moved(service: &Service, kind: Kind, id: u128, version: u64) -> Option<Service> {
    let mut new = service.clone();
    let mut is_moved = false;
    let container = new.spec.task_template.container_spec.as_mut()?;
    let done: Result<(), std::convert::Infallible> = edit(container, |reference| {
        let is_it = reference.kind == kind && reference.id == Some(id) && !reference.is_pinned;
        if is_it && reference.version != Some(version) {
            reference.version = Some(version);
            is_moved = true;
        }
        Ok(())
    });
    let Ok(()) = done;
    if !is_moved {
        return None;
    }
    new.previous_spec = Some(service.spec.clone());
    new.update_status = None;
    Some(new)
}

/// Refuses references without a place in the container, and two with the same. Texts are SwarmKit's.
pub fn check_targets(container: &ContainerSpec) -> Result<(), Error> {
    let mut taken: BTreeMap<String, String> = BTreeMap::new();
    for secret in container.secrets.iter().flatten() {
        let reference = Reference::of_secret(secret);
        let Some(file) = &secret.file else { return Err(malformed(&reference)) };
        check_target(&reference, Some(file), "/run/secrets", &mut taken)?;
    }
    for config in container.configs.iter().flatten() {
        let reference = Reference::of_config(config);
        if config.file.is_none() == config.runtime.is_none() {
            return Err(malformed(&reference));
        }
        check_target(&reference, config.file.as_ref(), "", &mut taken)?;
    }
    Ok(())
}

fn malformed(reference: &Reference) -> Error {
    Error(format!("malformed {} reference: {}", reference.kind.name(), reference.label()))
}

fn check_target(
    reference: &Reference,
    file: Option<&FileTarget>,
    base: &str,
    taken: &mut BTreeMap<String, String>,
) -> Result<(), Error> {
    let (what, label) = (reference.kind.name(), reference.label());
    if label.is_empty() {
        return Err(malformed(reference));
    }
    let Some(file) = file else { return Ok(()) };
    let mut parts = file.name.split('/').filter(|part| !part.is_empty() && *part != ".").peekable();
    if parts.peek().is_none() || parts.any(|part| part == "..") || file.name.ends_with('/') {
        return Err(Error(format!(
            "malformed file {what} reference, invalid target file name provided: {:?}",
            file.name
        )));
    }
    let is_number = |text: &str| text.parse::<u32>().is_ok();
    if !is_number(&file.uid) || !is_number(&file.gid) {
        return Err(Error(format!("{what} {label}: uid and gid must be numbers")));
    }
    if file.mode > 0o7777 {
        return Err(Error(format!("{what} {label}: mode {:o} is not one of a file", file.mode)));
    }
    let path = if file.name.starts_with('/') {
        file.name.clone()
    } else {
        format!("{base}/{}", file.name)
    };
    match taken.insert(path.clone(), label.clone()) {
        Some(other) => Err(Error(format!(
            "{what} references '{other}' and '{label}' have a conflicting target: '{path}'"
        ))),
        None => Ok(()),
    }
}
