//! Has this node's key file sealed with the swarm's unlock key, whenever that is another one.

use std::time::Duration;

use skep_common::object::Cluster;
use skep_runtime::identity::{Files, Lock, UnlockKey};
use skep_runtime::telemetry::Chain;
use tokio::sync::watch;

use crate::consensus::Consensus;

/// Between attempts while the disk fails.
const RETRY: Duration = Duration::from_secs(1);

/// Runs for as long as this manager; `kept` is the version of the key that the file has.
pub(crate) async fn follow(consensus: Consensus, files: Files, kept: watch::Sender<u64>) {
    let mut feed = consensus.subscribe();
    while let Some(commit) = feed.next().await {
        let Some(cluster) = commit.state.cluster() else { continue };
        if cluster.unlock_key_version <= *kept.borrow() {
            continue;
        }
        let Some(lock) = wanted(cluster) else {
            tracing::error!("the swarm's unlock key cannot be read: the key file stays as it is");
            continue;
        };
        let version = lock.version;
        while let Err(why) = relock(&files, lock.clone()).await {
            tracing::error!(
                why,
                "failed to seal the key file with the swarm's unlock key, trying again"
            );
            tokio::time::sleep(RETRY).await;
        }
        tracing::info!(
            version,
            is_locked = lock.key.is_some(),
            "the key file follows the swarm's unlock key"
        );
        kept.send_replace(version);
    }
}

fn wanted(cluster: &Cluster) -> Option<Lock> {
    let key = cluster.unlock_key.as_ref().map(|key| UnlockKey::from_bytes(&key.0));
    Some(Lock { version: cluster.unlock_key_version, key: key.transpose().ok()? })
}

async fn relock(files: &Files, lock: Lock) -> Result<(), String> {
    let files = files.clone();
    let sealed = tokio::task::spawn_blocking(move || files.relock(lock)).await;
    let sealed = sealed.map_err(|error| error.to_string())?;
    sealed.map_err(|error| Chain(&error).to_string())
}
