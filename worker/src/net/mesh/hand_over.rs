//! Which of the rules and the daemon balances a port, while it passes from one to the other.

use std::collections::BTreeSet;

use skep_worker_core::mesh::{MeshTable, Objects, PortKey, PublishedPort, in_rules};

use super::ports::ListenerChanges;

/// The ports that the daemon balances, or did.
#[derive(Debug, Default)]
pub(super) struct HandOver {
    /// Those that the daemon balances, or did before the rules that were last tried.
    relayed: BTreeSet<PortKey>,
    /// Those that passed to the rules: clients who came before may still wait for a task of the daemon's.
    in_rules: BTreeSet<PortKey>,
}

/// What passes with one table.
#[derive(Debug)]
pub(super) struct Passing {
    /// What the daemon balances by the table.
    relayed: BTreeSet<PortKey>,
    /// What the rules take from it.
    by_rules: BTreeSet<PortKey>,
}

impl HandOver {
    /// Completes what listeners follow before the rules change: whoever came before these is given to no task that
    /// the table names no more.
    pub(super) fn begin(
        &mut self,
        table: &MeshTable,
        wanted: &Objects,
        changes: &mut ListenerChanges,
    ) -> Passing {
        let relayed: BTreeSet<PortKey> = changes.balance.keys().copied().collect();
        let to_rules = self.relayed.iter().filter(|key| wanted.ports.contains_key(key));
        let by_rules: BTreeSet<PortKey> = to_rules.copied().collect();
        self.relayed.extend(&relayed);
        let key = |port: &PublishedPort| PortKey { protocol: port.protocol, port: port.published };
        let among = |keys: &BTreeSet<PortKey>| {
            let ports = table.ports.iter().filter(|port| keys.contains(&key(port)));
            ports.map(|port| (key(port), in_rules(port))).collect::<Vec<_>>()
        };
        changes.balance.extend(among(&by_rules));
        self.in_rules.retain(|key| !self.relayed.contains(key) && wanted.ports.contains_key(key));
        changes.in_rules = among(&self.in_rules).into_iter().collect();
        Passing { relayed, by_rules }
    }

    /// The rules have changed; returns the ports that they took.
    pub(super) fn end(&mut self, passing: Passing) -> Vec<PortKey> {
        self.relayed = passing.relayed;
        self.in_rules.extend(&passing.by_rules);
        passing.by_rules.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;

    use skep_worker_core::mesh::{Backend, Protocol, Relay};

    use super::*;

    const KEY: PortKey = PortKey { protocol: Protocol::Tcp, port: 80 };

    /// A table of that port, with these backends.
    fn table_of(last: &[u8]) -> MeshTable {
        let backend = |last: &u8| Backend {
            task_id: last.to_string(),
            address: Ipv4Addr::new(10, 192, 4, *last),
            target_port: 80,
        };
        let port = PublishedPort {
            published: KEY.port,
            protocol: KEY.protocol,
            service_id: String::new(),
            service: String::new(),
            proxy_protocol: None,
            backends: last.iter().map(backend).collect(),
        };
        MeshTable {
            version: 1,
            self_number: 1,
            pool: MeshTable::default_pool(),
            slice_prefix: MeshTable::default_slice_prefix(),
            peers: Vec::new(),
            ipv6: BTreeMap::new(),
            daemons: BTreeMap::new(),
            ports: vec![port],
        }
    }

    /// Who is balanced to by the daemon, by the daemon until the rules have changed, and by rules that took the port
    /// before; and whether the rules take it.
    fn table(
        hand_over: &mut HandOver,
        relayed: Option<&[u8]>,
        in_rules: Option<&[u8]>,
        is_done: bool,
    ) -> (Option<usize>, Option<usize>, bool) {
        let table = table_of(relayed.or(in_rules).unwrap_or_default());
        let relay = |_: &[u8]| (KEY, skep_worker_core::mesh::in_rules(&table.ports[0]));
        let balance = relayed.map(relay).into_iter().collect();
        let mut changes = ListenerChanges { balance, ..ListenerChanges::default() };
        let ports = in_rules.map(|_| (KEY, Vec::new())).into_iter().collect();
        let wanted = Objects { ports, ..Objects::default() };
        let passing = hand_over.begin(&table, &wanted, &mut changes);
        let by_rules = if is_done { hand_over.end(passing) } else { Vec::new() };
        let n_tasks =
            |relays: &BTreeMap<PortKey, Relay>| relays.get(&KEY).map(|relay| relay.backends.len());
        (n_tasks(&changes.balance), n_tasks(&changes.in_rules), !by_rules.is_empty())
    }

    #[test]
    fn who_came_before_the_rules_is_given_to_whom_each_later_table_names() {
        let ports = &mut HandOver::default();
        assert_eq!(table(ports, None, Some(&[1]), true), (None, None, false), "never relayed");
        assert_eq!(table(ports, Some(&[1, 2]), None, true), (Some(2), None, false));
        assert_eq!(table(ports, None, Some(&[1, 2]), false), (Some(2), None, false), "failed");
        assert_eq!(table(ports, None, Some(&[1]), true), (Some(1), None, true), "again");
        assert_eq!(table(ports, None, Some(&[1, 2, 3]), true), (None, Some(3), false));
        assert_eq!(table(ports, None, Some(&[]), true), (None, Some(0), false), "withdrawn");
        assert_eq!(table(ports, Some(&[1]), None, true), (Some(1), None, false), "back");
        assert_eq!(table(ports, None, Some(&[1]), true), (Some(1), None, true), "and again");
        assert_eq!(table(ports, None, None, true), (None, None, false), "not published");
        assert_eq!(table(ports, None, Some(&[1]), true), (None, None, false), "another's port");
    }
}
