//! Networks from their creation to their end, and what services and tasks have of them.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use skep_common::spec::NetworkAttachmentConfig;
use skep_common::{Image, ImageId, Kind, NodeId, Service, ServiceId, Task, TaskId, TaskState};

use super::*;
use crate::command::{Command, Outcome, Refusal};
use crate::endpoints::Drain;
use crate::service;
use crate::testing::{NOW, WEB, World};

/// Two nodes that have the image, and no service but the tables' own, which has no task.
fn world() -> World {
    let mut world = World::new("1 2", crate::testing::service(0), "");
    world.put(vec![Object::Image(Box::new(Image {
        id: ImageId(1),
        meta: Meta::default(),
        name: "docker.io/library/whoami:latest".into(),
        digest: "sha256:12".into(),
        size: 1,
        created: None,
        holders: [NodeId(1), NodeId(2)].into(),
    }))]);
    world
}

fn spec(name: &str, more: Value) -> NetworkSpec {
    let spec: NetworkSpec = serde_json::from_value(more).unwrap();
    NetworkSpec { name: name.to_owned(), ..spec }
}

/// Makes a network; ids count from 100.
fn make(world: &mut World, name: &str, more: Value) -> Network {
    let id = NetworkId(100 + world.state.networks().len() as u128);
    let (id, action) = create(&world.state, id, spec(name, more)).unwrap();
    world.apply(vec![action]);
    (**world.state.network(id).unwrap()).clone()
}

fn refusal(world: &World, name: &str, more: Value) -> String {
    create(&world.state, NetworkId(999), spec(name, more)).unwrap_err().to_string()
}

fn subnet(cidr: &str) -> Value {
    json!({"IPAM": {"Config": [{"Subnet": cidr}]}})
}

fn service_spec(name: &str, replicas: u64, networks: &[&str]) -> ServiceSpec {
    let mut spec = crate::testing::service(replicas).spec;
    spec.name = name.to_owned();
    let target = |name: &&str| NetworkAttachmentConfig {
        target: (*name).to_owned(),
        ..NetworkAttachmentConfig::default()
    };
    spec.task_template.networks = Some(networks.iter().map(target).collect());
    let container = json!({"Image": "whoami"});
    spec.task_template.container_spec = Some(serde_json::from_value(container).unwrap());
    spec
}

fn start(world: &mut World, id: u128, spec: ServiceSpec) -> Service {
    let (id, action) = service::create(&world.state, ServiceId(id), spec).unwrap();
    world.apply(vec![action]);
    world.step();
    (**world.state.service(id).unwrap()).clone()
}

fn tasks(world: &World, service_id: ServiceId) -> Vec<Task> {
    world.state.tasks_of_service(service_id).map(|task| (**task).clone()).collect()
}

/// A service on its way out; its tasks are told to stop.
fn take_away(world: &mut World, service_id: ServiceId) {
    let service = world.state.service(service_id).unwrap().clone();
    if let Some(action) = service::remove(&service) {
        world.apply(vec![action]);
    }
    world.step();
}

fn end_all(world: &mut World, service_id: ServiceId) {
    let running: Vec<TaskId> = tasks(world, service_id).iter().map(|task| task.id).collect();
    for task_id in running {
        world.report(task_id, TaskState::Shutdown);
    }
    world.step();
    world.step();
}

#[test]
fn a_network_gets_a_free_identifier_and_the_lowest_free_subnet() {
    let mut world = world();
    let nets = |network: &Network| -> Vec<String> {
        network.subnets.iter().map(|subnet| subnet.subnet.to_string()).collect()
    };
    let first = make(&mut world, "first", json!({}));
    assert_eq!(nets(&first), ["10.0.0.0/20"]);
    assert_eq!(first.subnets[0].gateway.to_string(), "10.0.0.1");
    let asked = make(&mut world, "asked", subnet("10.0.16.0/24"));
    assert_eq!(nets(&asked), ["10.0.16.0/24"]);
    let six = make(&mut world, "six", json!({"EnableIPv6": true}));
    let ipv6 = format!("fd00:736b:6570:{:x}::/64", six.vni);
    assert_eq!(nets(&six), ["10.0.32.0/20", &ipv6], "past what is taken");
    assert_eq!(BTreeSet::from([first.vni, asked.vni, six.vni]).len(), 3);
    // The subnet that a removed one had is the lowest again; identifiers follow from ids.
    let removed = remove(&world.state, &first).unwrap().unwrap();
    world.apply(vec![removed]);
    assert!(world.state.network_by_name("first").is_none(), "its name is free at once");
    world.step();
    assert!(world.state.network(first.id).is_none(), "nobody was on it");
    let n_vnis = u128::from(VNI_MAX - VNI_MIN + 1);
    for (id, name, vni, subnet) in [
        (n_vnis * 7 + 200, "first", VNI_MIN + 200, "10.0.0.0/20"),
        (n_vnis * 9 + 200, "beside", VNI_MIN + 201, "10.0.48.0/20"),
        (n_vnis * 8 - 1, "last", VNI_MAX, "10.0.64.0/20"),
        (n_vnis * 9 - 1, "round", VNI_MIN, "10.0.80.0/20"),
    ] {
        let id = NetworkId(id);
        let (_, action) = create(&world.state, id, spec(name, json!({}))).unwrap();
        world.apply(vec![action]);
        let network = world.state.network(id).unwrap();
        assert_eq!((network.vni, nets(network)), (vni, vec![subnet.to_owned()]), "{name}");
    }
}

#[test]
fn a_swarm_may_have_pools_of_its_own() {
    let read = |pools: &[&str], size: u32| {
        let pools: Vec<String> = pools.iter().map(|pool| (*pool).to_owned()).collect();
        let read = parse_pools(&pools, size, "10.192.0.0/10".parse().unwrap());
        read.map_err(|error| error.to_string())
    };
    assert_eq!(read(&[], 0), Ok((Vec::new(), 0)));
    for (pools, size, expect) in [
        (&["10.5.0.1/16"][..], 0, "invalid subnet 10.5.0.1/16: it should be 10.5.0.0/16"),
        (&["fd00::/64"], 0, "default address pool fd00::/64 is not IPv4"),
        (&["10.200.0.0/16"], 0, "within the ingress pool 10.192.0.0/10: give another"),
        (&["10.0.0.0/8", "10.1.0.0/16"], 0, "pools 10.0.0.0/8 and 10.1.0.0/16 overlap"),
        (&["10.5.0.0/16"], 15, "mask length 15 is not a number from 16 to 30"),
        (&[], 31, "mask length 31 is not a number from 9 to 30"),
        (&[], 300, "mask length 300 is not"),
    ] {
        let text = read(pools, size).unwrap_err();
        assert!(text.contains(expect), "{text} instead of {expect}");
    }
    // Both are used up, then nothing is left.
    let mut world = world();
    let wide = parse_pools(&[], 0, "10.0.0.0/8".parse().unwrap()).unwrap_err().to_string();
    assert_eq!(
        wide,
        "default address pool 10.0.0.0/9 is within the ingress pool 10.0.0.0/8: give another"
    );
    let (default_addr_pool, subnet_size) = read(&["172.16.0.0/24", "172.20.0.0/25"], 25).unwrap();
    let cluster = crate::testing::cluster();
    let cluster = skep_common::Cluster { default_addr_pool, subnet_size, ..cluster };
    world.put(vec![Object::Cluster(Box::new(cluster))]);
    let subnets: Vec<String> = ["a", "b", "c"]
        .map(|name| make(&mut world, name, json!({})).subnets[0].subnet.to_string())
        .into();
    assert_eq!(subnets, ["172.16.0.0/25", "172.16.0.128/25", "172.20.0.0/25"]);
    let text = refusal(&world, "d", json!({}));
    assert!(text.starts_with("no free subnet of 25 bits in the pool 172.16.0.0/24, "), "{text}");
}

#[test]
fn what_cannot_be_made_is_refused_with_a_sentence() {
    let mut world = world();
    make(&mut world, "front", json!({}));
    let option = |key: &str, value: &str| json!({"Options": {key: value}});
    let mtu = "com.docker.network.driver.mtu";
    let small = json!({"EnableIPv6": true, "Options": {mtu: "1279"}});
    for (name, more, expect) in [
        ("front", json!({}), "network with name front already exists"),
        ("a b", json!({}), "invalid network name"),
        ("x", json!({"Driver": "bridge"}), "network driver \"bridge\" is not supported"),
        ("x", subnet("10.0.0.5/24"), "invalid subnet 10.0.0.5/24: it should be 10.0.0.0/24"),
        ("x", subnet("10.0.0.0/31"), "is too small"),
        ("x", option(mtu, "575"), "is not a number from 576 to 65535"),
        ("x", small, "=1279 is too little for IPv6: give 1280 or more"),
        ("x", option("encrypted", "false"), "would encrypt, as any value does"),
        ("x", option("vlan", "7"), "network option \"vlan\" is not known"),
    ] {
        let text = refusal(&world, name, more);
        assert!(text.contains(expect), "{text} instead of {expect}");
    }
    let ingress = crate::allocator::pool(&world.state).to_string();
    let text = refusal(&world, "x", subnet(&ingress));
    assert!(text.contains("overlaps the ingress pool"), "{text}");
    let accepted = json!({"EnableIPv6": true, "Options": {mtu: "1280"}});
    assert!(create(&world.state, NetworkId(1), spec("x", accepted)).is_ok());
    for value in ["", "true"] {
        let secret = make(&mut world, &format!("secret-{value}"), option("encrypted", value));
        assert!(is_encrypted(&secret.spec));
    }
    assert!(!is_encrypted(&make(&mut world, "open", json!({})).spec));
}

/// Two managers may plan on the same view: the store takes what came first.
#[test]
fn the_store_refuses_what_another_got_first() {
    let mut world = world();
    let front = make(&mut world, "front", json!({}));
    let late = |name: &str, vni: u32| {
        let network = Network { id: NetworkId(500), vni, ..front.clone() };
        let spec = NetworkSpec { name: name.to_owned(), ..front.spec.clone() };
        put(Network { spec, ..network }, Expect::Absent)
    };
    let planned = service_spec("api", 0, &["front"]);
    let (_, on_front) = service::create(&world.state, ServiceId(8), planned).unwrap();
    let removal = remove(&world.state, &front).unwrap().unwrap();
    let refused = |world: &World, action: Action| {
        let index = world.state.version().index + 1;
        let (outcome, _) = world.state.clone().apply(index, &Command::new(NOW, vec![action]));
        let Outcome::Refused(refusal) = outcome else { panic!("{outcome:?}") };
        refusal
    };
    assert_eq!(refused(&world, late("x", front.vni)), Refusal::VniInUse { vni: front.vni });
    assert!(matches!(refused(&world, late("front", 30000)), Refusal::NameTaken { .. }));

    let mut used = World::new("1", crate::testing::service(0), "");
    used.state = world.state.clone();
    used.apply(vec![on_front.clone()]);
    assert!(matches!(refused(&used, removal.clone()), Refusal::NetworkInUse { .. }));
    let api = used.state.service(ServiceId(8)).unwrap();
    let mut thief = (**api).clone();
    (thief.id, thief.spec.name) = (ServiceId(9), "thief".to_owned());
    let address = api.endpoint.virtual_ips[0].addr.addr();
    let stolen = Action::Put { object: Object::Service(Box::new(thief)), expect: Expect::Absent };
    assert_eq!(refused(&used, stolen), Refusal::AddressInUse { address });

    world.apply(vec![removal]);
    let network_id = front.id;
    assert_eq!(refused(&world, on_front), Refusal::NetworkNotFound { network_id });
}

#[test]
fn a_service_is_refused_on_networks_that_it_cannot_be_on() {
    let mut world = world();
    make(&mut world, "wide", subnet("10.1.0.0/16"));
    make(&mut world, "narrow", subnet("10.1.2.0/24"));
    for (networks, expect) in [
        (vec!["nowhere"], "network nowhere not found"),
        (vec!["bridge", "bridge"], "network bridge is named twice: name it once"),
        (vec!["wide", "wide"], "network wide is named twice: name it once"),
        (
            vec!["wide", "narrow"],
            "networks wide (10.1.0.0/16) and narrow (10.1.2.0/24) overlap: a service cannot be on both",
        ),
    ] {
        let spec = service_spec("api", 1, &networks);
        let text = service::create(&world.state, ServiceId(8), spec).unwrap_err().to_string();
        assert_eq!(text, expect);
    }
}

#[test]
fn a_service_has_one_virtual_address_per_network_unless_it_is_dnsrr() {
    let mut world = world();
    let front = make(&mut world, "front", json!({"EnableIPv6": true}));
    let back = make(&mut world, "back", json!({}));
    let api = start(&mut world, 8, service_spec("api", 1, &["front", "back"]));
    let of: Vec<NetworkId> = api.endpoint.virtual_ips.iter().map(|vip| vip.network_id).collect();
    assert_eq!(of, [front.id, front.id, back.id], "one of each family");

    // An update keeps them, and a network that is dropped gives its own back.
    let fewer = service_spec("api", 1, &["back"]);
    let action = service::update(&world.state, &api, api.meta.version, fewer).unwrap().unwrap();
    world.apply(vec![action]);
    let kept = world.state.service(api.id).unwrap().endpoint.virtual_ips.clone();
    assert_eq!(kept, api.endpoint.virtual_ips[2..]);
    let dropped = api.endpoint.virtual_ips[0].addr.addr();
    assert_eq!(world.state.network_address_owner(front.id, dropped), None);

    let mut named = service_spec("named", 1, &["front"]);
    named.endpoint_spec = Some(serde_json::from_value(json!({"Mode": "dnsrr"})).unwrap());
    let named = start(&mut world, 9, named);
    assert_eq!(named.endpoint.virtual_ips, []);
}

#[test]
fn tasks_have_an_address_of_their_own_on_each_network() {
    let mut world = world();
    let front = make(&mut world, "front", json!({"EnableIPv6": true}));
    let inner = make(&mut world, "inner", json!({"Internal": true}));
    let api = start(&mut world, 8, service_spec("api", 5, &["inner", "front"]));
    let inside = start(&mut world, 9, service_spec("inside", 5, &["inner"]));
    let mut seen = BTreeSet::new();
    let all = [tasks(&world, api.id), tasks(&world, inside.id)].concat();
    assert_eq!(all.len(), 10);
    for task in &all {
        let networks: Vec<Option<NetworkId>> =
            task.networks_attachments.iter().map(|place| place.network_id).collect();
        // The spec's order, then the uplink; nobody leaves by internal networks alone.
        let expect = match task.service_id == api.id {
            true => vec![Some(inner.id), Some(front.id), None],
            false => vec![Some(inner.id)],
        };
        assert_eq!(networks, expect);
        for place in &task.networks_attachments {
            assert!(seen.insert((place.network_id, place.address)), "{place:?} is given twice");
            assert_eq!(place.ipv6.is_some(), place.network_id == Some(front.id));
        }
    }
    for service in [&api, &inside] {
        for vip in &service.endpoint.virtual_ips {
            let std::net::IpAddr::V4(address) = vip.addr.addr() else { continue };
            assert!(seen.insert((Some(vip.network_id), address)), "{vip:?} is a task's");
        }
    }
}

#[test]
fn a_network_in_use_stays_and_a_removed_one_goes_with_its_last_task() {
    let mut world = world();
    let front = make(&mut world, "front", json!({}));
    let api = start(&mut world, 8, service_spec("api", 2, &["front"]));
    let text = remove(&world.state, &front).unwrap_err().to_string();
    assert_eq!(text, "network front is in use by service api");

    take_away(&mut world, api.id);
    let removed = remove(&world.state, &front).unwrap().expect("its tasks only have to stop");
    world.apply(vec![removed]);
    world.step();
    assert!(world.state.network(front.id).is_some(), "tasks are still on it");
    assert!(world.state.network_by_name("front").is_none(), "its name is free at once");
    let next = make(&mut world, "front", json!({}));
    assert_ne!(next.vni, front.vni, "it is another network");
    let first = tasks(&world, api.id)[0].id;
    world.report(first, TaskState::Shutdown);
    world.step();
    assert!(world.state.network(front.id).is_some(), "one of two tasks has ended");
    end_all(&mut world, api.id);
    assert!(world.state.network(front.id).is_none(), "the last one has ended");
}

#[test]
fn a_task_without_an_address_waits_and_says_so() {
    let mut world = world();
    // Three usable addresses: the gateway's and two for tasks.
    let small = make(
        &mut world,
        "small",
        json!({"IPAM": {"Config": [{"Subnet": "10.9.0.0/29", "IPRange": "10.9.0.0/30"}]}}),
    );
    let mut wanted = service_spec("api", 2, &["small"]);
    wanted.endpoint_spec = Some(serde_json::from_value(json!({"Mode": "dnsrr"})).unwrap());
    let api = start(&mut world, 8, wanted);
    assert!(tasks(&world, api.id).iter().all(|task| task.node_id.is_some()));
    let mut more = service_spec("more", 1, &["small"]);
    more.endpoint_spec = Some(serde_json::from_value(json!({"Mode": "dnsrr"})).unwrap());
    let more = start(&mut world, 9, more);
    let [waiting] = &tasks(&world, more.id)[..] else { panic!("one task") };
    assert_eq!((waiting.node_id, waiting.status.state), (None, TaskState::Pending));
    let text = &waiting.status.err;
    assert_eq!(text, "network small has no free address (2 of 2 in use)");
    assert_eq!(world.step(), "", "it is not planned again while nothing changes");
    take_away(&mut world, api.id);
    end_all(&mut world, api.id);
    let [placed] = &tasks(&world, more.id)[..] else { panic!("one task") };
    assert!(placed.node_id.is_some(), "{placed:?}");
    assert_eq!(placed.networks_attachments[0].network_id, Some(small.id));
}

#[test]
fn tasks_on_networks_keep_to_nodes_that_networks_reach() {
    let mut world = world();
    make(&mut world, "back", json!({}));
    let in_user_space = |world: &mut World, number: u16, is_so: bool| {
        let word = format!("{number}{}", if is_so { ":user-space" } else { "" });
        world.replace(Object::Node(Box::new(crate::testing::parse_node(&word))));
    };
    in_user_space(&mut world, 1, true);
    let api = start(&mut world, 8, service_spec("api", 2, &["back"]));
    let nodes = |world: &World, id| -> Vec<Option<NodeId>> {
        let tasks = tasks(world, id).into_iter();
        tasks.filter(|task| task.desired_state <= TaskState::Running).map(|t| t.node_id).collect()
    };
    assert_eq!(nodes(&world, api.id), [Some(NodeId(2)); 2]);
    let front = start(&mut world, 9, service_spec("front", 2, &[]));
    let both = BTreeSet::from([Some(NodeId(1)), Some(NodeId(2))]);
    assert_eq!(BTreeSet::from_iter(nodes(&world, front.id)), both, "others may be on either");

    in_user_space(&mut world, 2, true);
    world.step();
    let waiting: Vec<Task> =
        tasks(&world, api.id).into_iter().filter(|task| task.node_id.is_none()).collect();
    assert_eq!(waiting.len(), 2, "a node that networks no longer reach gives its tasks up");
    world.step();
    for task in tasks(&world, api.id).into_iter().filter(|task| task.node_id.is_none()) {
        let expect =
            "no suitable node (2 nodes cannot carry overlay networks): n1 balances in user space";
        assert_eq!(task.status.err, expect);
    }
    in_user_space(&mut world, 1, false);
    end_all(&mut world, api.id);
    let placed = nodes(&world, api.id);
    assert!(placed.iter().all(|node| *node == Some(NodeId(1))), "{placed:?}");
}

/// In one pass tasks of a removed node give up addresses that waiting tasks and services get.
#[test]
fn addresses_pass_on_within_one_plan() {
    let mut world = world();
    make(
        &mut world,
        "small",
        json!({"IPAM": {"Config": [{"Subnet": "10.9.0.0/28", "IPRange": "10.9.0.0/29"}]}}),
    );
    let dnsrr = |name: &str, replicas: u64| {
        let mut spec = service_spec(name, replicas, &["small"]);
        spec.endpoint_spec = Some(serde_json::from_value(json!({"Mode": "dnsrr"})).unwrap());
        spec
    };
    let mut leaving = dnsrr("leaving", 6);
    let there = json!({"Constraints": ["node.hostname==n2"]});
    leaving.task_template.placement = Some(serde_json::from_value(there).unwrap());
    let leaving = start(&mut world, 9, leaving);
    let placed = |world: &World, id| {
        tasks(world, id).iter().filter(|task| !task.networks_attachments.is_empty()).count()
    };
    assert_eq!(placed(&world, leaving.id), 6, "the network is full");
    let waiting = start(&mut world, 10, dnsrr("waiting", 4));
    let lacking = start(&mut world, 8, service_spec("lacking", 0, &["small"]));
    assert_eq!(placed(&world, waiting.id), 0);
    assert_eq!(lacking.endpoint.virtual_ips, []);
    world.apply(vec![Action::Delete { kind: Kind::Node, id: 2 }]);
    world.step(); // Refused, it would panic.
    assert_eq!(placed(&world, waiting.id), 4);
    let lacking = world.state.service(lacking.id).unwrap();
    assert_eq!(lacking.endpoint.virtual_ips.len(), 1);
}

#[test]
fn a_network_that_its_services_have_left_is_pruned_before_their_tasks_are_replaced() {
    let mut world = world();
    make(&mut world, "front", json!({}));
    let back = make(&mut world, "back", json!({}));
    let api = start(&mut world, 8, service_spec("api", 2, &["front", "back"]));
    for task in tasks(&world, api.id) {
        world.report(task.id, TaskState::Running);
    }
    assert_eq!(prune(&world.state, &back), None, "the spec names it");
    let api = (**world.state.service(api.id).unwrap()).clone();
    let fewer = service_spec("api", 2, &["front"]);
    let action = service::update(&world.state, &api, api.meta.version, fewer).unwrap().unwrap();
    world.apply(vec![action]);
    let error = remove(&world.state, &back).unwrap_err();
    assert_eq!(error.to_string(), "network back is in use by service api", "its tasks go on");
    world.apply(vec![prune(&world.state, &back).expect("nobody is to be on it")]);
    assert!(world.state.network(back.id).is_some(), "until its last task has ended");
}

#[test]
fn managers_of_the_first_version_go_on_until_there_is_a_network() {
    let mut world = world();
    let level = |actions| Command::new(NOW, actions).level;
    let web = Object::Service(Box::new(world.web()));
    assert_eq!(level(vec![Action::Put { object: web, expect: Expect::Present }]), 1);
    let front = make(&mut world, "front", json!({}));
    assert_eq!(level(vec![put(front.clone(), Expect::Absent)]), 2);
    assert_eq!(level(vec![Action::Delete { kind: Kind::Network, id: front.id.0 }]), 2);
    let api = start(&mut world, 8, service_spec("api", 1, &["front"]));
    let [task] = &tasks(&world, api.id)[..] else { panic!("one task") };
    let task = Object::Task(Box::new(task.clone()));
    for object in [Object::Service(Box::new(api)), task] {
        assert_eq!(level(vec![Action::Put { object, expect: Expect::Present }]), 2);
    }
}

/// Fed change by change, each node has what a leader without memory tells it.
#[test]
fn tables_of_nodes_equal_those_made_anew() {
    let mut world = world();
    let nobody = BTreeSet::new();
    let mut drain = Drain::new(&world.state, &nobody, NOW);
    let nodes = [NodeId(1), NodeId(2)];
    let mut told = nodes.map(|node_id| drain.of_node(node_id));
    let mut check = |world: &World, silent: &BTreeSet<NodeId>, what: &str| {
        drain.update(&world.state, silent, NOW);
        let anew = Drain::new(&world.state, silent, NOW);
        for (node_id, told) in nodes.into_iter().zip(&mut told) {
            let (new, expect) = (drain.of_node(node_id), anew.of_node(node_id));
            assert_eq!(new, expect, "{what}: {node_id:?}");
            told.apply(&told.clone().diff(&new));
            assert_eq!(*told, expect, "{what}: changes for {node_id:?}");
        }
        told.clone().map(|table| table.networks.len())
    };
    make(&mut world, "front", json!({"EnableIPv6": true}));
    let back = make(&mut world, "back", json!({}));
    assert_eq!(check(&world, &nobody, "networks without tasks"), [0, 0]);
    let mut pinned = service_spec("pinned", 1, &["back"]);
    let here = json!({"Constraints": ["node.hostname==n1"]});
    pinned.task_template.placement = Some(serde_json::from_value(here).unwrap());
    start(&mut world, 9, pinned);
    assert_eq!(check(&world, &nobody, "a task"), [1, 0], "only where a task is on it");
    let api = start(&mut world, 8, service_spec("api", 4, &["front", "back"]));
    assert_eq!(check(&world, &nobody, "tasks on both"), [2, 2]);
    for task in tasks(&world, api.id) {
        world.report(task.id, TaskState::Running);
    }
    check(&world, &nobody, "tasks serve");
    check(&world, &[nodes[1]].into(), "a silent node");
    check(&world, &nobody, "it is back");
    let fewer = service_spec("api", 4, &["back"]);
    let api = (**world.state.service(api.id).unwrap()).clone();
    let action = service::update(&world.state, &api, api.meta.version, fewer).unwrap().unwrap();
    world.apply(vec![action]);
    world.step();
    check(&world, &nobody, "an update takes a network away");
    take_away(&mut world, api.id);
    check(&world, &nobody, "a removed service");
    end_all(&mut world, api.id);
    assert_eq!(check(&world, &nobody, "its tasks have ended"), [1, 0]);
    let table = services_on(&world, nodes[0], back.id);
    assert_eq!(table, [ServiceId(9)]);
    assert!(world.state.service(WEB).is_some());
}

/// The services of a network as a node has it.
fn services_on(world: &World, node_id: NodeId, network_id: NetworkId) -> Vec<ServiceId> {
    let drain = Drain::new(&world.state, &BTreeSet::new(), NOW);
    let table = drain.of_node(node_id);
    table.networks[&network_id].services.keys().copied().collect()
}

#[test]
fn nodes_know_host_names_as_containers_have_them_and_ports_by_name() {
    for (asked, expect) in [
        (None, None),
        (Some(""), None),
        (Some("db"), Some("db")),
        (Some("{{.Node.Hostname}}-{{.Task.Slot}}"), Some("n1-1")),
        (Some("{{.Nobody}}"), None),
    ] {
        let mut world = world();
        let front = make(&mut world, "front", json!({}));
        let mut spec = service_spec("api", 1, &["front"]);
        spec.task_template.container_spec.as_mut().unwrap().hostname = asked.map(str::to_owned);
        spec.task_template.placement =
            Some(serde_json::from_value(json!({"Constraints": ["node.hostname==n1"]})).unwrap());
        let port = |name: &str| json!({"Name": name, "TargetPort": 80});
        spec.endpoint_spec = Some(
            serde_json::from_value(json!({"Ports": [port("http"), {"TargetPort": 81}]})).unwrap(),
        );
        start(&mut world, 8, spec);
        let table = Drain::new(&world.state, &BTreeSet::new(), NOW).of_node(NodeId(1));
        let table = &table.networks[&front.id];
        let hosts: Vec<_> = table.endpoints.values().map(|one| one.hostname.as_deref()).collect();
        assert_eq!(hosts, [expect], "{asked:?}");
        let ports: Vec<_> = table.services.values().flat_map(|service| &service.ports).collect();
        let [http] = &ports[..] else { panic!("{ports:?}") };
        assert_eq!(
            (http.name.as_str(), http.protocol.name(), http.target_port),
            ("http", "tcp", 80)
        );
    }
}

#[test]
fn what_every_node_has_is_neither_made_nor_removed_and_costs_no_address() {
    for one in predefined() {
        let mut world = world();
        let name = one.spec.name.as_str();
        let text = format!("operation is not permitted on predefined {name} network");
        assert_eq!(refusal(&world, name, json!({})), text);
        let text = format!("{name} is a pre-defined network and cannot be removed");
        assert_eq!(remove(&world.state, &one).unwrap_err().to_string(), text);
        let by_id = one.id.to_string();
        let api = start(&mut world, 8, service_spec("api", 1, &[&by_id]));
        assert_eq!(api.spec.networks()[0].target, name, "stored by name");
        assert_eq!(api.endpoint.virtual_ips, []);
        let [task] = &tasks(&world, api.id)[..] else { panic!("one task") };
        assert_eq!(task.status.state, TaskState::Assigned, "{}", task.status.err);
        let has_uplink = task.networks_attachments.iter().any(|place| place.ingress);
        assert_eq!(
            (task.networks_attachments.len(), has_uplink),
            match name {
                "bridge" => (1, true),
                _ => (0, false),
            }
        );
        assert_eq!(has_uplink, super::has_uplink(task));
    }
    let mut world = world();
    make(&mut world, "back", json!({"Internal": true}));
    let api = start(&mut world, 8, service_spec("api", 1, &["back", "bridge"]));
    let [task] = &tasks(&world, api.id)[..] else { panic!("one task") };
    assert!(task.ingress_address().is_some(), "the bridge leads out of internal networks");
    let (service, networks) = (service_spec("web2", 1, &["host", "back"]), "host");
    let error = service::create(&world.state, ServiceId(9), service).unwrap_err().to_string();
    assert!(error.contains(networks) && error.contains("name it alone"), "{error}");
}
