//! What a node tried while no manager led.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::TaskStatus;
use crate::Timestamp;
use crate::limits::MAX_ATTEMPTS_COUNTED;

/// How many of a task's attempts are told at least; all of them are counted.
const ATTEMPTS_KEPT: usize = 5;

/// A container of a task that ended, and that its node followed by another one of the same task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Attempt {
    /// The container's id on the node: the task's, as that of the container that followed.
    #[serde(rename = "ContainerID")]
    pub container_id: String,
    /// How it ended; 128 + n after signal n.
    pub exit_code: i32,
    /// When it began, by the node's clock.
    pub started_at: Timestamp,
    /// When it ended, by the node's clock.
    pub ended_at: Timestamp,
    /// For people: what went wrong.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub err: String,
}

impl TaskStatus {
    /// Adds an attempt. Of many the newest are kept, and so many that a limit within a window can be counted.
    pub fn note_attempt(&mut self, attempt: Attempt, limit: u64) {
        self.attempts.push(attempt);
        let limit = usize::try_from(limit.min(MAX_ATTEMPTS_COUNTED)).unwrap_or(ATTEMPTS_KEPT);
        let n_too_many = self.attempts.len().saturating_sub(ATTEMPTS_KEPT.max(limit));
        self.attempts.drain(..n_too_many);
        self.n_attempts = self.n_attempts.saturating_add(1);
    }

    /// How many containers followed another one within `window` before `until`, of those that are kept; without a
    /// window all of them.
    pub fn attempts_within(&self, window: Option<Duration>, until: Timestamp) -> u64 {
        let Some(window) = window else { return u64::from(self.n_attempts) };
        let counts = |attempt: &&Attempt| attempt.ended_at.after(window) >= until;
        self.attempts.iter().filter(counts).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp(0).after(Duration::from_secs(seconds))
    }

    fn status(ended_at: impl IntoIterator<Item = u64>, limit: u64) -> TaskStatus {
        let mut status = TaskStatus::default();
        for seconds in ended_at {
            status.note_attempt(Attempt { ended_at: at(seconds), ..Attempt::default() }, limit);
        }
        status
    }

    #[test]
    fn attempts_count_within_a_window() {
        let window = |seconds| Some(Duration::from_secs(seconds));
        for (name, ended_at, window, expect) in [
            ("none", vec![], window(10), 0),
            ("without a window", vec![1, 2, 3], None, 3),
            ("some are older", vec![1, 95, 99], window(10), 2),
            ("all are older", vec![1, 2], window(10), 0),
            ("as many as the limit", (80..100).collect(), window(15), 10),
            ("as many as the limit, and the window is short", (80..100).collect(), window(2), 2),
        ] {
            assert_eq!(status(ended_at, 10).attempts_within(window, at(100)), expect, "{name}");
        }
    }

    #[test]
    fn the_newest_attempts_are_kept() {
        let status = status(1..=7, 0);
        let kept: Vec<_> = status.attempts.iter().map(|attempt| attempt.ended_at).collect();
        assert_eq!((kept, status.n_attempts), ((3..=7).map(at).collect(), 7));
    }
}
