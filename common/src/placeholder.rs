//! Templates in a service's spec, and in its secrets and configs, filled in for each task.
//!
//! Source: SwarmKit `template/context.go`, `template/expand.go`.

use serde_json::json;

use crate::template::{Error, Functions, Template};
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
    expand_with(text, task, node, &|_, _| None)
}

/// The same with more functions.
pub fn expand_with(
    text: &str,
    task: &Task,
    node: &NodeFacts,
    functions: Functions<'_>,
) -> Result<String, Error> {
    if !text.contains("{{") {
        return Ok(text.to_owned());
    }
    let context = json!({
        "Service": {
            "ID": task.service_id.to_string(),
            "Name": task.service_name,
            "Labels": task.service_labels.clone().unwrap_or_default(),
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
    });
    Template::parse(text)?.render_with(&context, functions)
}
