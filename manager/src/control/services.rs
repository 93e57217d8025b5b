//! `service create`, `update`, `rm`. What is allowed and what follows is decided in the core.

use skep_common::spec::ServiceSpec;
use skep_common::{Kind, Service, ServiceId, Version};
use skep_manager_core::service;
use skep_manager_core::{Refusal, State, image, validate};
use skep_proto::{CreateServiceResponse, UpdateServiceRequest, UpdateServiceResponse};
use skep_runtime::clock;
use std::sync::Arc;

use super::error::Error;
use super::{ControlService, parse_id, parse_json};
use crate::consensus::propose;

pub(super) async fn create(
    control: &ControlService,
    spec: ServiceSpec,
) -> Result<CreateServiceResponse, Error> {
    let mut view = control.view().await?;
    loop {
        let id = ServiceId::random(&mut rand::rng());
        let (id, action) = match service::create(&view.state, id, spec.clone()) {
            Ok(created) => created,
            Err(_) if !view.is_confirmed() => {
                view = control.confirmed().await?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        match control.write_on(&view, vec![action]).await {
            // Two writers were given one dynamic port or one address, a network is gone, the last task of a service
            // of that name that was being removed has ended, or the leader is lost: the next view decides.
            Err(Error::Refused(refusal)) if refusal.is_race() => view = control.confirmed().await?,
            Err(Error::Propose(propose::Error::NotLeader { .. })) => {
                view = control.confirmed().await?;
            }
            Err(error) => return Err(error),
            Ok(version) => {
                let (id, version) = (id.to_string(), version.index);
                return Ok(CreateServiceResponse {
                    id,
                    version,
                    warnings: warnings(&view.state, &spec),
                });
            }
        }
    }
}

pub(super) async fn update(
    control: &ControlService,
    request: UpdateServiceRequest,
) -> Result<UpdateServiceResponse, Error> {
    let version = Version { index: request.version };
    let is_rollback = request.rollback || request.rollback_to > 0;
    let spec: Option<ServiceSpec> = match is_rollback {
        true => None,
        false => Some(parse_json("service spec", &request.spec_json)?),
    };
    let (mut state, mut service, mut is_current) = view(control, &request.id, version).await?;
    loop {
        let action = match &spec {
            None if request.rollback_to > 0 => {
                let number = request.rollback_to;
                Some(service::rollback_to(&state, &service, version, number, clock::now())?)
            }
            None => Some(service::rollback(&state, &service, version, clock::now())?),
            Some(spec) => service::update(&state, &service, version, spec.clone())?,
        };
        let written = match action {
            Some(action) => control.write(vec![action]).await,
            None if is_current => Ok(version),
            // No write is refused where the version is not the newest any more: a current view must say so.
            None => {
                (state, is_current) = (control.read().await?, true);
                service = find(&state, &request.id)?;
                continue;
            }
        };
        match written {
            // Another writer was given the same address, or removed the network: the next view decides.
            Err(Error::Refused(
                Refusal::AddressInUse { .. }
                | Refusal::NetworkNotFound { .. }
                | Refusal::PayloadNotFound { .. },
            )) => {
                state = control.read().await?;
                service = find(&state, &request.id)?;
            }
            Err(error) => return Err(error),
            Ok(version) => {
                let warnings = spec.map(|spec| warnings(&state, &spec)).unwrap_or_default();
                return Ok(UpdateServiceResponse { warnings, version: version.index });
            }
        }
    }
}

/// A view with the service at the version that the caller names, and whether it is current. This manager's
/// own will do where it has that version: the write is refused if there is a newer one.
async fn view(
    control: &ControlService,
    id: &str,
    version: Version,
) -> Result<(State, Arc<Service>, bool), Error> {
    let own = control.inner.consensus.state();
    if let Ok(service) = find(&own, id)
        && service.meta.version == version
    {
        return Ok((own, service, false));
    }
    let state = control.read().await?;
    let service = find(&state, id)?;
    Ok((state, service, true))
}

pub(super) async fn remove(control: &ControlService, id: &str) -> Result<(), Error> {
    let mut view = control.view().await?;
    loop {
        let action = find(&view.state, id).map(|service| service::remove(&service));
        let action = match action {
            Ok(Some(action)) => action,
            Err(_) | Ok(None) if !view.is_confirmed() => {
                view = control.confirmed().await?;
                continue;
            }
            Ok(None) => return Ok(()),
            Err(error) => return Err(error),
        };
        match control.write_on(&view, vec![action]).await {
            // Its status was just written, which what was asked does not depend on, it is gone, or the leader is lost.
            Err(
                Error::Refused(Refusal::OutOfSequence { .. } | Refusal::NotFound { .. })
                | Error::Propose(propose::Error::NotLeader { .. }),
            ) => view = control.confirmed().await?,
            Err(error) => return Err(error),
            Ok(_) => return Ok(()),
        }
    }
}

/// The service with an id.
pub(super) fn find(state: &State, id: &str) -> Result<Arc<Service>, Error> {
    let service_id = ServiceId(parse_id(Kind::Service, id)?);
    let not_found = || Error::NotFound { kind: "service", reference: id.to_owned() };
    state.service(service_id).cloned().ok_or_else(not_found)
}

/// What users should know of an accepted spec.
pub(super) fn warnings(state: &State, spec: &ServiceSpec) -> Vec<String> {
    let mut warnings = validate::warnings(spec);
    let name = &spec.container().image;
    if image::pin(state, name).is_none() {
        warnings.push(format!(
            "no image named {name} in this swarm: its tasks wait until it is loaded with skep image load"
        ));
    }
    warnings
}
