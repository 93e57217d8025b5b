//! A container that is on networks: the rules in it, and the connections it must forget.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::Arc;

use skep_common::{NetworkId, TaskId};
use skep_worker_core::network::{Balance, Vips};

use super::rules::Rules;
use crate::net::Error;
use crate::net::conntrack::Conntrack;
use crate::net::namespace::Home;

/// A container of this node.
#[derive(Debug)]
pub(super) struct Container {
    networks: BTreeSet<NetworkId>,
    rules: Rules,
    connections: Conntrack,
    /// What is in force, once something is, of each of its networks.
    in_force: Option<BTreeMap<NetworkId, Arc<Balance>>>,
}

impl Container {
    /// The container of a task, which is on `networks`.
    pub(super) fn open(
        home: &Home,
        namespace: &File,
        task_id: TaskId,
        networks: BTreeSet<NetworkId>,
    ) -> Result<Self, Error> {
        let open = || (Rules::open(task_id.0), Conntrack::open());
        let (rules, connections) = home.within(namespace, open)?;
        Ok(Self { networks, rules: rules?, connections: connections?, in_force: None })
    }

    /// Brings the rules to those of its networks; looks at the kernel also where nothing changed, if
    /// `is_repair`.
    pub(super) fn converge(
        &mut self,
        balances: &BTreeMap<NetworkId, Arc<Balance>>,
        is_repair: bool,
    ) -> Result<(), Error> {
        // A network that is no longer in the tables has gone with its last endpoint.
        let known = self.networks.iter().filter_map(|id| Some((*id, balances.get(id)?.clone())));
        let known: BTreeMap<NetworkId, Arc<Balance>> = known.collect();
        let before = self.in_force.take();
        let is_same = |before: &BTreeMap<_, Arc<Balance>>| {
            before.len() == known.len()
                && known
                    .iter()
                    .all(|(id, now)| before.get(id).is_some_and(|before| Arc::ptr_eq(before, now)))
        };
        if !is_repair && before.as_ref().is_some_and(is_same) {
            self.in_force = before;
            return Ok(());
        }
        self.rules.converge(&Vips::union(known.values().map(|balance| &balance.vips)))?;
        let has_lost = |before: BTreeMap<_, Arc<Balance>>| {
            known
                .iter()
                .any(|(id, now)| before.get(id).is_none_or(|before| now.has_lost_since(before)))
        };
        // Only then: what is forgotten is judged by the new rules.
        if before.is_none_or(has_lost) {
            self.forget_stale(&known)?;
        }
        self.in_force = Some(known);
        Ok(())
    }

    fn forget_stale(&mut self, known: &BTreeMap<NetworkId, Arc<Balance>>) -> Result<(), Error> {
        for entry in self.connections.list()? {
            if known.values().any(|balance| balance.is_stale(&entry.connection)) {
                self.connections.delete(&entry)?;
            }
        }
        Ok(())
    }
}
