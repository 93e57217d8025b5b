//! A container that is on networks: the rules in it, its neighbours, and the connections it must forget.
//!
//! Neighbours are permanent entries, as everything that managers know: nobody asks, and nobody may answer
//! in another's place. The kernel's limit of entries that were asked for (1024 for all containers of a
//! node, by default) does not count them.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use skep_common::{NetworkId, TaskId};
use skep_worker_core::network::{Balance, ReachOp, Vips};

use super::reach;
use super::rules::Rules;
use crate::net::Error;
use crate::net::conntrack::{Conntrack, N_LOOKS, Unanswered};
use crate::net::namespace::Home;
use crate::net::rtnetlink::RouteChannel;

/// A container of this node.
#[derive(Debug)]
pub(super) struct Container {
    /// Its networks, and the index of its interface on each.
    networks: BTreeMap<NetworkId, u32>,
    rules: Rules,
    neighbours: RouteChannel,
    connections: Conntrack,
    /// What is in force, once something is, of each of its networks.
    in_force: Option<BTreeMap<NetworkId, Arc<Balance>>>,
    /// How many looks are left at requests that may be under way to what the rules know no longer.
    n_looks: u8,
    unanswered: Unanswered,
}

impl Container {
    /// The container of a task, which is on `networks`.
    pub(super) fn open(
        home: &Home,
        namespace: &File,
        task_id: TaskId,
        networks: BTreeMap<NetworkId, u32>,
    ) -> Result<Self, Error> {
        let open = || (Rules::open(task_id.0), RouteChannel::open(), Conntrack::open());
        let (rules, neighbours, connections) = home.within(namespace, open)?;
        let (rules, neighbours, connections) = (rules?, neighbours?, connections?);
        Ok(Self {
            networks,
            rules,
            neighbours,
            connections,
            in_force: None,
            n_looks: 0,
            unanswered: Unanswered::default(),
        })
    }

    /// Brings the rules to those of its networks; looks at the kernel also where nothing changed, if
    /// `is_repair`.
    pub(super) fn converge(
        &mut self,
        balances: &BTreeMap<NetworkId, Arc<Balance>>,
        is_repair: bool,
    ) -> Result<(), Error> {
        // A network that is no longer in the tables has gone with its last endpoint.
        let known = self.networks.keys().filter_map(|id| Some((*id, balances.get(id)?.clone())));
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
        let changes = self.neighbour_changes(before.as_ref().filter(|_| !is_repair), &known)?;
        let (gone, known_first): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|(_, op)| matches!(op, ReachOp::DeleteNeighbour(_)));
        reach::change(&mut self.neighbours, &known_first)?;
        self.rules.converge(&Vips::union(known.values().map(|balance| &balance.vips)))?;
        reach::change(&mut self.neighbours, &gone)?;
        let has_lost = |before: BTreeMap<_, Arc<Balance>>| {
            known
                .iter()
                .any(|(id, now)| before.get(id).is_none_or(|before| now.has_lost_since(before)))
        };
        // Only then: what is forgotten is judged by the new rules.
        if before.is_none_or(has_lost) {
            self.n_looks = N_LOOKS;
            self.forget_stale(&known)?;
        }
        self.in_force = Some(known);
        Ok(())
    }

    /// Forgets requests for connections that were not answered by what has left the rules, or serves no
    /// longer; returns whether it must be called again.
    pub(super) fn settle(&mut self) -> Result<bool, Error> {
        let Some(in_force) = self.in_force.as_ref().filter(|_| self.n_looks > 0) else {
            return Ok(false);
        };
        self.connections.forget_unanswered(&mut self.unanswered, |connection| {
            in_force.values().any(|balance| balance.is_astray(connection))
        })?;
        self.n_looks -= 1;
        if self.n_looks == 0 {
            self.unanswered = Unanswered::default();
        }
        Ok(self.n_looks > 0)
    }

    /// What makes its neighbours those of its networks, each with the interface; `before` is in force, or
    /// the kernel is asked.
    fn neighbour_changes(
        &mut self,
        before: Option<&BTreeMap<NetworkId, Arc<Balance>>>,
        known: &BTreeMap<NetworkId, Arc<Balance>>,
    ) -> Result<Vec<(u32, ReachOp)>, Error> {
        let mut changes = Vec::new();
        for (network_id, now) in known {
            let Some(&index) = self.networks.get(network_id) else { continue };
            let ops = match before.and_then(|before| before.get(network_id)) {
                Some(before) => now.neighbour_changes_since(before),
                None => reach::observe(&mut self.neighbours, index)?.diff(&now.neighbours).into(),
            };
            changes.extend(ops.iter().map(|op| (index, *op)));
        }
        Ok(changes)
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
