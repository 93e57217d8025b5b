//! Every decision of the control plane, without I/O, clocks, tokio or Raft.
//!
//! Reading order: [`command`] (what can be asked of the store), [`store`] (the replicated tables and
//! the one function that changes them).

pub mod command;
pub mod store;

pub use command::{Action, Command, Expect, Outcome, Refusal, TaskPatch};
pub use store::{Change, State};
