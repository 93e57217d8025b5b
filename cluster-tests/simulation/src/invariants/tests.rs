//! Each invariant fails where what it says does not hold.

use std::collections::BTreeSet;
use std::sync::Arc;

use skep_common::object::TaskStatus;
use skep_common::spec::Availability;
use skep_common::{Kind, Node, NodeId, Object, Task, TaskId, TaskState};
use skep_manager_core::endpoints::{Port, Table};
use skep_manager_core::testing::{NOW, World as Tables, parse_task, service};
use skep_manager_core::{Action, Command, Outcome, Refusal, State, TaskPatch};

use super::*;
use crate::message::Assignments;

fn world() -> World {
    World::new(1, false)
}

/// The state of the tables: the service `web` with these tasks on two nodes.
fn tables(tasks: &str) -> State {
    Tables::new("1:mem=1024 2", service(2), tasks).state
}

#[track_caller]
fn breaks(mut invariant: impl Invariant, seen: &[Seen], expect: &str) {
    let world = world();
    let (last, before) = seen.split_last().expect("something is seen");
    for one in before {
        assert_eq!(invariant.check(&world, one), Ok(()), "{one:?}");
    }
    let why = invariant.check(&world, last).expect_err(invariant.name());
    assert!(why.contains(expect), "{why}");
}

fn committed(before: State, after: State, outcome: Outcome) -> Seen {
    let command = Arc::new(Command::new(NOW, Vec::new()));
    let id = 1;
    let change = skep_manager_core::Change {
        kind: Kind::Task,
        id,
        service_id: Some(skep_manager_core::testing::WEB),
        node_id: None,
    };
    Seen::Committed { proposal: 7, before, after, changes: vec![change], command, outcome }
}

fn applied() -> Outcome {
    Outcome::Applied(skep_common::Version { index: 2 })
}

#[test]
fn what_is_lost_and_who_is_two() {
    let lost = Seen::Granted { kind: Kind::Service, id: 5, index: 0 };
    breaks(i01_acknowledged::Acknowledged::default(), &[lost], "is lost");
    let mut world = world();
    let held = |world: &mut World, machine: usize, id: u128| {
        let message = skep_manager_core::assignments::AssignedTask {
            task: Arc::new(parse_task(&service(2), id, "1@1:running")),
            desired_state: TaskState::Running,
        };
        world.place_for_test(machine, &message);
    };
    held(&mut world, 0, 1);
    assert_eq!(i02_one_per_slot::check_slots(&world, |_| true), Ok(()));
    held(&mut world, 1, 2);
    let why = i02_one_per_slot::check_slots(&world, |_| true).unwrap_err();
    assert!(why.contains("run in one slot"), "{why}");
    let why = i04_held_once::check_containers(&world);
    assert_eq!(why, Ok(()), "nobody gave them addresses");
}

#[test]
fn a_placement_on_a_drained_node_and_one_of_a_placed_task() {
    let mut state = tables("1@-:pending 2@2:running");
    let patch = |id: u128, node: u128| {
        let node_id = Some(NodeId(node));
        Action::PatchTask(TaskPatch { node_id, ..TaskPatch::of(TaskId(id)) })
    };
    let planned = |state: &State, action: Action| {
        let (state, actions) = (state.clone(), Arc::new(vec![action]));
        Seen::Planned { state, actions, now: NOW }
    };
    let fine = planned(&state, patch(1, 1));
    let twice = planned(&state, patch(2, 1));
    breaks(i03_placement::Placement, &[fine, twice], "has the node");
    let mut node = Node::clone(state.node(NodeId(1)).unwrap());
    node.spec.availability = Availability::Drain;
    let object = Object::Node(Box::new(node));
    let put = Action::Put { object, expect: skep_manager_core::command::Expect::Present };
    state.apply(9, &Command::new(NOW, vec![put]));
    breaks(i03_placement::Placement, &[planned(&state, patch(1, 1))], "takes none");
}

#[test]
fn a_state_that_falls_and_a_task_that_moves() {
    let seen = |old: &str, new: &str| committed(tables(old), tables(new), applied());
    for (old, new, expect) in [
        ("1@1:running", "1@1:starting", "falls from"),
        ("1@1:running>shutdown", "1@1:running", "desired state"),
        ("1@1:running", "1@2:running", "is moved"),
    ] {
        breaks(i05_only_grows::OnlyGrows, &[seen(old, old), seen(old, new)], expect);
    }
}

#[test]
fn a_table_with_a_task_that_does_not_run() {
    let tabled = |version: u64, words: &str| {
        let (state, mut table) = (tables(words), Table::default());
        let port = Port {
            service_id: skep_manager_core::testing::WEB,
            service: "web".into(),
            target_port: 80,
            policy: skep_common::spec::IngressPolicy::default(),
            proxy_protocol: None,
            backends: [(TaskId(1), std::net::Ipv4Addr::LOCALHOST)].into_iter().collect(),
        };
        table.ports.insert((skep_common::spec::PortProtocol::default(), 80), Arc::new(port));
        let (table, silent) = (Arc::new(table), BTreeSet::new());
        Seen::Tabled { term: 1, version, table, state, silent }
    };
    for words in ["1@1:starting", "1@1:unhealthy", "1@1:running>shutdown", "1@1:failed"] {
        let seen = [tabled(1, "1@1:running"), tabled(2, words)];
        breaks(i07_balancer::Balancer::default(), &seen, "balances to");
    }
}

#[test]
fn attempts_past_the_limit_and_attempts_that_nobody_counted() {
    let mut web = service(1);
    let policy = web.spec.task_template.restart_policy.get_or_insert_default();
    policy.max_attempts = Some(1);
    let mut world = world();
    let task = Arc::new(parse_task(&web, 1, "1@1:running"));
    let desired_state = TaskState::Running;
    let message = skep_manager_core::assignments::AssignedTask { task, desired_state };
    world.place_for_test(0, &message);
    world.ledger = Tables::new("1", web, "1@1:running").state;
    let look = |world: &mut World, n_attempts: u32, seen: &Seen| {
        let held = world.machines[0].agent.held.get_mut(&TaskId(1)).unwrap();
        held.status.n_attempts = n_attempts;
        i16_attempts::Attempts.check(world, seen)
    };
    let at_rest = Seen::AtRest { is_settled: true };
    assert_eq!(look(&mut world, 0, &at_rest), Ok(()));
    assert_eq!(look(&mut world, 1, &Seen::Started), Ok(()), "one is allowed");
    let why = look(&mut world, 2, &Seen::Started).unwrap_err();
    assert!(why.contains("1 are allowed"), "{why}");
    let why = look(&mut world, 1, &at_rest).unwrap_err();
    assert!(why.contains("the state has 0"), "{why}");
}

#[test]
fn what_a_manager_does_not_know() {
    let level = skep_manager_core::command::FORMAT_LEVEL;
    let sent = |level| Seen::Sent { manager: 0, level };
    breaks(i15_levels::Levels, &[sent(level), sent(level + 1)], "is sent");
    let state = |known: u32| {
        let mut world = Tables::new("", service(0), "");
        let mut node = crate::service::manager(2);
        node.description.as_mut().unwrap().format_level = known;
        world.put(vec![Object::Node(Box::new(node))]);
        world.state
    };
    let proposed = |known| Seen::Proposed { manager: 0, level, state: state(known) };
    breaks(i15_levels::Levels, &[proposed(level), proposed(level - 1)], "has said that it knows");
}

#[test]
fn an_entry_that_no_majority_has_and_a_manager_that_is_no_member() {
    breaks(i14_members::Members, &[Seen::AtRest { is_settled: true }], "is no member");
    let mut world = world();
    let applied = |world: &mut World, index: u64| {
        let mut state = State::default();
        state.skip(index);
        world.ledger = state.clone();
        let seen = Seen::Applied { manager: 0, term: 1, proposal: None, level: 1, state };
        i14_members::Members.check(world, &seen)
    };
    assert_eq!(applied(&mut world, 2), Ok(()), "all begin with it");
    let why = applied(&mut world, 3).unwrap_err();
    assert!(why.contains("no majority"), "{why}");
}

#[test]
fn a_deposed_leader_two_leaders_two_logs_and_a_refused_plan() {
    let accepted = |term| {
        let what = Arc::new(Assignments { tasks: None, table: None });
        Seen::Accepted { machine: 1, term, what }
    };
    breaks(i09_deposed::Deposed::default(), &[accepted(3), accepted(2)], "obeys term 2");
    let led = |manager| Seen::Led { manager, term: 4 };
    breaks(i09_deposed::Deposed::default(), &[led(0), led(0), led(1)], "lead in term 4");

    let applied_by = |manager, term| Seen::Applied {
        manager,
        term,
        proposal: None,
        level: 1,
        state: State::default(),
    };
    let seen = [applied_by(0, 1), applied_by(1, 1), applied_by(2, 2)];
    breaks(i10_one_log::OneLog::default(), &seen, "was committed");
    let mut other = tables("1@1:running");
    let restored = |state: &State| Seen::Restored { manager: 0, level: 1, state: state.clone() };
    let first = restored(&other);
    let status = TaskStatus { state: TaskState::Failed, ..TaskStatus::default() };
    let patch = TaskPatch { status: Some(status), ..TaskPatch::of(TaskId(1)) };
    let index = other.version().index;
    other.apply(index, &Command::new(NOW, vec![Action::PatchTask(patch)]));
    breaks(
        i10_one_log::OneLog::default(),
        &[first.clone(), first, restored(&other)],
        "is not that",
    );

    let decided = Seen::Decided { proposal: 7, view: 2 };
    let refused = Outcome::Refused(Refusal::NotFound { kind: Kind::Node });
    let state = tables("");
    let seen = [decided, committed(state.clone(), state, refused)];
    breaks(i11_plan_is_deed::PlanIsDeed::default(), &seen, "is refused");
    breaks(i12_comes_to_rest::ComesToRest, &[Seen::AtRest { is_settled: false }], "nobody leads");
}

#[test]
fn an_update_that_stops_too_many_and_an_address_that_two_have() {
    let mut world = world();
    world.is_quiet = true;
    let state = |update: &str, words: &str| {
        let mut web = service(2);
        let status =
            skep_common::object::UpdateStatus { state: update.into(), ..Default::default() };
        web.update_status = Some(status).filter(|_| !update.is_empty());
        Tables::new("1 2", web, words).state
    };
    let whole = state("", "1@1:running 2@2:running");
    let one_less = state("updating", "1@1:running>shutdown 2@2:running");
    let none = state("updating", "1@1:running>shutdown 2@2:running>shutdown");
    let mut invariant = i08_update::Update::default();
    let first = committed(whole, one_less.clone(), applied());
    assert_eq!(invariant.check(&world, &first), Ok(()));
    let why = invariant.check(&world, &committed(one_less, none, applied())).unwrap_err();
    assert!(why.contains("0 healthy tasks, 1 are promised"), "{why}");

    let address = |id: u128| {
        let mut task = parse_task(&service(2), id, "1@1:running");
        let place = skep_common::object::NetworkAttachment::uplink([10, 0, 0, 2].into(), 24);
        task.networks_attachments = vec![place];
        task
    };
    let store = |tasks: &[Task]| {
        let mut state = tables("");
        for (index, task) in (100..).zip(tasks) {
            let object = Object::Task(Box::new(task.clone()));
            let put = Action::Put { object, expect: skep_manager_core::command::Expect::Absent };
            state.apply(index, &Command::new(NOW, vec![put]));
        }
        state
    };
    // The store refuses the second one; here it has an agent that runs it all the same.
    world.ledger = store(&[address(1)]);
    for id in [1, 2] {
        let task = Arc::new(address(id));
        let desired_state = TaskState::Running;
        let one = skep_manager_core::assignments::AssignedTask { task, desired_state };
        world.place_for_test(0, &one);
    }
    assert_eq!(i04_held_once::check_containers(&world), Ok(()), "the second is nobody's");
    let mut ended = address(1);
    ended.status.state = TaskState::Failed;
    world.ledger = store(&[ended, address(2)]);
    let why = i04_held_once::check_containers(&world).unwrap_err();
    assert!(why.contains("run with the address"), "{why}");
}
