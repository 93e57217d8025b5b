//! What a replica keeps: the entries of the log, snapshots of what they came to, and a disk with both.

use std::sync::Arc;

use skep_manager_core::Command;

use crate::membership::{ManagerId, Membership};

/// What is agreed on.
#[derive(Debug, Clone)]
pub(crate) enum Payload {
    /// A new leader's first.
    Blank,
    /// The voters and learners from here on.
    Membership(Membership),
    Command {
        /// Names the proposal, for whoever waits for it.
        id: u64,
        command: Arc<Command>,
    },
}

/// One place of the log.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) payload: Payload,
}

impl Entry {
    /// The format level that it is understood at; 0 where every program understands it.
    pub(crate) fn level(&self) -> u32 {
        match &self.payload {
            Payload::Command { command, .. } => command.level,
            Payload::Blank | Payload::Membership(_) => 0,
        }
    }
}

/// All up to one place of the log, as bytes.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) membership: Membership,
    /// The format level of the bytes.
    pub(crate) level: u32,
    pub(crate) bytes: Vec<u8>,
}

/// What a disk holds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    pub(crate) term: u64,
    pub(crate) vote: Option<ManagerId>,
    pub(crate) snapshot: Arc<Snapshot>,
    /// From the one after the snapshot on.
    pub(crate) log: Vec<Arc<Entry>>,
}

impl Disk {
    pub(crate) fn last_index(&self) -> u64 {
        self.snapshot.index + self.log.len() as u64
    }

    pub(crate) fn term_at(&self, index: u64) -> Option<u64> {
        match index.checked_sub(self.snapshot.index)? {
            0 => Some(self.snapshot.term),
            nth => self.log.get(usize::try_from(nth - 1).ok()?).map(|entry| entry.term),
        }
    }

    /// (term, index): the order of logs.
    pub(crate) fn last(&self) -> (u64, u64) {
        let index = self.last_index();
        (self.term_at(index).unwrap_or(0), index)
    }

    pub(crate) fn entry(&self, index: u64) -> Option<&Arc<Entry>> {
        let nth = index.checked_sub(self.snapshot.index + 1)?;
        self.log.get(usize::try_from(nth).ok()?)
    }

    /// The voters and learners, as far as the log up to `index` says.
    pub(crate) fn membership_at(&self, index: u64) -> &Membership {
        let n_before = usize::try_from(index.saturating_sub(self.snapshot.index));
        let before = self.log.iter().take(n_before.unwrap_or(usize::MAX));
        let last = before.rev().find_map(|entry| match &entry.payload {
            Payload::Membership(membership) => Some(membership),
            Payload::Blank | Payload::Command { .. } => None,
        });
        last.unwrap_or(&self.snapshot.membership)
    }

    /// The place of the newest membership in the log; that of the snapshot where it has none.
    pub(crate) fn last_change(&self) -> u64 {
        let is_change = |entry: &&Arc<Entry>| matches!(entry.payload, Payload::Membership(_));
        self.log.iter().rev().find(is_change).map_or(self.snapshot.index, |entry| entry.index)
    }

    pub(crate) fn truncate(&mut self, last_kept: u64) {
        let kept = usize::try_from(last_kept.saturating_sub(self.snapshot.index));
        self.log.truncate(kept.unwrap_or(usize::MAX));
    }
}
