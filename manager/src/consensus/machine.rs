//! The state machine: applies committed commands in order, publishes, and makes snapshots.
//!
//! openraft drives it. All decisions are in [`State::apply`]; this file only feeds it.
//!
//! # Invariants
//!
//! - A proposer hears of its command after the state that holds it was published.
//! - A command that this program cannot apply exactly as every other manager stops it.

use std::io;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, alias};
use serde::Deserialize;
use skep_manager_core::command::FORMAT_LEVEL;
use skep_manager_core::{Change, Command, State, events, swarm};
use tokio::runtime::RuntimeFlavor;

use super::codec::entry_size;
use super::feed::{Hub, Published, Steps};
use super::runtime::aside;
use super::snapshot::{SnapshotData, SnapshotStore};
use super::types::{LogId, Payload, Reply, SnapshotMeta, StoredMembership, TypeConfig};

/// Entries applied before the result is published.
const BATCH_LENGTH: usize = 512;
/// Reading more JSON than this takes long enough to hold up a heartbeat on the same thread.
const INLINE_BYTES_MAX: usize = 64 << 10;

/// Why this manager cannot apply a committed command. It must not go on without it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Unapplicable {
    /// A newer skep proposed it. Remedy: upgrade this manager.
    #[error(
        "entry {index} of the Raft log has format level {level}, this program knows {FORMAT_LEVEL}: \
         upgrade skep on this manager"
    )]
    UnknownLevel {
        /// Its Raft index.
        index: u64,
        /// Its format level.
        level: u32,
    },
    /// The bytes are no command. Remedy: a bug report; join this manager anew.
    #[error("entry {index} of the Raft log is not a command")]
    Malformed {
        /// Its Raft index.
        index: u64,
        /// What serde says.
        #[source]
        source: Arc<serde_json::Error>,
    },
}

/// Set once, when a command could not be applied.
pub(crate) type Obstacle = Arc<OnceLock<Unapplicable>>;

/// The applied state and what belongs to it.
#[derive(Debug)]
pub(crate) struct Machine {
    state: State,
    applied: Option<LogId>,
    membership: StoredMembership,
    hub: Arc<Hub>,
    snapshots: SnapshotStore,
    obstacle: Obstacle,
}

impl Machine {
    pub(crate) fn new(hub: Arc<Hub>, snapshots: SnapshotStore, obstacle: Obstacle) -> Self {
        let (state, applied) = (State::default(), None);
        let membership = StoredMembership::default();
        Self { state, applied, membership, hub, snapshots, obstacle }
    }

    fn apply_batch(
        &mut self,
        batch: Vec<Result<EntryResponder<TypeConfig>, io::Error>>,
    ) -> Result<(), io::Error> {
        let (mut changes, mut steps) = (Vec::new(), Steps::new());
        let mut replies = Vec::with_capacity(batch.len());
        for item in batch {
            let (entry, responder) = item?;
            let log_id = entry.log_id;
            let reply = match entry.payload {
                EntryPayload::Normal(payload) => {
                    self.apply_command(log_id, &payload, &mut changes, &mut steps)?
                }
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(log_id), membership);
                    self.state.skip(log_id.index);
                    Reply::Nothing
                }
                EntryPayload::Blank => {
                    self.state.skip(log_id.index);
                    Reply::Nothing
                }
            };
            self.applied = Some(log_id);
            replies.extend(responder.map(|responder| (responder, reply)));
        }
        self.hub.note(steps);
        self.publish(&changes, false);
        for (responder, reply) in replies {
            responder.send(reply);
        }
        Ok(())
    }

    fn apply_command(
        &mut self,
        log_id: LogId,
        payload: &Payload,
        changes: &mut Vec<Change>,
        steps: &mut Steps,
    ) -> Result<Reply, io::Error> {
        let command = decode(log_id.index, &payload.0).map_err(|error| {
            // The first one is what stops this manager.
            drop(self.obstacle.set(error.clone()));
            io::Error::other(error)
        })?;
        let before = self.state.clone();
        let (outcome, changed) = self.state.apply(log_id.index, &command);
        let events = events::of(&before, &self.state, &changed, command.at);
        steps.push((log_id.index, events));
        changes.extend(changed);
        Ok(Reply::Outcome(outcome))
    }

    fn publish(&self, changes: &[Change], all_changed: bool) {
        let published = Published { state: self.state.clone(), applied: self.applied };
        self.hub.publish(published, changes, all_changed);
    }
}

/// Reads a command, unless it is of a level that this program does not know.
pub(super) fn decode(index: u64, bytes: &Bytes) -> Result<Command, Unapplicable> {
    #[derive(Deserialize)]
    struct Level {
        level: u32,
    }
    match serde_json::from_slice::<Command>(bytes) {
        Ok(command) if command.level <= FORMAT_LEVEL => Ok(command),
        Ok(command) => Err(Unapplicable::UnknownLevel { index, level: command.level }),
        // What a newer level added may be unreadable here, but for the level itself.
        Err(error) => match serde_json::from_slice::<Level>(bytes) {
            Ok(Level { level }) if level > FORMAT_LEVEL => {
                Err(Unapplicable::UnknownLevel { index, level })
            }
            _ => Err(Unapplicable::Malformed { index, source: Arc::new(error) }),
        },
    }
}

/// Runs what takes long without holding up the other tasks of this thread.
fn without_blocking<T>(run: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => tokio::task::block_in_place(run),
        _ => run(),
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batches = entries.ready_chunks(BATCH_LENGTH);
        while let Some(batch) = batches.next().await {
            let sizes = batch.iter().flatten().map(|(entry, _)| entry_size(entry));
            if sizes.sum::<usize>() > INLINE_BYTES_MAX {
                without_blocking(|| self.apply_batch(batch))?;
            } else {
                self.apply_batch(batch)?;
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let meta =
            SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() };
        Builder { state: self.state.clone(), meta, snapshots: self.snapshots.clone() }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        data: SnapshotData,
    ) -> Result<(), io::Error> {
        let (snapshots, stored_meta) = (self.snapshots.clone(), meta.clone());
        let install = move || {
            let state = data.state()?;
            let n_old = swarm::old_snapshots_kept(&state);
            snapshots.write(&stored_meta, &data, n_old).map_err(io::Error::other)?;
            Ok::<State, io::Error>(state)
        };
        let state = aside(install).await??;
        let index = meta.last_log_id.map_or(0, |log_id| log_id.index);
        if state.version().index != index {
            let found = state.version().index;
            let text = format!("the snapshot of entry {index} holds the state of entry {found}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        self.state = state;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.hub.restart_events(index);
        self.publish(&[], true);
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<alias::SnapshotOf<TypeConfig, SnapshotData>>, io::Error> {
        let snapshots = self.snapshots.clone();
        let found = aside(move || snapshots.read()).await?.map_err(io::Error::other)?;
        Ok(found.map(|(meta, snapshot)| openraft::Snapshot { meta, snapshot }))
    }
}

/// Makes a snapshot of the state as it was when this was made. Applying goes on meanwhile.
#[derive(Debug)]
pub(crate) struct Builder {
    state: State,
    meta: SnapshotMeta,
    snapshots: SnapshotStore,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(
        &mut self,
    ) -> Result<alias::SnapshotOf<TypeConfig, SnapshotData>, io::Error> {
        let (state, meta) = (self.state.clone(), self.meta.clone());
        let snapshots = self.snapshots.clone();
        let build = move || {
            let snapshot = SnapshotData::of(&state)?;
            let n_old = swarm::old_snapshots_kept(&state);
            snapshots.write(&meta, &snapshot, n_old).map_err(io::Error::other)?;
            Ok::<_, io::Error>(openraft::Snapshot { meta, snapshot })
        };
        aside(build).await?
    }
}
