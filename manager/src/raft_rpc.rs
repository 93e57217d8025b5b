//! Raft between managers over gRPC: the transport that consensus calls, and the service that it answers.

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use skep_common::NodeId;
use skep_common::limits::{MESSAGE_BYTES_MAX, RPC_DEADLINE};
use skep_manager_core::level::FORMAT_LEVEL;
use skep_proto::REMOVED_METADATA;
use skep_proto::raft_client::RaftClient;
use skep_proto::raft_server::Raft;
use skep_proto::{
    AddManagerRequest, AddManagerResponse, PeerHeard, RaftMessage, RaftStatusRequest,
    RaftStatusResponse, RemoveManagerRequest, RemoveManagerResponse,
};
use skep_runtime::access::Caller;
use skep_runtime::transport::{ChannelPool, Peer};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use crate::consensus::{CallError, Consensus, RaftRequest, RaftTransport};
use crate::control::audit::audited_try;
use crate::join::add_manager;
use crate::roles;

/// The largest snapshot that is taken, compressed: some ten million tasks. Both ends hold it in memory.
const SNAPSHOT_BYTES_MAX: usize = 1 << 30;

/// Calls other managers through the pool.
#[derive(Debug, Clone)]
pub struct GrpcTransport {
    pool: ChannelPool,
}

impl GrpcTransport {
    /// Calls with this node's certificate.
    pub fn new(pool: ChannelPool) -> Self {
        Self { pool }
    }
}

impl RaftTransport for GrpcTransport {
    fn call(
        &self,
        target: u64,
        addr: &str,
        request: RaftRequest,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        // Heartbeats must not wait behind a snapshot's bytes.
        let channel = match &request {
            RaftRequest::Snapshot(_) => self.pool.fresh(addr, Peer::Manager),
            _ => self.pool.channel(addr, Peer::Manager),
        };
        let addr = addr.to_owned();
        async move {
            let failed = |reason: String, may_have_arrived| CallError {
                target,
                addr,
                reason,
                may_have_arrived,
                is_removed: false,
            };
            match tokio::time::timeout(deadline, send(channel, request)).await {
                Ok(Ok(message)) => Ok(message.into_inner().payload),
                Ok(Err(status)) => {
                    let arrived = may_have_arrived(&status);
                    let is_removed = status.metadata().contains_key(REMOVED_METADATA);
                    let error = failed(status.message().to_owned(), arrived);
                    Err(CallError { is_removed, ..error })
                }
                Err(_) => {
                    Err(failed(format!("no answer within {} ms", deadline.as_millis()), true))
                }
            }
        }
        .boxed()
    }
}

async fn send(channel: Channel, request: RaftRequest) -> Result<Response<RaftMessage>, Status> {
    let mut client = RaftClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let message = |payload| RaftMessage { payload };
    match request {
        RaftRequest::Append(payload) => client.append(message(payload)).await,
        RaftRequest::Vote(payload) => client.vote(message(payload)).await,
        RaftRequest::PreVote(payload) => client.pre_vote(message(payload)).await,
        RaftRequest::TransferLeader(payload) => client.transfer_leader(message(payload)).await,
        RaftRequest::Propose(payload) => client.propose(message(payload)).await,
        RaftRequest::ReadIndex(payload) => client.read_index(message(payload)).await,
        RaftRequest::Snapshot(pieces) => {
            client.snapshot(tokio_stream::iter(pieces.into_iter().map(message))).await
        }
    }
}

/// False only where no connection was made: nothing was sent then.
fn may_have_arrived(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return false;
        }
        cause = error.source();
    }
    true
}

/// The service behind `skep.v1.Raft`.
#[derive(Debug, Clone)]
pub struct RaftService {
    consensus: Consensus,
    node_id: NodeId,
    hostname: String,
}

impl RaftService {
    /// Answers for `consensus`.
    pub fn new(consensus: Consensus, node_id: NodeId, hostname: String) -> Self {
        Self { consensus, node_id, hostname }
    }

    async fn handle(&self, request: RaftRequest) -> Result<Response<RaftMessage>, Status> {
        let payload = self.consensus.handle(request).await;
        Ok(Response::new(RaftMessage { payload }))
    }
}

#[tonic::async_trait]
impl Raft for RaftService {
    async fn append(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.handle(RaftRequest::Append(request.into_inner().payload)).await
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.handle(RaftRequest::Vote(request.into_inner().payload)).await
    }

    async fn pre_vote(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        self.handle(RaftRequest::PreVote(request.into_inner().payload)).await
    }

    async fn transfer_leader(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        self.handle(RaftRequest::TransferLeader(request.into_inner().payload)).await
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<RaftMessage>, Status> {
        let mut stream = request.into_inner();
        let mut pieces = Vec::new();
        let mut n_bytes = 0;
        while let Some(message) = stream.next().await {
            let payload = message?.payload;
            n_bytes += payload.len();
            if n_bytes > SNAPSHOT_BYTES_MAX {
                let why = format!("the snapshot has more than {SNAPSHOT_BYTES_MAX} bytes");
                return Err(Status::resource_exhausted(why));
            }
            pieces.push(payload);
        }
        self.handle(RaftRequest::Snapshot(pieces)).await
    }

    async fn propose(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        self.handle(RaftRequest::Propose(request.into_inner().payload)).await
    }

    async fn read_index(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        self.handle(RaftRequest::ReadIndex(request.into_inner().payload)).await
    }

    async fn add_manager(
        &self,
        request: Request<AddManagerRequest>,
    ) -> Result<Response<AddManagerResponse>, Status> {
        let (node_id, caller) = (Caller::node_id(&request)?, Caller::of(&request));
        let AddManagerRequest { raft_id, addr, format_level } = request.into_inner();
        let answer = async {
            add_manager(&self.consensus, node_id, raft_id, &addr, format_level).await?;
            Ok(Response::new(AddManagerResponse {}))
        };
        audited_try(caller, "AddManager", &format!("node/{node_id}"), answer).await
    }

    async fn remove_manager(
        &self,
        request: Request<RemoveManagerRequest>,
    ) -> Result<Response<RemoveManagerResponse>, Status> {
        let (caller, request) = (Caller::of(&request), request.into_inner());
        let object = format!("manager/{:x}", request.raft_id);
        let answer =
            async { Ok(Response::new(roles::remove_manager(&self.consensus, request).await?)) };
        audited_try(caller, "RemoveManager", &object, answer).await
    }

    async fn status(
        &self,
        request: Request<RaftStatusRequest>,
    ) -> Result<Response<RaftStatusResponse>, Status> {
        let addresses = self.consensus.members().into_iter();
        let mut addresses: BTreeMap<u64, String> =
            addresses.map(|member| (member.raft_id, member.addr)).collect();
        let heard = self.consensus.heard_of_others().into_iter().map(|(raft_id, ago)| PeerHeard {
            raft_id,
            addr: addresses.remove(&raft_id).unwrap_or_default(),
            millis_ago: u64::try_from(ago.as_millis()).unwrap_or(u64::MAX),
        });
        let mut response = RaftStatusResponse {
            node_id: self.node_id.to_string(),
            hostname: self.hostname.clone(),
            heard: heard.collect(),
            ..RaftStatusResponse::default()
        };
        if !request.get_ref().brief {
            let status = self.consensus.status().await;
            (response.version, response.digest) = (status.version, status.digest);
        }
        Ok(Response::new(response))
    }
}

/// Asks the managers at `addresses` one after the other to make this node a voter.
pub async fn ask_to_add(
    pool: &ChannelPool,
    addresses: &[String],
    raft_id: u64,
    addr: &str,
) -> Result<(), Status> {
    let mut last = Status::unavailable("no manager is known");
    for address in addresses {
        let mut request = Request::new(AddManagerRequest {
            raft_id,
            addr: addr.to_owned(),
            format_level: FORMAT_LEVEL,
        });
        // It ends when this node has caught up: later than the leader gives up.
        request.set_timeout(9 * RPC_DEADLINE);
        match RaftClient::new(pool.channel(address, Peer::Manager)).add_manager(request).await {
            Ok(_) => return Ok(()),
            Err(status) => last = status,
        }
    }
    Err(last)
}
