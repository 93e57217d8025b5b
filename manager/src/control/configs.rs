//! Configs: as [secrets](super::secrets), but that everybody may read them.

use skep_common::object::Config;
use skep_manager_core::secrets::Update;
use skep_proto::{
    CreateConfigRequest, CreateConfigResponse, RemoveConfigRequest, RemoveConfigResponse,
    UpdateConfigRequest, UpdateConfigResponse,
};
use tonic::Status;

use super::ControlService;
use super::secrets::{Wanted, create_one, remove_one, update_one};

pub(super) async fn create(
    control: &ControlService,
    request: CreateConfigRequest,
) -> Result<CreateConfigResponse, Status> {
    let id = create_one::<Config>(control, &request.spec_json).await?;
    Ok(CreateConfigResponse { id, warnings: Vec::new() })
}

pub(super) async fn update(
    control: &ControlService,
    request: UpdateConfigRequest,
) -> Result<UpdateConfigResponse, Status> {
    let UpdateConfigRequest { id, version, spec_json, data_changes } = request;
    let wanted = Wanted { id, version, spec_json, data_changes };
    let Update { data_version, services, .. } = update_one::<Config>(control, &wanted).await?;
    Ok(UpdateConfigResponse { data_version, services })
}

pub(super) async fn remove(
    control: &ControlService,
    request: RemoveConfigRequest,
) -> Result<RemoveConfigResponse, Status> {
    remove_one::<Config>(control, &request.id).await?;
    Ok(RemoveConfigResponse {})
}
