//! When a snapshot is made: after so many entries as the swarm's settings say, from the next entry on.
//!
//! openraft's own policy is fixed when it starts, so it has none.

use openraft::Raft;
use skep_manager_core::swarm;
use tokio::sync::watch;

use super::feed::Published;
use super::leadership::Metrics;
use super::machine::Machine;
use super::options::Compaction;
use super::types::TypeConfig;

/// Runs until this manager stops.
pub(crate) async fn run(
    raft: Raft<TypeConfig, Machine>,
    metrics: Metrics,
    mut published: watch::Receiver<Published>,
    compaction: Compaction,
) {
    // One that is being made is not asked for again.
    let mut asked_at = 0;
    while published.changed().await.is_ok() {
        let (applied, interval) = {
            let published = published.borrow_and_update();
            let interval = swarm::snapshot_interval(&published.state);
            let applied = published.applied.map_or(0, |log_id| log_id.index);
            (applied, interval.unwrap_or(compaction.entries))
        };
        let made_at = metrics.borrow().snapshot.map_or(0, |log_id| log_id.index);
        if applied < made_at.max(asked_at).saturating_add(interval) {
            continue;
        }
        asked_at = applied;
        if raft.trigger().snapshot().await.is_err() {
            return; // Raft has ended.
        }
    }
}
