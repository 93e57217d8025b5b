//! A manager: consensus and everything that stands on it.

use std::path::PathBuf;
use std::sync::Arc;

use ipnet::Ipv4Net;
use skep_common::limits::{ANONYMOUS_MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX};
use skep_common::object::{Cluster, JoinTokens, ManagerStatus, Network};
use skep_common::spec::{Availability, Base64, NetworkSpec, NodeRole, SwarmSpec};
use skep_common::{ClusterId, Meta, NetworkId, NodeId, Object};
use skep_manager_core::{Action, Command, Expect, Outcome, State};
use skep_proto::ca_server::CaServer;
use skep_proto::containers_server::ContainersServer;
use skep_proto::control_server::ControlServer;
use skep_proto::dispatcher_server::DispatcherServer;
use skep_proto::raft_server::RaftServer;
use skep_runtime::gate::Gate;
use skep_runtime::identity::{Authority, Files, RaftKey, UnlockKey, new_secret};
use skep_runtime::transport::ChannelPool;
use skep_runtime::{TaskSet, clock};
use tokio::sync::watch;
use tonic::Status;
use tonic::service::Routes;

use crate::address;
use crate::consensus::{self, Consensus, DataKey, MemberRole, ReadError, StopReason};
use crate::control::{self, Audited, ContainersService, ControlService};
use crate::dispatcher::{DispatcherService, Door};
use crate::join::{self, CaService};
use crate::leader;
use crate::lock;
use crate::raft_rpc::{GrpcTransport, RaftService, ask_to_add};
use crate::reach::Reach;
use crate::register::Members;
use crate::space::{self, Full};

/// What a manager needs.
#[derive(Debug)]
pub struct ManagerOptions {
    /// This node.
    pub node_id: NodeId,
    /// Its host name.
    pub hostname: String,
    /// Its Raft id: random, never reused.
    pub raft_id: u64,
    /// Where log and snapshots are kept.
    pub raft_dir: PathBuf,
    /// Seals them.
    pub raft_key: RaftKey,
    /// Where that key lies.
    pub files: Files,
    /// `ip:port` at which other nodes reach it.
    pub address: String,
    /// Channels to other nodes.
    pub pool: ChannelPool,
}

/// What a new swarm begins with.
#[derive(Debug)]
pub struct NewSwarm {
    /// Its id.
    pub cluster_id: ClusterId,
    /// Its authority.
    pub authority: Authority,
    /// Its settings.
    pub spec: SwarmSpec,
    /// What managers are to start locked with.
    pub unlock_key: Option<UnlockKey>,
    /// Pool of ingress slices.
    pub ingress_pool: Ipv4Net,
    /// Pools of the subnets of networks; none is the default one.
    pub default_addr_pool: Vec<Ipv4Net>,
    /// Prefix length of these subnets; 0 is the default.
    pub subnet_size: u8,
    /// Whether its first node takes tasks.
    pub availability: Availability,
}

/// A running manager.
#[derive(Debug)]
pub struct Manager {
    options: ManagerOptions,
    consensus: Consensus,
    control: ControlService,
    door: Door,
    space: watch::Receiver<Option<Full>>,
    members: Members,
    reach: Reach,
    tasks: TaskSet,
}

impl Manager {
    /// Opens the log and takes part in consensus, as far as this manager is a member.
    pub async fn start(options: ManagerOptions) -> Result<Self, consensus::StartError> {
        let key = DataKey::new(options.raft_key.id, options.raft_key.key);
        // Raft has a runtime of its own, and its channels end with it.
        let transport = Arc::new(GrpcTransport::new(options.pool.separate()));
        let raft = consensus::Options::new(options.raft_id, &options.raft_dir, key, transport);
        Self::start_with(options, raft).await
    }

    /// The same with other settings of consensus than the usual.
    pub async fn start_with(
        options: ManagerOptions,
        raft: consensus::Options,
    ) -> Result<Self, consensus::StartError> {
        let consensus = Consensus::start(raft).await?;
        let tasks = TaskSet::new();
        let (kept, lock_version) = watch::channel(options.files.lock_version());
        tasks.spawn("lock", lock::follow(consensus.clone(), options.files.clone(), kept));
        let space = space::watch(options.raft_dir.clone(), consensus.clone(), &tasks);
        let reach = Reach::new(consensus.clone(), options.pool.clone());
        tasks.spawn("reach", reach.clone().run());
        let control = ControlService::new(control::Inner {
            consensus: consensus.clone(),
            reach: reach.clone(),
            node_id: options.node_id,
            pool: options.pool.clone(),
            tasks: tasks.clone(),
            address: options.address.clone(),
            lock_version,
            space: space.clone(),
            questions: Arc::new(tokio::sync::Semaphore::new(1)),
        });
        let door = Door::new();
        tasks.spawn("leader", leader::run(consensus.clone(), door.clone(), tasks.clone()));
        let announcing = address::announce(
            consensus.clone(),
            options.pool.clone(),
            options.node_id,
            options.address.clone(),
        );
        tasks.spawn("address", announcing);
        let members = Members::new(consensus.clone());
        tasks.spawn("members", members.clone().follow());
        Ok(Self { options, consensus, control, door, space, members, reach, tasks })
    }

    /// Founds a new swarm with this manager as its only one, and returns the worker token's secret.
    pub async fn found(&self, swarm: NewSwarm) -> Result<String, Status> {
        let internal = |error: &dyn std::error::Error| Status::internal(error.to_string());
        self.consensus.bootstrap(&self.options.address).await.map_err(|error| internal(&error))?;
        let tokens = JoinTokens { worker: new_secret(), manager: new_secret() };
        let worker_secret = tokens.worker.clone();
        let lock_version = u64::from(swarm.unlock_key.is_some());
        let cluster = Cluster {
            id: swarm.cluster_id,
            meta: Meta::default(),
            spec: SwarmSpec { name: "default".into(), ..swarm.spec },
            join_tokens: tokens,
            root_ca_cert: swarm.authority.root_pem().to_owned(),
            root_ca_key: swarm.authority.key_pem().to_owned(),
            ingress_pool: swarm.ingress_pool,
            default_addr_pool: swarm.default_addr_pool,
            subnet_size: swarm.subnet_size,
            root_rotation: None,
            unlock_key: swarm.unlock_key.map(|key| Base64(key.to_bytes())),
            unlock_key_version: lock_version,
            blacklisted: std::collections::BTreeMap::new(),
            longest_node_cert_expiry: None,
        };
        let address = &self.options.address;
        let mut node =
            join::new_node(self.options.node_id, NodeRole::Manager, swarm.availability, address)?;
        let raft_id = self.options.raft_id;
        node.manager_status =
            Some(ManagerStatus { raft_id, addr: address.clone(), ..ManagerStatus::default() });
        let ingress = Network {
            id: NetworkId::random(&mut rand::rng()),
            meta: Meta::default(),
            spec: NetworkSpec {
                name: "ingress".into(),
                ingress: Some(true),
                ..NetworkSpec::default()
            },
            vni: 0,
            subnets: Vec::new(),
            pending_delete: false,
        };
        let put = |object| Action::Put { object, expect: Expect::Absent };
        let actions = vec![
            put(Object::Cluster(Box::new(cluster))),
            put(Object::Node(Box::new(node))),
            put(Object::Network(Box::new(ingress))),
        ];
        let command = Command::new(clock::now(), actions);
        match self.consensus.propose(&command).await.map_err(|error| internal(&error))? {
            Outcome::Applied(_) => {
                self.control.wait_locked(lock_version).await;
                Ok(worker_secret)
            }
            Outcome::Refused(refusal) => Err(Status::internal(refusal.to_string())),
        }
    }

    /// Asks the other managers to make this one a voter; returns once it is one.
    pub async fn join(&self, managers: &[String]) -> Result<(), Status> {
        ask_to_add(&self.options.pool, managers, self.options.raft_id, &self.options.address).await
    }

    /// Asks the other managers not to count this one any more; returns once they do not. Refused where
    /// they would lose their quorum.
    pub async fn leave(&self) -> Result<(), Status> {
        crate::roles::ask_to_leave(&self.options.pool, &self.consensus).await
    }

    /// What clients ask.
    pub fn control(&self) -> Audited {
        Audited::new(self.control.clone())
    }

    /// The swarm as a majority of the managers has it; an error where there is none.
    pub async fn read_state(&self) -> Result<State, ReadError> {
        self.consensus.read_state().await
    }

    /// How many managers vote.
    pub fn n_voters(&self) -> usize {
        let members = self.consensus.members();
        members.iter().filter(|member| member.role == MemberRole::Voter).count()
    }

    /// Why nothing can be changed, where too few managers answer.
    pub fn without_quorum(&self) -> Option<String> {
        self.reach.is_quorum_lost().then(|| self.reach.explain())
    }

    /// Who is let in at the one port.
    pub fn gate(&self) -> Gate {
        Gate::of(self.members.clone())
    }

    /// Adds this manager's services to those of the one port.
    pub fn add_routes(&self, routes: Routes) -> Routes {
        let consensus = || self.consensus.clone();
        let raft =
            RaftService::new(consensus(), self.options.node_id, self.options.hostname.clone());
        let dispatcher = DispatcherService::new(self.door.clone(), consensus(), self.tasks.clone());
        routes
            .add_service(
                CaServer::new(CaService::new(consensus()))
                    .max_decoding_message_size(ANONYMOUS_MESSAGE_BYTES_MAX),
            )
            .add_service(
                RaftServer::new(raft)
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(
                DispatcherServer::new(dispatcher).max_encoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(
                ContainersServer::new(ContainersService::new(self.control.clone()))
                    .max_encoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(
                ControlServer::new(self.control())
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX),
            )
    }

    /// What it stands on.
    pub fn consensus(&self) -> &Consensus {
        &self.consensus
    }

    /// Waits until consensus takes no part any more, and says why.
    pub async fn stopped(&self) -> StopReason {
        self.consensus.stopped().await
    }

    /// Whether its disk is full, as that changes.
    pub fn space(&self) -> watch::Receiver<Option<Full>> {
        self.space.clone()
    }

    /// Transfers its leadership, and stops. What was acknowledged is on disk.
    pub async fn stop(&self) {
        self.consensus.transfer_leader().await;
        self.tasks.shutdown().await;
        self.consensus.shutdown().await;
    }
}
