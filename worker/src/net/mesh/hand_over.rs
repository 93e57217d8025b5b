//! Which of the rules and the daemon balances a port, while it passes from one to the other.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddrV4};

use skep_worker_core::mesh::{Endpoint, Objects, PortKey, Relay, Target};

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
    by_rules: Vec<PortKey>,
}

impl HandOver {
    /// Completes what listeners follow before the rules change: whoever came before these is given to no task that
    /// the table names no more.
    pub(super) fn begin(&mut self, wanted: &Objects, changes: &mut ListenerChanges) -> Passing {
        let relayed: BTreeSet<PortKey> = changes.balance.keys().copied().collect();
        let to_rules = self.relayed.iter().filter(|key| wanted.ports.contains_key(key));
        let by_rules: Vec<PortKey> = to_rules.copied().collect();
        self.relayed.extend(&relayed);
        let of_rules = |key: &PortKey| (*key, as_relay(&wanted.ports[key]));
        changes.balance.extend(by_rules.iter().map(of_rules));
        self.in_rules.retain(|key| !self.relayed.contains(key) && wanted.ports.contains_key(key));
        changes.in_rules = self.in_rules.iter().map(of_rules).collect();
        Passing { relayed, by_rules }
    }

    /// The rules have changed; returns the ports that they took.
    pub(super) fn end(&mut self, passing: Passing) -> Vec<PortKey> {
        self.relayed = passing.relayed;
        self.in_rules.extend(&passing.by_rules);
        passing.by_rules
    }
}

/// What the rules balance, as the daemon does meanwhile.
fn as_relay(endpoints: &[Endpoint]) -> Relay {
    let target = |endpoint: &Endpoint| match endpoint.address {
        IpAddr::V4(address) => {
            Some(Target { address: SocketAddrV4::new(address, endpoint.port), passage: None })
        }
        IpAddr::V6(_) => None,
    };
    Relay { proxy_protocol: None, backends: endpoints.iter().filter_map(target).collect() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use skep_worker_core::mesh::Protocol;

    use super::*;

    const KEY: PortKey = PortKey { protocol: Protocol::Tcp, port: 80 };

    fn backends(last: &[u8]) -> Vec<Endpoint> {
        let endpoint = |last: &u8| Endpoint { address: [10, 192, 4, *last].into(), port: 80 };
        last.iter().map(endpoint).collect()
    }

    /// Who is balanced to by the daemon, by the daemon until the rules have changed, and by rules that took the port
    /// before; and whether the rules take it.
    fn table(
        hand_over: &mut HandOver,
        relayed: Option<&[u8]>,
        in_rules: Option<&[u8]>,
        is_done: bool,
    ) -> (Option<usize>, Option<usize>, bool) {
        let balance = relayed.map(|last| (KEY, as_relay(&backends(last)))).into_iter().collect();
        let mut changes = ListenerChanges { balance, ..ListenerChanges::default() };
        let ports = in_rules.map(|last| (KEY, backends(last))).into_iter().collect();
        let wanted = Objects { ports, ..Objects::default() };
        let passing = hand_over.begin(&wanted, &mut changes);
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
