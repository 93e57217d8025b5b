//! Events as words, and what a ring keeps of them.

use skep_common::object::{ContainerStatus, NodeState, TaskStatus};
use skep_common::spec::{Availability, ContainerSpec, HealthConfig};
use skep_common::{Object, TaskState};

use super::*;
use crate::command::{Action, Expect, TaskPatch};
use crate::testing::{NOW, WEB, World, node, service};

/// `kind action (key=value, …)` of each event that these actions make.
fn told(world: &mut World, actions: Vec<Action>) -> Vec<String> {
    let old = world.state.clone();
    let changes = world.apply(actions);
    let events = of(&old, &world.state, &changes, world.now);
    let line = |event: &Event| {
        let ids = [Some(WEB.to_string()), Some(NodeId(1).to_string())];
        let is_id = |value: &String| ids.contains(&Some(value.clone()));
        let attributes = event.attributes.iter().filter(|(_, value)| !is_id(value));
        let pairs: Vec<String> = attributes.map(|(key, value)| format!("{key}={value}")).collect();
        format!("{:?} {} ({})", event.kind, event.action, pairs.join(", "))
    };
    assert!(events.iter().all(|event| event.version == world.state.version().index));
    events.iter().map(line).collect()
}

fn put(object: Object) -> Vec<Action> {
    vec![Action::Put { object, expect: Expect::Present }]
}

#[test]
fn objects_come_change_and_go() {
    let mut world = World::new("1", service(2), "");
    let mut web = world.web();
    web.spec.labels = Some([(NAMESPACE_LABEL.to_owned(), "shop".to_owned())].into());
    web.spec.mode = service(3).spec.mode;
    let changed = put(Object::Service(Box::new(web.clone())));
    let expect = "Service update (name=web, replicas.new=3, replicas.old=2, stack=shop)";
    assert_eq!(told(&mut world, changed), [expect]);
    web.update_status = Some(UpdateStatus { state: "updating".into(), ..UpdateStatus::default() });
    let expect =
        "Service update (name=web, stack=shop, updatestate.new=updating, updatestate.old=)";
    assert_eq!(told(&mut world, put(Object::Service(Box::new(web.clone())))), [expect]);

    let mut one = (**world.state.node(NodeId(1)).unwrap()).clone();
    one.spec.availability = Availability::Drain;
    one.status.state = NodeState::Down;
    let expect = "Node update (availability.new=drain, availability.old=active, name=1, state.new=down, state.old=ready)";
    let lines = told(&mut world, put(Object::Node(Box::new(one))));
    assert_eq!(lines.len(), 1);
    let name = world.state.node(NodeId(1)).map(|node| node_name(node)).unwrap();
    assert_eq!(lines[0], expect.replace("name=1", &format!("name={name}")));

    let two = vec![Action::Put { object: Object::Node(Box::new(node(2))), expect: Expect::Absent }];
    assert_eq!(told(&mut world, two).len(), 1);

    // It goes when users remove it, and not once more when its tasks have gone.
    web.pending_delete = true;
    let removed = told(&mut world, put(Object::Service(Box::new(web))));
    assert_eq!(removed, ["Service remove (name=web, stack=shop)"]);
    let gone = vec![Action::Delete { kind: Kind::Service, id: WEB.0 }];
    assert_eq!(told(&mut world, gone), [""; 0]);
}

/// A task that is reported in these states, with an exit code where it has ended.
fn life(task: &str, spec: Option<ContainerSpec>, reports: &[TaskStatus]) -> Vec<String> {
    let mut web = service(1);
    web.spec.task_template.container_spec = spec;
    let mut world = World::new("1", web, task);
    let task_id = *world.state.tasks().keys().next().unwrap();
    let mut actions = Vec::new();
    for status in reports {
        let patch = TaskPatch { status: Some(status.clone()), ..TaskPatch::of(task_id) };
        let lines = told(&mut world, vec![Action::PatchTask(patch)]);
        actions.extend(lines.iter().map(|line| {
            let (head, attributes) = line.split_once(" (").unwrap();
            let own = ["error=", "exitCode=", "state="];
            let own = attributes
                .trim_end_matches(')')
                .split(", ")
                .filter(|pair| own.iter().any(|key| pair.starts_with(key)));
            [head.trim_start_matches("Task ")].into_iter().chain(own).collect::<Vec<_>>().join(" ")
        }));
    }
    actions
}

fn status(state: TaskState) -> TaskStatus {
    TaskStatus { state, ..TaskStatus::default() }
}

fn ended(state: TaskState, exit_code: i32, oom_killed: bool) -> TaskStatus {
    let container = ContainerStatus { exit_code, oom_killed, ..ContainerStatus::default() };
    TaskStatus { container_status: Some(container), ..status(state) }
}

#[test]
fn a_tasks_life_is_told_in_the_words_of_containers() {
    let checked = || {
        Some(ContainerSpec {
            healthcheck: Some(HealthConfig::default()),
            ..ContainerSpec::default()
        })
    };
    let sick = || TaskStatus { unhealthy: true, ..status(TaskState::Running) };
    let failed = TaskStatus { err: "no such image".into(), ..status(TaskState::Rejected) };
    for (name, spec, reports, expect) in [
        (
            "each step",
            None,
            vec![
                status(TaskState::Preparing),
                status(TaskState::Starting),
                status(TaskState::Running),
                ended(TaskState::Failed, 1, false),
            ],
            vec!["start", "die exitCode=1 state=failed"],
        ),
        (
            "reports that tell several steps at once",
            None,
            vec![ended(TaskState::Complete, 0, false)],
            vec!["start", "die exitCode=0 state=complete"],
        ),
        (
            "killed for want of memory",
            None,
            vec![status(TaskState::Running), ended(TaskState::Failed, 137, true)],
            vec!["start", "oom", "die exitCode=137 state=failed"],
        ),
        (
            "health",
            checked(),
            vec![
                status(TaskState::Starting),
                status(TaskState::Running),
                sick(),
                status(TaskState::Running),
            ],
            vec![
                "start",
                "health_status: healthy",
                "health_status: unhealthy",
                "health_status: healthy",
            ],
        ),
        ("never started", None, vec![failed], vec!["reject error=no such image state=rejected"]),
        (
            "stopped before its start",
            None,
            vec![status(TaskState::Shutdown)],
            vec!["die state=shutdown"],
        ),
    ] {
        assert_eq!(life("1@1:assigned", spec, &reports), expect, "{name}");
    }
}

#[test]
fn tasks_are_named_with_what_they_belong_to() {
    let mut world = World::new("1", service(1), "");
    let other = World::new("1", service(1), "1@1:running");
    let task = other.state.tasks().values().next().unwrap();
    let made = vec![Action::Put {
        object: Object::Task(Box::new((**task).clone())),
        expect: Expect::Absent,
    }];
    let lines = told(&mut world, made);
    let actions: Vec<&str> = lines.iter().map(|line| line.split(' ').nth(1).unwrap()).collect();
    assert_eq!(actions, ["create", "assign", "start"]);
    for part in ["name=web.1", "service=web", "node="] {
        assert!(lines[0].contains(part), "{}", lines[0]);
    }
    let gone = vec![Action::Delete { kind: Kind::Task, id: task.id.0 }];
    assert!(told(&mut world, gone)[0].starts_with("Task remove (name=web.1"));
}

fn event(version: u64, name: &str) -> Event {
    Event {
        version,
        at: NOW.after(std::time::Duration::from_secs(version)),
        kind: Kind::Service,
        action: "update",
        id: WEB.0,
        attributes: vec![("name", name.to_owned())],
    }
}

#[test]
fn a_ring_goes_on_behind_any_version_and_says_what_it_lost() {
    let mut ring = Ring::default();
    for version in 1..=3 {
        ring.push(version, vec![event(version, "a"), event(version, "b")]);
    }
    ring.push(9, Vec::new());
    let page = ring.behind(1);
    let versions: Vec<u64> = page.events.iter().map(|event| event.version).collect();
    assert_eq!(
        (versions, page.is_gap, page.version, page.is_last),
        (vec![2, 2, 3, 3], false, 9, true)
    );
    assert_eq!(ring.behind(9), Page { version: 9, is_last: true, ..Page::default() });
    let at = |version| NOW.after(std::time::Duration::from_secs(version));
    assert_eq!(
        [ring.since(at(0)), ring.since(at(2)), ring.since(at(7))],
        [(0, true), (1, true), (9, true)]
    );

    // A version that is larger than a page comes whole.
    let many: Vec<Event> = (0..1000).map(|number| event(10, &number.to_string())).collect();
    ring.push(10, many);
    ring.push(11, vec![event(11, "c")]);
    let page = ring.behind(3);
    assert_eq!((page.events.len(), page.version, page.is_last), (1000, 10, false));
    assert_eq!(ring.behind(10).events.len(), 1);

    // What does not fit goes by whole versions.
    let large = "x".repeat(1 << 20);
    for version in 12..=24 {
        ring.push(version, vec![event(version, &large), event(version, "small")]);
    }
    let page = ring.behind(3);
    assert!(page.is_gap && page.events.len().is_multiple_of(2), "{}", page.events.len());
    let first = page.events[0].version;
    assert!(first > 12 && !ring.behind(first - 1).is_gap && ring.behind(first - 2).is_gap);
    assert_eq!(ring.since(at(1)), (first - 1, false));

    ring.restart(100);
    assert_eq!(
        ring.behind(24),
        Page { is_gap: true, version: 100, is_last: true, ..Page::default() }
    );
    assert!(!ring.behind(100).is_gap);
    assert_eq!(ring.since(at(1)), (100, false));
}

#[test]
fn filters_select_by_what_an_event_is_about() {
    let mut health = event(1, "web.1");
    (health.kind, health.action, health.id) = (Kind::Task, "health_status: healthy", 7);
    health.attributes.extend([
        ("node", "n1".to_owned()),
        ("node.id", NodeId(1).to_string()),
        ("service", "web".to_owned()),
        ("service.id", WEB.to_string()),
        ("stack", "shop".to_owned()),
    ]);
    let service = event(2, "web");
    let id = WEB.to_string();
    for (filters, expect) in [
        ("", [true, true]),
        ("type=task", [true, false]),
        ("type=task type=service", [true, true]),
        ("event=health_status", [true, false]),
        ("event=health", [false, false]),
        ("event=update", [false, true]),
        ("service=web", [true, true]),
        (&format!("service={}", &id[..8]), [true, true]),
        ("service=web type=task", [true, false]),
        ("service=we", [false, false]),
        ("node=n1", [true, false]),
        ("task=web.1", [true, false]),
        ("stack=shop", [true, false]),
        ("network=web", [false, false]),
        ("scope=swarm", [true, true]),
        ("scope=local", [false, false]),
    ] {
        let pairs = filters.split_whitespace().map(|pair| {
            let (key, value) = pair.split_once('=').unwrap();
            (key.to_owned(), value.to_owned())
        });
        let filter = Filter::new(pairs).unwrap();
        let found = [filter.wants(&health, "task"), filter.wants(&service, "service")];
        assert_eq!(found, expect, "{filters}");
    }
    let unknown = Filter::new([("colour".to_owned(), "red".to_owned())]).unwrap_err();
    assert!(unknown.starts_with("invalid filter 'colour': use one of config, event"), "{unknown}");
}
