//! What a node says of itself and others are to rely on: it may not claim what is another node's.
//!
//! A key names a peer of every node's tunnels, and traffic to a node's IPv6 addresses is let into the mesh: a node that
//! claimed those of another one would take its traffic, or cut it off. Who has something in the store keeps it.
//! A node that is down keeps its keys alone, since an address may move to another machine.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use skep_common::NodeId;
use skep_common::limits::IPV6_ADDRESSES_MAX;
use skep_common::object::{NodeDescription, NodeState};
use skep_common::wireguard::{PublicKey, SLOTS, port};

use crate::store::State;

/// What nodes have, as far as it is stored or was accepted since.
#[derive(Debug)]
pub struct Claims<'a> {
    state: &'a State,
    keys: BTreeSet<(PublicKey, NodeId)>,
    addresses: BTreeSet<(Ipv6Addr, NodeId)>,
}

impl<'a> Claims<'a> {
    /// Those of a state.
    pub fn of(state: &'a State) -> Self {
        let mut claims = Self { state, keys: BTreeSet::new(), addresses: BTreeSet::new() };
        for node in state.nodes().values() {
            let Some(description) = &node.description else { continue };
            claims.note(node.id, description, node.status.state != NodeState::Down);
        }
        claims
    }

    fn note(&mut self, node_id: NodeId, description: &NodeDescription, is_alive: bool) {
        let keys = description.wireguard.iter().flat_map(|wireguard| &wireguard.public.keys);
        self.keys.extend(keys.map(|key| (key.public_key, node_id)));
        let addresses = description.ipv6_addresses.iter().flatten().filter(|_| is_alive);
        self.addresses.extend(addresses.map(|address| (*address, node_id)));
    }

    /// What of a node's description is to be stored, which it is from then on.
    pub fn accept(&mut self, node_id: NodeId, said: &NodeDescription) -> NodeDescription {
        let mut accepted = said.clone();
        let stored = self.state.node(node_id).and_then(|node| node.description.as_ref());
        let had = |key: &PublicKey| {
            let known = stored.and_then(|stored| stored.wireguard.as_ref());
            known.is_some_and(|known| known.public.keys.iter().any(|one| one.public_key == *key))
        };
        if let Some(wireguard) = &mut accepted.wireguard {
            wireguard.public.keys.retain(|key| {
                let is_its_place = key.slot < SLOTS && key.port == port(key.slot);
                let (first, last) =
                    ((key.public_key, NodeId(0)), (key.public_key, NodeId(u128::MAX)));
                let owners = self.keys.range(first..=last).map(|(_, owner)| *owner);
                is_its_place && is_free(owners, node_id, had(&key.public_key))
            });
        }
        if let Some(addresses) = &mut accepted.ipv6_addresses {
            let known = stored.and_then(|stored| stored.ipv6_addresses.as_ref());
            addresses.retain(|address| {
                let (first, last) = ((*address, NodeId(0)), (*address, NodeId(u128::MAX)));
                let owners = self.addresses.range(first..=last).map(|(_, owner)| *owner);
                is_free(owners, node_id, known.is_some_and(|known| known.contains(address)))
            });
            while addresses.len() > IPV6_ADDRESSES_MAX {
                addresses.pop_last();
            }
        }
        self.note(node_id, &accepted, true);
        accepted
    }
}

/// Of several that have the same already, the first by id keeps it: the answer stays the same at every look.
fn is_free(mut owners: impl Iterator<Item = NodeId>, node_id: NodeId, had: bool) -> bool {
    owners.all(|owner| owner == node_id || had && node_id < owner)
}

#[cfg(test)]
mod tests {
    use skep_common::wireguard::{WireguardDescription, WireguardKey};
    use skep_common::{Node, Object};

    use super::*;
    use crate::testing::{World, node, service};

    fn address(last: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last)
    }

    /// A node with a key, by its first byte, in slot 0 and an address.
    fn with(number: u16, key: u8, port: u16, last: u16) -> Node {
        let mut node = node(number);
        let mut wireguard = WireguardDescription::default();
        wireguard.public.keys =
            vec![WireguardKey { slot: 0, public_key: PublicKey([key; 32]), port }];
        let description = node.description.as_mut().unwrap();
        description.wireguard = Some(wireguard);
        description.ipv6_addresses = Some([address(last)].into());
        node
    }

    fn accepted(claims: &mut Claims<'_>, said: &Node) -> (usize, usize) {
        let accepted = claims.accept(said.id, said.description.as_ref().unwrap());
        (accepted.wireguard.unwrap().public.keys.len(), accepted.ipv6_addresses.unwrap().len())
    }

    #[test]
    fn nobody_has_what_another_node_has() {
        let mut world = World::new("", service(0), "");
        let mut gone = with(3, 3, 4790, 3);
        gone.status.state = NodeState::Down;
        let stored = [with(1, 1, 4790, 1), with(2, 2, 4790, 2), gone, with(5, 1, 4790, 1)];
        world.put(stored.map(|node| Object::Node(Box::new(node))).to_vec());
        for (name, said, expect) in [
            ("its own", with(2, 2, 4790, 2), (1, 1)),
            ("those of another, though it has the lower id", with(1, 2, 4790, 2), (0, 0)),
            ("a port that is not WireGuard's", with(2, 2, 53, 2), (0, 1)),
            ("what a node that is down had", with(2, 3, 4790, 3), (0, 1)),
            ("new ones", with(2, 9, 4790, 9), (1, 1)),
            ("what two have: the first", with(1, 1, 4790, 1), (1, 1)),
            ("what two have: the second", with(5, 1, 4790, 1), (0, 0)),
        ] {
            assert_eq!(accepted(&mut Claims::of(&world.state), &said), expect, "{name}");
        }
        let mut claims = Claims::of(&world.state);
        assert_eq!(accepted(&mut claims, &with(7, 7, 4790, 7)), (1, 1));
        assert_eq!(accepted(&mut claims, &with(6, 7, 4790, 7)), (0, 0), "two at once");
    }

    #[test]
    fn a_node_has_a_bounded_number_of_addresses() {
        let world = World::new("", service(0), "");
        let said = NodeDescription {
            ipv6_addresses: Some((0..1000).map(address).collect()),
            ..NodeDescription::default()
        };
        let accepted = Claims::of(&world.state).accept(NodeId(1), &said);
        assert_eq!(accepted.ipv6_addresses.unwrap().len(), IPV6_ADDRESSES_MAX);
    }
}
