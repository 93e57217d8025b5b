//! `swarm restore`: makes this machine the only manager of the swarm of a backup.
//!
//! # Invariants
//!
//! - Nothing of the file is used before all of it was read and authenticated.
//! - The certificate is stored last: a machine that stops halfway is in no swarm.

use std::time::Duration;

use skep_common::NodeId;
use skep_common::spec::NodeRole;
use skep_manager::consensus::backup::{self, Backup};
use skep_manager::join::{certify, new_node, parse_availability};
use skep_manager::recovery::Elsewhere;
use skep_proto::restore_request::Part;
use skep_proto::{InitSwarmResponse, RestoreHeader, RestoreRequest};
use skep_runtime::clock;
use skep_runtime::identity::{Credentials, Csr, RaftKey, UnlockKey};
use skep_runtime::telemetry::Chain;
use tokio_stream::StreamExt as _;
use tonic::{Status, Streaming};

use super::join::{Entering, failed, forget, internal, or_configured, refuse_member};
use super::machine::Machine;
use super::node::Node;
use super::record::NodeRecord;
use super::{address, recovery};

/// Compressed; some ten million tasks. It is held in memory.
const BACKUP_BYTES_MAX: usize = 1 << 30;
/// A client that stops sending has gone.
const CLIENT_SILENCE_MAX: Duration = Duration::from_secs(30);

/// Takes the upload in.
pub(super) async fn receive(
    mut upload: Streaming<RestoreRequest>,
) -> Result<(RestoreHeader, Vec<u8>), Status> {
    let begins = || Status::invalid_argument("a backup's upload begins with a header");
    let header = match next(&mut upload).await? {
        Some(Part::Header(header)) => header,
        _ => return Err(begins()),
    };
    let mut bytes = Vec::new();
    while let Some(part) = next(&mut upload).await? {
        let Part::Data(data) = part else { return Err(begins()) };
        if bytes.len() + data.len() > BACKUP_BYTES_MAX {
            return Err(Status::invalid_argument(format!(
                "the file has more than {BACKUP_BYTES_MAX} bytes, which no backup has"
            )));
        }
        bytes.extend_from_slice(&data);
    }
    Ok((header, bytes))
}

async fn next(upload: &mut Streaming<RestoreRequest>) -> Result<Option<Part>, Status> {
    let message = tokio::time::timeout(CLIENT_SILENCE_MAX, upload.next()).await;
    let message = message.map_err(|_| Status::aborted("the client stopped sending the backup"))?;
    Ok(message.transpose()?.and_then(|request| request.part))
}

/// `swarm restore`, of a backup that was received.
pub(super) async fn restore(
    machine: &Machine,
    header: RestoreHeader,
    bytes: Vec<u8>,
) -> Result<InitSwarmResponse, Status> {
    let _changing = machine.changing().await?;
    refuse_member(machine)?;
    let options = &machine.inner.options;
    let listen = address::listen(&header.listen_addr)?;
    let written = or_configured(&header.advertise_addr, options.advertise_addr.as_deref());
    let advertise = address::advertise(written, listen, None)?;
    let availability = parse_availability(&header.availability)?;
    let backup = open(bytes, &header.unlock_key).await?;
    let notes = notes(&backup);

    let node_id = NodeId::random(&mut rand::rng());
    let csr = Csr::generate().map_err(|error| internal(&error))?;
    let role = NodeRole::Manager;
    let (certificate_pem, root_pem) = certify(&backup.state, &csr.csr_pem, node_id, role)?;
    let credentials = Credentials { certificate_pem, key_pem: csr.key_pem, root_pem };
    let (raft_id, raft_key) = (rand::random(), RaftKey::generate());
    let record = NodeRecord {
        managers: vec![advertise.to_string()],
        raft_id: Some(raft_id),
        is_voter: true,
        written: Some(written.to_owned()),
        option: options.advertise_addr.clone(),
        ..NodeRecord::at(advertise, listen)
    };
    forget(machine); // What an attempt that was killed has left.
    let elsewhere = Elsewhere {
        raft_dir: options.data_dir.join("raft"),
        raft_key: raft_key.clone(),
        raft_id,
        node: new_node(node_id, role, availability, &record.advertise_addr)?,
        address: record.advertise_addr.clone(),
    };
    if let Err(error) = elsewhere.write(backup, clock::now()).await {
        forget(machine);
        return Err(failed(&anyhow::anyhow!(Chain(&error).to_string())));
    }
    Entering { machine, credentials, raft_key, record }
        .enter(async |node: &Node| {
            let manager = node.manager.as_ref().expect("a node with a Raft id is a manager");
            let state = manager.read_state().await;
            let state = state.map_err(|error| Status::unavailable(error.to_string()))?;
            recovery::answer(node, &state, notes)
        })
        .await
}

async fn open(bytes: Vec<u8>, unlock_key: &str) -> Result<Backup, Status> {
    let key =
        match unlock_key {
            "" => None,
            text => Some(text.parse::<UnlockKey>().map_err(|error| {
                Status::invalid_argument(format!("invalid unlock key: {error}"))
            })?),
        };
    let read = move || backup::read(&bytes, key.map(|key| key.to_bytes()).as_deref());
    let read = tokio::task::spawn_blocking(read).await.map_err(|error| internal(&error))?;
    read.map_err(|error| Status::invalid_argument(error.to_string()))
}

fn notes(backup: &Backup) -> Vec<String> {
    let (state, head) = (&backup.state, &backup.head);
    vec![
        format!(
            "It is swarm {} as it was at {}, with {} service(s), {} secret(s) and {} network(s).",
            head.cluster_id,
            head.created_at,
            state.services().len(),
            state.secrets().len(),
            state.networks().len(),
        ),
        format!(
            "The {} node(s) that it had are removed: on each machine that is to take part, `skep swarm leave --force` where it was one of them, then join. Load the images again; the tokens are those of before.",
            state.nodes().len()
        ),
    ]
}
