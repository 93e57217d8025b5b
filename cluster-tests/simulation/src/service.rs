//! The services, networks and nodes that simulated swarms have.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;
use skep_common::object::{DataVersion, Image, NodeDescription, Secret};
use skep_common::spec::{
    Availability, Base64, ContainerSpec, EndpointSpec, FileTarget, ModeKind, Nanos,
    NetworkAttachmentConfig, NetworkSpec, NodeSpec, Placement, PortConfig, PublishMode,
    ReplicatedJob, ResourceRequirements, Resources, RestartPolicy, SecretReference, SecretSpec,
    ServiceMode, ServiceSpec, TaskSpec, UpdateConfig,
};
use skep_common::{ImageId, Meta, Node, NodeId, Object, SecretId};
use skep_manager_core::testing;

/// Names of services: few, so that wishes meet.
pub(crate) const N_SERVICES: u16 = 8;
/// Names of networks.
pub(crate) const N_NETWORKS: u16 = 2;

/// Names of secrets.
pub(crate) const N_SECRETS: u16 = 2;

/// The name of a service.
pub(crate) fn name(number: u16) -> String {
    format!("s{number}")
}

/// The name of a network.
pub(crate) fn network_name(number: u16) -> String {
    format!("net{number}")
}

/// A network.
pub(crate) fn network(number: u16) -> NetworkSpec {
    NetworkSpec { name: network_name(number), attachable: Some(true), ..NetworkSpec::default() }
}

/// A node of a swarm: some have a fast disk, one has little memory.
pub(crate) fn node(number: u16) -> Node {
    let mut node = testing::node(number);
    let labels = node.spec.labels.get_or_insert_default();
    labels.insert("disk".into(), if number.is_multiple_of(3) { "hdd" } else { "ssd" }.into());
    if let Some(description) = &mut node.description {
        description.resources.memory_bytes =
            Some(if number.is_multiple_of(4) { 512 << 20 } else { 1 << 30 });
        description.format_level = skep_manager_core::command::FORMAT_LEVEL;
    }
    node
}

/// What a machine says of itself.
pub(crate) fn description(machine: usize, level: u32) -> NodeDescription {
    let number = u16::try_from(machine + 1).unwrap_or(u16::MAX);
    let description = node(number).description.unwrap_or_default();
    NodeDescription { format_level: level, ..description }
}

/// The object of a manager's node.
pub(crate) fn manager(number: u16) -> Node {
    let mut node = node(number);
    node.spec.role = skep_common::spec::NodeRole::Manager;
    node.manager_status = Some(skep_common::object::ManagerStatus {
        raft_id: number.into(),
        addr: node.address(),
        ..skep_common::object::ManagerStatus::default()
    });
    node
}

/// All that a swarm begins with whose programs know `level`.
pub(crate) fn founding(n_managers: u16, n_nodes: u16, level: u32) -> Vec<Object> {
    let mut objects = vec![Object::Cluster(Box::new(testing::cluster()))];
    let nodes = (1..=n_nodes).map(|n| if n <= n_managers { manager(n) } else { node(n) });
    let described = nodes.map(|mut node| {
        if let Some(description) = &mut node.description {
            description.format_level = level;
        }
        Object::Node(Box::new(node))
    });
    objects.extend(described);
    let holders: BTreeSet<NodeId> = (1..=n_managers).map(|number| NodeId(number.into())).collect();
    let images = (1..=N_IMAGES).map(|number| image_record(number, holders.clone()));
    objects.extend(images.map(|image| Object::Image(Box::new(image))));
    if level >= skep_manager_core::level::CONTROL {
        objects.extend((1..=N_SECRETS).map(|number| Object::Secret(Box::new(secret(number)))));
    }
    objects
}

/// The id of a secret.
pub(crate) fn secret_id(number: u16) -> SecretId {
    SecretId(7_000 + u128::from(number))
}

pub(crate) fn secret(number: u16) -> Secret {
    let first = DataVersion {
        data: Some(Base64(number.to_le_bytes().to_vec())),
        digest: format!("sha256:{number}"),
        ..DataVersion::default()
    };
    let spec = SecretSpec { name: format!("key{number}"), ..SecretSpec::default() };
    Secret { id: secret_id(number), meta: Meta::default(), spec, versions: [(1, first)].into() }
}

fn uses(number: u16) -> Option<Vec<SecretReference>> {
    let name = format!("key{number}");
    let file = Some(FileTarget { name: name.clone(), ..FileTarget::default() });
    Some(vec![SecretReference { file, secret_name: name, ..SecretReference::default() }])
}

fn seconds(seconds: u64) -> Option<Nanos> {
    Some(Nanos::from(Duration::from_secs(seconds)))
}

/// How many images there are.
const N_IMAGES: u8 = 3;

/// The name of an image.
pub(crate) fn image(number: u8) -> String {
    format!("i{number}")
}

fn image_record(number: u8, holders: BTreeSet<NodeId>) -> Image {
    Image {
        id: ImageId(number.into()),
        meta: Meta::default(),
        name: format!("docker.io/library/{}:latest", image(number)),
        digest: format!("sha256:{}", number.to_string().repeat(64)),
        size: 1,
        created: None,
        holders,
    }
}

/// What a user asks of a service of this number. Each number has its own kind:
///
/// 1 is published, 2 constrained and sized, 3 start-first and published, 4 on networks, 5 in host mode,
/// 6 global and constrained, 7 a job, 8 a job on every node.
pub(crate) fn spec(number: u16, rng: &mut StdRng) -> ServiceSpec {
    let image = image(rng.random_range(1..=N_IMAGES));
    let mut container = ContainerSpec { image, ..ContainerSpec::default() };
    if number <= 4 && rng.random_bool(0.7) {
        container.secrets = uses(number % N_SECRETS + 1);
    }
    let mut template = TaskSpec { container_spec: Some(container), ..TaskSpec::default() };
    template.restart_policy = Some(RestartPolicy { delay: seconds(1), ..RestartPolicy::default() });
    template.force_update = Some(rng.random_range(0..1000));
    let mut spec = ServiceSpec { name: name(number), ..ServiceSpec::default() };
    let port = |published: Option<u32>| PortConfig {
        target_port: 80,
        published_port: published.and_then(|port| u16::try_from(port).ok()),
        ..PortConfig::default()
    };
    match number {
        1 => publish(&mut spec, port(Some(8080))),
        2 => {
            template.placement = Some(Placement { max_replicas: Some(2), ..on_fast_disks() });
            let memory = Resources { memory_bytes: Some(300 << 20), ..Resources::default() };
            template.resources = Some(ResourceRequirements {
                reservations: Some(memory),
                ..ResourceRequirements::default()
            });
        }
        3 => publish(&mut spec, port(None)),
        4 => {
            let n_networks = rng.random_range(1..=N_NETWORKS);
            template.networks = Some((1..=n_networks).map(on_network).collect());
        }
        6 => template.placement = Some(on_fast_disks()),
        7 | 8 => {
            let policy = template.restart_policy.get_or_insert_default();
            policy.max_attempts = Some(if number == 7 { 1 } else { 3 });
        }
        _ => {
            let mode = Some(PublishMode::Host);
            publish(&mut spec, PortConfig { publish_mode: mode, ..port(Some(9000)) });
        }
    }
    spec.task_template = template;
    spec.mode = Some(mode(number, rng));
    if spec.mode_kind().is_some_and(ModeKind::is_job) {
        return spec;
    }
    let actions = ["continue", "pause", "rollback"];
    spec.update_config = Some(UpdateConfig {
        order: (number == 3).then(|| "start-first".to_owned()),
        parallelism: Some(rng.random_range(1..=2)),
        failure_action: Some(actions[rng.random_range(0..3)].to_owned()),
        monitor: seconds(2),
        ..UpdateConfig::default()
    });
    spec
}

fn on_fast_disks() -> Placement {
    let constraints = Some(vec!["node.labels.disk == ssd".into()]);
    Placement { constraints, ..Placement::default() }
}

fn mode(number: u16, rng: &mut StdRng) -> ServiceMode {
    let n_tasks = rng.random_range(0..6);
    let mode = ServiceMode::default();
    match number {
        6 => ServiceMode { global: Some(Default::default()), ..mode },
        7 => {
            let job = ReplicatedJob {
                total_completions: Some(n_tasks),
                max_concurrent: Some(rng.random_range(1..=3)),
                ..ReplicatedJob::default()
            };
            ServiceMode { replicated_job: Some(job), ..mode }
        }
        8 => ServiceMode { global_job: Some(Default::default()), ..mode },
        _ => ServiceMode::of_replicas(Some(n_tasks)),
    }
}

fn publish(spec: &mut ServiceSpec, port: PortConfig) {
    spec.endpoint_spec = Some(EndpointSpec { ports: Some(vec![port]), ..EndpointSpec::default() });
}

fn on_network(number: u16) -> NetworkAttachmentConfig {
    NetworkAttachmentConfig { target: network_name(number), ..NetworkAttachmentConfig::default() }
}

/// What an operator asks of a node.
pub(crate) fn node_spec(old: &NodeSpec, rng: &mut StdRng) -> NodeSpec {
    let mut spec = old.clone();
    spec.availability = match rng.random_range(0..5) {
        0 | 1 => Availability::Drain,
        2 => Availability::Pause,
        _ => Availability::Active,
    };
    if rng.random_bool(0.2) {
        let disk = if rng.random_bool(0.5) { "hdd" } else { "ssd" };
        spec.labels.get_or_insert_default().insert("disk".into(), disk.into());
    }
    spec
}
