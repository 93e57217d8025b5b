//! Consensus: one replicated log of commands, applied by every manager to its copy of the store.
//!
//! openraft decides who leads and what is committed; this module gives it a log on disk, a state
//! machine and a network, and gives the rest of the manager one handle, [`Consensus`].
//!
//! ```text
//! propose ─► leader ─► log (sealed, fsynced) ─► quorum ─► State::apply ─► Feed, state()
//!    follower ──┘ forwarded                                   │
//!                                                             └─► snapshot (compressed, sealed)
//! ```
//!
//! # Reading order
//!
//! `handle` and `options`; `propose`, `reads`, `membership`, `leadership`, `heard`, `feed` (what callers use); `serve`,
//! `network`, `wire` (between managers); `machine`, `snapshot`, `compaction`, `log`, `lost_tail` (below openraft); `anew` (a swarm with one manager) and `backup`; `codec`,
//! `frame`, `seal`, `disk` (bytes); `chance`.
//!
//! # Invariants
//!
//! - A command is acknowledged when it is durable on a majority and applied.
//! - A command is encoded once; disks and peers get these bytes.
//! - A term has at most one leader, and [`Consensus::propose_as_leader`] writes in its term only.
//! - Memory is bounded: the log's cache, the queues, each feed.
//! - No type of openraft leaves this module.
//!
//! # Sources
//!
//! Ongaro, "Consensus: Bridging Theory and Practice" (leader transfer 3.10, read index 6.4, pre-vote
//! 9.6); openraft 0.10 `docs`; SwarmKit `manager/state/raft`.

pub mod anew;
pub mod backup;
mod chance;
mod codec;
mod compaction;
mod deadline;
mod disk;
mod feed;
mod frame;
mod handle;
mod heard;
mod leadership;
mod log;
mod lost_tail;
mod machine;
pub mod membership;
mod network;
mod options;
pub mod propose;
mod reads;
mod runtime;
mod seal;
mod serve;
mod snapshot;
#[cfg(test)]
mod tests;
mod types;
mod wire;

pub use disk::{Disk, Error as StorageError};
pub use feed::{Commit, Feed};
pub use handle::{BootstrapError, Consensus, ReadError, Status, StopReason};
pub use leadership::{Leader, Leadership};
pub use machine::Unapplicable;
pub use membership::{Error as MembershipError, Member, MemberRole};
pub use network::{CallError, RaftTransport, Superseded};
pub use options::{Compaction, Options, StartError, Timing};
pub use reads::View;
pub use runtime::Threads;
pub use seal::DataKey;
pub use wire::RaftRequest;
