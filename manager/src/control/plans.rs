//! What would happen, and why what waits does.

#![expect(clippy::unused_async, reason = "they will ask the store")]

use skep_proto::{ExplainRequest, ExplainResponse, PlanRequest, PlanResponse, WhatIfRequest};
use tonic::Status;

use super::ControlService;
use super::error::not_supported;

pub(super) async fn explain(
    _control: &ControlService,
    _request: ExplainRequest,
) -> Result<ExplainResponse, Status> {
    Err(not_supported("service explain"))
}

pub(super) async fn plan(
    _control: &ControlService,
    _request: PlanRequest,
) -> Result<PlanResponse, Status> {
    Err(not_supported("--plan"))
}

pub(super) async fn what_if(
    _control: &ControlService,
    _request: WhatIfRequest,
) -> Result<PlanResponse, Status> {
    Err(not_supported("node what-if"))
}
