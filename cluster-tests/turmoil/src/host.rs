//! One manager: the product's own, with its log, its leader's loop and its services, on a simulated machine.

use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use skep_common::limits::RPC_DEADLINE;
use skep_common::object::{Config, Node, NodeDescription, NodeState};
use skep_common::spec::{Availability, Base64, ConfigSpec, NodeRole, SwarmSpec};
use skep_common::{ClusterId, ConfigId, Meta, NodeId, Object};
use skep_manager::consensus::{
    Compaction, Consensus, DataKey, MemberRole, Options, StartError, StopReason, StorageError,
    Threads,
};
use skep_manager::raft_rpc::GrpcTransport;
use skep_manager::{Manager, ManagerOptions, NewSwarm};
use skep_manager_core::level::FORMAT_LEVEL;
use skep_manager_core::{Action, Command, Expect, Outcome, roles};
use skep_proto::IssueRequest;
use skep_proto::ca_client::CaClient;
use skep_runtime::identity::{Authority, Csr, Files, RaftKey};
use skep_runtime::transport::{ChannelPool, Peer, Tls};
use skep_runtime::{TaskSet, clock, simulation};
use tonic::Code;
use tonic::service::Routes;

use crate::disk::ForgetfulDisk;
use crate::ledger::{Ledger, Phase, Seen};
use crate::machines::{Identity, Machines, Wish, machine_of};
use crate::network::{self, address_of};

/// Until a manager whose disk failed is started again, as the daemon does.
const RESTART: Duration = Duration::from_secs(1);
/// Between attempts to join.
const RETRY: Duration = Duration::from_millis(200);
/// Between looks whether it is told something.
const LISTEN: Duration = Duration::from_millis(50);
/// Between looks at who the managers are.
const LOOK: Duration = Duration::from_millis(100);
/// Entries after which a snapshot is made, so that runs of a minute have many.
const COMPACTION: Compaction = Compaction { entries: 60, keep: 10 };
/// How often a leader decides to write something, and how much later it is written at most.
const FENCE: Duration = Duration::from_millis(400);
const FENCE_DELAY_MAX: Duration = Duration::from_secs(5);

/// What outlives a crash of the manager's machine.
#[derive(Debug)]
pub(crate) struct Host {
    /// The number of its machine.
    pub(crate) number: u64,
    /// All machines.
    pub(crate) machines: Arc<Machines>,
    /// Where its data is.
    pub(crate) dir: PathBuf,
    /// What it is written to.
    pub(crate) disk: ForgetfulDisk,
    /// Who it says that it is; nobody looks.
    pub(crate) tls: Tls,
    /// The swarm's authority: its certificate and its key.
    pub(crate) authority: (String, String),
    /// What is known of the run.
    pub(crate) ledger: Arc<Ledger>,
}

/// How a manager's time ends, but by a crash.
enum End {
    /// Its disk failed.
    Stopped,
    /// It is out of the Raft group.
    Left,
}

impl Host {
    /// Runs the manager again and again, until its machine stops.
    pub(crate) async fn run(self: Arc<Self>) -> turmoil::Result {
        loop {
            let identity = self.identity().await;
            let tasks = TaskSet::new();
            let end = match self.start(identity, &tasks).await {
                Ok(manager) => self.serve(manager, identity, &tasks).await?,
                Err(error) => {
                    self.refused(identity.raft_id, &error);
                    End::Stopped
                }
            };
            // Calls that hang would hold it up for ever; they end with the process.
            let _hanging = tokio::time::timeout(RESTART, tasks.shutdown()).await;
            match end {
                End::Stopped => self.ledger.count(|counts| counts.n_stops += 1),
                End::Left => {
                    self.ledger.note(&format!("manager {} is outside", identity.raft_id));
                    self.ledger.count(|counts| counts.n_removed += 1);
                    self.machines.forget(self.number);
                }
            }
            tokio::time::sleep(RESTART).await;
        }
    }

    /// Who it is in the swarm, once it is told to join.
    async fn identity(&self) -> Identity {
        loop {
            if let Some(identity) = self.machines.identity(self.number) {
                return identity;
            }
            if let Wish::Join { token } = self.machines.wish(self.number)
                && let Some(node_id) = self.certificate(token, &self.others()).await
            {
                let identity = self.machines.enter(self.number, node_id);
                let raft_id = identity.raft_id;
                self.ledger.note(&format!("machine {} is manager {raft_id}", self.number));
                return identity;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Asks the managers, one after the other, to let it in.
    async fn certificate(&self, token: String, managers: &[String]) -> Option<NodeId> {
        let pool = ChannelPool::new(self.tls.clone());
        let csr_pem = Csr::generate().expect("keys can be made").csr_pem;
        let request = IssueRequest {
            token,
            csr_pem,
            availability: "drain".to_owned(),
            advertise_addr: address_of(self.number),
            hostname: format!("n{}", self.number),
        };
        for manager in managers {
            let mut ca = CaClient::new(pool.channel(manager, Peer::Manager));
            let issued = tokio::time::timeout(RPC_DEADLINE, ca.issue(request.clone())).await;
            if let Ok(Ok(issued)) = issued {
                return issued.into_inner().node_id.parse().ok();
            }
        }
        None
    }

    /// Only a disk that fails may keep a manager from starting.
    fn refused(&self, raft_id: u64, error: &StartError) {
        let text = chain(error);
        self.ledger.note(&format!("manager {raft_id} does not start: {text}"));
        if !matches!(error, StartError::Storage(StorageError::Io { .. })) {
            self.ledger.violate(1, format!("manager {raft_id} cannot start: {text}"));
        }
    }

    /// A membership has a directory of its own: what it leaves is not there for the next.
    fn dir_of(&self, raft_id: u64) -> PathBuf {
        self.dir.join(raft_id.to_string())
    }

    async fn start(&self, identity: Identity, tasks: &TaskSet) -> Result<Manager, StartError> {
        let Identity { node_id, raft_id, .. } = identity;
        let pool = ChannelPool::new(self.tls.clone());
        let mut key = [0; 32];
        key[..8].copy_from_slice(&raft_id.to_be_bytes());
        let raft_key = RaftKey { id: 1, key };
        let dir = self.dir_of(raft_id);
        std::fs::create_dir_all(&dir).expect("the directory is the simulation's own");
        let transport = Arc::new(GrpcTransport::new(pool.separate()));
        let data_key = DataKey::new(raft_key.id, raft_key.key);
        let mut raft = Options::new(raft_id, dir.join("raft"), data_key, transport);
        raft.compaction = COMPACTION;
        raft.disk = Arc::new(self.disk.clone());
        raft.threads = Threads::OfCaller(tasks.clone());
        let options = ManagerOptions {
            node_id,
            hostname: format!("n{}", self.number),
            raft_id,
            raft_dir: dir.join("raft"),
            raft_key,
            files: Files::in_data_dir(&dir),
            address: address_of(self.number),
            pool,
        };
        Manager::start_with(options, raft).await
    }

    /// Serves until the disk fails, or it is out of the Raft group.
    async fn serve(
        &self,
        manager: Manager,
        identity: Identity,
        tasks: &TaskSet,
    ) -> Result<End, std::io::Error> {
        let raft_id = identity.raft_id;
        if self.dir_of(raft_id).join("raft/lost-tail").exists() {
            self.ledger.violate(1, format!("manager {raft_id} lost the end of its log"));
        }
        let incoming = network::connections(network::listen().await?, Arc::clone(&self.machines));
        let (gate, routes) = (manager.gate(), manager.add_routes(Routes::default()));
        let serving = tasks.clone();
        tasks.spawn_to_end("server", async move {
            // Connections are only dropped by it, and none of them is missed.
            let _ended = simulation::serve(incoming, gate, routes, &serving).await;
        });
        let consensus = manager.consensus();
        self.watch(consensus, tasks);
        let reason = tokio::select! {
            reason = consensus.stopped() => Some(reason),
            () = self.take_part(&manager, identity) => None,
            () = self.is_told(Wish::BeOutside) => None,
        };
        let end = match &reason {
            None => End::Left,
            // It was removed, and the others say so.
            Some(StopReason::Superseded(_)) => End::Left,
            Some(StopReason::Storage(text)) if !text.contains("panicked") => End::Stopped,
            Some(reason) => {
                self.ledger.violate(1, format!("manager {raft_id} stops: {}", chain(reason)));
                End::Stopped
            }
        };
        let why = reason.as_ref().map_or_else(|| "it is taken out".to_owned(), |why| chain(why));
        self.ledger.note(&format!("manager {raft_id} stops: {why}"));
        manager.stop().await;
        Ok(end)
    }

    /// Joins the managers, and leaves them once its users want that.
    async fn take_part(&self, manager: &Manager, identity: Identity) {
        let raft_id = identity.raft_id;
        if !identity.is_voter {
            self.join(manager, raft_id).await;
        }
        self.describe(manager, identity.node_id).await;
        loop {
            self.is_told(Wish::Leave).await;
            self.ledger.asked_out(raft_id);
            match manager.leave().await {
                Ok(()) => return self.ledger.left(raft_id),
                Err(status) => {
                    self.ledger.note(&format!("manager {raft_id} stays: {}", status.message()));
                    self.ledger.refuse_change(&status);
                    self.machines.withdraw(self.number, &Wish::Leave);
                }
            }
        }
    }

    async fn is_told(&self, wish: Wish) {
        while self.machines.wish(self.number) != wish {
            tokio::time::sleep(LISTEN).await;
        }
    }

    /// Founds the swarm, or becomes one of its managers.
    async fn join(&self, manager: &Manager, raft_id: u64) {
        if raft_id == 1 {
            let founded = self.found(manager).await;
            founded.expect("nothing fails before the swarm is founded");
        } else {
            loop {
                match manager.join(&self.others()).await {
                    Ok(()) => break,
                    // It is to be no manager any more, and hears so.
                    Err(status) if status.code() == Code::PermissionDenied => pending().await,
                    Err(_) => tokio::time::sleep(RETRY).await,
                }
            }
        }
        self.machines.has_joined(self.number);
        self.ledger.note(&format!("manager {raft_id} has joined"));
        if !self.machines.is_founder(raft_id) {
            self.ledger.count(|counts| counts.n_added += 1);
            self.ledger.joined(raft_id);
        }
    }

    /// The other managers, as far as a daemon hears of them.
    fn others(&self) -> Vec<String> {
        let members = self.ledger.members().map(|ids| ids.into_iter().map(machine_of).collect());
        let others: Vec<u64> = members.unwrap_or_else(|| self.machines.voters());
        others.into_iter().filter(|number| *number != self.number).map(address_of).collect()
    }

    /// Has the managers know what its agent would say of it, which does not run: what its program understands. To
    /// them the node is down, as far as tasks go.
    async fn describe(&self, manager: &Manager, node_id: NodeId) {
        loop {
            let described = describe(manager, node_id, &format!("n{}", self.number)).await;
            if described.is_some() {
                return;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn found(&self, manager: &Manager) -> Result<(), tonic::Status> {
        let swarm = NewSwarm {
            cluster_id: ClusterId(1),
            authority: Authority::from_pem(&self.authority.0, &self.authority.1)
                .expect("it was made for this run"),
            spec: SwarmSpec::default(),
            unlock_key: None,
            ingress_pool: "10.192.0.0/10".parse().expect("it is a pool"),
            default_addr_pool: Vec::new(),
            subnet_size: 0,
            availability: Availability::Drain,
        };
        manager.found(swarm).await?;
        let founders = self.machines.inside().into_iter();
        let others =
            founders.filter(|(number, _)| *number != self.number).map(|(number, other)| {
                let (role, availability) = (NodeRole::Manager, Availability::Drain);
                let address = address_of(number);
                let node: Node =
                    skep_manager::join::new_node(other.node_id, role, availability, &address)
                        .expect("it is an address");
                Action::Put { object: Object::Node(Box::new(node)), expect: Expect::Absent }
            });
        let others: Vec<Action> = others.chain([put_fence(0, Expect::Absent)]).collect();
        let command = Command::new(clock::now(), others);
        let outcome = manager.consensus().propose(&command).await;
        outcome.map(drop).map_err(|error| tonic::Status::internal(error.to_string()))
    }

    /// Has the ledger see all that this manager believes.
    fn watch(&self, consensus: &Consensus, tasks: &TaskSet) {
        let (raft_id, ledger) = (consensus.raft_id(), Arc::clone(&self.ledger));
        let mut leadership = consensus.leadership();
        tasks.spawn("watch leader", async move {
            loop {
                let leading = leadership.wait_for(|now| now.is_self).await.map(|now| now.term);
                let Ok(term) = leading else { return };
                ledger.leads(raft_id, term);
                let is_over =
                    leadership.wait_for(|now| !now.is_self || now.term != term).await.is_err();
                if is_over {
                    return;
                }
            }
        });
        let ledger = Arc::clone(&self.ledger);
        let mut feed = consensus.subscribe();
        tasks.spawn("watch state", async move {
            let mut last = 0;
            while let Some(commit) = feed.next().await {
                let version = commit.state.version().index;
                if version < last {
                    ledger.violate(
                        1,
                        format!("manager {raft_id} went back from {last} to {version}"),
                    );
                }
                last = version;
                if commit.all_changed && version > 0 {
                    ledger.count(|counts| counts.n_snapshots += 1);
                }
                ledger.digest(raft_id, version, &commit.state.digest());
            }
        });
        let fencing = fence(consensus.clone(), Arc::clone(&self.ledger), tasks.clone());
        tasks.spawn("fence", fencing);
        tasks.spawn("look around", look_around(consensus.clone(), Arc::clone(&self.ledger)));
    }
}

/// Has the ledger see who the managers are, while nothing fails.
async fn look_around(consensus: Consensus, ledger: Arc<Ledger>) {
    loop {
        if ledger.phase() >= Phase::Settling {
            let (state, members) = (consensus.state(), consensus.members());
            let of_role = |role| {
                let of_role = members.iter().filter(move |member| member.role == role);
                of_role.map(|member| member.raft_id).collect()
            };
            let manager = |node: &Arc<Node>| Some(node.manager_status.as_ref()?.raft_id);
            let retiring = roles::retiring(&state).into_iter();
            let raft_ids = retiring.filter_map(|node| Some(node.manager_status.as_ref()?.raft_id));
            let seen = Seen {
                term: consensus.leadership().borrow().term,
                voters: of_role(MemberRole::Voter),
                learners: of_role(MemberRole::Learner),
                managers: state.nodes().values().filter_map(manager).collect(),
                retiring: raft_ids.collect(),
            };
            ledger.sees(consensus.raft_id(), seen);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Writes what an agent would say; none where that did not work.
async fn describe(manager: &Manager, node_id: NodeId, hostname: &str) -> Option<()> {
    let state = manager.read_state().await.ok()?;
    let Some(node) = state.node(node_id) else { return Some(()) }; // It was removed.
    if node.description.is_some() {
        return Some(());
    }
    let mut node = (**node).clone();
    node.status.state = NodeState::Down;
    node.description = Some(NodeDescription {
        hostname: hostname.to_owned(),
        format_level: FORMAT_LEVEL,
        ..NodeDescription::default()
    });
    let expect = Expect::Version(node.meta.version);
    let actions = vec![Action::Put { object: Object::Node(Box::new(node)), expect }];
    let outcome = manager.consensus().propose(&Command::new(clock::now(), actions)).await;
    matches!(outcome, Ok(Outcome::Applied(_))).then_some(())
}

/// Decides, as leader, to write something, and does so a while later: by then the term may be over.
async fn fence(consensus: Consensus, ledger: Arc<Ledger>, tasks: TaskSet) {
    let mut leadership = consensus.leadership();
    while ledger.phase() <= Phase::Faults {
        let leading = leadership.wait_for(|now| now.is_self).await.map(|now| now.term);
        let Ok(term) = leading else { return };
        let (consensus, ledger) = (consensus.clone(), Arc::clone(&ledger));
        tasks.spawn("fenced write", async move {
            let chance = simulation::chance().unwrap_or_default();
            tokio::time::sleep(FENCE_DELAY_MAX.mul_f64(chance as f64 / u64::MAX as f64)).await;
            let command = Command::new(clock::now(), vec![put_fence(term, Expect::Present)]);
            if ledger.phase() <= Phase::Faults
                && let Ok(Outcome::Applied(version)) =
                    consensus.propose_as_leader(term, &command).await
            {
                ledger.fenced(version.index, term);
            }
        });
        tokio::time::sleep(FENCE).await;
    }
}

fn put_fence(term: u64, expect: Expect) -> Action {
    let mut spec = ConfigSpec { name: "fence".into(), ..ConfigSpec::default() };
    spec.data = Some(Base64(term.to_string().into_bytes()));
    let id = ConfigId(u128::MAX);
    let config = Config { id, meta: Meta::default(), spec, versions: Default::default() };
    Action::Put { object: Object::Config(Box::new(config)), expect }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    skep_runtime::telemetry::Chain(error).to_string()
}
