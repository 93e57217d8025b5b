//! The names of each network, arranged so that a question costs the same in a large network as in a small
//! one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use skep_common::{NetworkId, ServiceId, TaskId};

use super::{Location, Scope};
use crate::network::{EndpointEntry, NamedPort, NetworkTable, NetworkTables};

/// Protocols whose ports are asked for.
const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];

/// The names of all networks of a node.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    pub(super) networks: BTreeMap<NetworkId, Arc<Names>>,
}

impl Directory {
    /// The directory of `tables`. Networks that did not change since this one keep their names.
    #[must_use]
    pub fn follow(&self, tables: &NetworkTables) -> Self {
        let networks = tables.networks.iter().map(|(id, table)| {
            let known = self.networks.get(id).filter(|names| Arc::ptr_eq(&names.table, table));
            (*id, known.cloned().unwrap_or_else(|| Arc::new(Names::of(table))))
        });
        Self { networks: networks.collect() }
    }

    /// Whether all networks of a container are in it. Before that nothing may be answered: a name that
    /// exists would be taken for one that does not.
    pub fn knows(&self, scope: &Scope) -> bool {
        scope.networks.iter().all(|id| self.networks.contains_key(id))
    }

    /// The tables that it is of.
    #[cfg(test)]
    pub(super) fn tables(&self) -> NetworkTables {
        let networks = self.networks.iter().map(|(id, names)| (*id, Arc::clone(&names.table)));
        NetworkTables { networks: networks.collect(), ..NetworkTables::default() }
    }

    /// The networks of a container, in its order.
    pub(super) fn of<'a>(&'a self, scope: &'a Scope) -> impl Iterator<Item = &'a Names> {
        scope.networks.iter().filter_map(|id| self.networks.get(id).map(Arc::as_ref))
    }
}

/// What a name means.
#[derive(Debug)]
pub(super) struct Meaning {
    /// Ascending, each once.
    pub(super) addresses: Vec<IpAddr>,
    /// Whether they are addresses of services, which stay when tasks come and go.
    pub(super) is_virtual: bool,
}

/// Whether no service made a task: it is its own.
fn is_single(task_id: TaskId, endpoint: &EndpointEntry) -> bool {
    endpoint.service_id.0 == task_id.0
}

/// The names of one network, in lower case.
#[derive(Debug)]
pub(super) struct Names {
    table: Arc<NetworkTable>,
    /// `.` and the network's name.
    suffix: String,
    meanings: BTreeMap<String, Meaning>,
    /// The services behind each of their names and aliases.
    services: BTreeMap<String, BTreeSet<ServiceId>>,
    /// Serving tasks.
    serving: BTreeMap<ServiceId, Vec<TaskId>>,
    of_addresses: BTreeMap<IpAddr, String>,
}

impl Names {
    fn of(table: &Arc<NetworkTable>) -> Self {
        let mut serving: BTreeMap<_, Vec<TaskId>> = BTreeMap::new();
        for (task_id, endpoint) in table.endpoints.iter().filter(|(_, endpoint)| endpoint.serving) {
            serving.entry(endpoint.service_id).or_default().push(*task_id);
        }
        let mut names = Self {
            table: Arc::clone(table),
            suffix: format!(".{}", table.name.to_ascii_lowercase()),
            meanings: BTreeMap::new(),
            services: BTreeMap::new(),
            serving,
            of_addresses: BTreeMap::new(),
        };
        names.add_services();
        names.add_tasks();
        for meaning in names.meanings.values_mut() {
            meaning.addresses.sort_unstable();
            meaning.addresses.dedup();
        }
        names
    }

    fn add_services(&mut self) {
        let table = Arc::clone(&self.table);
        for (service_id, service) in &table.services {
            let serving = self.serving.get(service_id).into_iter().flatten();
            let of_tasks: Vec<IpAddr> =
                serving.flat_map(|task_id| &table.endpoints[task_id].addresses).copied().collect();
            let is_virtual = !service.virtual_ips.is_empty();
            let own = if is_virtual { &service.virtual_ips } else { &of_tasks };
            for name in std::iter::once(&service.name).chain(&service.aliases) {
                self.add(name, own, is_virtual);
                self.add(&format!("tasks.{name}"), &of_tasks, false);
                self.services.entry(name.to_ascii_lowercase()).or_default().insert(*service_id);
            }
            self.add_reverse(&service.name, &service.virtual_ips);
        }
    }

    fn add_tasks(&mut self) {
        let table = Arc::clone(&self.table);
        let mut slots: BTreeMap<&str, Vec<&EndpointEntry>> = BTreeMap::new();
        let of_services =
            table.endpoints.iter().filter(|(id, endpoint)| !is_single(**id, endpoint));
        for (task_id, endpoint) in of_services {
            let short = task_id.short();
            let names = [Some(&endpoint.name), Some(&short), endpoint.hostname.as_ref()];
            for name in names.into_iter().flatten() {
                self.add_of_task(name, &endpoint.addresses);
            }
            self.add_reverse(&endpoint.name, &endpoint.addresses);
            let slot = endpoint.name.strip_suffix(&task_id.to_string());
            if let Some(slot) = slot.and_then(|slot| slot.strip_suffix('.')) {
                slots.entry(slot).or_default().push(endpoint);
            }
        }
        for (slot, endpoints) in slots {
            let is_served = endpoints.iter().any(|endpoint| endpoint.serving);
            for endpoint in endpoints.iter().filter(|one| one.serving || !is_served) {
                self.add_of_task(slot, &endpoint.addresses);
            }
        }
        self.add_containers(&table);
    }

    /// Their users chose those names, with dots as they like: what means a service's tasks goes on to.
    fn add_containers(&mut self, table: &NetworkTable) {
        let of_services: BTreeSet<String> = self.meanings.keys().cloned().collect();
        let single = table.endpoints.iter().filter(|(id, endpoint)| is_single(**id, endpoint));
        for (task_id, endpoint) in single {
            let short = task_id.short();
            let names = [Some(&endpoint.name), Some(&short), endpoint.hostname.as_ref()];
            for name in names.into_iter().flatten() {
                let lower = name.to_ascii_lowercase();
                let bare = lower.strip_suffix(&self.suffix).unwrap_or(&lower);
                if !of_services.contains(bare) && !of_services.contains(&lower) {
                    self.add_of_task(name, &endpoint.addresses);
                }
            }
            self.add_reverse(&endpoint.name, &endpoint.addresses);
        }
    }

    /// Services that share an alias share its questions too.
    fn add(&mut self, name: &str, addresses: &[IpAddr], is_virtual: bool) {
        let new = || Meaning { addresses: Vec::new(), is_virtual: true };
        let meaning = self.meanings.entry(name.to_ascii_lowercase()).or_insert_with(new);
        meaning.addresses.extend(addresses);
        meaning.is_virtual &= is_virtual;
    }

    /// A service's own names are its alone: a host name that is one of them adds nothing.
    fn add_of_task(&mut self, name: &str, addresses: &[IpAddr]) {
        let name = name.to_ascii_lowercase();
        let of_service = name.strip_prefix("tasks.").unwrap_or(&name);
        if !self.services.contains_key(of_service) {
            self.add(&name, addresses, false);
        }
    }

    fn add_reverse(&mut self, name: &str, addresses: &[IpAddr]) {
        for address in addresses {
            let name = || format!("{name}.{}", self.table.name);
            self.of_addresses.entry(*address).or_insert_with(name);
        }
    }

    /// What a name in lower case means, with or without the network's behind it.
    pub(super) fn find(&self, name: &str) -> Option<&Meaning> {
        self.with_or_without_network(name, &self.meanings)
    }

    fn with_or_without_network<'a, T>(
        &self,
        name: &str,
        map: &'a BTreeMap<String, T>,
    ) -> Option<&'a T> {
        map.get(name).or_else(|| map.get(name.strip_suffix(&self.suffix)?))
    }

    /// Where the tasks of `_port._protocol.service` answer; `None` where no service of the network is named
    /// so, and `Some(None)` where one is but has no port of this name.
    pub(super) fn located(&self, name: &str) -> Option<Option<Vec<Location>>> {
        let (port, rest) = name.strip_prefix('_')?.split_once("._")?;
        let (protocol, service) = rest.split_once('.')?;
        let services = self.with_or_without_network(service, &self.services)?;
        if !PROTOCOLS.contains(&protocol) {
            return Some(None);
        }
        let mut places = None;
        for service_id in services {
            let number = port.parse().ok().filter(|number| *number > 0);
            let Some(port) = number.or_else(|| self.port_of(*service_id, port, protocol)) else {
                continue;
            };
            let serving = self.serving.get(service_id).into_iter().flatten();
            let of_tasks =
                serving.map(|task_id| self.location(&self.table.endpoints[task_id], port));
            places.get_or_insert_with(Vec::new).extend(of_tasks);
        }
        Some(places)
    }

    fn port_of(&self, service_id: ServiceId, name: &str, protocol: &str) -> Option<u16> {
        let ports = &self.table.services[&service_id].ports;
        let is_meant =
            |port: &&NamedPort| port.name.eq_ignore_ascii_case(name) && port.protocol == protocol;
        ports.iter().find(is_meant).map(|port| port.target_port)
    }

    fn location(&self, endpoint: &EndpointEntry, port: u16) -> Location {
        let target = format!("{}.{}", endpoint.name, self.table.name);
        Location { target, port, addresses: endpoint.addresses.clone() }
    }

    pub(super) fn name_of(&self, address: IpAddr) -> Option<&str> {
        self.of_addresses.get(&address).map(String::as_str)
    }

    /// Whether addresses are the network's, taken or not.
    pub(super) fn contains(&self, addresses: IpNet) -> bool {
        self.table.subnets.iter().any(|subnet| subnet.contains(&addresses))
    }

    pub(super) fn is_internal(&self) -> bool {
        self.table.internal
    }
}
