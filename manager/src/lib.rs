//! The replicated control plane: what a manager runs beside its worker.
//!
//! Reading order: [`manager`] (how the parts are put together), [`consensus`], [`control`] (what clients
//! ask), [`join`] (certificates and membership), `register` (who is refused), `reach` (which managers answer),
//! [`dispatcher`] (the agents' sessions), [`leader`] (the one loop that drives the pure core while this manager
//! leads), [`raft_rpc`], [`recovery`] (a manager that goes on alone).

mod address;
pub mod consensus;
pub mod control;
pub mod dispatcher;
pub mod join;
pub mod leader;
mod lock;
pub mod manager;
pub mod raft_rpc;
mod reach;
pub mod recovery;
mod register;
mod roles;
pub mod space;

pub use manager::{Manager, ManagerOptions, NewSwarm};
pub use skep_manager_core::command::FORMAT_LEVEL;
pub use skep_manager_core::roles::is_over;
pub use skep_manager_core::{State, swarm};
