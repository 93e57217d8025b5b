//! Which roots nodes are told to trust, and when they are told to get another certificate.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use skep_common::{NodeId, Timestamp};
use skep_manager_core::{State, rotation};

/// Nodes that are told to renew at once. SwarmKit's `IssuanceStateRotateMaxBatchSize`.
const BATCH: usize = 30;
/// Between two batches: signing is work, and the managers have other work. SwarmKit's value.
const BATCH_PERIOD: Duration = Duration::from_secs(3);
/// A node that has no new certificate after this time is told again.
const PATIENCE: Duration = Duration::from_secs(30);

/// What every node is told of the roots. Clones are the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Trust {
    /// The roots, PEM.
    pub(super) pem: Bytes,
    /// The root that signs, PEM: with another one, grants are signed anew.
    pub(super) signer: Arc<str>,
}

impl Trust {
    pub(super) fn of(state: &State) -> Self {
        let Some(cluster) = state.cluster() else { return Self::default() };
        let pem = Bytes::from(rotation::trust(cluster));
        Self { pem, signer: rotation::signing(cluster).0.into() }
    }
}

/// Which nodes were told to renew.
#[derive(Debug, Default)]
pub(super) struct Renewals {
    asked: BTreeMap<NodeId, Timestamp>,
    next_at: Timestamp,
}

impl Renewals {
    /// The nodes to tell now, of those with a session.
    pub(super) fn due<'a>(
        &mut self,
        state: &State,
        open: impl Iterator<Item = &'a NodeId>,
        now: Timestamp,
    ) -> Vec<NodeId> {
        let cluster = state.cluster().filter(|cluster| cluster.root_rotation.is_some());
        let Some(cluster) = cluster else {
            *self = Self::default();
            return Vec::new();
        };
        if now < self.next_at {
            return Vec::new();
        }
        let is_due = |node_id: &&NodeId| {
            let asked = self.asked.get(*node_id);
            let node = state.node(**node_id);
            asked.is_none_or(|at| now >= at.after(PATIENCE))
                && node.is_some_and(|node| rotation::is_renewal_due(cluster, node))
        };
        let due: Vec<NodeId> = open.filter(is_due).take(BATCH).copied().collect();
        if !due.is_empty() {
            self.next_at = now.after(BATCH_PERIOD);
        }
        self.asked.extend(due.iter().map(|node_id| (*node_id, now)));
        due
    }
}
