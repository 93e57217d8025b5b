//! The swarm's own settings, its root, its unlock key and its backup.

#![expect(clippy::unused_async, reason = "they will ask the store")]

use skep_proto::{
    BackupChunk, BackupRequest, RotateCaRequest, RotateCaResponse, UnlockKeyRequest,
    UnlockKeyResponse, UpdateSwarmRequest, UpdateSwarmResponse,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::ControlService;
use super::error::not_supported;

pub(super) async fn update(
    _control: &ControlService,
    _request: UpdateSwarmRequest,
) -> Result<UpdateSwarmResponse, Status> {
    Err(not_supported("swarm update"))
}

pub(super) async fn rotate_ca(
    _control: &ControlService,
    _request: RotateCaRequest,
) -> Result<RotateCaResponse, Status> {
    Err(not_supported("swarm ca --rotate"))
}

pub(super) async fn unlock_key(
    _control: &ControlService,
    _request: UnlockKeyRequest,
) -> Result<UnlockKeyResponse, Status> {
    Err(not_supported("swarm unlock-key"))
}

pub(super) fn backup(
    _control: &ControlService,
    _request: BackupRequest,
) -> Result<ReceiverStream<Result<BackupChunk, Status>>, Status> {
    Err(not_supported("swarm backup"))
}
