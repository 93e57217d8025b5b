//! Makes this machine the only manager of the swarm of a backup.

#![expect(clippy::unused_async, reason = "it will read the backup")]

use skep_proto::{InitSwarmResponse, RestoreRequest};
use tonic::{Status, Streaming};

use super::machine::Machine;

pub(super) async fn restore(
    _machine: &Machine,
    _backup: Streaming<RestoreRequest>,
) -> Result<InitSwarmResponse, Status> {
    Err(Status::unimplemented("swarm restore is not supported yet"))
}
