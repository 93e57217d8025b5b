//! What a change would do, as words, and that the leader then does it.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use skep_common::object::{Image, NodeState, Standalone};
use skep_common::spec::ServiceSpec;
use skep_common::{ImageId, Service, Task, TaskState};

use super::*;
use crate::plan::{LeaderMemory, Options};
use crate::service;
use crate::testing::{NOW, World, parse_task, service as web};

const IN_TIME: &dyn Fn() -> bool = &|| false;

/// The service `web` with more in its spec.
fn spec(replicas: u64, more: &Value) -> ServiceSpec {
    let mut whole = json!({
        "Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "whoami"}},
        "Mode": {"Replicated": {"Replicas": replicas}},
    });
    merge(&mut whole, more);
    serde_json::from_value(whole).unwrap()
}

fn merge(whole: &mut Value, more: &Value) {
    match (whole, more) {
        (Value::Object(whole), Value::Object(more)) => {
            for (key, value) in more {
                merge(whole.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (whole, more) => *whole = more.clone(),
    }
}

fn merged(mut whole: Value, more: Value) -> Value {
    merge(&mut whole, &more);
    whole
}

fn mem(mib: i64) -> Value {
    json!({"TaskTemplate": {"Resources": {"Reservations": {"MemoryBytes": mib << 20}}}})
}

/// These nodes, of which the first has the image.
fn swarm(nodes: &str) -> World {
    let mut world = World::new(nodes, web(0), "");
    world.apply(vec![Action::Delete { kind: skep_common::Kind::Service, id: 7 }]);
    let image = Image {
        id: ImageId(1),
        meta: skep_common::Meta::default(),
        name: "docker.io/library/whoami:latest".into(),
        digest: format!("sha256:{:064}", 12),
        size: 1,
        created: None,
        holders: [NodeId(1)].into(),
    };
    world.put(vec![Object::Image(Box::new(image))]);
    world.memory = patient();
    world
}

fn patient() -> LeaderMemory {
    LeaderMemory::new(Options { is_patient: true, ..Options::default() })
}

fn creation(world: &World, id: u128, spec: ServiceSpec) -> Vec<Action> {
    vec![service::create(&world.state, ServiceId(id), spec).unwrap().1]
}

fn change(world: &World, id: u128, spec: ServiceSpec) -> Vec<Action> {
    let service = world.state.service(ServiceId(id)).unwrap();
    let action = service::update(&world.state, service, service.meta.version, spec).unwrap();
    action.into_iter().collect()
}

/// Lets leader and workers do all there is to do, all reports of a round before the leader looks again.
fn settle(world: &mut World) {
    settle_with(world, |_| true);
}

/// The same where only some of the tasks are reported of in each round, one report after the other.
fn settle_with(world: &mut World, mut is_told: impl FnMut(TaskId) -> bool) {
    for _ in 0..2000 {
        let plan = world.plan();
        let is_news = !plan.actions.is_empty();
        world.apply(plan.actions);
        let reports: Vec<(TaskId, TaskState)> =
            world.state.tasks().values().filter_map(|task| report(&world.state, task)).collect();
        for (task_id, state) in reports.iter().filter(|(task_id, _)| is_told(*task_id)) {
            world.report(*task_id, *state);
        }
        if is_news || !reports.is_empty() {
            continue;
        }
        match plan.deadline {
            Some((at, _)) if at.since(NOW) < std::time::Duration::from_hours(20) => {
                world.now = at.max(world.now)
            }
            _ => return,
        }
    }
    panic!("it does not come to rest");
}

fn report(state: &State, task: &Task) -> Option<(TaskId, TaskState)> {
    let node = state.node(task.node_id?)?;
    if node.status.state == NodeState::Down || task.status.state.is_terminal() {
        return None;
    }
    let next = match task.desired_state {
        desired if !desired.wants_run() => TaskState::Shutdown,
        desired if desired <= TaskState::Ready => return None,
        _ => TaskState::Running,
    };
    (task.status.state < next).then_some((task.id, next))
}

fn rng() -> StdRng {
    StdRng::seed_from_u64(77)
}

fn ask(world: &World) -> Ask<'static> {
    Ask { now: world.now, is_late: IN_TIME }
}

fn what_if(world: &World, actions: Vec<Action>) -> WhatIf {
    of_actions(&world.state, actions, &ask(world), &mut rng()).unwrap()
}

/// `+web.1@2` a new one, `web.1:2>3` another one, `-web.1@2` no more, `?web.1@2` no place.
fn words(answer: &WhatIf) -> String {
    let at = |node: Option<NodeId>| node.map_or("-".to_owned(), |id| id.0.to_string());
    let created = answer.created.iter().map(|one| format!("+{}@{}", one.name, at(one.to)));
    let moved =
        answer.moved.iter().map(|one| format!("{}:{}>{}", one.name, at(one.from), at(one.to)));
    let stopped = answer.stopped.iter().map(|one| format!("-{}@{}", one.name, at(one.from)));
    let unplaced = answer.unplaced.iter().map(|one| format!("?{}@{}", one.name, at(one.from)));
    created.chain(moved).chain(stopped).chain(unplaced).collect::<Vec<String>>().join(" ")
}

#[test]
fn a_new_service_shows_where_its_tasks_go() {
    let world = swarm("1:mem=1000 2:mem=1000");
    for (name, more, expect) in [
        ("all fit", json!({}), "+web.1@1 +web.2@2 +web.3@1"),
        ("one does not", mem(600), "+web.1@1 +web.2@2 ?web.3@-"),
        (
            "of a job, those that run at once",
            json!({"Mode": {"Replicated": null, "ReplicatedJob": {"MaxConcurrent": 2, "TotalCompletions": 5}}}),
            "+web.0@1 +web.1@2",
        ),
        (
            "one on each node",
            json!({"Mode": {"Replicated": null, "Global": {}}}),
            "+web.{1}@1 +web.{2}@2",
        ),
        (
            "nobody has the image",
            json!({"TaskTemplate": {"ContainerSpec": {"Image": "other"}}}),
            "?web.1@- ?web.2@- ?web.3@-",
        ),
    ] {
        let answer = what_if(&world, creation(&world, 1, spec(3, &more)));
        let expect =
            expect.replace("{1}", &NodeId(1).to_string()).replace("{2}", &NodeId(2).to_string());
        assert_eq!(words(&answer), expect, "{name}");
        let steps: &[&str] = match name {
            "of a job, those that run at once" => &["web: 5 tasks in all, 2 at a time"],
            _ => &[],
        };
        assert_eq!(answer.steps, steps, "{name}");
        assert!(answer.warnings.is_empty() && answer.losses.is_empty(), "{answer:?}");
    }
    let answer = what_if(&world, creation(&world, 1, spec(3, &mem(600))));
    assert_eq!(
        answer.unplaced[0].reason,
        "no suitable node (insufficient resources on 2 nodes): n1 lacks 200 MiB of memory"
    );
}

/// What an update of three tasks on two nodes would do.
fn what_if_updated(before: &Value, more: Value) -> WhatIf {
    let mut world = swarm("1:mem=1000 2:mem=1000");
    world.apply(creation(&world, 1, spec(3, before)));
    settle(&mut world);
    what_if(&world, change(&world, 1, spec(3, &merged(before.clone(), more))))
}

#[test]
fn an_update_shows_what_is_replaced_and_how() {
    let two = json!({"UpdateConfig": {"Parallelism": 2, "Delay": 90_000_000_000_u64}});
    let start_first =
        json!({"UpdateConfig": {"Order": "start-first", "FailureAction": "rollback"}});
    let stop_first = "each started after the old one has stopped (stop-first)";
    let replicas = |n: u64| json!({"Mode": {"Replicated": {"Replicas": n}}});
    let none = || vec!["web: no task is replaced".to_owned()];
    for (name, config, more, expect, steps) in [
        (
            "all of them, to where least is reserved when each is made",
            &two,
            mem(200),
            "web.1:1>2 web.2:2>1 web.3:1>2",
            vec![format!("web: 3 tasks are replaced, 2 at a time, {stop_first}, 1 min 30 s apart")],
        ),
        ("labels alone", &two, json!({"Labels": {"a": "b"}}), "", none()),
        ("fewer", &two, replicas(1), "-web.2@2 -web.3@1", none()),
        ("more, with less on each node than now", &two, replicas(4), "+web.4@2", none()),
        (
            "too large: each node takes one",
            &json!({}),
            mem(900),
            "web.1:1>2 web.2:2>1 ?web.3@1",
            vec![
                format!("web: 3 tasks are replaced, 1 at a time, {stop_first}"),
                "web: 2 tasks are replaced, then 1 would wait for a node; the update is paused when that takes 10 min".into(),
            ],
        ),
        (
            "too large, and some of them may fail",
            &json!({"UpdateConfig": {"MaxFailureRatio": 0.34, "FailureAction": "rollback"}}),
            mem(900),
            "web.1:1>2 web.2:2>1 ?web.3@1",
            vec![
                format!("web: 3 tasks are replaced, 1 at a time, {stop_first}"),
                "web: 2 tasks are replaced, then 1 would wait for a node; the update goes on with the others after 10 min".into(),
            ],
        ),
        (
            "too large for a second one beside the old ones",
            &start_first,
            mem(2000),
            "?web.1@-",
            vec![
                "web: 3 tasks are replaced, 1 at a time, each started before the old one is stopped (start-first)"
                    .into(),
                "web: 0 tasks are replaced, then 1 would wait for a node; the update is rolled back when that takes \
                 10 min"
                    .into(),
            ],
        ),
    ] {
        let answer = what_if_updated(&merged(mem(100), config.clone()), more);
        assert_eq!(words(&answer), expect, "{name}");
        assert_eq!(answer.steps, steps, "{name}");
        assert_eq!(answer.warnings, [""; 0], "{name}");
    }
}

#[test]
fn nodes_that_are_down_leave_their_tasks_to_others() {
    let mut world = swarm("1:mem=1000 2:mem=1000 3:mem=1000 4:down");
    world.apply(creation(&world, 1, spec(4, &mem(400))));
    world.apply(creation(
        &world,
        2,
        spec(0, &json!({"Name": "all", "Mode": {"Replicated": null, "Global": {}}})),
    ));
    settle(&mut world);
    let mut alone = parse_task(&web(0), 900, "0@3:running");
    alone.service_id = ServiceId(0);
    alone.service_name = "shell".to_owned();
    alone.standalone = Some(Standalone::default());
    world.put(vec![Object::Task(Box::new(alone))]);
    let answer = |nodes: &[u128], managers: &Managers| {
        let nodes = nodes.iter().map(|id| NodeId(*id)).collect();
        of_nodes_down(&world.state, &nodes, managers, &ask(&world), &mut rng()).unwrap()
    };
    let managers = |voters: &[u128], leader: u128| Managers {
        voters: voters.iter().map(|id| NodeId(*id)).collect(),
        n_unnamed: 0,
        leader: Some(NodeId(leader)),
    };
    let of = |id: u128| format!("-all.{}@{id}", NodeId(id));
    let two = answer(&[2], &managers(&[1, 2, 3], 2));
    assert_eq!(words(&two), format!("web.2:2>3 {}", of(2)));
    assert_eq!(two.losses, [""; 0]);
    assert_eq!(two.warnings, ["n2 leads: another manager would take over within seconds"]);
    assert!(two.unplaced.is_empty());
    let three = answer(&[3, 4], &managers(&[1], 1));
    assert_eq!(words(&three), format!("web.3:3>2 {}", of(3)));
    assert_eq!(
        three.losses,
        ["container shell of n3: no service made it, so that nothing replaces it"]
    );
    assert_eq!(three.warnings, ["n4 is down already"]);
    let one = answer(&[1, 3], &managers(&[1, 2, 3], 2));
    assert_eq!(one.unplaced.len(), 3, "{}", words(&one));
    assert_eq!(
        one.losses,
        [
            "the majority of managers: 1 of 3 would be left, and 2 are needed: what runs goes on, but nothing is \
             replaced or changed until one is back",
            "image docker.io/library/whoami:latest: it would have no living holder (services that use it: all, web)",
            "container shell of n3: no service made it, so that nothing replaces it",
        ]
    );
}

#[test]
fn managers_whose_nodes_are_not_known_count() {
    let world = swarm("1 2 3");
    let losses = |n_unnamed: usize| {
        let voters = [1, 2].map(NodeId).into();
        let managers = Managers { voters, n_unnamed, leader: Some(NodeId(1)) };
        let down = [NodeId(2)].into();
        of_nodes_down(&world.state, &down, &managers, &ask(&world), &mut rng()).unwrap().losses
    };
    assert_eq!(
        losses(1),
        [
            "the majority of managers: 1 of 3 would be left (without 1 whose node is not known), and 2 are needed: what \
          runs goes on, but nothing is replaced or changed until one is back"
        ]
    );
    assert!(losses(0)[0].starts_with("the majority of managers: 1 of 2 would be left, and 2"));
}

#[test]
fn slots_that_get_no_other_task_are_lost() {
    let never = |mode: Value| {
        merged(mode, json!({"TaskTemplate": {"RestartPolicy": {"Condition": "none"}}}))
    };
    let job = json!({"Mode": {"Replicated": null, "ReplicatedJob": {"MaxConcurrent": 2, "TotalCompletions": 2}}});
    let global = json!({"Mode": {"Replicated": null, "Global": {}}});
    let of_node = format!("-web.{}@2", NodeId(2));
    let lost = |slot| vec![format!("web.{slot} of n2: its restart policy makes no other task")];
    for (name, more, expect, losses) in [
        ("condition none", never(json!({})), "-web.2@2", lost(2)),
        ("a job", never(job), "-web.1@2", lost(1)),
        ("a global service", never(global), &*of_node, vec![]),
        ("another one is made", json!({}), "web.2:2>1", vec![]),
    ] {
        let mut world = swarm("1 2");
        world.apply(creation(&world, 1, spec(2, &more)));
        settle(&mut world);
        let (down, managers) = ([NodeId(2)].into(), Managers::default());
        let answer =
            of_nodes_down(&world.state, &down, &managers, &ask(&world), &mut rng()).unwrap();
        assert_eq!(words(&answer), expect, "{name}");
        assert_eq!(answer.losses, losses, "{name}");
    }
}

#[test]
fn what_time_would_bring_later_than_the_limit_is_warned_of() {
    let hours = |hours: u64| hours * 3_600_000_000_000;
    let warning = "what comes more than 20 h from now is left out: updates and delays of restarts go on after that";
    for (name, delay, mib, expect) in [
        ("two pauses of 11 h", hours(11), 200, vec![warning]),
        ("two pauses of 9 h", hours(9), 200, vec![]),
        ("one has no place", hours(11), 2000, vec![]),
    ] {
        let before = merged(json!({"UpdateConfig": {"Delay": delay}}), mem(100));
        let answer = what_if_updated(&before, mem(mib));
        assert_eq!(answer.warnings, expect, "{name}");
    }
}

#[test]
fn what_is_under_way_is_no_part_of_the_answer() {
    let mut world = swarm("1 2");
    world.apply(creation(&world, 1, spec(2, &json!({}))));
    let other = json!({"Name": "other"});
    let answer = what_if(&world, creation(&world, 2, spec(1, &other)));
    assert_eq!(words(&answer), "+other.1@1");
    let warning = "the swarm is not at rest: what is under way now is taken to be over";
    assert_eq!(answer.warnings, [warning]);
    settle(&mut world);
    assert_eq!(what_if(&world, creation(&world, 2, spec(1, &other))).warnings, [""; 0]);
}

#[test]
fn a_task_that_waited_finds_the_room_that_another_leaves() {
    let mut world = swarm("1:mem=1000");
    world.apply(creation(&world, 1, spec(1, &mem(600))));
    settle(&mut world);
    let mut other = mem(600);
    merge(&mut other, &json!({"Name": "other"}));
    world.apply(creation(&world, 2, spec(1, &other)));
    settle(&mut world);
    let answer = what_if(&world, change(&world, 1, spec(0, &mem(600))));
    assert_eq!(words(&answer), "other.1:->1 -web.1@1");
}

#[test]
fn what_is_refused_or_takes_too_long_has_no_answer() {
    let mut world = swarm("1");
    let actions = creation(&world, 1, spec(1, &json!({})));
    world.apply(actions.clone());
    let refused = of_actions(&world.state, actions.clone(), &ask(&world), &mut rng());
    assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    let late = Ask { now: NOW, is_late: &|| true };
    let error = of_actions(&world.state, Vec::new(), &late, &mut rng()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "too large to plan: the tasks had not come to rest after 1 passes with 0 changes"
    );
}

/// The nodes of each slot's tasks, `None` for those that wait.
type Places = BTreeMap<String, Vec<Option<NodeId>>>;

fn places(state: &State) -> Places {
    let mut places = Places::new();
    for task in state.tasks().values() {
        if task.desired_state.wants_run() && !task.status.state.is_terminal() {
            places.entry(task.name()).or_default().push(task.node_id);
        }
    }
    sorted(places)
}

fn sorted(mut places: Places) -> Places {
    places.values_mut().for_each(|nodes| nodes.sort());
    places.retain(|_, nodes| !nodes.is_empty());
    places
}

/// What there is once the answer has come true.
fn applied(mut places: Places, answer: &WhatIf) -> Places {
    let all = [&answer.created, &answer.moved, &answer.unplaced, &answer.stopped];
    for task in all.into_iter().flatten() {
        let nodes = places.entry(task.name.clone()).or_default();
        if task.task_id.is_some() {
            let old = nodes.iter().position(|node| *node == task.from);
            nodes.remove(old.expect("what goes was there"));
        }
    }
    for list in [&answer.created, &answer.moved, &answer.unplaced] {
        for task in list {
            places.entry(task.name.clone()).or_default().push(task.to);
        }
    }
    sorted(places)
}

/// A service with something of everything that placement looks at.
fn any_spec(name: &str, replicas: u64, kind: u8, mib: i64) -> ServiceSpec {
    let more = match kind % 6 {
        0 => json!({}),
        1 => json!({"UpdateConfig": {"Order": "start-first"}}),
        2 => json!({"UpdateConfig": {"Parallelism": 2, "Delay": 1_000_000_000}}),
        3 => json!({"TaskTemplate": {"Placement": {"MaxReplicas": 1}}}),
        4 => json!({"TaskTemplate": {"Placement": {"Constraints": ["node.labels.disk == ssd"]}}}),
        _ => json!({"TaskTemplate": {"Placement": {"Preferences": [
            {"Spread": {"SpreadDescriptor": "node.labels.disk"}}]}}}),
    };
    let mut whole = mem(mib);
    merge(&mut whole, &json!({"Name": name}));
    merge(&mut whole, &more);
    spec(replicas, &whole)
}

/// One of the questions that users ask, as the actions that they stand for.
fn any_change(world: &World, kind: u8, number: u64, mib: i64) -> Vec<Action> {
    let id = u128::from(number % 3) + 1;
    let old =
        world.state.service(ServiceId(id)).map(|service: &std::sync::Arc<Service>| &service.spec);
    match (kind % 4, old) {
        (0, Some(old)) => {
            let mut new = old.clone();
            new.mode.as_mut().unwrap().replicated.as_mut().unwrap().replicas = Some(number % 7);
            change(world, id, new)
        }
        (1, Some(old)) => {
            let mut new = any_spec(&old.name, old.replicas().unwrap(), kind, mib);
            new.update_config.clone_from(&old.update_config);
            change(world, id, new)
        }
        (2, _) => {
            let node_id = NodeId(u128::from(number % 5) + 1);
            let mut node = (**world.state.node(node_id).unwrap()).clone();
            node.status.state = NodeState::Down;
            vec![Action::Put { object: Object::Node(Box::new(node)), expect: Expect::Present }]
        }
        _ => creation(world, 9, any_spec("new", number % 5, kind / 4, mib)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// What is shown is what a leader then does that knows the swarm for long, with other random numbers
    /// and with workers that report whenever they do. Where tasks wait for room, or several of a service are
    /// replaced at a time or start before old ones have stopped, it is so as long as all workers report before
    /// the leader looks again: otherwise there may be room elsewhere at that moment.
    #[test]
    fn what_is_shown_is_what_is_done(
        services in proptest::collection::vec((0_u64..6, 0_u8..6, 4_i64..500), 3),
        (kind, number, mib) in (0_u8..24, 0_u64..35, 4_i64..600),
        seed: u64,
    ) {
        let mut world = swarm("1:mem=1000 2:mem=1000:disk=ssd 3:mem=600:disk=ssd 4:mem=400 5:mem=1500:disk=hdd");
        for (id, (replicas, kind, mib)) in (1..).zip(services) {
            let spec = any_spec(&format!("s{id}"), replicas, kind, mib);
            world.apply(creation(&world, id, spec));
            settle(&mut world);
        }
        let actions = any_change(&world, kind, number, mib);
        let answer = what_if(&world, actions.clone());
        prop_assert_eq!(&answer.warnings, &Vec::<String>::new());
        let before = places(&world.state);
        let was_waiting = before.values().flatten().any(Option::is_none);
        let expect = applied(before, &answer);
        world.apply(actions);
        let mut rng = StdRng::seed_from_u64(seed);
        let is_waiting = expect.values().flatten().any(Option::is_none) || was_waiting;
        let overlaps = |service: &std::sync::Arc<Service>| {
            let config = service.spec.update_config.clone().unwrap_or_default();
            config.order.as_deref() == Some("start-first") || config.parallelism.is_some_and(|n| n != 1)
        };
        let is_in_rounds = is_waiting || world.state.services().values().any(overlaps);
        settle_with(&mut world, |_| is_in_rounds || rng.random_bool(0.5));
        prop_assert_eq!(places(&world.state), expect, "{}", words(&answer));
    }
}
