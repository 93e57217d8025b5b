//! How much of clients' bytes a node keeps for readers that are slow: one budget for all passages, in and out.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What all passages of a node may keep at once.
pub(super) const BYTES_MAX: usize = 64 << 20;

/// A window for a network within a data centre at its full rate.
const WINDOW_MAX: usize = 128 << 10;

/// The smallest window: a round trip for each, which is slow and goes on.
const WINDOW_MIN: usize = 4 << 10;

/// What windows larger than the smallest leave free: 8192 of these.
const RESERVED: usize = 8192 * WINDOW_MIN;

/// New windows shrink as those that are there take more of what is not reserved: each has this part of the rest.
const PART: usize = 256;

/// The windows of a node's passages; clones share the budget.
#[derive(Debug, Clone)]
pub struct Windows(Arc<Semaphore>);

impl Default for Windows {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(BYTES_MAX)))
    }
}

impl Windows {
    /// A window for one more passage, until it is dropped; `None` where nothing is left.
    pub(super) fn take(&self) -> Option<Window> {
        let take = |bytes: usize| {
            let permit = self.0.clone().try_acquire_many_owned(u32::try_from(bytes).ok()?).ok()?;
            Some(Window { bytes, _permit: permit })
        };
        // Others may take of the same at this moment.
        take(window_of(self.0.available_permits())).or_else(|| take(WINDOW_MIN))
    }
}

fn window_of(free: usize) -> usize {
    (free.saturating_sub(RESERVED) / PART).clamp(WINDOW_MIN, WINDOW_MAX)
}

/// What one passage may keep.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) bytes: usize,
    _permit: OwnedSemaphorePermit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_shrink_and_stay_within_the_budget() {
        let windows = Windows::default();
        let mut taken = Vec::new();
        while let Some(window) = windows.take() {
            taken.push(window);
        }
        let sizes: Vec<usize> = taken.iter().map(|window| window.bytes).collect();
        assert_eq!((sizes[0], sizes[sizes.len() - 1]), (WINDOW_MAX, WINDOW_MIN));
        assert!(sizes.is_sorted_by(|earlier, later| earlier >= later));
        assert!(sizes.len() > 8192, "{}", sizes.len());
        assert!(sizes.iter().sum::<usize>() <= BYTES_MAX);
        taken.clear();
        assert_eq!(windows.take().map(|window| window.bytes), Some(WINDOW_MAX));
    }
}
