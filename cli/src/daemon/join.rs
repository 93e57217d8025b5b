//! How this machine enters a swarm, and leaves it.

use std::sync::Arc;

use skep_common::spec::SwarmSpec;
use skep_common::{ClusterId, NodeId};
use skep_manager::join::{parse_availability, parse_pools};
use skep_manager::swarm::{self, certificate_life};
use skep_manager::{Manager, NewSwarm};
use skep_proto::ca_client::CaClient;
use skep_proto::{
    InitSwarmRequest, InitSwarmResponse, IssueRequest, IssueResponse, JoinSwarmRequest,
    JoinSwarmResponse, RootRequest,
};
use skep_runtime::clock;
use skep_runtime::identity::{
    Authority, Credentials, Csr, JoinToken, RaftKey, UnlockKey, root_digest, vetted,
};
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::{connect_unverified, connect_with_root};
use skep_worker::embedded::uplink::Uplink;
use skep_worker::net::secure::Keyring;
use tonic::Status;

use super::address;
use super::machine::{Machine, Membership};
use super::node::{Node, Parts};
use super::record::{NodeRecord, RecordFile};
use super::{recovery, unlock};

const DEFAULT_INGRESS_POOL: &str = "10.192.0.0/10";

pub(super) fn internal(error: &(dyn std::error::Error + 'static)) -> Status {
    Status::internal(Chain(error).to_string())
}

pub(super) fn failed(error: &anyhow::Error) -> Status {
    Status::internal(format!("{error:#}"))
}

pub(super) fn refuse_member(machine: &Machine) -> Result<(), Status> {
    match machine.membership() {
        Membership::Outside => Ok(()),
        Membership::Failed(obstacle) => Err(obstacle.status()),
        Membership::Locked(_) => Err(unlock::locked()),
        Membership::Member(node) if node.refusal().is_some() => {
            Err(Status::failed_precondition(node.refusal().unwrap_or_default()))
        }
        Membership::Member(_) => Err(Status::failed_precondition(
            "This node is already part of a swarm. Use \"skep swarm leave\" to leave this swarm and join another one.",
        )),
    }
}

/// `swarm init`.
pub(super) async fn init(
    machine: &Machine,
    request: InitSwarmRequest,
) -> Result<InitSwarmResponse, Status> {
    if request.force_new_cluster {
        return recovery::force_new_cluster(machine, request).await;
    }
    let _changing = machine.changing().await?;
    refuse_member(machine)?;
    let options = &machine.inner.options;
    let listen = address::listen(&request.listen_addr)?;
    let written = or_configured(&request.advertise_addr, options.advertise_addr.as_deref());
    let advertise = address::advertise(written, listen, None)?;
    let availability = parse_availability(&request.availability)?;
    let spec = settings(&request)?;
    let unlock_key = swarm::starts_locked(&spec).then(UnlockKey::generate);
    let unlock_text = unlock_key.as_ref().map(UnlockKey::to_text).unwrap_or_default();
    let pool =
        if request.ingress_pool.is_empty() { DEFAULT_INGRESS_POOL } else { &request.ingress_pool };
    let ingress_pool = pool.parse().map_err(|_| {
        Status::invalid_argument(format!("invalid ingress pool {pool:?}: write ADDRESS/BITS"))
    })?;
    let (default_addr_pool, subnet_size) =
        parse_pools(&request.default_addr_pool, request.subnet_size, ingress_pool)?;

    let now = clock::now();
    let authority = Authority::generate(now).map_err(|error| internal(&error))?;
    let (node_id, cluster_id) =
        (NodeId::random(&mut rand::rng()), ClusterId::random(&mut rand::rng()));
    let csr = Csr::generate().map_err(|error| internal(&error))?;
    let role = skep_common::spec::NodeRole::Manager;
    let certificate_pem = authority
        .sign(&csr.csr_pem, node_id, role, cluster_id, now, certificate_life(&spec))
        .map_err(|error| internal(&error))?;
    let root_pem = authority.root_pem().to_owned();
    let credentials =
        Credentials { certificate_pem, key_pem: csr.key_pem, root_pem: root_pem.clone() };
    let record = NodeRecord {
        managers: vec![advertise.to_string()],
        raft_id: Some(rand::random()),
        is_voter: true,
        written: Some(written.to_owned()),
        option: options.advertise_addr.clone(),
        ..NodeRecord::at(advertise, listen)
    };
    let entering = Entering { machine, credentials, raft_key: RaftKey::generate(), record };
    let secret = entering
        .enter(async |node: &Node| {
            let manager = node.manager.as_ref().expect("a node with a Raft id is a manager");
            manager
                .found(NewSwarm {
                    cluster_id,
                    authority,
                    spec,
                    unlock_key,
                    ingress_pool,
                    default_addr_pool,
                    subnet_size,
                    availability,
                })
                .await
        })
        .await?;
    let root_digest = root_digest(&root_pem).map_err(|error| internal(&error))?;
    Ok(InitSwarmResponse {
        node_id: node_id.to_string(),
        worker_token: JoinToken { root_digest, secret }.to_string(),
        address: advertise.to_string(),
        unlock_key: unlock_text,
        notes: Vec::new(),
    })
}

/// The settings of the new swarm.
fn settings(request: &InitSwarmRequest) -> Result<SwarmSpec, Status> {
    let mut spec: SwarmSpec = match request.spec_json.as_str() {
        "" => SwarmSpec::default(),
        json => serde_json::from_str(json).map_err(|error| {
            Status::invalid_argument(format!("the swarm spec is not valid: {error}"))
        })?,
    };
    if request.autolock {
        spec.encryption_config.get_or_insert_default().auto_lock_managers = Some(true);
    }
    swarm::check(&spec).map_err(|error| Status::invalid_argument(error.to_string()))?;
    Ok(spec)
}

pub(super) fn or_configured<'a>(asked: &'a str, configured: Option<&'a str>) -> &'a str {
    if asked.is_empty() { configured.unwrap_or_default() } else { asked }
}

/// `swarm join`.
pub(super) async fn join(
    machine: &Machine,
    request: JoinSwarmRequest,
) -> Result<JoinSwarmResponse, Status> {
    let _changing = machine.changing().await?;
    refuse_member(machine)?;
    let options = &machine.inner.options;
    let token: JoinToken =
        request.token.parse().map_err(|error| Status::invalid_argument(format!("{error}")))?;
    let listen = address::listen(&request.listen_addr)?;
    let remotes: Vec<String> =
        request.remotes.iter().map(|remote| address::remote(remote)).collect();
    let written = or_configured(&request.advertise_addr, options.advertise_addr.as_deref());
    let advertise = address::advertise(written, listen, remotes.first().map(String::as_str))?;
    parse_availability(&request.availability)?;
    let csr = Csr::generate().map_err(|error| internal(&error))?;
    let issue = IssueRequest {
        token: token.to_string(),
        csr_pem: csr.csr_pem.clone(),
        availability: request.availability.clone(),
        advertise_addr: advertise.to_string(),
        hostname: options.hostname.clone(),
    };
    let (root_pem, issued) = ask_all(&remotes, &token, &issue).await?;
    let is_manager = issued.role == "manager";
    let record = NodeRecord {
        managers: issued.managers.clone(),
        raft_id: is_manager.then(rand::random),
        written: Some(written.to_owned()),
        option: options.advertise_addr.clone(),
        ..NodeRecord::at(advertise, listen)
    };
    let credentials =
        Credentials { certificate_pem: issued.certificate_pem, key_pem: csr.key_pem, root_pem };
    let managers = issued.managers;
    let raft_key = RaftKey::generate();
    Entering { machine, credentials, raft_key, record }
        .enter(async |node: &Node| match &node.manager {
            Some(manager) => manager.join(&managers).await,
            None => Ok(()),
        })
        .await?;
    Ok(JoinSwarmResponse { node_id: issued.node_id, role: issued.role })
}

async fn ask_all(
    remotes: &[String],
    token: &JoinToken,
    issue: &IssueRequest,
) -> Result<(String, IssueResponse), Status> {
    let mut last = Status::invalid_argument(
        "no manager to join was named: skep swarm join --token TOKEN HOST:PORT",
    );
    for remote in remotes {
        match ask(remote, token, issue).await {
            Ok(issued) => return Ok(issued),
            Err(status) if status.code() == tonic::Code::Unavailable => {
                let why = status.message().to_owned();
                last = Status::unavailable(format!(
                    "no manager answers at {remote} ({why}): check the address, and that the firewall lets TCP port 2377 in"
                ));
            }
            Err(status) => return Err(status),
        }
    }
    Err(last)
}

/// Fetches the root, checks it against the token, and only then shows the token.
async fn ask(
    remote: &str,
    token: &JoinToken,
    issue: &IssueRequest,
) -> Result<(String, IssueResponse), Status> {
    let unverified = connect_unverified(remote).map_err(|error| internal(&error))?;
    let root = CaClient::new(unverified).root(RootRequest {}).await?.into_inner().root_pem;
    let digest = root_digest(&root).map_err(|error| internal(&error))?;
    if digest != token.root_digest {
        return Err(Status::permission_denied(format!(
            "the join token is for another swarm than the one that answers at {remote}: get the current one there with `skep swarm join-token worker`"
        )));
    }
    let root = vetted(&root).map_err(|error| internal(&error))?;
    let channel = connect_with_root(remote, &root).map_err(|error| internal(&error))?;
    let issued = CaClient::new(channel).issue(issue.clone()).await?.into_inner();
    Ok((root, issued))
}

/// A machine on its way into a swarm. What fails leaves it outside, with nothing on disk.
pub(super) struct Entering<'a> {
    pub(super) machine: &'a Machine,
    pub(super) credentials: Credentials,
    pub(super) raft_key: RaftKey,
    pub(super) record: NodeRecord,
}

impl Entering<'_> {
    pub(super) async fn enter<T>(
        self,
        become_member: impl AsyncFnOnce(&Node) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let Self { machine, credentials, raft_key, record } = self;
        let options = &machine.inner.options;
        let file = RecordFile::in_data_dir(&options.data_dir);
        file.store(&record).map_err(|error| failed(&error))?;
        let image_store = machine.inner.image_store.clone();
        let files = machine.inner.files.clone();
        let stored = files.store(&credentials, &raft_key);
        stored.map_err(|error| internal(&error))?;
        let parts = Parts { credentials, raft_key, files, record: record.clone(), image_store };
        let node = match Node::start(options, parts).await {
            Ok(node) => node,
            Err(error) => {
                forget(machine);
                return Err(failed(&error));
            }
        };
        let entered = async {
            node.serve(options).await.map_err(|error| failed(&error))?;
            let result = become_member(&node).await?;
            if record.raft_id.is_some() {
                let stored = file.update(|record| record.is_voter = true);
                stored.map_err(|error| failed(&error))?;
            }
            Ok(result)
        };
        match entered.await {
            Ok(result) => {
                machine.set_membership(Membership::Member(Arc::new(node)));
                Ok(result)
            }
            Err(status) => {
                node.stop().await;
                forget(machine);
                Err(status)
            }
        }
    }
}

/// Removes everything that makes this machine a member; images stay.
pub(super) fn forget(machine: &Machine) {
    let options = &machine.inner.options;
    let mut failures = Vec::new();
    if let Err(error) = machine.inner.files.remove() {
        failures.push(Chain(&error).to_string());
    }
    if let Err(error) = RecordFile::in_data_dir(&options.data_dir).remove() {
        failures.push(format!("{error:#}"));
    }
    if let Err(error) = Keyring::remove(&options.data_dir) {
        failures.push(Chain(&error).to_string());
    }
    for directory in ["raft", "raft.new", "raft.old", "tasks"] {
        let path = options.data_dir.join(directory);
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                failures.push(format!("failed to remove {}: {error}", path.display()));
            }
            _ => {}
        }
    }
    for failure in failures {
        tracing::warn!(failure, "something of the swarm is left on this machine");
    }
}

/// `swarm leave`.
pub(super) async fn leave(machine: &Machine, force: bool) -> Result<(), Status> {
    let _changing = machine.changing().await?;
    let node = match machine.membership() {
        Membership::Member(node) => node,
        // The swarm that went on without this manager has another Raft group.
        Membership::Failed(obstacle) => {
            return leave_unseen(machine, force || obstacle.is_superseded).await;
        }
        Membership::Locked(_) if force => return leave_unseen(machine, force).await,
        Membership::Locked(_) => {
            return Err(Status::failed_precondition(
                "Swarm is encrypted and locked. Please unlock it first or use \"--force\" to ignore this message.",
            ));
        }
        Membership::Outside => {
            return Err(Status::failed_precondition("This node is not part of a swarm"));
        }
    };
    // One that was removed is in no Raft group.
    if let Some(manager) = node.manager.as_ref().filter(|_| node.refusal().is_none()) {
        resign(manager, force).await?;
    }
    node.stop().await;
    let removed = remove_containers(machine).await;
    node.teardown().await;
    forget(machine);
    machine.set_membership(Membership::Outside);
    removed
}

/// Has the other managers count this one no more, unless they cannot and it is to leave all the same.
async fn resign(manager: &Manager, force: bool) -> Result<(), Status> {
    let Err(status) = manager.leave().await else { return Ok(()) };
    if force {
        let why = status.message();
        tracing::warn!(why, "this manager leaves, and the others may go on counting it");
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "You are attempting to leave the swarm on a node that is participating as a manager, and the other managers cannot do without it: {}. Use --force to leave all the same.",
        status.message()
    )))
}

/// `swarm leave` where this machine takes no part in its swarm: what an earlier daemon left is removed.
async fn leave_unseen(machine: &Machine, force: bool) -> Result<(), Status> {
    let options = &machine.inner.options;
    let record = RecordFile::in_data_dir(&options.data_dir).load();
    if !force && !record.is_ok_and(|record| record.raft_id.is_none()) {
        return Err(Status::failed_precondition(
            "This node takes no part in its swarm, but it may still be one of its managers to the others, who lose their quorum when a majority is gone. Use --force to leave all the same.",
        ));
    }
    let removed = remove_containers(machine).await;
    Uplink::remove(&options.run_dir).await;
    forget(machine);
    machine.set_membership(Membership::Outside);
    removed
}

/// Ends every container of this machine: its swarm is no more.
pub(super) async fn remove_containers(machine: &Machine) -> Result<(), Status> {
    use skep_worker::container::ContainerRuntime;
    let runtime = ContainerRuntime::open(machine.inner.options.containers());
    let runtime = runtime.map_err(|error| internal(&error))?;
    for container in runtime.adopt().await.map_err(|error| internal(&error))? {
        runtime.remove(&container.id).await.map_err(|error| internal(&error))?;
    }
    Ok(())
}
