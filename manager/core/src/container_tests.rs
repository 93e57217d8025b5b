//! Containers that no service made, from the wish to their erasure.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use skep_common::object::NodeState;
use skep_common::{Image, ImageId, Kind, NetworkId};

use super::*;
use crate::command::{Command, Outcome, Refusal};
use crate::endpoints::Drain;
use crate::testing::{NOW, World, parse_node, service};

const FRONT: NetworkId = NetworkId(100);
const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);

/// Two nodes, an image, the attachable network `front`, and `closed`, which is not.
fn world() -> World {
    let mut world = World::new("1 2", service(0), "");
    world.put(vec![Object::Image(Box::new(Image {
        id: ImageId(1),
        meta: Meta::default(),
        name: "docker.io/library/busybox:latest".into(),
        digest: "sha256:12".into(),
        size: 1,
        created: None,
        holders: [N1].into(),
    }))]);
    for (id, name, attachable) in [(FRONT, "front", true), (NetworkId(101), "closed", false)] {
        let spec = json!({"Name": name, "Attachable": attachable});
        let spec = serde_json::from_value(spec).unwrap();
        let (_, action) = network::create(&world.state, id, spec).unwrap();
        world.apply(vec![action]);
    }
    world.step();
    world
}

fn request(name: &str, networks: &[&str]) -> Request {
    let networks: Vec<Value> = networks.iter().map(|name| json!({"Target": name})).collect();
    let spec = json!({"ContainerSpec": {"Image": "busybox"}, "Networks": networks});
    let spec = serde_json::from_value(spec).unwrap();
    Request { name: name.to_owned(), spec, auto_remove: false }
}

/// Runs a container on a node; settled already.
fn start(world: &mut World, id: u128, node_id: NodeId, request: Request) -> Task {
    let action = run(&world.state, TaskId(id), node_id, request, NOW).unwrap();
    world.apply(vec![action]);
    world.expect_settled("nobody decides about it");
    (**world.state.task(TaskId(id)).unwrap()).clone()
}

fn refusal(world: &World, request: Request) -> String {
    run(&world.state, TaskId(99), N1, request, NOW).unwrap_err().to_string()
}

#[test]
fn a_container_is_bound_to_its_node_and_named_on_its_networks() {
    let mut world = world();
    let probe = start(&mut world, 70, N2, request("probe", &["front"]));
    assert_eq!((probe.node_id, probe.desired_state), (Some(N2), TaskState::Running));
    assert_eq!(probe.spec.container_spec.as_ref().unwrap().image, "busybox:latest@sha256:12");
    let places: Vec<bool> = probe.networks_attachments.iter().map(|place| place.ingress).collect();
    assert_eq!(places, [false, true], "its network, then its uplink");
    world.report(probe.id, TaskState::Running);
    let table = Drain::new(&world.state, &BTreeSet::new(), NOW).of_node(N2);
    let endpoint = &table.networks[&FRONT].endpoints[&probe.id];
    assert_eq!((endpoint.name.as_str(), endpoint.serving), ("probe", true));
    let error = network::remove(&world.state, world.state.network(FRONT).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "network front is in use by container probe");

    let plain = start(&mut world, 80, N1, request("", &[]));
    assert_eq!((plain.name(), plain.networks_attachments.len()), (TaskId(80).short(), 1));
    let host = start(&mut world, 90, N1, request("agent", &["host"]));
    assert_eq!(host.networks_attachments, []);

    let again = State::decode(&world.state.encode()).unwrap();
    assert_eq!(again.digest(), world.state.digest());
    assert_eq!(again.id_by_name(Kind::Task, &format!("{N2}/probe")), Some(70));
}

/// Whoever had a service's id would be told of its tasks, and be balanced to as one of them.
#[test]
fn a_container_has_an_id_of_its_own() {
    let mut world = world();
    start(&mut world, 70, N1, request("probe", &[]));
    let web = crate::testing::WEB;
    for taken in [70, web.0] {
        let error = run(&world.state, TaskId(taken), N2, request("x", &[]), NOW).unwrap_err();
        let id = TaskId(taken);
        assert_eq!(
            error.to_string(),
            format!("id {id} is taken: run the container with a new one")
        );
    }
    // The store has the last word, whoever of the two comes first.
    let mut of_service = start(&mut world, 80, N1, request("other", &[]));
    of_service.id = TaskId(web.0);
    of_service.service_id = web;
    of_service.service_name = "twin".to_owned();
    let mut of_container = (**world.state.service(web).unwrap()).clone();
    of_container.id = ServiceId(80);
    of_container.spec.name = "twin".to_owned();
    for object in [Object::Task(Box::new(of_service)), Object::Service(Box::new(of_container))] {
        let put = Action::Put { object, expect: Expect::Absent };
        let (outcome, _) = world.state.clone().apply(99, &Command::new(NOW, vec![put]));
        assert!(matches!(&outcome, Outcome::Refused(Refusal::NameTaken { .. })), "{outcome:?}");
    }
}

#[test]
fn a_node_has_a_bounded_number_of_containers() {
    let mut world = world();
    let limit = CONTAINERS_PER_NODE_MAX;
    let probe = start(&mut world, 1000, N1, request("", &["host"]));
    let more = (1..limit).map(|n| {
        let id = probe.id.0 + n as u128;
        let (id, service_id) = (TaskId(id), ServiceId(id));
        let task = Task { id, service_id, service_name: id.to_string(), ..probe.clone() };
        Object::Task(Box::new(task))
    });
    world.put(more.collect());
    let refused = format!(
        "this node has {limit} containers that no service made: remove some with `skep rm`"
    );
    assert_eq!(refusal(&world, request("one-more", &[])), refused);
    assert!(run(&world.state, TaskId(99), N2, request("elsewhere", &[]), NOW).is_ok());
}

#[test]
fn what_cannot_run_is_refused_in_dockers_words() {
    let mut world = world();
    let probe = start(&mut world, 70, N1, request("probe", &[]));
    let taken = format!(
        "Conflict. The container name \"probe\" is already in use by container \"{}\". You have to remove (or rename) that container to be able to reuse that name.",
        probe.id
    );
    let mut unknown = request("a", &[]);
    unknown.spec.container_spec.as_mut().unwrap().image = "nobody".to_owned();
    let mut with_secret = request("a", &[]);
    let reference = skep_common::spec::SecretReference::default();
    with_secret.spec.container_spec.as_mut().unwrap().secrets = Some(vec![reference]);
    for (request, expect) in [
        (with_secret, "a single container has no secrets and configs: use a service"),
        (request("probe", &[]), taken.as_str()),
        (request("a", &["closed"]), "network closed is not manually attachable"),
        (request("a", &["nowhere"]), "network nowhere not found"),
        (
            request("-a", &[]),
            "Invalid container name (-a), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, and 63 characters",
        ),
        (
            unknown,
            "no image named \"nobody\" in this swarm: load it with `skep image load` or `skep image import`",
        ),
    ] {
        assert_eq!(refusal(&world, request), expect);
    }
    start(&mut world, 80, N2, request("probe", &[]));
    // Two requests that were decided on one view: the store has the last word.
    let [first, second] = [10, 11]
        .map(|id| run(&world.state, TaskId(id), N1, request("twin", &["front"]), NOW).unwrap());
    let mut renamed = second.clone();
    if let Action::Put { object: Object::Task(task), .. } = &mut renamed {
        task.service_name = "other".to_owned();
    }
    world.apply(vec![first]);
    for (action, is_expected) in [
        (second, (|refusal| matches!(refusal, Refusal::NameTaken { .. })) as fn(&Refusal) -> bool),
        (renamed, |refusal| matches!(refusal, Refusal::AddressInUse { .. })),
    ] {
        let command = Command::new(NOW, vec![action]);
        assert_eq!(command.level, 3, "managers that know no such tasks stop");
        let (outcome, _) = world.state.clone().apply(world.state.version().index + 1, &command);
        assert!(
            matches!(&outcome, Outcome::Refused(refusal) if is_expected(refusal)),
            "{outcome:?}"
        );
    }
}

#[test]
fn only_its_node_finds_it() {
    let mut world = world();
    let probe = start(&mut world, 7 << 100, N1, request("probe", &[]));
    start(&mut world, 7 << 100 | 1, N1, request("other", &[]));
    let id = probe.id.to_string();
    let find = |node_id, reference: &str| match find(&world.state, node_id, reference) {
        Ok(task) => task.name(),
        Err(error) => error.to_string(),
    };
    for (reference, expect) in [
        ("probe", "probe".to_owned()),
        (id.as_str(), "probe".to_owned()),
        (&id[..12], format!("container {} is ambiguous (2 matches found)", &id[..12])),
        ("web", "No such container: web".to_owned()),
        ("", "No such container: ".to_owned()),
    ] {
        assert_eq!(find(N1, reference), expect);
    }
    assert_eq!(find(N2, "probe"), "No such container: probe");
}

#[test]
fn it_stays_until_it_is_removed_and_frees_its_address_when_it_ends() {
    let mut world = world();
    let probe = start(&mut world, 70, N1, request("probe", &["front"]));
    let task = |world: &World| world.state.task(probe.id).cloned();
    world.report(probe.id, TaskState::Running);
    let error = remove(&task(&world).unwrap(), false).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot remove container \"probe\": container is running"),
        "{error}"
    );
    world.apply(vec![stop(&task(&world).unwrap())]);
    assert_eq!(task(&world).unwrap().desired_state, TaskState::Shutdown);
    world.expect_settled("it is stopping");
    world.report(probe.id, TaskState::Complete);
    world.expect_settled("it stays, and nobody replaces it");
    assert!(!world.state.has_tasks_on(FRONT), "its address is free");
    let action = remove(&task(&world).unwrap(), false).unwrap();
    world.apply(vec![action]);
    assert_eq!(of_node(&world.state, N1).count(), 0, "nobody sees it any more");
    // Its name is free at once.
    let again = run(&world.state, TaskId(80), N1, request("probe", &["front"]), NOW).unwrap();
    world.apply(vec![again]);
    assert_eq!(world.step(), "x70");

    let forced = start(&mut world, 90, N1, request("forced", &[]));
    world.report(forced.id, TaskState::Running);
    world.apply(vec![remove(&forced, true).unwrap()]);
    world.expect_settled("its node stops it first");
    world.report(forced.id, TaskState::Shutdown);
    world.expect_step("it is stopped", "x90");
}

#[test]
fn it_goes_by_itself_where_that_is_asked_or_its_node_is_gone() {
    let mut world = world();
    let once = Request { auto_remove: true, ..request("once", &[]) };
    let once = start(&mut world, 70, N1, once);
    world.report(once.id, TaskState::Running);
    world.expect_settled("it runs");
    world.report(once.id, TaskState::Failed);
    assert_eq!(world.step(), "x70");

    let lost = start(&mut world, 80, N2, request("lost", &["front"]));
    world.report(lost.id, TaskState::Running);
    let mut down = parse_node("2");
    down.status.state = NodeState::Down;
    world.replace(Object::Node(Box::new(down)));
    world.step();
    assert!(world.state.task(lost.id).is_some(), "its node may come back with it");
    world.apply(vec![Action::Delete { kind: Kind::Node, id: N2.0 }]);
    world.step();
    world.step();
    assert_eq!(world.state.task(lost.id), None);
    assert!(!world.state.has_tasks_on(FRONT));
}

#[test]
fn one_that_meets_the_removal_of_its_node_is_given_up_by_the_same_leader() {
    let mut world = world();
    let late = run(&world.state, TaskId(70), N2, request("late", &["front"]), NOW).unwrap();
    world.apply(vec![Action::Delete { kind: Kind::Node, id: N2.0 }]);
    world.step();
    world.apply(vec![late]);
    world.step();
    world.expect_settled("nothing is left for a new leader to find");
    assert_eq!(world.state.task(TaskId(70)), None);
    assert!(!world.state.has_tasks_on(FRONT));
}
