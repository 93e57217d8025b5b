//! Golden plans, and the property that a plan makes what it promises.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

fn table(self_number: u16, peers: &str, ports: &str) -> MeshTable {
    let peers = peers.split_whitespace().map(|word| {
        let (number, underlay) = word.split_once('@').expect("number@address");
        Peer { number: number.parse().unwrap(), underlay: underlay.parse().unwrap() }
    });
    let ports = ports.split_whitespace().map(|word| {
        let (published, backends) = word.split_once("->").expect("port->backends");
        let (published, protocol) = match published.strip_suffix("/udp") {
            Some(published) => (published, Protocol::Udp),
            None => (published, Protocol::Tcp),
        };
        let backends = backends.split(',').filter(|b| !b.is_empty()).map(|backend| {
            let (address, target_port) = backend.split_once(':').expect("address:port");
            let target_port = target_port.parse().unwrap();
            Backend { task_id: backend.into(), address: address.parse().unwrap(), target_port }
        });
        PublishedPort {
            published: published.parse().unwrap(),
            protocol,
            service_id: format!("service-{published}"),
            service: String::new(),
            proxy_protocol: None,
            backends: backends.collect(),
        }
    });
    MeshTable {
        version: 1,
        self_number,
        pool: MeshTable::default_pool(),
        slice_prefix: MeshTable::default_slice_prefix(),
        peers: peers.collect(),
        ipv6: BTreeMap::new(),
        daemons: BTreeMap::new(),
        ports: ports.collect(),
    }
}

#[track_caller]
fn check(name: &str, old: &MeshTable, new: &MeshTable, expect: &str) {
    let ops = diff(old, new).unwrap();
    let text: Vec<String> = ops.iter().map(Op::to_string).collect();
    let expect: Vec<&str> = expect.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(text, expect, "{name}");
}

const TWO: &str = "1@10.98.0.1 2@10.98.0.2";

#[test]
fn diff_says_what_the_kernel_must_do() {
    let one = table(1, "1@10.98.0.1", "");
    let two = table(1, TWO, "8080->10.192.4.1:80");
    check(
        "a peer and a port arrive",
        &one,
        &two,
        "set neighbour 10.192.11.254 = 02:73:6b:00:00:02
         set forwarding 02:73:6b:00:00:02 = 10.98.0.2
         set route main 10.192.8.0/22 via 10.192.11.254
         set route main 10.192.11.254/32
         set route way-back-2 0.0.0.0/0 via 10.192.11.254
         add return rule 2
         add node address 10.98.0.2
         add peer 2 = 02:73:6b:00:00:02
         add port 8080/tcp -> 10.192.4.1:80",
    );
    check(
        "they leave in the opposite order",
        &two,
        &one,
        "delete node address 10.98.0.2
         delete peer 2 = 02:73:6b:00:00:02
         delete port 8080/tcp
         delete return rule 2
         delete route main 10.192.8.0/22
         delete route way-back-2 0.0.0.0/0
         delete route main 10.192.11.254/32
         delete forwarding 02:73:6b:00:00:02
         delete neighbour 10.192.11.254",
    );
    check(
        "a peer that moves keeps its routes",
        &two,
        &table(1, "1@10.98.0.1 2@10.98.0.7", "8080->10.192.4.1:80"),
        "set forwarding 02:73:6b:00:00:02 = 10.98.0.7
         delete node address 10.98.0.2
         add node address 10.98.0.7",
    );
    check(
        "a further address of a node is an address, not a tunnel",
        &two,
        &table(1, &format!("{TWO} 2@10.99.0.2 1@10.99.0.1"), "8080->10.192.4.1:80"),
        "add node address 10.99.0.1
         add node address 10.99.0.2",
    );
}

#[test]
fn a_change_names_only_the_ports_that_changed() {
    let old = table(1, TWO, "80->10.192.4.1:8,10.192.8.1:8 81->10.192.4.1:8 82->10.192.4.1:8");
    let new = table(1, TWO, "80->10.192.8.1:8,10.192.4.1:8 81->10.192.8.9:8 83->");
    check(
        "the order of backends is no change",
        &old,
        &new,
        "delete port 82/tcp
         replace backends 81/tcp -> 10.192.8.9:8
         add port 83/tcp -> reject",
    );
    check("nothing to do", &new, &new, "");
    check(
        "one number of two protocols is two ports",
        &table(1, TWO, "80->10.192.4.1:8 80/udp->10.192.4.1:8"),
        &table(1, TWO, "80->10.192.4.1:8 80/udp->10.192.4.1:8,10.192.8.1:8 81/udp->"),
        "replace backends 80/udp -> 10.192.4.1:8 10.192.8.1:8
         add port 81/udp -> reject",
    );
}

#[test]
fn ipv6_is_the_twin_of_ipv4_where_nodes_have_it() {
    let three = "1@10.98.0.1 2@10.98.0.2 3@10.98.0.3";
    let ports = "80->10.192.4.1:8,10.192.8.1:8,10.192.12.1:8 53/udp->10.192.12.1:5";
    let mut table = table(1, three, ports);
    assert_eq!(Objects::twin_of(&table).unwrap(), None, "this node has none");
    let address = |host: u16| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host);
    table.ipv6 = BTreeMap::from([1, 2].map(|number| (number, BTreeSet::from([address(number)]))));
    let ops = Objects::default().diff(&Objects::twin_of(&table).unwrap().unwrap());
    let text: Vec<String> = ops.iter().map(Op::to_string).collect();
    assert_eq!(
        text,
        [
            "set neighbour fd00:736b:6570:ffff::ac0:bfe = 02:73:6b:00:00:02",
            "set route main fd00:736b:6570:ffff::ac0:800/118 via fd00:736b:6570:ffff::ac0:bfe",
            "set route main fd00:736b:6570:ffff::ac0:bfe/128",
            "set route way-back-2 ::/0 via fd00:736b:6570:ffff::ac0:bfe",
            "add return rule 2",
            "add node address 2001:db8::1",
            "add node address 2001:db8::2",
            "add peer 2 = 02:73:6b:00:00:02",
            "add port 80/tcp -> [fd00:736b:6570:ffff::ac0:401]:8 [fd00:736b:6570:ffff::ac0:801]:8",
            "add port 53/udp -> reject",
        ],
        "the task of node 3 is reached by IPv4 alone",
    );
    table.ipv6.insert(0, BTreeSet::new());
    assert!(Objects::twin_of(&table).is_err());
}

#[test]
fn slices_follow_the_node_number() {
    let slices = Slices::new(MeshTable::default_pool(), 22).unwrap();
    assert_eq!(slices.number_max(), 4094);
    for (number, slice, bridge, first, last) in [
        (1, "10.192.4.0/22", "10.192.7.254", "10.192.4.1", "10.192.7.253"),
        (4094, "10.255.248.0/22", "10.255.251.254", "10.255.248.1", "10.255.251.253"),
    ] {
        assert_eq!(slices.slice(number).to_string(), slice);
        assert_eq!(slices.bridge_address(number).to_string(), bridge);
        for address in slices.task_addresses(number) {
            assert_eq!(slices.number_of(address), Some(number));
            assert_eq!(of_twin(twin(address)), Some(address));
            assert!(twin_net(slices.slice(number)).contains(&twin(address)));
        }
        let tasks: Vec<Ipv4Addr> = slices.task_addresses(number).collect();
        assert_eq!(tasks.len(), 1021);
        assert_eq!(tasks[0].to_string(), first);
        assert_eq!(tasks[1020].to_string(), last);
        assert!(tasks.iter().all(|address| slices.is_task_address(number, *address)));
        assert!(!slices.is_task_address(number, slices.bridge_address(number)));
        assert!(!slices.is_task_address(number, slices.slice(number).network()));
        assert!(!slices.is_task_address(number, slices.slice(number).broadcast()));
    }
    assert!(!slices.is_task_address(1, slices.task_addresses(2).next().unwrap()));
    for address in ["10.192.0.1", "10.255.252.1", "10.191.255.255", "10.98.0.1", "255.0.0.1"] {
        assert_eq!(slices.number_of(address.parse().unwrap()), None, "{address}");
    }
    assert_eq!(of_twin("fd00:736b:6570:fffe::10.192.4.1".parse().unwrap()), None);
    let small = Slices::new("10.250.0.0/16".parse().unwrap(), 24).unwrap();
    assert_eq!(small.number_max(), 255);
    assert_eq!(Mac::tunnel(4094).to_string(), "02:73:6b:00:0f:fe");
    assert_ne!(Mac::tunnel(7), Mac::bridge(7));
}

#[test]
fn what_cannot_be_put_into_effect_is_refused() {
    let refuse = |table: &MeshTable| table.validate().unwrap_err().to_string();
    assert_eq!(
        refuse(&table(1, "1@10.98.0.1 0@10.98.0.2", "")),
        "node number 0 has no slice in the address pool 10.192.0.0/10; the highest is 4094",
    );
    assert_eq!(
        refuse(&table(1, TWO, "80->10.192.4.1:8 80->")),
        "published port 80/tcp is claimed by service service-80 and by service service-80",
    );
    let pool = "10.0.0.0/22".parse().unwrap();
    assert_eq!(
        refuse(&MeshTable { pool, ..table(1, TWO, "") }),
        "the address pool 10.0.0.0/22 cannot be cut into /22 slices",
    );
}

#[test]
fn interface_names_fit_and_differ() {
    let names: BTreeSet<String> =
        (0..20_000).map(|n| interface_name(&format!("{n:025}"))).collect();
    assert_eq!(names.len(), 20_000);
    assert!(names.iter().all(|name| name.len() == 15 && name.starts_with("sk-")));
}

#[test]
fn a_table_reads_with_defaults() {
    let json = r#"{"version":3,"self_number":1,"peers":[{"number":1,"underlay":"10.0.0.1"}],
        "ports":[{"published":80,"service_id":"s","backends":[]}]}"#;
    let table: MeshTable = serde_json::from_str(json).unwrap();
    assert_eq!(table.pool.to_string(), "10.192.0.0/10");
    assert_eq!(table.slice_prefix, 22);
    assert_eq!(table.ports[0].protocol, Protocol::Tcp);
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        assert_eq!(Protocol::from_number(protocol.number()), Some(protocol));
        let json = serde_json::to_string(&protocol).unwrap();
        assert_eq!(json, format!("\"{protocol}\""), "names are the same everywhere");
    }
    assert_eq!(Protocol::from_number(1), None);
}

fn any_table() -> impl Strategy<Value = MeshTable> {
    let peer = (1u16..6, 1u8..9)
        .prop_map(|(number, host)| Peer { number, underlay: Ipv4Addr::new(10, 98, 0, host) });
    let backend = (0u8..4, 80u16..82).prop_map(|(host, target_port)| Backend {
        task_id: format!("task-{host}"),
        address: Ipv4Addr::new(10, 192, 4, host),
        target_port,
    });
    let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)];
    let ports = proptest::collection::btree_map(
        (protocol, 8080u16..8083),
        proptest::collection::vec(backend, 0..4),
        0..4,
    );
    let host = |host: u16| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host);
    let ipv6 = proptest::collection::btree_map(
        1u16..6,
        proptest::collection::btree_set((1u16..9).prop_map(host), 0..3),
        0..5,
    );
    (proptest::collection::vec(peer, 0..7), ipv6, ports).prop_map(|(peers, ipv6, ports)| {
        let ports = ports.into_iter().map(|((protocol, published), backends)| PublishedPort {
            published,
            protocol,
            service_id: format!("service-{published}"),
            service: String::new(),
            proxy_protocol: None,
            backends,
        });
        MeshTable { peers, ipv6, ports: ports.collect(), ..table(1, "", "") }
    })
}

proptest! {
    #[test]
    fn diff_applied_to_the_old_objects_gives_the_new(old in any_table(), new in any_table()) {
        check_diff(Objects::of(&old).unwrap(), &Objects::of(&new).unwrap())?;
        let twin_of = |table| Objects::twin_of(table).unwrap().unwrap_or_default();
        check_diff(twin_of(&old), &twin_of(&new))?;
    }
}

fn check_diff(mut objects: Objects, wanted: &Objects) -> Result<(), TestCaseError> {
    let ops = objects.diff(wanted);
    let is_untouched = |key: &PortKey, objects: &Objects| {
        objects.ports.contains_key(key) && wanted.ports.get(key) == objects.ports.get(key)
    };
    let untouched: Vec<PortKey> =
        objects.ports.keys().copied().filter(|key| is_untouched(key, &objects)).collect();
    for op in &ops {
        if let Op::AddPort(key, _) | Op::ReplaceBackends(key, _) | Op::DeletePort(key) = op {
            prop_assert!(!untouched.contains(key), "{op} rewrites an unchanged port");
        }
        objects.apply(op);
    }
    prop_assert_eq!(&objects, wanted);
    prop_assert_eq!(objects.diff(wanted), vec![]);
    let rank = |op: &Op| u8::from(op.is_rules()) + 2 * u8::from(op.is_after_rules());
    prop_assert!(ops.is_sorted_by_key(rank), "routing, then rules, then routing: {ops:?}");
    Ok(())
}
