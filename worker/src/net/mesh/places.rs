//! How many connections through the daemon one task may have: those of a task that does not read stay, and must
//! not take the places of all others.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Counts the connections of each task; clones share it.
#[derive(Debug)]
pub(crate) struct Places<K: Ord> {
    limit: usize,
    taken: Arc<Mutex<BTreeMap<K, usize>>>,
}

impl<K: Ord> Clone for Places<K> {
    fn clone(&self) -> Self {
        Self { limit: self.limit, taken: Arc::clone(&self.taken) }
    }
}

impl<K: Ord + Clone + fmt::Debug> Places<K> {
    /// So many for each.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, taken: Arc::default() }
    }

    /// How many each may have.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// One of the task's places until it is dropped; `None` where it has no more.
    pub(crate) fn take(&self, task: &K) -> Option<Place<K>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(task.clone()).or_default();
        if *count >= self.limit {
            return None;
        }
        *count += 1;
        Some(Place { task: task.clone(), taken: Arc::clone(&self.taken) })
    }
}

/// The place of one connection.
#[derive(Debug)]
pub(crate) struct Place<K: Ord> {
    task: K,
    taken: Arc<Mutex<BTreeMap<K, usize>>>,
}

impl<K: Ord> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.task) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.task);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_task_takes_nothing_from_another_one_and_places_come_back() {
        let places = Places::new(2);
        let held = [places.take(&"a"), places.take(&"a")];
        assert!(held.iter().all(Option::is_some));
        assert!(places.take(&"a").is_none(), "it has its two");
        assert!(places.take(&"b").is_some(), "another one");
        drop(held);
        assert!(places.take(&"a").is_some());
        assert!(places.taken.lock().unwrap().is_empty(), "nobody is remembered for nothing");
    }
}
