//! Which part a node has in the swarm, as it is told.

use skep_common::Node;

/// The part that a node is told to have: it gets a certificate for it, and plays it.
pub(super) fn role_of(node: &Node) -> String {
    node.observed_role().name().to_owned()
}
