//! Virtual time: what is to happen, in the order of its moments; at one moment, in the order of asking.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Duration;

use skep_common::Timestamp;

/// When every simulation begins. Any moment would do that leaves room for clocks that jump back.
pub(crate) const START: Timestamp = Timestamp::from_secs(1_000_000);

struct Entry<T> {
    at: Timestamp,
    number: u64,
    what: T,
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl<T> Eq for Entry<T> {}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Entry<T> {
    /// The earliest is the greatest, which a heap gives first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// The events to come.
pub(crate) struct Queue<T> {
    now: Timestamp,
    n_pushed: u64,
    entries: BinaryHeap<Entry<T>>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { now: START, n_pushed: 0, entries: BinaryHeap::new() }
    }
}

impl<T> Queue<T> {
    /// The moment of the last event that was taken.
    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    pub(crate) fn after(&mut self, delay: Duration, what: T) {
        self.at(self.now.after(delay), what);
    }

    /// A moment that has passed is now.
    pub(crate) fn at(&mut self, at: Timestamp, what: T) {
        self.n_pushed += 1;
        let at = at.max(self.now);
        self.entries.push(Entry { at, number: self.n_pushed, what });
    }

    /// The next event; time is its moment from now on.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let entry = self.entries.pop()?;
        self.now = entry.at;
        Some(entry.what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_in_the_order_of_time_and_then_of_asking() {
        let mut queue = Queue::default();
        for (millis, word) in [(20, "c"), (10, "a"), (10, "b"), (0, "first")] {
            queue.after(Duration::from_millis(millis), word);
        }
        let order: Vec<&str> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, ["first", "a", "b", "c"]);
        assert_eq!(queue.now(), START.after(Duration::from_millis(20)));
        queue.at(START, "late");
        assert_eq!(
            (queue.pop(), queue.now()),
            (Some("late"), START.after(Duration::from_millis(20)))
        );
    }
}
