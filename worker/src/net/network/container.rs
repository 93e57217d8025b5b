//! A container that is on networks: the rules in it, and the connections it must forget.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;

use skep_common::{NetworkId, TaskId};
use skep_worker_core::network::{NetworkTable, NetworkTables, Peers, Vips};

use super::rules::Rules;
use crate::net::Error;
use crate::net::conntrack::Conntrack;
use crate::net::namespace::Home;

/// A container of this node.
#[derive(Debug)]
pub(super) struct Container {
    task_id: TaskId,
    networks: BTreeSet<NetworkId>,
    rules: Rules,
    connections: Conntrack,
    /// What is in force, once something is: the tables, and the endpoints in them.
    in_force: Option<(Vec<Arc<NetworkTable>>, Peers)>,
}

impl Container {
    /// The container of a task, which is on `networks`.
    pub(super) fn open(
        home: &Home,
        namespace: &File,
        task_id: TaskId,
        networks: BTreeSet<NetworkId>,
    ) -> Result<Self, Error> {
        let (rules, connections) = home.within(namespace, || (Rules::open(), Conntrack::open()))?;
        Ok(Self { task_id, networks, rules: rules?, connections: connections?, in_force: None })
    }

    /// Brings the rules to those of the tables; looks at the kernel also where nothing changed, if
    /// `is_repair`.
    pub(super) fn converge(
        &mut self,
        tables: &NetworkTables,
        is_repair: bool,
    ) -> Result<(), Error> {
        // A network that is no longer in the tables has gone with its last endpoint.
        let known = self.networks.iter().filter_map(|id| tables.networks.get(id).cloned());
        let known: Vec<Arc<NetworkTable>> = known.collect();
        if !is_repair
            && let Some((in_force, _)) = &self.in_force
            && in_force.len() == known.len()
            && in_force.iter().zip(&known).all(|(one, other)| Arc::ptr_eq(one, other))
        {
            return Ok(());
        }
        let networks = || known.iter().map(Arc::as_ref);
        self.rules.converge(&Vips::of(networks(), self.task_id.0))?;
        let peers = Peers::of(networks());
        // Only then: what is forgotten is judged by the new rules.
        if self.in_force.as_ref().is_none_or(|(_, before)| before.has_lost(&peers)) {
            self.forget_stale(&peers)?;
        }
        self.in_force = Some((known, peers));
        Ok(())
    }

    fn forget_stale(&mut self, peers: &Peers) -> Result<(), Error> {
        for entry in self.connections.list()? {
            if peers.is_stale(&entry.connection) {
                self.connections.delete(&entry)?;
            }
        }
        Ok(())
    }
}
