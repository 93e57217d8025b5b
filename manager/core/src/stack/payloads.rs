//! The secrets and configs of a stack.
//!
//! Bytes that differ from the newest ones are another version, and bytes that do not are none; so a
//! file that did not change changes nothing. Differs from docker/cli, which refuses a changed file.

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::Rng;
use skep_common::object::{Config, Secret};
use skep_common::spec::StackSpec;
use skep_common::{Kind, SecretId, Service, Timestamp};

use super::{Deployment, Error, NAMESPACE_LABEL, names};
use crate::command::Action;
use crate::secrets::{self, Payload, PayloadSpec};
use crate::store::State;

/// Bytes of all secrets and configs of a stack: its deploy is one entry of the log.
pub(super) const BYTES_MAX: usize = 8 << 20;

/// What a deploy did to secrets or configs, by their full names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Deployed {
    /// New ones.
    pub created: Vec<String>,
    /// Those with other bytes or labels.
    pub updated: Vec<String>,
    /// Those that go.
    pub removed: Vec<String>,
}

/// What of a deploy is the same for each of its parts.
pub(super) struct Deploy<'a> {
    pub(super) stack: &'a str,
    /// The services of the file: each is written by itself.
    pub(super) services: &'a BTreeSet<&'a str>,
    pub(super) now: Timestamp,
}

/// Refuses more bytes than one entry of the log may have.
pub(super) fn check_size(spec: &StackSpec) -> Result<(), Error> {
    let secrets = spec.secrets.iter().map(|secret| &secret.data);
    let configs = spec.configs.iter().map(|config| &config.data);
    let sizes = secrets.chain(configs).flatten().map(|data| data.0.len());
    match sizes.sum::<usize>() {
        n_bytes if n_bytes > BYTES_MAX => Err(Error::TooLarge { n_bytes }),
        _ => Ok(()),
    }
}

/// Creates and updates what the file has.
pub(super) fn deploy<P: Payload>(
    deployment: &mut Deployment,
    scratch: &mut State,
    deploy: &Deploy<'_>,
    specs: &[P::Spec],
    rng: &mut impl Rng,
) -> Result<(), Error> {
    names(P::KIND, specs.iter().map(PayloadSpec::name))?;
    for spec in specs {
        let mut spec = spec.clone();
        let name = spec.name().to_owned();
        let refused = |error| Error::Payload { kind: P::KIND, name: name.clone(), error };
        let label = (NAMESPACE_LABEL.to_owned(), deploy.stack.to_owned());
        spec.labels_mut().get_or_insert_default().extend([label]);
        let id = scratch.id_by_name(P::KIND, &name);
        let old = id.and_then(|id| P::find(scratch, id)).cloned();
        let old = old.filter(|old| is_of_stack(&**old, deploy.stack));
        let Some(old) = old else {
            let id = SecretId::random(rng).0;
            let action = secrets::create::<P>(scratch, id, spec, deploy.now).map_err(refused)?;
            deployment.add(scratch, deploy.now, (P::KIND, &name), action)?;
            deployment.of_kind(P::KIND).created.push(name);
            continue;
        };
        let is_written_anyway = |service: &Service| {
            let label = service.spec.labels.as_ref().and_then(|all| all.get(NAMESPACE_LABEL));
            label.is_some_and(|label| label == deploy.stack)
                && deploy.services.contains(service.spec.name.as_str())
        };
        let follows = |service: &Service| !is_written_anyway(service);
        let update = secrets::update(scratch, &*old, spec, deploy.now, follows);
        let update = update.map_err(refused)?;
        if update.actions.is_empty() {
            continue;
        }
        for action in update.actions {
            deployment.add(scratch, deploy.now, (P::KIND, &name), action)?;
        }
        deployment.updated.extend(update.services);
        deployment.of_kind(P::KIND).updated.push(name);
    }
    Ok(())
}

/// Removes what the file does not have, but for what services use.
pub(super) fn prune<P: Payload>(
    deployment: &mut Deployment,
    scratch: &mut State,
    stack: &str,
    kept: &[P::Spec],
    now: Timestamp,
) -> Result<(), Error> {
    let kept: BTreeSet<&str> = kept.iter().map(PayloadSpec::name).collect();
    for payload in of_stack::<P>(scratch, stack) {
        let name = payload.spec().name();
        if kept.contains(name) {
            continue;
        }
        if let Ok(action) = secrets::remove(scratch, &*payload) {
            deployment.add(scratch, now, (P::KIND, name), action)?;
            deployment.of_kind(P::KIND).removed.push(name.to_owned());
        }
    }
    Ok(())
}

/// Removes all of a stack; refused where a service of another one uses something of it.
pub(super) fn remove<P: Payload>(
    deployment: &mut Deployment,
    scratch: &mut State,
    stack: &str,
    now: Timestamp,
) -> Result<(), Error> {
    for payload in of_stack::<P>(scratch, stack) {
        let name = payload.spec().name().to_owned();
        let refused = |error| Error::Payload { kind: P::KIND, name: name.clone(), error };
        let action: Action = secrets::remove(scratch, &*payload).map_err(refused)?;
        deployment.add(scratch, now, (P::KIND, &name), action)?;
        deployment.of_kind(P::KIND).removed.push(name);
    }
    Ok(())
}

/// Whether the stack has any.
pub(super) fn are_any(state: &State, stack: &str) -> bool {
    !of_stack::<Secret>(state, stack).is_empty() || !of_stack::<Config>(state, stack).is_empty()
}

fn of_stack<P: Payload>(state: &State, stack: &str) -> Vec<Arc<P>> {
    P::all(state).filter(|payload| is_of_stack(&***payload, stack)).cloned().collect()
}

fn is_of_stack<P: Payload>(payload: &P, stack: &str) -> bool {
    let label = payload.spec().labels().and_then(|labels| labels.get(NAMESPACE_LABEL));
    label.is_some_and(|label| label == stack)
}

impl Deployment {
    fn of_kind(&mut self, kind: Kind) -> &mut Deployed {
        if kind == Kind::Config { &mut self.configs } else { &mut self.secrets }
    }
}
