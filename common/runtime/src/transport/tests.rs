//! The table of [`crate::access`] on a real port: every method × every kind of peer.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use rustls::HandshakeKind;
use rustls::pki_types::ServerName;
use skep_common::spec::NodeRole;
use skep_common::{ClusterId, NodeId};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{ChannelPool, Peer, Tls, connect_unverified, serve_tls};
use crate::access::{self, Caller};
use crate::gate::{Gate, Register};
use crate::identity::{Authority, Credentials, Csr, NODE_SERVER_NAME};
use crate::{TaskSet, clock};

fn credentials(
    authority: &Authority,
    cluster: ClusterId,
    node: NodeId,
    role: NodeRole,
) -> Credentials {
    let csr = Csr::generate().unwrap();
    let life = Duration::from_secs(3600);
    let certificate_pem =
        authority.sign(&csr.csr_pem, node, role, cluster, clock::now(), life).unwrap();
    Credentials { certificate_pem, key_pem: csr.key_pem, root_pem: authority.root_pem().to_owned() }
}

async fn serve(tls: Tls, tasks: &TaskSet) -> String {
    serve_behind(Gate::default(), tls, tasks).await
}

async fn serve_behind(gate: Gate, tls: Tls, tasks: &TaskSet) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = tasks.clone();
    tasks.spawn("test server", async move {
        serve_tls(listener, tls, gate, Routes::default(), &serving).await.unwrap();
    });
    address
}

/// Calls a method with an empty message, as a generated client would.
async fn call(channel: Channel, path: &str) -> Status {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|e| Status::unavailable(e.to_string())).unwrap();
    let codec: tonic_prost::ProstCodec<(), ()> = tonic_prost::ProstCodec::default();
    let path = tonic::codegen::http::uri::PathAndQuery::try_from(path).unwrap();
    let answer = grpc.unary(tonic::Request::new(()), path, codec).await;
    answer.err().unwrap_or_else(|| Status::ok("answered"))
}

fn methods() -> Vec<String> {
    let files = prost_types::FileDescriptorSet::decode(skep_proto::FILE_DESCRIPTOR_SET).unwrap();
    let services =
        files.file.iter().filter(|file| file.package() == "skep.v1").flat_map(|f| &f.service);
    services
        .flat_map(|s| s.method.iter().map(|m| format!("/skep.v1.{}/{}", s.name(), m.name())))
        .collect()
}

#[tokio::test]
async fn every_method_answers_every_kind_of_peer_as_the_table_says() {
    let (ours, other) =
        (Authority::generate(clock::now()).unwrap(), Authority::generate(clock::now()).unwrap());
    let (cluster, foreign_cluster) = (ClusterId(1), ClusterId(2));
    let tasks = TaskSet::new();
    let server = Tls::new(credentials(&ours, cluster, NodeId(1), NodeRole::Manager)).unwrap();
    let address = serve(server, &tasks).await;

    let pool = |authority, cluster, role| {
        ChannelPool::new(Tls::new(credentials(authority, cluster, NodeId(9), role)).unwrap())
    };
    let workers = pool(&ours, cluster, NodeRole::Worker);
    let managers = pool(&ours, cluster, NodeRole::Manager);
    let foreign = pool(&other, foreign_cluster, NodeRole::Manager);
    for path in methods() {
        for (caller, channel) in [
            (Caller::Anonymous, connect_unverified(&address).unwrap()),
            (Caller::Node(NodeId(9), NodeRole::Worker), workers.channel(&address, Peer::Manager)),
            (Caller::Node(NodeId(9), NodeRole::Manager), managers.channel(&address, Peer::Manager)),
        ] {
            let status = call(channel, &path).await;
            // No service is mounted here: whoever gets past the table finds nothing behind it.
            let expected =
                access::check(&path, caller).err().map_or(Code::Unimplemented, |s| s.code());
            assert_eq!(status.code(), expected, "{path} as {caller:?}: {status}");
        }
        let status = call(foreign.channel(&address, Peer::Manager), &path).await;
        assert_eq!(status.code(), Code::Unavailable, "{path} from another swarm: {status}");
    }
    tasks.shutdown().await;
}

#[tokio::test]
async fn a_certificate_of_the_same_root_for_another_swarm_is_refused() {
    let authority = Authority::generate(clock::now()).unwrap();
    let tasks = TaskSet::new();
    let server =
        Tls::new(credentials(&authority, ClusterId(1), NodeId(1), NodeRole::Manager)).unwrap();
    let address = serve(server, &tasks).await;
    let tls =
        Tls::new(credentials(&authority, ClusterId(2), NodeId(2), NodeRole::Manager)).unwrap();
    let status =
        call(ChannelPool::new(tls).channel(&address, Peer::Manager), "/skep.v1.Raft/Vote").await;
    assert_ne!(status.code(), Code::Unimplemented, "{status}");
    assert_ne!(status.code(), Code::Ok, "{status}");
    tasks.shutdown().await;
}

/// Takes nodes for removed from the moment on that it says so.
#[derive(Debug, Clone, Default)]
struct Removals(Arc<watch::Sender<u64>>);

impl Register for Removals {
    fn is_removed(&self, node_id: NodeId) -> bool {
        u128::from(*self.0.borrow()) == node_id.0
    }
    fn role(&self, _: NodeId) -> Option<NodeRole> {
        None
    }
    fn is_current(&self) -> bool {
        true
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

#[tokio::test]
async fn the_connections_of_a_removed_node_end_and_it_is_told_why() {
    let authority = Authority::generate(clock::now()).unwrap();
    let tasks = TaskSet::new();
    let of = |node| {
        let role = NodeRole::Manager;
        Tls::new(credentials(&authority, ClusterId(1), NodeId(node), role)).unwrap()
    };
    let removals = Removals::default();
    let address = serve_behind(Gate::of(removals.clone()), of(1), &tasks).await;
    let connect = async |node| {
        let stream = TcpStream::connect(&address).await.unwrap();
        let name = ServerName::try_from(NODE_SERVER_NAME).unwrap();
        let mut stream = TlsConnector::from(of(node).client()).connect(name, stream).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let mut first = [0];
        stream.read_exact(&mut first).await.unwrap();
        stream
    };
    let (mut removed, mut staying) = (connect(7).await, connect(8).await);
    removals.0.send_replace(7);
    let mut rest = Vec::new();
    let _ = removed.read_to_end(&mut rest).await; // With a word of TLS or without.
    let channel = ChannelPool::new(of(7)).channel(&address, Peer::Manager);
    let status = call(channel, "/skep.v1.Raft/Vote").await;
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert!(status.message().contains("removed from the swarm"), "{status}");
    assert!(status.metadata().contains_key(skep_proto::REMOVED_METADATA));
    let channel = ChannelPool::new(of(8)).channel(&address, Peer::Manager);
    assert_eq!(call(channel, "/skep.v1.Raft/Vote").await.code(), Code::Unimplemented);
    let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    staying.write_all(&ping).await.unwrap();
    let mut answer = Vec::new();
    while !answer.windows(8).any(|bytes| bytes == &ping[9..]) {
        assert_ne!(staying.read_buf(&mut answer).await.unwrap(), 0, "it is open");
    }
    tasks.shutdown().await;
}

#[test]
fn a_certificate_that_has_ended_is_refused_also_where_a_session_is_resumed() {
    let authority = Authority::generate(clock::now()).unwrap();
    let credentials = credentials(&authority, ClusterId(1), NodeId(7), NodeRole::Worker);
    let chain = crate::identity::certificates(&credentials.certificate_pem).unwrap();
    let subject = super::tls::subject_of(Some(&chain)).unwrap().unwrap();
    assert_eq!((subject.node_id, super::tls::subject_of(None).unwrap()), (NodeId(7), None));
    let end = subject.not_after;
    assert!(super::tls::check_unexpired(&subject, end).is_ok());
    let error =
        super::tls::check_unexpired(&subject, end.after(Duration::from_secs(1))).unwrap_err();
    assert_eq!(error.to_string(), "the certificate has expired");
}

/// Other nodes that connect between two connections of one: as many as come back at once after a leader's end.
const N_OTHERS: u128 = 200;

#[tokio::test]
async fn a_connection_is_resumed_with_the_same_credentials_alone_and_its_caller_is_checked() {
    let authority = Authority::generate(clock::now()).unwrap();
    let tasks = TaskSet::new();
    let of = |node| credentials(&authority, ClusterId(1), NodeId(node), NodeRole::Manager);
    let removals = Removals::default();
    let server = Tls::new(of(1)).unwrap();
    let address = serve_behind(Gate::of(removals.clone()), server.clone(), &tasks).await;
    let connect = async |tls: &Tls| {
        let stream = TcpStream::connect(&address).await.unwrap();
        let name = ServerName::try_from(NODE_SERVER_NAME).unwrap();
        let mut stream = TlsConnector::from(tls.client()).connect(name, stream).await.unwrap();
        // The ticket comes before the first byte of HTTP.
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.read_exact(&mut [0]).await.unwrap();
        stream.get_ref().1.handshake_kind().unwrap()
    };
    let client = Tls::new(of(7)).unwrap();
    assert_eq!(connect(&client).await, HandshakeKind::Full);
    for _ in 0..N_OTHERS {
        let other = Tls::new(of(8)).unwrap();
        assert_eq!(connect(&other).await, HandshakeKind::Full);
    }
    assert_eq!(connect(&client).await, HandshakeKind::Resumed);

    client.replace(of(7)).unwrap();
    assert_eq!(connect(&client).await, HandshakeKind::Full, "its certificate is another one");
    assert_eq!(connect(&client).await, HandshakeKind::Resumed);
    server.replace(of(1)).unwrap();
    assert_eq!(connect(&client).await, HandshakeKind::Full, "the server's is another one");

    let ask = async |tls: &Tls, peer| {
        call(ChannelPool::new(tls.clone()).channel(&address, peer), "/skep.v1.Raft/Vote").await
    };
    for peer in [Peer::AnyNode, Peer::Manager] {
        assert_eq!(ask(&client, peer).await.code(), Code::Unimplemented);
        removals.0.send_replace(7);
        assert_eq!(ask(&client, peer).await.code(), Code::PermissionDenied, "it was removed");
        removals.0.send_replace(0);
    }
    tasks.shutdown().await;
}

#[tokio::test]
async fn a_worker_cannot_pose_as_a_manager_nor_a_node_as_another() {
    let authority = Authority::generate(clock::now()).unwrap();
    let tasks = TaskSet::new();
    let worker =
        Tls::new(credentials(&authority, ClusterId(1), NodeId(1), NodeRole::Worker)).unwrap();
    let address = serve(worker, &tasks).await;
    let tls =
        Tls::new(credentials(&authority, ClusterId(1), NodeId(2), NodeRole::Manager)).unwrap();
    let pool = ChannelPool::new(tls);
    for (peer, expected) in [
        (Peer::Manager, Code::Unavailable),
        (Peer::Node(NodeId(3)), Code::Unavailable),
        (Peer::Node(NodeId(1)), Code::Unimplemented),
        (Peer::AnyNode, Code::Unimplemented),
    ] {
        let status = call(pool.channel(&address, peer), "/skep.v1.Peer/TaskLogs").await;
        assert_eq!(status.code(), expected, "{peer:?}: {status}");
    }
    tasks.shutdown().await;
}

#[tokio::test]
async fn new_credentials_change_the_next_connection_and_no_open_one() {
    let authority = Authority::generate(clock::now()).unwrap();
    let tasks = TaskSet::new();
    let before = credentials(&authority, ClusterId(1), NodeId(1), NodeRole::Worker);
    let server = Tls::new(before).unwrap();
    let address = serve(server.clone(), &tasks).await;
    let tls =
        Tls::new(credentials(&authority, ClusterId(1), NodeId(2), NodeRole::Manager)).unwrap();
    let pool = ChannelPool::new(tls);
    let open = pool.channel(&address, Peer::Node(NodeId(1)));
    assert_eq!(call(open.clone(), "/skep.v1.Peer/TaskLogs").await.code(), Code::Unimplemented);
    server.replace(credentials(&authority, ClusterId(1), NodeId(5), NodeRole::Manager)).unwrap();
    assert_eq!(call(open, "/skep.v1.Peer/TaskLogs").await.code(), Code::Unimplemented);
    let renewed = pool.channel(&address, Peer::Node(NodeId(5)));
    assert_eq!(call(renewed, "/skep.v1.Peer/TaskLogs").await.code(), Code::Unimplemented);
    tasks.shutdown().await;
}

#[tokio::test]
async fn open_connections_outlive_a_change_of_the_root() {
    let [old, new] = [(); 2].map(|()| Authority::generate(clock::now()).unwrap());
    let both = format!("{}{}", old.root_pem(), new.root_pem());
    let of = |authority: &Authority, node: u128, role, roots: &str| Credentials {
        root_pem: roots.to_owned(),
        ..credentials(authority, ClusterId(1), NodeId(node), role)
    };
    let tasks = TaskSet::new();
    let (manager, worker) = (NodeRole::Manager, NodeRole::Worker);
    let server = Tls::new(of(&old, 1, manager, old.root_pem())).unwrap();
    let address = serve(server.clone(), &tasks).await;
    let client = Tls::new(of(&old, 2, worker, old.root_pem())).unwrap();
    let left_behind = Tls::new(of(&old, 3, worker, old.root_pem())).unwrap();
    let left_behind = ChannelPool::new(left_behind);
    let pool = ChannelPool::new(client.clone());
    let open = pool.channel(&address, Peer::Manager);
    let made_before = pool.fresh(&address, Peer::Manager);
    let ask = async |channel: Channel| call(channel, "/skep.v1.Dispatcher/Heartbeat").await.code();
    assert_eq!(ask(open.clone()).await, Code::Unimplemented);

    // Each step as the nodes take it: trust, renew, forget the old one.
    server.replace(of(&old, 1, manager, &both)).unwrap();
    client.replace(of(&old, 2, worker, &both)).unwrap();
    assert_eq!(ask(pool.fresh(&address, Peer::Manager)).await, Code::Unimplemented);
    server.replace(of(&new, 1, manager, &both)).unwrap();
    assert_eq!(ask(pool.fresh(&address, Peer::Manager)).await, Code::Unimplemented);
    assert_eq!(ask(left_behind.fresh(&address, Peer::Manager)).await, Code::Unavailable);
    client.replace(of(&new, 2, worker, &both)).unwrap();
    assert_eq!(ask(pool.fresh(&address, Peer::Manager)).await, Code::Unimplemented);
    server.replace(of(&new, 1, manager, new.root_pem())).unwrap();
    client.replace(of(&new, 2, worker, new.root_pem())).unwrap();
    assert_eq!(ask(open).await, Code::Unimplemented, "it was never closed");
    assert_eq!(ask(made_before).await, Code::Unimplemented, "it connects with what is current");
    tasks.shutdown().await;
}
