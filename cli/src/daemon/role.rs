//! A node that is given another role in its swarm: `node promote` and `node demote` as it sees them.
//!
//! # Invariants
//!
//! - The certificate decides: a node plays the role that its certificate is for.
//! - A Raft id is made for one promotion, and never used again. Its log is emptied only once nothing starts with the
//!   id any more.
//! - A manager begins anew only where a manager that has read all that was acknowledged says that the Raft id does not
//!   count: what the leader tells with a session only has it ask.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result};
use skep_common::spec::NodeRole;
use skep_worker::agent::ToldRole;

use super::machine::Machine;
use super::node::Node;
use super::record::RecordFile;
use super::resume;

/// Between attempts that failed.
const RETRY: Duration = Duration::from_secs(1);

/// Whether the leader tells a node of `role`, a manager by that Raft id, that it is to begin another role.
fn is_news(role: NodeRole, raft_id: Option<u64>, told: &ToldRole) -> bool {
    is_other_role(role, told) || is_over(role, raft_id, told.raft_id)
}

fn is_other_role(role: NodeRole, told: &ToldRole) -> bool {
    !told.role.is_empty() && told.role != role.name()
}

/// Whether a manager was taken out of the Raft group, though it is to be a manager: it was demoted and promoted
/// again before it heard of the first.
fn is_over(role: NodeRole, raft_id: Option<u64>, current: Option<u64>) -> bool {
    let own = raft_id.filter(|_| role == NodeRole::Manager);
    own.is_some_and(|own| skep_manager::is_over(own, current))
}

/// Waits until the leader gives this node another role than it plays. It is asked of members only, which have
/// ended their joining.
pub(super) async fn differs(node: &Node) {
    let mut told = node.managers.told_role();
    loop {
        let is_news = |told: &ToldRole| is_news(node.role, node.record.raft_id, told);
        let heard = told.wait_for(is_news).await.map(|told| is_other_role(node.role, &told));
        let Ok(is_urgent) = heard else {
            return std::future::pending().await; // The node ends.
        };
        if !node.has_tried_role.swap(true, Ordering::Relaxed) && is_urgent {
            return;
        }
        // What the leader tells comes a moment after the end of a joining, too.
        tokio::time::sleep(RETRY).await;
        if is_news(&told.borrow()) {
            return;
        }
    }
}

/// Gets a certificate for the role, and takes it up.
pub(super) async fn change(machine: &Machine, node: &Node) {
    match prepare(machine, node).await {
        Ok(true) => {
            let role = node.tls.subject().role;
            if role == node.role {
                tracing::info!(
                    "this manager was taken out of the others' group: it joins them anew"
                );
            } else {
                tracing::info!(role = role.name(), "this node has another role now");
            }
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
                "this node cannot take up its new role yet; it is tried again"
            );
        }
    }
}

/// Whether this node is to begin another role: it holds a certificate for one now, or its membership is over.
async fn prepare(machine: &Machine, node: &Node) -> Result<bool> {
    if node.role == NodeRole::Worker {
        begin_manager(&machine.inner.options.data_dir)?;
    }
    let renewed = node.identity.renew(&node.managers, &node.pool).await;
    let current = renewed.map_err(|why| anyhow::anyhow!("no certificate for it: {why}"))?;
    let role = node.tls.subject().role;
    Ok(role != node.role || is_over(role, node.record.raft_id, current))
}

/// Writes down the Raft id of a manager that begins: with an empty log, since what an earlier role has left must
/// not be taken for this one's.
pub(super) fn begin_manager(data_dir: &Path) -> Result<()> {
    remove_log(data_dir)?;
    RecordFile::in_data_dir(data_dir).update(|record| {
        record.raft_id = Some(rand::random());
        record.is_voter = false;
    })
}

fn forget_log(machine: &Machine, node: &Node) -> Result<()> {
    if node.role == NodeRole::Worker {
        return Ok(()); // It has none, or that of its new role.
    }
    // In this order: a Raft id whose log is gone never votes again.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::record::NodeRecord;

    #[test]
    fn a_manager_begins_anew_once_the_leader_says_another_raft_id_or_none() {
        use NodeRole::{Manager, Worker};
        for (role, raft_id, told, current, expect) in [
            (Manager, Some(7), "manager", Some(7), false),
            (Manager, Some(7), "manager", Some(0), true),
            (Manager, Some(7), "manager", Some(8), true),
            (Manager, Some(7), "manager", None, false), // The leader is of before it says so.
            (Manager, Some(7), "", None, false),
            (Manager, Some(7), "worker", None, true),
            (Worker, None, "worker", Some(0), false),
            (Worker, Some(7), "worker", Some(0), false), // Of a promotion that came to nothing.
            (Worker, Some(7), "manager", Some(0), true),
        ] {
            let told = ToldRole { role: told.to_owned(), raft_id: current };
            assert_eq!(is_news(role, raft_id, &told), expect, "{role:?} {raft_id:?} {told:?}");
        }
    }

    #[test]
    fn a_manager_begins_with_another_raft_id_and_no_log() {
        let directory = tempfile::tempdir().unwrap();
        let file = RecordFile::in_data_dir(directory.path());
        let before = NodeRecord { raft_id: Some(7), is_voter: true, ..NodeRecord::default() };
        file.store(&before).unwrap();
        std::fs::create_dir(directory.path().join("raft")).unwrap();
        begin_manager(directory.path()).unwrap();
        let record = file.load().unwrap();
        assert!(record.raft_id.is_some_and(|raft_id| raft_id != 7) && !record.is_voter);
        assert!(!directory.path().join("raft").exists());
    }
}
