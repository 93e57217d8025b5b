//! What a task stands for within its service: where one ends, another takes the same place.

use std::fmt;

use crate::NodeId;

/// A task's place in its service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// A replica by its number.
    Replica(u64),
    /// The one task of a node.
    Node(NodeId),
}

impl Slot {
    /// The first in order.
    pub const FIRST: Self = Self::Replica(0);
    /// The last in order.
    pub const LAST: Self = Self::Node(NodeId(u128::MAX));

    /// The number that a task has in this place; 0 where a node names it.
    pub fn number(self) -> u64 {
        match self {
            Self::Replica(number) => number,
            Self::Node(_) => 0,
        }
    }

    /// The node whose only task this is.
    pub fn node(self) -> Option<NodeId> {
        match self {
            Self::Replica(_) => None,
            Self::Node(node_id) => Some(node_id),
        }
    }
}

/// As in names of tasks: the replica's number, or the node's id.
impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replica(number) => number.fmt(f),
            Self::Node(node_id) => node_id.fmt(f),
        }
    }
}
