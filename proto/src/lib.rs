//! The wire contract, compiled from `proto/skep.proto`, where the comments are.

#![allow(
    missing_docs,
    clippy::all,
    clippy::too_many_lines,
    reason = "generated: the .proto file has the comments"
)]

tonic::include_proto!("skep.v1");

/// Metadata of an UNAVAILABLE answer: the leader's `ip:port`.
pub const LEADER_METADATA: &str = "skep-leader";
/// Metadata of a request for a session: the `ip:port` of a leader that the agent has lost. A manager that knows of no
/// other one does not answer at once, but when it does.
pub const LOST_METADATA: &str = "skep-lost";
/// Metadata of a refusal: the node was removed from its swarm.
pub const REMOVED_METADATA: &str = "skep-removed";

/// The compiled descriptor of every service and message: what the access table is tested against.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
