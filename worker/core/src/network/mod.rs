//! Overlay networks as data: what the kernel of one node must hold so that tasks of a network reach each
//! other and the addresses of services, wherever they are.
//!
//! Managers send [`NetworkTables`]: for each network that this node has tasks on, its endpoints on all
//! nodes and its services. They are translated into two kinds of kernel objects, each with the
//! operations between two sets of them: [`Reach`] (the tunnel of a network: where tasks of other nodes
//! are) and [`Vips`] (the rules in each container: which backends a service's address stands for), which a
//! [`Balance`] derives for all containers of a network. The shell (`skep_worker::net::network`) observes the kernel, plans with `diff`, and acts.
//!
//! # Invariants
//!
//! - Nothing is flooded or learned: what is not in the table is not reached.
//! - A virtual address whose backends did not change is named by no operation: rewriting its rule would
//!   start its turns again.
//! - Planning on the result of its own operations gives nothing.

mod reach;
mod secure;
mod table;
#[cfg(test)]
mod tests;
mod vips;

pub use reach::{Reach, ReachOp};
pub use secure::{SecurePeer, are_any_encrypted, nodes_without_key, secure_nodes, secure_peers};
pub use table::{EndpointEntry, NamedPort, NetworkTable, NetworkTables, ServiceEntry};
pub use vips::{Balance, Connection, Peers, VipOp, Vips, in_turn};
