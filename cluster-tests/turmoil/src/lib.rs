//! Managers in virtual time: the product's own consensus, log, control API and leader's loop, each manager on a
//! simulated machine, over gRPC on a simulated network. The same seed draws the same faults.
//!
//! It is the outer of two rings. The inner one (`cluster-tests/simulation`) has a model of the log and repeats
//! bit for bit; this one has the real one, and repeats as far as the libraries below it do.
//!
//! The managers change while all this goes on: machines join, and managers are demoted, leave and are removed.
//!
//! Reading order: [`mod@run`] (phases and faults), `fault`, `machines` (who is in the swarm), `host` (a manager), `disk`,
//! `network`, `client`, `operator` (who changes the managers), `ledger` (what must hold), [`history`] (whether clients
//! could tell the managers from one).
//!
//! # Invariants checked
//!
//! By their numbers in the other ring:
//!
//! - 1: what was acknowledged is there in the end, nothing goes back, clients' operations are linearizable, and
//!   a crash never leaves data that a manager cannot start with.
//! - 9: a term has one leader, whoever the voters are, and never one that was taken out before; nothing decided in a
//!   term is written after what was decided in a later one.
//! - 10: managers have equal states at equal versions, after snapshots and restarts too.
//! - 12: when faults end, the managers come to rest: on each of them the voters of the log are the managers of the
//!   state, and every role that was acknowledged is so. Then every write through every manager succeeds within a
//!   bound, so does every change of the managers, none is refused, and no term ends by itself, though managers that
//!   were taken out go on for a while.

mod client;
mod disk;
mod fault;
pub mod history;
mod host;
mod ledger;
mod machines;
mod network;
mod operator;
mod panics;
pub mod run;

pub use ledger::Counts;
pub use run::{Options, Report, run};
