//! Who may call which method: one table, checked before any handler runs.
//!
//! A method without a row is refused to everyone, so that forgetting a row is noticed at once; a test
//! compares the table with the descriptor.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, ready};
use std::sync::LazyLock;
use std::task::{Context, Poll};

use skep_common::NodeId;
use skep_common::spec::NodeRole;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use crate::gate::Gate;

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// The unix socket: the machine's administrator.
    Local {
        /// Who runs the process at the other end; unknown where the kernel does not say.
        uid: Option<u32>,
        /// That process.
        pid: Option<i32>,
    },
    /// TLS without a client certificate.
    Anonymous,
    /// A member of this swarm.
    Node(NodeId, NodeRole),
}

const LOCAL: u8 = 1;
const ANONYMOUS: u8 = 2;
const WORKER: u8 = 4;
const MANAGER: u8 = 8;
const NODES: u8 = WORKER | MANAGER;

/// `(service, method, callers)`.
const TABLE: &[(&str, &str, u8)] = &[
    ("Machine", "Info", LOCAL),
    ("Machine", "InitSwarm", LOCAL),
    ("Machine", "JoinSwarm", LOCAL),
    ("Machine", "LeaveSwarm", LOCAL),
    ("Machine", "LoadImage", LOCAL),
    ("Machine", "ContainerLogs", LOCAL),
    ("Machine", "Unlock", LOCAL),
    ("Machine", "Restore", LOCAL),
    ("Control", "Get", LOCAL | MANAGER),
    ("Control", "List", LOCAL | MANAGER),
    ("Control", "Watch", LOCAL | MANAGER),
    ("Control", "CreateService", LOCAL | MANAGER),
    ("Control", "UpdateService", LOCAL | MANAGER),
    ("Control", "RemoveService", LOCAL | MANAGER),
    ("Control", "ServiceLogs", LOCAL | MANAGER),
    ("Control", "UpdateNode", LOCAL | MANAGER),
    ("Control", "RemoveNode", LOCAL | MANAGER),
    ("Control", "JoinToken", LOCAL | MANAGER),
    ("Control", "CreateNetwork", LOCAL | MANAGER),
    ("Control", "RemoveNetwork", LOCAL | MANAGER),
    ("Control", "CheckNetwork", LOCAL | MANAGER),
    ("Control", "DeployStack", LOCAL | MANAGER),
    ("Control", "RemoveStack", LOCAL | MANAGER),
    ("Control", "Digest", LOCAL | MANAGER),
    ("Control", "CreateSecret", LOCAL | MANAGER),
    ("Control", "UpdateSecret", LOCAL | MANAGER),
    ("Control", "RemoveSecret", LOCAL | MANAGER),
    ("Control", "CreateConfig", LOCAL | MANAGER),
    ("Control", "UpdateConfig", LOCAL | MANAGER),
    ("Control", "RemoveConfig", LOCAL | MANAGER),
    ("Control", "UpdateSwarm", LOCAL | MANAGER),
    ("Control", "RotateCa", LOCAL | MANAGER),
    ("Control", "UnlockKey", LOCAL | MANAGER),
    ("Control", "ServiceHistory", LOCAL | MANAGER),
    ("Control", "Explain", LOCAL | MANAGER),
    ("Control", "Plan", LOCAL | MANAGER),
    ("Control", "WhatIf", LOCAL | MANAGER),
    ("Control", "Backup", LOCAL | MANAGER),
    ("Control", "Events", LOCAL | MANAGER),
    ("Containers", "Run", LOCAL | NODES),
    ("Containers", "List", LOCAL | NODES),
    ("Containers", "Watch", LOCAL | NODES),
    ("Containers", "Stop", LOCAL | NODES),
    ("Containers", "Remove", LOCAL | NODES),
    ("Ca", "Root", ANONYMOUS | NODES),
    ("Ca", "Issue", ANONYMOUS | NODES),
    ("Ca", "Renew", NODES),
    ("Raft", "Append", MANAGER),
    ("Raft", "Vote", MANAGER),
    ("Raft", "PreVote", MANAGER),
    ("Raft", "TransferLeader", MANAGER),
    ("Raft", "Snapshot", MANAGER),
    ("Raft", "Propose", MANAGER),
    ("Raft", "ReadIndex", MANAGER),
    ("Raft", "AddManager", MANAGER),
    ("Raft", "RemoveManager", MANAGER),
    ("Raft", "Status", MANAGER),
    ("Dispatcher", "Session", NODES),
    ("Dispatcher", "Heartbeat", NODES),
    ("Dispatcher", "RegisterImage", NODES),
    ("Peer", "Blob", NODES),
    ("Peer", "TaskLogs", MANAGER),
    ("Peer", "CheckPath", MANAGER),
    ("Peer", "Connect", NODES),
];

static BY_PATH: LazyLock<HashMap<String, u8>> = LazyLock::new(|| {
    let path = |service, method| format!("/skep.v1.{service}/{method}");
    TABLE.iter().map(|(service, method, callers)| (path(service, method), *callers)).collect()
});

impl Caller {
    fn bit(self) -> u8 {
        match self {
            Self::Local { .. } => LOCAL,
            Self::Anonymous => ANONYMOUS,
            Self::Node(_, NodeRole::Worker) => WORKER,
            Self::Node(_, NodeRole::Manager) => MANAGER,
        }
    }

    /// Who made a request. A request that came by no connection of ours is anonymous.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().copied().unwrap_or(Self::Anonymous)
    }

    /// The id of the calling node, for handlers that only nodes reach.
    pub fn node_id<T>(request: &tonic::Request<T>) -> Result<NodeId, Status> {
        match Self::of(request) {
            Self::Node(node_id, _) => Ok(node_id),
            Self::Local { .. } | Self::Anonymous => {
                Err(Status::permission_denied("only nodes may call this"))
            }
        }
    }
}

/// Whether `caller` may call the method at `path` (`/skep.v1.Service/Method`), or why not.
pub fn check(path: &str, caller: Caller) -> Result<(), Status> {
    let allowed = BY_PATH.get(path).copied();
    let method = path.rsplit('.').next().unwrap_or(path);
    match (allowed, caller) {
        (None, _) => Err(Status::unimplemented(format!("there is no method {method}"))),
        (Some(allowed), _) if allowed & caller.bit() != 0 => Ok(()),
        (Some(_), Caller::Anonymous) => {
            Err(Status::unauthenticated(format!("{method} asks for a certificate of this swarm")))
        }
        (Some(allowed), _) if allowed == LOCAL => {
            Err(Status::permission_denied(format!("{method} is for clients on the machine itself")))
        }
        (Some(_), _) => {
            Err(Status::permission_denied(format!("{method} is not for a {}", caller.describe())))
        }
    }
}

/// As the audit names it: `node:ID(manager)`, `socket:uid=0,pid=17`.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node_id, role) => write!(f, "node:{node_id}({})", role.name()),
            Self::Anonymous => f.write_str("anonymous"),
            Self::Local { uid, pid } => {
                let number = |number: Option<i64>| {
                    number.map_or_else(|| "?".to_owned(), |number| number.to_string())
                };
                let (uid, pid) = (number(uid.map(i64::from)), number(pid.map(i64::from)));
                write!(f, "socket:uid={uid},pid={pid}")
            }
        }
    }
}

/// A member that asks for what is not its own is worth a line; strangers could write any number of them.
fn audit(path: &str, caller: Caller, status: &Status) {
    if caller != Caller::Anonymous {
        let (method, error) = (path.rsplit('/').next().unwrap_or(path), status.message());
        tracing::info!(target: "audit", caller = caller.to_string(), method, outcome = "refused", error);
    }
}

impl Caller {
    fn describe(self) -> &'static str {
        match self {
            Self::Local { .. } => "client on the machine itself",
            Self::Anonymous => "peer without a certificate",
            Self::Node(_, NodeRole::Worker) => "worker",
            Self::Node(_, NodeRole::Manager) => "manager",
        }
    }
}

/// Puts a [`Gate`] and [`check`] in front of every service of a server, and leaves the [`Caller`] for its handlers.
#[derive(Debug, Clone, Default)]
pub struct AccessLayer {
    gate: Gate,
}

impl AccessLayer {
    /// Behind that gate.
    pub fn new(gate: Gate) -> Self {
        Self { gate }
    }
}

impl<S> Layer<S> for AccessLayer {
    type Service = Access<S>;
    fn layer(&self, inner: S) -> Access<S> {
        Access { gate: self.gate.clone(), inner }
    }
}

/// The service that [`AccessLayer`] makes.
#[derive(Debug, Clone)]
pub struct Access<S> {
    gate: Gate,
    inner: S,
}

impl<S> Service<Request<Body>> for Access<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = futures::future::Either<S::Future, Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // tonic leaves what `Connected::connect_info` said among the extensions.
        let caller = request.extensions().get::<Caller>().copied().unwrap_or(Caller::Anonymous);
        let path = request.uri().path();
        let admitted =
            self.gate.admit(path, caller).and_then(|caller| check(path, caller).map(|()| caller));
        match admitted {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                futures::future::Either::Left(self.inner.call(request))
            }
            Err(status) => {
                audit(path, caller, &status);
                futures::future::Either::Right(ready(Ok(status.into_http())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use std::collections::BTreeSet;

    /// Every method of the descriptor × every kind of caller. A peer of another swarm gets no further
    /// than the handshake (`transport::tests`).
    #[test]
    fn every_method_of_the_descriptor_has_exactly_one_row() {
        let files =
            prost_types::FileDescriptorSet::decode(skep_proto::FILE_DESCRIPTOR_SET).unwrap();
        let services =
            files.file.iter().filter(|file| file.package() == "skep.v1").flat_map(|f| &f.service);
        let described: BTreeSet<(String, String)> = services
            .flat_map(|s| s.method.iter().map(|m| (s.name().to_owned(), m.name().to_owned())))
            .collect();
        let rows: BTreeSet<(String, String)> =
            TABLE.iter().map(|(s, m, _)| ((*s).to_owned(), (*m).to_owned())).collect();
        assert_eq!(described, rows);
        assert_eq!(rows.len(), TABLE.len(), "a method has two rows");
    }

    #[test]
    fn each_row_admits_whom_it_names_and_nobody_else() {
        let node = NodeId(1);
        let callers = [
            Caller::Local { uid: Some(0), pid: None },
            Caller::Anonymous,
            Caller::Node(node, NodeRole::Worker),
            Caller::Node(node, NodeRole::Manager),
        ];
        for (service, method, allowed) in TABLE {
            for caller in callers {
                let answer = check(&format!("/skep.v1.{service}/{method}"), caller);
                assert_eq!(
                    answer.is_ok(),
                    allowed & caller.bit() != 0,
                    "{service}.{method}: {caller:?}"
                );
            }
        }
        for caller in callers {
            assert!(check("/skep.v1.Control/NoSuchMethod", caller).is_err());
            assert!(
                check("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", caller).is_err()
            );
        }
    }
}
