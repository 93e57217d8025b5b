//! The secrets and configs that a node is given.

use skep_common::NodeId;
use skep_manager_core::State;
use skep_proto::SecretAssignment;

/// What the tasks of a node use. Nothing is given to nodes so far.
pub(super) fn payloads(_state: &State, _node_id: NodeId) -> Vec<SecretAssignment> {
    Vec::new()
}
