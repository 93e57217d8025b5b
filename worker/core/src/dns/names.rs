//! The names of each network, arranged so that a question costs the same in a large network as in a small
//! one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use skep_common::NetworkId;

use super::Scope;
use crate::network::{NetworkTable, NetworkTables};

/// The names of all networks of a node.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    pub(super) tables: Arc<NetworkTables>,
    pub(super) networks: BTreeMap<NetworkId, Arc<Names>>,
}

impl Directory {
    /// The directory of `tables`. Networks that did not change since this one keep their names.
    #[must_use]
    pub fn follow(&self, tables: &Arc<NetworkTables>) -> Self {
        let networks = tables.networks.iter().map(|(id, table)| {
            let known = self.networks.get(id).filter(|names| Arc::ptr_eq(&names.table, table));
            (*id, known.cloned().unwrap_or_else(|| Arc::new(Names::of(table))))
        });
        Self { tables: Arc::clone(tables), networks: networks.collect() }
    }

    /// Whether this is the directory of exactly these tables.
    pub fn is_of(&self, tables: &Arc<NetworkTables>) -> bool {
        Arc::ptr_eq(&self.tables, tables)
    }

    /// Whether all networks of a container are in it. Before that nothing may be answered: a name that
    /// exists would be taken for one that does not.
    pub fn knows(&self, scope: &Scope) -> bool {
        self.tables.have(scope.networks.iter().copied())
    }

    pub(super) fn network(&self, id: NetworkId) -> Option<&Names> {
        self.networks.get(&id).map(Arc::as_ref)
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

/// The names of one network, in lower case.
#[derive(Debug)]
pub(super) struct Names {
    table: Arc<NetworkTable>,
    /// `.` and the network's name.
    suffix: String,
    meanings: BTreeMap<String, Meaning>,
    of_addresses: BTreeMap<IpAddr, String>,
}

impl Names {
    fn of(table: &Arc<NetworkTable>) -> Self {
        let mut serving: BTreeMap<_, Vec<IpAddr>> = BTreeMap::new();
        for endpoint in table.endpoints.values().filter(|endpoint| endpoint.serving) {
            serving.entry(endpoint.service_id).or_default().extend(&endpoint.addresses);
        }
        let suffix = format!(".{}", table.name.to_ascii_lowercase());
        let (meanings, of_addresses) = (BTreeMap::new(), BTreeMap::new());
        let mut names = Self { table: Arc::clone(table), suffix, meanings, of_addresses };
        for (service_id, service) in &table.services {
            let of_tasks = serving.get(service_id).map(Vec::as_slice).unwrap_or_default();
            let is_virtual = !service.virtual_ips.is_empty();
            let own = if is_virtual { &service.virtual_ips } else { of_tasks };
            for name in std::iter::once(&service.name).chain(&service.aliases) {
                names.add(name, own, is_virtual);
                names.add(&format!("tasks.{name}"), of_tasks, false);
            }
            names.add_reverse(&service.name, &service.virtual_ips);
        }
        for (task_id, endpoint) in &table.endpoints {
            names.add(&endpoint.name, &endpoint.addresses, false);
            names.add(&task_id.short(), &endpoint.addresses, false);
            names.add_reverse(&endpoint.name, &endpoint.addresses);
        }
        for meaning in names.meanings.values_mut() {
            meaning.addresses.sort_unstable();
            meaning.addresses.dedup();
        }
        names
    }

    /// Services that share an alias share its questions too.
    fn add(&mut self, name: &str, addresses: &[IpAddr], is_virtual: bool) {
        let new = || Meaning { addresses: Vec::new(), is_virtual: true };
        let meaning = self.meanings.entry(name.to_ascii_lowercase()).or_insert_with(new);
        meaning.addresses.extend(addresses);
        meaning.is_virtual &= is_virtual;
    }

    fn add_reverse(&mut self, name: &str, addresses: &[IpAddr]) {
        for address in addresses {
            let name = || format!("{name}.{}", self.table.name);
            self.of_addresses.entry(*address).or_insert_with(name);
        }
    }

    /// What a name in lower case means, with or without the network's behind it.
    pub(super) fn find(&self, name: &str) -> Option<&Meaning> {
        let without = || name.strip_suffix(&self.suffix).and_then(|name| self.meanings.get(name));
        self.meanings.get(name).or_else(without)
    }

    pub(super) fn name_of(&self, address: IpAddr) -> Option<&str> {
        self.of_addresses.get(&address).map(String::as_str)
    }

    /// Whether an address is one of the network's, taken or not.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.table.subnets.iter().any(|subnet| subnet.contains(&address))
    }

    pub(super) fn is_internal(&self) -> bool {
        self.table.internal
    }
}
