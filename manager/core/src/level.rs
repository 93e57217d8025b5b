//! Format levels: which version of the program understands a command, and a state.
//!
//! A command and a snapshot have the lowest level that they are understood at, so that managers of an
//! earlier version go on in a swarm that does not use what is new. What users ask for is refused while a
//! manager would not understand it ([`check`]); what the leader writes by itself waits until [`of_managers`]
//! says that all do. A program that would stop at the state, or at what was ever written, does not become a
//! manager ([`check_new`]).

use skep_common::mistakes::{self, Mistake};
use skep_common::object::{Cluster, NetworkAttachment, Node, Service, Task, TaskStatus};
use skep_common::spec::{
    ModeKind, NetworkAttachmentConfig, PublishMode, ServiceSpec, TaskSpec, predefined,
};
use skep_common::{Kind, NodeId, Object, TaskState};

use crate::command::Action;
use crate::network::is_encrypted;
use crate::scheduler::node_name;
use crate::store::State;

/// The highest format level that this program knows. A manager that meets a higher one in its log stops
/// and says so.
///
/// | level | since then |
/// |---|---|
/// | 1 | the first |
/// | 2 | networks: references to them are checked |
/// | 3 | ports in host mode, which tasks and their statuses name; what nodes say of ports; policies and the PROXY protocol; tasks that no service made; nodes that a stop did not wait for; encrypted networks; the networks that every node has |
/// | 4 | modes other than replicated, preferences and strategies; generic resources; secrets and configs with versions; revisions of services; roles on their way, removed nodes, changes of the root, unlock keys; attempts without managers |
pub const FORMAT_LEVEL: u32 = 4;
const FIRST: u32 = 1;
/// From this level on, a command that contradicts a network is refused.
pub(crate) const NETWORKS: u32 = 2;
/// From this level on, objects say what a manager of before would drop, or decide without.
pub const FACTS: u32 = 3;
/// From this level on, the control plane is whole: modes, revisions, roles that differ from what is asked.
pub const CONTROL: u32 = 4;

/// The level that every manager of the swarm understands, as far as their nodes said; the first, where
/// one has not said anything yet.
pub fn of_managers(state: &State) -> u32 {
    let managers = state.nodes().values().filter(|node| is_manager(node));
    let known = managers.map(|node| {
        let description = node.description.as_ref();
        description.map_or(FIRST, |description| description.format_level.max(FIRST))
    });
    known.min().unwrap_or(FIRST)
}

/// Why what a user asks for is not written: a manager that met it in its log would stop.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unmet {
    /// Remedy: upgrade it.
    #[error(
        "this needs format level {level}, and manager {manager} ({version}) knows {known}: upgrade it first, or remove it with `skep node rm --force {manager}` if it is gone"
    )]
    TooOld {
        /// The level of what is asked.
        level: u32,
        /// Its name.
        manager: String,
        /// The version of the program that it runs.
        version: String,
        /// The level that it knows.
        known: u32,
    },
    /// It has just joined, or never came that far. Remedy: ask again in a moment.
    #[error(
        "this needs format level {level}, and manager {manager} has not said yet what it knows: ask again in a moment, or remove it with `skep node rm --force {manager}` if it is gone"
    )]
    NotSaid {
        /// The level of what is asked.
        level: u32,
        /// Its name.
        manager: String,
    },
}

/// Whether every manager understands a level. The one that asks, `own`, is this program.
pub fn check(state: &State, level: u32, own: NodeId) -> Result<(), Unmet> {
    if level <= FIRST || mistakes::is(Mistake::LevelIgnored) {
        return Ok(());
    }
    let others = state.nodes().values().filter(|node| node.id != own && is_manager(node));
    let unmet = others.filter_map(|node| {
        let manager = node_name(node);
        let Some(said) = &node.description else { return Some(Unmet::NotSaid { level, manager }) };
        let known = said.format_level.max(FIRST);
        let version = said.engine.engine_version.clone();
        (known < level).then_some(Unmet::TooOld { level, manager, version, known })
    });
    // One that is too old stays so; one that has not said anything may say that it is not.
    unmet.min_by_key(|unmet| matches!(unmet, Unmet::NotSaid { .. })).map_or(Ok(()), Err)
}

/// Others get no log. Who becomes one is asked before it does ([`check_new`]).
fn is_manager(node: &Node) -> bool {
    node.manager_status.is_some()
}

/// A program that cannot become a manager. Remedy: upgrade it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the swarm uses format level {level}, and this node's program knows {known}: upgrade it, then let it join the managers"
)]
pub struct TooOldToManage {
    /// What the swarm's state and log use.
    pub level: u32,
    /// What the node knows.
    pub known: u32,
}

/// Whether a node may become a manager that says so of itself: 0 where its program is of before managers said it, and
/// then its session may have.
pub fn check_new(state: &State, node: &Node, said: u32) -> Result<(), TooOldToManage> {
    let described = node.description.as_ref().map_or(0, |description| description.format_level);
    let known = if said == 0 { described.max(FIRST) } else { said };
    let level = state.level_of_log();
    if known < level { Err(TooOldToManage { level, known }) } else { Ok(()) }
}

/// The level that a transaction is understood at.
pub(crate) fn of_actions(actions: &[Action]) -> u32 {
    actions.iter().map(of_action).max().unwrap_or(FIRST)
}

fn of_action(action: &Action) -> u32 {
    match action {
        Action::Put { object, .. } => of_object(object),
        Action::Delete { kind: Kind::Network, .. } => NETWORKS,
        Action::Delete { kind: Kind::Secret | Kind::Config, .. } => CONTROL,
        Action::PatchTask(patch) => {
            let places = patch.networks_attachments.iter().flatten();
            if patch.generic_resources.is_some() || patch.desired_state == Some(TaskState::Complete)
            {
                return CONTROL;
            }
            of_status(patch.status.as_ref()).max(of_places(places))
        }
        Action::Delete { .. } | Action::ImageHolder { .. } => FIRST,
    }
}

/// The level that an object is understood at.
pub(crate) fn of_object(object: &Object) -> u32 {
    match object {
        Object::Network(network) if is_encrypted(&network.spec) => FACTS, // In clear text, otherwise.
        Object::Network(_) => NETWORKS,
        Object::Service(service) => of_service(service),
        Object::Task(task) => of_task(task),
        Object::Node(node) => of_node(node),
        Object::Cluster(cluster) => of_cluster(cluster),
        Object::Secret(secret) if !secret.versions.is_empty() => CONTROL,
        Object::Config(config) if !config.versions.is_empty() => CONTROL,
        Object::Revision(_) => CONTROL,
        Object::Secret(_) | Object::Config(_) | Object::Stack(_) | Object::Image(_) => FIRST,
    }
}

/// Managers of before would drop a role that is on its way, and lead with another one, or what nodes say of their
/// certificates.
fn of_node(node: &Node) -> u32 {
    let says_tls = node.description.as_ref().is_some_and(|said| said.tls_info.is_some());
    if node.role.is_some() || says_tls {
        return CONTROL;
    }
    if node.status.port_conditions.is_empty() { FIRST } else { FACTS }
}

/// Managers of before would admit whom these refuse, or drop the key that files are sealed with.
fn of_cluster(cluster: &Cluster) -> u32 {
    let strategy = cluster.spec.orchestration.as_ref().and_then(|config| config.strategy);
    let is_new = cluster.root_rotation.is_some()
        || cluster.unlock_key.is_some()
        || cluster.unlock_key_version > 0
        || !cluster.blacklisted.is_empty()
        || cluster.longest_node_cert_expiry.is_some()
        || strategy.is_some();
    if is_new { CONTROL } else { FIRST }
}

fn of_service(service: &Service) -> u32 {
    let specs = [Some(&service.spec), service.previous_spec.as_ref()];
    let is_of_control = service.job_status.is_some() || service.revision > 0;
    if is_of_control || specs.into_iter().flatten().any(is_decided_anew) {
        return CONTROL;
    }
    let mut ports = service.endpoint.ports.iter();
    if specs.into_iter().flatten().any(is_new) || ports.any(|port| port.proxy_protocol.is_some()) {
        return FACTS;
    }
    let is_on_some =
        !service.spec.networks().is_empty() || !service.endpoint.virtual_ips.is_empty();
    if is_on_some { NETWORKS } else { FIRST }
}

/// What managers of before kept without deciding by it.
fn is_decided_anew(spec: &ServiceSpec) -> bool {
    let is_replicated = matches!(spec.mode_kind(), Some(ModeKind::Replicated(_)) | None);
    let mut updates = [&spec.update_config, &spec.rollback_config].into_iter().flatten();
    !is_replicated
        || updates.any(|config| config.progress_deadline.is_some())
        || is_placed_anew(&spec.task_template)
}

fn is_placed_anew(spec: &TaskSpec) -> bool {
    fn has<T>(list: Option<&Vec<T>>) -> bool {
        list.is_some_and(|list| !list.is_empty())
    }
    let placement = spec.placement.as_ref();
    let reserved = spec.resources.as_ref().and_then(|all| all.reservations.as_ref());
    let container = spec.container_spec.as_ref();
    placement.is_some_and(|placement| {
        placement.strategy.is_some() || has(placement.preferences.as_ref())
    }) || reserved.is_some_and(|all| has(all.generic_resources.as_ref()))
        || container.is_some_and(|container| {
            has(container.secrets.as_ref()) || has(container.configs.as_ref())
        })
}

fn is_new(spec: &ServiceSpec) -> bool {
    let endpoint = spec.endpoint_spec.as_ref();
    endpoint.is_some_and(|endpoint| endpoint.ingress_policy.is_some())
        || spec.ports().iter().any(|port| {
            port.publish_mode == Some(PublishMode::Host) || port.proxy_protocol.is_some()
        })
        || is_on_predefined(spec.networks())
}

fn is_on_predefined(configs: &[NetworkAttachmentConfig]) -> bool {
    predefined(configs).next().is_some()
}

/// Managers of before would drop a single container's mark, and stop it for want of a service.
fn of_task(task: &Task) -> u32 {
    let is_of_control = task.job_iteration.is_some()
        || task.preset_node.is_some()
        || !task.assigned_generic_resources.is_empty()
        || task.service_labels.is_some()
        || task.desired_state == TaskState::Complete;
    if is_of_control || is_placed_anew(&task.spec) {
        return CONTROL;
    }
    let networks = task.spec.networks.as_deref().unwrap_or_default();
    match task.standalone.is_some() || !task.host_ports.is_empty() || is_on_predefined(networks) {
        true => FACTS,
        false => of_status(Some(&task.status)).max(of_places(task.networks_attachments.iter())),
    }
}

fn of_status(status: Option<&TaskStatus>) -> u32 {
    let Some(status) = status else { return FIRST };
    if status.n_attempts > 0 || !status.attempts.is_empty() {
        return CONTROL;
    }
    let is_new = status.port_status.is_some() || !status.unacknowledged.is_empty();
    if is_new { FACTS } else { FIRST }
}

fn of_places<'a>(mut places: impl Iterator<Item = &'a NetworkAttachment>) -> u32 {
    if places.any(|place| place.network_id.is_some()) { NETWORKS } else { FIRST }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use skep_common::object::{ManagerStatus, PortCondition};
    use skep_common::spec::{NodeRole, PortProtocol};
    use skep_common::{Network, ServiceId};

    use super::*;
    use crate::command::{Command, Expect, TaskPatch};
    use crate::testing::{NOW, WEB, World, node, service};

    fn of_spec(spec: Value) -> Object {
        let spec = serde_json::from_value(spec).unwrap();
        Object::Service(Box::new(Service { spec, ..service(1) }))
    }

    fn network(options: Value) -> Object {
        let document =
            json!({"ID": skep_common::NetworkId(1), "Spec": {"Name": "x", "Options": options}});
        Object::Network(Box::new(serde_json::from_value::<Network>(document).unwrap()))
    }

    #[test]
    fn managers_of_before_stop_at_what_they_would_decide_or_keep_differently() {
        let mut told = node(1);
        told.status.port_conditions = vec![PortCondition {
            service_id: ServiceId(1),
            protocol: PortProtocol::Tcp,
            published_port: 80,
            message: "is held".into(),
        }];
        let port = |mode: &str| json!({"EndpointSpec": {"Ports": [{"TargetPort": 80, "PublishMode": mode}]}});
        let on = |name: &str| json!({"TaskTemplate": {"Networks": [{"Target": name}]}});
        let task = |part: Value| of_spec(json!({"TaskTemplate": part}));
        let mut promoted = node(1);
        promoted.role = Some(NodeRole::Worker);
        let mut refusing = crate::testing::cluster();
        refusing.blacklisted.insert(skep_common::NodeId(9), NOW);
        let mut revised = service(1);
        revised.revision = 2;
        let mut back = service(1);
        back.previous_spec = Some(serde_json::from_value(port("host")).unwrap());
        for (name, object, expect) in [
            ("a node", Object::Node(Box::new(node(1))), FIRST),
            ("a port that a node cannot serve", Object::Node(Box::new(told)), FACTS),
            ("a network", network(json!({})), NETWORKS),
            ("an encrypted network", network(json!({"encrypted": ""})), FACTS),
            ("a service", Object::Service(Box::new(service(1))), FIRST),
            ("a published port", of_spec(port("ingress")), FIRST),
            ("a port in host mode", of_spec(port("host")), FACTS),
            ("one that a rollback leads to", Object::Service(Box::new(back)), FACTS),
            ("a service on a network", of_spec(on("front")), NETWORKS),
            ("a service on the node's network", of_spec(on("host")), FACTS),
            ("a service on none", of_spec(on("none")), FACTS),
            ("a swarm", Object::Cluster(Box::new(crate::testing::cluster())), FIRST),
            ("a swarm that refuses a node", Object::Cluster(Box::new(refusing)), CONTROL),
            ("a role on its way", Object::Node(Box::new(promoted)), CONTROL),
            ("a service that was another", Object::Service(Box::new(revised)), CONTROL),
            ("a global service", of_spec(json!({"Mode": {"Global": {}}})), CONTROL),
            ("a job", of_spec(json!({"Mode": {"ReplicatedJob": {}}})), CONTROL),
            ("a job on every node", of_spec(json!({"Mode": {"GlobalJob": {}}})), CONTROL),
            ("a deadline", of_spec(json!({"UpdateConfig": {"ProgressDeadline": 1}})), CONTROL),
            (
                "a preference",
                task(
                    json!({"Placement": {"Preferences": [{"Spread": {"SpreadDescriptor": "x"}}]}}),
                ),
                CONTROL,
            ),
            ("no preference", task(json!({"Placement": {"Preferences": []}})), FIRST),
            ("a strategy", task(json!({"Placement": {"Strategy": "binpack"}})), CONTROL),
            (
                "a generic resource",
                task(json!({"Resources": {"Reservations": {"GenericResources": [
                    {"DiscreteResourceSpec": {"Kind": "SSD", "Value": 1}},
                ]}}})),
                CONTROL,
            ),
            (
                "a secret",
                task(json!({"ContainerSpec": {"Secrets": [{"SecretName": "s"}]}})),
                CONTROL,
            ),
            (
                "a config",
                task(json!({"ContainerSpec": {"Configs": [{"ConfigName": "c"}]}})),
                CONTROL,
            ),
        ] {
            assert_eq!(of_object(&object), expect, "{name}");
            let put = Action::Put { object, expect: Expect::Present };
            assert_eq!(Command::new(NOW, vec![put]).level, expect, "{name}");
        }
    }

    #[test]
    fn nodes_that_a_stop_did_not_wait_for_are_no_news_for_managers_of_before() {
        let mut world = World::new("1", service(1), "1@1:running");
        let task = (**world.state.tasks_of_service(WEB).next().unwrap()).clone();
        assert_eq!(of_object(&Object::Task(Box::new(task.clone()))), FIRST);
        let mut status = task.status.clone();
        status.unacknowledged = vec!["n2".into()];
        let patch = TaskPatch { status: Some(status), ..TaskPatch::of(task.id) };
        let command = Command::new(NOW, vec![Action::PatchTask(patch)]);
        assert_eq!(command.level, FACTS);
        // What is in the store decides about the snapshot.
        let level = |state: &State| {
            let bytes = state.encode();
            let header = bytes.split(|byte| *byte == b'\n').next().unwrap();
            serde_json::from_slice::<Value>(header).unwrap()["level"].clone()
        };
        assert_eq!(level(&world.state), FIRST);
        world.apply(command.actions);
        assert_eq!(level(&world.state), FACTS);
    }

    #[test]
    fn a_swarm_is_as_far_as_its_last_manager() {
        let manager = |number: u16, format_level: u32| {
            let mut node = node(number);
            let manager = ManagerStatus { raft_id: number.into(), ..ManagerStatus::default() };
            node.manager_status = Some(manager);
            node.description.as_mut().unwrap().format_level = format_level;
            node
        };
        let level = |nodes: Vec<skep_common::Node>| {
            let mut world = World::new("", service(0), "");
            world.put(nodes.into_iter().map(|node| Object::Node(Box::new(node))).collect());
            of_managers(&world.state)
        };
        let mut unknown = manager(2, 3);
        unknown.description = None;
        let mut promoted = node(2);
        promoted.spec.role = NodeRole::Manager;
        promoted.description = None;
        let worker = node(3);
        assert_eq!(
            level(vec![manager(1, 3), manager(2, 3), worker.clone()]),
            3,
            "workers do not count"
        );
        let unmet = |asked: u32, nodes: Vec<skep_common::Node>| {
            let mut world = World::new("", service(0), "");
            world.put(nodes.into_iter().map(|node| Object::Node(Box::new(node))).collect());
            check(&world.state, asked, node(1).id).map_err(|unmet| unmet.to_string())
        };
        let mut old = manager(2, 3);
        old.description.as_mut().unwrap().engine.engine_version = "0.1.0".into();
        let mut other = manager(5, 0);
        other.description = None;
        let told = unmet(4, vec![manager(1, 4), old.clone(), other, worker.clone()]);
        let words = "this needs format level 4, and manager n2 (0.1.0) knows 3: upgrade it first, or remove it with `skep node rm --force n2` if it is gone";
        assert_eq!(told, Err(words.to_owned()));
        assert_eq!(unmet(3, vec![manager(1, 4), old.clone(), worker.clone()]), Ok(()));
        assert_eq!(unmet(1, vec![unknown.clone()]), Ok(()), "all understand the first");
        let told = unmet(4, vec![manager(1, 0), unknown.clone()]).unwrap_err();
        assert!(told.contains("has not said yet what it knows"), "{told}");
        assert_eq!(unmet(4, vec![manager(1, 0), manager(2, 4)]), Ok(()), "who asks knows itself");
        assert_eq!(level(vec![manager(1, 3), manager(2, 0)]), 1, "one that does not say so");
        assert_eq!(level(vec![manager(1, 3), unknown]), 1, "one that has said nothing yet");
        let joining = vec![manager(1, 3), promoted];
        assert_eq!(level(joining.clone()), 3, "one that did not come so far has no log");
        assert_eq!(unmet(3, joining), Ok(()));
        assert_eq!(level(vec![manager(1, 4), manager(2, 3)]), 3, "a newer one");
    }

    #[test]
    fn a_program_that_would_stop_at_the_state_becomes_no_manager() {
        let mut world = World::new("", service(0), "");
        let mut refusing = crate::testing::cluster();
        refusing.blacklisted.insert(skep_common::NodeId(9), NOW);
        for (name, is_used, described, said, expect) in [
            ("nothing new is used", false, None, 0, None),
            ("its session has not said", true, None, 0, Some(FIRST)),
            ("it is old", true, Some(FACTS), 0, Some(FACTS)),
            ("it says so itself", true, None, CONTROL, None),
            ("it was upgraded", true, Some(FACTS), CONTROL, None),
            ("its session has said", true, Some(CONTROL), 0, None),
            ("it was downgraded", true, Some(CONTROL), FACTS, Some(FACTS)),
        ] {
            if is_used {
                world = World::new("", service(0), "");
                world.put(vec![Object::Cluster(Box::new(refusing.clone()))]);
            }
            let mut joining = node(2);
            joining.description = described.map(|format_level| {
                let description = skep_common::object::NodeDescription::default();
                skep_common::object::NodeDescription { format_level, ..description }
            });
            let expect =
                expect.map_or(Ok(()), |known| Err(TooOldToManage { level: CONTROL, known }));
            assert_eq!(check_new(&world.state, &joining, said), expect, "{name}");
        }
        let forgiving = Object::Cluster(Box::new(crate::testing::cluster()));
        world.replace(forgiving);
        let old = |state: &State| check_new(state, &node(2), FACTS);
        let too_old = Err(TooOldToManage { level: CONTROL, known: FACTS });
        assert_eq!(world.state.level(), FIRST, "what was new is gone");
        assert_eq!(old(&world.state), too_old, "it is still in the log");
        let restored = State::decode(&world.state.encode()).unwrap();
        assert_eq!(old(&restored), too_old, "also after a restart");
        assert_eq!(restored.digest(), world.state.digest());
        let refused = Action::Delete { kind: Kind::Secret, id: 1 };
        let mut state = World::new("", service(0), "").state;
        assert_eq!(old(&state), Ok(()));
        state.apply(9, &Command::new(NOW, vec![refused]));
        assert_eq!(old(&state), too_old, "one that came to nothing is in the log too");
    }
}
