//! A whole swarm under one seed, with faults: the control plane's cores, its dispatcher's protocol and a model
//! of the replicated log, in virtual time and in one thread.
//!
//! The same seed gives the same run, bit for bit. A run has a rough phase, in which faults and wishes come at
//! random, and a calm one, in which everything must come to rest and an update must keep its promise. All
//! the while invariants are shown what happens.
//!
//! Reading order: [`mod@run`], `world`, `managing` and `working` with `leader`, `replica` (on its `log`) and `agent`, `role`
//! and `changing` (who is a manager), `upgrade` (which program a machine has), `trouble` with [`fault`] and
//! `client`, `invariants`; [`seeds`].

mod agent;
mod changing;
mod client;
pub mod fault;
mod invariants;
mod leader;
mod log;
mod machine;
mod managing;
mod membership;
mod message;
mod network;
mod queue;
mod replica;
mod role;
pub mod run;
pub mod seeds;
mod seen;
mod service;
mod trace;
mod trouble;
mod upgrade;
mod working;
mod world;

pub use run::{Counts, Options, Report, run};
