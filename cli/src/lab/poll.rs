//! The one loop that polls, with a deadline.

use std::time::Duration;

use skep_runtime::clock::monotonic;

/// How long to wait between two looks at something that gives no event.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Looks until `look` gives something, and at least once; `None` when the time is over.
pub(super) fn poll_until<T>(timeout: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = monotonic() + timeout;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if monotonic() >= deadline {
            return None;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
