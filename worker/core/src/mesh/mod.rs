//! The routing mesh as data: what the kernel of one node must hold so that every published port
//! of the cluster answers there.
//!
//! The manager sends a [`MeshTable`]: who is in the cluster, which ports are published and which
//! healthy tasks stand behind them. [`Objects::of`] translates it into kernel objects, and
//! [`diff`] into the operations that lead from one table to the next. The shell
//! (`skep_worker::net`) observes the kernel, plans with [`Objects::diff`], and carries the
//! operations out.
//!
//! ```text
//! MeshTable ──Objects::of──► wanted ─┐
//! kernel ──────observe────► present ─┴─Objects::diff──► [Op] ──► netlink
//! ```
//!
//! # Reading order
//!
//! [`MeshTable`] (input), [`Slices`] and [`twin`] (address arithmetic), [`Objects`] and [`Op`] (output),
//! [`Flows`] (what the kernel must forget of flows that have no end of their own), [`Ejections`] (which
//! backends the node goes without because it saw them fail), [`relays`] (ports that the daemon serves instead of
//! the kernel).
//!
//! # Invariants
//!
//! - A port whose backends did not change is named by no operation. The kernel counts the
//!   round-robin per rule, so rewriting a rule would start its count again.
//! - A peer's way back is added before anything is sent to it, and deleted after everything that
//!   refers to it: routing operations that add come first, then all rules (one atomic batch), then
//!   routing operations that delete.
//! - Order never comes from hashing; equal tables give equal operations in equal order.
//! - Planning on the result of its own operations gives nothing.
//!
//! Absent on purpose: I/O, interface names, marks and table numbers, which belong to the shell.

mod address;
mod ejection;
#[cfg(test)]
mod ejection_tests;
mod flows;
mod objects;
mod policy;
mod proxy_protocol;
mod relays;
mod table;
#[cfg(test)]
mod tests;
mod twin;

pub use address::{Mac, NODE_NUMBER_MAX, Slices, interface_name};
pub use ejection::{Change, Ejections, Outcome, PATIENCE, Reason, Times, leave_out};
pub use flows::{Flows, lost_backends};
pub use objects::{Endpoint, Objects, Op, PortKey, RouteKey, RouteTable, diff};
pub use policy::prefer_local;
pub use proxy_protocol::proxy_header;
pub use relays::{
    Admission, Gate, Passage, Relay, Target, Turns, Verdict, in_rules, relays, user_space_relays,
};
pub use table::{Backend, Daemon, Error, MeshTable, Peer, Protocol, PublishedPort};
pub use twin::{of_twin, twin, twin_net};
