//! Configs: their creation, their versions and their end.

#![expect(clippy::unused_async, reason = "they will ask the store")]

use skep_proto::{
    CreateConfigRequest, CreateConfigResponse, RemoveConfigRequest, RemoveConfigResponse,
    UpdateConfigRequest, UpdateConfigResponse,
};
use tonic::Status;

use super::ControlService;
use super::error::not_supported;

pub(super) async fn create(
    _control: &ControlService,
    _request: CreateConfigRequest,
) -> Result<CreateConfigResponse, Status> {
    Err(not_supported("config create"))
}

pub(super) async fn update(
    _control: &ControlService,
    _request: UpdateConfigRequest,
) -> Result<UpdateConfigResponse, Status> {
    Err(not_supported("config update"))
}

pub(super) async fn remove(
    _control: &ControlService,
    _request: RemoveConfigRequest,
) -> Result<RemoveConfigResponse, Status> {
    Err(not_supported("config rm"))
}
