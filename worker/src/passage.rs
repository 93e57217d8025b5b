//! Connections to tasks of other nodes through their daemons: `Peer.Connect`, from both ends.
//!
//! One call is one connection (`pieces`), of which each end keeps no more than its window (`windows`).

mod pieces;
mod windows;

use std::io;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skep_common::NodeId;
use skep_proto::peer_client::PeerClient;
use skep_proto::{ConnectTarget, Piece};
use skep_runtime::transport::{ChannelPool, Peer};
use skep_runtime::{TaskSet, clock};
use skep_worker_core::mesh::{Admission, Gate, Passage};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::{Status, Streaming};

pub use self::pieces::Outgoing;
use self::windows::Window;
pub use self::windows::Windows;
use crate::net::mesh::carry;
use crate::net::mesh::places::{Place, Places};
use crate::net::mesh::relay::{prepare, refuse};
use crate::net::{Carrier, Passages};
use crate::throttle::Throttle;

/// The largest message of a call between nodes: a piece, or what another call asks for.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Connections that other nodes have to this node's tasks at once, each a file descriptor; more are refused.
const CONNECTIONS_MAX: usize = 8192;

/// Those to one of the tasks: half of them, so that one that does not read leaves room for others.
const CONNECTIONS_OF_TASK_MAX: usize = CONNECTIONS_MAX / 2;

/// How long a task may take to accept: less than the caller waits, who then asks another one.
const ACCEPT_TIMEOUT: Duration = Duration::from_millis(1900);

/// How long the table that names a task may come to its own node after it came to the caller's.
const TABLE_WAIT: Duration = Duration::from_millis(300);

/// Reaches the tasks of other nodes through their daemons.
#[derive(Debug)]
pub struct Daemons {
    pool: ChannelPool,
    gate: watch::Receiver<Arc<Gate>>,
    windows: Windows,
    tasks: TaskSet,
    refusals: Throttle,
}

impl Daemons {
    /// With channels of its own: bytes of clients do not wait with calls of nodes.
    pub fn new(
        pool: &ChannelPool,
        gate: watch::Receiver<Arc<Gate>>,
        windows: Windows,
        tasks: TaskSet,
    ) -> Self {
        let pool = pool.for_connections();
        Self { pool, gate, windows, tasks, refusals: Throttle::default() }
    }

    fn window(&self, passage: &Passage) -> io::Result<Window> {
        self.windows.take().ok_or_else(|| {
            if let Some(withheld) = self.refusals.pass(clock::monotonic()) {
                let (task, port) = (&passage.task_id, passage.target_port);
                tracing::warn!(
                    task.id = task, port, node.id = %passage.node_id, withheld,
                    limit = windows::BYTES_MAX,
                    "no connection to another node is opened, since those that are open may fill this node's windows"
                );
            }
            io::Error::from(io::ErrorKind::QuotaExceeded)
        })
    }
}

#[tonic::async_trait]
impl Passages for Daemons {
    async fn open(&self, passage: &Passage) -> io::Result<Box<dyn Carrier>> {
        let address = passage.daemon.to_string();
        let channel = self.pool.channel(&address, Peer::Node(passage.node_id));
        let target = ConnectTarget {
            task_id: passage.task_id.clone(),
            port: passage.target_port.into(),
            table_version: self.gate.borrow().since,
        };
        let (carrier, outgoing, incoming) = pieces::pieces(self.window(passage)?, 0, Some(target));
        let mut client = PeerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let answer = client.connect(outgoing).await;
        let answer = answer.map_err(|status| {
            io::Error::new(io::ErrorKind::ConnectionRefused, status.message().to_owned())
        })?;
        self.tasks.spawn("passage", incoming.run(answer.into_inner()));
        Ok(Box::new(carrier))
    }
}

/// Takes connections of other nodes to tasks of this one.
#[derive(Debug, Clone)]
pub struct Entrance {
    gate: watch::Receiver<Arc<Gate>>,
    permits: Arc<Semaphore>,
    /// Of each task and port.
    places: Places<String>,
    windows: Windows,
    refusals: Arc<Throttle>,
    breaks: Arc<Throttle>,
}

impl Entrance {
    /// To the tasks that it names, and to no others.
    pub fn new(gate: watch::Receiver<Arc<Gate>>, windows: Windows) -> Self {
        Self {
            gate,
            windows,
            permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            places: Places::new(CONNECTIONS_OF_TASK_MAX),
            refusals: Arc::default(),
            breaks: Arc::default(),
        }
    }

    /// Connects the node that calls to the task that the first piece names; returns what it answers.
    pub async fn connect(
        &self,
        caller: NodeId,
        mut call: Streaming<Piece>,
        tasks: &TaskSet,
    ) -> Result<Outgoing, Status> {
        let (start, mut way) = (clock::monotonic(), None);
        let connect = async {
            let piece = call.message().await?.unwrap_or_default();
            let first = piece.target.filter(|_| piece.data.is_empty() && !piece.end);
            let first = first.ok_or_else(|| Status::invalid_argument("no task is named"))?;
            // Whoever is not let in takes nobody's room while he waits for that.
            let way = way.insert(way_of(&first));
            let address = self.admit(caller, &first).await?;
            let held = self.hold(&way.0)?;
            let stream = TcpStream::connect(address).await;
            let stream = stream.map_err(|error| {
                Status::unavailable(format!("task {} did not accept: {error}", first.task_id))
            });
            Ok((held, stream?, piece.credit))
        };
        let connected = tokio::time::timeout(ACCEPT_TIMEOUT, connect).await;
        let connected = connected.unwrap_or_else(|_| {
            let limit = ACCEPT_TIMEOUT.as_millis();
            Err(Status::unavailable(format!("the task did not accept within {limit} ms")))
        });
        let ((permit, place, window), stream, credit) = connected.inspect_err(|status| {
            self.tell_refusal(caller, way.as_ref(), status, start);
        })?;
        prepare(&stream);
        let (mut carrier, outgoing, incoming) = pieces::pieces(window, credit, None);
        let breaks = Arc::clone(&self.breaks);
        let carry = async move {
            if let Err(error) = carry::through(&stream, &mut carrier, None).await {
                tell_break(&breaks, caller, way.as_ref(), &error, start);
                refuse(&stream);
            }
            drop((permit, place));
        };
        tasks.spawn("connection of another node", async move {
            tokio::join!(carry, incoming.run(call));
        });
        Ok(outgoing)
    }

    /// Room for one more connection of the node and of the task.
    fn hold(
        &self,
        task_id: &String,
    ) -> Result<(OwnedSemaphorePermit, Place<String>, Window), Status> {
        let permit = self.permits.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "this node has {CONNECTIONS_MAX} connections of other nodes, its limit"
            ))
        })?;
        let place = self.places.take(task_id).ok_or_else(|| {
            Status::resource_exhausted(format!(
                "task {task_id} has {} connections of other nodes, its limit",
                self.places.limit(),
            ))
        })?;
        let window = self.windows.take().ok_or_else(|| {
            let limit = windows::BYTES_MAX;
            Status::resource_exhausted(format!(
                "connections between this node and others may keep {limit} bytes, its limit"
            ))
        })?;
        Ok((permit, place, window))
    }

    async fn admit(&self, caller: NodeId, wanted: &ConnectTarget) -> Result<SocketAddrV4, Status> {
        let way = way_of(wanted);
        let mut gate = self.gate.clone();
        let answer = |gate: &Gate| gate.admit(caller, &way, wanted.table_version);
        let named = gate.wait_for(|gate| answer(gate) != Admission::Later);
        let _ = tokio::time::timeout(TABLE_WAIT, named).await; // What it is by then is asked below.
        let admission = answer(&self.gate.borrow());
        match admission {
            Admission::To(address) => Ok(address),
            Admission::NotOfSwarm => Err(Status::permission_denied(format!(
                "node {caller} is not among the nodes of this swarm, as this node's leader told it"
            ))),
            Admission::NoSuchTask | Admission::Later => Err(Status::not_found(format!(
                "no task {} serves a published port by port {} here",
                wanted.task_id, wanted.port,
            ))),
        }
    }

    fn tell_refusal(&self, caller: NodeId, way: Option<&Way>, status: &Status, start: Instant) {
        let now = clock::monotonic();
        if let Some(withheld) = self.refusals.pass(now) {
            let (task, port) = way.map_or(("", 0), |(task, port)| (task.as_str(), *port));
            let after_ms = now.duration_since(start).as_millis();
            tracing::warn!(
                task.id = task, port, node.id = %caller, error = status.message(), after_ms, withheld,
                "a connection of another node is refused"
            );
        }
    }
}

/// A task and a port of it.
type Way = (String, u16);

/// A port that is none is one that nothing serves.
fn way_of(wanted: &ConnectTarget) -> Way {
    (wanted.task_id.clone(), u16::try_from(wanted.port).unwrap_or(0))
}

fn tell_break(
    breaks: &Throttle,
    caller: NodeId,
    way: Option<&Way>,
    error: &io::Error,
    start: Instant,
) {
    let now = clock::monotonic();
    if let Some(withheld) = breaks.pass(now) {
        let (task, port) = way.map_or(("", 0), |(task, port)| (task.as_str(), *port));
        let after_ms = now.duration_since(start).as_millis();
        tracing::warn!(
            task.id = task, port, node.id = %caller, %error, after_ms, withheld,
            "a connection of another node broke"
        );
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use skep_common::ClusterId;
    use skep_common::spec::NodeRole;
    use skep_proto::peer_server::{Peer as PeerApi, PeerServer};
    use skep_proto::{
        BlobChunk, BlobRequest, CheckPathRequest, LogRecord, PathReport, TaskLogsRequest,
    };
    use skep_runtime::gate::Gate as Open;
    use skep_runtime::identity::{Authority, Credentials, Csr};
    use skep_runtime::transport::{Tls, serve_tls};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tonic::service::Routes;
    use tonic::{Request, Response};

    use super::*;

    const OTHER: NodeId = NodeId(2);

    /// A node that takes connections and nothing else.
    struct Other(Entrance, TaskSet);

    type Answers<T> = futures::stream::BoxStream<'static, Result<T, Status>>;

    #[tonic::async_trait]
    impl PeerApi for Other {
        type BlobStream = Answers<BlobChunk>;
        type TaskLogsStream = Answers<LogRecord>;
        type CheckPathStream = Answers<PathReport>;
        type ConnectStream = Answers<Piece>;

        async fn blob(
            &self,
            _: Request<BlobRequest>,
        ) -> Result<Response<Self::BlobStream>, Status> {
            Err(Status::unimplemented("not asked for here"))
        }

        async fn task_logs(
            &self,
            _: Request<TaskLogsRequest>,
        ) -> Result<Response<Self::TaskLogsStream>, Status> {
            Err(Status::unimplemented("not asked for here"))
        }

        async fn check_path(
            &self,
            _: Request<Streaming<CheckPathRequest>>,
        ) -> Result<Response<Self::CheckPathStream>, Status> {
            Err(Status::unimplemented("not asked for here"))
        }

        async fn connect(
            &self,
            request: Request<Streaming<Piece>>,
        ) -> Result<Response<Self::ConnectStream>, Status> {
            let caller = skep_runtime::access::Caller::node_id(&request)?;
            let answer = self.0.connect(caller, request.into_inner(), &self.1).await?;
            Ok(Response::new(Box::pin(futures::StreamExt::map(answer, Ok))))
        }
    }

    struct Swarm {
        daemons: Daemons,
        address: SocketAddrV4,
        task: TcpListener,
        gate: watch::Sender<Arc<Gate>>,
        entrance: Entrance,
        _tasks: TaskSet,
    }

    fn v4(listener: &TcpListener) -> SocketAddrV4 {
        listener.local_addr().unwrap().to_string().parse().unwrap()
    }

    fn gate(version: u64, nodes: &[u128], task: &str, address: SocketAddrV4) -> Gate {
        Gate {
            version,
            since: version,
            nodes: nodes.iter().copied().map(NodeId).collect(),
            targets: [((task.to_owned(), 80), address)].into(),
            ..Gate::default()
        }
    }

    /// This node, and another one with a task. Both have one table.
    async fn swarm() -> Swarm {
        let authority = Authority::generate(clock::now()).unwrap();
        let tls = |node_id| {
            let csr = Csr::generate().unwrap();
            let life = Duration::from_secs(3600);
            let (role, cluster) = (NodeRole::Worker, ClusterId(1));
            let signed =
                authority.sign(&csr.csr_pem, node_id, role, cluster, clock::now(), life).unwrap();
            let root_pem = authority.root_pem().to_owned();
            Tls::new(Credentials { certificate_pem: signed, key_pem: csr.key_pem, root_pem })
                .unwrap()
        };
        let task = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (gate, receiver) = watch::channel(Arc::new(gate(1, &[1, 2], "task", v4(&task))));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, tasks) = (v4(&listener), TaskSet::new());
        let entrance = Entrance::new(receiver.clone(), Windows::default());
        let other = PeerServer::new(Other(entrance.clone(), tasks.clone()));
        let (serving, server) = (tasks.clone(), tls(OTHER));
        tasks.spawn("test server", async move {
            serve_tls(listener, server, Open::default(), Routes::new(other), &serving)
                .await
                .unwrap();
        });
        let pool = ChannelPool::new(tls(NodeId(1)));
        let daemons = Daemons::new(&pool, receiver, Windows::default(), tasks.clone());
        Swarm { daemons, address, task, gate, entrance, _tasks: tasks }
    }

    impl Swarm {
        fn passage(&self, task_id: &str, target_port: u16) -> Passage {
            let (node_id, daemon) = (OTHER, self.address);
            Passage { node_id, daemon, task_id: task_id.to_owned(), target_port }
        }

        async fn open(&self) -> (Box<dyn Carrier>, TcpStream) {
            let passage = self.passage("task", 80);
            let (carrier, accepted) = tokio::join!(self.daemons.open(&passage), self.task.accept());
            (carrier.unwrap(), accepted.unwrap().0)
        }
    }

    #[tokio::test]
    async fn bytes_and_the_end_of_each_direction_arrive() {
        let swarm = swarm().await;
        let (mut carrier, mut task) = swarm.open().await;
        let question = vec![7; 3 << 20];
        let send = async {
            carrier.write_all(&question).await.unwrap();
            carrier.shutdown().await.unwrap();
        };
        let mut seen = Vec::new();
        let ((), read) = tokio::join!(send, task.read_to_end(&mut seen));
        read.unwrap();
        assert!(seen == question);
        // The other direction goes on after that.
        task.write_all(b"answer").await.unwrap();
        drop(task);
        let mut seen = Vec::new();
        carrier.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"answer");
    }

    #[tokio::test]
    async fn what_breaks_on_one_side_breaks_on_the_other() {
        let swarm = swarm().await;
        let (mut carrier, task) = swarm.open().await;
        task.set_zero_linger().unwrap();
        drop(task);
        let error = carrier.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

        let (carrier, mut task) = swarm.open().await;
        drop(carrier);
        let error = task.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn only_published_ports_of_own_tasks_are_reached() {
        let mut swarm = swarm().await;
        for (task_id, port) in [("task", 81), ("another", 80)] {
            let error = swarm.daemons.open(&swarm.passage(task_id, port)).await.unwrap_err();
            let expect = format!("no task {task_id} serves a published port by port {port} here");
            assert_eq!(error.to_string(), expect);
        }
        let passage = Passage { node_id: NodeId(3), ..swarm.passage("task", 80) };
        swarm.daemons.open(&passage).await.expect_err("that is another node");
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gone = std::mem::replace(&mut swarm.task, free);
        drop(gone);
        let error = swarm.daemons.open(&swarm.passage("task", 80)).await.unwrap_err();
        assert!(error.to_string().starts_with("task task did not accept"), "{error}");
    }

    #[tokio::test]
    async fn a_task_whose_table_comes_a_moment_later_is_reached() {
        let swarm = swarm().await;
        let passage = swarm.passage("late", 80);
        let late = Gate { since: 2, ..Gate::default() };
        let caller = Daemons { gate: watch::channel(Arc::new(late)).1, ..swarm.daemons };
        let come = async {
            swarm.task.accept().await.unwrap();
        };
        let tell = async {
            // Until the other node waits for its table.
            while swarm.gate.receiver_count() < 4 {
                tokio::task::yield_now().await;
            }
            swarm.gate.send_replace(Arc::new(gate(2, &[1, 2], "late", v4(&swarm.task))));
        };
        let (opened, (), ()) = tokio::join!(caller.open(&passage), come, tell);
        opened.unwrap();
    }

    #[tokio::test]
    async fn a_task_that_is_withdrawn_and_a_node_that_is_removed_are_refused_without_a_wait() {
        let swarm = swarm().await;
        let withdrawn = ConnectTarget { task_id: "withdrawn".into(), port: 80, table_version: 1 };
        let refused = swarm.entrance.admit(NodeId(1), &withdrawn).now_or_never();
        refused.expect("nothing is waited for").unwrap_err();
        swarm.gate.send_replace(Arc::new(gate(2, &[2], "task", v4(&swarm.task))));
        let error = swarm.daemons.open(&swarm.passage("task", 80)).await.unwrap_err();
        let expect = format!(
            "node {} is not among the nodes of this swarm, as this node's leader told it",
            NodeId(1)
        );
        assert_eq!(error.to_string(), expect);
    }

    #[tokio::test]
    async fn what_breaks_while_the_other_end_does_not_read_frees_its_place() {
        let swarm = swarm().await;
        let (much, pause) = (vec![0; 64 << 10], Duration::from_millis(200));
        let all = u32::try_from(CONNECTIONS_MAX).unwrap();
        for is_caller in [true, false] {
            let (mut carrier, mut task) = swarm.open().await;
            if is_caller {
                while tokio::time::timeout(pause, carrier.write_all(&much)).await.is_ok() {}
                drop(carrier);
            } else {
                while tokio::time::timeout(pause, task.write_all(&much)).await.is_ok() {}
                task.set_zero_linger().unwrap();
                drop(task);
            }
            let freed = swarm.entrance.permits.acquire_many(all);
            let freed = tokio::time::timeout(Duration::from_secs(20), freed).await;
            let _permits = freed.expect("the connection has ended").unwrap();
        }
    }

    #[tokio::test]
    async fn a_task_has_its_limit_and_leaves_room_for_others() {
        let swarm = swarm().await;
        let hold = |task: &str| swarm.entrance.hold(&task.to_owned());
        let held: Vec<_> = (0..CONNECTIONS_OF_TASK_MAX).map(|_| hold("task").unwrap()).collect();
        let error = swarm.daemons.open(&swarm.passage("task", 80)).await.unwrap_err();
        assert_eq!(error.to_string(), "task task has 4096 connections of other nodes, its limit");
        drop(hold("another").unwrap());
        drop(held);
        swarm.open().await;
    }

    #[tokio::test]
    async fn clients_and_tasks_that_do_not_read_keep_nobody_waiting() {
        const N: usize = 24;
        let swarm = swarm().await;
        let mut stalled = Vec::new();
        let much = vec![0; 64 << 10];
        for _ in 0..N {
            let (mut carrier, mut task) = swarm.open().await;
            // Until no more goes either way.
            let pause = Duration::from_millis(50);
            while tokio::time::timeout(pause, task.write_all(&much)).await.is_ok() {}
            while tokio::time::timeout(pause, carrier.write_all(&much)).await.is_ok() {}
            stalled.push((carrier, task));
        }
        let another = async {
            let (mut carrier, mut task) = swarm.open().await;
            for _ in 0..2 {
                carrier.write_all(b"question").await.unwrap();
                let mut seen = [0; 8];
                task.read_exact(&mut seen).await.unwrap();
                task.write_all(b"answer").await.unwrap();
                carrier.read_exact(&mut seen[..6]).await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(20), another).await.expect("it is carried");
    }
}
