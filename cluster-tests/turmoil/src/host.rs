//! One manager: the product's own, with its log, its leader's loop and its services, on a simulated machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use skep_common::object::{Config, Node};
use skep_common::spec::{Availability, Base64, ConfigSpec, NodeRole, SwarmSpec};
use skep_common::{ClusterId, ConfigId, Meta, Object};
use skep_manager::consensus::{
    Compaction, Consensus, DataKey, Options, StartError, StopReason, StorageError, Threads,
};
use skep_manager::raft_rpc::GrpcTransport;
use skep_manager::{Manager, ManagerOptions, NewSwarm};
use skep_manager_core::{Action, Command, Expect, Outcome};
use skep_runtime::identity::{Authority, Files, RaftKey};
use skep_runtime::transport::{ChannelPool, Tls};
use skep_runtime::{TaskSet, clock, simulation};
use tonic::service::Routes;
use turmoil::net::TcpListener;

use crate::disk::ForgetfulDisk;
use crate::ledger::{Ledger, Phase};
use crate::network::{self, PORT, ip_of, node_of};

/// Until a manager whose disk failed is started again, as the daemon does.
const RESTART: Duration = Duration::from_secs(1);
/// Between attempts to join.
const RETRY: Duration = Duration::from_millis(200);
/// Entries after which a snapshot is made, so that runs of a minute have many.
const COMPACTION: Compaction = Compaction { entries: 60, keep: 10 };
/// How often a leader decides to write something, and how much later it is written at most.
const FENCE: Duration = Duration::from_millis(400);
const FENCE_DELAY_MAX: Duration = Duration::from_secs(5);

/// What outlives a crash of the manager's machine.
#[derive(Debug)]
pub(crate) struct Host {
    /// Its number: Raft id, node and address.
    pub(crate) number: u64,
    /// How many managers there are.
    pub(crate) n_managers: u64,
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
    /// It is a voter.
    pub(crate) has_joined: AtomicBool,
}

impl Host {
    /// `ip:port`.
    pub(crate) fn address(&self) -> String {
        format!("{}:{PORT}", ip_of(self.number))
    }

    /// Runs the manager again and again, until its machine stops.
    pub(crate) async fn run(self: Arc<Self>) -> turmoil::Result {
        loop {
            let tasks = TaskSet::new();
            match self.start(&tasks).await {
                Ok(manager) => {
                    self.serve(manager, &tasks).await?;
                    self.ledger.count(|counts| counts.n_stops += 1);
                }
                Err(error) => self.refused(&error),
            }
            // Calls that hang would hold it up for ever; they end with the process.
            let _hanging = tokio::time::timeout(RESTART, tasks.shutdown()).await;
            tokio::time::sleep(RESTART).await;
        }
    }

    /// Only a disk that fails may keep a manager from starting.
    fn refused(&self, error: &StartError) {
        let text = chain(error);
        self.ledger.note(&format!("manager {} does not start: {text}", self.number));
        if !matches!(error, StartError::Storage(StorageError::Io { .. })) {
            self.ledger.violate(1, format!("manager {} cannot start: {text}", self.number));
        }
    }

    async fn start(&self, tasks: &TaskSet) -> Result<Manager, StartError> {
        let pool = ChannelPool::new(self.tls.clone());
        let key = [u8::try_from(self.number).expect("there are few managers"); 32];
        let raft_key = RaftKey { id: 1, key };
        let transport = Arc::new(GrpcTransport::new(pool.separate()));
        let data_key = DataKey::new(raft_key.id, raft_key.key);
        let mut raft = Options::new(self.number, self.dir.join("raft"), data_key, transport);
        raft.compaction = COMPACTION;
        raft.disk = Arc::new(self.disk.clone());
        raft.threads = Threads::OfCaller(tasks.clone());
        let options = ManagerOptions {
            node_id: node_of(self.number),
            hostname: format!("n{}", self.number),
            raft_id: self.number,
            raft_dir: self.dir.join("raft"),
            raft_key,
            files: Files::in_data_dir(&self.dir),
            address: self.address(),
            pool,
        };
        Manager::start_with(options, raft).await
    }

    /// Serves until the disk fails.
    async fn serve(&self, manager: Manager, tasks: &TaskSet) -> turmoil::Result {
        if self.dir.join("raft/lost-tail").exists() {
            self.ledger.violate(1, format!("manager {} lost the end of its log", self.number));
        }
        let listener = TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, PORT)).await?;
        let incoming = network::connections(listener, self.n_managers);
        let routes = manager.add_routes(Routes::default());
        let serving = tasks.clone();
        tasks.spawn_to_end("server", async move {
            // Connections are only dropped by it, and none of them is missed.
            let _ended = simulation::serve(incoming, routes, &serving).await;
        });
        let consensus = manager.consensus();
        self.watch(consensus, tasks);
        if !self.has_joined.load(Ordering::Relaxed) {
            self.join(&manager).await;
        }
        let reason = consensus.stopped().await;
        self.ledger.note(&format!("manager {} stops: {}", self.number, chain(&reason)));
        match &reason {
            StopReason::Storage(text) if !text.contains("panicked") => {}
            _ => {
                self.ledger.violate(1, format!("manager {} stops: {}", self.number, chain(&reason)))
            }
        }
        manager.stop().await;
        Ok(())
    }

    /// Founds the swarm, or becomes one of its managers.
    async fn join(&self, manager: &Manager) {
        if self.number == 1 {
            let founded = self.found(manager).await;
            founded.expect("nothing fails before the swarm is founded");
        } else {
            let addresses = [format!("{}:{PORT}", ip_of(1))];
            while manager.join(&addresses).await.is_err() {
                tokio::time::sleep(RETRY).await;
            }
        }
        self.has_joined.store(true, Ordering::Relaxed);
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
            availability: Availability::Active,
        };
        manager.found(swarm).await?;
        let others = (2..=self.n_managers).map(|number| {
            let address = format!("{}:{PORT}", ip_of(number));
            let node: Node = skep_manager::join::new_node(
                node_of(number),
                NodeRole::Manager,
                Availability::Active,
                &address,
            )
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
        let (number, ledger) = (self.number, Arc::clone(&self.ledger));
        let mut leadership = consensus.leadership();
        tasks.spawn("watch leader", async move {
            loop {
                let leading = leadership.wait_for(|now| now.is_self).await.map(|now| now.term);
                let Ok(term) = leading else { return };
                ledger.leads(number, term);
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
                    ledger
                        .violate(1, format!("manager {number} went back from {last} to {version}"));
                }
                last = version;
                if commit.all_changed && version > 0 {
                    ledger.count(|counts| counts.n_snapshots += 1);
                }
                ledger.digest(number, version, &commit.state.digest());
            }
        });
        let fencing = fence(consensus.clone(), Arc::clone(&self.ledger), tasks.clone());
        tasks.spawn("fence", fencing);
    }
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
