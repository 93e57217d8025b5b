//! The newest events of one manager.

use std::collections::VecDeque;
use std::sync::Arc;

use skep_common::Timestamp;

use super::Event;

/// Events kept at most, which is some minutes of a swarm that replaces all it has.
const EVENTS_MAX: usize = 1 << 15;
/// Bytes of them at most: a manager is small.
const BYTES_MAX: usize = 8 << 20;
/// Events given at once, but for those of one version.
const PAGE_LENGTH: usize = 256;

/// Events in the order of their versions, without a gap from a version on.
#[derive(Debug, Default)]
pub struct Ring {
    events: VecDeque<Arc<Event>>,
    n_bytes: usize,
    /// All events of versions above this one are here.
    floor: u64,
    /// The version of the store that all events up to are here.
    version: u64,
}

/// Some events, and how to go on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// In their order.
    pub events: Vec<Arc<Event>>,
    /// Whether some were there before these that are not kept any more.
    pub is_gap: bool,
    /// Go on behind this version.
    pub version: u64,
    /// Whether nothing is left behind it.
    pub is_last: bool,
}

impl Ring {
    /// Notes the events of the store's next version.
    pub fn push(&mut self, version: u64, events: Vec<Event>) {
        self.version = version;
        for event in events {
            self.n_bytes += event.size();
            self.events.push_back(Arc::new(event));
        }
        while self.events.len() > EVENTS_MAX || self.n_bytes > BYTES_MAX {
            // Those of one version go together: what is kept of a version is all of it.
            let Some(first) = self.events.front().map(|event| event.version) else { break };
            while let Some(event) = self.events.pop_front_if(|event| event.version == first) {
                self.n_bytes -= event.size();
            }
            self.floor = first;
        }
    }

    /// The store was replaced by one of that version: nothing is known of what led to it.
    pub fn restart(&mut self, version: u64) {
        *self = Self { floor: version, version, ..Self::default() };
    }

    /// The version up to which all events are here.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// What came behind a version.
    pub fn behind(&self, version: u64) -> Page {
        let start = self.events.partition_point(|event| event.version <= version);
        let mut end = (start + PAGE_LENGTH).min(self.events.len());
        while end > start
            && end < self.events.len()
            && self.events[end].version == self.events[end - 1].version
        {
            end += 1;
        }
        let is_last = end == self.events.len();
        let events: Vec<Arc<Event>> = self.events.range(start..end).cloned().collect();
        let last = events.last().map_or(version, |event| event.version);
        let version_after = if is_last { self.version.max(version) } else { last };
        Page { events, is_gap: version < self.floor, version: version_after, is_last }
    }

    /// The version behind which the events since a time are, and whether all of these are here.
    pub fn since(&self, at: Timestamp) -> (u64, bool) {
        // Clocks of managers differ, so that the times are not in order.
        let first = self.events.iter().find(|event| event.at >= at);
        let version = first.map_or(self.version, |event| event.version - 1).max(self.floor);
        let is_whole = self.floor == 0 || self.events.front().is_some_and(|oldest| oldest.at < at);
        (version, is_whole)
    }
}
