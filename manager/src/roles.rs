//! Managers that are no longer to be ones: how they leave the Raft group.

#![expect(clippy::unused_async, reason = "it will ask the leader")]

use skep_proto::{RemoveManagerRequest, RemoveManagerResponse};
use tonic::Status;

use crate::consensus::Consensus;

pub(crate) async fn remove_manager(
    _consensus: &Consensus,
    _request: RemoveManagerRequest,
) -> Result<RemoveManagerResponse, Status> {
    Err(Status::unimplemented("taking a manager out is not supported yet"))
}
