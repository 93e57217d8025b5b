//! Until when something is tried.

use std::future::Future;
use std::time::{Duration, Instant};

use skep_runtime::clock;

/// First wait before something is tried again, and the longest.
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(200);

/// A moment after which nothing is tried any more.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    backoff: Duration,
}

impl Deadline {
    pub(crate) fn after(time: Duration) -> Self {
        Self { at: clock::monotonic() + time, backoff: BACKOFF_MIN }
    }

    pub(crate) fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(clock::monotonic())
    }

    pub(crate) fn has_passed(&self) -> bool {
        self.remaining().is_zero()
    }

    /// Waits for `future`, until the deadline at most.
    pub(crate) async fn bound<F: Future>(&self, future: F) -> Option<F::Output> {
        tokio::time::timeout(self.remaining(), future).await.ok()
    }

    /// Waits until it is time to try again. Each wait is longer than the last.
    pub(crate) async fn back_off(&mut self) {
        tokio::time::sleep(self.backoff.min(self.remaining())).await;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }
}
