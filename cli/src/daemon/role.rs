//! A node that is given another part in its swarm: `node promote` and `node demote` as it sees them.
//!
//! # Invariants
//!
//! - The certificate decides: a node plays the part that its certificate is for.
//! - A Raft id is made for one promotion, and never used again.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result};
use skep_common::spec::NodeRole;

use super::machine::Machine;
use super::node::Node;
use super::record::RecordFile;
use super::resume;

/// Between attempts that failed.
const RETRY: Duration = Duration::from_secs(1);

/// Waits until the leader gives this node another part than its certificate is for.
pub(super) async fn differs(node: &Node) {
    let mut told = node.managers.told_role();
    let is_other = |told: &String| !told.is_empty() && told != node.role.name();
    if told.wait_for(is_other).await.is_err() {
        return std::future::pending().await; // The node ends.
    }
    if node.has_tried_role.swap(true, Ordering::Relaxed) {
        tokio::time::sleep(RETRY).await;
    }
}

/// Gets a certificate for the part, and takes it up.
pub(super) async fn change(machine: &Machine, node: &Node) {
    match prepare(machine, node).await {
        Ok(true) => {
            tracing::info!(role = node.tls.subject().role.name(), "this node has another part now");
            node.stop().await;
            node.release().await;
            if let Err(error) = forget_log(machine, node) {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the log of the manager that this node was is left on its disk"
                );
            }
            resume::resume(machine).await;
        }
        Ok(false) => {} // The managers have changed their minds; the leader tells.
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "this node cannot take up its new part yet; it is tried again"
            );
        }
    }
}

/// Whether this node holds a certificate for another part now.
async fn prepare(machine: &Machine, node: &Node) -> Result<bool> {
    let options = &machine.inner.options;
    if node.role == NodeRole::Worker {
        // What an earlier part has left must not be taken for this one's.
        remove_log(&options.data_dir)?;
        RecordFile::in_data_dir(&options.data_dir).update(|record| {
            record.raft_id = Some(rand::random());
            record.is_voter = false;
        })?;
    }
    let renewed = node.identity.renew(&node.managers, &node.pool).await;
    renewed.map_err(|why| anyhow::anyhow!("no certificate for it: {why}"))?;
    Ok(node.tls.subject().role != node.role)
}

fn forget_log(machine: &Machine, node: &Node) -> Result<()> {
    if node.role == NodeRole::Worker {
        return Ok(()); // It has none, or that of its new part.
    }
    let data_dir = &machine.inner.options.data_dir;
    RecordFile::in_data_dir(data_dir).update(|record| {
        record.raft_id = None;
        record.is_voter = false;
    })?;
    remove_log(data_dir)
}

fn remove_log(data_dir: &Path) -> Result<()> {
    let path = data_dir.join("raft");
    match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
