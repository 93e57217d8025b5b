//! Tables of placements and of the reasons for none.

use skep_common::object::Image;
use skep_common::spec::{
    ContainerSpec, EndpointSpec, OrchestrationConfig, Placement, PlacementPreference,
    PlacementStrategy, Platform, PortConfig, PublishMode, ResourceRequirements, Resources,
    SpreadOver,
};
use skep_common::{ImageId, NodeId, Object, Service, TaskId, TaskState};

use super::Index;
use crate::testing::{NOW, World, service};

/// `needs` has words: `cpu=CORES`, `mem=MIB`, `KEY==VALUE`, `max=N`, `arch=NAME`, `host=PORT`,
/// `spread=KEY`, `strategy=NAME`, `needs-KIND=N`.
fn service_with(replicas: u64, needs: &str) -> Service {
    let mut service = service(replicas);
    let mut placement = Placement::default();
    let mut reservations = Resources::default();
    for need in needs.split_whitespace() {
        match need.split_once('=').unwrap() {
            ("cpu", cores) => {
                reservations.nano_cpus = Some(cores.parse::<i64>().unwrap() * 1_000_000_000);
            }
            ("mem", mib) => reservations.memory_bytes = Some(mib.parse::<i64>().unwrap() << 20),
            ("max", n) => placement.max_replicas = Some(n.parse().unwrap()),
            ("arch", name) => {
                let platform = Platform { os: "linux".into(), architecture: name.into() };
                placement.platforms = Some(vec![platform]);
            }
            ("spread", key) => {
                let spread = Some(SpreadOver { spread_descriptor: key.to_owned() });
                let preferences = placement.preferences.get_or_insert_default();
                preferences.push(PlacementPreference { spread });
            }
            (key, n) if key.starts_with("needs-") => {
                let text = format!("{}={n}", &key["needs-".len()..]);
                let list = reservations.generic_resources.get_or_insert_default();
                list.push(skep_common::spec::generic::parse_wanted(&text).unwrap());
            }
            ("strategy", name) => placement.strategy = PlacementStrategy::of(name),
            ("host", port) => service.endpoint.ports.push(PortConfig {
                target_port: 80,
                published_port: Some(port.parse().unwrap()),
                publish_mode: Some(PublishMode::Host),
                ..PortConfig::default()
            }),
            _ => placement.constraints.get_or_insert_default().push(need.to_owned()),
        }
    }
    service.spec.task_template.placement = Some(placement);
    service.spec.task_template.resources = Some(ResourceRequirements {
        reservations: Some(reservations),
        ..ResourceRequirements::default()
    });
    service
}

#[test]
fn tasks_go_to_the_node_that_ranks_first() {
    for (name, nodes, needs, replicas, tasks, expect) in [
        ("evenly, then by node id", "1 2 3", "", 4, "", "+1@1 +2@2 +3@3 +4@1"),
        (
            "only to ready and active nodes",
            "1:down 2:drain 3:pause 4 5:unknown",
            "",
            2,
            "",
            "+1@4 +2@4",
        ),
        ("fewer tasks of the service first", "1 2", "", 3, "1@1:running 2@1:running", "+3@2"),
        ("a full node is left", "1:cpu=2 2:cpu=8", "cpu=2", 4, "", "+1@1 +2@2 +3@2 +4@2"),
        (
            "less reserved first",
            "1:mem=1024 2:mem=4096",
            "mem=512",
            2,
            "1@1:running>shutdown",
            "+1@2>ready +2@1",
        ),
        ("constraints", "1:zone=a 2:zone=b", "node.labels.zone==b", 2, "", "+1@2 +2@2"),
        ("platform names have synonyms", "1", "arch=amd64", 1, "", "+1@1"),
        ("max replicas", "1 2", "max=1", 3, "", "+1@1 +2@2 +3@-"),
        ("a host port is taken once a node", "1 2", "host=8080", 3, "", "+1@1 +2@2 +3@-"),
        (
            "a stopping task keeps its host port",
            "1",
            "host=80",
            1,
            "1@1:running>shutdown",
            "+1@->ready",
        ),
        (
            "a stopping task keeps its memory",
            "1:mem=1000",
            "mem=600",
            1,
            "1@1:running>shutdown",
            "+1@->ready",
        ),
        ("an ended one does not", "1:mem=1000", "mem=600", 1, "1@1:shutdown", "+1@1"),
    ] {
        let mut world = World::new(nodes, service_with(replicas, needs), tasks);
        world.expect_step(name, expect);
    }
}

#[test]
fn preferences_level_branches() {
    let zone = "spread=node.labels.zone";
    for (name, nodes, needs, replicas, tasks, expect) in [
        (
            "as many in a small zone as in a large one",
            "1:zone=a 2:zone=a 3:zone=a 4:zone=b",
            zone,
            6,
            "",
            "+1@1 +2@4 +3@2 +4@4 +5@3 +6@4",
        ),
        ("a missing label is a branch", "1:zone=a 2 3", zone, 4, "", "+1@2 +2@1 +3@3 +4@1"),
        (
            "a level for each",
            "1:zone=a:rack=1 2:zone=a:rack=1 3:zone=a:rack=2 4:zone=b:rack=1",
            "spread=node.labels.zone spread=node.labels.rack",
            6,
            "",
            "+1@1 +2@4 +3@3 +4@4 +5@2 +6@4",
        ),
        (
            "tasks on nodes that take no more count for their branch",
            "1:zone=a:pause 2:zone=a 3:zone=b",
            zone,
            4,
            "1@1:running 2@1:running",
            "+3@3 +4@3",
        ),
        (
            "a full branch gives way",
            "1:zone=a:cpu=1 2:zone=b:cpu=8",
            "cpu=1 spread=node.labels.zone",
            4,
            "",
            "+1@1 +2@2 +3@2 +4@2",
        ),
        ("filters come first", "1:zone=a:drain 2:zone=b", zone, 2, "", "+1@2 +2@2"),
    ] {
        let mut world = World::new(nodes, service_with(replicas, needs), tasks);
        world.expect_step(name, expect);
    }
}

#[test]
fn an_unbalanced_tree_ends() {
    let nodes = "1:zone=a:rack=1:cpu=1 2:zone=a:rack=2:cpu=1 3:zone=b:cpu=1 4:cpu=1 5:zone=c:down";
    let needs = "cpu=1 spread=node.labels.zone spread=node.labels.rack spread=engine.labels.none";
    let mut world = World::new(nodes, service_with(6, needs), "");
    world.expect_step("four find a place", "+1@4 +2@1 +3@3 +4@2 +5@- +6@-");
}

#[test]
fn binpack_fills_before_it_opens() {
    for (name, nodes, needs, replicas, tasks, expect) in [
        (
            "by what is reserved",
            "1:cpu=2 2:cpu=2 3:cpu=2",
            "strategy=binpack cpu=1",
            5,
            "",
            "+1@1 +2@1 +3@2 +4@2 +5@3",
        ),
        (
            "the fullest that has room",
            "1:mem=1000 2:mem=1000 3:mem=1000",
            "strategy=binpack mem=400",
            4,
            "1@2:running 2@3:running 3@3:running",
            "+4@2",
        ),
        (
            "by tasks where nothing is reserved",
            "1 2",
            "strategy=binpack",
            4,
            "1@2:running",
            "+2@2 +3@2 +4@2",
        ),
        (
            "little is reserved",
            "1:mem=100000 2:mem=100000",
            "strategy=binpack mem=4",
            3,
            "",
            "+1@1 +2@1 +3@1",
        ),
        (
            "preferences are above",
            "1:zone=a 2:zone=a 3:zone=b 4:zone=b",
            "strategy=binpack cpu=1 spread=node.labels.zone",
            4,
            "",
            "+1@1 +2@3 +3@1 +4@3",
        ),
        ("a service may spread all the same", "1 2", "strategy=spread", 2, "", "+1@1 +2@2"),
    ] {
        let mut world = World::new(nodes, service_with(replicas, needs), tasks);
        world.expect_step(name, expect);
    }
}

#[test]
fn a_service_that_says_nothing_is_placed_as_the_swarm_says() {
    for (needs, expect) in [("", "+1@1 +2@1"), ("strategy=spread", "+1@1 +2@2")] {
        let mut cluster = crate::testing::cluster();
        let binpack = OrchestrationConfig {
            strategy: Some(PlacementStrategy::Binpack),
            ..OrchestrationConfig::default()
        };
        cluster.spec.orchestration = Some(binpack);
        let mut world = World::new("1 2", service_with(2, needs), "");
        world.put(vec![Object::Cluster(Box::new(cluster))]);
        world.expect_step(needs, expect);
    }
}

/// What each task that has not ended was given, by slot.
fn given(world: &World) -> Vec<String> {
    let tasks = world.state.tasks().values().filter(|task| !task.status.state.is_terminal());
    let given = |resources| skep_common::spec::generic::environment(resources).join(" ");
    let mut words: Vec<String> = tasks
        .map(|task| format!("{} {}", task.slot, given(&task.assigned_generic_resources)))
        .map(|line| line.replace("DOCKER_RESOURCE_", "").trim_end().to_owned())
        .collect();
    words.sort();
    words
}

#[test]
fn generic_resources_are_given_while_there_are_any() {
    for (name, nodes, needs, replicas, expect, given_expect) in [
        ("numbers", "1:has-SSD=3 2:has-SSD=1", "needs-SSD=2", 2, "+1@1 +2@-", vec!["1 SSD=2", "2"]),
        (
            "names, the first that are free",
            "1:has-GPU=b:has-GPU=a:has-GPU=c 2",
            "needs-GPU=1",
            4,
            "+1@1 +2@1 +3@1 +4@-",
            vec!["1 GPU=a", "2 GPU=b", "3 GPU=c", "4"],
        ),
        (
            "more kinds",
            "1:has-SSD=3:has-GPU=a 2:has-GPU=x:has-GPU=y:has-SSD=2",
            "needs-GPU=2 needs-SSD=2",
            1,
            "+1@2",
            vec!["1 GPU=x,y SSD=2"],
        ),
    ] {
        let mut world = World::new(nodes, service_with(replicas, needs), "");
        world.expect_step(name, expect);
        assert_eq!(given(&world), given_expect, "{name}");
        let anew = Index::rebuild(&world.state).describe();
        assert_eq!(world.memory.index().describe(), anew, "{name}");
    }
}

#[test]
fn a_generic_resource_is_free_once_its_task_has_ended() {
    let mut world = World::new("1:has-GPU=a", service_with(2, "needs-GPU=1"), "");
    world.expect_step("one for two", "+1@1 +2@-");
    let by_slot = |world: &World, slot| {
        let mut tasks = world.state.tasks().values();
        tasks.find(|task| task.slot == slot).unwrap().clone()
    };
    let (holder, waiting) = (by_slot(&world, 1), by_slot(&world, 2));
    assert_eq!(
        waiting.status.err,
        "no suitable node (insufficient generic resources on 1 node): n1 lacks 1 GPU"
    );
    world.report(holder.id, TaskState::Failed);
    world.step();
    let holders = world.state.tasks().values().filter(|task| {
        !task.status.state.is_terminal() && !task.assigned_generic_resources.is_empty()
    });
    let holders: Vec<TaskId> = holders.map(|task| task.id).collect();
    assert_eq!(holders.len(), 1, "one for two still");
    assert_ne!(holders[0], holder.id);
}

#[test]
fn holders_of_what_a_node_lost_leave() {
    let mut world = World::new(
        "1:has-GPU=a:has-GPU=b:has-SSD=4 2",
        service_with(2, "needs-GPU=1 needs-SSD=2"),
        "",
    );
    world.expect_step("both have one", "+1@1 +2@1");
    for id in world.state.tasks().keys().copied().collect::<Vec<_>>() {
        world.report(id, TaskState::Running);
    }
    world.expect_step("they run", "");
    assert_eq!(given(&world), ["1 GPU=a SSD=2", "2 GPU=b SSD=2"]);
    let holder = |world: &World, slot| {
        let mut tasks = world.state.tasks().values();
        tasks
            .find(|task| task.slot == slot && task.desired_state == TaskState::Running)
            .unwrap()
            .id
            .0
    };
    let first = holder(&world, 1);
    world.replace(Object::Node(Box::new(crate::testing::parse_node("1:has-GPU=b:has-SSD=4"))));
    let words = world.step();
    assert!(words.contains(&format!("!{first}")) && words.matches('!').count() == 1, "{words}");
    assert!(words.contains("+1@-"), "nobody else has one: {words}");
    world.expect_settled("the holder of b stays");
}

#[test]
fn a_task_is_replaced_for_another_host_port_and_keeps_its_own_until_it_has_ended() {
    let mut world = World::new("1", service_with(1, "host=80"), "1@1:running");
    let mut changed = service_with(1, "host=81");
    let ports = Some(changed.endpoint.ports.clone());
    changed.spec.endpoint_spec = Some(EndpointSpec { ports, ..EndpointSpec::default() });
    world.replace(Object::Service(Box::new(changed)));
    world.expect_step("another port", "!1 +1@1>ready web=updating");
    let mut other = service_with(1, "host=80");
    (other.id, other.spec.name) = (skep_common::ServiceId(9), "other".to_owned());
    world.put(vec![Object::Service(Box::new(other))]);
    world.expect_step("the port that is left is not free yet", "+1@-");
}

#[test]
fn a_node_where_a_service_keeps_failing_comes_last() {
    let failed = "1@1:failed>shutdown ".repeat(5);
    let mut world = World::new("1 2:cpu=1", service_with(3, ""), &failed);
    world.expect_step("five failures", "+1@2 +2@2 +3@2");
    let mut world =
        World::new("1 2:cpu=1", service_with(3, ""), &failed["1@1:failed>shutdown ".len()..]);
    world.expect_step("four are not enough", "+1@1 +2@2 +3@1");
    let mut world = World::new("1 2:cpu=1", service_with(3, ""), &failed);
    world.now = NOW.after(super::FAILURE_WINDOW * 2);
    world.expect_step("they are forgotten", "+1@1 +2@2 +3@1");
}

/// What the only task of a service waits for.
#[track_caller]
fn expect_reason(name: &str, nodes: &str, needs: &str, expect: &str) {
    let mut world = World::new(nodes, service_with(1, needs), "");
    world.expect_step(name, "+1@-");
    let task = world.state.tasks().values().next().unwrap().clone();
    assert_eq!(task.status.err, expect, "{name}");
    assert_eq!(task.status.state, TaskState::Pending, "{name}");
}

#[test]
fn who_waits_says_why() {
    for (name, nodes, needs, expect) in [
        ("no nodes", "", "", "no suitable node (the swarm has no nodes)"),
        (
            "per filter, and the nearest miss",
            "1:mem=512 2:mem=256 3:zone=b 4:zone=b:down 5:drain 6:zone=c",
            "mem=1024 node.labels.zone!=b node.labels.zone!=c",
            "no suitable node (2 nodes not available for new tasks; scheduling constraints not satisfied \
             on 2 nodes; insufficient resources on 2 nodes): n1 lacks 512 MiB of memory",
        ),
        (
            "CPU, too",
            "1:cpu=1",
            "cpu=2",
            "no suitable node (insufficient resources on 1 node): n1 lacks 1 CPU",
        ),
        (
            "a constraint that nobody meets",
            "1 2:disk=hdd",
            "node.labels.disk!=x node.labels.disk==ssd",
            "no suitable node (scheduling constraints not satisfied on 2 nodes): n1 does not meet \
             node.labels.disk == ssd, nor does any other node",
        ),
        (
            "the node that misses the fewest constraints",
            "1 2:disk=ssd",
            "node.labels.disk==ssd node.labels.zone==a node.labels.rack!=7",
            "no suitable node (scheduling constraints not satisfied on 2 nodes): n2 does not meet \
             node.labels.zone == a, nor does any other node",
        ),
        (
            "a constraint that another node meets",
            "1:disk=ssd:pause 2",
            "node.labels.disk==ssd node.labels.zone==a",
            "no suitable node (1 node not available for new tasks; scheduling constraints not satisfied \
             on 1 node): n2 does not meet node.labels.disk == ssd and 1 more constraint",
        ),
    ] {
        expect_reason(name, nodes, needs, expect);
    }
}

#[test]
fn the_nearest_miss_is_named() {
    for (name, nodes, needs, expect) in [
        (
            "platform",
            "1",
            "arch=arm64",
            "no suitable node (unsupported platform on 1 node): n1 is linux/x86_64, and linux/arm64 is wanted",
        ),
        (
            "memory and CPU of one node, rounded up",
            "1:cpu=1:mem=1000 2:cpu=1:mem=10",
            "cpu=3 mem=1001",
            "no suitable node (insufficient resources on 2 nodes): n1 lacks 1 MiB of memory and 2 CPUs",
        ),
        (
            "the node that is closest to be there",
            "1:down 2:drain 3:pause 4:unknown 5:disconnected",
            "",
            "no suitable node (5 nodes not available for new tasks): n3 is paused",
        ),
        (
            "generic resources",
            "1:has-GPU=a 2:has-GPU=a:has-GPU=b 3",
            "needs-GPU=4",
            "no suitable node (insufficient generic resources on 3 nodes): n2 lacks 2 GPU",
        ),
        (
            "a constraint that cannot be read",
            "1",
            "node.labels.a=b",
            "constraint expected one operator from ==, !=: \"node.labels.a=b\"",
        ),
    ] {
        expect_reason(name, nodes, needs, expect);
    }
}

#[test]
fn a_reason_is_written_only_when_it_changes() {
    let mut world = World::new("1:mem=512", service_with(1, "mem=1024"), "1@-:new");
    world.expect_step("the first reason", "1?");
    world.put(vec![Object::Node(Box::new(crate::testing::parse_node("2:mem=256")))]);
    world.expect_step("one more node is too small", "1?");
    world.put(vec![Object::Node(Box::new(crate::testing::parse_node("3")))]);
    world.expect_step("this one has room", "1@3");
    let task = world.state.task(TaskId(1)).unwrap();
    assert_eq!(task.status.err, "");
    assert_eq!(task.ingress_address().unwrap().to_string(), "10.192.12.1");
}

#[test]
fn a_task_waits_for_its_image_and_is_pinned_when_placed() {
    let mut service = service(1);
    let container = ContainerSpec { image: "whoami".into(), ..ContainerSpec::default() };
    service.spec.task_template.container_spec = Some(container);
    let mut world = World::new("1 2:down", service, "");
    world.expect_step("nobody has it", "+1@-");
    let task_id = *world.state.tasks().keys().next().unwrap();
    let reason = |world: &World| world.state.task(task_id).unwrap().status.err.clone();
    assert_eq!(reason(&world), "no image named whoami in this swarm: load it with skep image load");
    let mut image = Image {
        id: ImageId(1),
        meta: skep_common::Meta::default(),
        name: "docker.io/library/whoami:latest".into(),
        digest: "sha256:12".into(),
        size: 1,
        created: None,
        holders: [NodeId(2)].into(),
    };
    world.put(vec![Object::Image(Box::new(image.clone()))]);
    world.expect_step("its holder is down", &format!("{}?", task_id.0));
    assert!(reason(&world).starts_with("no living holder of image whoami"), "{}", reason(&world));
    image.holders.insert(NodeId(1));
    world.replace(Object::Image(Box::new(image)));
    world.expect_step("a holder is alive", &format!("{}@1", task_id.0));
    let task = world.state.task(task_id).unwrap();
    assert_eq!(task.spec.container_spec.as_ref().unwrap().image, "whoami:latest@sha256:12");
    world.report(task_id, skep_common::TaskState::Running);
    world.expect_step("the pin is no reason to replace it", "");
}

#[test]
fn a_slice_that_is_full_is_a_reason() {
    let mut world = World::new("1", service_with(1022, ""), "");
    world.step();
    let waiting: Vec<String> = world
        .state
        .tasks()
        .values()
        .filter(|task| task.node_id.is_none())
        .map(|task| task.status.err.clone())
        .collect();
    let reason =
        "no suitable node (no free ingress address on 1 node): all 1021 addresses of n1 are in use";
    assert_eq!(waiting, [reason]);
    world.expect_settled("a full slice");
    let (first, address) = world
        .state
        .tasks()
        .values()
        .find_map(|task| Some((task.id, task.ingress_address()?)))
        .unwrap();
    world.report(first, TaskState::Failed);
    world.step();
    let owner = world.state.address_owner(address).unwrap();
    assert_ne!(owner, first, "an ended task's address is granted again");
}

#[test]
fn the_index_is_a_function_of_the_state() {
    let mut world = World::new("1 2 3", service_with(6, "cpu=1 max=2"), "");
    world.step();
    for (step, state) in
        [TaskState::Running, TaskState::Failed, TaskState::Running].into_iter().enumerate()
    {
        let tasks: Vec<TaskId> = world.state.tasks().keys().copied().collect();
        for task_id in tasks.into_iter().skip(step).step_by(2) {
            world.report(task_id, state);
        }
        world.step();
        world.step();
        let anew = Index::rebuild(&world.state).describe();
        assert_eq!(world.memory.index().describe(), anew, "after step {step}");
    }
}
