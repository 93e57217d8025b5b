//! Golden plans, and the property that a plan makes what it promises.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::prelude::*;
use skep_common::wireguard::{self, PublicKey, WireguardKey, WireguardKeys};
use skep_common::{ServiceId, TaskId};

use super::*;

/// Endpoints as words: `address[,address]@node`, with `!` in front where it does not serve; service 1.
fn network(endpoints: &str, vips: &str) -> NetworkTable {
    let endpoints = endpoints.split_whitespace().enumerate().map(|(n, word)| {
        let (addresses, node) = word.split_once('@').expect("address@node");
        let serving = !addresses.starts_with('!');
        let addresses = addresses.trim_start_matches('!').split(',');
        let entry = EndpointEntry {
            service_id: ServiceId(1),
            name: format!("web.{n}"),
            hostname: None,
            addresses: addresses.map(|address| address.parse().unwrap()).collect(),
            node_number: node.parse().unwrap(),
            serving,
        };
        (TaskId(u128::try_from(n).unwrap()), entry)
    });
    let service = ServiceEntry {
        name: "web".into(),
        virtual_ips: vips.split_whitespace().map(|vip| vip.parse().unwrap()).collect(),
        ..ServiceEntry::default()
    };
    NetworkTable {
        name: "front".into(),
        vni: 20480,
        subnets: vec!["10.0.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        endpoints: endpoints.collect(),
        services: BTreeMap::from([(ServiceId(1), service)]),
        ..NetworkTable::default()
    }
}

fn tables() -> NetworkTables {
    let underlay = |n: u8| (u16::from(n), std::net::Ipv4Addr::new(10, 98, 0, n));
    NetworkTables { self_number: 1, peers: (1..4).map(underlay).collect(), ..Default::default() }
}

#[track_caller]
fn check<T: ToString>(name: &str, ops: &[T], expect: &str) {
    let text: Vec<String> = ops.iter().map(T::to_string).collect();
    let expect: Vec<&str> = expect.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(text, expect, "{name}");
}

#[test]
fn a_tunnel_knows_the_tasks_of_other_nodes_and_no_others() {
    let one = Reach::of(&tables(), &network("10.0.1.2@1 10.0.1.3,fd00:1::3@2 10.0.1.4@9", ""));
    check(
        "a task of this node, one of another, one of a node that is not known",
        &Reach::default().diff(&one),
        "set forwarding 02:42:0a:00:01:03 = 10.98.0.2
         set neighbour 10.0.1.3 = 02:42:0a:00:01:03
         set neighbour fd00:1::3 = 02:42:0a:00:01:03",
    );
    let moved = Reach::of(&tables(), &network("10.0.1.3@3", ""));
    check(
        "an address that another node's task has now, without IPv6",
        &one.diff(&moved),
        "set forwarding 02:42:0a:00:01:03 = 10.98.0.3
         delete neighbour fd00:1::3",
    );
    check(
        "what the tunnel answers for goes before where it sends",
        &moved.diff(&Reach::default()),
        "delete neighbour 10.0.1.3
         delete forwarding 02:42:0a:00:01:03",
    );
}

#[test]
fn a_virtual_address_stands_for_the_serving_tasks_of_its_family() {
    let vips = |endpoints, addresses| Vips::of(&network(endpoints, addresses), &Vips::default());
    let old = vips("10.0.1.4@2 10.0.1.3,fd00:1::3@1 !10.0.1.5@1", "10.0.1.2 fd00:1::2");
    check(
        "all are new",
        &Vips::default().diff(&old),
        "add vip 10.0.1.2 -> 10.0.1.3 10.0.1.4
         add vip fd00:1::2 -> fd00:1::3",
    );
    let new = vips("10.0.1.4@2 !10.0.1.3,fd00:1::3@1 10.0.1.5@1", "10.0.1.2 fd00:1::2");
    check(
        "one is withdrawn, one begins",
        &old.diff(&new),
        "replace vip 10.0.1.2 -> 10.0.1.4 10.0.1.5
         replace vip fd00:1::2 -> reject",
    );
    let more = vips("10.0.1.4@2 !10.0.1.3,fd00:1::3@1 10.0.1.5@1 !10.0.1.9@3", "10.0.1.2");
    check("an unrelated endpoint is no change", &new.diff(&more), "delete vip fd00:1::2");
}

#[test]
fn containers_begin_their_turns_at_different_backends() {
    let table = network("10.0.1.3@1 10.0.1.4@1 10.0.1.5@1", "10.0.1.2");
    let vips = Vips::of(&table, &Vips::default());
    let backends = &vips.0.values().next().unwrap();
    let first = |task_id| in_turn(backends, task_id)[0].to_string();
    assert_eq!([3, 4, 5].map(first), ["10.0.1.3", "10.0.1.4", "10.0.1.5"]);
    assert_eq!(in_turn(&[], 7), [] as [IpAddr; 0]);
}

#[test]
fn connections_end_with_their_endpoint_and_datagrams_move_on_before() {
    let peers = Peers::of(&network("10.0.1.3@1 !10.0.1.4@1", "10.0.1.2"));
    let connection = |protocol, destination: &str, answers_from: &str| Connection {
        protocol,
        destination: destination.parse().unwrap(),
        destination_port: 80,
        answers_from: answers_from.parse().unwrap(),
        answers_from_port: 80,
    };
    for (name, protocol, destination, answers_from, is_stale, is_astray) in [
        ("TCP to a serving one", 6, "10.0.1.2", "10.0.1.3", false, false),
        ("UDP to a serving one", 17, "10.0.1.2", "10.0.1.3", false, false),
        ("TCP to a withdrawn one", 6, "10.0.1.2", "10.0.1.4", false, true),
        ("UDP to a withdrawn one", 17, "10.0.1.2", "10.0.1.4", true, true),
        ("echo to a withdrawn one", 1, "10.0.1.2", "10.0.1.4", true, true),
        ("TCP to its own address", 6, "10.0.1.4", "10.0.1.4", false, false),
        ("UDP to its own address", 17, "10.0.1.4", "10.0.1.4", false, false),
        ("TCP to a removed one", 6, "10.0.1.2", "10.0.1.9", true, true),
        ("TCP to a removed one's own address", 6, "10.0.1.9", "10.0.1.9", true, true),
        ("UDP that was sent before the address was known", 17, "10.0.1.2", "10.0.1.2", true, true),
        ("what is on no network", 17, "192.0.2.1", "192.0.2.1", false, false),
    ] {
        let connection = connection(protocol, destination, answers_from);
        assert_eq!(peers.is_stale(&connection), is_stale, "{name}");
        assert_eq!(peers.is_astray(&connection), is_astray, "{name}, without an answer");
    }
    let of = |endpoints| Peers::of(&network(endpoints, ""));
    for (name, old, new, has_lost) in [
        ("one more", "10.0.1.3@1", "10.0.1.3@1 10.0.1.4@1", false),
        ("begins to serve", "!10.0.1.3@1", "10.0.1.3@1", false),
        ("serves no longer", "10.0.1.3@1", "!10.0.1.3@1", true),
        ("is gone", "!10.0.1.3@1", "", true),
    ] {
        assert_eq!(of(old).has_lost(&of(new)), has_lost, "{name}");
    }
}

#[test]
fn datagrams_to_one_service_move_on_when_an_address_passes_to_another() {
    let web = network("10.0.1.3@1 10.0.1.4@1", "10.0.1.2");
    let db = |vip: &str| ServiceEntry {
        virtual_ips: vec![vip.parse().unwrap()],
        ..ServiceEntry::default()
    };
    let is_stale = |peers: &Peers, protocol, destination: &str, answers_from: &str| {
        let (destination, answers_from) =
            (destination.parse().unwrap(), answers_from.parse().unwrap());
        let (destination_port, answers_from_port) = (80, 80);
        peers.is_stale(&Connection {
            protocol,
            destination,
            destination_port,
            answers_from,
            answers_from_port,
        })
    };
    let of_web = Peers::of(&web);
    assert!(!is_stale(&of_web, 17, "10.0.1.2", "10.0.1.3"));

    // A task of web has ended, and one of db has its address in the same table.
    let mut both = web.clone();
    both.services.insert(ServiceId(2), db("10.0.1.9"));
    let ended = both.endpoints.remove(&TaskId(0)).unwrap();
    both.endpoints.insert(TaskId(7), EndpointEntry { service_id: ServiceId(2), ..ended });
    let of_both = Peers::of(&both);
    assert!(of_web.has_lost(&of_both));
    assert!(!of_both.has_lost(&of_both));
    for (name, protocol, destination, answers_from, expect) in [
        ("UDP to web that db's task has now", 17, "10.0.1.2", "10.0.1.3", true),
        ("echo to web that db's task has now", 1, "10.0.1.2", "10.0.1.3", true),
        ("UDP to db", 17, "10.0.1.9", "10.0.1.3", false),
        ("UDP to the address itself", 17, "10.0.1.3", "10.0.1.3", false),
        ("UDP to web's other task", 17, "10.0.1.2", "10.0.1.4", false),
    ] {
        assert_eq!(is_stale(&of_both, protocol, destination, answers_from), expect, "{name}");
    }

    // All of web has gone, its virtual address too.
    both.services.remove(&ServiceId(1));
    assert!(of_both.has_lost(&Peers::of(&both)));
    assert!(is_stale(&Peers::of(&both), 17, "10.0.1.2", "10.0.1.3"));

    // Its tasks stay, and its virtual address is another service's.
    let mut other = web.clone();
    other.services = BTreeMap::from([(ServiceId(2), db("10.0.1.2"))]);
    let of_other = Peers::of(&other);
    assert!(of_web.has_lost(&of_other));
    assert!(is_stale(&of_other, 17, "10.0.1.2", "10.0.1.3"));
    assert!(!is_stale(&of_other, 6, "10.0.1.2", "10.0.1.3"), "established TCP is left alone");
}

#[test]
fn a_container_forgets_what_was_lost_since_its_own_table() {
    let step = |before: &Balance, endpoints| Balance::of(&network(endpoints, "10.0.1.2"), before);
    let first = step(&Balance::default(), "10.0.1.3@1 10.0.1.4@1");
    let more = step(&first, "10.0.1.3@1 10.0.1.4@1 10.0.1.5@1");
    assert!(!more.has_lost_since(&first), "one more");
    let fewer = step(&more, "10.0.1.3@1 10.0.1.4@1");
    let changes = |now: &Balance, before| now.neighbour_changes_since(before).into_owned();
    check("of one table", &changes(&fewer, &more), "delete neighbour 10.0.1.5");
    check("of two tables", &changes(&fewer, &first), "");
    check(
        "of the first table",
        &changes(&first, &Balance::default()),
        "set neighbour 10.0.1.3 = 02:42:0a:00:01:03
         set neighbour 10.0.1.4 = 02:42:0a:00:01:04",
    );
    let same = step(&fewer, "10.0.1.3@1 10.0.1.4@1");
    for before in [&first, &more] {
        assert!(fewer.has_lost_since(before) && same.has_lost_since(before));
    }
    assert!(!same.has_lost_since(&fewer) && !same.has_lost_since(&same));
    let [of_more, of_same] =
        [&more, &same].map(|balance| balance.vips.0.values().next().unwrap().clone());
    assert_eq!(of_more.len(), 3);
    assert!(std::sync::Arc::ptr_eq(&of_same, fewer.vips.0.values().next().unwrap()), "shared");
}

fn any_network() -> impl Strategy<Value = NetworkTable> {
    let endpoint = (3u8..9, 1u16..5, any::<bool>(), any::<bool>());
    proptest::collection::btree_map(0u128..6, endpoint, 0..6).prop_map(|endpoints| {
        let entry =
            |(id, (host, node_number, serving, has_ipv6)): (u128, (u8, u16, bool, bool))| {
                let mut addresses = vec![IpAddr::from([10, 0, 1, host])];
                addresses
                    .extend(has_ipv6.then(|| format!("fd00:1::{host}").parse::<IpAddr>().unwrap()));
                let endpoint = EndpointEntry {
                    service_id: ServiceId(1),
                    name: String::new(),
                    hostname: None,
                    addresses,
                    node_number,
                    serving,
                };
                (TaskId(id), endpoint)
            };
        let endpoints = endpoints.into_iter().map(entry).collect();
        NetworkTable { endpoints, ..network("", "10.0.1.2 fd00:1::2") }
    })
}

proptest! {
    #[test]
    fn plans_lead_to_what_they_promise(old in any_network(), new in any_network()) {
        let mut reach = Reach::of(&tables(), &old);
        let wanted = Reach::of(&tables(), &new);
        for op in reach.diff(&wanted) {
            reach.apply(op);
        }
        prop_assert_eq!(&reach, &wanted);

        let mut vips = Vips::of(&old, &Vips::default());
        let wanted = Vips::of(&new, &vips);
        for op in vips.diff(&wanted) {
            if let VipOp::Add(vip, backends) | VipOp::Replace(vip, backends) = &op {
                prop_assert_ne!(vips.0.get(vip), Some(backends), "{} rewrites what is there", op);
            }
            vips.apply(&op);
        }
        prop_assert_eq!(&vips, &wanted);
    }
}

/// Keys of a node as `slot:byte` words, the current slot first.
fn keys(words: &str) -> WireguardKeys {
    let keys: Vec<WireguardKey> = words
        .split_whitespace()
        .map(|word| {
            let (slot, byte) = word.split_once(':').expect("slot:byte");
            let slot = slot.parse().unwrap();
            let public_key = PublicKey([byte.parse().unwrap(); 32]);
            WireguardKey { slot, public_key, port: wireguard::port(slot) }
        })
        .collect();
    WireguardKeys { current: keys[0].slot, keys }
}

#[test]
fn an_encrypted_network_leads_to_addresses_within_tunnels_and_never_to_others() {
    let mut network = network("10.0.1.2@1 10.0.1.3@2 10.0.1.4@3 10.0.1.5@3", "");
    network.encrypted = true;
    let mut tables = tables();
    tables.keys = BTreeMap::from([(1, keys("0:1")), (2, keys("1:22 0:21"))]);
    let reach = Reach::of(&tables, &network);
    check(
        "a node with two keys, one without any",
        &Reach::default().diff(&reach),
        "set forwarding 02:42:0a:00:01:03 = 198.19.0.2
         set neighbour 10.0.1.3 = 02:42:0a:00:01:03",
    );
    assert!(!are_any_encrypted(&tables));
    assert_eq!(secure_peers(&tables), BTreeMap::new(), "no network asks for any");
    tables.networks.insert(skep_common::NetworkId(1), network.into());
    assert!(are_any_encrypted(&tables));
    let peers: Vec<String> = secure_peers(&tables)
        .iter()
        .map(|(key, peer)| format!("{} {} {}", key.0[0], peer.endpoint, peer.address))
        .collect();
    assert_eq!(peers, ["21 10.98.0.2:4790 198.18.0.2", "22 10.98.0.2:4791 198.19.0.2"]);
    assert_eq!(nodes_without_key(&tables), [3].into());
}
