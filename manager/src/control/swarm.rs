//! The swarm's own settings, its root, its unlock key and its backup.

use std::sync::Arc;

use bytes::Bytes;
use skep_common::object::Cluster;
use skep_common::spec::SwarmSpec;
use skep_common::{Object, Version};
use skep_manager_core::rotation::{self, NewRoot};
use skep_manager_core::{Action, Expect, Refusal, State, swarm};
use skep_proto::{
    BackupChunk, BackupRequest, RotateCaRequest, RotateCaResponse, UnlockKeyRequest,
    UnlockKeyResponse, UpdateSwarmRequest, UpdateSwarmResponse,
};
use skep_runtime::clock;
use skep_runtime::identity::{
    Authority, Error as IdentityError, UnlockKey, new_secret, public_key_of,
};
use skep_runtime::telemetry::Chain;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::error::Error;
use super::{ControlService, parse_json};
use crate::consensus::backup;

/// Bytes of a backup in one message, far below the largest.
const BACKUP_CHUNK_BYTES: usize = 1 << 20;
/// Of them between the disk and the client.
const BACKUP_CHUNKS_MAX: usize = 4;

fn cluster(state: &State) -> Result<&Arc<Cluster>, Error> {
    let not_found = || Error::NotFound { kind: "cluster", reference: "default".into() };
    state.cluster().ok_or_else(not_found)
}

pub(super) async fn update(
    control: &ControlService,
    request: UpdateSwarmRequest,
) -> Result<UpdateSwarmResponse, Error> {
    let spec: SwarmSpec = parse_json("swarm spec", &request.spec_json)?;
    let state = control.read().await?;
    let new_key = || UnlockKey::generate().to_bytes();
    let changed = swarm::with_spec(cluster(&state)?, spec, request.rotate_unlock_key, new_key);
    let mut changed = changed.map_err(invalid)?;
    let lock_version = changed.unlock_key_version;
    if request.rotate_worker_token {
        changed.join_tokens.worker = new_secret();
    }
    if request.rotate_manager_token {
        changed.join_tokens.manager = new_secret();
    }
    let expect = Expect::Version(Version { index: request.version });
    let object = Object::Cluster(Box::new(changed));
    let version = control.write(vec![Action::Put { object, expect }]).await?;
    control.wait_locked(lock_version).await;
    Ok(UpdateSwarmResponse { version: version.index })
}

fn invalid(error: swarm::Error) -> Error {
    Error::Invalid(error.to_string())
}

/// Begins a change of the root; the leader's loop brings it to its end.
pub(super) async fn rotate_ca(
    control: &ControlService,
    request: RotateCaRequest,
) -> Result<RotateCaResponse, Error> {
    let invalid = |error: IdentityError| Error::Invalid(Chain(&error).to_string());
    let (certificate, key) = (request.ca_cert_pem.as_str(), request.ca_key_pem.as_str());
    let new = match (certificate.is_empty(), key.is_empty()) {
        (true, true) => Authority::generate(clock::now()),
        (false, false) => Authority::from_user(certificate, key, clock::now()),
        _ => {
            let why = "a root needs its certificate and its key: give both --ca-cert and --ca-key";
            return Err(Error::Invalid(why.into()));
        }
    };
    let new = new.map_err(invalid)?;
    let public_key = public_key_of(new.root_pem()).map_err(invalid)?;
    loop {
        let state = control.read().await?;
        let cluster = cluster(&state)?;
        if public_key_of(&cluster.root_ca_cert).map_err(invalid)? == public_key {
            return Err(Error::Invalid("this is the root that the swarm has already".into()));
        }
        let old = Authority::from_pem(&cluster.root_ca_cert, &cluster.root_ca_key);
        let root = NewRoot {
            ca_cert: new.root_pem().to_owned(),
            ca_key: new.key_pem().to_owned(),
            cross_signed_cert: old.and_then(|old| old.certify(new.root_pem())).map_err(invalid)?,
            public_key: public_key.clone(),
        };
        let changed = rotation::begin(&state, cluster, root, clock::now());
        let changed = changed.map_err(|error| Error::Precondition(error.to_string()))?;
        let expect = Expect::Version(cluster.meta.version);
        let object = Object::Cluster(Box::new(changed));
        match control.write(vec![Action::Put { object, expect }]).await {
            Err(Error::Refused(Refusal::OutOfSequence { .. })) => {} // Another setting was just written.
            Err(error) => return Err(error),
            Ok(_) => return Ok(RotateCaResponse {}),
        }
    }
}

/// The unlock key as users keep it; empty where managers do not start locked.
pub(super) async fn unlock_key(
    control: &ControlService,
    _request: UnlockKeyRequest,
) -> Result<UnlockKeyResponse, Error> {
    let state = control.read().await?;
    let Some(key) = &cluster(&state)?.unlock_key else { return Ok(UnlockKeyResponse::default()) };
    let key =
        UnlockKey::from_bytes(&key.0).map_err(|error| Error::Precondition(error.to_string()))?;
    Ok(UnlockKeyResponse { key: key.to_text() })
}

/// The whole swarm as a majority has it, sealed.
pub(super) async fn backup(
    control: &ControlService,
    _request: BackupRequest,
) -> Result<ReceiverStream<Result<BackupChunk, Status>>, Error> {
    let state = control.read().await?;
    let term = control.inner.consensus.leadership().borrow().term;
    let write = move || backup::write(&state, term, clock::now());
    let written = tokio::task::spawn_blocking(write).await;
    let written = written.map_err(|error| Error::Precondition(error.to_string()))?;
    let mut bytes: Bytes = written.map_err(|error| Error::Precondition(error.to_string()))?.into();
    let (sender, chunks) = mpsc::channel(BACKUP_CHUNKS_MAX);
    control.inner.tasks.spawn("backup", async move {
        while !bytes.is_empty() {
            let data = bytes.split_to(bytes.len().min(BACKUP_CHUNK_BYTES));
            if sender.send(Ok(BackupChunk { data })).await.is_err() {
                return; // The client has gone.
            }
        }
    });
    Ok(ReceiverStream::new(chunks))
}
