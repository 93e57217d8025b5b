//! `secret` and `config` `create`, `update` and `rm`. What is allowed and what follows is decided in the core.

use skep_common::object::Secret;
use skep_common::{Kind, SecretId, Version};
use skep_manager_core::secrets::{self, Payload, PayloadSpec as _, Update};
use skep_manager_core::{Refusal, State};
use skep_proto::{
    CreateSecretRequest, CreateSecretResponse, RemoveSecretRequest, RemoveSecretResponse,
    UpdateSecretRequest, UpdateSecretResponse,
};
use skep_runtime::clock;
use std::sync::Arc;
use tonic::Status;

use super::error::Error;
use super::{ControlService, parse_id, parse_json};

pub(super) async fn create(
    control: &ControlService,
    request: CreateSecretRequest,
) -> Result<CreateSecretResponse, Status> {
    let id = create_one::<Secret>(control, &request.spec_json).await?;
    Ok(CreateSecretResponse { id, warnings: Vec::new() })
}

pub(super) async fn update(
    control: &ControlService,
    request: UpdateSecretRequest,
) -> Result<UpdateSecretResponse, Status> {
    let UpdateSecretRequest { id, version, spec_json, data_changes } = request;
    let wanted = Wanted { id, version, spec_json, data_changes };
    let Update { data_version, services, .. } = update_one::<Secret>(control, &wanted).await?;
    Ok(UpdateSecretResponse { data_version, services })
}

pub(super) async fn remove(
    control: &ControlService,
    request: RemoveSecretRequest,
) -> Result<RemoveSecretResponse, Status> {
    remove_one::<Secret>(control, &request.id).await?;
    Ok(RemoveSecretResponse {})
}

/// An update as it is asked for.
pub(super) struct Wanted {
    pub(super) id: String,
    /// Version of the object that the caller read.
    pub(super) version: u64,
    pub(super) spec_json: String,
    /// Whether the spec has the bytes of a new version.
    pub(super) data_changes: bool,
}

/// Creates a secret or a config; its id.
pub(super) async fn create_one<P: Payload>(
    control: &ControlService,
    spec_json: &str,
) -> Result<String, Error> {
    let spec: P::Spec = parse_json(&format!("{} spec", P::KIND.name()), spec_json)?;
    let id = SecretId::random(&mut rand::rng());
    let state = control.read().await?;
    let action = secrets::create::<P>(&state, id.0, spec.clone(), clock::now())?;
    match control.write(vec![action]).await {
        // Another writer was faster.
        Err(Error::Refused(Refusal::NameTaken { .. })) => {
            Err(secrets::Error::NameTaken { kind: P::KIND, name: spec.name().to_owned() }.into())
        }
        Err(error) => Err(error),
        Ok(_) => Ok(id.to_string()),
    }
}

/// Updates a secret or a config with the services that follow it.
pub(super) async fn update_one<P: Payload>(
    control: &ControlService,
    wanted: &Wanted,
) -> Result<Update, Error> {
    let mut spec: P::Spec = parse_json(&format!("{} spec", P::KIND.name()), &wanted.spec_json)?;
    if !wanted.data_changes {
        spec.set_data(None);
    }
    let given = Version { index: wanted.version };
    loop {
        let state = control.read().await?;
        let old = find::<P>(&state, &wanted.id)?;
        let current = old.meta().version;
        if current != given {
            return Err(Error::Refused(Refusal::OutOfSequence { kind: P::KIND, given, current }));
        }
        let update = secrets::update(&state, &*old, spec.clone(), clock::now(), |_| true)?;
        if update.actions.is_empty() {
            return Ok(update);
        }
        match control.write(update.actions.clone()).await {
            // A service that follows was written meanwhile, or this object: the next view tells.
            Err(Error::Refused(Refusal::OutOfSequence { .. } | Refusal::NotFound { .. })) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(update),
        }
    }
}

/// Removes a secret or a config that no service uses.
pub(super) async fn remove_one<P: Payload>(
    control: &ControlService,
    id: &str,
) -> Result<(), Error> {
    loop {
        let state = control.read().await?;
        let action = secrets::remove(&state, &*find::<P>(&state, id)?)?;
        match control.write(vec![action]).await {
            // A service came to use it: the next view names it.
            Err(Error::Refused(Refusal::SecretInUse { .. } | Refusal::ConfigInUse { .. })) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(()),
        }
    }
}

fn find<P: Payload>(state: &State, id: &str) -> Result<Arc<P>, Error> {
    let kind: Kind = P::KIND;
    let not_found = || Error::NotFound { kind: kind.name(), reference: id.to_owned() };
    P::find(state, parse_id(kind, id)?).cloned().ok_or_else(not_found)
}
