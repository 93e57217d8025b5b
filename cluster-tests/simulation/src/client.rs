//! What users and operators wish for, and the command that a manager makes of it.

use rand::RngExt as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use skep_common::object::{ManagerStatus, NodeState};
use skep_common::spec::{Base64, ContainerSpec, NodeRole, NodeSpec, TaskSpec};
use skep_common::{
    Kind, NetworkId, Node, NodeId, Object, Service, ServiceId, TaskId, TaskState, Timestamp,
};
use skep_manager_core::roles::{self, Admission};
use skep_manager_core::{Action, Expect, State, container, network, secrets, service};

use crate::changing::Change;
use crate::membership::ManagerId;
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
    Promote(NodeId),
    Demote(NodeId),
    /// A machine joins as a new node.
    Join(MachineId, NodeId, NodeRole),
    /// A node asks for a certificate.
    Renew(NodeId),
    /// A program of a format level is to be a manager.
    Admit(NodeId, ManagerId, u32),
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
    pub(crate) fn draw(
        rng: &mut StdRng,
        nodes: &[NodeId],
        workers: &[NodeId],
        managers: &[NodeId],
    ) -> Self {
        let service = rng.random_range(1..=samples::N_SERVICES);
        let network = rng.random_range(1..=samples::N_NETWORKS);
        let node_id = nodes[rng.random_range(0..nodes.len())];
        match rng.random_range(0..100) {
            0..16 => Self::CreateService(service),
            16..18 if !workers.is_empty() => {
                Self::Promote(workers[rng.random_range(0..workers.len())])
            }
            18..20 if !managers.is_empty() => {
                Self::Demote(managers[rng.random_range(0..managers.len())])
            }
            16..20 => Self::CreateService(service),
            20..32 => Self::UpdateService(service),
            32..40 => Self::Refresh(service),
            40..52 => Self::Scale(service, rng.random_range(0..7)),
            52..57 => Self::Rollback(service),
            57..62 => Self::RemoveService(service),
            62..66 => Self::CreateNetwork(network),
            66..68 => Self::RemoveNetwork(network),
            68..78 => Self::UpdateNode(node_id),
            78..81 => {
                // Mostly a worker: a manager has to be down, or is refused.
                let is_worker = rng.random_bool(0.8) && !workers.is_empty();
                let among = if is_worker { workers } else { nodes };
                let node_id = among[rng.random_range(0..among.len())];
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

/// What a manager does for a wish, and the object that it is about. What a task is asked to do has no version of its own.
#[derive(Debug)]
pub(crate) enum Decision {
    /// There is nothing to do, or nothing more.
    Nothing,
    /// What a certificate is for, and by which Raft id its node is a member.
    Role(NodeRole, u64),
    /// It is written, and where it goes on decided anew after that.
    Write { actions: Vec<Action>, about: Option<(Kind, u128)>, goes_on: bool },
    /// The members change, and then that is written; where there is nothing to write, it is decided anew.
    Change { change: Change, then: Option<Vec<Action>>, about: Option<(Kind, u128)> },
}

type Written = Option<(Vec<Action>, Option<(Kind, u128)>)>;

/// Decides as the control API does. An error is a refusal.
pub(crate) fn decide(
    wish: &Wish,
    state: &State,
    seed: u64,
    now: Timestamp,
    has_changed: bool,
) -> Result<Decision, String> {
    match wish {
        Wish::Promote(_) | Wish::Demote(_) | Wish::RemoveNode(..) => about_role(wish, state, now),
        Wish::Renew(node_id) => {
            let node = state.node(*node_id).ok_or("it was removed")?;
            Ok(Decision::Role(node.observed_role(), roles::raft_id_of(node)))
        }
        Wish::Admit(node_id, manager, level) => {
            admit(state, *node_id, (*manager, *level), has_changed)
        }
        _ => Ok(match decide_write(wish, state, seed, now)? {
            Some((actions, about)) => Decision::Write { actions, about, goes_on: false },
            None => Decision::Nothing,
        }),
    }
}

/// A node's role, or its end.
fn about_role(wish: &Wish, state: &State, now: Timestamp) -> Result<Decision, String> {
    let (Wish::Promote(node_id) | Wish::Demote(node_id) | Wish::RemoveNode(node_id, _)) = wish
    else {
        return Ok(Decision::Nothing);
    };
    let mut node = Node::clone(state.node(*node_id).ok_or("no such node")?);
    let about = Some((Kind::Node, node_id.0));
    let role = match wish {
        Wish::Promote(_) => NodeRole::Manager,
        Wish::Demote(_) => NodeRole::Worker,
        Wish::RemoveNode(_, is_forced) => {
            let raft_id = roles::check_removal(&node, *is_forced).map_err(text)?;
            let actions = skep_manager_core::remove_node(state, *node_id, now);
            return Ok(match raft_id.map(ManagerId::of_raft_id) {
                None => Decision::Write { actions, about, goes_on: false },
                Some(id) => {
                    Decision::Change { change: Change::Remove(id), then: Some(actions), about }
                }
            });
        }
        _ => return Ok(Decision::Nothing),
    };
    let is_demoted = (node.spec.role, role) == (NodeRole::Manager, NodeRole::Worker);
    if node.spec.role == role {
        return Ok(Decision::Nothing);
    }
    roles::ask(state, &mut node, role).map_err(text)?;
    let expect = Expect::Version(node.meta.version);
    let raft_id = node.manager_status.as_ref().map(|manager| manager.raft_id);
    let actions = vec![Action::Put { object: Object::Node(Box::new(node)), expect }];
    Ok(match raft_id.filter(|_| is_demoted).map(ManagerId::of_raft_id) {
        None => Decision::Write { actions, about, goes_on: false },
        Some(id) => Decision::Change { change: Change::MayRemove(id), then: Some(actions), about },
    })
}

/// What the managers do for one that wants to be a manager.
fn admit(
    state: &State,
    node_id: NodeId,
    (manager, level): (ManagerId, u32),
    has_changed: bool,
) -> Result<Decision, String> {
    let raft_id = manager.raft_id();
    if has_changed {
        let is_manager = roles::is_manager(state, node_id, raft_id);
        let then = Some(Vec::new());
        return Ok(match is_manager {
            true => Decision::Nothing,
            false => Decision::Change { change: Change::Remove(manager), then, about: None },
        });
    }
    let addr = samples::node(u16::try_from(manager.machine() + 1).map_err(text)?).address();
    let status = ManagerStatus { raft_id, addr, ..ManagerStatus::default() };
    Ok(match roles::admit(state, node_id, &status, level).map_err(text)? {
        Admission::Admitted => {
            Decision::Change { change: Change::Add(manager), then: None, about: None }
        }
        Admission::Note(node) => {
            let expect = Expect::Version(node.meta.version);
            let actions = vec![Action::Put { object: Object::Node(node), expect }];
            Decision::Write { actions, about: None, goes_on: true }
        }
    })
}

fn decide_write(wish: &Wish, state: &State, seed: u64, now: Timestamp) -> Result<Written, String> {
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
        Wish::Join(machine, node_id, role) => {
            let number = u16::try_from(*machine + 1).map_err(text)?;
            let mut node = samples::node(number);
            (node.id, node.number, node.status.state) = (*node_id, 0, NodeState::Unknown);
            node.spec.role = *role;
            node.description = None;
            let object = Object::Node(Box::new(node));
            let put = Action::Put { object, expect: Expect::Absent };
            Ok(Some((vec![put], Some((Kind::Node, node_id.0)))))
        }
        Wish::RunContainer(_) | Wish::StopContainer(_) | Wish::RemoveContainer(..) => {
            about_container(wish, state, &mut rng, now)
        }
        Wish::RotateSecret(number) => rotate_secret(state, *number, &mut rng, now),
        Wish::Read
        | Wish::Promote(_)
        | Wish::Demote(_)
        | Wish::RemoveNode(..)
        | Wish::Renew(_)
        | Wish::Admit(..) => Ok(None),
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
) -> Result<Written, String> {
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
) -> Result<Written, String> {
    let id = samples::secret_id(number);
    let Some(old) = state.secret(id) else {
        let object = Object::Secret(Box::new(samples::secret(number)));
        let put = Action::Put { object, expect: Expect::Absent };
        return Ok(Some((vec![put], Some((Kind::Secret, id.0)))));
    };
    let mut spec = old.spec.clone();
    spec.data = Some(Base64(rng.random_range(0..u64::MAX).to_le_bytes().to_vec()));
    let update = secrets::update(state, &**old, spec, now, |_| true).map_err(text)?;
    Ok(Some((update.actions, Some((Kind::Secret, id.0)))))
}

fn about_container(
    wish: &Wish,
    state: &State,
    rng: &mut StdRng,
    now: Timestamp,
) -> Result<Written, String> {
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
