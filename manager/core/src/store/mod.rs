//! The replicated tables and [`State::apply`], the only function that changes them.
//!
//! A [`State`] is an immutable value in all but `apply`: cloning it costs a few reference counts, so
//! every reader and every planning pass works on a snapshot of its own.
//!
//! # Invariants
//!
//! - Applying is deterministic and total: equal logs give equal states, byte for byte, on all
//!   managers ([`State::digest`]).
//! - A refused command changes nothing.
//! - Names, published ports, node numbers, network identifiers and addresses are held once. A network
//!   on its way out holds no name.
//! - Task states, desired states and versions only grow.
//! - The only indexes here are those that lookups need; the scheduler keeps its own.

mod apply;
mod codec;
mod networks;
mod payloads;
mod revisions;
mod scratch;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet};
use skep_common::object::{Config, Network, Revision, Secret, Slot};
use skep_common::spec::PortProtocol;
use skep_common::{
    Cluster, ConfigId, Image, ImageId, Kind, NetworkId, Node, NodeId, SecretId, Service, ServiceId,
    Stack, StackId, Task, TaskId, Version,
};

pub use codec::DecodeError;
pub use networks::AddressOwner;

/// A table of objects by id.
pub type Table<K, V> = OrdMap<K, Arc<V>>;

/// Where a task is among those of its service.
pub(crate) type Place = (ServiceId, Slot, TaskId);

/// The ids of what differs between two tables of the store. Two states share all that is equal in them, so
/// that the cost depends on what changed.
pub fn changed<K: Ord + Copy, V: PartialEq>(old: &Table<K, V>, new: &Table<K, V>) -> Vec<K> {
    let id = |item| match item {
        DiffItem::Add(id, _) | DiffItem::Remove(id, _) | DiffItem::Update { new: (id, _), .. } => {
            *id
        }
    };
    old.diff(new).map(id).collect()
}

/// One object that a command created, changed or erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Its kind.
    pub kind: Kind,
    /// The 128 bits of its id.
    pub id: u128,
    /// For a task: the service it belongs to (also when the task is gone).
    pub service_id: Option<ServiceId>,
    /// For a task: the node it is on (also when the task is gone).
    pub node_id: Option<NodeId>,
}

/// The whole store at one version.
#[derive(Debug, Clone, Default)]
pub struct State {
    version: Version,
    /// The highest level of any command so far: it may still be in a manager's log, whatever became of it.
    used_level: u32,
    cluster: Option<Arc<Cluster>>,
    nodes: Table<NodeId, Node>,
    services: Table<ServiceId, Service>,
    tasks: Table<TaskId, Task>,
    networks: Table<NetworkId, Network>,
    secrets: Table<SecretId, Secret>,
    configs: Table<ConfigId, Config>,
    stacks: Table<StackId, Stack>,
    images: Table<ImageId, Image>,
    revisions: Table<(ServiceId, u64), Revision>,
    /// The names are shared: a change copies the neighbours of what it changes.
    names: OrdMap<(Kind, Arc<str>), u128>,
    ports: OrdMap<(PortProtocol, u16), ServiceId>,
    addresses: OrdMap<Ipv4Addr, TaskId>,
    vnis: OrdMap<u32, NetworkId>,
    network_addresses: OrdMap<(NetworkId, IpAddr), AddressOwner>,
    node_numbers: OrdMap<u16, NodeId>,
    /// With the tasks, not only their ids: a service's tasks are walked over more often than written, and
    /// their ids are random, so that looking each up would be most of the walk.
    service_tasks: OrdMap<Place, Arc<Task>>,
    node_tasks: OrdSet<(NodeId, TaskId)>,
}

macro_rules! tables {
    ($($(#[$doc:meta])* $table:ident: $one:ident, $key:ty => $value:ty;)*) => {$(
        $(#[$doc])*
        pub fn $table(&self) -> &Table<$key, $value> {
            &self.$table
        }

        /// One object of that table.
        pub fn $one(&self, id: $key) -> Option<&Arc<$value>> {
            self.$table.get(&id)
        }
    )*};
}

impl State {
    tables! {
        /// Every node.
        nodes: node, NodeId => Node;
        /// Every service.
        services: service, ServiceId => Service;
        /// Every task.
        tasks: task, TaskId => Task;
        /// Every network.
        networks: network, NetworkId => Network;
        /// Every secret.
        secrets: secret, SecretId => Secret;
        /// Every config.
        configs: config, ConfigId => Config;
        /// Every stack.
        stacks: stack, StackId => Stack;
        /// Every image name.
        images: image, ImageId => Image;
    }

    /// Raft index of the last applied entry.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The swarm's own object; absent until the first entry of a new swarm.
    pub fn cluster(&self) -> Option<&Arc<Cluster>> {
        self.cluster.as_ref()
    }

    /// The id of the object with this unique name. Nodes and tasks have none.
    pub fn id_by_name(&self, kind: Kind, name: &str) -> Option<u128> {
        self.names.get(&(kind, name.into())).copied()
    }

    /// The service with this name.
    pub fn service_by_name(&self, name: &str) -> Option<&Arc<Service>> {
        self.service(ServiceId(self.id_by_name(Kind::Service, name)?))
    }

    /// The image record with this normalised name.
    pub fn image_by_name(&self, name: &str) -> Option<&Arc<Image>> {
        self.image(ImageId(self.id_by_name(Kind::Image, name)?))
    }

    /// Tasks of a service, by slot, then id.
    pub fn tasks_of_service(&self, service_id: ServiceId) -> impl Iterator<Item = &Arc<Task>> {
        self.service_tasks
            .range(
                (service_id, Slot::FIRST, TaskId(0))..=(service_id, Slot::LAST, TaskId(u128::MAX)),
            )
            .map(|(_, task)| task)
    }

    /// A task by its place. Where those of neighbours are looked for one after the other, this costs a small part of
    /// what [`task`](Self::task) does in a large swarm: ids are random, and each leads to another part of the table.
    pub(crate) fn task_at(&self, place: &Place) -> Option<&Arc<Task>> {
        self.service_tasks.get(place)
    }

    /// All tasks, by service, then slot, then id.
    pub(crate) fn tasks_by_service(&self) -> impl Iterator<Item = &Arc<Task>> {
        self.service_tasks.values()
    }

    /// The services that have tasks, whether they are there themselves or not.
    pub(crate) fn services_with_tasks(&self) -> impl Iterator<Item = ServiceId> {
        // One search for each service, and none of its tasks is looked at.
        let next = |from: ServiceId| {
            let mut following = self.service_tasks.range((from, Slot::FIRST, TaskId(0))..);
            following.next().map(|((service_id, ..), _)| *service_id)
        };
        let first = next(ServiceId(0));
        std::iter::successors(first, move |last| next(ServiceId(last.0.checked_add(1)?)))
    }

    /// The nodes that have tasks, whether they are there themselves or not.
    pub(crate) fn nodes_with_tasks(&self) -> impl Iterator<Item = NodeId> {
        let next = |from: NodeId| {
            self.node_tasks.range((from, TaskId(0))..).next().map(|(node_id, _)| *node_id)
        };
        std::iter::successors(next(NodeId(0)), move |last| next(NodeId(last.0.checked_add(1)?)))
    }

    /// Tasks of one slot of a service, by id.
    pub fn tasks_of_slot(
        &self,
        service_id: ServiceId,
        slot: Slot,
    ) -> impl Iterator<Item = &Arc<Task>> {
        self.service_tasks
            .range((service_id, slot, TaskId(0))..=(service_id, slot, TaskId(u128::MAX)))
            .map(|(_, task)| task)
    }

    /// Tasks that were ever assigned to a node and still exist, by id.
    pub fn tasks_of_node(&self, node_id: NodeId) -> impl Iterator<Item = &Arc<Task>> {
        self.node_tasks
            .range((node_id, TaskId(0))..=(node_id, TaskId(u128::MAX)))
            .map(|(_, task_id)| self.indexed_task(*task_id))
    }

    /// The service that has a published ingress port.
    pub fn port_owner(&self, protocol: PortProtocol, port: u16) -> Option<ServiceId> {
        self.ports.get(&(protocol, port)).copied()
    }

    /// The task that has an ingress address. Tasks that ended have none any more.
    pub fn address_owner(&self, address: Ipv4Addr) -> Option<TaskId> {
        self.addresses.get(&address).copied()
    }

    /// The node with this number.
    pub fn node_by_number(&self, number: u16) -> Option<NodeId> {
        self.node_numbers.get(&number).copied()
    }

    fn indexed_task(&self, task_id: TaskId) -> &Arc<Task> {
        self.tasks.get(&task_id).expect("an indexed task is in its table")
    }
}
