//! What sessions tell nodes, and what of their words is stored.

use skep_common::object::Image;
use skep_common::spec::{NodeRole, NodeSpec};
use skep_common::{ImageId, Meta, ServiceId};
use skep_manager_core::{Command, TaskPatch};

use super::*;

/// A manager, whose daemon says which level it knows.
fn manager(id: u16, format_level: u32) -> Action {
    let description = NodeDescription { format_level, ..NodeDescription::default() };
    let node = object::Node {
        id: NodeId(id.into()),
        meta: Meta::default(),
        spec: NodeSpec { role: NodeRole::Manager, ..NodeSpec::default() },
        description: Some(description),
        status: object::NodeStatus::default(),
        manager_status: Some(object::ManagerStatus::default()),
        number: id,
        role: None,
    };
    Action::Put { object: Object::Node(Box::new(node)), expect: Expect::Absent }
}

/// A session of a node with that description.
fn session(description: NodeDescription) -> Session {
    Session {
        id: 1,
        to_agent: tokio::sync::mpsc::channel(1).0,
        stream: Stream::default(),
        told_table: None,
        lacks_peers_alone: false,
        has_table: Bytes::new(),
        told_managers: Vec::new(),
        told_role: Role::default(),
        told_trust: Trust::default(),
        must_renew: false,
        conditions: None,
        images: BTreeSet::new(),
        is_dirty: false,
        description,
        described_at: None,
        address: std::net::SocketAddr::from(([192, 0, 2, 1], 2377)),
    }
}

#[test]
fn what_nodes_say_of_ports_waits_until_all_managers_keep_it() {
    let said = |port: u32| PortCondition {
        service_id: ServiceId(7).to_string(),
        protocol: "tcp".into(),
        port,
        message: "is held by nginx (pid 812)".into(),
    };
    for (other, expect) in [(0, 1), (3, 3)] {
        let mut state = State::default();
        let managers = vec![manager(1, 3), manager(2, other)];
        state.apply(1, &Command::new(Timestamp(1), managers));
        let mut sessions = Sessions::new(1);
        let description = NodeDescription { format_level: 3, ..NodeDescription::default() };
        sessions.open.insert(NodeId(1), session(description));
        sessions.note_conditions(NodeId(1), vec![said(80)]);
        let command = Command::new(Timestamp(2), sessions.descriptions(&state, Timestamp(2), 9));
        assert_eq!((command.actions.len(), command.level), (1, expect), "its address is new");
        state.apply(2, &command);
        assert_eq!(sessions.descriptions(&state, Timestamp(2), 9), [], "that is stored");
        sessions.note_description(NodeId(1), "{\"Hostname\": \"n1\"}");
        assert_eq!(sessions.descriptions(&state, Timestamp(2), 9), [], "that was just now");
        let later = Timestamp(2).after(DESCRIPTION_PERIOD);
        assert_eq!(sessions.descriptions(&state, later, 9).len(), 1);
    }
}

#[test]
fn what_nodes_say_is_bounded_and_safe_for_terminals() {
    let mut sessions = Sessions::new(1);
    sessions.open.insert(NodeId(1), session(NodeDescription::default()));
    let said = |port: u32| PortCondition {
        service_id: ServiceId(7).to_string(),
        protocol: "tcp".into(),
        port,
        message: format!("is held by \u{1b}[2J\n{}", "x".repeat(5000)),
    };
    sessions.note_conditions(NodeId(1), (1..5000).map(said).collect());
    let known = sessions.open[&NodeId(1)].conditions.clone().unwrap();
    assert_eq!(known.len(), PORT_CONDITIONS_MAX);
    assert!(known[0].message.starts_with("is held by \u{fffd}[2J\u{fffd}xx"));
    assert_eq!(known[0].message.chars().count(), CONDITION_CHARS_MAX);
    let long = format!("{{\"Hostname\": {:?}}}", "x".repeat(DESCRIPTION_BYTES_MAX));
    sessions.note_description(NodeId(1), &long);
    assert_eq!(sessions.open[&NodeId(1)].description, NodeDescription::default());
}

#[test]
fn a_node_that_lacks_an_image_corrects_a_store_that_says_it_holds_it() {
    for (name, holders, held, expect) in [
        ("a copy that arrived", &[][..], true, Some(true)),
        ("a copy that cannot be had", &[2], false, None),
        ("one that is not there", &[1, 2], false, Some(false)),
    ] {
        let image = Image {
            id: ImageId(1),
            meta: Meta::default(),
            name: "docker.io/library/i:latest".into(),
            digest: "sha256:1".into(),
            size: 1,
            created: None,
            holders: holders.iter().map(|id| NodeId(*id)).collect(),
        };
        let object = Object::Image(Box::new(image));
        let put = Action::Put { object, expect: Expect::Absent };
        let mut state = State::default();
        state.apply(1, &Command::new(Timestamp(1), vec![put]));
        let report = ImageReport { digest: "sha256:1".into(), held, error: String::new() };
        let actions = Sessions::new(1).note_image(&state, NodeId(1), report);
        let correction = |holds| {
            let digest = "sha256:1".to_owned();
            Action::ImageHolder { digest, node_id: NodeId(1), holds }
        };
        assert_eq!(actions, expect.map(correction).into_iter().collect::<Vec<_>>(), "{name}");
    }
}

#[test]
fn nobody_waits_for_the_acknowledgement_of_a_node_that_was_removed() {
    let (service_id, task_id) = (ServiceId(7), TaskId(9));
    let service = serde_json::json!({
        "ID": service_id, "Spec": {"Name": "web"}, "SpecVersion": {"Index": 1},
        "Endpoint": {"Ports": [{"TargetPort": 80, "PublishedPort": 8080}]},
    });
    let task = serde_json::json!({
        "ID": task_id, "Spec": {}, "SpecVersion": {"Index": 1}, "ServiceID": service_id, "Slot": 1,
        "NodeID": NodeId(1), "Status": {"State": "running"}, "DesiredState": "running",
        "NetworksAttachments": [{"Ingress": true, "Address": "10.0.0.2", "Prefix": 24}],
        "ServiceName": "web",
    });
    let put = |object| Action::Put { object, expect: Expect::Absent };
    let objects = [
        Object::Service(Box::new(serde_json::from_value(service).unwrap())),
        Object::Task(Box::new(serde_json::from_value(task).unwrap())),
    ];
    let mut actions = vec![manager(1, 3), manager(2, 3)];
    actions.extend(objects.map(put));
    let (mut state, now) = (State::default(), Timestamp(1));
    state.apply(1, &Command::new(now, actions));
    let mut drain = Drain::new(&state, &BTreeSet::new(), now);
    let mut sessions = Sessions::new(1);
    for node_id in [NodeId(1), NodeId(2)] {
        sessions.open.insert(node_id, session(NodeDescription::default()));
        drain.session_opened(node_id);
    }
    let desired_state = Some(skep_common::TaskState::Shutdown);
    let stop = TaskPatch { desired_state, ..TaskPatch::of(task_id) };
    state.apply(2, &Command::new(now, vec![Action::PatchTask(stop)]));
    assert!(drain.update(&state, &BTreeSet::new(), now));
    drain.acknowledge(NodeId(1), drain.version());
    assert_eq!(drain.held_back(&state, now), [task_id].into(), "the other node has it still");

    let gone = Action::Delete { kind: skep_common::Kind::Node, id: 2 };
    state.apply(3, &Command::new(now, vec![gone]));
    drain.update(&state, &BTreeSet::new(), now);
    drain.acknowledge(NodeId(1), drain.version());
    sessions.dispatch(&state, &mut drain, BTreeSet::new(), now);
    assert_eq!(drain.held_back(&state, now), BTreeSet::new());
}

/// What each of the nodes was told of ports and peers, as how many of them, and nothing where it was told nothing.
struct Told(Vec<Queue>);

type Queue = tokio::sync::mpsc::Receiver<Result<DispatcherMessage, Status>>;

impl Told {
    fn next(&mut self) -> Vec<Vec<(usize, usize)>> {
        let told = |queue: &mut Queue| {
            let messages = std::iter::from_fn(|| queue.try_recv().ok());
            messages.map(|message| counted(message.unwrap())).collect()
        };
        self.0.iter_mut().map(told).collect()
    }
}

fn counted(message: DispatcherMessage) -> (usize, usize) {
    let Some(Message::Assignments(assignments)) = message.message else { panic!("no assignments") };
    let update = <skep_proto::MeshUpdate as prost::Message>::decode(assignments.mesh).unwrap();
    (update.ports.len(), update.peers.len())
}

#[test]
fn news_of_peers_alone_come_in_rounds_and_everything_else_at_once() {
    let put = |object| Action::Put { object, expect: Expect::Absent };
    let peer = |id: u16| {
        let mut node = skep_manager_core::testing::node(id);
        node.status.addr = format!("192.0.2.{id}");
        put(Object::Node(Box::new(node)))
    };
    let service = |id: u128, port: u16| {
        let service = serde_json::json!({
            "ID": ServiceId(id), "Spec": {"Name": format!("web{id}")}, "SpecVersion": {"Index": 1},
            "Endpoint": {"Ports": [{"TargetPort": 80, "PublishedPort": port}]},
        });
        put(Object::Service(Box::new(serde_json::from_value(service).unwrap())))
    };
    let (mut state, start) = (State::default(), Timestamp(1_000_000_000));
    state.apply(1, &Command::new(start, vec![peer(1), peer(2)]));
    let nobody = BTreeSet::new();
    let mut drain = Drain::new(&state, &nobody, start);
    let mut sessions = Sessions::new(1);
    let mut told = Told(Vec::new());
    for node_id in [NodeId(1), NodeId(2)] {
        let (to_agent, queue) = tokio::sync::mpsc::channel(9);
        told.0.push(queue);
        sessions.open.insert(node_id, Session { to_agent, ..session(NodeDescription::default()) });
        drain.session_opened(node_id);
    }
    let (mut version, mut now) = (1, start);
    for (name, micros, action, expect, is_awaited) in [
        ("the whole table", 0, None, Some((0, 2)), false),
        ("a first peer", 10, Some(peer(3)), Some((0, 1)), false),
        ("soon after it", 10, Some(peer(4)), None, true),
        ("and another", 500, Some(peer(5)), None, true),
        ("a port, and with it what waits", 10, Some(service(1, 80)), Some((1, 2)), false),
        ("a peer within the pause", 10, Some(peer(6)), None, true),
        ("the pause is over", 1000, None, Some((0, 1)), false),
        ("nothing", 10, None, None, false),
        ("the clock is set back", -5_000_000, Some(peer(7)), Some((0, 1)), false),
    ] {
        now = Timestamp(now.0 + micros * 1000);
        version += 1;
        state.apply(version, &Command::new(now, action.into_iter().collect()));
        drain.update(&state, &nobody, now);
        sessions.skip_unconcerned(&mut drain);
        sessions.dispatch(&state, &mut drain, BTreeSet::new(), now);
        let expect: Vec<(usize, usize)> = expect.into_iter().collect();
        assert_eq!(told.next(), [expect.clone(), expect], "{name}");
        assert_eq!(sessions.deadline().is_some(), is_awaited, "{name}");
    }
}

/// Whoever is called down and lives hears of it, and opens another session.
#[test]
fn a_node_that_is_called_down_is_told_that_its_session_ended() {
    let mut sessions = Sessions::new(1);
    let (to_agent, mut queue) = tokio::sync::mpsc::channel(1);
    let of_node = |to_agent: &ToAgent| Session {
        to_agent: to_agent.clone(),
        ..session(NodeDescription::default())
    };
    assert!(!sessions.end(NodeId(1)), "it has none");
    sessions.open.insert(NodeId(1), of_node(&to_agent));
    assert!(sessions.end(NodeId(1)));
    assert!(!sessions.is_current(NodeId(1), 1));
    assert_eq!(queue.try_recv().unwrap().unwrap_err().code(), tonic::Code::Unavailable);

    sessions.open.insert(NodeId(1), of_node(&to_agent));
    to_agent.try_send(Ok(DispatcherMessage::default())).unwrap();
    assert!(!sessions.end(NodeId(1)), "it could not be told");
    assert!(sessions.is_current(NodeId(1), 1));
}
