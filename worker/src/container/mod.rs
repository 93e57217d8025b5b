//! Runs containers: one shim process per container, and the daemon's handle on them.
//!
//! ```text
//!  daemon                    shim (skep shim --dir DIR)              container
//!  create ──spawn──────────► unshare, overlay, libcontainer ───────► init waits
//!         ◄──created, pid──                                          (network is attached)
//!  start  ──"start"────────► ──────────────────────────────────────► exec
//!         ◄──started──────── poll: SIGCHLD, stdout, stderr ◄──────── output
//!  wait   ◄──pidfd────────── exit.json, cgroup removed, ends
//! ```
//!
//! The shim is this program, executed again: libcontainer clones without `exec` and would deadlock
//! in the multi-threaded daemon. It outlives the daemon, which finds it again by directory, pid and
//! start time ([`ContainerRuntime::adopt`]).
//!
//! # Reading order
//!
//! [`runtime`] (the API), [`shim`] (what runs beside each container), [`exec_in`] (health checks),
//! [`logs`]; beneath them `dirs`, `protocol`, `payloads`, `cgroup`, `host`.
//!
//! # Invariants
//!
//! - What exists of a container is written down before it exists: a daemon that is killed at any
//!   point finds and removes the rest.
//! - A shim whose daemon goes away before `start` removes the container and everything of it.
//! - Secrets and configs go from daemon to shim by their socket, and into the container's tmpfs: no file
//!   elsewhere has them.
//! - `exit.json` is written once, by the shim, before it ends. A shim that ended without it died
//!   uncleanly: its container is lost, and what is left of it is killed through its cgroup.
//! - Nothing waits by sleeping but the bounded retry of a cgroup that the kernel calls busy.

pub mod cgroup;
mod dirs;
mod error;
pub mod exec_in;
pub mod host;
pub mod logs;
mod payloads;
mod process;
mod protocol;
mod rootfs;
pub mod runtime;
pub mod shim;

pub use error::Error;
pub use exec_in::exec_in_main;
pub use logs::{LogOptions, LogPosition, LogReader, LogRecord, Stream};
pub use runtime::{
    Adopted, AdoptedState, ContainerConfig, ContainerRuntime, Created, ExecOutcome, ExitStatus,
    Options,
};
pub use shim::shim_main;
