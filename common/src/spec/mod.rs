//! What users ask for: specs with Docker's JSON field names, never edited by skep.
//!
//! Every field is optional, so that absent differs from zero; what skep does not act on yet is kept
//! in `extra`. Defaults are applied where a value is used, not where it is stored.
//!
//! Units: durations are [`Nanos`], memory is bytes, CPU is nano-CPUs (10⁹ = one core).
//! Source: Docker Engine API v1.47, `ServiceSpec`, `NodeSpec`, `SwarmSpec`, `NetworkSpec`.

mod cluster;
mod container;
pub mod generic;
mod logging;
mod mode;
mod network;
mod payload;
mod placement;
mod service;

pub use cluster::*;
pub use container::*;
pub use logging::*;
pub use mode::*;
pub use network::*;
pub use payload::*;
pub use placement::*;
pub use service::*;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// User-chosen labels.
pub type Labels = BTreeMap<String, String>;

/// JSON fields that skep keeps and does not act on.
pub type Extra = serde_json::Map<String, serde_json::Value>;

/// A duration in nanoseconds, as Docker's JSON has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub i64);

impl Nanos {
    /// The duration; negative values count as zero.
    pub fn duration(self) -> Duration {
        Duration::from_nanos(u64::try_from(self.0).unwrap_or(0))
    }
}

impl From<Duration> for Nanos {
    fn from(duration: Duration) -> Self {
        Self(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX))
    }
}
