//! `stack deploy` and `stack rm`: one transaction each.

use skep_common::spec::StackSpec;
use skep_manager_core::{Refusal, stack, validate};
use skep_proto::{DeployStackRequest, DeployStackResponse, RemoveStackResponse};
use skep_runtime::clock;

use super::error::Error;
use super::{ControlService, parse_json};

pub(super) async fn deploy(
    control: &ControlService,
    request: DeployStackRequest,
) -> Result<DeployStackResponse, Error> {
    let spec: StackSpec = parse_json("stack", &request.spec_json)?;
    let of_service = |service: &skep_common::spec::ServiceSpec| {
        let name = service.name.clone();
        validate::warnings(service)
            .into_iter()
            .map(move |warning| format!("service {name}: {warning}"))
    };
    let warnings: Vec<String> = spec.services.iter().flat_map(of_service).collect();
    loop {
        let state = control.read().await?;
        let deployment =
            stack::deploy(&state, spec.clone(), request.prune, clock::now(), &mut rand::rng())?;
        if !deployment.actions.is_empty() {
            match control.write(deployment.actions).await {
                // Raced with another writer: what the file says does not depend on it.
                Err(Error::Refused(Refusal::OutOfSequence { .. } | Refusal::PortInUse { .. })) => {
                    continue;
                }
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        return Ok(DeployStackResponse {
            created: deployment.created,
            updated: deployment.updated,
            unchanged: deployment.unchanged,
            removed: deployment.removed,
            warnings,
            ..DeployStackResponse::default()
        });
    }
}

pub(super) async fn remove(
    control: &ControlService,
    name: &str,
) -> Result<RemoveStackResponse, Error> {
    loop {
        let state = control.read().await?;
        let (actions, removed) = stack::remove(&state, name)?;
        match control.write(actions).await {
            Err(Error::Refused(Refusal::OutOfSequence { .. })) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(RemoveStackResponse { removed, ..RemoveStackResponse::default() }),
        }
    }
}
