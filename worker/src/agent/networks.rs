//! The tables of this node's networks, as the leader sent them.
//!
//! Tasks of this node that have ended serve no longer at once, before the leader knows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use skep_common::{NetworkId, ServiceId, TaskId};
use skep_proto::{NetworkEndpoint, NetworkService, NetworkSettings, NetworkUpdate};
use skep_worker_core::network::{EndpointEntry, NamedPort, NetworkTable, ServiceEntry};

type Tables = BTreeMap<NetworkId, Arc<NetworkTable>>;

/// The tables in force, in which those locally known to be dead do not serve.
#[derive(Debug, Default)]
pub(super) struct NetworkState {
    tables: Tables,
    /// Tasks that have ended, until the leader has said so too.
    dead: BTreeSet<TaskId>,
}

impl NetworkState {
    /// Takes over what an update says of networks; a whole one names all of them. Entries that this
    /// program cannot read are left out with a word in the log: the rest must go on.
    pub(super) fn update(
        &mut self,
        is_whole: bool,
        updates: Vec<NetworkUpdate>,
        removed: &[String],
    ) {
        let before = self.tables.clone();
        if is_whole {
            self.tables.clear();
        }
        for update in updates {
            let Ok(network_id) = update.id.parse::<NetworkId>() else {
                tracing::warn!(network = update.id, "ignoring a network with an unreadable id");
                continue;
            };
            let known = before.get(&network_id);
            let mut table = known.map(|table| NetworkTable::clone(table)).unwrap_or_default();
            self.change(&mut table, update);
            let table = match known {
                // The same allocation says that nothing is to be done.
                Some(known) if **known == table => Arc::clone(known),
                _ => Arc::new(table),
            };
            self.tables.insert(network_id, table);
        }
        self.tables.retain(|network_id, _| !removed.contains(&network_id.to_string()));
        // Whom no network names any more need not be remembered.
        let tables = &self.tables;
        self.dead.retain(|task_id| tables.values().any(|t| t.endpoints.contains_key(task_id)));
    }

    /// Notes that a task of this node has ended; whether it was serving anywhere.
    pub(super) fn withdraw(&mut self, task_id: TaskId) -> bool {
        let mut was_serving = false;
        for table in self.tables.values_mut() {
            if table.endpoints.get(&task_id).is_some_and(|endpoint| endpoint.serving)
                && let Some(endpoint) = Arc::make_mut(table).endpoints.get_mut(&task_id)
            {
                endpoint.serving = false;
                was_serving = true;
            }
        }
        if was_serving {
            self.dead.insert(task_id);
        }
        was_serving
    }

    /// The tables in force.
    pub(super) fn tables(&self) -> &Tables {
        &self.tables
    }

    fn change(&mut self, table: &mut NetworkTable, update: NetworkUpdate) {
        if update.whole {
            table.endpoints.clear();
            table.services.clear();
        }
        if let Some(settings) = update.settings {
            set(table, settings);
        }
        for task_id in update.removed_endpoints.iter().filter_map(|text| text.parse().ok()) {
            table.endpoints.remove(&task_id);
        }
        for service_id in update.removed_services.iter().filter_map(|text| text.parse().ok()) {
            table.services.remove(&service_id);
        }
        for message in update.endpoints {
            let Some((task_id, mut endpoint)) = endpoint(&message) else {
                tracing::warn!(?message, "ignoring an unreadable endpoint of a network");
                continue;
            };
            if !endpoint.serving {
                self.dead.remove(&task_id);
            }
            endpoint.serving &= !self.dead.contains(&task_id);
            table.endpoints.insert(task_id, endpoint);
        }
        for message in update.services {
            match service(&message) {
                Some((service_id, service)) => drop(table.services.insert(service_id, service)),
                None => tracing::warn!(?message, "ignoring an unreadable service of a network"),
            }
        }
    }
}

fn set(table: &mut NetworkTable, settings: NetworkSettings) {
    let subnets = settings.subnets.iter().filter_map(|subnet| {
        let read = subnet.parse().ok();
        if read.is_none() {
            tracing::warn!(network = settings.name, subnet, "ignoring an unreadable subnet");
        }
        read
    });
    table.subnets = subnets.collect();
    table.vni = settings.vni;
    table.mtu = Some(settings.mtu).filter(|mtu| *mtu > 0);
    table.internal = settings.internal;
    table.encrypted = settings.encrypted;
    table.name = settings.name;
}

fn endpoint(message: &NetworkEndpoint) -> Option<(TaskId, EndpointEntry)> {
    let entry = EndpointEntry {
        service_id: message.service_id.parse().ok()?,
        name: message.name.clone(),
        hostname: Some(message.hostname.clone()).filter(|hostname| !hostname.is_empty()),
        addresses: addresses(&message.addresses)?,
        node_number: u16::try_from(message.node_number).ok()?,
        serving: message.serving,
    };
    Some((message.task_id.parse().ok()?, entry))
}

fn service(message: &NetworkService) -> Option<(ServiceId, ServiceEntry)> {
    let ports = message.ports.iter().filter_map(|port| {
        let target_port = u16::try_from(port.target_port).ok()?;
        Some(NamedPort { name: port.name.clone(), protocol: port.protocol.clone(), target_port })
    });
    let entry = ServiceEntry {
        name: message.name.clone(),
        aliases: message.aliases.clone(),
        virtual_ips: addresses(&message.virtual_ips)?,
        ports: ports.collect(),
    };
    Some((message.service_id.parse().ok()?, entry))
}

/// Addresses, with or without the prefix of their subnet.
fn addresses(texts: &[String]) -> Option<Vec<IpAddr>> {
    let address = |text: &String| text.split('/').next()?.parse().ok();
    texts.iter().map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(task: u128, serving: bool) -> NetworkEndpoint {
        NetworkEndpoint {
            task_id: TaskId(task).to_string(),
            service_id: ServiceId(7).to_string(),
            name: format!("web.{task}"),
            addresses: vec![format!("10.0.1.{task}")],
            node_number: 1,
            serving,
            hostname: format!("host-{task}"),
        }
    }

    fn update(network: u128, whole: bool, endpoints: Vec<NetworkEndpoint>) -> NetworkUpdate {
        let id = NetworkId(network).to_string();
        NetworkUpdate { id, whole, endpoints, ..NetworkUpdate::default() }
    }

    fn named(name: &str, target_port: u32) -> skep_proto::NamedPort {
        skep_proto::NamedPort { name: name.into(), protocol: "tcp".into(), target_port }
    }

    /// Which endpoints there are, with `!` in front of those that do not serve.
    fn endpoints(state: &NetworkState, network: u128) -> String {
        let table = &state.tables()[&NetworkId(network)];
        let texts = table.endpoints.values().map(|endpoint| {
            format!("{}{}", if endpoint.serving { "" } else { "!" }, endpoint.name)
        });
        texts.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn updates_change_what_they_name() {
        let mut state = NetworkState::default();
        let settings = NetworkSettings {
            name: "front".into(),
            vni: 20480,
            subnets: vec!["10.0.1.0/24".into(), "nonsense".into()],
            mtu: 0,
            internal: true,
            encrypted: false,
        };
        let service = NetworkService {
            service_id: ServiceId(7).to_string(),
            name: "web".into(),
            aliases: vec!["www".into()],
            virtual_ips: vec!["10.0.1.2/24".into()],
            ports: vec![named("http", 80), named("none", 65_536)],
        };
        let whole = NetworkUpdate {
            settings: Some(settings),
            services: vec![service],
            ..update(1, true, vec![endpoint(3, true), endpoint(4, false)])
        };
        state.update(true, vec![whole.clone(), update(2, true, Vec::new())], &[]);
        assert_eq!(endpoints(&state, 1), "web.3 !web.4");
        let table = Arc::clone(&state.tables()[&NetworkId(1)]);
        assert_eq!((table.vni, table.mtu, table.subnets.len()), (20480, None, 1));
        let service = &table.services[&ServiceId(7)];
        assert_eq!(service.virtual_ips, ["10.0.1.2".parse::<IpAddr>().unwrap()]);
        let http = NamedPort { name: "http".into(), protocol: "tcp".into(), target_port: 80 };
        assert_eq!(service.ports, [http], "an unreadable port is left out");
        assert_eq!(table.endpoints[&TaskId(3)].hostname.as_deref(), Some("host-3"));

        let unreadable = NetworkEndpoint { addresses: vec!["x".into()], ..endpoint(9, true) };
        let change = NetworkUpdate {
            removed_endpoints: vec![TaskId(3).to_string()],
            removed_services: vec![ServiceId(7).to_string()],
            ..update(1, false, vec![endpoint(4, true), unreadable])
        };
        state.update(false, vec![change], &[NetworkId(2).to_string()]);
        assert_eq!(endpoints(&state, 1), "web.4");
        assert!(state.tables()[&NetworkId(1)].services.is_empty());
        assert!(!state.tables().contains_key(&NetworkId(2)));

        state.update(true, vec![whole.clone()], &[]);
        let again = Arc::clone(&state.tables()[&NetworkId(1)]);
        assert_eq!(again, table);
        state.update(true, vec![whole], &[]);
        assert!(Arc::ptr_eq(&again, &state.tables()[&NetworkId(1)]), "nothing changed");
    }

    #[test]
    fn the_dead_serve_no_longer_until_the_leader_knows() {
        let mut state = NetworkState::default();
        let whole = || update(1, true, vec![endpoint(3, true), endpoint(4, true)]);
        state.update(true, vec![whole()], &[]);
        assert!(state.withdraw(TaskId(3)));
        assert!(!state.withdraw(TaskId(3)), "it is known");
        assert!(!state.withdraw(TaskId(9)));
        assert_eq!(endpoints(&state, 1), "!web.3 web.4");
        state.update(true, vec![whole()], &[]);
        assert_eq!(endpoints(&state, 1), "!web.3 web.4", "the leader does not know yet");
        state.update(false, vec![update(1, false, vec![endpoint(3, false)])], &[]);
        state.update(false, vec![update(1, false, vec![endpoint(3, true)])], &[]);
        assert_eq!(endpoints(&state, 1), "web.3 web.4", "the leader knew");
    }
}
