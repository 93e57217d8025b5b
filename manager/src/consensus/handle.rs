//! [`Consensus`]: the handle that everything else of a manager uses.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use openraft::errors::{Fatal, InitializeError, RaftError};
use openraft::{BasicNode, Raft};
use serde::Serialize;
use skep_manager_core::State;
use skep_manager_core::events::Ring;
use skep_runtime::TaskSet;
use tokio::sync::{Mutex, mpsc, watch};

use super::compaction;
use super::disk::{self, DirLock};
use super::feed::{Feed, Hub, Published};
use super::heard::Heard;
use super::leadership::{self, Leadership, Metrics};
use super::log::{LogOptions, LogStore};
use super::lost_tail::LostTail;
use super::machine::{Machine, Obstacle, Unapplicable};
use super::membership::{Member, members_of};
use super::network::{Network, RaftTransport, Superseded};
use super::options::{Options, StartError, Timing};
use super::propose::{self, Forward, Forwarder};
use super::reads::{self, Round, Waiting};
use super::runtime::{RaftRuntime, aside};
use super::snapshot::SnapshotStore;
use super::types::{LogId, TypeConfig};
use super::wire::{ReadIndexAnswer, WriteIndexAnswer};

/// How long a stop waits for tasks that are in the middle of something.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// This manager's part in the swarm's consensus. Clones are handles on the same one; it ends with
/// the last, as if killed, or with [`Consensus::shutdown`].
#[derive(Clone)]
pub struct Consensus {
    pub(crate) inner: Arc<Inner>,
}

impl fmt::Debug for Consensus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Consensus {{ raft_id: {:x} }}", self.inner.raft_id)
    }
}

pub(crate) struct Inner {
    pub(crate) raft_id: u64,
    pub(crate) raft: Raft<TypeConfig, Machine>,
    pub(crate) metrics: Metrics,
    pub(crate) timing: Timing,
    pub(crate) transport: Arc<dyn RaftTransport>,
    pub(crate) forwards: mpsc::Sender<Forward>,
    pub(super) reads: mpsc::Sender<Waiting<ReadIndexAnswer>>,
    pub(super) views: mpsc::Sender<Waiting<WriteIndexAnswer>>,
    pub(crate) membership_change: Mutex<()>,
    hub: Arc<Hub>,
    log: std::sync::Mutex<Option<LogStore>>,
    pub(super) leadership: watch::Receiver<Leadership>,
    obstacle: Obstacle,
    superseded: watch::Receiver<Option<Superseded>>,
    pub(super) lost_tail: LostTail,
    pub(super) heard: Heard,
    tasks: TaskSet,
    /// Declared last: its tasks outlive none of what they use.
    runtime: RaftRuntime,
}

/// Why this manager takes no part any more.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StopReason {
    /// It was asked to.
    #[error("this manager's consensus was shut down")]
    Shutdown,
    /// It must not go on; see there for the remedy.
    #[error("this manager cannot apply what the swarm has committed")]
    Unapplicable(#[from] Unapplicable),
    /// Its disk failed, or its data is damaged. This handle is of no use any more; what it had
    /// acknowledged is on other managers.
    #[error("this manager's Raft storage failed: {0}")]
    Storage(String),
    /// It was a manager before the swarm began anew. Remedy: leave, and join again.
    #[error(transparent)]
    Superseded(#[from] Superseded),
}

/// Why a read was not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No leader answered in time.
    #[error("no leader was found within {} ms: a majority of the managers is needed", waited.as_millis())]
    NoLeader {
        /// How long it was tried.
        waited: Duration,
    },
    /// This manager stops.
    #[error("this manager is stopping")]
    Stopped,
}

/// Why a new swarm was not founded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootstrapError {
    /// Remedy: leave that swarm first, with an empty data directory.
    #[error("this manager has the data of a swarm already")]
    AlreadyMember,
    /// The disk failed.
    #[error("failed to write the first entry of the Raft log: {0}")]
    Failed(String),
}

/// What `skep debug` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// This manager.
    pub raft_id: u64,
    /// Current term.
    pub term: u64,
    /// The leader's Raft id.
    pub leader: Option<u64>,
    /// `Leader`, `Follower`, `Candidate`, `Learner` or `Shutdown`.
    pub role: String,
    /// Index of the last entry in the log.
    pub last_log_index: Option<u64>,
    /// Index of the last entry known to be committed.
    pub committed: Option<u64>,
    /// Index of the last entry applied.
    pub applied: Option<u64>,
    /// Index of the last entry in the snapshot.
    pub snapshot: Option<u64>,
    /// Entries up to this index are gone from the log.
    pub purged: Option<u64>,
    /// Version of the state that the digest is of.
    pub version: u64,
    /// SHA-256 of the state: equal on all managers at one version.
    pub digest: String,
    /// All managers.
    pub members: Vec<Member>,
    /// On the leader: the last entry that each manager has.
    pub matched: BTreeMap<u64, Option<u64>>,
}

#[cfg(test)]
impl Inner {
    /// What readers see, as it changes.
    pub(crate) fn watch_state(&self) -> watch::Receiver<Published> {
        self.hub.watch()
    }
}

impl Consensus {
    /// Opens the data directory and takes part. A manager without data waits to be added, or for
    /// [`Consensus::bootstrap`].
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let runtime = RaftRuntime::new(&options.threads).map_err(StartError::Threads)?;
        let hub = Arc::new(Hub::new());
        let obstacle = Obstacle::default();
        let (tell_superseded, superseded) = watch::channel(None);
        let below =
            Below { hub: Arc::clone(&hub), obstacle: Arc::clone(&obstacle), tell_superseded };
        let start = open_raft(options.clone(), below);
        let started = runtime.handle().spawn(start).await;
        let (raft, log) = started.map_err(|error| StartError::Raft(error.to_string()))??;

        let Options { raft_id, transport, timing, dir, compaction, .. } = options;
        let metrics = Metrics::of(&raft);
        let (announced, leadership) = watch::channel(Leadership::default());
        let (forwards, queue) = mpsc::channel(propose::QUEUE_LENGTH);
        let (reads, read_queue) = mpsc::channel(reads::QUEUE_LENGTH);
        let (views, view_queue) = mpsc::channel(reads::QUEUE_LENGTH);
        let tasks = TaskSet::new();
        {
            let _on_raft_threads = runtime.handle().enter();
            let follow = leadership::follow(metrics.clone(), timing, announced, Arc::clone(&hub));
            tasks.spawn_to_end("raft leadership", follow); // Ends with openraft, and says so.
            let transport = Arc::clone(&transport);
            let (leader, to_leader) = (leadership.clone(), Arc::clone(&transport));
            let forwarder = Forwarder { raft_id, leadership: leader, transport: to_leader };
            tasks.spawn("raft forwarder", forwarder.run(queue));
            let compacting =
                compaction::run(raft.clone(), metrics.clone(), hub.watch(), compaction);
            tasks.spawn("raft compaction", compacting);
            let (patience, raft, leadership) = (timing.patience, raft.clone(), leadership.clone());
            let round = Round { raft_id, raft, leadership, transport, patience };
            let view = round.clone();
            tasks.spawn("raft reads", reads::share(read_queue, move || round.clone().run()));
            let views = reads::share(view_queue, move || view.clone().ask_for_view());
            tasks.spawn("raft views", views);
        }
        let (log, membership_change) = (std::sync::Mutex::new(Some(log)), Mutex::default());
        let inner = Inner {
            raft_id,
            raft,
            metrics,
            timing,
            transport,
            forwards,
            reads,
            views,
            membership_change,
            hub,
            log,
            leadership,
            obstacle,
            superseded,
            lost_tail: LostTail::read(&dir),
            heard: Heard::default(),
            tasks,
            runtime,
        };
        let consensus = Self { inner: Arc::new(inner) };
        if consensus.inner.lost_tail.is_set() {
            consensus.catch_up().await?;
        }
        Ok(consensus)
    }

    /// Lets this manager vote and stand for election once it has what others may count on.
    async fn catch_up(&self) -> Result<(), StartError> {
        // The published membership may not be there yet.
        let members = self
            .inner
            .raft
            .with_raft_state(|state| members_of(state.membership_state.effective().membership()));
        let members = members.await.map_err(|error| StartError::Raft(error.to_string()))?;
        if members.iter().all(|member| member.raft_id == self.inner.raft_id) {
            tracing::warn!("this manager is the only one: it goes on with what is left of its log");
            self.take_part();
            return Ok(());
        }
        tracing::warn!(
            file = %self.inner.lost_tail.path().display(),
            "this manager takes no part in elections until it has caught up; where no majority is left without it, stop it, remove this file and start it again"
        );
        let weak = Arc::downgrade(&self.inner);
        let _on_raft_threads = self.inner.runtime.handle().enter();
        self.inner.tasks.spawn("raft catch up", async move {
            while let Some(inner) = weak.upgrade() {
                let consensus = Self { inner };
                // What the leader has committed by now holds all that it was ever acknowledged.
                match consensus.read_state().await {
                    Ok(_) => return consensus.take_part(),
                    Err(ReadError::Stopped) => return,
                    Err(ReadError::NoLeader { .. }) => {}
                }
            }
        });
        Ok(())
    }

    fn take_part(&self) {
        self.inner.lost_tail.clear();
        self.inner.raft.runtime_config().elect(true);
        tracing::info!("this manager has caught up: it takes part in elections again");
    }

    /// Founds a swarm whose only manager is this one, at `addr`. Safe to repeat.
    pub async fn bootstrap(&self, addr: &str) -> Result<(), BootstrapError> {
        let members = BTreeMap::from([(self.inner.raft_id, BasicNode::new(addr))]);
        match self.inner.raft.initialize(members).await {
            Ok(()) => Ok(()),
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {
                let is_alone_here = self.members().iter().all(|m| m.raft_id == self.inner.raft_id);
                if is_alone_here { Ok(()) } else { Err(BootstrapError::AlreadyMember) }
            }
            Err(error) => Err(BootstrapError::Failed(error.to_string())),
        }
    }

    /// This manager's Raft id.
    pub fn raft_id(&self) -> u64 {
        self.inner.raft_id
    }

    /// The state as applied here, which may be behind.
    pub fn state(&self) -> State {
        self.inner.hub.state()
    }

    /// The applied state and how far it is, as it changes.
    pub(super) fn watch_published(&self) -> watch::Receiver<Published> {
        self.inner.hub.watch()
    }

    /// Follows the state from now on; see [`Feed::next`].
    pub fn subscribe(&self) -> Feed {
        self.inner.hub.subscribe()
    }

    /// What happened, as far as it is kept. [`Consensus::subscribe`] tells when there is more.
    pub fn events<T>(&self, read: impl FnOnce(&Ring) -> T) -> T {
        self.inner.hub.events(read)
    }

    /// Who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// Transfers its leadership to the voter that is furthest, and waits until somebody else leads. True: this
    /// manager does not lead any more, or never did. For a clean stop.
    pub async fn transfer_leader(&self) -> bool {
        self.transfer_leader_among(|_| true).await
    }

    /// The same, to one of those that may have it.
    pub(crate) async fn transfer_leader_among(&self, may: impl Fn(u64) -> bool) -> bool {
        let mut metrics = self.inner.metrics.clone();
        let target = {
            let metrics = metrics.borrow();
            if metrics.current_leader != Some(metrics.id) {
                return true;
            }
            let membership = metrics.membership_config.membership();
            let others = membership.voter_ids().filter(|voter| *voter != metrics.id && may(*voter));
            // Of those that have the same entries, the one that answered last: it is alive.
            let standing = |voter: &u64| {
                let matched = metrics.replication.as_ref().and_then(|peers| peers.get(voter));
                let answered = metrics.heartbeat.as_ref().and_then(|peers| peers.get(voter));
                (matched.copied().flatten(), answered.copied().flatten())
            };
            others.max_by_key(standing)
        };
        let Some(target) = target else { return false };
        if self.inner.raft.trigger().transfer_leader(target).await.is_err() {
            return false;
        }
        let own = self.inner.raft_id;
        let gone = metrics.wait_for(|metrics| metrics.current_leader.is_some_and(|id| id != own));
        tokio::time::timeout(self.inner.timing.leader_silence_max(), gone).await.is_ok()
    }

    /// Waits until this manager takes no part any more, and says why.
    pub async fn stopped(&self) -> StopReason {
        let mut metrics = self.inner.metrics.clone();
        let mut superseded = self.inner.superseded.clone();
        let stopped = tokio::select! {
            stopped = metrics.wait_for(|metrics| metrics.running_state.is_err()) => stopped,
            Ok(told) = superseded.wait_for(Option::is_some) => {
                let told = told.clone().expect("it was waited for");
                return StopReason::Superseded(told);
            }
        };
        let fatal = stopped.and_then(|metrics| metrics.running_state.err());
        match (self.inner.obstacle.get(), fatal) {
            (Some(obstacle), _) => StopReason::Unapplicable(obstacle.clone()),
            (None, Some(Fatal::StorageError(error))) => StopReason::Storage(error.to_string()),
            (None, Some(Fatal::Panicked)) => StopReason::Storage("Raft panicked".to_owned()),
            (None, Some(Fatal::Stopped)) => StopReason::Shutdown,
            (None, None) if self.inner.tasks.token().is_cancelled() => StopReason::Shutdown,
            (None, None) => StopReason::Storage("Raft ended unexpectedly, see the log".to_owned()),
        }
    }

    /// Where this manager stands. Computing the digest takes a while for a large state.
    pub async fn status(&self) -> Status {
        let state = self.state();
        let version = state.version().index;
        let digest = aside(move || state.digest()).await;
        let metrics = self.inner.metrics.borrow().clone();
        let index = |log_id: Option<LogId>| log_id.map(|log_id| log_id.index);
        let matched = metrics.replication.into_iter().flatten();
        Status {
            raft_id: self.inner.raft_id,
            term: metrics.current_term,
            leader: metrics.current_leader,
            role: format!("{:?}", metrics.state),
            last_log_index: metrics.last_log_index,
            committed: index(metrics.local_committed),
            applied: index(metrics.last_applied),
            snapshot: index(metrics.snapshot),
            purged: index(metrics.purged),
            version,
            digest: digest.unwrap_or_default(), // Empty when the caller's runtime is stopping.
            members: members_of(metrics.membership_config.membership()),
            matched: matched.map(|(raft_id, log_id)| (raft_id, index(log_id))).collect(),
        }
    }

    /// Stops cleanly: what was left for later is written, and the data directory is free.
    pub async fn shutdown(&self) {
        let stopped = self.inner.raft.shutdown().await;
        self.inner.tasks.shutdown().await;
        let log = self.inner.log.lock().expect("nothing panics while it holds the log").take();
        if let Some(log) = log {
            if let Err(error) = log.close().await {
                tracing::warn!(%error, "failed to close the Raft log; nothing acknowledged is lost");
            }
            self.end(log).await;
        }
        if let Err(error) = stopped {
            tracing::error!(%error, "Raft did not end as it should");
        }
    }

    /// Ends without a word, as a crash does.
    #[cfg(test)]
    pub(crate) async fn kill(&self) {
        let log = self.inner.log.lock().expect("nothing panics while it holds the log").take();
        if let Some(log) = log {
            self.end(log).await;
        }
    }

    async fn end(&self, log: LogStore) {
        self.inner.runtime.stop(STOP_PATIENCE).await;
        self.inner.hub.close();
        let thread = log.take_thread();
        drop(log);
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            drop(joined); // A panic of that thread was logged when it happened.
        }
    }
}

/// What tells from below openraft.
struct Below {
    hub: Arc<Hub>,
    obstacle: Obstacle,
    tell_superseded: watch::Sender<Option<Superseded>>,
}

async fn open_raft(
    options: Options,
    below: Below,
) -> Result<(Raft<TypeConfig, Machine>, LogStore), StartError> {
    let Below { hub, obstacle, tell_superseded } = below;
    let mut config = options.raft_config()?;
    let opening = options.clone();
    let opened = aside(move || open_storage(&opening)).await;
    let (log, snapshots) = opened.map_err(|error| StartError::Raft(error.to_string()))??;
    config.enable_elect = !LostTail::read(&options.dir).is_set();
    let machine = Machine::new(hub, snapshots, Arc::clone(&obstacle));
    let membership = Arc::new(OnceLock::new());
    let network = Network {
        raft_id: options.raft_id,
        membership: Arc::clone(&membership),
        transport: options.transport,
        append_time_min: options.timing.election_max,
        superseded: tell_superseded,
    };
    let raft = Raft::new(options.raft_id, Arc::new(config), network, log.clone(), machine).await;
    match (raft, obstacle.get()) {
        (Ok(raft), _) => {
            drop(membership.set(Metrics::of(&raft))); // Set once: here.
            Ok((raft, log))
        }
        (Err(_), Some(obstacle)) => Err(obstacle.clone().into()),
        (Err(error), None) => Err(StartError::Raft(error.to_string())),
    }
}

fn open_storage(options: &Options) -> Result<(LogStore, SnapshotStore), disk::Error> {
    disk::create_private_dir(&options.dir)?;
    let lock = Arc::new(DirLock::take(&options.dir)?);
    let (dir, key, disk) = (options.dir.clone(), options.key.clone(), Arc::clone(&options.disk));
    let mut log_options =
        LogOptions::new(options.raft_id, dir.clone(), key.clone(), Arc::clone(&disk));
    log_options.threads = options.threads.clone();
    log_options.cached_bytes_max = options.cached_bytes_max.unwrap_or(log_options.cached_bytes_max);
    let snapshots = SnapshotStore::open_on(dir, key, disk)?;
    Ok((LogStore::open(&log_options, lock)?, snapshots))
}
