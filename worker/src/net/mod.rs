//! Network effects of a node: everything here changes the kernel's state.
//!
//! [`mesh`] is the routing mesh: published ports, the tunnel between nodes, and the uplinks of
//! tasks. [`nft`] speaks nfnetlink, [`rtnetlink`] routing netlink, both over [`channel`]; no
//! external program and no C library is involved. [`thread`] holds the dedicated threads on which
//! all of that blocks.
//!
//! # Invariants
//!
//! - No tokio worker ever changes its network namespace, and none waits on a netlink socket.
//! - What to do is decided in `skep_worker_core`; this module observes, asks there, and acts.

pub mod channel;
mod error;
pub mod mesh;
pub mod nft;
mod probe;
pub mod rtnetlink;
pub mod sysctl;
pub mod thread;

pub use error::Error;
pub use mesh::{Applied, Condition, MarkField, Mesh, Options, Program};
pub use probe::probe;
