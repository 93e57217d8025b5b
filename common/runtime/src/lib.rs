//! What every long-running part of skep stands on: clocks, named task sets, node identity and the one
//! port.
//!
//! Reading order: [`clock`], [`task_set`]; [`identity`] (certificates, join tokens, the authority);
//! [`transport`] (TLS on one port, channels to peers); [`access`] (who may call what), [`gate`] (who is let in).

pub mod access;
pub mod clock;
pub mod gate;
pub mod identity;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod sys;
pub mod task_set;
pub mod telemetry;
pub mod transport;

pub use task_set::TaskSet;
