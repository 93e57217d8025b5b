//! `node update` and `node rm`.

use skep_common::object::NodeState;
use skep_common::spec::NodeSpec;
use skep_common::{Kind, NodeId, Object, Version};
use skep_manager_core::{Action, Expect};
use skep_proto::{RemoveNodeRequest, UpdateNodeRequest};

use super::error::Error;
use super::{ControlService, parse_id, parse_json};

pub(super) async fn update(
    control: &ControlService,
    request: UpdateNodeRequest,
) -> Result<(), Error> {
    let spec: NodeSpec = parse_json("node spec", &request.spec_json)?;
    let node_id = NodeId(parse_id(Kind::Node, &request.id)?);
    let state = control.read().await?;
    let not_found = || Error::NotFound { kind: "node", reference: request.id.clone() };
    let mut node = (**state.node(node_id).ok_or_else(not_found)?).clone();
    if spec.role != node.spec.role {
        let why = "changing the role of a node is not supported yet: let it leave, and join it again with the other token";
        return Err(Error::Invalid(why.into()));
    }
    node.spec = spec;
    let expect = Expect::Version(Version { index: request.version });
    control.write(vec![Action::Put { object: Object::Node(Box::new(node)), expect }]).await?;
    Ok(())
}

pub(super) async fn remove(
    control: &ControlService,
    request: RemoveNodeRequest,
) -> Result<(), Error> {
    let node_id = NodeId(parse_id(Kind::Node, &request.id)?);
    let state = control.read().await?;
    let not_found = || Error::NotFound { kind: "node", reference: request.id.clone() };
    let node = state.node(node_id).ok_or_else(not_found)?;
    if let Some(manager) = &node.manager_status {
        if node.status.state != NodeState::Down || !request.force {
            let why = format!(
                "node {node_id} is a manager and must not be missed by the others: let it leave the swarm (skep swarm leave --force), and when it is down, remove it with skep node rm --force"
            );
            return Err(Error::Precondition(why));
        }
        control.inner.consensus.remove_manager(manager.raft_id).await.map_err(|error| {
            let why = skep_runtime::telemetry::Chain(&error).to_string();
            Error::Precondition(format!("manager {node_id} cannot be removed: {why}"))
        })?;
    }
    if node.status.state == NodeState::Ready && !request.force {
        let why = format!(
            "node {node_id} is not down and can't be removed: stop it first, or use --force"
        );
        return Err(Error::Precondition(why));
    }
    // Its tasks will never be heard of again: what they held is free from now on.
    let mut actions: Vec<Action> =
        state.tasks_of_node(node_id).map(|task| super::services::orphan(task)).collect();
    actions.push(Action::Delete { kind: Kind::Node, id: node_id.0 });
    control.write(actions).await?;
    Ok(())
}
