//! What managers know of the bearers of certificates: who was removed, and who is a manager no more.

use std::collections::BTreeSet;
use std::sync::Arc;

use skep_common::spec::NodeRole;
use skep_common::{Kind, NodeId};
use skep_manager_core::{State, kept_out};
use skep_runtime::gate::Register;
use tokio::sync::watch;

use crate::consensus::{Commit, Consensus};

/// Answers by this manager's state.
#[derive(Debug, Clone)]
pub(crate) struct Members {
    consensus: Consensus,
    changes: Arc<watch::Sender<u64>>,
}

impl Members {
    pub(crate) fn new(consensus: Consensus) -> Self {
        Self { consensus, changes: Arc::default() }
    }

    /// Tells of changes for as long as this manager runs.
    pub(crate) async fn follow(self) {
        let mut feed = self.consensus.subscribe();
        let (mut removed, mut managers) = (BTreeSet::new(), BTreeSet::new());
        while let Some(commit) = feed.next().await {
            let mut is_news = follow_managers(&mut managers, &commit);
            let now_removed = removed_of(&commit.state);
            is_news |= removed != now_removed;
            removed = now_removed;
            if is_news {
                self.changes.send_modify(|version| *version += 1);
            }
        }
    }
}

fn removed_of(state: &State) -> BTreeSet<NodeId> {
    state.cluster().into_iter().flat_map(|cluster| cluster.blacklisted.keys().copied()).collect()
}

/// Whether the set of managers is another one now.
fn follow_managers(managers: &mut BTreeSet<NodeId>, commit: &Commit) -> bool {
    let state = &commit.state;
    let is_manager = |node_id: &NodeId| {
        state.node(*node_id).is_some_and(|node| node.observed_role() == NodeRole::Manager)
    };
    if commit.all_changed {
        let now: BTreeSet<NodeId> = state.nodes().keys().copied().filter(is_manager).collect();
        let is_news = *managers != now;
        *managers = now;
        return is_news;
    }
    let changed = commit.changes.iter().filter(|change| change.kind == Kind::Node);
    let mut is_news = false;
    for node_id in changed.map(|change| NodeId(change.id)) {
        is_news |= match is_manager(&node_id) {
            true => managers.insert(node_id),
            false => managers.remove(&node_id),
        };
    }
    is_news
}

impl Register for Members {
    fn is_removed(&self, node_id: NodeId) -> bool {
        kept_out::is_kept_out(&self.consensus.state(), node_id)
    }

    fn role(&self, node_id: NodeId) -> Option<NodeRole> {
        self.consensus.state().node(node_id).map(|node| node.observed_role())
    }

    fn is_current(&self) -> bool {
        self.consensus.is_current()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}
