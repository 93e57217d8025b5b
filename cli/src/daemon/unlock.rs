//! Lets a manager that started locked go on.

#![expect(clippy::unused_async, reason = "it will start the manager")]

use skep_proto::{UnlockRequest, UnlockResponse};
use tonic::Status;

use super::machine::Machine;

pub(super) async fn unlock(
    _machine: &Machine,
    _request: UnlockRequest,
) -> Result<UnlockResponse, Status> {
    Err(Status::unimplemented("swarm unlock is not supported yet"))
}
