//! `swarm init --force-new-cluster`: a manager whose swarm has lost its quorum for good goes on alone.
//!
//! # Invariants
//!
//! - Refused while a leader answers: then nothing is lost that others do not have.
//! - The node's containers, mesh and identity stay.
//! - Whatever ends halfway leaves the manager as it was, or as it is to be.

use std::sync::Arc;

use skep_common::spec::NodeRole;
use skep_manager::recovery::{Alone, Error, Prepared, switch};
use skep_proto::{InitSwarmRequest, InitSwarmResponse};
use skep_runtime::clock;
use skep_runtime::identity::{JoinToken, Stored, root_digest};
use skep_runtime::telemetry::Chain;
use tonic::Status;

use super::join::{failed, internal, or_configured};
use super::machine::{Machine, Membership};
use super::node::Node;
use super::record::{NodeRecord, RecordFile};
use super::{address, resume, unlock};

/// `swarm init --force-new-cluster`.
pub(super) async fn force_new_cluster(
    machine: &Machine,
    request: InitSwarmRequest,
) -> Result<InitSwarmResponse, Status> {
    refuse_settings(&request)?;
    let _changing = machine.changing().await?;
    let node = former_manager(machine).await?;
    let (alone, record) = prepare(machine, &request)?;
    if let Some(node) = node {
        node.stop().await;
        node.release().await;
    }
    tracing::warn!("this manager goes on alone: it reads what it has of the swarm");
    let prepared = take_up(machine, &alone, record).await;
    // With what it had, where that failed.
    resume::resume(machine).await;
    let prepared = prepared?;
    let node = match machine.membership() {
        Membership::Member(node) => node,
        Membership::Failed(obstacle) => return Err(obstacle.status()),
        Membership::Locked(_) => return Err(unlock::locked()),
        Membership::Outside => {
            return Err(Status::internal("this machine is in no swarm any more"));
        }
    };
    let manager = node.manager.as_ref().ok_or_else(|| Status::internal("it is no manager"))?;
    let state = manager.read_state().await;
    let state = state.map_err(|error| Status::unavailable(error.to_string()))?;
    tracing::warn!(removed = ?prepared.removed, "this manager is the only one of its swarm now");
    answer(&node, &state, notes(&prepared))
}

/// The swarm's settings are what they were.
fn refuse_settings(request: &InitSwarmRequest) -> Result<(), Status> {
    let has_settings = !request.spec_json.is_empty()
        || request.autolock
        || !request.ingress_pool.is_empty()
        || !request.default_addr_pool.is_empty()
        || request.subnet_size != 0;
    if has_settings {
        return Err(Status::invalid_argument(
            "--force-new-cluster goes on with the settings that the swarm has: give it addresses only, and change settings with `skep swarm update` afterwards",
        ));
    }
    Ok(())
}

/// The manager that runs here without a quorum; none where it does not run, though its data may be there.
async fn former_manager(machine: &Machine) -> Result<Option<Arc<Node>>, Status> {
    let node = match machine.membership() {
        Membership::Member(node) => node,
        Membership::Failed(_) => return Ok(None),
        Membership::Locked(_) => return Err(unlock::locked()),
        Membership::Outside => {
            return Err(Status::failed_precondition(
                "this machine is in no swarm: --force-new-cluster is for a manager of a swarm that has lost its quorum; `skep swarm init` begins a new swarm, and `skep swarm restore` takes up a backup",
            ));
        }
    };
    let Some(manager) = &node.manager else { return Err(no_manager()) };
    if let Ok(state) = manager.read_state().await {
        let n_voters = manager.n_voters();
        let n_services = state.services().len();
        return Err(Status::failed_precondition(format!(
            "this swarm has a leader, and a majority of its {n_voters} manager(s) answers: nothing of its {n_services} service(s) is lost, so that nothing is to be forced; take managers that are gone for good out with `skep node rm --force NODE`"
        )));
    }
    Ok(Some(node))
}

fn no_manager() -> Status {
    Status::failed_precondition(
        "this node is a worker and has nothing of the swarm's state: give --force-new-cluster on a machine that was a manager",
    )
}

/// What the manager goes on as.
fn prepare(machine: &Machine, request: &InitSwarmRequest) -> Result<(Alone, NodeRecord), Status> {
    let options = &machine.inner.options;
    let stored = machine.inner.files.load().map_err(|error| internal(&error))?;
    let Stored::Open(credentials, raft_key) = stored else { return Err(unlock::locked()) };
    let subject = credentials.subject().map_err(|error| internal(&error))?;
    let mut record =
        RecordFile::in_data_dir(&options.data_dir).load().map_err(|error| failed(&error))?;
    let (NodeRole::Manager, Some(raft_id)) = (subject.role, record.raft_id) else {
        return Err(no_manager());
    };
    if !request.listen_addr.is_empty() {
        record.listen_addr = address::listen(&request.listen_addr)?.to_string();
    }
    let written = or_configured(&request.advertise_addr, options.advertise_addr.as_deref());
    if !written.is_empty() {
        let listen = address::listen(&record.listen_addr)?;
        record.advertise_addr = address::advertise(written, listen, None)?.to_string();
    }
    let new_raft_id = rand::random();
    let alone = Alone {
        node_id: subject.node_id,
        raft_dir: options.data_dir.join("raft"),
        raft_key,
        raft_id,
        new_raft_id,
        address: record.advertise_addr.clone(),
        term_seen: record.term_seen,
    };
    record.managers = vec![record.advertise_addr.clone()];
    (record.raft_id, record.is_voter) = (Some(new_raft_id), true);
    Ok((alone, record))
}

async fn take_up(machine: &Machine, alone: &Alone, record: NodeRecord) -> Result<Prepared, Status> {
    let unchanged = |error: Error| {
        let why = Chain(&error).to_string();
        Status::failed_precondition(format!("this manager stays as it was: {why}"))
    };
    let prepared = alone.prepare(clock::now()).await.map_err(unchanged)?;
    let file = RecordFile::in_data_dir(&machine.inner.options.data_dir);
    file.store(&record).map_err(|error| failed(&error))?;
    switch(&alone.raft_dir, alone.new_raft_id).map_err(|error| internal(&error))?;
    Ok(prepared)
}

fn notes(prepared: &Prepared) -> Vec<String> {
    let state = &prepared.state;
    let version = state.version().index;
    let mut notes = vec![format!(
        "It has what this manager knew: {} service(s), {} secret(s), {} network(s), up to version {version}. What only the others knew is not in it.",
        state.services().len(),
        state.secrets().len(),
        state.networks().len(),
    )];
    if !prepared.removed.is_empty() {
        notes.push(format!(
            "Removed from the swarm: {}. Where one of them runs again, it is refused: `skep swarm leave --force` there, then join.",
            prepared.removed.join(", ")
        ));
    }
    let workers = state.nodes().len() - 1;
    if workers > 0 {
        notes.push(format!("{workers} worker(s) come back by themselves, with their containers."));
    }
    notes
}

/// What clients are told of a swarm that has begun anew here.
pub(super) fn answer(
    node: &Node,
    state: &skep_manager::State,
    notes: Vec<String>,
) -> Result<InitSwarmResponse, Status> {
    let cluster = state.cluster().ok_or_else(|| Status::internal("the state has no swarm"))?;
    let root_digest = root_digest(&cluster.root_ca_cert).map_err(|error| internal(&error))?;
    let secret = cluster.join_tokens.worker.clone();
    Ok(InitSwarmResponse {
        node_id: node.node_id.to_string(),
        worker_token: JoinToken { root_digest, secret }.to_string(),
        address: node.record.advertise_addr.clone(),
        notes,
        ..InitSwarmResponse::default()
    })
}
