//! The only reader of clocks.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use skep_common::Timestamp;

/// Wall-clock time: for people and for the store.
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads it")]
pub fn now() -> Timestamp {
    #[cfg(feature = "simulation")]
    if let Some(machine) = crate::simulation::machine() {
        return (machine.now)();
    }
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX))
}

/// A clock that never goes back: for deadlines and durations. It is the one that timers go by, so that it
/// stands still where a test has paused them.
pub fn monotonic() -> Instant {
    tokio::time::Instant::now().into_std()
}
