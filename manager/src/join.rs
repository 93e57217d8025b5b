//! How nodes become members: certificates for the bearers of join tokens, Raft membership for managers.

use ipnet::Ipv4Net;
use skep_common::object::{ManagerStatus, Node, NodeState, NodeStatus};
use skep_common::spec::{Availability, NodeRole, NodeSpec};
use skep_common::{ClusterId, Kind, Meta, NodeId, Object};
use skep_manager_core::roles::{self, Admission, NotAdmitted};
use skep_manager_core::{Action, Command, Expect, Outcome, Refusal, State, rotation, swarm};
use skep_proto::ca_server::Ca;
use skep_proto::{
    IssueRequest, IssueResponse, RenewRequest, RenewResponse, RootRequest, RootResponse,
};
use skep_runtime::access::Caller;
use skep_runtime::clock;
use skep_runtime::identity::{Authority, JoinToken, root_digest};
use skep_runtime::telemetry::Chain;
use tonic::{Request, Response, Status};

use crate::consensus::Consensus;
use crate::control::audit::{self, audited_try};
use crate::control::error::Error;

/// The service behind `skep.v1.Ca`.
#[derive(Debug, Clone)]
pub struct CaService {
    consensus: Consensus,
}

impl CaService {
    /// Signs with the authority's key in the store.
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }

    async fn read(&self) -> Result<State, Status> {
        self.consensus.read_state().await.map_err(|error| Error::Read(error).into())
    }

    /// Makes a node of whoever has a token.
    async fn admit(
        &self,
        request: &IssueRequest,
        state: State,
        node_id: NodeId,
        role: NodeRole,
    ) -> Result<Response<IssueResponse>, Status> {
        let availability = parse_availability(&request.availability)?;
        Self::sign(&state, &request.csr_pem, node_id, role)?; // Refused before anything is written.
        let node = new_node(node_id, role, availability, &request.advertise_addr)?;
        commit(&self.consensus, Object::Node(Box::new(node)), Expect::Absent).await?;
        // From now on a change of the root waits for this node: what signs in this view is trusted until it renews.
        let state = self.read().await?;
        let (certificate_pem, cluster_id) = Self::sign(&state, &request.csr_pem, node_id, role)?;
        tracing::info!(node.id = %node_id, role = role.name(), hostname = request.hostname, "a node joins");
        Ok(Response::new(IssueResponse {
            certificate_pem,
            node_id: node_id.to_string(),
            role: role.name().to_owned(),
            cluster_id: cluster_id.to_string(),
            managers: manager_addresses(&state),
        }))
    }

    fn role_of(state: &State, token: &JoinToken) -> Result<NodeRole, Status> {
        let cluster =
            state.cluster().ok_or_else(|| Status::unavailable("this manager has no swarm yet"))?;
        let refused = |why: &str| {
            let what = format!(
                "the join token is not accepted: {why}; get the current one with `skep swarm join-token worker` (or manager) on a manager"
            );
            Status::permission_denied(what)
        };
        let digest = root_digest(&cluster.root_ca_cert).map_err(internal)?;
        if digest != token.root_digest {
            return Err(refused("it is of another swarm"));
        }
        let same = |secret: &str| equal(secret.as_bytes(), token.secret.as_bytes());
        match (same(&cluster.join_tokens.worker), same(&cluster.join_tokens.manager)) {
            (true, _) => Ok(NodeRole::Worker),
            (_, true) => Ok(NodeRole::Manager),
            _ => Err(refused("it was rotated, or mistyped")),
        }
    }

    fn sign(
        state: &State,
        csr_pem: &str,
        node_id: NodeId,
        role: NodeRole,
    ) -> Result<(String, ClusterId), Status> {
        let cluster =
            state.cluster().ok_or_else(|| Status::unavailable("this manager has no swarm yet"))?;
        let authority = {
            let (certificate, key) = rotation::signing(cluster);
            Authority::from_pem(certificate, key).map_err(internal)?
        };
        let life = swarm::certificate_life(&cluster.spec);
        let signed = authority.sign(csr_pem, node_id, role, cluster.id, clock::now(), life);
        let unsigned = |error| {
            Status::invalid_argument(format!(
                "the certificate request cannot be signed: {}",
                Chain(&error)
            ))
        };
        Ok((signed.map_err(unsigned)?, cluster.id))
    }
}

/// A certificate of the swarm's authority, and the roots that its bearer trusts.
pub fn certify(
    state: &State,
    csr_pem: &str,
    node_id: NodeId,
    role: NodeRole,
) -> Result<(String, String), Status> {
    let (certificate_pem, _) = CaService::sign(state, csr_pem, node_id, role)?;
    let cluster = state.cluster().ok_or_else(|| Status::internal("the state has no swarm"))?;
    Ok((certificate_pem, rotation::told_to_joiners(cluster)))
}

/// Compares secrets in time that does not tell where they differ.
fn equal(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |acc, (l, r)| acc | (l ^ r)) == 0
}

fn internal(error: impl std::error::Error) -> Status {
    Status::internal(Chain(&error).to_string())
}

#[tonic::async_trait]
impl Ca for CaService {
    async fn root(&self, _: Request<RootRequest>) -> Result<Response<RootResponse>, Status> {
        // The local copy will do: the joiner checks its digest.
        let state = self.consensus.state();
        let cluster =
            state.cluster().ok_or_else(|| Status::unavailable("this manager has no swarm yet"))?;
        Ok(Response::new(RootResponse { root_pem: rotation::told_to_joiners(cluster) }))
    }

    async fn issue(
        &self,
        request: Request<IssueRequest>,
    ) -> Result<Response<IssueResponse>, Status> {
        let (caller, request) = (Caller::of(&request), request.into_inner());
        let token: JoinToken =
            request.token.parse().map_err(|error| Status::invalid_argument(format!("{error}")))?;
        let state = self.read().await?;
        let role = Self::role_of(&state, &token)?;
        let node_id = NodeId::random(&mut rand::rng());
        // Only of whoever has a token: strangers could write any number of lines.
        let answer = self.admit(&request, state, node_id, role);
        audited_try(caller, "Issue", &format!("node/{node_id}"), answer).await
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<RenewResponse>, Status> {
        let node_id = Caller::node_id(&request)?;
        let state = self.read().await?;
        let gone =
            || Status::permission_denied(format!("node {node_id} was removed from the swarm"));
        let node = state.node(node_id).ok_or_else(gone)?;
        let (role, raft_id) = (node.observed_role(), Some(roles::raft_id_of(node)));
        let (certificate_pem, _) =
            Self::sign(&state, &request.into_inner().csr_pem, node_id, role)?;
        let role = role.name().to_owned();
        let answer = RenewResponse { certificate_pem, role, raft_id, ..RenewResponse::default() };
        Ok(Response::new(answer))
    }
}

/// What a user wrote for an availability; empty is active.
pub fn parse_availability(text: &str) -> Result<Availability, Status> {
    match text {
        "" | "active" => Ok(Availability::Active),
        "pause" => Ok(Availability::Pause),
        "drain" => Ok(Availability::Drain),
        other => Err(Status::invalid_argument(format!(
            "invalid availability {other:?}: use active, pause or drain"
        ))),
    }
}

/// What a user wrote for the pools of networks' subnets; none and 0 are the defaults.
pub fn parse_pools(
    pools: &[String],
    subnet_size: u32,
    ingress_pool: Ipv4Net,
) -> Result<(Vec<Ipv4Net>, u8), Status> {
    let read = skep_manager_core::network::parse_pools(pools, subnet_size, ingress_pool);
    read.map_err(|error| Status::invalid_argument(error.to_string()))
}

/// A node that has just got its certificate.
pub fn new_node(
    id: NodeId,
    role: NodeRole,
    availability: Availability,
    advertise_addr: &str,
) -> Result<Node, Status> {
    let address: std::net::SocketAddr = advertise_addr
        .parse()
        .map_err(|_| Status::invalid_argument(format!("{advertise_addr:?} is not an ip:port")))?;
    Ok(Node {
        id,
        meta: Meta::default(),
        spec: NodeSpec { role, availability, ..NodeSpec::default() },
        description: None,
        status: NodeStatus {
            state: NodeState::Unknown,
            message: "joined, no session yet".into(),
            addr: address.ip().to_string(),
            port: address.port(),
            port_conditions: Vec::new(),
        },
        manager_status: None,
        number: 0,
        role: None,
    })
}

/// `ip:port` of every manager.
pub fn manager_addresses(state: &State) -> Vec<String> {
    let status = |node: &std::sync::Arc<Node>| {
        node.manager_status.as_ref().map(|status| status.addr.clone())
    };
    state.nodes().values().filter_map(status).collect()
}

/// Notes in a node's object that it is a manager, and makes it a voter.
pub(crate) async fn add_manager(
    consensus: &Consensus,
    node_id: NodeId,
    raft_id: u64,
    addr: &str,
    format_level: u32,
) -> Result<(), Status> {
    let status = ManagerStatus { raft_id, addr: addr.to_owned(), ..ManagerStatus::default() };
    loop {
        let state =
            consensus.read_state().await.map_err(|error| Status::from(Error::Read(error)))?;
        let node = match roles::admit(&state, node_id, &status, format_level) {
            Ok(Admission::Admitted) => break,
            Ok(Admission::Note(node)) => node,
            Err(why @ NotAdmitted::TooOld(_)) => {
                return Err(Status::failed_precondition(why.to_string()));
            }
            Err(why) => return Err(Status::permission_denied(why.to_string())),
        };
        let expect = Expect::Version(node.meta.version);
        match commit(consensus, Object::Node(node), expect).await {
            Err(status) if status.code() == tonic::Code::Aborted => {} // The node has just been written.
            Err(status) => return Err(status),
            Ok(()) => {} // What was written before that may be beyond its program.
        }
    }
    let unavailable = |error| Status::unavailable(Chain(&error).to_string());
    consensus.add_manager(raft_id, addr).await.map_err(unavailable)?;
    // Demoted or removed meanwhile: then nobody else would take it out again.
    let state = consensus.read_state().await.map_err(|error| Status::from(Error::Read(error)))?;
    // Its address may have changed meanwhile, which another request has written.
    if roles::is_manager(&state, node_id, raft_id) {
        return Ok(());
    }
    consensus.remove_manager(raft_id).await.map_err(unavailable)?;
    Err(Status::permission_denied(format!(
        "node {node_id} was demoted while it joined the managers"
    )))
}

pub(crate) async fn commit(
    consensus: &Consensus,
    object: Object,
    expect: Expect,
) -> Result<(), Status> {
    debug_assert_eq!(object.kind(), Kind::Node);
    let mut command = Command::new(clock::now(), vec![Action::Put { object, expect }]);
    audit::sign(&mut command);
    let outcome =
        consensus.propose(&command).await.map_err(|error| Status::from(Error::Propose(error)))?;
    match outcome {
        Outcome::Applied(version) => {
            audit::note(version);
            Ok(())
        }
        Outcome::Refused(refusal @ Refusal::OutOfSequence { .. }) => {
            Err(Status::aborted(refusal.to_string()))
        }
        Outcome::Refused(refusal) => Err(Error::Refused(refusal).into()),
    }
}
