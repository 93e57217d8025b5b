//! What becomes of a secret or a config when it is created, updated or removed, and who uses it.
//!
//! Both are one thing with two names: bytes under an id that stays, in numbered versions that are never
//! changed. A service refers to a version, which is found when the service is written; so a new version
//! is an update of the services that use it, and their rollback finds the old one.
//!
//! Reading order: this file, `payload` (what both have in common), `references` (what a service names),
//! `reap` (which versions nobody needs any more).
//!
//! Source: SwarmKit `manager/controlapi/{secret,config}.go`. Differs from SwarmKit: bytes can be changed,
//! and users of a secret follow it (moby#35803).

mod payload;
mod reap;
mod references;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use skep_common::object::{Config, DataVersion, Secret};
use skep_common::spec::{Base64, Driver, ModeKind, TaskSpec};
use skep_common::template::Template;
use skep_common::{Kind, Object, SecretId, Service, Timestamp};

use crate::command::{Action, Expect};
use crate::store::State;

pub use payload::{Payload, PayloadSpec};
pub(crate) use reap::{Memory, reap, without_versions};
pub use references::{are_there, check_targets, keys_of, resolve};
pub(crate) use references::{is_same_container, missing, name_of};

/// Services that one update of a secret may change: their specs are one entry of the log.
pub const USERS_MAX: usize = 1000;
/// The longest name of a secret or a config.
const NAME_LENGTH_MAX: usize = 64;
/// The driver that fills in bytes for each task; there is no other.
pub const TEMPLATE_DRIVER: &str = "golang";

/// A secret or a config at one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PayloadKey {
    /// A secret or a config.
    pub kind: Kind,
    /// The 128 bits of its id.
    pub id: u128,
    /// Its version.
    pub version: u64,
}

impl fmt::Display for PayloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", SecretId(self.id), self.version)
    }
}

/// Why a request about a secret or a config is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It cannot be kept as asked.
    #[error("{0}")]
    Invalid(String),
    /// Choose another name, or update that one.
    #[error("{} {name} already exists", .kind.name())]
    NameTaken {
        /// A secret or a config.
        kind: Kind,
        /// The name.
        name: String,
    },
    /// Remove it from the services, or the services, first.
    #[error(
        "{} '{name}' is in use by the following {}: {}",
        .kind.name(), if .services.len() == 1 { "service" } else { "services" }, .services.join(", ")
    )]
    InUse {
        /// A secret or a config.
        kind: Kind,
        /// The name.
        name: String,
        /// The services that use it.
        services: Vec<String>,
    },
    /// Give its users a version of their own, a few at a time.
    #[error(
        "{} {name} has {n_users} services that would be updated at once, and {USERS_MAX} may be: pin some of them to \
         a version with version=N",
        .kind.name()
    )]
    TooManyUsers {
        /// A secret or a config.
        kind: Kind,
        /// The name.
        name: String,
        /// How many.
        n_users: usize,
    },
}

fn invalid(text: impl Into<String>) -> Error {
    Error::Invalid(text.into())
}

/// Names, labels and drivers that are not allowed. Texts are SwarmKit's.
fn check<P: Payload>(spec: &P::Spec) -> Result<(), Error> {
    let (what, name) = (P::KIND.name(), spec.name());
    if name.is_empty() {
        return Err(invalid("meta: name must be provided"));
    }
    let is_end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let is_inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_name = name.len() <= NAME_LENGTH_MAX
        && name.chars().all(is_inner)
        && is_end(name.chars().next())
        && is_end(name.chars().next_back());
    if !is_name {
        return Err(invalid(format!(
            "invalid name, only {NAME_LENGTH_MAX} [a-zA-Z0-9-_.] characters allowed, and the start and end character \
             must be [a-zA-Z0-9]: {name:?}"
        )));
    }
    if spec.labels().is_some_and(|labels| labels.contains_key("")) {
        return Err(invalid("meta: labels must have a key"));
    }
    if let Some(driver) = spec.driver() {
        let driver = &driver.name;
        return Err(invalid(format!(
            "{what} {name}: driver {driver:?} is not supported: leave it out, and give the data"
        )));
    }
    match spec.templating().filter(|driver| driver.name != TEMPLATE_DRIVER) {
        Some(Driver { name: driver, .. }) => Err(invalid(format!(
            "{what} {name}: template driver {driver:?} is not supported: use {TEMPLATE_DRIVER}"
        ))),
        None => Ok(()),
    }
}

/// The bytes of a request as a version.
fn version<P: Payload>(spec: &P::Spec, now: Timestamp) -> Result<DataVersion, Error> {
    let (what, name) = (P::KIND.name(), spec.name());
    let data = spec.data().map(|data| data.0.as_slice()).unwrap_or_default();
    if data.is_empty() || data.len() >= P::BYTES_MAX {
        let max = P::BYTES_MAX;
        return Err(invalid(format!(
            "{what} data must be larger than 0 and less than {max} bytes"
        )));
    }
    if spec.templating().is_some() {
        let text = std::str::from_utf8(data);
        let text = text.map_err(|_| invalid(format!("{what} {name}: a template must be text")))?;
        Template::parse(text).map_err(|error| invalid(format!("{what} {name}: {error}")))?;
    }
    let digest = Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let data = Some(Base64(data.to_vec()));
    Ok(DataVersion { created_at: now, data, digest: format!("sha256:{digest}") })
}

/// A secret or a config made of `spec`, with its bytes as version 1.
pub fn create<P: Payload>(
    state: &State,
    id: u128,
    mut spec: P::Spec,
    now: Timestamp,
) -> Result<Action, Error> {
    check::<P>(&spec)?;
    let first = version::<P>(&spec, now)?;
    if state.id_by_name(P::KIND, spec.name()).is_some() {
        return Err(Error::NameTaken { kind: P::KIND, name: spec.name().to_owned() });
    }
    spec.set_data(None);
    let payload = P::new(id, spec, [(1, first)].into());
    Ok(Action::Put { object: payload.into_object(), expect: Expect::Absent })
}

/// What an update writes.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// One transaction; empty where nothing changes.
    pub actions: Vec<Action>,
    /// The number of the newest version.
    pub data_version: u64,
    /// Names of the services that follow to a new version.
    pub services: Vec<String>,
}

/// A secret or a config with other labels and, where `spec` has bytes that differ from the newest ones,
/// with another version, to which the services that use it follow.
///
/// `follows` chooses among them: a stack's services are written by its deploy.
pub fn update<P: Payload>(
    state: &State,
    old: &P,
    mut spec: P::Spec,
    now: Timestamp,
    follows: impl Fn(&Service) -> bool,
) -> Result<Update, Error> {
    check::<P>(&spec)?;
    let (what, name) = (P::KIND.name(), old.spec().name());
    if spec.name() != name {
        return Err(invalid(format!("renaming a {what} is not supported")));
    }
    if spec.templating() != old.spec().templating() {
        return Err(invalid(format!(
            "{what} {name}: its template driver cannot be changed: create another {what}"
        )));
    }
    let newest = old.versions().last_key_value();
    let mut data_version = newest.map_or(0, |(number, _)| *number);
    let given = spec.data().is_some().then(|| version::<P>(&spec, now)).transpose()?;
    let given = given.filter(|given| newest.is_none_or(|(_, last)| last.digest != given.digest));
    spec.set_data(None);
    let mut update = Update { actions: Vec::new(), data_version, services: Vec::new() };
    if given.is_none() && spec == *old.spec() {
        return Ok(update);
    }
    let mut new = old.clone();
    *new.spec_mut() = spec;
    let expect = Expect::Version(old.meta().version);
    // The store has the bytes of the others.
    new.versions_mut().values_mut().for_each(|version| version.data = None);
    let Some(given) = given else {
        update.actions.push(Action::Put { object: new.into_object(), expect });
        return Ok(update);
    };
    data_version += 1;
    new.versions_mut().insert(data_version, given);
    update.data_version = data_version;
    let (kind, id) = (P::KIND, new.raw_id());
    update.actions.push(Action::Put { object: new.into_object(), expect });
    // A job would run all of its tasks again for it: it takes the new bytes when it is run again.
    let is_job = |service: &Service| service.spec.mode_kind().is_some_and(ModeKind::is_job);
    let users = users(state, kind, id).filter(|service| follows(service) && !is_job(service));
    for service in users {
        if let Some(moved) = references::moved(service, kind, id, data_version) {
            update.services.push(service.spec.name.clone());
            let expect = Expect::Version(service.meta.version);
            update.actions.push(Action::Put { object: Object::Service(Box::new(moved)), expect });
        }
    }
    match update.services.len() {
        n_users if n_users > USERS_MAX => {
            Err(Error::TooManyUsers { kind, name: name.to_owned(), n_users })
        }
        _ => Ok(update),
    }
}

/// Erases a secret or a config that no service uses.
pub fn remove<P: Payload>(state: &State, payload: &P) -> Result<Action, Error> {
    let (kind, id) = (P::KIND, payload.raw_id());
    let services: Vec<String> =
        users(state, kind, id).map(|service| service.spec.name.clone()).collect();
    if services.is_empty() {
        return Ok(Action::Delete { kind, id });
    }
    Err(Error::InUse { kind, name: payload.spec().name().to_owned(), services })
}

/// The services whose spec names a secret or a config, but for those that are being removed.
pub(crate) fn users(state: &State, kind: Kind, id: u128) -> impl Iterator<Item = &Arc<Service>> {
    let staying = state.services().values().filter(|service| !service.pending_delete);
    staying.filter(move |service| {
        keys_of(&service.spec.task_template).any(|key| key.kind == kind && key.id == id)
    })
}

/// A secret or a config at one version, as nodes are given it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Delivered<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its bytes.
    pub data: &'a [u8],
    /// The driver that fills them in; empty: none.
    pub templating: &'a str,
}

/// Whether a secret or a config of a task is filled in for it.
pub(crate) fn has_template(state: &State, spec: &TaskSpec) -> bool {
    keys_of(spec).any(|key| find(state, key).is_some_and(|found| !found.templating.is_empty()))
}

/// What nodes are given of one; `None` where it is gone.
pub fn find(state: &State, key: PayloadKey) -> Option<Delivered<'_>> {
    fn of<P: Payload>(payload: &P, version: u64) -> Option<Delivered<'_>> {
        let data = payload.versions().get(&version)?.data.as_ref()?;
        let spec = payload.spec();
        let templating = spec.templating().map_or("", |driver| driver.name.as_str());
        Some(Delivered { name: spec.name(), data: &data.0, templating })
    }
    match key.kind {
        Kind::Config => of(&**<Config as Payload>::find(state, key.id)?, key.version),
        _ => of(&**<Secret as Payload>::find(state, key.id)?, key.version),
    }
}
