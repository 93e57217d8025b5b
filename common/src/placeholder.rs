//! Templates in a service's spec, filled in for each task: host name and environment.
//!
//! Source: SwarmKit `template/context.go`, `template/expand.go`.

use serde_json::json;

use crate::template::{Error, Template};
use crate::{NodeId, Task};

/// What the templates of a service may ask of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its id.
    pub node_id: NodeId,
    /// Its host name.
    pub hostname: String,
    /// Processor architecture, as `uname -m` says.
    pub architecture: String,
}

/// Fills a text in for a task on a node.
pub fn expand(text: &str, task: &Task, node: &NodeFacts) -> Result<String, Error> {
    if !text.contains("{{") {
        return Ok(text.to_owned());
    }
    Template::parse(text)?.render(&json!({
        "Service": {
            "ID": task.service_id.to_string(),
            "Name": task.service_name,
            "Labels": {},
        },
        "Node": {
            "ID": node.node_id.to_string(),
            "Hostname": node.hostname,
            "Platform": { "OS": "linux", "Architecture": node.architecture },
        },
        "Task": {
            "ID": task.id.to_string(),
            "Name": task.container_name(),
            "Slot": task.slot_key().to_string(),
        },
    }))
}
