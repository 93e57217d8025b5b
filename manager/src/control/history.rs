//! What services were before.

#![expect(clippy::unused_async, reason = "they will ask the store")]

use skep_proto::{ServiceHistoryRequest, ServiceHistoryResponse};
use tonic::Status;

use super::ControlService;
use super::error::not_supported;

pub(super) async fn of_service(
    _control: &ControlService,
    _request: ServiceHistoryRequest,
) -> Result<ServiceHistoryResponse, Status> {
    Err(not_supported("service history"))
}
