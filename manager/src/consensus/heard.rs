//! When this manager last heard of a leader and lacked nothing, and, as leader, of the others.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use skep_runtime::clock;

use super::Consensus;

/// When all that a leader had committed, as it last said, was applied here.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    current_at: Mutex<Option<Instant>>,
}

impl Heard {
    /// A leader was obeyed; `is_current`: all that it has committed is applied here.
    pub(crate) fn note(&self, is_current: bool) {
        if is_current {
            *self.current_at.lock().expect(NOT_POISONED) = Some(clock::monotonic());
        }
    }
}

const NOT_POISONED: &str = "nothing panics while it holds the time";

impl Consensus {
    /// Whether the state here is the swarm's of a moment ago: this manager leads, or hears of the leader and has
    /// applied what that has committed.
    pub(crate) fn is_current(&self) -> bool {
        let limit = self.inner.timing.leader_silence_max();
        let heard_at = *self.inner.heard.current_at.lock().expect(NOT_POISONED);
        let is_recent = heard_at.is_some_and(|at| clock::monotonic().duration_since(at) < limit);
        is_recent || self.leadership().borrow().is_self
    }

    /// As leader: how long ago each other manager answered. Empty elsewhere.
    pub(crate) fn heard_of_others(&self) -> BTreeMap<u64, Duration> {
        if !self.leadership().borrow().is_self {
            return BTreeMap::new();
        }
        let metrics = self.inner.metrics.borrow();
        let heard = metrics.heartbeat.iter().flatten();
        heard.filter_map(|(id, at)| Some((*id, openraft::Instant::elapsed(&*(*at)?)))).collect()
    }
}
