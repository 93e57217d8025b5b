//! Tables as nodes are told of them.
//!
//! Published ports and peers are the same for all nodes, and a thousand nodes are told of a new one at once: what
//! makes one table of another is encoded once. Networks are each node's own, and follow behind it: two encodings
//! of one message in a row are one message with the fields of both.
//!
//! A node that comes from another leader has the table already, mostly: leaders make equal tables of equal states. It
//! says which one by its digest, and is told the whole one only where that is another.

use std::net::Ipv4Addr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use skep_common::wireguard::{WireguardKey, WireguardKeys};
use skep_common::{NetworkId, ServiceId, TaskId};
use skep_manager_core::endpoints::networks::{
    Endpoint, NamedPort, NetworkChanges, NetworkService, Settings,
};
use skep_manager_core::endpoints::{self, NodeTable, PortKey, Table};
use skep_proto::{
    MeshBackend, MeshPeer, MeshPort, MeshPortKey, MeshUpdate, NetworkEndpoint, NetworkSettings,
    NetworkUpdate,
};

/// Tables that sessions were told before they are told the newest: most the same one, or none.
const KEPT_MAX: usize = 8;

/// What was encoded of the newest table.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    newest: Arc<Table>,
    digest: TableDigest,
    /// By the table that it changes; none: it is the whole one.
    by_told: Vec<(Option<Arc<Table>>, Bytes)>,
}

impl Encoded {
    /// What makes the table that the node was told the newest one, as an encoded [`MeshUpdate`]. Where it was told
    /// none, it said that it has the one of that digest.
    pub(super) fn update(
        &mut self,
        told: Option<&NodeTable>,
        has: &[u8],
        version: u64,
        newest: &NodeTable,
    ) -> Bytes {
        self.take(&newest.table);
        let empty = NodeTable::default();
        let changes = told.unwrap_or(&empty).diff_networks(newest);
        let of_node = MeshUpdate {
            version,
            networks: changes.networks.iter().map(network_update).collect(),
            removed_networks: changes.removed_networks.iter().map(ToString::to_string).collect(),
            ..MeshUpdate::default()
        };
        let of_all = match told {
            None if *has == self.digest.0.to_be_bytes() => self.kept(),
            told => self.of_all(told.map(|told| &told.table)),
        };
        let mut encoded = BytesMut::with_capacity(of_all.len() + of_node.encoded_len());
        encoded.extend_from_slice(&of_all);
        of_node.encode(&mut encoded).expect("there is room for it");
        encoded.freeze()
    }

    fn take(&mut self, newest: &Arc<Table>) {
        if Arc::ptr_eq(&self.newest, newest) {
            return;
        }
        self.digest.change(&self.newest, newest);
        self.newest = Arc::clone(newest);
        self.by_told.clear();
    }

    fn kept(&self) -> Bytes {
        let digest = self.digest.to_bytes();
        Bytes::from(MeshUpdate { kept: true, digest, ..MeshUpdate::default() }.encode_to_vec())
    }

    fn of_all(&mut self, told: Option<&Arc<Table>>) -> Bytes {
        let is_it = |known: &Option<Arc<Table>>| match (known, told) {
            (Some(known), Some(told)) => Arc::ptr_eq(known, told),
            (None, None) => true,
            _ => false,
        };
        if let Some((_, encoded)) = self.by_told.iter().find(|(known, _)| is_it(known)) {
            return encoded.clone();
        }
        let digest = self.digest.to_bytes();
        let update = MeshUpdate { digest, ..table_update(told, &self.newest) };
        let encoded = Bytes::from(update.encode_to_vec());
        if self.by_told.len() == KEPT_MAX {
            self.by_told.remove(0);
        }
        self.by_told.push((told.cloned(), encoded.clone()));
        encoded
    }
}

/// The same for equal tables, whichever leader made them, and brought up to date change by change: the sum of the
/// digests of all peers and ports as they are sent. Whoever may create services could make entries that together hide
/// a change from nodes, and may as well remove what they lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct TableDigest(u128);

impl TableDigest {
    fn change(&mut self, old: &Table, new: &Table) {
        let changes = endpoints::diff(old, new);
        for number in changes.peers.keys().chain(&changes.removed_peers) {
            self.replace(old.peers.get(number).map(|peer| mesh_peer((number, peer))), None);
        }
        for peer in &changes.peers {
            self.replace(None, Some(mesh_peer(peer)));
        }
        for key in changes.ports.keys().chain(&changes.removed_ports) {
            self.replace(old.ports.get(key).map(|port| mesh_port((key, port))), None);
        }
        for port in &changes.ports {
            self.replace(None, Some(mesh_port(port)));
        }
    }

    fn replace<M: prost::Message>(&mut self, old: Option<M>, new: Option<M>) {
        let digest = |entry: M| {
            let hash = Sha256::digest(entry.encode_to_vec());
            let (half, _) = hash.split_first_chunk().expect("a hash has 32 bytes");
            u128::from_be_bytes(*half)
        };
        self.0 = self.0.wrapping_sub(old.map_or(0, digest)).wrapping_add(new.map_or(0, digest));
    }

    fn to_bytes(self) -> Bytes {
        Bytes::copy_from_slice(&self.0.to_be_bytes())
    }
}

fn table_update(told: Option<&Arc<Table>>, newest: &Table) -> MeshUpdate {
    let empty = Table::default();
    let changes = endpoints::diff(told.map_or(&empty, |told| told), newest);
    let key = |(protocol, published): &PortKey| MeshPortKey {
        protocol: protocol.name().to_owned(),
        published: (*published).into(),
    };
    MeshUpdate {
        whole: told.is_none(),
        peers: changes.peers.iter().map(mesh_peer).collect(),
        removed_peers: changes.removed_peers.iter().map(|number| u32::from(*number)).collect(),
        ports: changes.ports.iter().map(mesh_port).collect(),
        removed_ports: changes.removed_ports.iter().map(key).collect(),
        ..MeshUpdate::default()
    }
}

fn mesh_peer((number, peer): (&u16, &Arc<endpoints::Peer>)) -> MeshPeer {
    MeshPeer {
        number: (*number).into(),
        underlay: peer.underlay.to_string(),
        has_ipv6: peer.ipv6.is_some(),
        ipv6: peer.ipv6.iter().flatten().map(ToString::to_string).collect(),
        wireguard: peer.wireguard.as_ref().map(wireguard_keys),
        node_id: peer.node_id.to_string(),
        port: peer.port.into(),
        user_space: peer.is_in_user_space,
    }
}

fn wireguard_keys(keys: &WireguardKeys) -> skep_proto::WireguardKeys {
    let key = |key: &WireguardKey| skep_proto::WireguardKey {
        slot: key.slot.into(),
        public_key: key.public_key.0.to_vec().into(),
        port: key.port.into(),
    };
    skep_proto::WireguardKeys {
        current: keys.current.into(),
        keys: keys.keys.iter().map(key).collect(),
    }
}

fn mesh_port((id, port): (&PortKey, &Arc<endpoints::Port>)) -> MeshPort {
    let backend = |(task_id, address): (&TaskId, &Ipv4Addr)| MeshBackend {
        task_id: task_id.to_string(),
        address: address.to_string(),
        target_port: port.target_port.into(),
    };
    MeshPort {
        protocol: id.0.name().to_owned(),
        published: id.1.into(),
        service_id: port.service_id.to_string(),
        service: port.service.clone(),
        policy: port.policy.name().to_owned(),
        proxy_protocol: port
            .proxy_protocol
            .map(|version| version.name().to_owned())
            .unwrap_or_default(),
        backends: port.backends.iter().map(backend).collect(),
    }
}

fn network_update((network_id, changes): (&NetworkId, &NetworkChanges)) -> NetworkUpdate {
    NetworkUpdate {
        id: network_id.to_string(),
        whole: changes.is_whole,
        settings: changes.settings.as_ref().map(network_settings),
        endpoints: changes.endpoints.iter().map(|(id, place)| endpoint(*id, place)).collect(),
        removed_endpoints: changes.removed_endpoints.iter().map(ToString::to_string).collect(),
        services: changes.services.iter().map(|(id, entry)| network_service(*id, entry)).collect(),
        removed_services: changes.removed_services.iter().map(ToString::to_string).collect(),
    }
}

fn network_settings(settings: &Settings) -> NetworkSettings {
    NetworkSettings {
        name: settings.name.clone(),
        vni: settings.vni,
        subnets: settings.subnets.iter().map(ToString::to_string).collect(),
        mtu: settings.mtu,
        internal: settings.internal,
        encrypted: settings.encrypted,
    }
}

fn endpoint(task_id: TaskId, endpoint: &Endpoint) -> NetworkEndpoint {
    NetworkEndpoint {
        task_id: task_id.to_string(),
        service_id: endpoint.service_id.to_string(),
        name: endpoint.name.clone(),
        addresses: endpoint.addresses.iter().map(ToString::to_string).collect(),
        node_number: endpoint.node_number.into(),
        serving: endpoint.serving,
        hostname: endpoint.hostname.clone().unwrap_or_default(),
    }
}

fn network_service(service_id: ServiceId, entry: &NetworkService) -> skep_proto::NetworkService {
    skep_proto::NetworkService {
        service_id: service_id.to_string(),
        name: entry.name.clone(),
        aliases: entry.aliases.clone(),
        virtual_ips: entry.virtual_ips.iter().map(ToString::to_string).collect(),
        ports: entry.ports.iter().map(named_port).collect(),
    }
}

fn named_port(port: &NamedPort) -> skep_proto::NamedPort {
    skep_proto::NamedPort {
        name: port.name.clone(),
        protocol: port.protocol.name().to_owned(),
        target_port: port.target_port.into(),
    }
}

#[cfg(test)]
mod tests {
    use skep_common::spec::{IngressPolicy, PortProtocol};
    use skep_manager_core::endpoints::{Peer, Port};

    use super::*;

    fn table(numbers: std::ops::Range<u16>) -> NodeTable {
        let peer = |number: u16| {
            let peer = Peer {
                underlay: Ipv4Addr::from(u32::from(number)),
                ipv6: None,
                wireguard: None,
                node_id: skep_common::NodeId(number.into()),
                port: 2377,
                is_in_user_space: false,
            };
            (number, Arc::new(peer))
        };
        let table = Table { peers: numbers.map(peer).collect(), ..Table::default() };
        NodeTable { table: Arc::new(table), ..NodeTable::default() }
    }

    #[test]
    fn every_node_is_told_what_is_new_for_it() {
        let mut encoded = Encoded::default();
        let (old, middle, new) = (table(1..3), table(1..4), table(2..5));
        for (name, told, newest, is_whole, peers, removed) in [
            ("the first", None, &middle, true, &[1, 2, 3][..], &[][..]),
            ("a peer more", Some(&old), &middle, false, &[3], &[]),
            ("it has that", Some(&middle), &middle, false, &[], &[]),
            ("newer", Some(&middle), &new, false, &[4], &[1]),
            ("newer, from the one before", Some(&old), &new, false, &[3, 4], &[1]),
            ("again", Some(&middle), &new, false, &[4], &[1]),
            ("another first", None, &new, true, &[2, 3, 4], &[]),
        ] {
            let bytes = encoded.update(told, &[], 7, newest);
            let update = MeshUpdate::decode(bytes).unwrap();
            let told: Vec<u32> = update.peers.iter().map(|peer| peer.number).collect();
            let found = (update.version, update.whole, &told[..], &update.removed_peers[..]);
            assert_eq!(found, (7, is_whole, peers, removed), "{name}");
        }
    }

    fn port((published, task_id): (u16, u128)) -> (PortKey, Arc<Port>) {
        let port = Port {
            service_id: ServiceId(7),
            service: "web".into(),
            target_port: 80,
            policy: IngressPolicy::Spread,
            proxy_protocol: None,
            backends: [(TaskId(task_id), Ipv4Addr::LOCALHOST)].into_iter().collect(),
        };
        ((PortProtocol::Tcp, published), Arc::new(port))
    }

    /// A leader of before told the node a table after others; another leader begins with its own.
    #[test]
    fn a_node_that_has_the_table_of_the_next_leader_is_not_told_it_again() {
        let with = |peers: std::ops::Range<u16>, ids: &[(u16, u128)]| {
            let ports = ids.iter().copied().map(port).collect();
            let peers = table(peers).table.peers.clone();
            NodeTable { table: Arc::new(Table { peers, ports }), ..NodeTable::default() }
        };
        let history = [with(1..3, &[]), with(1..9, &[(80, 1), (81, 1)]), with(2..5, &[(80, 2)])];
        let mut before = Encoded::default();
        let mut told = None;
        let mut has = Bytes::new();
        for table in &history {
            has = MeshUpdate::decode(before.update(told, &[], 7, table)).unwrap().digest;
            told = Some(table);
        }
        for (name, has, newest, is_kept) in [
            ("the same", &has[..], with(2..5, &[(80, 2)]), true),
            ("a peer more", &has, with(2..6, &[(80, 2)]), false),
            ("a peer less", &has, with(2..4, &[(80, 2)]), false),
            ("another backend", &has, with(2..5, &[(80, 3)]), false),
            ("another port", &has, with(2..5, &[(81, 2)]), false),
            ("it says nothing", &[], with(2..5, &[(80, 2)]), false),
            ("nothing of nothing", &[], NodeTable::default(), false),
        ] {
            let update = Encoded::default().update(None, has, 9, &newest);
            let update = MeshUpdate::decode(update).unwrap();
            let n_told = if is_kept { 0 } else { newest.table.peers.len() };
            assert_eq!((update.version, update.peers.len()), (9, n_told), "{name}");
            assert_eq!((update.kept, update.whole), (is_kept, !is_kept), "{name}");
            assert_eq!(update.digest == has, is_kept, "{name}");
        }
    }
}
