//! Secrets: their creation, their versions and their end.

#![expect(clippy::unused_async, reason = "they will ask the store")]

use skep_proto::{
    CreateSecretRequest, CreateSecretResponse, RemoveSecretRequest, RemoveSecretResponse,
    UpdateSecretRequest, UpdateSecretResponse,
};
use tonic::Status;

use super::ControlService;
use super::error::not_supported;

pub(super) async fn create(
    _control: &ControlService,
    _request: CreateSecretRequest,
) -> Result<CreateSecretResponse, Status> {
    Err(not_supported("secret create"))
}

pub(super) async fn update(
    _control: &ControlService,
    _request: UpdateSecretRequest,
) -> Result<UpdateSecretResponse, Status> {
    Err(not_supported("secret update"))
}

pub(super) async fn remove(
    _control: &ControlService,
    _request: RemoveSecretRequest,
) -> Result<RemoveSecretResponse, Status> {
    Err(not_supported("secret rm"))
}
