//! The agents' side of a manager: sessions are handed to the leader's loop, heartbeats are noted.
//!
//! A manager that does not lead names the one that does and keeps nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use skep_common::limits::{HEARTBEAT_PERIOD, QUEUE_LENGTH};
use skep_common::{NodeId, Timestamp};
use skep_manager_core::image::{self, Registration};
use skep_manager_core::{Command, Outcome, Refusal};
use skep_proto::agent_message::Message;
use skep_proto::dispatcher_server::Dispatcher;
use skep_proto::{
    AgentMessage, DispatcherMessage, HeartbeatRequest, HeartbeatResponse, Hello, LEADER_METADATA,
    LOST_METADATA, RegisterImageRequest, RegisterImageResponse,
};
use skep_runtime::access::Caller;
use skep_runtime::{TaskSet, clock};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::consensus::{Consensus, Leadership};
use crate::control::error::Error;

/// An agent that does not say hello is no agent.
const HELLO_DEADLINE: std::time::Duration = std::time::Duration::from_secs(5);
/// How long an agent may wait for the answer who leads: an election takes less. Agents are more patient.
const LEADER_PATIENCE: Duration = Duration::from_secs(2);

/// What agents bring to the leader's loop.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// A node said hello. The loop answers on `to_agent`, or drops it.
    Opened { node_id: NodeId, session_id: u64, hello: Hello, to_agent: ToAgent },
    /// A message of an open session.
    Message { node_id: NodeId, session_id: u64, message: Message },
    /// The agent's side of the stream ended.
    Closed { node_id: NodeId, session_id: u64 },
}

pub(crate) type ToAgent = mpsc::Sender<Result<DispatcherMessage, Status>>;

/// Where sessions go while this manager leads; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    leading: Arc<watch::Sender<Option<mpsc::Sender<SessionEvent>>>>,
    /// When each node was last heard. Written by handlers, read by the loop at its ticks: a heartbeat
    /// waits in no queue.
    pub(crate) beats: Arc<DashMap<NodeId, Timestamp>>,
    /// What nodes are told, in milliseconds.
    period_millis: Arc<AtomicU64>,
    /// How many the swarm has.
    n_nodes: Arc<AtomicU32>,
}

impl Door {
    pub(crate) fn new() -> Self {
        let door = Self {
            leading: Arc::new(watch::Sender::new(None)),
            beats: Arc::default(),
            period_millis: Arc::default(),
            n_nodes: Arc::default(),
        };
        door.tell(HEARTBEAT_PERIOD, 0);
        door
    }

    /// Has nodes told how often to let hear of themselves, and how many they are. The leader's loop reckons with it by
    /// then.
    pub(crate) fn tell(&self, period: Duration, n_nodes: usize) {
        self.n_nodes.store(u32::try_from(n_nodes).unwrap_or(u32::MAX), Ordering::Relaxed);
        let millis = u64::try_from(period.as_millis()).unwrap_or(u64::MAX);
        self.period_millis.store(millis, Ordering::Relaxed);
    }

    /// Lets sessions in until the receiver is dropped or the door is closed.
    pub(crate) fn open(&self) -> mpsc::Receiver<SessionEvent> {
        let (events, receiver) = mpsc::channel(QUEUE_LENGTH);
        self.beats.clear();
        self.leading.send_replace(Some(events));
        receiver
    }

    pub(crate) fn close(&self) {
        self.leading.send_replace(None);
    }
}

/// The service behind `skep.v1.Dispatcher`.
#[derive(Debug, Clone)]
pub struct DispatcherService {
    door: Door,
    consensus: Consensus,
    tasks: TaskSet,
}

impl DispatcherService {
    pub(crate) fn new(door: Door, consensus: Consensus, tasks: TaskSet) -> Self {
        Self { door, consensus, tasks }
    }

    fn entrance(&self) -> Result<mpsc::Sender<SessionEvent>, Status> {
        let leading = self.door.leading.borrow().clone();
        leading.ok_or_else(|| {
            let mut status = Status::unavailable("this manager does not lead");
            let leader = self.consensus.leadership().borrow().leader.clone();
            if let Some(addr) = leader.and_then(|leader| leader.addr.parse().ok()) {
                status.metadata_mut().insert(LEADER_METADATA, addr);
            }
            status
        })
    }

    /// The same, once it is known who leads: after a leader's end its agents come before there is another one. They
    /// wait here, instead of asking again and again with a handshake each time.
    async fn entrance_of_leader(
        &self,
        lost: Option<&str>,
    ) -> Result<mpsc::Sender<SessionEvent>, Status> {
        let (door, leadership) = (self.door.leading.subscribe(), self.consensus.leadership());
        let known = until_known(door, leadership, self.consensus.raft_id(), lost);
        // Whoever has waited in vain is told what is known.
        let _ = tokio::time::timeout(LEADER_PATIENCE, known).await;
        self.entrance()
    }

    async fn register(&self, node_id: NodeId, request: RegisterImageRequest) -> Result<(), Error> {
        let registration = Registration {
            names: request.names,
            digest: request.digest,
            size: request.size,
            created: Some(request.created).filter(|created| !created.is_empty()),
        };
        loop {
            let state = self.consensus.read_state().await?;
            if state.node(node_id).is_none() {
                return Err(Error::Precondition(format!(
                    "node {node_id} is no member of this swarm"
                )));
            }
            let actions = image::register(&state, node_id, &registration, &mut rand::rng());
            match self.consensus.propose(&Command::new(clock::now(), actions)).await? {
                Outcome::Applied(_) => return Ok(()),
                Outcome::Refused(Refusal::OutOfSequence { .. } | Refusal::NameTaken { .. }) => {} // Raced.
                Outcome::Refused(refusal) => return Err(Error::Refused(refusal)),
            }
        }
    }
}

/// Returns when this manager's door is open, or another one leads than the agent has lost, or that one again.
async fn until_known<T>(
    mut door: watch::Receiver<Option<T>>,
    mut leadership: watch::Receiver<Leadership>,
    own: u64,
    lost: Option<&str>,
) {
    let term = leadership.borrow().term;
    loop {
        let is_open = door.borrow_and_update().is_some();
        let is_known = {
            let now = leadership.borrow_and_update();
            // This manager opens its door as soon as it can lead.
            let other = now.leader.as_ref().filter(|leader| leader.raft_id != own);
            other.is_some_and(|other| Some(&*other.addr) != lost || now.term > term)
        };
        if is_open || is_known {
            return;
        }
        let changed = tokio::select! {
            changed = door.changed() => changed,
            changed = leadership.changed() => changed,
        };
        if changed.is_err() {
            return; // This manager is stopping.
        }
    }
}

#[tonic::async_trait]
impl Dispatcher for DispatcherService {
    type SessionStream = ReceiverStream<Result<DispatcherMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let node_id = Caller::node_id(&request)?;
        let lost = request.metadata().get(LOST_METADATA).and_then(|lost| lost.to_str().ok());
        let entrance = self.entrance_of_leader(lost).await?;
        let mut stream = request.into_inner();
        let first = tokio::time::timeout(HELLO_DEADLINE, stream.next()).await;
        let hello = match first {
            Ok(Some(Ok(AgentMessage { message: Some(Message::Hello(hello)) }))) => hello,
            _ => return Err(Status::invalid_argument("a session begins with a hello")),
        };
        let (to_agent, from_loop) = mpsc::channel(QUEUE_LENGTH);
        let session_id: u64 = rand::random();
        let gone = |_| Status::unavailable("this manager does not lead any more");
        self.door.beats.insert(node_id, clock::now());
        let opened =
            SessionEvent::Opened { node_id, session_id, hello, to_agent: to_agent.clone() };
        entrance.send(opened).await.map_err(gone)?;
        self.tasks.spawn("session", async move {
            loop {
                let next = tokio::select! {
                    next = stream.next() => next,
                    () = to_agent.closed() => None,
                    () = entrance.closed() => None,
                };
                let Some(Ok(AgentMessage { message: Some(message) })) = next else { break };
                let event = SessionEvent::Message { node_id, session_id, message };
                if entrance.send(event).await.is_err() {
                    return; // This manager does not lead any more; dropping `to_agent` ends the stream.
                }
            }
            let _ = entrance.send(SessionEvent::Closed { node_id, session_id }).await; // As above.
        });
        Ok(Response::new(ReceiverStream::new(from_loop)))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        let node_id = Caller::node_id(&request)?;
        self.entrance()?;
        self.door.beats.insert(node_id, clock::now());
        let heartbeat_millis = self.door.period_millis.load(Ordering::Relaxed);
        let nodes = self.door.n_nodes.load(Ordering::Relaxed);
        Ok(Response::new(HeartbeatResponse { heartbeat_millis, nodes }))
    }

    async fn register_image(
        &self,
        request: Request<RegisterImageRequest>,
    ) -> Result<Response<RegisterImageResponse>, Status> {
        let node_id = Caller::node_id(&request)?;
        self.register(node_id, request.into_inner()).await?;
        Ok(Response::new(RegisterImageResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::consensus::Leader;

    fn led_by(raft_id: u64, term: u64) -> Leadership {
        let leader = Leader { raft_id, addr: format!("n{raft_id}") };
        Leadership { leader: Some(leader), term, is_self: false }
    }

    /// An agent asks manager 1.
    #[test]
    fn agents_wait_until_it_is_known_who_leads() {
        let nobody = |term| Leadership { term, ..Leadership::default() };
        for (name, lost, steps, n_waits) in [
            ("another one leads", None, vec![led_by(2, 5)], 0),
            ("nobody does yet", None, vec![nobody(6), led_by(3, 6)], 1),
            ("the one that is lost, as far as it knows", Some("n2"), vec![led_by(2, 5); 2], 2),
            ("and then another", Some("n2"), vec![led_by(2, 5), nobody(6), led_by(3, 6)], 2),
            ("it was elected again", Some("n2"), vec![led_by(2, 5), led_by(2, 6)], 1),
            ("this one, which does not lead yet", None, vec![led_by(1, 5)], 1),
        ] {
            let (_door, is_open) = watch::channel(None::<()>);
            let (leadership, known) = watch::channel(steps[0].clone());
            let mut waiting = Box::pin(until_known(is_open, known, 1, lost));
            let mut waited = 0;
            for step in &steps {
                leadership.send_replace(step.clone());
                waited += usize::from((&mut waiting).now_or_never().is_none());
                if waited == 0 {
                    break;
                }
            }
            assert_eq!(waited, n_waits, "{name}");
        }
        let (door, is_open) = watch::channel(None);
        let (_leadership, known) = watch::channel(led_by(1, 5));
        let mut waiting = Box::pin(until_known(is_open, known, 1, None));
        assert_eq!((&mut waiting).now_or_never(), None);
        door.send_replace(Some(()));
        assert_eq!(waiting.now_or_never(), Some(()));
    }
}
