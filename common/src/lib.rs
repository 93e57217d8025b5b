//! Domain values that every part of skep shares, without I/O, clocks or randomness of their own.
//!
//! Reading order: [`id`] and [`time`], then [`task_state`], then [`spec`] (what the user asks) and
//! [`object`] (spec, bookkeeping and status together), then [`serving`] and [`limits`].
//!
//! Specs and objects are the product's one data model: their JSON form has Docker's field names,
//! so that it serves the client, the Raft log and the Docker API alike. A field that skep does not
//! act on yet is kept in `extra` and given back as it came.

pub mod compose;
pub mod id;
pub mod limits;
pub mod mistakes;
pub mod object;
pub mod placeholder;
pub mod serving;
pub mod spec;
pub mod task_state;
pub mod template;
pub mod time;
pub mod wireguard;

pub use id::{
    ClusterId, ConfigId, ImageId, NetworkId, NodeId, SecretId, ServiceId, StackId, TaskId,
};
pub use object::{
    Cluster, Image, Kind, Meta, Network, Node, Object, Service, Stack, Task, Version,
};
pub use task_state::TaskState;
pub use time::Timestamp;
