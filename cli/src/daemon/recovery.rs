//! `swarm init --force-new-cluster`: a manager whose swarm has lost its quorum for good goes on alone.
//!
//! # Invariants
//!
//! - Refused while a leader answers, also where this machine takes no part at the moment: then nothing is lost that
//!   others do not have. Refused where the swarm went on without it.
//! - The node's containers, mesh and identity stay.
//! - Whatever ends halfway leaves the manager as it was, or as it is to be.

use std::sync::Arc;
use std::time::Duration;

use skep_common::Timestamp;
use skep_common::spec::NodeRole;
use skep_manager::recovery::{Alone, Error, Others, Prepared, ask_others, switch};
use skep_proto::{InitSwarmRequest, InitSwarmResponse};
use skep_runtime::clock;
use skep_runtime::identity::{Credentials, JoinToken, RaftKey, Stored, Subject, root_digest};
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::{ChannelPool, Tls};
use tonic::Status;

use super::join::{failed, internal};
use super::machine::{Machine, Membership};
use super::node::Node;
use super::record::{NodeRecord, RecordFile};
use super::{address, resume, unlock};

/// How long the others are asked where this manager's own Raft does not look for a leader.
const LEADER_PATIENCE: Duration = Duration::from_secs(10);
/// Of one round of asking, where it has looked.
const ROUND_PATIENCE: Duration = Duration::from_secs(3);

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
        Membership::Failed(obstacle) if obstacle.is_superseded => return Err(obstacle.status()),
        Membership::Failed(_) => {
            refuse_where_led(machine, LEADER_PATIENCE).await?;
            return Ok(None);
        }
        Membership::Locked(_) => return Err(unlock::locked()),
        Membership::Outside => {
            return Err(Status::failed_precondition(
                "this machine is in no swarm: --force-new-cluster is for a manager of a swarm that has lost its quorum; `skep swarm init` begins a new swarm, and `skep swarm restore` takes up a backup",
            ));
        }
    };
    if let Some(refusal) = node.refusal() {
        return Err(Status::failed_precondition(refusal));
    }
    let Some(manager) = &node.manager else { return Err(no_manager()) };
    if let Ok(state) = manager.read_state().await {
        let n_voters = manager.n_voters();
        let n_services = state.services().len();
        return Err(Status::failed_precondition(format!(
            "this swarm has a leader, and a majority of its {n_voters} manager(s) answers: nothing of its {n_services} service(s) is lost, so that nothing is to be forced; take managers that are gone for good out with `skep node rm --force NODE`"
        )));
    }
    // Its own Raft may have ended, or hear nobody.
    refuse_where_led(machine, ROUND_PATIENCE).await?;
    Ok(Some(node))
}

/// Asks the other managers, as this node, whether one of them leads.
async fn refuse_where_led(machine: &Machine, patience: Duration) -> Result<(), Status> {
    let (credentials, _, subject) = certified(machine)?;
    let record = record_file(machine).load().map_err(|error| failed(&error))?;
    if subject.role != NodeRole::Manager || record.raft_id.is_none() {
        return Err(no_manager());
    }
    let tls = Tls::new(credentials).map_err(|error| internal(&error))?;
    let mut others = record.managers;
    others.retain(|address| *address != record.advertise_addr);
    match ask_others(&ChannelPool::new(tls), &others, patience).await {
        Others::Lead(address) => Err(Status::failed_precondition(format!(
            "the swarm has a leader, the manager at {address}, so that nothing is to be forced: put right what keeps this manager out (`skep info` says what), or `skep swarm leave --force` here and join again"
        ))),
        Others::Refuse(why) => Err(Status::failed_precondition(format!(
            "another manager refuses this node, so that it must not go on: {why}"
        ))),
        Others::AreWithoutLeader => Ok(()),
    }
}

fn record_file(machine: &Machine) -> RecordFile {
    RecordFile::in_data_dir(&machine.inner.options.data_dir)
}

/// What this node shows to others, which must be good: otherwise nobody answers it, nor would any node obey it.
fn certified(machine: &Machine) -> Result<(Credentials, RaftKey, Subject), Status> {
    let stored = machine.inner.files.load().map_err(|error| internal(&error))?;
    let Stored::Open(credentials, raft_key) = stored else { return Err(unlock::locked()) };
    let subject = credentials.subject().map_err(|error| internal(&error))?;
    refuse_expired(subject.not_after, clock::now())?;
    Ok((*credentials, raft_key, subject))
}

fn refuse_expired(not_after: Timestamp, now: Timestamp) -> Result<(), Status> {
    if not_after >= now {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "this manager stays as it was: its certificate expired at {not_after}, so that no node would obey it; correct this machine's clock where that is wrong, otherwise use another former manager, or `skep swarm restore` a backup on a new machine"
    )))
}

fn no_manager() -> Status {
    Status::failed_precondition(
        "this node is a worker and has nothing of the swarm's state: give --force-new-cluster on a machine that was a manager",
    )
}

/// What the manager goes on as.
fn prepare(machine: &Machine, request: &InitSwarmRequest) -> Result<(Alone, NodeRecord), Status> {
    let options = &machine.inner.options;
    let (_, raft_key, subject) = certified(machine)?;
    let mut record = record_file(machine).load().map_err(|error| failed(&error))?;
    let (NodeRole::Manager, Some(raft_id)) = (subject.role, record.raft_id) else {
        return Err(no_manager());
    };
    if !request.listen_addr.is_empty() {
        record.listen_addr = address::listen(&request.listen_addr)?.to_string();
    }
    let option = options.advertise_addr.as_deref();
    record = address::chosen(&record, &request.advertise_addr, option)?;
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
    // An attempt that ended before its last step has left the data beside its place.
    switch(&alone.raft_dir, alone.raft_id).map_err(unchanged)?;
    let prepared = alone.prepare(clock::now()).await.map_err(unchanged)?;
    record_file(machine).store(&record).map_err(|error| failed(&error))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expired_certificate_is_refused_before_anything_changes() {
        let at = Timestamp::from_secs;
        assert!(refuse_expired(at(10), at(10)).is_ok());
        let refused = refuse_expired(at(10), at(11)).unwrap_err();
        for words in ["stays as it was", "expired at 1970-01-01T00:00:10", "clock"] {
            assert!(refused.message().contains(words), "{words:?} in {refused}");
        }
    }
}
