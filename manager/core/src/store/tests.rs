//! Tables of commands and their outcomes; random logs.

use std::collections::BTreeSet;

use proptest::prelude::*;
use skep_common::object::{Image, NetworkAttachment, TaskStatus};
use skep_common::spec::{NetworkSpec, PortConfig, StackSpec};
use skep_common::{
    ImageId, Meta, Network, NetworkId, NodeId, Object, StackId, TaskState, Timestamp,
};

use super::*;
use crate::command::{Action, Command, Expect, Outcome, Refusal, TaskPatch};
use crate::testing::{self, parse_task};

const AT: Timestamp = Timestamp::from_secs(100);

fn commit(state: &mut State, actions: Vec<Action>) -> (Outcome, Vec<Change>) {
    let index = state.version().index + 1;
    state.apply(index, &Command::new(AT, actions))
}

fn put(object: Object, expect: Expect) -> Action {
    Action::Put { object, expect }
}

fn service(id: u128, name: &str, port: Option<u16>) -> Object {
    let mut service = testing::service(1);
    service.id = ServiceId(id);
    name.clone_into(&mut service.spec.name);
    let config = |number| PortConfig {
        target_port: 80,
        published_port: Some(number),
        ..PortConfig::default()
    };
    service.endpoint.ports = port.map(config).into_iter().collect();
    Object::Service(Box::new(service))
}

fn node(id: u128, number: u16) -> Object {
    let mut node = testing::node(number);
    node.id = NodeId(id);
    Object::Node(Box::new(node))
}

fn task(id: u128, word: &str, address: Option<u8>) -> Object {
    let mut task = parse_task(&testing::service(1), id, word);
    let attach = |last| NetworkAttachment::uplink(Ipv4Addr::new(10, 192, 4, last), 22);
    task.networks_attachments = address.map(attach).into_iter().collect();
    Object::Task(Box::new(task))
}

fn image(id: u128, name: &str, digest: &str) -> Object {
    Object::Image(Box::new(Image {
        id: ImageId(id),
        meta: Meta::default(),
        name: name.to_owned(),
        digest: digest.to_owned(),
        size: 1,
        created: None,
        holders: BTreeSet::new(),
    }))
}

fn cluster(id: u128) -> Object {
    Object::Cluster(Box::new(Cluster {
        id: skep_common::ClusterId(id),
        ..crate::testing::cluster()
    }))
}

/// A store with services 1 `a` (port 80) and 2 `b`, node 1 with number 1, task 1 with address .1.
fn sample() -> State {
    let mut state = State::default();
    let objects = [
        cluster(1),
        node(1, 1),
        service(1, "a", Some(80)),
        service(2, "b", None),
        task(1, "1@1:running", Some(1)),
    ];
    let actions = objects.into_iter().map(|object| put(object, Expect::Absent)).collect();
    assert!(matches!(commit(&mut state, actions).0, Outcome::Applied(_)));
    state
}

/// The objects without the header, which counts refused commands too.
fn body(state: &State) -> Vec<u8> {
    let bytes = state.encode();
    let header = bytes.iter().position(|byte| *byte == b'\n').unwrap();
    bytes[header..].to_vec()
}

#[test]
fn a_refused_command_says_why_and_changes_nothing() {
    let at = |index| Version { index };
    for (name, action, refusal) in [
        (
            "the id is there",
            put(service(1, "c", None), Expect::Absent),
            Refusal::NameTaken { kind: Kind::Service, name: ServiceId(1).to_string() },
        ),
        (
            "the name is there",
            put(service(3, "a", None), Expect::Absent),
            Refusal::NameTaken { kind: Kind::Service, name: "a".to_owned() },
        ),
        (
            "renamed to one that is there",
            put(service(2, "a", None), Expect::Present),
            Refusal::NameTaken { kind: Kind::Service, name: "a".to_owned() },
        ),
        (
            "an old version",
            put(service(1, "a", None), Expect::Version(at(7))),
            Refusal::OutOfSequence { kind: Kind::Service, given: at(7), current: at(1) },
        ),
        (
            "not there",
            put(service(3, "c", None), Expect::Present),
            Refusal::NotFound { kind: Kind::Service },
        ),
        (
            "not there, by version",
            put(node(3, 3), Expect::Version(at(1))),
            Refusal::NotFound { kind: Kind::Node },
        ),
        (
            "the port is taken",
            put(service(2, "b", Some(80)), Expect::Present),
            Refusal::PortInUse {
                port: 80,
                protocol: "tcp".to_owned(),
                owner: ServiceId(1),
                owner_name: "a".to_owned(),
            },
        ),
        (
            "the address is taken",
            put(task(2, "2@1:assigned", Some(1)), Expect::Absent),
            Refusal::AddressInUse { address: [10, 192, 4, 1].into() },
        ),
        (
            "a second swarm",
            put(cluster(2), Expect::Absent),
            Refusal::NameTaken { kind: Kind::Cluster, name: "default".to_owned() },
        ),
    ] {
        let mut state = sample();
        let before = body(&state);
        // What came before it in the same command is undone with it.
        let harmless = put(service(9, "z", Some(99)), Expect::Absent);
        let (outcome, changes) = commit(&mut state, vec![harmless, action]);
        assert_eq!(outcome, Outcome::Refused(refusal), "{name}");
        assert_eq!(changes, [], "{name}");
        assert_eq!(body(&state), before, "{name}");
        assert_eq!(state.version(), at(2), "{name}: the log went on");
        assert_eq!(state.id_by_name(Kind::Service, "z"), None, "{name}");
        assert_indexes(&state);
    }
}

#[test]
fn names_ports_and_addresses_are_free_when_given_up() {
    let mut state = sample();
    let mut apply = |name: &str, actions: Vec<Action>| {
        let (outcome, _) = commit(&mut state, actions);
        assert!(matches!(outcome, Outcome::Applied(_)), "{name}: {outcome:?}");
        assert_indexes(&state);
    };
    apply("another port", vec![put(service(1, "a", Some(81)), Expect::Present)]);
    apply("the first is free", vec![put(service(2, "b", Some(80)), Expect::Present)]);
    apply("a rename", vec![put(service(1, "c", Some(81)), Expect::Present)]);
    apply("the old name is free", vec![put(service(3, "a", None), Expect::Absent)]);
    apply("gone", vec![Action::Delete { kind: Kind::Service, id: 1 }]);
    apply("its name and port are free", vec![put(service(4, "c", Some(81)), Expect::Absent)]);
    let ended = TaskStatus { state: TaskState::Failed, ..TaskStatus::default() };
    let patch = TaskPatch { status: Some(ended), ..TaskPatch::of(TaskId(1)) };
    apply("a task ends", vec![Action::PatchTask(patch)]);
    apply("its address is free", vec![put(task(2, "1@1:assigned", Some(1)), Expect::Absent)]);
    apply("a delete of nothing is no error", vec![Action::Delete { kind: Kind::Task, id: 77 }]);
}

#[test]
fn states_and_desired_states_only_grow() {
    use TaskState::{Failed, Ready, Remove, Running, Shutdown, Starting};
    for (state, desired, expect) in [
        (Starting, Ready, (Running, Running)),
        (Failed, Shutdown, (Failed, Shutdown)),
        (Running, Remove, (Running, Remove)),
    ] {
        let mut store = sample();
        let status = TaskStatus { state, ..TaskStatus::default() };
        let patch = TaskPatch {
            status: Some(status),
            desired_state: Some(desired),
            ..TaskPatch::of(TaskId(1))
        };
        commit(&mut store, vec![Action::PatchTask(patch)]);
        let task = store.task(TaskId(1)).unwrap();
        assert_eq!((task.status.state, task.desired_state), expect);
        let word = format!("1@1:{state}>{desired}");
        let mut store = sample();
        commit(&mut store, vec![put(self::task(1, &word, None), Expect::Present)]);
        let task = store.task(TaskId(1)).unwrap();
        assert_eq!((task.status.state, task.desired_state), expect, "put whole");
    }
}

#[test]
fn a_patch_of_a_task_that_is_gone_is_ignored_and_a_node_is_given_once() {
    let mut state = sample();
    let gone = TaskPatch { desired_state: Some(TaskState::Remove), ..TaskPatch::of(TaskId(9)) };
    let (outcome, changes) = commit(&mut state, vec![Action::PatchTask(gone)]);
    assert_eq!((outcome, changes), (Outcome::Applied(Version { index: 2 }), vec![]));
    let moved = TaskPatch { node_id: Some(NodeId(5)), ..TaskPatch::of(TaskId(1)) };
    let (_, changes) = commit(&mut state, vec![Action::PatchTask(moved)]);
    assert_eq!(changes, [], "a task is never moved");
    assert_eq!(state.task(TaskId(1)).unwrap().node_id, Some(NodeId(1)));
}

#[test]
fn a_node_keeps_its_number_and_a_new_one_gets_the_lowest() {
    let mut state = sample();
    let number = |state: &State, id| state.node(NodeId(id)).unwrap().number;
    commit(&mut state, vec![put(node(2, 0), Expect::Absent), put(node(3, 1), Expect::Absent)]);
    assert_eq!((number(&state, 2), number(&state, 3)), (2, 3));
    commit(&mut state, vec![put(node(3, 9), Expect::Present)]);
    assert_eq!(number(&state, 3), 3);
    commit(&mut state, vec![Action::Delete { kind: Kind::Node, id: 2 }]);
    commit(&mut state, vec![put(node(4, 0), Expect::Absent)]);
    assert_eq!(number(&state, 4), 2);
    let mut full = state.clone();
    for number in 4..=65_533 {
        full.node_numbers.insert(number, NodeId(2));
    }
    let (outcome, _) = commit(&mut full, vec![put(node(5000, 0), Expect::Absent)]);
    assert!(matches!(outcome, Outcome::Applied(_)), "{outcome:?}");
    assert_eq!(number(&full, 5000), 65_534);
    let (outcome, _) = commit(&mut full, vec![put(node(5001, 0), Expect::Absent)]);
    assert_eq!(outcome, Outcome::Refused(Refusal::NodeNumbersExhausted));
    assert_indexes(&state);
}

#[test]
fn a_specs_version_changes_with_the_spec_alone() {
    let mut state = sample();
    let mut of = |object: Object| {
        commit(&mut state, vec![put(object, Expect::Present)]);
        let service = state.service(ServiceId(1)).unwrap();
        (service.meta.version.index, service.spec_version.index)
    };
    assert_eq!(of(service(1, "a", Some(82))), (2, 1), "the endpoint is not the spec");
    let Object::Service(mut changed) = service(1, "a", None) else { unreachable!() };
    changed.spec.labels = Some([("a".to_owned(), "b".to_owned())].into());
    assert_eq!(of(Object::Service(changed)), (3, 3));
}

#[test]
fn holders_are_noted_for_every_name_of_a_digest() {
    let mut state = sample();
    let images = [image(1, "x", "sha256:1"), image(2, "y", "sha256:1"), image(3, "z", "sha256:2")];
    commit(&mut state, images.into_iter().map(|image| put(image, Expect::Absent)).collect());
    let hold = |holds| Action::ImageHolder { digest: "sha256:1".into(), node_id: NodeId(1), holds };
    let (_, changes) = commit(&mut state, vec![hold(true)]);
    assert_eq!(changes.iter().map(|change| change.id).collect::<Vec<_>>(), [1, 2]);
    let (_, changes) = commit(&mut state, vec![hold(true)]);
    assert_eq!(changes, [], "known");
    let (_, changes) = commit(&mut state, vec![hold(false)]);
    assert_eq!(changes.len(), 2);
}

#[test]
fn what_is_not_a_state_is_refused_with_its_line() {
    let bytes = sample().encode();
    let text = String::from_utf8(bytes.clone()).unwrap();
    let cut = State::decode(&bytes[..bytes.len() - 10]).unwrap_err();
    assert_eq!(cut.to_string(), "line 6 of the state is not a JSON document of the expected form");
    let newer = text.replacen("\"level\":1", "\"level\":5", 1);
    let newer = State::decode(newer.as_bytes()).unwrap_err();
    assert_eq!(newer.to_string(), "the state has format level 5, this program knows 4");
    let last = text.trim_end().rsplit('\n').next().unwrap();
    let twice = State::decode(format!("{text}{last}\n").as_bytes()).unwrap_err();
    assert!(twice.to_string().starts_with("the state contradicts itself at line 7"), "{twice}");
    assert!(State::decode(b"").is_err());
}

/// Compares every index with one made anew from the objects.
#[track_caller]
fn assert_indexes(state: &State) {
    let anew = State::decode(&state.encode()).unwrap();
    assert_eq!(anew.names, state.names);
    assert_eq!(anew.ports, state.ports);
    assert_eq!(anew.addresses, state.addresses);
    assert_eq!(anew.vnis, state.vnis);
    assert_eq!(anew.network_addresses, state.network_addresses);
    assert_eq!(anew.node_numbers, state.node_numbers);
    assert_eq!(anew.service_tasks, state.service_tasks);
    assert_eq!(anew.node_tasks, state.node_tasks);
    assert_eq!(anew.digest(), state.digest());
    assert_eq!(anew.encode(), state.encode());
}

fn any_object() -> impl Strategy<Value = Object> {
    let name = prop_oneof![Just("a"), Just("b"), Just("c")];
    let states = prop_oneof![
        Just("new"),
        Just("assigned"),
        Just("running"),
        Just("failed"),
        Just("running>remove")
    ];
    prop_oneof![
        (0..4_u128, name.clone(), proptest::option::of(80..83_u16))
            .prop_map(|(id, name, port)| service(id, name, port)),
        (0..4_u128, 0..4_u16).prop_map(|(id, number)| node(id, number)),
        (0..6_u128, 1..3_u64, 0..3_u8, states, proptest::option::of(1..4_u8)).prop_map(
            |(id, slot, node, state, address)| {
                let node = if node == 0 { "-".to_owned() } else { node.to_string() };
                task(id, &format!("{slot}@{node}:{state}"), address)
            }
        ),
        (0..3_u128, name.clone(), 0..2_u8).prop_map(|(id, name, digest)| image(
            id,
            name,
            &format!("sha256:{digest}")
        )),
        (0..3_u128, name.clone()).prop_map(|(id, name)| {
            let spec = NetworkSpec { name: name.to_owned(), ..NetworkSpec::default() };
            Object::Network(Box::new(Network {
                id: NetworkId(id),
                meta: Meta::default(),
                spec,
                vni: 0,
                subnets: Vec::new(),
                pending_delete: false,
            }))
        }),
        (0..3_u128, name).prop_map(|(id, name)| {
            let spec = StackSpec { name: name.to_owned(), ..StackSpec::default() };
            Object::Stack(Box::new(Stack { id: StackId(id), meta: Meta::default(), spec }))
        }),
        (0..2_u128).prop_map(cluster),
    ]
}

fn any_action() -> impl Strategy<Value = Action> {
    let kinds = prop_oneof![
        Just(Kind::Service),
        Just(Kind::Node),
        Just(Kind::Task),
        Just(Kind::Image),
        Just(Kind::Stack)
    ];
    let expects = prop_oneof![
        3 => Just(Expect::Absent),
        3 => Just(Expect::Present),
        1 => (0..9_u64).prop_map(|index| Expect::Version(Version { index })),
    ];
    let states = prop_oneof![
        Just(TaskState::Pending),
        Just(TaskState::Running),
        Just(TaskState::Shutdown),
        Just(TaskState::Remove)
    ];
    prop_oneof![
        6 => (any_object(), expects).prop_map(|(object, expect)| Action::Put { object, expect }),
        1 => (kinds, 0..4_u128).prop_map(|(kind, id)| Action::Delete { kind, id }),
        2 => (0..6_u128, states, proptest::option::of(1..3_u128), any::<bool>()).prop_map(
            |(id, state, node, is_status)| {
                let mut patch = TaskPatch::of(TaskId(id));
                patch.node_id = node.map(NodeId);
                if is_status {
                    patch.status = Some(TaskStatus { state, ..TaskStatus::default() });
                } else {
                    patch.desired_state = Some(state);
                }
                Action::PatchTask(patch)
            }
        ),
        1 => (0..2_u8, 0..3_u128, any::<bool>()).prop_map(|(digest, node, holds)| {
            Action::ImageHolder { digest: format!("sha256:{digest}"), node_id: NodeId(node), holds }
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Any log: no panic, no stale index, states that only grow, refusals without a trace, equal bytes
    /// from equal logs and from a snapshot in the middle.
    #[test]
    fn any_log_leads_to_one_state(
        log in proptest::collection::vec(proptest::collection::vec(any_action(), 1..4), 1..30)
    ) {
        let (mut state, mut other) = (State::default(), State::default());
        for (index, actions) in (1..).zip(log) {
            let before = state.clone();
            let command = Command::new(AT, actions);
            let (outcome, changes) = state.apply(index, &command);
            prop_assert_eq!((outcome.clone(), changes), other.apply(index, &command));
            if let Outcome::Refused(_) = outcome {
                prop_assert_eq!(body(&before), body(&state));
            }
            for (id, old) in before.tasks() {
                if let Some(new) = state.task(*id).filter(|new| new.meta.created_at == old.meta.created_at) {
                    let was_erased = command.actions.iter().any(|action| {
                        matches!(action, Action::Delete { kind: Kind::Task, id: erased } if *erased == id.0)
                    });
                    prop_assert!(was_erased || new.status.state >= old.status.state);
                    prop_assert!(was_erased || new.desired_state >= old.desired_state);
                }
            }
            assert_indexes(&state);
            other = State::decode(&other.encode()).unwrap();
            prop_assert_eq!(other.digest(), state.digest());
        }
    }
}
