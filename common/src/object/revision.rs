//! What a service was before.

use serde::{Deserialize, Serialize};

use super::{Meta, Version};
use crate::spec::ServiceSpec;
use crate::{ServiceId, Timestamp};

/// A spec that a service had. Its number is never given again.
///
/// Not answered by lists and watches: a service's history is asked for by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Revision {
    /// The service.
    #[serde(rename = "ServiceID")]
    pub service_id: ServiceId,
    /// From 1, in order of time.
    pub number: u64,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// The spec.
    pub spec: ServiceSpec,
    /// The version that the tasks of this spec carry.
    pub spec_version: Version,
    /// When another spec took its place, by the proposer's clock.
    pub replaced_at: Timestamp,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct JobStatus {
    /// Version of the change that began it anew; its tasks carry it.
    pub job_iteration: Version,
    /// When that was, by the proposer's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_execution: Option<Timestamp>,
}
