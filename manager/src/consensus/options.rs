//! What a manager's consensus is started with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use openraft::{Config, SnapshotPolicy};

use super::disk::{self, Disk, RealDisk};
use super::machine::Unapplicable;
use super::network::RaftTransport;
use super::runtime::Threads;
use super::seal::DataKey;

/// Entries for one peer at once; the log's reader bounds their bytes.
const ENTRIES_AT_ONCE: u64 = 4096;

/// When managers speak and when they doubt the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// The leader lets hear of itself this often.
    pub heartbeat: Duration,
    /// openraft holds an election once the lease (`election_max`) and a random time from
    /// `election_min` to `election_max` have passed: 0.9 to 1.2 s by default.
    pub election_min: Duration,
    /// See `election_min`. Also how long a leader counts on its last quorum.
    pub election_max: Duration,
    /// How long a proposal or a linearizable read is tried.
    pub patience: Duration,
    /// How long a new manager may take to catch up.
    pub catch_up: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(300),
            election_max: Duration::from_millis(600),
            patience: Duration::from_secs(10),
            catch_up: Duration::from_secs(60),
        }
    }
}

impl Timing {
    /// Without a quorum for this long, another manager may lead.
    pub(crate) fn leader_silence_max(&self) -> Duration {
        self.election_max + self.election_min
    }
}

/// When the log is replaced by a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compaction {
    /// A snapshot is made after this many entries, where the swarm's settings name no other number.
    /// SwarmKit's `SnapshotInterval`.
    pub entries: u64,
    /// Entries kept before a snapshot, for followers that are a little behind. SwarmKit's
    /// `LogEntriesForSlowFollowers`.
    pub keep: u64,
}

impl Default for Compaction {
    fn default() -> Self {
        Self { entries: 10_000, keep: 500 }
    }
}

/// What a manager's consensus is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// This manager's Raft id. A manager that joins anew with an empty directory takes a new one.
    pub raft_id: u64,
    /// Where log and snapshot are kept; made with mode 0700.
    pub dir: PathBuf,
    /// Seals them.
    pub key: DataKey,
    /// Reaches the other managers.
    pub transport: Arc<dyn RaftTransport>,
    /// Heartbeats and time-outs.
    pub timing: Timing,
    /// When to make snapshots.
    pub compaction: Compaction,
    /// Carries out what changes files.
    pub disk: Arc<dyn Disk>,
    /// Where Raft runs.
    pub threads: Threads,
    /// Overrides the bound of the log's memory.
    pub(crate) cached_bytes_max: Option<usize>,
}

impl Options {
    /// Options with default timing and compaction.
    pub fn new(
        raft_id: u64,
        dir: impl Into<PathBuf>,
        key: DataKey,
        transport: Arc<dyn RaftTransport>,
    ) -> Self {
        Self {
            raft_id,
            dir: dir.into(),
            key,
            transport,
            timing: Timing::default(),
            compaction: Compaction::default(),
            disk: Arc::new(RealDisk),
            threads: Threads::Own,
            cached_bytes_max: None,
        }
    }

    pub(crate) fn raft_config(&self) -> Result<Config, StartError> {
        let Timing { heartbeat, election_min, election_max, .. } = self.timing;
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let config = Config {
            cluster_name: "skep".to_owned(),
            heartbeat_interval: millis(heartbeat),
            election_timeout_min: millis(election_min),
            election_timeout_max: millis(election_max),
            max_payload_entries: ENTRIES_AT_ONCE,
            max_append_entries: Some(ENTRIES_AT_ONCE),
            // The interval is the swarm's to change: see `compaction`.
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: self.compaction.keep,
            enable_pre_vote: Some(true),
            // A manager that restarts stands for election: its term names one run of its loops.
            enable_leader_restore: Some(false),
            // A manager that lost the end of its log lacks entries that the leader saw there: it gets them
            // again, and takes no part in elections before. Without this the leader would panic.
            allow_log_reversion: Some(true),
            ..Config::default()
        };
        config.validate().map_err(|error| StartError::Timing(error.to_string()))
    }
}

/// Why consensus did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// See there for the remedy.
    #[error("failed to open the Raft data of this manager")]
    Storage(#[from] disk::Error),
    /// Remedy: other times in the daemon's configuration.
    #[error("these Raft times do not fit together: {0}")]
    Timing(String),
    /// See there for the remedy.
    #[error("failed to apply the Raft log")]
    Unapplicable(#[from] Unapplicable),
    /// openraft found log and snapshot inconsistent.
    #[error("failed to start Raft: {0}")]
    Raft(String),
    /// The machine is out of threads or descriptors.
    #[error("failed to start the threads of Raft")]
    Threads(#[source] std::io::Error),
}
