//! `stack deploy` and `stack rm`: one transaction each.

use skep_common::spec::StackSpec;
use skep_manager_core::{stack, validate};
use skep_proto::{DeployStackRequest, DeployStackResponse, RemoveStackResponse};
use skep_runtime::clock;

use super::error::Error;
use super::{ControlService, parse_json};

pub(super) async fn deploy(
    control: &ControlService,
    request: DeployStackRequest,
) -> Result<DeployStackResponse, Error> {
    let spec: StackSpec = parse_json("stack", &request.spec_json)?;
    let warnings = warnings(&spec);
    loop {
        let state = control.read().await?;
        let deployment =
            stack::deploy(&state, spec.clone(), request.prune, clock::now(), &mut rand::rng())?;
        if !deployment.actions.is_empty() {
            match control.write(deployment.actions).await {
                // Raced with another writer: what the file says does not depend on it.
                Err(Error::Refused(refusal)) if refusal.is_race() => continue,
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
            created_networks: deployment.created_networks,
            created_secrets: deployment.secrets.created,
            updated_secrets: deployment.secrets.updated,
            removed_secrets: deployment.secrets.removed,
            created_configs: deployment.configs.created,
            updated_configs: deployment.configs.updated,
            removed_configs: deployment.configs.removed,
        });
    }
}

/// What users should know of an accepted stack.
pub(super) fn warnings(spec: &StackSpec) -> Vec<String> {
    let of_service = |service: &skep_common::spec::ServiceSpec| {
        let name = service.name.clone();
        validate::warnings(service)
            .into_iter()
            .map(move |warning| format!("service {name}: {warning}"))
    };
    spec.services.iter().flat_map(of_service).collect()
}

pub(super) async fn remove(
    control: &ControlService,
    name: &str,
) -> Result<RemoveStackResponse, Error> {
    loop {
        let state = control.read().await?;
        let removal = stack::remove(&state, name, clock::now())?;
        match control.write(removal.actions).await {
            Err(Error::Refused(refusal)) if refusal.is_race() => {}
            Err(error) => return Err(error),
            Ok(_) => {
                return Ok(RemoveStackResponse {
                    removed: removal.services,
                    removed_networks: removal.networks,
                    removed_secrets: removal.secrets,
                    removed_configs: removal.configs,
                });
            }
        }
    }
}
