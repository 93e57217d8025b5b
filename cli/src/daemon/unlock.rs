//! Managers that start locked: the key file is sealed with a key that users keep.
//!
//! A locked manager serves its socket only, and its containers run on.

use skep_proto::{UnlockRequest, UnlockResponse};
use skep_runtime::identity::UnlockKey;
use skep_runtime::telemetry::Chain;
use tonic::Status;

use super::machine::{Machine, Membership};
use super::resume;

/// What a request gets that needs the swarm.
pub(super) fn locked() -> Status {
    Status::failed_precondition(
        "Swarm is encrypted and needs to be unlocked before it can be used. Please use \"skep swarm unlock\" to unlock it.",
    )
}

/// `swarm unlock`.
pub(super) async fn unlock(
    machine: &Machine,
    request: UnlockRequest,
) -> Result<UnlockResponse, Status> {
    let _changing = machine.changing().await?;
    if !matches!(machine.membership(), Membership::Locked(_)) {
        return Err(Status::failed_precondition("swarm is not locked"));
    }
    let invalid = |why: &str| Status::invalid_argument(format!("invalid unlock key: {why}"));
    let key: UnlockKey = request.key.parse().map_err(|_| {
        invalid("one is written SWMKEY-1- and 43 characters, as `skep swarm unlock-key` prints it")
    })?;
    let internal =
        |error: &(dyn std::error::Error + 'static)| Status::internal(Chain(error).to_string());
    let files = machine.inner.files.clone();
    let opened = tokio::task::spawn_blocking(move || files.unlock(key)).await;
    if !opened.map_err(|error| internal(&error))?.map_err(|error| internal(&error))? {
        return Err(invalid(
            "this manager was locked with another one; where the key was changed while this manager was away, that is the one from before",
        ));
    }
    resume::resume(machine).await;
    match machine.membership() {
        Membership::Failed(obstacle) => Err(obstacle.status()),
        Membership::Locked(_) => Err(locked()),
        Membership::Member(_) | Membership::Outside => Ok(UnlockResponse {}),
    }
}
