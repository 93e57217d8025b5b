//! The swarm's own settings, its root, its unlock key and its backup.

use std::sync::Arc;

use skep_common::object::Cluster;
use skep_common::spec::SwarmSpec;
use skep_common::{Object, Version};
use skep_manager_core::{Action, Expect, State, swarm};
use skep_proto::{
    BackupChunk, BackupRequest, RotateCaRequest, RotateCaResponse, UnlockKeyRequest,
    UnlockKeyResponse, UpdateSwarmRequest, UpdateSwarmResponse,
};
use skep_runtime::identity::{UnlockKey, new_secret};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::error::{Error, not_supported};
use super::{ControlService, parse_json};

fn cluster(state: &State) -> Result<&Arc<Cluster>, Error> {
    let not_found = || Error::NotFound { kind: "cluster", reference: "default".into() };
    state.cluster().ok_or_else(not_found)
}

pub(super) async fn update(
    control: &ControlService,
    request: UpdateSwarmRequest,
) -> Result<UpdateSwarmResponse, Error> {
    let spec: SwarmSpec = parse_json("swarm spec", &request.spec_json)?;
    let state = control.read().await?;
    let new_key = || UnlockKey::generate().to_bytes();
    let changed = swarm::with_spec(cluster(&state)?, spec, request.rotate_unlock_key, new_key);
    let mut changed = changed.map_err(invalid)?;
    let lock_version = changed.unlock_key_version;
    if request.rotate_worker_token {
        changed.join_tokens.worker = new_secret();
    }
    if request.rotate_manager_token {
        changed.join_tokens.manager = new_secret();
    }
    let expect = Expect::Version(Version { index: request.version });
    let object = Object::Cluster(Box::new(changed));
    let version = control.write(vec![Action::Put { object, expect }]).await?;
    control.wait_locked(lock_version).await;
    Ok(UpdateSwarmResponse { version: version.index })
}

fn invalid(error: swarm::Error) -> Error {
    Error::Invalid(error.to_string())
}

#[expect(clippy::unused_async, reason = "it will ask the store")]
pub(super) async fn rotate_ca(
    _control: &ControlService,
    _request: RotateCaRequest,
) -> Result<RotateCaResponse, Status> {
    Err(not_supported("swarm ca --rotate"))
}

/// The unlock key as users keep it; empty where managers do not start locked.
pub(super) async fn unlock_key(
    control: &ControlService,
    _request: UnlockKeyRequest,
) -> Result<UnlockKeyResponse, Error> {
    let state = control.read().await?;
    let Some(key) = &cluster(&state)?.unlock_key else { return Ok(UnlockKeyResponse::default()) };
    let key =
        UnlockKey::from_bytes(&key.0).map_err(|error| Error::Precondition(error.to_string()))?;
    Ok(UnlockKeyResponse { key: key.to_text() })
}

pub(super) fn backup(
    _control: &ControlService,
    _request: BackupRequest,
) -> Result<ReceiverStream<Result<BackupChunk, Status>>, Status> {
    Err(not_supported("swarm backup"))
}
