//! Who is using which blob right now: locks against double work, pins against the collector.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use skep_worker_core::image::Digest;
use tokio::sync::OwnedMutexGuard;

/// One lock per digest, made when asked for and forgotten when nobody holds it.
#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<BTreeMap<Digest, Weak<tokio::sync::Mutex<()>>>>);

impl Locks {
    /// Waits until nobody else works on `digest`. Who comes second then finds the work done.
    pub(super) async fn lock(&self, digest: Digest) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(&digest).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(digest, Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

/// How many hold each digest.
#[derive(Debug, Default)]
pub(super) struct Pins(Mutex<BTreeMap<Digest, usize>>);

impl Pins {
    /// Stops the collector while the guard lives: nobody can pin or unpin.
    pub(super) fn freeze(&self) -> Frozen<'_> {
        Frozen(self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The pins, while nobody can change them.
pub(super) struct Frozen<'a>(MutexGuard<'a, BTreeMap<Digest, usize>>);

impl Frozen<'_> {
    pub(super) fn digests(&self) -> BTreeSet<Digest> {
        self.0.keys().copied().collect()
    }
}

/// Keeps what it names, and what an image it names consists of, from being collected.
///
/// Hold it until the image is written down where the caller of
/// [`retain`](super::ImageStore::retain) finds it.
#[derive(Debug)]
pub struct Pin {
    pins: Arc<Pins>,
    digests: Vec<Digest>,
}

impl Pin {
    pub(super) fn new(pins: &Arc<Pins>) -> Self {
        Self { pins: Arc::clone(pins), digests: Vec::new() }
    }

    pub(super) fn add(&mut self, digests: impl IntoIterator<Item = Digest>) {
        let mut counts = self.pins.0.lock().unwrap_or_else(PoisonError::into_inner);
        for digest in digests {
            *counts.entry(digest).or_insert(0) += 1;
            self.digests.push(digest);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut counts = self.pins.0.lock().unwrap_or_else(PoisonError::into_inner);
        for digest in &self.digests {
            if let Some(count) = counts.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(digest);
                }
            }
        }
    }
}
