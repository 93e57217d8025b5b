//! What a node does: runs the tasks that its leader assigns, keeps their images, and answers on every
//! published port of the cluster.
//!
//! ```text
//! session ─► agent ─► Executor (embedded) ─► container: one shim a container
//!              │                        ├──► images: blobs, layers, fetches
//!              └────► Balancers ────────┴──► net: uplinks, routing mesh
//! other nodes ─► peer: blobs and task logs
//! ```
//!
//! # Reading order
//!
//! [`agent`] (the session with the leader and the life of each task), [`executor`] (the seam to what
//! runs containers), [`embedded`] (what stands behind it on real machines); then what that is made of:
//! [`container`], [`images`], [`net`]. [`peer`] is what other nodes may ask, [`passage`] how they connect to tasks; [`sys`] has the system
//! calls that nobody else wraps.
//!
//! # Invariants
//!
//! - The end of the daemon ends no container and no connection: the next daemon observes what is there
//!   and goes on. It never assumes.
//! - What to do is decided in `skep_worker_core`; this package observes, asks there, and acts.
//! - Absent on purpose: any knowledge of Raft, of the store and of other nodes' tasks.

pub mod agent;
pub mod executor;
pub mod executor_none;

pub mod embedded;

pub mod container;
pub mod images;
pub mod net;

pub mod passage;
mod path;
pub mod peer;
pub mod sys;
mod throttle;
