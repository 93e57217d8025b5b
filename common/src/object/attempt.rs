//! What a node tried while no manager led.

use serde::{Deserialize, Serialize};

use crate::Timestamp;

/// A container of a task that ended, and that its node followed by another one of the same task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Attempt {
    /// The container's id on the node.
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
