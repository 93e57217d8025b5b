//! The change feed: what the control loops, watches and the Docker API follow.
//!
//! The state machine publishes after each batch that it applied. Each subscriber gets, when it asks,
//! the newest state and all that changed since it asked last.
//!
//! # Invariants
//!
//! - A publisher never waits for a subscriber, and a subscriber never misses a change: what it does
//!   not fetch in time is merged, and past [`CHANGES_MAX`] it is told that all may have changed.
//! - The state of a [`Commit`] has all of its changes and none that a later commit announces.

use std::sync::{Arc, Mutex, Weak};

use skep_manager_core::events::{Event, Ring};
use skep_manager_core::{Change, State};
use tokio::sync::watch;

use super::types::LogId;

/// Changes kept for one subscriber; beyond, reading the tables anew is cheaper.
const CHANGES_MAX: usize = 1 << 16;

const UNPOISONED: &str = "nothing panics while it holds the feed";

/// What a subscriber gets.
#[derive(Debug, Clone)]
pub struct Commit {
    /// The newest state.
    pub state: State,
    /// What changed since the last call, ordered, each once. Empty when `all_changed`.
    pub changes: Vec<Change>,
    /// Anything may have changed: the first call, after a snapshot, or after too many changes.
    pub all_changed: bool,
}

/// A subscription.
#[derive(Debug)]
pub struct Feed {
    pending: Arc<Mutex<Pending>>,
    published: watch::Receiver<Published>,
    version: watch::Receiver<u64>,
}

impl Feed {
    /// Waits until something changed. The first call returns at once; `None` when this manager stops.
    ///
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<Commit> {
        loop {
            // Marked as seen before looking: what comes after it wakes the next wait.
            self.version.borrow_and_update();
            if let Some(commit) = self.take() {
                return Some(commit);
            }
            self.version.changed().await.ok()?;
        }
    }

    fn take(&self) -> Option<Commit> {
        let mut pending = self.pending.lock().expect(UNPOISONED);
        if !pending.all_changed && pending.changes.is_empty() {
            return None;
        }
        let Pending { mut changes, all_changed } = std::mem::take(&mut *pending);
        // Under the lock that publishing takes too: no change of a newer state is left out.
        let state = self.published.borrow().state.clone();
        drop(pending);
        changes.sort_unstable();
        changes.dedup();
        Some(Commit { state, changes, all_changed })
    }
}

#[derive(Debug, Default)]
struct Pending {
    changes: Vec<Change>,
    all_changed: bool,
}

impl Pending {
    fn add(&mut self, changes: &[Change], all_changed: bool) {
        self.all_changed |= all_changed;
        if !self.all_changed {
            self.changes.extend_from_slice(changes);
            if self.changes.len() > CHANGES_MAX {
                self.changes.sort_unstable();
                self.changes.dedup();
                self.all_changed = self.changes.len() > CHANGES_MAX;
            }
        }
        if self.all_changed {
            self.changes = Vec::new();
        }
    }
}

/// What readers see.
#[derive(Debug, Clone, Default)]
pub(crate) struct Published {
    pub(crate) state: State,
    pub(crate) applied: Option<LogId>,
}

/// Where the state machine publishes.
#[derive(Debug)]
pub(crate) struct Hub {
    feeds: Mutex<Vec<Weak<Mutex<Pending>>>>,
    published: watch::Sender<Published>,
    /// Counts publications with changes: feeds wait on it. Gone when the manager stops.
    version: Mutex<Option<watch::Sender<u64>>>,
    /// What happened, step by step.
    events: Mutex<Ring>,
}

/// The events of each version that a batch made.
pub(crate) type Steps = Vec<(u64, Vec<Event>)>;

impl Hub {
    pub(crate) fn new() -> Self {
        let (published, _) = watch::channel(Published::default());
        let (version, _) = watch::channel(0);
        Self {
            feeds: Mutex::default(),
            published,
            version: Mutex::new(Some(version)),
            events: Mutex::default(),
        }
    }

    /// Keeps what happened, before the states that it made are published: whoever is told of them finds it.
    pub(crate) fn note(&self, steps: Steps) {
        let mut ring = self.events.lock().expect(UNPOISONED);
        for (version, events) in steps {
            ring.push(version, events);
        }
    }

    /// Forgets what happened before a state that came whole.
    pub(crate) fn restart_events(&self, version: u64) {
        self.events.lock().expect(UNPOISONED).restart(version);
    }

    pub(crate) fn events<T>(&self, read: impl FnOnce(&Ring) -> T) -> T {
        read(&self.events.lock().expect(UNPOISONED))
    }

    /// Makes a new state visible.
    pub(crate) fn publish(&self, published: Published, changes: &[Change], all_changed: bool) {
        let mut feeds = self.feeds.lock().expect(UNPOISONED);
        feeds.retain(|feed| feed.strong_count() > 0);
        let feeds: Vec<_> = feeds.iter().filter_map(Weak::upgrade).collect();
        // All feeds are held while the state is replaced, so that none sees one without the other.
        let mut pending: Vec<_> = feeds.iter().map(|feed| feed.lock().expect(UNPOISONED)).collect();
        self.published.send_replace(published);
        for pending in &mut pending {
            pending.add(changes, all_changed);
        }
        drop(pending);
        if let Some(version) = &*self.version.lock().expect(UNPOISONED) {
            version.send_modify(|version| *version += 1);
        }
    }

    pub(crate) fn subscribe(&self) -> Feed {
        let pending = Arc::new(Mutex::new(Pending { changes: Vec::new(), all_changed: true }));
        self.feeds.lock().expect(UNPOISONED).push(Arc::downgrade(&pending));
        let version = match &*self.version.lock().expect(UNPOISONED) {
            Some(version) => version.subscribe(),
            None => watch::channel(0).1, // Closed: the first call still gives the state.
        };
        Feed { pending, published: self.published.subscribe(), version }
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Published> {
        self.published.subscribe()
    }

    pub(crate) fn state(&self) -> State {
        self.published.borrow().state.clone()
    }

    /// Ends all feeds.
    pub(crate) fn close(&self) {
        self.version.lock().expect(UNPOISONED).take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use skep_common::Kind;

    fn change(id: u128) -> Change {
        Change { kind: Kind::Task, id, service_id: None, node_id: None }
    }

    fn published(version: u64) -> Published {
        let mut state = State::default();
        state.skip(version);
        Published { state, applied: None }
    }

    #[test]
    fn a_feed_starts_with_everything_then_merges_what_was_not_fetched() {
        let hub = Hub::new();
        let mut feed = hub.subscribe();
        assert!(feed.next().now_or_never().unwrap().unwrap().all_changed);
        assert!(feed.next().now_or_never().is_none());

        hub.publish(published(1), &[change(2)], false);
        hub.publish(published(2), &[change(1), change(2)], false);
        let commit = feed.next().now_or_never().unwrap().unwrap();
        assert_eq!(commit.state.version().index, 2);
        assert_eq!(commit.changes, [change(1), change(2)]);
        assert!(!commit.all_changed);

        hub.publish(published(3), &[], false);
        assert!(feed.next().now_or_never().is_none(), "nothing that a loop must look at changed");
        hub.close();
        assert!(feed.next().now_or_never().unwrap().is_none());
    }

    #[test]
    fn a_feed_that_is_never_read_stays_bounded() {
        let hub = Hub::new();
        let mut feed = hub.subscribe();
        feed.next().now_or_never().unwrap().unwrap();
        for round in 0..3_u128 {
            let changes: Vec<_> = (0..40_000).map(|id| change(round * 40_000 + id)).collect();
            hub.publish(published(1), &changes, false);
            assert!(feed.pending.lock().unwrap().changes.len() <= CHANGES_MAX);
        }
        let commit = feed.next().now_or_never().unwrap().unwrap();
        assert!(commit.all_changed && commit.changes.is_empty());
    }

    #[test]
    fn repeated_changes_of_few_objects_never_overflow() {
        let hub = Hub::new();
        let mut feed = hub.subscribe();
        feed.next().now_or_never().unwrap().unwrap();
        for _ in 0..CHANGES_MAX {
            hub.publish(published(1), &[change(1), change(2), change(3)], false);
        }
        let commit = feed.next().now_or_never().unwrap().unwrap();
        assert_eq!((commit.changes.len(), commit.all_changed), (3, false));
    }
}
