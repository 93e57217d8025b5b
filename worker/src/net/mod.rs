//! Network effects of a node: everything here changes the kernel's state.
//!
//! [`mesh`] is the routing mesh: published ports, the tunnel between nodes, and the uplinks of
//! tasks. [`accounting`] counts what goes through it. [`network`] has the overlay networks, [`secure`]
//! WireGuard for the encrypted ones, [`names`] where containers ask for names, [`loopback`] all that a
//! container without networks has. [`nft`] and [`conntrack`] speak nfnetlink,
//! [`rtnetlink`] routing netlink, all over [`channel`]; no external program and no C library is
//! involved. [`thread`] holds the dedicated threads on which all of that blocks, [`namespace`] how
//! they enter other namespaces. [`path`] probes the way to other nodes.
//!
//! # Invariants
//!
//! - No tokio worker ever changes its network namespace, and none waits on a netlink socket.
//! - What to do is decided in `skep_worker_core`; this module observes, asks there, and acts.

pub mod accounting;
pub mod channel;
pub mod conntrack;
mod error;
mod firewall;
mod free_port;
mod host;
pub mod loopback;
pub mod mesh;
pub mod names;
pub mod namespace;
mod neighbour;
pub mod network;
pub mod nft;
pub mod path;
mod probe;
pub mod rtnetlink;
pub mod secure;
pub mod sysctl;
pub mod thread;
mod veth;

pub use accounting::Accounting;
pub use error::Error;
use error::first_failure;
pub use free_port::free_port;
pub use host::ipv6_addresses;
pub use mesh::{
    Applied, Carrier, Condition, MarkField, Mesh, Options, Passages, Program, host_has_ipv6,
};
pub use network::{Attachment, NetworkOptions, Networks};
pub use probe::{Probed, probe};
