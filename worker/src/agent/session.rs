//! One session with the leader's dispatcher after another.
//!
//! A session is one ordered stream each way. Heartbeats go apart, from a thread of their own over a
//! connection of their own, so that neither a full queue nor a busy thread pool looks like a dead node.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rand::RngExt as _;
use skep_common::limits::{HEARTBEAT_PERIOD, QUEUE_LENGTH, times_slower};
use skep_proto::dispatcher_client::DispatcherClient;
use skep_proto::dispatcher_message::Message;
use skep_proto::{
    AgentMessage, Assignments, DispatcherMessage, HeartbeatRequest, Hello, LEADER_METADATA,
    LOST_METADATA, REMOVED_METADATA, Welcome, agent_message,
};
use skep_runtime::TaskSet;
use skep_runtime::transport::{ChannelPool, Patience, Peer};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::search::{Asked, Search};

/// First wait after a failed attempt. SwarmKit's agent begins with it as well.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// A heartbeat that is not answered by then is lost.
const BEAT_DEADLINE: Duration = Duration::from_secs(5);
/// When the first heartbeat of a session is sent, in periods: a thousand agents that come back at once have sessions
/// before any of them connects for its heartbeats, and are heard one after the other from then on.
const FIRST_BEAT: std::ops::Range<f64> = 0.25..1.0;
/// Longest wait between attempts. SwarmKit waits up to 8 s; an idle attempt costs little.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Between attempts of a node that was removed: it hopes for nothing, but managers restored from a backup of
/// before may know it again.
const REMOVED_PAUSE: Duration = Duration::from_secs(10);

/// What sends an agent's heartbeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Beats {
    /// A thread of their own, which waits for nothing else that the daemon does.
    #[default]
    OnThread,
    /// A task: for thousands of agents in one process, in benchmarks of managers.
    AsTask,
}

/// The role that the leader gives a node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ToldRole {
    /// `worker` or `manager`, and empty until the leader has said so.
    pub role: String,
    /// By which Raft id it is a manager, 0: by none. `None` where the leader does not say so.
    pub raft_id: Option<u64>,
}

/// Addresses of managers, best first; clones share them. Kept on disk by the daemon.
#[derive(Debug, Clone)]
pub struct Managers {
    known: Arc<Mutex<Vec<String>>>,
    changed: Arc<watch::Sender<Vec<String>>>,
    told_role: Arc<watch::Sender<ToldRole>>,
    told_trust: Arc<watch::Sender<Bytes>>,
    renewals: Arc<watch::Sender<u64>>,
    /// Whether managers say that this node is no member any more.
    removed: Arc<watch::Sender<bool>>,
    /// The highest term of a leader that this node has obeyed.
    term_seen: Arc<Mutex<u64>>,
    keeper: Option<Arc<dyn TermKeeper>>,
}

/// Keeps the highest term of a leader that the node has obeyed, beyond the daemon's end: a leader that was
/// deposed before it is not obeyed by the next daemon either.
pub trait TermKeeper: Send + Sync + std::fmt::Debug + 'static {
    /// Writes it down; returns when it is on the disk, or with why it is not.
    fn keep(&self, term: u64) -> Result<(), String>;
}

impl Managers {
    /// The managers that the daemon remembers.
    pub fn new(known: Vec<String>) -> Self {
        let (changed, _) = watch::channel(known.clone());
        let (told_role, _) = watch::channel(ToldRole::default());
        let (told_trust, _) = watch::channel(Bytes::new());
        let (renewals, _) = watch::channel(0);
        let (removed, _) = watch::channel(false);
        Self {
            known: Arc::new(Mutex::new(known)),
            changed: Arc::new(changed),
            told_role: Arc::new(told_role),
            told_trust: Arc::new(told_trust),
            renewals: Arc::new(renewals),
            removed: Arc::new(removed),
            term_seen: Arc::default(),
            keeper: None,
        }
    }

    /// The same, of a node that has obeyed a leader of that term, and keeps the higher ones.
    #[must_use]
    pub fn obeying(self, term_seen: u64, keeper: Arc<dyn TermKeeper>) -> Self {
        Self { term_seen: Arc::new(Mutex::new(term_seen)), keeper: Some(keeper), ..self }
    }

    /// Whether a leader of that term is to be obeyed; from then on none of a lower one is.
    async fn obey(&self, term: u64) -> bool {
        let seen = *self.term_seen.lock().expect(NOT_POISONED);
        if let Some(keeper) = self.keeper.clone().filter(|_| term > seen) {
            let kept = tokio::task::spawn_blocking(move || keeper.keep(term)).await;
            // A full disk must not keep the node from its leader.
            let kept = kept.unwrap_or_else(|error| Err(error.to_string()));
            if let Err(error) = kept {
                tracing::warn!(
                    term,
                    error,
                    "failed to write the leader's term down: after a restart this node may obey a deposed leader"
                );
            }
        }
        let mut highest = self.term_seen.lock().expect(NOT_POISONED);
        *highest = term.max(*highest);
        term == *highest
    }

    /// All of them.
    pub fn all(&self) -> Vec<String> {
        self.known.lock().expect(NOT_POISONED).clone()
    }

    /// Follows changes of the set.
    pub fn watch(&self) -> watch::Receiver<Vec<String>> {
        self.changed.subscribe()
    }

    /// The role that the leader gives this node.
    pub fn told_role(&self) -> watch::Receiver<ToldRole> {
        self.told_role.subscribe()
    }

    /// The roots that the leader has this node trust, PEM, and empty until it has said so.
    pub fn told_trust(&self) -> watch::Receiver<Bytes> {
        self.told_trust.subscribe()
    }

    /// Wakes when the leader has this node get another certificate.
    pub fn renewals(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    /// Whether this node was removed from the swarm, as managers say.
    pub fn is_removed(&self) -> bool {
        *self.removed.borrow()
    }

    fn tell_trust(&self, trust: Bytes) {
        if !trust.is_empty() {
            self.told_trust.send_replace(trust);
        }
    }

    fn tell_role(&self, role: String, raft_id: Option<u64>) {
        if !role.is_empty() {
            self.told_role.send_replace(ToldRole { role, raft_id });
        }
    }

    fn replace(&self, managers: Vec<String>) {
        let mut known = self.known.lock().expect(NOT_POISONED);
        if managers.is_empty() || managers.iter().collect::<BTreeSet<_>>() == known.iter().collect()
        {
            return;
        }
        *known = managers;
        self.changed.send_replace(known.clone());
    }
}

const NOT_POISONED: &str = "nothing panics while it holds the managers";

/// What a session brings to the agent.
#[derive(Debug)]
pub(super) enum FromSession {
    /// A session has begun: everything is to be reported again, on `to_leader`. Cancelling `end` ends it.
    Opened { welcome: Welcome, to_leader: mpsc::Sender<AgentMessage>, end: CancellationToken },
    /// Work, in order.
    Assignments(Box<Assignments>),
    /// The session has ended; another is on its way.
    Closed,
    /// The leader says that this node is no member any more.
    Removed,
}

/// What [`run`] needs.
#[derive(Debug, Clone)]
pub(super) struct SessionOptions {
    pub(super) pool: ChannelPool,
    pub(super) managers: Managers,
    pub(super) tasks: TaskSet,
    pub(super) beats: Beats,
}

/// Holds a session for as long as the agent lives. `hello` makes the first message anew each time.
pub(super) async fn run(
    options: SessionOptions,
    hello: impl Fn() -> Hello + Send,
    events: mpsc::Sender<FromSession>,
) {
    let mut search = Search::default();
    let mut backoff = BACKOFF_MIN;
    let manners = Manners::default();
    loop {
        let candidates = options.managers.all();
        let asked = search.next(&candidates, &mut rand::rng());
        let Some(asked) = asked else {
            // All of them, in vain.
            pause(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
            continue;
        };
        match attempt(&options, &asked, manners.clone(), hello(), &events).await {
            Ended::Redirected(to) => search.redirected(asked, to),
            Ended::Failed => search.failed(asked),
            Ended::Removed => {
                search.failed(asked);
                pause(REMOVED_PAUSE).await;
            }
            Ended::WasOpen => {
                search = Search::after(asked.address);
                backoff = BACKOFF_MIN;
                pause(backoff).await;
            }
        }
    }
}

/// Many agents lose their session at once, and do not all come back at once.
async fn pause(time: Duration) {
    let jitter = rand::rng().random_range(0.5..1.0);
    tokio::time::sleep(time.mul_f64(jitter)).await;
}

enum Ended {
    Redirected(String),
    Failed,
    Removed,
    WasOpen,
}

/// Says hello and waits for the welcome.
async fn open(
    options: &SessionOptions,
    asked: &Asked,
    patience: Patience,
    hello: Hello,
) -> Result<(Welcome, mpsc::Sender<AgentMessage>, Streaming<DispatcherMessage>), Status> {
    let (to_leader, outgoing) = mpsc::channel(QUEUE_LENGTH);
    let first = AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
    to_leader.try_send(first).expect("an empty queue has room");
    let channel = options.pool.fresh_with(&asked.address, Peer::Manager, patience);
    let mut client = DispatcherClient::new(channel)
        .max_decoding_message_size(skep_common::limits::MESSAGE_BYTES_MAX);
    let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
    if let Some(lost) = asked.lost.as_ref().and_then(|lost| lost.parse().ok()) {
        request.metadata_mut().insert(LOST_METADATA, lost);
    }
    let mut stream = client.session(request).await?.into_inner();
    match stream.next().await {
        Some(Ok(DispatcherMessage { message: Some(Message::Welcome(welcome)) })) => {
            Ok((welcome, to_leader, stream))
        }
        Some(Err(status)) => Err(status),
        _ => Err(Status::internal("the dispatcher did not begin with a welcome")),
    }
}

async fn attempt(
    options: &SessionOptions,
    asked: &Asked,
    manners: Manners,
    hello: Hello,
    events: &mpsc::Sender<FromSession>,
) -> Ended {
    let address = asked.address.as_str();
    let told = manners.told();
    let opening = open(options, asked, told.patience(), hello);
    let deadline = asked.deadline * told.times();
    let (welcome, to_leader, mut stream) = match tokio::time::timeout(deadline, opening).await {
        Ok(Ok(opened)) => opened,
        Ok(Err(status)) => {
            tracing::debug!(manager = address, error = status.message(), "no session");
            if status.metadata().contains_key(REMOVED_METADATA) {
                options.managers.removed.send_replace(true);
                let _ = events.send(FromSession::Removed).await; // The agent is ending when this fails.
                return Ended::Removed;
            }
            let named = status.metadata().get(LEADER_METADATA);
            let named = named.and_then(|value| value.to_str().ok());
            return named.map_or(Ended::Failed, |leader| Ended::Redirected(leader.to_owned()));
        }
        Err(_) => return Ended::Failed,
    };
    if !options.managers.obey(welcome.term).await {
        tracing::warn!(manager = address, term = welcome.term, "ignoring a deposed leader");
        return Ended::Failed;
    }
    tracing::info!(manager = address, term = welcome.term, "session with the leader");
    options.managers.removed.send_replace(false);
    options.managers.replace(welcome.managers.clone());
    options.managers.tell_role(welcome.role.clone(), welcome.raft_id);
    options.managers.tell_trust(welcome.trust_pem.clone());
    manners.tell(welcome.heartbeat_millis, welcome.nodes);
    let beats = Heartbeats::start(options, address, &welcome.session_id, manners);
    let end = options.tasks.token().child_token();
    let opened = FromSession::Opened { welcome, to_leader, end: end.clone() };
    if events.send(opened).await.is_err() {
        return Ended::Failed; // The agent is ending.
    }
    loop {
        let next = tokio::select! {
            next = stream.next() => next,
            () = end.cancelled() => None,
        };
        let Some(Ok(message)) = next else { break };
        let Some(Message::Assignments(mut assignments)) = message.message else { continue };
        options.managers.replace(std::mem::take(&mut assignments.managers));
        options.managers.tell_role(std::mem::take(&mut assignments.role), assignments.raft_id);
        options.managers.tell_trust(std::mem::take(&mut assignments.trust_pem));
        if assignments.renew {
            options.managers.renewals.send_modify(|n_told| *n_told += 1);
        }
        if events.send(FromSession::Assignments(Box::new(assignments))).await.is_err() {
            break;
        }
    }
    drop(beats);
    tracing::info!(manager = address, "the session with the leader ended");
    let _ = events.send(FromSession::Closed).await; // The agent is ending when this fails.
    Ended::WasOpen
}

/// What the leader last said of how to behave; clones share it.
#[derive(Debug, Clone)]
struct Manners(Arc<Mutex<Told>>);

#[derive(Debug, Clone, Copy)]
struct Told {
    /// How often this node lets hear of itself.
    period: Duration,
    /// How many nodes the swarm has.
    nodes: u32,
}

impl Default for Manners {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Told { period: HEARTBEAT_PERIOD, nodes: 0 })))
    }
}

impl Manners {
    fn told(&self) -> Told {
        *self.0.lock().expect(NOT_POISONED)
    }

    fn tell(&self, heartbeat_millis: u64, nodes: u32) {
        let period = Duration::from_millis(heartbeat_millis.max(1));
        *self.0.lock().expect(NOT_POISONED) = Told { period, nodes };
    }
}

impl Told {
    /// When a leader dies, all nodes greet the next one at the same time, and each greeting that is given up is begun
    /// again.
    fn times(self) -> u32 {
        times_slower(usize::try_from(self.nodes).unwrap_or(usize::MAX))
    }

    /// That with connections to managers. In a large swarm the probes of all nodes are as much work for the leader as
    /// their heartbeats: the ones come as seldom as the others.
    fn patience(self) -> Patience {
        let (usual, times) = (Patience::default(), self.times());
        Patience {
            connect: usual.connect * times,
            handshake: usual.handshake * times,
            probe_interval: usual.probe_interval * times,
            // A manager that vanished is to be given up before its successor gives up this node.
            probe_deadline: usual.probe_deadline + Duration::from_secs(1) * (times - 1),
            ..usual
        }
    }
}

/// Sends heartbeats until dropped.
struct Heartbeats {
    stop: CancellationToken,
}

impl Heartbeats {
    fn start(options: &SessionOptions, address: &str, session_id: &str, manners: Manners) -> Self {
        let stop = options.tasks.token().child_token();
        let (token, pool) = (stop.clone(), options.pool.clone());
        let (address, session_id) = (address.to_owned(), session_id.to_owned());
        let mut told = manners.told();
        let beating = async move {
            let patience = Patience { probes_idle: false, ..told.patience() };
            let channel = pool.fresh_with(&address, Peer::Manager, patience);
            let mut client = DispatcherClient::new(channel);
            // The session itself has just let hear of this node.
            let first = told.period.mul_f64(rand::rng().random_range(FIRST_BEAT));
            let mut next = tokio::time::Instant::now() + first;
            loop {
                tokio::select! {
                    () = token.cancelled() => return,
                    () = tokio::time::sleep_until(next) => {}
                }
                next = (next + told.period).max(tokio::time::Instant::now());
                let mut request =
                    tonic::Request::new(HeartbeatRequest { session_id: session_id.clone() });
                request.set_timeout(told.period.min(BEAT_DEADLINE));
                let answer = match client.heartbeat(request).await {
                    Ok(answer) => answer.into_inner(),
                    Err(status) => {
                        tracing::debug!(error = status.message(), "a heartbeat failed");
                        continue;
                    }
                };
                if token.is_cancelled() {
                    return; // Another leader has said something else by now.
                }
                manners.tell(answer.heartbeat_millis, answer.nodes);
                let before = std::mem::replace(&mut told, manners.told());
                if told.period != before.period {
                    let period = told.period;
                    tracing::info!(told = ?period, "managers hear of this node at another period now");
                    next = tokio::time::Instant::now() + period;
                }
            }
        };
        if options.beats == Beats::AsTask {
            options.tasks.spawn("heartbeat", beating);
            return Self { stop };
        }
        let beat = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime else { return };
            runtime.block_on(beating);
        };
        if let Err(error) = std::thread::Builder::new().name("heartbeat".into()).spawn(beat) {
            tracing::error!(%error, "no thread for heartbeats: managers will take this node for dead");
        }
        Self { stop }
    }
}

impl Drop for Heartbeats {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_as_patient_as_the_swarm_is_large() {
        let seconds = Duration::from_secs_f64;
        for (nodes, times, probes) in [
            (0, 1, (1.0, 2.0)),
            (3, 1, (1.0, 2.0)),
            (1000, 1, (1.0, 2.0)),
            (1001, 2, (2.0, 3.0)),
            (4001, 5, (5.0, 6.0)),
            (100_000, 5, (5.0, 6.0)),
        ] {
            // However often the settings have heartbeats sent.
            for millis in [200, 1000, 60_000] {
                let manners = Manners::default();
                manners.tell(millis, nodes);
                let (patience, usual) = (manners.told().patience(), Patience::default());
                assert_eq!(patience.connect, usual.connect * times, "{nodes}");
                assert_eq!(patience.handshake, usual.handshake * times, "{nodes}");
                let found = (patience.probe_interval, patience.probe_deadline);
                assert_eq!(found, (seconds(probes.0), seconds(probes.1)), "{nodes}");
            }
        }
    }
}
