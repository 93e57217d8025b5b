//! What services were before.

use skep_proto::{ServiceHistoryRequest, ServiceHistoryResponse};

use super::error::Error;
use super::{ControlService, services};

pub(super) async fn of_service(
    control: &ControlService,
    request: ServiceHistoryRequest,
) -> Result<ServiceHistoryResponse, Error> {
    let state = control.read().await?;
    let service = services::find(&state, &request.id)?;
    let revisions: Vec<_> = state.revisions_of(service.id).collect();
    let json = |revision| serde_json::to_string(revision).expect("a revision is plain JSON");
    let revisions_json = revisions.into_iter().rev().map(|revision| json(&**revision)).collect();
    Ok(ServiceHistoryResponse { revisions_json })
}
