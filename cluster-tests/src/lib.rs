//! The end-to-end ring: real daemons in a laboratory, and what tests of it need.
//!
//! A test starts a [`Lab`], runs the client on its nodes, ends, cuts and starts them, sends
//! [`Load`] through them, and waits for conditions with [`wait_until`]. Failing tests leave nothing:
//! a lab is removed when it is dropped, and by its watchdog when the test process dies.
//!
//! ```no_run
//! use skep_cluster_tests::{Lab, LabOptions, is_root_or_skip, wait_until};
//! use std::time::Duration;
//!
//! if is_root_or_skip() {
//!     let lab = Lab::start(LabOptions::default());
//!     lab.kill(&["n5"]);
//!     wait_until(Duration::from_secs(30), "n5 is down", || {
//!         let nodes = lab.node("n1").skep(&["node", "ls", "--format", "json"]).ok().json_lines();
//!         let is_down = nodes.iter().any(|n| n["Hostname"] == "n5" && n["Status"] == "Down");
//!         (is_down.then_some(()), format!("{nodes:?}"))
//!     });
//! }
//! ```
//!
//! # Invariants
//!
//! - At most two labs run on the machine at a time, whichever processes started them.
//! - Nothing here sleeps in the hope that something is done by then: every wait has a condition, a
//!   deadline, and a message that shows what was seen last.
//! - A test that needs root is skipped with a printed reason, but fails where `CI=true`.

mod archives;
mod busy;
mod call;
mod command;
mod direct;
mod follow;
mod history;
mod lab;
mod leaks;
pub mod linear;
mod load;
mod machine;
mod metrics;
mod page;
mod swarm;
mod wait;

pub use archives::{BUSYBOX, busybox_root, docker_archive, pack, sha256};
pub use busy::Busy;
pub use call::{Answer, CERTIFICATES, Caller, Message, call};
pub use command::{Output, skep_binary};
pub use direct::{Direct, NoAnswer};
pub use follow::Running;
pub use history::{Clients, History};
pub use lab::{Lab, LabOptions, Node};
pub use leaks::{LabTraces, NodeTraces};
pub use load::{HeldConnection, Load, LoadOptions, Record, Report, Summary};
pub use metrics::daemon_with_metrics;
pub use page::Page;
pub use swarm::{SETTLES_WITHIN, TaskRow, Tasks, WHOAMI, Whoami, whoami_archive};
pub use wait::{has_docker_or_skip, is_long, is_root_or_skip, step, wait_until};
