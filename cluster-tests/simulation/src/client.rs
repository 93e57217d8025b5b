//! What users and operators wish for, and the command that a manager makes of it.

use rand::RngExt as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use skep_common::object::NodeState;
use skep_common::spec::{Base64, ContainerSpec, NodeSpec, TaskSpec};
use skep_common::{
    Kind, NetworkId, Node, NodeId, Object, Service, ServiceId, TaskId, TaskState, Timestamp,
};
use skep_manager_core::{Action, Expect, State, container, network, secrets, service};

use crate::message::MachineId;
use crate::service as samples;

/// One wish.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Wish {
    CreateService(u16),
    UpdateService(u16),
    /// The same service once more, as `update --force` asks.
    Refresh(u16),
    Scale(u16, u64),
    Rollback(u16),
    RemoveService(u16),
    CreateNetwork(u16),
    RemoveNetwork(u16),
    UpdateNode(NodeId),
    /// To be active again.
    Activate(NodeId),
    RemoveNode(NodeId, bool),
    /// A machine joins as a new node.
    Join(MachineId, NodeId),
    RunContainer(NodeId),
    StopContainer(NodeId),
    RemoveContainer(NodeId, bool),
    /// Another version of a secret, for those who use it.
    RotateSecret(u16),
    /// Looks, and changes nothing.
    Read,
}

impl Wish {
    /// A random one about these nodes.
    pub(crate) fn draw(rng: &mut StdRng, nodes: &[NodeId], workers: &[NodeId]) -> Self {
        let service = rng.random_range(1..=samples::N_SERVICES);
        let network = rng.random_range(1..=samples::N_NETWORKS);
        let node_id = nodes[rng.random_range(0..nodes.len())];
        match rng.random_range(0..100) {
            0..20 => Self::CreateService(service),
            20..32 => Self::UpdateService(service),
            32..40 => Self::Refresh(service),
            40..52 => Self::Scale(service, rng.random_range(0..7)),
            52..57 => Self::Rollback(service),
            57..62 => Self::RemoveService(service),
            62..66 => Self::CreateNetwork(network),
            66..68 => Self::RemoveNetwork(network),
            68..78 => Self::UpdateNode(node_id),
            78..81 if !workers.is_empty() => {
                let node_id = workers[rng.random_range(0..workers.len())];
                Self::RemoveNode(node_id, rng.random_bool(0.5))
            }
            81..86 => Self::RunContainer(node_id),
            86..89 => Self::StopContainer(node_id),
            89..92 => Self::RemoveContainer(node_id, rng.random_bool(0.5)),
            92..95 => Self::RotateSecret(rng.random_range(1..=samples::N_SECRETS)),
            _ => Self::Read,
        }
    }
}

/// What a manager proposes for a wish, and the object that it is about; `None` where there is nothing to do.
///
/// What a task is asked to do has no version of its own.
pub(crate) type Decision = Option<(Vec<Action>, Option<(Kind, u128)>)>;

/// Decides as the control API does. An error is a refusal.
pub(crate) fn decide(
    wish: &Wish,
    state: &State,
    seed: u64,
    now: Timestamp,
) -> Result<Decision, String> {
    let mut rng = StdRng::seed_from_u64(seed);
    match wish {
        Wish::CreateService(number) => {
            let id = ServiceId::random(&mut rng);
            let spec = samples::spec(*number, &mut rng);
            let (id, action) = service::create(state, id, spec).map_err(text)?;
            Ok(Some((vec![action], Some((Kind::Service, id.0)))))
        }
        Wish::UpdateService(_)
        | Wish::Refresh(_)
        | Wish::Scale(..)
        | Wish::Rollback(_)
        | Wish::RemoveService(_) => about_service(wish, state, &mut rng, now),
        Wish::CreateNetwork(number) => {
            let id = NetworkId::random(&mut rng);
            let (id, action) =
                network::create(state, id, samples::network(*number)).map_err(text)?;
            Ok(Some((vec![action], Some((Kind::Network, id.0)))))
        }
        Wish::RemoveNetwork(number) => {
            let found = state.network_by_name(&samples::network_name(*number));
            let found = found.ok_or("no such network")?;
            let action = network::remove(state, found).map_err(text)?;
            Ok(action.map(|action| (vec![action], Some((Kind::Network, found.id.0)))))
        }
        Wish::UpdateNode(node_id) | Wish::Activate(node_id) => {
            let mut node = Node::clone(state.node(*node_id).ok_or("no such node")?);
            let expect = Expect::Version(node.meta.version);
            node.spec = match wish {
                Wish::UpdateNode(_) => samples::node_spec(&node.spec, &mut rng),
                _ => {
                    NodeSpec { availability: skep_common::spec::Availability::Active, ..node.spec }
                }
            };
            let object = Object::Node(Box::new(node));
            Ok(Some((vec![Action::Put { object, expect }], Some((Kind::Node, node_id.0)))))
        }
        Wish::RemoveNode(node_id, is_forced) => remove_node(state, *node_id, *is_forced, now),
        Wish::Join(machine, node_id) => {
            let number = u16::try_from(*machine + 1).map_err(text)?;
            let mut node = samples::node(number);
            (node.id, node.number, node.status.state) = (*node_id, 0, NodeState::Unknown);
            let object = Object::Node(Box::new(node));
            let put = Action::Put { object, expect: Expect::Absent };
            Ok(Some((vec![put], Some((Kind::Node, node_id.0)))))
        }
        Wish::RunContainer(_) | Wish::StopContainer(_) | Wish::RemoveContainer(..) => {
            about_container(wish, state, &mut rng, now)
        }
        Wish::RotateSecret(number) => rotate_secret(state, *number, &mut rng, now),
        Wish::Read => Ok(None),
    }
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn about_service(
    wish: &Wish,
    state: &State,
    rng: &mut StdRng,
    now: Timestamp,
) -> Result<Decision, String> {
    let (Wish::UpdateService(number)
    | Wish::Refresh(number)
    | Wish::Scale(number, _)
    | Wish::Rollback(number)
    | Wish::RemoveService(number)) = wish
    else {
        return Ok(None);
    };
    let found: &Service =
        state.service_by_name(&samples::name(*number)).ok_or("no such service")?;
    let version = found.meta.version;
    let mut spec = found.spec.clone();
    let action = match wish {
        Wish::RemoveService(_) => service::remove(found),
        Wish::Rollback(_) => Some(service::rollback(state, found, version, now).map_err(text)?),
        Wish::Scale(_, replicas) => {
            if let Some(replicated) = spec.mode.as_mut().and_then(|mode| mode.replicated.as_mut()) {
                replicated.replicas = Some(*replicas);
            }
            if let Some(job) = spec.mode.as_mut().and_then(|mode| mode.replicated_job.as_mut()) {
                job.total_completions = Some(*replicas);
            }
            service::update(state, found, version, spec).map_err(text)?
        }
        Wish::Refresh(_) => {
            spec.task_template.force_update = Some(rng.random_range(0..1_000_000));
            service::update(state, found, version, spec).map_err(text)?
        }
        _ => {
            let new = samples::spec(*number, rng);
            service::update(state, found, version, new).map_err(text)?
        }
    };
    Ok(action.map(|action| (vec![action], Some((Kind::Service, found.id.0)))))
}

fn rotate_secret(
    state: &State,
    number: u16,
    rng: &mut StdRng,
    now: Timestamp,
) -> Result<Decision, String> {
    let id = samples::secret_id(number);
    let old = state.secret(id).ok_or("no such secret")?;
    let mut spec = old.spec.clone();
    spec.data = Some(Base64(rng.random_range(0..u64::MAX).to_le_bytes().to_vec()));
    let update = secrets::update(state, &**old, spec, now, |_| true).map_err(text)?;
    Ok(Some((update.actions, Some((Kind::Secret, id.0)))))
}

fn remove_node(
    state: &State,
    node_id: NodeId,
    is_forced: bool,
    now: Timestamp,
) -> Result<Decision, String> {
    let node = state.node(node_id).ok_or("no such node")?;
    if node.manager_status.is_some() {
        return Err("it is a manager".into());
    }
    if node.status.state == NodeState::Ready && !is_forced {
        return Err("it is not down".into());
    }
    let actions = skep_manager_core::remove_node(state, node_id, now);
    Ok(Some((actions, Some((Kind::Node, node_id.0)))))
}

fn about_container(
    wish: &Wish,
    state: &State,
    rng: &mut StdRng,
    now: Timestamp,
) -> Result<Decision, String> {
    let (Wish::RunContainer(node_id)
    | Wish::StopContainer(node_id)
    | Wish::RemoveContainer(node_id, _)) = wish
    else {
        return Ok(None);
    };
    let of_node = container::of_node(state, *node_id);
    let found = of_node.filter(|task| task.desired_state < TaskState::Remove).last();
    let (action, made) = match (wish, found) {
        (Wish::RunContainer(_), _) => {
            let id = TaskId::random(rng);
            let image = samples::image(1);
            let container_spec = Some(ContainerSpec { image, ..ContainerSpec::default() });
            let request = container::Request {
                name: String::new(),
                spec: TaskSpec { container_spec, ..TaskSpec::default() },
                auto_remove: rng.random_bool(0.5),
            };
            (
                container::run(state, id, *node_id, request, now).map_err(text)?,
                Some((Kind::Task, id.0)),
            )
        }
        (_, None) => return Err("no such container".into()),
        (Wish::RemoveContainer(_, is_forced), Some(task)) => {
            (container::remove(task, *is_forced).map_err(text)?, None)
        }
        (_, Some(task)) => (container::stop(task), None),
    };
    Ok(Some((vec![action], made)))
}
