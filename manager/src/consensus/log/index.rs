//! What the log holds now: for each entry its term and where it is, in memory, on disk or both.

use std::collections::VecDeque;
use std::ops::Range;

use crate::consensus::codec::entry_size;
use crate::consensus::types::{Entry, LogId, Vote, log_id};

use super::segment::EntryPlace;

#[derive(Debug)]
struct Slot {
    term: u64,
    /// Set until evicted.
    cached: Option<Entry>,
    /// Set once written.
    place: Option<EntryPlace>,
}

/// An entry as found: at hand, or to be read.
#[derive(Debug, Clone)]
pub(super) enum Found {
    Cached(Entry),
    OnDisk(EntryPlace),
}

/// The index, shared by the log's handle, its readers and its writer.
///
/// # Invariants
///
/// - Slots are consecutive from `first`.
/// - A slot that is not cached has a place.
/// - Cached bytes stay below the bound but for what is not written yet: eviction is oldest first.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    first: u64,
    slots: VecDeque<Slot>,
    /// Everything before this index is evicted.
    first_cached: u64,
    cached_bytes: usize,
    cached_bytes_max: usize,
}

impl Index {
    pub(super) fn new(cached_bytes_max: usize) -> Self {
        Self { cached_bytes_max, ..Self::default() }
    }

    /// The last entry, or what was purged when there is none.
    pub(super) fn last(&self) -> Option<LogId> {
        let slot = self.slots.back();
        slot.map(|slot| log_id(slot.term, self.end() - 1)).or(self.purged)
    }

    /// The index behind the last entry.
    fn end(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    /// Indexes of all entries.
    pub(super) fn range(&self) -> Range<u64> {
        self.first..self.end()
    }

    /// Adds an entry that is still to be written. False: it does not follow the last one.
    pub(super) fn push(&mut self, entry: Entry) -> bool {
        let (term, index) = (entry.log_id.leader_id.term, entry.log_id.index);
        // What follows a purge is consecutive; a log that never held anything starts anywhere.
        if self.slots.is_empty() && self.purged.is_some_and(|purged| purged.index + 1 != index) {
            return false;
        }
        let size = entry_size(&entry);
        let is_added = self.add(index, Slot { term, cached: Some(entry), place: None });
        self.cached_bytes += if is_added { size } else { 0 };
        is_added
    }

    /// Adds an entry that was found on disk. False: it does not follow the last one.
    ///
    /// Those before the first one that is found may have been purged since.
    pub(super) fn push_stored(&mut self, log_id: LogId, place: EntryPlace) -> bool {
        let slot = Slot { term: log_id.leader_id.term, cached: None, place: Some(place) };
        let is_added = self.add(log_id.index, slot);
        self.first_cached = self.end();
        is_added
    }

    fn add(&mut self, index: u64, slot: Slot) -> bool {
        if self.slots.is_empty() {
            self.first = index;
            self.first_cached = index;
        } else if self.end() != index {
            return false;
        }
        self.slots.push_back(slot);
        true
    }

    /// Notes where an entry was written, unless another has taken its index meanwhile.
    pub(super) fn set_place(&mut self, log_id: LogId, place: EntryPlace) {
        if let Some(at) = log_id.index.checked_sub(self.first)
            && let Some(slot) = usize::try_from(at).ok().and_then(|at| self.slots.get_mut(at))
            && slot.term == log_id.leader_id.term
        {
            slot.place = Some(place);
        }
    }

    /// Forgets the oldest cached entries until the rest is within the bound.
    pub(super) fn evict(&mut self) {
        while self.cached_bytes > self.cached_bytes_max {
            let at = self.first_cached.saturating_sub(self.first);
            let slot = usize::try_from(at).ok().and_then(|at| self.slots.get_mut(at));
            let Some(slot) = slot.filter(|slot| slot.place.is_some()) else { return };
            if let Some(entry) = slot.cached.take() {
                self.cached_bytes -= entry_size(&entry);
            }
            self.first_cached = self.first_cached.max(self.first) + 1;
        }
    }

    /// Removes the entries behind `after`.
    pub(super) fn truncate(&mut self, after: Option<LogId>) {
        let keep_to = after.map_or(0, |log_id| log_id.index + 1);
        while !self.slots.is_empty() && self.end() > keep_to {
            let slot = self.slots.pop_back();
            self.forget(slot);
        }
        self.first_cached = self.first_cached.min(self.end());
    }

    /// Removes the entries up to `upto`.
    pub(super) fn purge(&mut self, upto: LogId) {
        while !self.slots.is_empty() && self.first <= upto.index {
            let slot = self.slots.pop_front();
            self.forget(slot);
            self.first += 1;
        }
        self.purged = self.purged.max(Some(upto));
    }

    fn forget(&mut self, slot: Option<Slot>) {
        if let Some(entry) = slot.and_then(|slot| slot.cached) {
            self.cached_bytes -= entry_size(&entry);
        }
    }

    /// Finds the entries of a range that exist, in order, at least one and at most `bytes_max` bytes.
    pub(super) fn find(&self, range: Range<u64>, bytes_max: usize) -> Vec<Found> {
        let (start, end) = (range.start.max(self.first), range.end.min(self.end()));
        let mut found = Vec::new();
        let mut bytes = 0_usize;
        for index in start..end {
            let at = usize::try_from(index - self.first).expect("slots fit into memory");
            let slot = &self.slots[at];
            let (next, size) = match (&slot.cached, &slot.place) {
                (Some(entry), _) => (Found::Cached(entry.clone()), entry_size(entry)),
                (None, Some(place)) => (Found::OnDisk(place.clone()), place.length as usize),
                (None, None) => unreachable!("an entry is evicted only once it is written"),
            };
            bytes = bytes.saturating_add(size);
            if bytes > bytes_max && !found.is_empty() {
                break;
            }
            found.push(next);
        }
        found
    }

    /// Bytes held in memory.
    #[cfg(test)]
    pub(super) fn cached_bytes(&self) -> usize {
        self.cached_bytes
    }
}
