//! What is counted of connections that the daemon relays, as the kernel counts those of its rules.
//!
//! Each task that a client's connection is tried with counts it, and as a failure where it did not accept.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use skep_worker_core::accounting::{Counts, Key};
use skep_worker_core::mesh::{PortKey, Target};

/// The counts of this node; nothing is counted until somebody asks for them. Clones share them.
#[derive(Debug, Clone, Default)]
pub(in crate::net) struct Tally(Arc<Mutex<Option<ByKey>>>);

type ByKey = BTreeMap<Key, Arc<Counters>>;

/// Those of one backend of one port.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    connections: AtomicU64,
    failures: AtomicU64,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
}

impl Tally {
    /// Begins to count.
    pub(in crate::net) fn start(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
    }

    /// What counts a backend's connections; `None` where nothing is counted.
    pub(super) fn of(&self, port: PortKey, target: &Target) -> Option<Arc<Counters>> {
        let (published, protocol) = (port.port, port.protocol);
        let key = Key { endpoint: target.address, published, protocol };
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(counters.as_mut()?.entry(key).or_default()))
    }

    /// Forgets what was counted of backends that are others by now.
    pub(in crate::net) fn forget(&self, stale: &[Key]) {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(counters) = counters.as_mut() {
            counters.retain(|key, _| !stale.contains(key));
        }
    }

    /// What was counted so far.
    pub(in crate::net) fn counts(&self) -> BTreeMap<Key, Counts> {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = |counters: &Counters| Counts {
            connections: counters.connections.load(Ordering::Relaxed),
            failures: counters.failures.load(Ordering::Relaxed),
            received_bytes: counters.received_bytes.load(Ordering::Relaxed),
            sent_bytes: counters.sent_bytes.load(Ordering::Relaxed),
        };
        counters.iter().flatten().map(|(key, of_key)| (*key, counts(of_key))).collect()
    }
}

impl Counters {
    /// A connection was given to the backend, which took it or not.
    pub(super) fn count_connection(&self, is_accepted: bool) {
        self.connections.fetch_add(1, Ordering::Relaxed);
        if !is_accepted {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The client sent so many bytes.
    pub(super) fn count_received(&self, n: usize) {
        self.received_bytes.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// The client was sent so many bytes.
    pub(super) fn count_sent(&self, n: usize) {
        self.sent_bytes.fetch_add(n as u64, Ordering::Relaxed);
    }
}
