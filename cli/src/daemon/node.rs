//! What runs while this machine is in a swarm: the one port, the agent and, on managers, consensus.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context as _, Result};
use nix::ifaddrs::getifaddrs;
use skep_common::NodeId;
use skep_common::object::{EngineDescription, IngressBalancer, NodeDescription};
use skep_common::placeholder::NodeFacts;
use skep_common::spec::{NodeRole, Platform, Resources};
use skep_common::wireguard::WireguardDescription;
use skep_manager::control::Audited;
use skep_manager::space::Full;
use skep_manager::{Manager, ManagerOptions};
use skep_proto::peer_server::PeerServer;
use skep_proto::{LogRecord, TaskLogsRequest};
use skep_runtime::TaskSet;
use skep_runtime::identity::{Credentials, Files, RaftKey, tls_info};
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::{ChannelPool, Tls, serve_tls};
use skep_worker::agent::{Agent, AgentOptions, Beats, Images, Managers, Payloads};
use skep_worker::container::ContainerRuntime;
use skep_worker::embedded::Embedded;
use skep_worker::embedded::uplink::{Underlay, Uplink};
use skep_worker::executor::Executor;
use skep_worker::executor_none::NoContainers;
use skep_worker::images::ImageStore;
use skep_worker::net::secure::{self, Keyring, Pairs};
use skep_worker::passage::{Daemons, Entrance, MESSAGE_BYTES_MAX, Windows};
use skep_worker::peer::PeerService;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::service::Routes;

use super::options::{Options, RuntimeChoice};
use super::record::{NodeRecord, RecordFile};
use super::renewal::{self, Identity};

/// What a user of a removed node is told.
const REMOVED: &str = "this node was removed from its swarm, and its containers were stopped: run `skep swarm leave` on it, then let it join again with `skep swarm join`";

/// A machine that is in a swarm.
pub(super) struct Node {
    pub(super) node_id: NodeId,
    pub(super) role: NodeRole,
    pub(super) cluster_id: skep_common::ClusterId,
    pub(super) record: NodeRecord,
    pub(super) managers: Managers,
    pub(super) pool: ChannelPool,
    pub(super) images: Images,
    /// The secrets and configs of its tasks.
    pub(super) payloads: Payloads,
    pub(super) manager: Option<Arc<Manager>>,
    uplink: Uplink,
    /// Of its passages, in and out.
    windows: Windows,
    keyring: Arc<Keyring>,
    pub(super) tls: Tls,
    pub(super) identity: Identity,
    /// Whether it has tried to take up another role: the next time waits.
    pub(super) has_tried_role: AtomicBool,
    /// Reads its containers' output, once they are taken up.
    peer: OnceLock<PeerService>,
    /// Its port, until it is served.
    listener: Mutex<Option<TcpListener>>,
    tasks: TaskSet,
}

/// An error whose reason may go away without anybody's doing on this node: it is worth another try.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Passing(pub(super) String);

/// What a node is made of.
pub(super) struct Parts {
    pub(super) credentials: Credentials,
    pub(super) raft_key: RaftKey,
    /// Where both are kept.
    pub(super) files: Files,
    pub(super) record: NodeRecord,
    pub(super) image_store: ImageStore,
}

impl Node {
    /// Takes the port, and starts everything but the agent: a manager takes part in consensus.
    pub(super) async fn start(options: &Options, parts: Parts) -> Result<Self> {
        let Parts { credentials, raft_key, files, record, image_store } = parts;
        let subject = credentials.subject().context("this node's certificate cannot be read")?;
        let tls = Tls::new(credentials).context("failed to set up TLS")?;
        let pool = ChannelPool::new(tls.clone());
        let tasks = TaskSet::new();
        let record_file = Arc::new(RecordFile::in_data_dir(&options.data_dir));
        let managers =
            Managers::new(record.managers.clone()).obeying(record.term_seen, record_file);
        let keyring = Keyring::open(&options.data_dir);
        let keyring = Arc::new(keyring.context("failed to read this node's keys for networks")?);
        let underlay = underlay(&record.advertise_addr, options, Arc::clone(&keyring))?;
        let listener = Mutex::new(Some(listen(&record.listen_addr)?));
        let mut uplink = Uplink::new(underlay).counting(options.metrics_addr.is_some());
        let windows = Windows::default();
        let daemons = Daemons::new(&pool, uplink.gate(), windows.clone(), tasks.clone());
        uplink = uplink.through(Arc::new(daemons));
        if options.ingress.balancer == IngressBalancer::UserSpace {
            uplink = uplink.in_user_space(&options.ingress.reason);
        }
        let images = Images::new(image_store, pool.clone(), tasks.clone()).await;
        let images = images.context("failed to list this node's images")?;
        let manager = match (subject.role, record.raft_id) {
            (NodeRole::Manager, Some(raft_id)) => {
                let options = ManagerOptions {
                    node_id: subject.node_id,
                    hostname: options.hostname.clone(),
                    raft_id,
                    raft_dir: options.data_dir.join("raft"),
                    raft_key: raft_key.clone(),
                    files: files.clone(),
                    address: record.advertise_addr.clone(),
                    pool: pool.clone(),
                };
                match Manager::start(options).await {
                    Ok(manager) => Some(Arc::new(manager)),
                    Err(error) => {
                        tasks.shutdown().await;
                        return Err(error).context("failed to start this manager");
                    }
                }
            }
            _ => None,
        };
        let identity = Identity::new(tls.clone(), files, raft_key);
        let renewing = renewal::run(identity.clone(), managers.clone(), pool.clone());
        tasks.spawn("renew certificate", renewing);
        tasks.spawn("trust", renewal::follow_trust(identity.clone(), managers.clone()));
        remember_managers(options, &record, &managers, &tasks);
        Ok(Self {
            node_id: subject.node_id,
            role: subject.role,
            cluster_id: subject.cluster_id,
            record,
            managers,
            pool,
            images,
            payloads: Payloads::default(),
            manager,
            uplink,
            windows,
            keyring,
            tls,
            identity,
            has_tried_role: AtomicBool::new(false),
            peer: OnceLock::new(),
            listener,
            tasks,
        })
    }

    /// Serves the one port and starts the agent.
    pub(super) async fn serve(&self, options: &Options) -> Result<()> {
        let containers = ContainerRuntime::open(options.containers());
        let facts = NodeFacts {
            node_id: self.node_id,
            hostname: options.hostname.clone(),
            architecture: std::env::consts::ARCH.to_owned(),
        };
        let containers = containers.context("failed to open the container runtime")?;
        let embedded = Embedded::new(containers, self.images.clone(), self.uplink.clone(), facts);
        let executor: Arc<dyn Executor> = match options.runtime {
            RuntimeChoice::Containers => Arc::new(embedded.clone()),
            RuntimeChoice::None => Arc::new(NoContainers::default()),
        };
        let peer = PeerService::new(
            self.images.store().clone(),
            Arc::new(embedded),
            self.tls.clone(),
            self.tasks.clone(),
        );
        let peer = peer.with_uplink(self.uplink.clone());
        let peer = peer.with_entrance(Entrance::new(self.uplink.gate(), self.windows.clone()));
        let _ = self.peer.set(peer.clone()); // A node is served once.
        let mut routes =
            Routes::new(PeerServer::new(peer).max_decoding_message_size(MESSAGE_BYTES_MAX));
        if let Some(manager) = &self.manager {
            routes = manager.add_routes(routes);
        }
        let gate = self.manager.as_ref().map(|manager| manager.gate()).unwrap_or_default();
        let listener = self.listener.lock().expect("nothing panics while it holds this").take();
        let listener = listener.context("a node serves its port once")?;
        let (tls, serving) = (self.tls.clone(), self.tasks.clone());
        self.tasks.spawn_to_end("node port", async move {
            if let Err(error) = serve_tls(listener, tls, gate, routes, &serving).await {
                tracing::error!(error = %Chain(&error), "the node port is not served any more");
            }
        });
        let agent = AgentOptions {
            description: self.follow_description(options),
            addr: self.record.advertise_addr.clone(),
            tasks_dir: options.data_dir.join("tasks"),
            executor,
            images: Some(self.images.clone()),
            payloads: self.payloads.clone(),
            balancers: Some(Box::new(self.uplink.clone())),
            managers: self.managers.clone(),
            pool: self.pool.clone(),
            beats: Beats::default(),
            tasks: self.tasks.clone(),
        };
        let (keyring, uplink) = (Arc::clone(&self.keyring), self.uplink.clone());
        let rotating = secure::rotate(keyring, async move || uplink.sessions().await);
        self.tasks.spawn("change keys", rotating);
        Agent::start(agent).await.context("failed to take up this node's tasks")
    }

    /// What this node says of itself, with the keys that it has at the time.
    fn follow_description(&self, options: &Options) -> watch::Receiver<NodeDescription> {
        // What overlay networks do not reach takes no part in encrypted ones.
        let implementation = match options.ingress.balancer {
            IngressBalancer::Kernel => secure::implementation().map(|name| name.to_string()),
            IngressBalancer::UserSpace => Err(options.ingress.reason.clone()),
        };
        let mut pairs = self.keyring.watch();
        let mut failure = self.uplink.encryption_failure();
        let mut described = description(options, self.uplink.interface());
        let tls = self.tls.clone();
        let mut credentials = tls.watch();
        let mut space = match &self.manager {
            Some(manager) => manager.space(),
            None => watch::channel(None).1,
        };
        let seen = space.clone();
        let mut describe = move |pairs: &Pairs, failure: &Option<String>| {
            described.disk_full = seen.borrow().as_ref().map(Full::to_string);
            described.wireguard = Some(match &implementation {
                Ok(name) => WireguardDescription {
                    implementation: failure.clone().unwrap_or_else(|| name.clone()),
                    public: pairs.public(),
                },
                Err(reason) => WireguardDescription {
                    implementation: reason.clone(),
                    ..WireguardDescription::default()
                },
            });
            let credentials = tls.credentials();
            match tls_info(&credentials) {
                Ok(info) => described.tls_info = Some(info),
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "this node's certificate cannot be described");
                }
            }
            described.clone()
        };
        let first = describe(&pairs.borrow_and_update(), &failure.borrow_and_update());
        let (sender, receiver) = watch::channel(first);
        self.tasks.spawn("describe", async move {
            loop {
                let changed = tokio::select! {
                    changed = pairs.changed() => changed,
                    changed = failure.changed() => changed,
                    changed = credentials.changed() => changed,
                    Ok(()) = space.changed() => Ok(()), // A worker has none to watch.
                };
                if changed.is_err() {
                    return;
                }
                let described = describe(&pairs.borrow_and_update(), &failure.borrow_and_update());
                sender.send_replace(described);
            }
        });
        receiver
    }

    /// Why it takes no part in its swarm though it would: managers say that it was removed.
    pub(super) fn refusal(&self) -> Option<&'static str> {
        self.managers.is_removed().then_some(REMOVED)
    }

    pub(super) fn control(&self) -> Option<Audited> {
        self.manager.as_ref().map(|manager| manager.control())
    }

    /// What is counted of this node, as text for a collector.
    pub(super) async fn metrics(&self) -> Result<String, skep_worker::net::Error> {
        self.uplink.metrics().await
    }

    /// The output of a container of this node.
    pub(super) fn logs(
        &self,
        request: TaskLogsRequest,
    ) -> Result<ReceiverStream<Result<LogRecord, Status>>, Status> {
        let peer = self.peer.get();
        peer.ok_or_else(|| Status::unavailable("this node is starting"))?.read_logs(request)
    }

    /// Stops; containers, rules and files stay.
    pub(super) async fn stop(&self) {
        if let Some(manager) = &self.manager {
            manager.stop().await;
        }
        self.tasks.shutdown().await;
    }

    /// Lets another node take over in this daemon, after a stop.
    pub(super) async fn release(&self) {
        self.uplink.release().await;
    }

    /// Removes the mesh from this machine's kernel, after a stop.
    pub(super) async fn teardown(&self) {
        self.uplink.teardown().await;
    }
}

/// Writes the managers down whenever they change, so that a restarted worker finds them.
fn remember_managers(options: &Options, record: &NodeRecord, managers: &Managers, tasks: &TaskSet) {
    let file = RecordFile::in_data_dir(&options.data_dir);
    let mut changes = managers.watch();
    tasks.spawn("remember managers", async move {
        while changes.changed().await.is_ok() {
            let managers = changes.borrow_and_update().clone();
            let stored = file.update(|record| record.managers = managers);
            if let Err(error) = stored {
                tracing::warn!(error = format!("{error:#}"), "failed to write down the managers");
            }
        }
    });
    debug_assert_eq!(record.managers, managers.all());
}

/// Connections that wait to be accepted: thousands of nodes come at once when a leader dies, and who finds no room tries
/// again after a second. The kernel's `net.core.somaxconn` is the limit.
const ACCEPT_QUEUE: u32 = 4096;

fn listen(address: &str) -> Result<TcpListener> {
    let bound = || {
        let address: SocketAddr = address.parse().map_err(io::Error::other)?;
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(ACCEPT_QUEUE)
    };
    bound().map_err(|error: io::Error| {
        let why = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "another program has the port (is another skep running?)".to_owned()
            }
            io::ErrorKind::AddrNotAvailable => {
                "no interface of this machine has that address: give it back to one".to_owned()
            }
            _ => error.to_string(),
        };
        Passing(format!("failed to listen on {address}: {why}")).into()
    })
}

/// The interface that has this node's address.
fn underlay(advertise_addr: &str, options: &Options, keyring: Arc<Keyring>) -> Result<Underlay> {
    let address: SocketAddr =
        advertise_addr.parse().with_context(|| format!("{advertise_addr:?} is no ip:port"))?;
    let address: Ipv4Addr = match address.ip() {
        std::net::IpAddr::V4(address) => address,
        std::net::IpAddr::V6(address) => {
            anyhow::bail!("the routing mesh needs an IPv4 address to advertise, not {address}")
        }
    };
    let mut interfaces = getifaddrs().context("failed to list this machine's interfaces")?;
    let with_address = interfaces.find(|interface| {
        let known = interface.address.as_ref().and_then(|known| known.as_sockaddr_in());
        known.is_some_and(|known| known.ip() == address)
    });
    let interface = with_address.ok_or_else(|| {
        Passing(format!(
            "no interface of this machine has the address {address} that it advertises: give it back to one"
        ))
    })?;
    let interface = interface.interface_name;
    Ok(Underlay { address, interface, run_dir: options.run_dir.clone(), keyring })
}

fn description(options: &Options, interface: &str) -> NodeDescription {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = nix::sys::sysinfo::sysinfo().map(|info| info.ram_total()).unwrap_or(0);
    NodeDescription {
        hostname: options.hostname.clone(),
        platform: Platform {
            architecture: std::env::consts::ARCH.to_owned(),
            os: "linux".to_owned(),
        },
        resources: Resources {
            nano_cpus: i64::try_from(processors).ok().map(|count| count * 1_000_000_000),
            memory_bytes: i64::try_from(memory).ok(),
            generic_resources: (!options.generic_resources.is_empty())
                .then(|| options.generic_resources.clone()),
            ..Resources::default()
        },
        engine: EngineDescription {
            engine_version: env!("CARGO_PKG_VERSION").to_owned(),
            labels: options.labels.clone(),
        },
        format_level: skep_manager::FORMAT_LEVEL,
        ipv6_addresses: skep_worker::net::ipv6_addresses(interface),
        ingress: Some(options.ingress.clone()),
        ..NodeDescription::default()
    }
}
