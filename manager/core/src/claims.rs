//! What a node says of itself and others are to rely on: it may not claim what is another node's.
//!
//! A key names a peer of every node's tunnels, and traffic to a node's IPv6 addresses is let into the mesh: a node that
//! claimed those of another one would take its traffic, or cut it off. Who has something in the store keeps it.
//! A node that is down keeps its keys alone, since an address may move to another machine.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use skep_common::limits::IPV6_ADDRESSES_MAX;
use skep_common::object::{NodeDescription, NodeState};
use skep_common::wireguard::{PublicKey, SLOTS, port};
use skep_common::{Node, NodeId};

use crate::store::{Table, changed};

/// What nodes have, as far as it is stored or was accepted since.
#[derive(Debug, Default)]
pub struct Claims {
    nodes: Table<NodeId, Node>,
    stored: Owners,
    /// Not stored yet.
    accepted: Owners,
}

/// Who has what.
#[derive(Debug, Default)]
struct Owners {
    keys: BTreeSet<(PublicKey, NodeId)>,
    addresses: BTreeSet<(Ipv6Addr, NodeId)>,
}

impl Owners {
    fn of_key(&self, key: PublicKey) -> impl Iterator<Item = NodeId> {
        let (first, last) = ((key, NodeId(0)), (key, NodeId(u128::MAX)));
        self.keys.range(first..=last).map(|(_, owner)| *owner)
    }

    fn of_address(&self, address: Ipv6Addr) -> impl Iterator<Item = NodeId> {
        let (first, last) = ((address, NodeId(0)), (address, NodeId(u128::MAX)));
        self.addresses.range(first..=last).map(|(_, owner)| *owner)
    }
}

fn keys(said: &NodeDescription) -> impl Iterator<Item = PublicKey> {
    let keys = said.wireguard.iter().flat_map(|wireguard| &wireguard.public.keys);
    keys.map(|key| key.public_key)
}

fn addresses(said: &NodeDescription) -> impl Iterator<Item = Ipv6Addr> {
    said.ipv6_addresses.iter().flatten().copied()
}

/// A node that is down keeps its keys alone.
fn has_addresses(node: &Node) -> bool {
    node.status.state != NodeState::Down
}

impl Claims {
    /// Brings them up to date. Gives the nodes that changed, and those that had, or have, the same as these.
    pub fn update(&mut self, nodes: &Table<NodeId, Node>) -> BTreeSet<NodeId> {
        self.accepted = Owners::default();
        let mut concerned = BTreeSet::new();
        if nodes.ptr_eq(&self.nodes) {
            return concerned;
        }
        for node_id in changed(&self.nodes, nodes) {
            concerned.insert(node_id);
            let (old, new) = (self.nodes.get(&node_id), nodes.get(&node_id));
            let owners = &mut self.stored;
            for (node, is_new) in [(old, false), (new, true)] {
                let Some(node) = node else { continue };
                let Some(description) = &node.description else { continue };
                for key in keys(description) {
                    match is_new {
                        true => owners.keys.insert((key, node_id)),
                        false => owners.keys.remove(&(key, node_id)),
                    };
                    concerned.extend(owners.of_key(key));
                }
                for address in addresses(description).filter(|_| has_addresses(node)) {
                    match is_new {
                        true => owners.addresses.insert((address, node_id)),
                        false => owners.addresses.remove(&(address, node_id)),
                    };
                    concerned.extend(owners.of_address(address));
                }
            }
        }
        self.nodes = nodes.clone();
        concerned
    }

    /// What of a node's description is to be stored, which it is from then on, or until the next update.
    pub fn accept(&mut self, node_id: NodeId, said: &NodeDescription) -> NodeDescription {
        let mut accepted = said.clone();
        let stored = self.nodes.get(&node_id).and_then(|node| node.description.as_ref());
        if let Some(wireguard) = &mut accepted.wireguard {
            wireguard.public.keys.retain(|key| {
                let is_its_place = key.slot < SLOTS && key.port == port(key.slot);
                let key = key.public_key;
                let owners = self.stored.of_key(key).chain(self.accepted.of_key(key));
                let had = stored.is_some_and(|stored| keys(stored).any(|known| known == key));
                is_its_place && is_free(owners, node_id, had)
            });
        }
        if let Some(said) = &mut accepted.ipv6_addresses {
            said.retain(|address| {
                let owners = self.stored.of_address(*address);
                let owners = owners.chain(self.accepted.of_address(*address));
                let known = stored.and_then(|stored| stored.ipv6_addresses.as_ref());
                is_free(owners, node_id, known.is_some_and(|known| known.contains(address)))
            });
            while said.len() > IPV6_ADDRESSES_MAX {
                said.pop_last();
            }
        }
        self.accepted.keys.extend(keys(&accepted).map(|key| (key, node_id)));
        self.accepted.addresses.extend(addresses(&accepted).map(|address| (address, node_id)));
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
    use crate::{Action, Expect};

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

    fn claims(world: &World) -> Claims {
        let mut claims = Claims::default();
        claims.update(world.state.nodes());
        claims
    }

    fn accepted(claims: &mut Claims, said: &Node) -> (usize, usize) {
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
            assert_eq!(accepted(&mut claims(&world), &said), expect, "{name}");
        }
        let mut claims = claims(&world);
        assert_eq!(accepted(&mut claims, &with(7, 7, 4790, 7)), (1, 1));
        assert_eq!(accepted(&mut claims, &with(6, 7, 4790, 7)), (0, 0), "two at once");
    }

    #[test]
    fn a_change_concerns_those_who_have_the_same() {
        let mut world = World::new("", service(0), "");
        let put = |world: &mut World, node: Node| {
            let object = Object::Node(Box::new(node));
            world.apply(vec![Action::Put { object, expect: Expect::Present }]);
        };
        let stored = [with(1, 1, 4790, 1), with(2, 2, 4790, 2), with(3, 1, 4790, 9)];
        world.put(stored.map(|node| Object::Node(Box::new(node))).to_vec());
        let mut claims = claims(&world);
        let mut after = |world: &World| -> Vec<u128> {
            claims.update(world.state.nodes()).into_iter().map(|id| id.0).collect()
        };
        assert_eq!(after(&world), [] as [u128; 0]);
        put(&mut world, with(2, 2, 4790, 9));
        assert_eq!(after(&world), [2, 3], "an address");
        put(&mut world, with(1, 7, 4790, 1));
        assert_eq!(after(&world), [1, 3], "a key that another one has still");
        let mut down = with(3, 1, 4790, 9);
        down.status.state = NodeState::Down;
        put(&mut world, down);
        assert_eq!(after(&world), [2, 3], "an address that is free now");
        let said = with(4, 1, 4790, 9);
        assert_eq!(accepted(&mut claims, &said), (0, 0), "node 2 has it");
        assert_eq!(claims.update(world.state.nodes()), BTreeSet::new());
    }

    #[test]
    fn a_node_has_a_bounded_number_of_addresses() {
        let world = World::new("", service(0), "");
        let said = NodeDescription {
            ipv6_addresses: Some((0..1000).map(address).collect()),
            ..NodeDescription::default()
        };
        let accepted = claims(&world).accept(NodeId(1), &said);
        assert_eq!(accepted.ipv6_addresses.unwrap().len(), IPV6_ADDRESSES_MAX);
    }
}
