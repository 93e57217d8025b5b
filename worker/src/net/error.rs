//! What can fail in the node's network.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnet::Ipv4Net;
use skep_common::NetworkId;
use skep_worker_core::mesh;

use super::channel::Refusal;

/// Does each of what is to be removed, whatever fails, and returns the first failure.
pub(super) fn first_failure(
    removed: impl IntoIterator<Item = Result<(), Error>>,
) -> Result<(), Error> {
    removed.into_iter().fold(Ok(()), Result::and)
}

/// Why the node's network could not be brought to what was asked.
///
/// Nothing is half-owned after an error: the same call may be repeated, and observes again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The table contradicts itself; the node keeps what it has.
    #[error("failed to put mesh table {version} into effect")]
    Table {
        /// The table's version.
        version: u64,
        /// What is wrong with it.
        source: mesh::Error,
    },
    /// The options contradict themselves.
    #[error("failed to set up the routing mesh of node {number}")]
    Options {
        /// The node's number.
        number: u16,
        /// What is wrong with them.
        source: mesh::Error,
    },
    /// The table is for another node or pool than the mesh was started with: restart the mesh.
    #[error("mesh table {version} is for node {given}, but this is {own}")]
    OtherNode {
        /// The table's version.
        version: u64,
        /// The node number and pool in the table.
        given: String,
        /// The node number and pool that the mesh was started with.
        own: String,
    },
    /// Addresses of tasks would hide addresses of the host's network. Remedy: another pool.
    #[error("the address pool {pool} overlaps the route to {route} {through}; choose another pool")]
    PoolOverlap {
        /// The pool as configured.
        pool: Ipv4Net,
        /// The host's route.
        route: Ipv4Net,
        /// The interface of that route, in words.
        through: String,
    },
    /// Marks are a field of 12 bits within 32.
    #[error("a 12-bit field of packet marks cannot start at bit {shift}; the highest is 20")]
    MarkField {
        /// The bit that the field was to start at.
        shift: u32,
    },
    /// The interface that carries the underlay does not exist.
    #[error("the underlay interface {interface} does not exist")]
    NoInterface {
        /// Its name as configured.
        interface: String,
    },
    /// Something else has an interface with one of our names. Remedy: remove or rename it.
    #[error("interface {interface} exists and is not a {kind}; it was not made by skep")]
    ForeignInterface {
        /// Its name.
        interface: String,
        /// What it should be.
        kind: &'static str,
    },
    /// Another daemon drives the mesh of this node.
    #[error("another process holds the lock {path}; only one daemon may run the mesh of a node")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The container ended before it was attached.
    #[error("the container of task {task_id} (pid {pid}) is gone")]
    ContainerGone {
        /// The task.
        task_id: String,
        /// The process that was to be its container.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A container in the node's own namespace has no uplink of its own.
    #[error("the container of task {task_id} (pid {pid}) is in the node's own network namespace")]
    HostNetwork {
        /// The task.
        task_id: String,
        /// Its container's process.
        pid: u32,
    },
    /// The address is outside of the node's slice, or the node's own.
    #[error("task {task_id} cannot have address {address}: it is not a task address of {slice}")]
    NotATaskAddress {
        /// The task.
        task_id: String,
        /// The address that it was to have.
        address: Ipv4Addr,
        /// The node's slice.
        slice: Ipv4Net,
    },
    /// The leader names a network only to nodes that have tasks on it, and before these tasks.
    #[error("network {network_id} is not known on this node")]
    NetworkUnknown {
        /// The network.
        network_id: NetworkId,
    },
    /// Going on would send in clear what users want hidden.
    #[error("network {network} cannot be encrypted on this node: {reason}")]
    Encryption {
        /// The network's name.
        network: String,
        /// What is missing.
        reason: String,
    },
    /// The kernel refused a change or a question.
    #[error("failed to {action}")]
    Kernel {
        /// What was asked of it.
        action: String,
        /// Its answer.
        source: Refusal,
    },
    /// Other programs changed the rules each time while ours were being written.
    #[error("the host's nftables rules kept changing during {attempts} attempts to write ours")]
    Contended {
        /// How often it was tried.
        attempts: u32,
    },
    /// A file operation failed.
    #[error("failed to {action} {path}")]
    File {
        /// The verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A dedicated thread ended by a bug, which stands in the log.
    #[error("the network thread {name} has ended")]
    ThreadGone {
        /// The thread's name.
        name: &'static str,
    },
}

impl Error {
    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::File { action, path: path.into(), source }
    }

    pub(super) fn kernel(action: impl Into<String>, source: impl Into<Refusal>) -> Self {
        Self::Kernel { action: action.into(), source: source.into() }
    }
}
