//! Which role a node has in the swarm, as it is told.

use skep_common::Node;
use skep_manager_core::roles;

/// What a node is told: it gets a certificate for the role and plays it, and is a manager by that Raft id alone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Role {
    /// `worker` or `manager`.
    pub(super) name: String,
    /// What [`roles::raft_id_of`] says.
    pub(super) raft_id: u64,
}

impl Role {
    pub(super) fn of(node: &Node) -> Self {
        Self { name: node.observed_role().name().to_owned(), raft_id: roles::raft_id_of(node) }
    }
}
