//! Words in the log that clients could have written any number of times.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines about the same: often enough to be found, and no load.
const PERIOD: Duration = Duration::from_secs(10);

/// Lets one line through a period, and counts the others.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    withheld: u64,
}

impl Throttle {
    /// Whether a line is to be written now: with how many were withheld since the one before.
    pub(crate) fn pass(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| now.duration_since(last) < PERIOD) {
            state.withheld += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.withheld))
    }
}

#[cfg(test)]
mod tests {
    use skep_runtime::clock;

    use super::*;

    #[test]
    fn one_line_a_period_says_how_many_were_withheld() {
        let (throttle, start) = (Throttle::default(), clock::monotonic());
        let seen =
            [0, 1, 9, 10, 11, 30].map(|second| throttle.pass(start + Duration::from_secs(second)));
        assert_eq!(seen, [Some(0), None, None, Some(2), None, Some(1)]);
    }
}
