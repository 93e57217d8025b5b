//! Keeps the kernel's balancers and networks at the endpoint table that the leader sent.
//!
//! Tasks of this node that have ended leave the local balancer at once, before the leader knows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::sync::Arc;

use ipnet::Ipv4Net;
use skep_common::TaskId;
use skep_common::spec::{IngressPolicy, PortProtocol, ProxyProtocol};
use skep_common::wireguard::{PublicKey, SLOTS, WireguardKey, WireguardKeys};
use skep_proto::{MeshPeer, MeshUpdate};
use skep_worker_core::mesh::{
    Backend, Daemon, MeshTable, Peer, Protocol, PublishedPort, Slices, prefer_local,
};
use skep_worker_core::network::NetworkTables;

use super::host_ports::HostPorts;
use super::networks::NetworkState;

/// The table as received, and what is locally known to be dead.
#[derive(Debug, Default)]
pub(super) struct MeshState {
    version: u64,
    number: u16,
    pool: Option<Ipv4Net>,
    peers: BTreeMap<u16, Ipv4Addr>,
    ipv6: BTreeMap<u16, BTreeSet<Ipv6Addr>>,
    keys: BTreeMap<u16, WireguardKeys>,
    daemons: BTreeMap<u16, Daemon>,
    ports: BTreeMap<(Protocol, u16), PublishedPort>,
    /// Those of which only the node's own backends count, where it has some.
    local_ports: BTreeSet<(Protocol, u16)>,
    dead: BTreeSet<String>,
    networks: NetworkState,
    /// What this node publishes besides.
    pub(super) host: HostPorts,
}

impl MeshState {
    /// Takes the node's place in the mesh from a welcome.
    pub(super) fn place(&mut self, number: u16, pool: Ipv4Net) {
        self.number = number;
        self.pool = Some(pool);
    }

    /// Takes over an update; whole ones replace everything, those that keep peers and ports replace the networks.
    /// Entries that this program cannot read are left out with a word in the log: the rest must go on.
    pub(super) fn update(&mut self, update: MeshUpdate) {
        let are_networks_whole = update.whole || update.kept;
        self.networks.update(are_networks_whole, update.networks, &update.removed_networks);
        if update.whole {
            self.peers.clear();
            self.ipv6.clear();
            self.keys.clear();
            self.daemons.clear();
            self.ports.clear();
            self.local_ports.clear();
        }
        self.version = update.version;
        for peer in update.peers {
            match (u16::try_from(peer.number), peer.underlay.parse()) {
                (Ok(number), Ok(underlay)) => {
                    self.peers.insert(number, underlay);
                    match peer.wireguard.as_ref().and_then(keys) {
                        Some(keys) => drop(self.keys.insert(number, keys)),
                        None => drop(self.keys.remove(&number)),
                    }
                    match daemon(&peer, underlay) {
                        Some(daemon) => drop(self.daemons.insert(number, daemon)),
                        None => drop(self.daemons.remove(&number)),
                    }
                    self.ipv6.remove(&number);
                    if peer.has_ipv6 {
                        let addresses = peer.ipv6.iter().filter_map(|text| text.parse().ok());
                        self.ipv6.insert(number, addresses.collect());
                    }
                }
                _ => tracing::warn!(?peer, "ignoring a peer with an unreadable address"),
            }
        }
        for number in update.removed_peers {
            self.peers.retain(|known, _| u32::from(*known) != number);
            self.ipv6.retain(|known, _| u32::from(*known) != number);
            self.keys.retain(|known, _| u32::from(*known) != number);
            self.daemons.retain(|known, _| u32::from(*known) != number);
        }
        for update in update.ports {
            match published_port(&update) {
                Some(port) => {
                    let key = (port.protocol, port.published);
                    match IngressPolicy::of(&update.policy).unwrap_or_default() {
                        IngressPolicy::Local => self.local_ports.insert(key),
                        IngressPolicy::Spread => self.local_ports.remove(&key),
                    };
                    self.ports.insert(key, port);
                }
                None => {
                    tracing::warn!(port = ?update, "ignoring a published port that this node cannot serve")
                }
            }
        }
        for key in update.removed_ports {
            self.ports.retain(|(protocol, published), _| {
                protocol.to_string() != key.protocol || u32::from(*published) != key.published
            });
        }
        // Whoever the leader has withdrawn as well need not be remembered.
        let named: BTreeSet<&str> = self
            .ports
            .values()
            .flat_map(|port| port.backends.iter().map(|b| b.task_id.as_str()))
            .collect();
        self.dead.retain(|task_id| named.contains(task_id.as_str()));
    }

    /// Notes that a task of this node has ended; whether the table names it.
    pub(super) fn withdraw(&mut self, task_id: TaskId) -> bool {
        let was_serving = self.networks.withdraw(task_id);
        let task_id = task_id.to_string();
        let names =
            |port: &PublishedPort| port.backends.iter().any(|backend| backend.task_id == task_id);
        let is_named = self.ports.values().any(names);
        if is_named {
            self.dead.insert(task_id);
        }
        is_named || was_serving
    }

    /// What the table and the networks are of; `None` before the first welcome.
    pub(super) fn version(&self) -> Option<u64> {
        self.pool.map(|_| self.version)
    }

    /// The table for the kernel; `None` before the first welcome.
    pub(super) fn table(&self) -> Option<MeshTable> {
        let peers = self
            .peers
            .iter()
            .map(|(number, underlay)| Peer { number: *number, underlay: *underlay });
        let (pool, slice_prefix) = (self.pool?, MeshTable::default_slice_prefix());
        let own_slice = Slices::new(pool, slice_prefix).ok().map(|all| all.slice(self.number));
        let ports = self.ports.iter().map(|(key, port)| {
            let alive =
                port.backends.iter().filter(|backend| !self.dead.contains(&backend.task_id));
            let alive = alive.cloned().collect();
            let backends = match own_slice.filter(|_| self.local_ports.contains(key)) {
                Some(own_slice) => prefer_local(alive, own_slice),
                None => alive,
            };
            PublishedPort { backends, ..port.clone() }
        });
        // A port of the mesh outranks one of this node, which comes when the other has gone.
        let is_free =
            |port: &PublishedPort| !self.ports.contains_key(&(port.protocol, port.published));
        let host = self.host.published().filter(is_free);
        let host: BTreeMap<(Protocol, u16), PublishedPort> =
            host.map(|port| ((port.protocol, port.published), port)).collect();
        Some(MeshTable {
            version: self.version,
            self_number: self.number,
            pool,
            slice_prefix,
            peers: peers.collect(),
            ipv6: self.ipv6.clone(),
            daemons: self.daemons.clone(),
            ports: ports.chain(host.into_values()).collect(),
        })
    }

    /// The ports of the mesh, which no port of this node alone can have.
    pub(super) fn ingress_ports(&self) -> BTreeSet<(PortProtocol, u16)> {
        let of = |protocol: &Protocol| PortProtocol::of(&protocol.to_string());
        self.ports.keys().filter_map(|(protocol, port)| Some((of(protocol)?, *port))).collect()
    }

    /// The networks of this node, as far as they are known.
    pub(super) fn networks(&self) -> Arc<NetworkTables> {
        Arc::new(NetworkTables {
            version: self.version,
            self_number: self.number,
            peers: self.peers.clone(),
            keys: self.keys.clone(),
            networks: self.networks.tables().clone(),
        })
    }
}

/// The mesh's word for a protocol.
pub(super) fn carried(protocol: PortProtocol) -> Protocol {
    match protocol {
        PortProtocol::Tcp => Protocol::Tcp,
        PortProtocol::Udp => Protocol::Udp,
        PortProtocol::Sctp => Protocol::Sctp,
    }
}

/// How a node's daemon is reached; `None` where its manager is of a version that does not say it.
fn daemon(message: &MeshPeer, underlay: Ipv4Addr) -> Option<Daemon> {
    let port = u16::try_from(message.port).ok().filter(|port| *port != 0)?;
    let node_id = message.node_id.parse().ok()?;
    let address = SocketAddrV4::new(underlay, port);
    Some(Daemon { node_id, address, is_balancer: message.user_space })
}

/// The keys of a node; `None` where this program cannot read them, as if it had none.
fn keys(message: &skep_proto::WireguardKeys) -> Option<WireguardKeys> {
    let keys = message.keys.iter().map(|key| {
        Some(WireguardKey {
            slot: u8::try_from(key.slot).ok().filter(|slot| *slot < SLOTS)?,
            public_key: PublicKey(key.public_key.as_ref().try_into().ok()?),
            port: u16::try_from(key.port).ok()?,
        })
    });
    let current = u8::try_from(message.current).ok()?;
    Some(WireguardKeys { current, keys: keys.collect::<Option<_>>()? })
}

fn published_port(port: &skep_proto::MeshPort) -> Option<PublishedPort> {
    let protocol = carried(PortProtocol::of(&port.protocol)?);
    let backends = port.backends.iter().map(|backend| {
        Some(Backend {
            task_id: backend.task_id.clone(),
            address: backend.address.parse().ok()?,
            target_port: u16::try_from(backend.target_port).ok()?,
        })
    });
    let proxy_protocol = match port.proxy_protocol.as_str() {
        "" => None,
        // Tasks that wait for a header would get none.
        name => Some(ProxyProtocol::of(name)?),
    };
    Some(PublishedPort {
        published: u16::try_from(port.published).ok()?,
        protocol,
        service_id: port.service_id.clone(),
        service: port.service.clone(),
        proxy_protocol,
        backends: backends.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use skep_common::NodeId;
    use skep_proto::{MeshBackend, MeshPort, MeshPortKey};

    use super::*;

    #[test]
    fn keys_of_peers_come_and_go_with_their_nodes() {
        let mut state = MeshState::default();
        let key = skep_proto::WireguardKey { slot: 1, public_key: vec![7; 32].into(), port: 4791 };
        let peer = |keys: Vec<skep_proto::WireguardKey>| MeshPeer {
            number: 1,
            underlay: "10.77.0.1".into(),
            wireguard: Some(skep_proto::WireguardKeys { current: 1, keys }),
            ..MeshPeer::default()
        };
        let update = |peer| MeshUpdate { peers: vec![peer], ..MeshUpdate::default() };
        state.update(update(peer(vec![key.clone()])));
        let read = WireguardKey { slot: 1, public_key: PublicKey([7; 32]), port: 4791 };
        assert_eq!(state.networks().keys[&1], WireguardKeys { current: 1, keys: vec![read] });
        let short = skep_proto::WireguardKey { public_key: vec![7; 31].into(), ..key.clone() };
        state.update(update(peer(vec![short])));
        assert_eq!((state.networks().keys.len(), state.networks().peers.len()), (0, 1));
        state.update(update(peer(vec![key])));
        state.update(MeshUpdate { removed_peers: vec![1], ..MeshUpdate::default() });
        assert!(state.networks().keys.is_empty());
    }

    #[test]
    fn daemons_of_peers_are_known_where_managers_say_how_they_are_reached() {
        let mut state = MeshState::default();
        state.place(2, "10.192.0.0/10".parse().unwrap());
        let peer = |port, user_space| MeshPeer {
            number: 1,
            underlay: "10.77.0.1".into(),
            node_id: NodeId(9).to_string(),
            port,
            user_space,
            ..MeshPeer::default()
        };
        let mut told = |peer| {
            state.update(MeshUpdate { peers: vec![peer], ..MeshUpdate::default() });
            state.table().unwrap().daemons.into_values().next()
        };
        let address = "10.77.0.1:2377".parse().unwrap();
        let daemon = |is_balancer| Daemon { node_id: NodeId(9), address, is_balancer };
        assert_eq!(told(peer(2377, false)), Some(daemon(false)));
        assert_eq!(told(peer(2377, true)), Some(daemon(true)));
        assert_eq!(told(peer(0, false)), None, "an older manager");
        told(peer(2377, true));
        state.update(MeshUpdate { removed_peers: vec![1], ..MeshUpdate::default() });
        assert!(state.table().unwrap().daemons.is_empty());
    }

    fn port(published: u32, tasks: &[u128]) -> MeshPort {
        let backend = |task: &u128| MeshBackend {
            task_id: TaskId(*task).to_string(),
            address: format!("10.192.4.{task}"),
            target_port: 80,
        };
        MeshPort {
            protocol: "tcp".into(),
            published,
            service_id: "s".into(),
            service: "web".into(),
            policy: String::new(),
            proxy_protocol: String::new(),
            backends: tasks.iter().map(backend).collect(),
        }
    }

    fn backends(state: &MeshState, published: u16) -> Vec<String> {
        let table = state.table().unwrap();
        let port = table.ports.iter().find(|port| port.published == published);
        port.map(|p| p.backends.iter().map(|b| b.address.to_string()).collect()).unwrap_or_default()
    }

    #[test]
    fn updates_change_what_they_name_and_the_dead_stay_out_until_withdrawn() {
        let mut state = MeshState::default();
        assert_eq!(state.table(), None);
        state.place(3, "10.192.0.0/10".parse().unwrap());
        let peers = vec![MeshPeer {
            number: 1,
            underlay: "10.77.0.1".into(),
            has_ipv6: true,
            ipv6: vec!["2001:db8::1".into(), "nonsense".into()],
            ..MeshPeer::default()
        }];
        let whole = |ports| MeshUpdate {
            version: 1,
            whole: true,
            peers: peers.clone(),
            ports,
            ..MeshUpdate::default()
        };
        state.update(whole(vec![port(80, &[1, 2]), port(81, &[3])]));
        assert_eq!(backends(&state, 80), ["10.192.4.1", "10.192.4.2"]);
        let address = "2001:db8::1".parse().unwrap();
        let ipv6 = |state: &MeshState| state.table().unwrap().ipv6;
        assert_eq!(ipv6(&state), BTreeMap::from([(1, BTreeSet::from([address]))]));
        assert!(state.withdraw(TaskId(1)));
        assert!(!state.withdraw(TaskId(9)));
        assert_eq!(backends(&state, 80), ["10.192.4.2"]);
        let removed = vec![MeshPortKey { protocol: "tcp".into(), published: 81 }];
        state.update(MeshUpdate { version: 2, removed_ports: removed, ..MeshUpdate::default() });
        assert_eq!(
            backends(&state, 80),
            ["10.192.4.2"],
            "an unrelated update does not revive the dead"
        );
        assert_eq!(backends(&state, 81), Vec::<String>::new());
        state.update(MeshUpdate {
            version: 3,
            ports: vec![port(80, &[2])],
            ..MeshUpdate::default()
        });
        state.update(MeshUpdate {
            version: 4,
            ports: vec![port(80, &[1, 2])],
            ..MeshUpdate::default()
        });
        assert_eq!(
            backends(&state, 80),
            ["10.192.4.1", "10.192.4.2"],
            "a withdrawn task is forgotten"
        );
        assert_eq!(state.table().unwrap().version, 4);
        let without = MeshPeer { has_ipv6: false, ..peers[0].clone() };
        state.update(MeshUpdate { version: 5, peers: vec![without], ..MeshUpdate::default() });
        assert_eq!(ipv6(&state), BTreeMap::new(), "it serves IPv4 alone now");
    }

    #[test]
    fn a_leader_that_keeps_the_table_of_before_names_all_networks() {
        let network = |id: u128| {
            let id = skep_common::NetworkId(id).to_string();
            skep_proto::NetworkUpdate { id, whole: true, ..Default::default() }
        };
        let ids = |state: &MeshState| -> Vec<u128> {
            state.networks().networks.keys().map(|id| id.0).collect()
        };
        let mut state = MeshState::default();
        state.place(1, "10.192.0.0/10".parse().unwrap());
        let (ports, networks) = (vec![port(8080, &[1])], vec![network(1), network(2)]);
        state.update(MeshUpdate { whole: true, ports, networks, ..MeshUpdate::default() });
        assert_eq!(ids(&state), [1, 2]);
        let networks = vec![network(2), network(3)];
        state.update(MeshUpdate { kept: true, networks, ..MeshUpdate::default() });
        assert_eq!((ids(&state), backends(&state, 8080).len()), (vec![2, 3], 1));
    }

    #[test]
    fn a_port_whose_header_this_program_does_not_know_is_not_served() {
        let mut state = MeshState::default();
        state.place(1, "10.192.0.0/10".parse().unwrap());
        let with = |published, proxy_protocol: &str| MeshPort {
            proxy_protocol: proxy_protocol.into(),
            ..port(published, &[1])
        };
        let ports = vec![with(80, ""), with(81, "v2"), with(82, "v3")];
        state.update(MeshUpdate { version: 1, whole: true, ports, ..MeshUpdate::default() });
        let ports = state.table().unwrap().ports;
        let read: Vec<_> = ports.iter().map(|port| (port.published, port.proxy_protocol)).collect();
        assert_eq!(read, [(80, None), (81, Some(ProxyProtocol::V2))]);
    }

    #[test]
    fn a_local_port_goes_to_the_nodes_own_tasks_as_long_as_some_live() {
        let mut state = MeshState::default();
        state.place(1, "10.192.0.0/10".parse().unwrap());
        let far = MeshBackend { address: "10.192.8.9".into(), ..port(80, &[9]).backends.remove(0) };
        let update = |version, policy: &str| {
            let mut port = MeshPort { policy: policy.into(), ..port(80, &[1, 2]) };
            port.backends.push(far.clone());
            MeshUpdate { version, whole: version == 1, ports: vec![port], ..MeshUpdate::default() }
        };
        state.update(update(1, "local"));
        assert_eq!(backends(&state, 80), ["10.192.4.1", "10.192.4.2"]);
        state.withdraw(TaskId(1));
        assert_eq!(backends(&state, 80), ["10.192.4.2"]);
        state.withdraw(TaskId(2));
        assert_eq!(backends(&state, 80), ["10.192.8.9"], "there is none of its own");
        state.update(update(2, "spread"));
        assert_eq!(backends(&state, 80), ["10.192.8.9"], "the dead stay out");
        let mut again = MeshState::default();
        again.place(1, "10.192.0.0/10".parse().unwrap());
        again.update(update(1, "spread"));
        assert_eq!(backends(&again, 80), ["10.192.4.1", "10.192.4.2", "10.192.8.9"]);
    }
}
