//! Managers in virtual time: the product's own consensus, log, control API and leader's loop, each manager on a
//! simulated machine, over gRPC on a simulated network. The same seed draws the same faults.
//!
//! It is the outer of two rings. The inner one (`cluster-tests/simulation`) has a model of the log and repeats
//! bit for bit; this one has the real one, and repeats as far as the libraries below it do.
//!
//! Reading order: [`run`] (phases and faults), `fault`, `host` (a manager), `disk`, `network`, `client`,
//! `ledger` (what must hold), [`history`] (whether clients could tell the managers from one).
//!
//! # Invariants checked
//!
//! By their numbers in the other ring:
//!
//! - 1: what was acknowledged is there in the end, nothing goes back, clients' operations are linearizable, and
//!   a crash never leaves data that a manager cannot start with.
//! - 9: a term has one leader, and nothing decided in a term is written after what was decided in a later one.
//! - 10: managers have equal states at equal versions, after snapshots and restarts too.
//! - 12: when faults end, every write through every manager succeeds within a bound.

mod client;
mod disk;
mod fault;
pub mod history;
mod host;
mod ledger;
mod network;
mod panics;
pub mod run;

pub use ledger::Counts;
pub use run::{Options, Report, run};
