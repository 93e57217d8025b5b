//! openraft's view of the other managers, over a [`RaftTransport`].

use std::fmt;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, OptionalSend, RaftNetworkFactory, RaftNetworkV2, alias};
use skep_common::Timestamp;
use tokio::sync::watch;

use super::codec::{Malformed, Reader};
use super::leadership::Metrics;
use super::snapshot::SnapshotData;
use super::types::{TypeConfig, Vote};
use super::wire::{self, NotServed, RaftRequest, Route, SnapshotHead};

/// Time that entries get beyond the fixed part, for each MiB: a line of 10 Mbit/s.
const TIME_PER_MIB: Duration = Duration::from_millis(800);
/// What a snapshot gets beyond its transfer: the receiver reads it in and syncs it.
const SNAPSHOT_TIME_MIN: Duration = Duration::from_secs(30);
/// Bytes of a snapshot in one piece.
const SNAPSHOT_PIECE_BYTES: usize = 1 << 20;
/// Waits between calls to a manager that does not answer: it may be back at any time.
const BACKOFF: [Duration; 4] = [
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
];

/// A call to another manager brought no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("manager {target:x} at {addr} cannot be reached: {reason}")]
pub struct CallError {
    /// Whom.
    pub target: u64,
    /// Where.
    pub addr: String,
    /// Why.
    pub reason: String,
    /// The request may have arrived and be acted upon. False only where it surely was not.
    pub may_have_arrived: bool,
    /// The other one says that this node was removed from the swarm.
    pub is_removed: bool,
}

/// Carries requests to other managers. The other end hands them to [`Consensus::handle`].
///
/// A connect that takes longer than some 200 ms is to fail: a dead peer must not hold up votes.
/// Dropping the future gives the call up.
///
/// [`Consensus::handle`]: super::Consensus::handle
pub trait RaftTransport: fmt::Debug + Send + Sync + 'static {
    /// Sends `request` to manager `target` at `addr` and waits for the answer until `deadline` has
    /// passed.
    fn call(
        &self,
        target: u64,
        addr: &str,
        request: RaftRequest,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>>;
}

/// Makes clients for openraft.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    pub(crate) raft_id: u64,
    pub(crate) transport: Arc<dyn RaftTransport>,
    /// Knows the newest addresses, once Raft runs: openraft keeps a client when only its manager's
    /// address changed.
    pub(crate) membership: Arc<OnceLock<Metrics>>,
    /// What entries get at least: a follower may just be waiting for its disk.
    pub(crate) append_time_min: Duration,
    /// Is told where another manager is of a later epoch.
    pub(crate) superseded: watch::Sender<Option<Superseded>>,
}

/// The swarm goes on without this manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superseded {
    /// When it began anew, in seconds since 1970; none where this node was removed.
    epoch: Option<u64>,
    /// Who says so.
    addr: String,
}

impl std::error::Error for Superseded {}

impl fmt::Display for Superseded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addr = &self.addr;
        let Some(epoch) = self.epoch else {
            return write!(f, "it was removed, as the manager at {addr} says");
        };
        let at = Timestamp::from_secs(epoch.try_into().unwrap_or(i64::MAX / 1_000_000_000));
        write!(f, "the swarm began anew at {at} without it, as the manager at {addr} says")
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        let route = Route { from: self.raft_id, to: target };
        Peer { network: self.clone(), route, addr: node.addr.clone() }
    }
}

/// One other manager.
#[derive(Debug)]
pub(crate) struct Peer {
    network: Network,
    route: Route,
    /// Where it was when this client was made.
    addr: String,
}

impl Peer {
    async fn call(
        &self,
        request: RaftRequest,
        time: Duration,
    ) -> Result<Reader, RPCError<TypeConfig>> {
        let addr = self.addr();
        let call = self.network.transport.call(self.route.to, &addr, request, time);
        let answer = match tokio::time::timeout(time, call).await {
            Ok(answer) => answer,
            Err(_) => Err(CallError {
                target: self.route.to,
                addr: addr.clone(),
                reason: format!("no answer within {} ms", time.as_millis()),
                may_have_arrived: true,
                is_removed: false,
            }),
        };
        let bytes = answer.map_err(|error| {
            if error.is_removed {
                self.tell_superseded(None, &addr);
            }
            unreachable_peer(&error)
        })?;
        wire::read_answer(bytes).map_err(|reason| {
            if let NotServed::Superseded(epoch) = reason {
                self.tell_superseded(Some(epoch), &addr);
            }
            // It answers, but not as Raft: it is starting, stopping or not the one we mean.
            RPCError::Unreachable(Unreachable::from_string(format!(
                "manager {:x} at {addr} refused: {reason}",
                self.route.to
            )))
        })
    }

    fn tell_superseded(&self, epoch: Option<u64>, addr: &str) {
        let told = Superseded { epoch, addr: addr.to_owned() };
        self.network.superseded.send_if_modified(|known| {
            let is_news = known.is_none();
            known.get_or_insert(told);
            is_news
        });
    }

    fn addr(&self) -> String {
        let newest = self.network.membership.get().and_then(|metrics| {
            let metrics = metrics.borrow();
            let node = metrics.membership_config.membership().get_node(&self.route.to)?;
            Some(node.addr.clone())
        });
        newest.unwrap_or_else(|| self.addr.clone())
    }

    fn body(&self, put: impl FnOnce(&mut Vec<u8>)) -> Bytes {
        let mut bytes = self.route.start();
        put(&mut bytes);
        bytes.into()
    }
}

fn unreachable_peer(error: &CallError) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(error))
}

fn malformed(error: Malformed) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(error))
}

/// Time to move that many bytes.
fn transfer_time(bytes: usize) -> Duration {
    let mib = u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
    TIME_PER_MIB.saturating_mul(mib)
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let body = self.body(|bytes| wire::put_append(bytes, &request));
        // openraft gives one heartbeat period, which entries that wait for a busy disk exceed: they
        // would be sent again and again, and make it busier.
        let time = if request.entries.is_empty() {
            option.hard_ttl()
        } else {
            self.network.append_time_min + transfer_time(body.len())
        };
        let mut answer = self.call(RaftRequest::Append(body), time).await?;
        wire::read_append_answer(&mut answer).map_err(malformed)
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let body = self.body(|bytes| wire::put_vote_request(bytes, &request));
        let mut answer = self.call(RaftRequest::Vote(body), option.hard_ttl()).await?;
        wire::read_vote_answer(&mut answer).map_err(malformed)
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let body = self.body(|bytes| wire::put_vote_request(bytes, &request));
        let mut answer = self.call(RaftRequest::PreVote(body), option.hard_ttl()).await?;
        wire::read_vote_answer(&mut answer).map_err(malformed)
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let body = self.body(|bytes| wire::put_transfer(bytes, &request));
        let mut answer = self.call(RaftRequest::TransferLeader(body), option.hard_ttl()).await?;
        wire::read_transfer_answer(&mut answer).map_err(malformed)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: alias::SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let SnapshotData(data) = snapshot.snapshot;
        let time = SNAPSHOT_TIME_MIN + transfer_time(data.len());
        let head = SnapshotHead { vote, meta: snapshot.meta, length: data.len() as u64 };
        let mut pieces = vec![self.body(|bytes| head.put(bytes))];
        let mut rest = data;
        while !rest.is_empty() {
            pieces.push(rest.split_to(rest.len().min(SNAPSHOT_PIECE_BYTES)));
        }
        tokio::select! {
            closed = cancel => Err(closed.into()),
            answer = self.call(RaftRequest::Snapshot(pieces), time) => {
                let vote = answer?.vote().map_err(malformed)?;
                Ok(SnapshotResponse::new(vote))
            }
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        let longest = BACKOFF[BACKOFF.len() - 1];
        Some(Backoff::new(BACKOFF.into_iter().chain(std::iter::repeat(longest))))
    }
}
