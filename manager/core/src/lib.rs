//! Every decision of the control plane, without I/O, clocks, tokio or Raft.
//!
//! Reading order: [`command`] (what can be asked of the store), [`store`] (the replicated tables and
//! the one function that changes them), [`plan`](mod@plan) (one pass of all control loops) and what
//! it drives: `orchestrator`, [`scheduler`], [`allocator`], `reaper`. Beside it: [`explain`] (why tasks wait), [`whatif`] (what a change would do), [`liveness`] (which
//! nodes are alive), [`assignments`] and [`endpoints`] (what nodes are told), [`service`], [`stack`],
//! [`container`], [`secrets`], [`swarm`], [`rotation`], [`validate`] and [`ports`] (what becomes of requests), [`image`]
//! (what names mean).

pub mod claims;
pub mod command;
pub mod store;

pub mod plan;
#[cfg(test)]
mod plan_tests;

pub mod allocator;
pub mod assignments;
mod by_id;
pub mod conditions;
pub mod constraint;
pub mod container;
pub mod description;
pub mod endpoints;
pub mod events;
pub mod explain;
mod fork;
pub mod image;
pub mod kept_out;
pub mod level;
pub mod liveness;
pub mod network;
pub mod orchestrator;
mod placed;
pub mod ports;
pub mod quorum;
mod reaper;
pub mod recovery;
pub mod reports;
pub mod roles;
pub mod rotation;
pub mod scheduler;
pub mod secrets;
pub mod service;
pub mod stack;
pub mod swarm;
pub mod validate;
pub mod whatif;

#[cfg(test)]
mod simulation;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use command::{Action, Command, Expect, Outcome, Refusal, TaskPatch};
pub use plan::{Dirty, LeaderMemory, Options, Plan, plan};
pub use reaper::remove_node;
pub use scheduler::{RuledOut, node_name};
pub use store::{Change, State};
