//! A swarm that begins anew on one manager: reading all that a log holds, and writing a log that holds a state.
//!
//! Nobody else takes part, and nothing of Raft runs meanwhile: the directory's lock is held.
//!
//! # Epochs
//!
//! The upper half of a term is its epoch: 0 in a swarm as it was founded, and otherwise when it began anew, in
//! seconds since 1970. Elections count in the lower half. So the terms of a swarm that began anew are above all
//! that any node can have obeyed before, also where nobody who knows the highest is left, and a manager of an
//! earlier epoch can be told by any message of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::storage::{RaftLogReader as _, RaftLogStorage as _};
use openraft::{BasicNode, EntryPayload};
use skep_common::Timestamp;
use skep_manager_core::State;
use skep_manager_core::recovery::ELECTION_BITS;

use super::disk::{self, DirLock, Disk, RealDisk};
use super::log::{LogOptions, LogStore};
use super::machine::{self, Unapplicable};
use super::seal::DataKey;
use super::snapshot::{SnapshotData, SnapshotStore};
use super::types::{Membership, SnapshotMeta, StoredMembership, Vote, log_id};

/// Why a swarm did not begin anew. What was there is as it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See there for the remedy.
    #[error("failed to read or write the Raft data of this manager")]
    Storage(#[from] disk::Error),
    /// The disk failed.
    #[error("failed to read or write the Raft log of this manager")]
    Log(#[from] std::io::Error),
    /// See there for the remedy.
    #[error("failed to apply the Raft log")]
    Unapplicable(#[from] Unapplicable),
    /// The log begins behind what the snapshot holds.
    #[error(
        "the snapshot in {} ends at entry {snapshot}, and the log begins behind entry {purged}: use another former manager",
        dir.display()
    )]
    Gap {
        /// The directory.
        dir: PathBuf,
        /// Last entry of the snapshot.
        snapshot: u64,
        /// Last entry that is gone from the log.
        purged: u64,
    },
}

/// Whose data it is.
#[derive(Debug, Clone)]
pub struct Data {
    /// The manager.
    pub raft_id: u64,
    /// Its directory.
    pub dir: PathBuf,
    /// Seals it.
    pub key: DataKey,
}

/// When the swarm of a term began anew, in seconds since 1970; 0 where it never did.
pub(crate) fn epoch(term: u64) -> u64 {
    term >> ELECTION_BITS
}

/// The first term of a swarm that begins anew now, when `known` is the highest that is known of.
pub fn first_term(known: u64, now: Timestamp) -> u64 {
    let now = u64::try_from(now.0 / 1_000_000_000).unwrap_or(0);
    now.max(epoch(known) + 1) << ELECTION_BITS
}

impl Data {
    fn open(&self) -> Result<(LogStore, SnapshotStore), disk::Error> {
        disk::create_private_dir(&self.dir)?;
        let lock = Arc::new(DirLock::take(&self.dir)?);
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let snapshots =
            SnapshotStore::open_on(self.dir.clone(), self.key.clone(), Arc::clone(&disk))?;
        let options = LogOptions::new(self.raft_id, self.dir.clone(), self.key.clone(), disk);
        Ok((LogStore::open(&options, lock)?, snapshots))
    }

    /// Reads the state that snapshot and log amount to, and the highest term that the manager knew.
    ///
    /// Entries that were not known to be committed are taken in: they may have been, and those who know are gone.
    pub async fn read(&self) -> Result<(State, u64), Error> {
        let data = self.clone();
        let opened = tokio::task::spawn_blocking(move || data.open()).await;
        let (mut log, snapshots) = opened.map_err(std::io::Error::other)??;
        let read = self.read_opened(&mut log, &snapshots).await;
        close(log).await?;
        read
    }

    async fn read_opened(
        &self,
        log: &mut LogStore,
        snapshots: &SnapshotStore,
    ) -> Result<(State, u64), Error> {
        let (mut state, mut term) = match snapshots.read()? {
            Some((meta, data)) => {
                (data.state()?, meta.last_log_id.map_or(0, |log_id| log_id.leader_id.term))
            }
            None => (State::default(), 0),
        };
        let mut reader = log.get_log_reader().await;
        let vote = reader.read_vote().await?;
        term = vote.map_or(term, |vote| term.max(vote.leader_id.term));
        let bounds = log.get_log_state().await?;
        let (snapshot, purged) = (state.version().index, bounds.last_purged_log_id);
        let purged = purged.map_or(0, |purged| purged.index);
        if purged > snapshot {
            return Err(Error::Gap { dir: self.dir.clone(), snapshot, purged });
        }
        let end = bounds.last_log_id.map_or(0, |last| last.index + 1);
        while state.version().index + 1 < end {
            let entries = reader.limited_get_log_entries(state.version().index + 1, end).await?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                term = term.max(entry.log_id.leader_id.term);
                match entry.payload {
                    EntryPayload::Normal(payload) => {
                        let index = entry.log_id.index;
                        state.apply(index, &machine::decode(index, &payload.0)?);
                    }
                    EntryPayload::Blank | EntryPayload::Membership(_) => {
                        state.skip(entry.log_id.index);
                    }
                }
            }
        }
        Ok((state, term))
    }

    /// Writes the data of the only manager, at `addr`, of a swarm of that state. Nothing may be there yet.
    /// `term` is one that [`first_term`] gave.
    pub async fn write(&self, state: &State, addr: &str, term: u64) -> Result<(), Error> {
        let (data, stored, addr) = (self.clone(), state.clone(), addr.to_owned());
        let index = state.version().index;
        let write = move || {
            let (log, snapshots) = data.open()?;
            let voters = BTreeSet::from([data.raft_id]);
            let nodes = BTreeMap::from([(data.raft_id, BasicNode::new(addr))]);
            let membership = Membership::new(vec![voters], nodes).map_err(std::io::Error::other)?;
            let last = Some(log_id(term, index));
            let meta = SnapshotMeta {
                last_log_id: last,
                last_membership: StoredMembership::new(last, membership),
            };
            snapshots.write(&meta, &SnapshotData::of(&stored)?, 0)?;
            Ok::<LogStore, Error>(log)
        };
        let written = tokio::task::spawn_blocking(write).await;
        let mut log = written.map_err(std::io::Error::other)??;
        let voted = log.save_vote(&Vote::new(term, self.raft_id)).await;
        close(log).await?;
        voted?;
        Ok(disk::sync_dir(parent_of(&self.dir))?)
    }
}

fn parent_of(dir: &Path) -> &Path {
    dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Ends the log's thread, so that the directory is free again.
async fn close(log: LogStore) -> Result<(), Error> {
    let closed = log.close().await;
    let thread = log.take_thread();
    drop(log);
    if let Some(thread) = thread {
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        drop(joined); // A panic of that thread was logged when it happened.
    }
    Ok(closed?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use skep_manager_core::endpoints::first_version;

    #[test]
    fn a_new_epoch_is_above_every_term_before_and_comes_with_time() {
        let now = Timestamp::from_secs(1_700_000_000);
        let first = first_term(41, now);
        assert_eq!(epoch(first), 1_700_000_000);
        assert_eq!(epoch(first + 5), epoch(first));
        assert!(first > 41);
        // Twice within a second, and with a clock that was set back.
        let second = first_term(first + 5, now);
        assert_eq!(epoch(second), 1_700_000_001);
        let third = first_term(second, Timestamp::from_secs(7));
        assert!(third > second);
        assert_eq!(epoch(41), 0);
        // So are the versions of its tables.
        let versions = [41, first, first + 5, second, third, third + 1].map(first_version);
        assert!(versions.is_sorted_by(|before, after| before < after), "{versions:?}");
    }
}
