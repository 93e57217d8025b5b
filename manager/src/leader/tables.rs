//! Tables as nodes are told of them.
//!
//! Published ports and peers are the same for all nodes, and a thousand nodes are told of a new one at once: what
//! makes one table of another is encoded once. Networks are each node's own, and follow behind it: two encodings
//! of one message in a row are one message with the fields of both.

use std::net::Ipv4Addr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use prost::Message as _;
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
    /// By the table that it changes; none: it is the whole one.
    by_told: Vec<(Option<Arc<Table>>, Bytes)>,
}

impl Encoded {
    /// What makes the table that the node was told the newest one, as an encoded [`MeshUpdate`].
    pub(super) fn update(
        &mut self,
        told: Option<&NodeTable>,
        version: u64,
        newest: &NodeTable,
    ) -> Bytes {
        let empty = NodeTable::default();
        let changes = told.unwrap_or(&empty).diff_networks(newest);
        let of_node = MeshUpdate {
            version,
            networks: changes.networks.iter().map(network_update).collect(),
            removed_networks: changes.removed_networks.iter().map(ToString::to_string).collect(),
            ..MeshUpdate::default()
        };
        let of_all = self.of_all(told.map(|told| &told.table), &newest.table);
        let mut encoded = BytesMut::with_capacity(of_all.len() + of_node.encoded_len());
        encoded.extend_from_slice(&of_all);
        of_node.encode(&mut encoded).expect("there is room for it");
        encoded.freeze()
    }

    fn of_all(&mut self, told: Option<&Arc<Table>>, newest: &Arc<Table>) -> Bytes {
        if !Arc::ptr_eq(&self.newest, newest) {
            *self = Self { newest: Arc::clone(newest), by_told: Vec::new() };
        }
        let is_it = |known: &Option<Arc<Table>>| match (known, told) {
            (Some(known), Some(told)) => Arc::ptr_eq(known, told),
            (None, None) => true,
            _ => false,
        };
        if let Some((_, encoded)) = self.by_told.iter().find(|(known, _)| is_it(known)) {
            return encoded.clone();
        }
        let encoded = Bytes::from(table_update(told, newest).encode_to_vec());
        if self.by_told.len() == KEPT_MAX {
            self.by_told.remove(0);
        }
        self.by_told.push((told.cloned(), encoded.clone()));
        encoded
    }
}

fn table_update(told: Option<&Arc<Table>>, newest: &Table) -> MeshUpdate {
    let empty = Table::default();
    let changes = endpoints::diff(told.map_or(&empty, |told| told), newest);
    let key = |(protocol, published): &PortKey| MeshPortKey {
        protocol: protocol.name().to_owned(),
        published: (*published).into(),
    };
    let peer = |(number, peer): (&u16, &Arc<endpoints::Peer>)| MeshPeer {
        number: (*number).into(),
        underlay: peer.underlay.to_string(),
        has_ipv6: peer.ipv6.is_some(),
        ipv6: peer.ipv6.iter().flatten().map(ToString::to_string).collect(),
        wireguard: peer.wireguard.as_ref().map(wireguard_keys),
        node_id: peer.node_id.to_string(),
        port: peer.port.into(),
        user_space: peer.is_in_user_space,
    };
    MeshUpdate {
        whole: told.is_none(),
        peers: changes.peers.iter().map(peer).collect(),
        removed_peers: changes.removed_peers.iter().map(|number| u32::from(*number)).collect(),
        ports: changes.ports.iter().map(mesh_port).collect(),
        removed_ports: changes.removed_ports.iter().map(key).collect(),
        ..MeshUpdate::default()
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
    use skep_manager_core::endpoints::Peer;

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
            let bytes = encoded.update(told, 7, newest);
            let update = MeshUpdate::decode(bytes).unwrap();
            let told: Vec<u32> = update.peers.iter().map(|peer| peer.number).collect();
            let found = (update.version, update.whole, &told[..], &update.removed_peers[..]);
            assert_eq!(found, (7, is_whole, peers, removed), "{name}");
        }
    }
}
