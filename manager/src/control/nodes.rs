//! `node update` and `node rm`.

use skep_common::spec::{NodeRole, NodeSpec};
use skep_common::{Kind, NodeId, Object, Version};
use skep_manager_core::{Action, Expect, Refusal, node_name, remove_node, roles};
use skep_proto::{RemoveNodeRequest, UpdateNodeRequest};
use skep_runtime::clock;

use super::error::Error;
use super::{ControlService, parse_id, parse_json};
use crate::roles::reason;

pub(super) async fn update(
    control: &ControlService,
    request: UpdateNodeRequest,
) -> Result<(), Error> {
    let spec: NodeSpec = parse_json("node spec", &request.spec_json)?;
    let node_id = NodeId(parse_id(Kind::Node, &request.id)?);
    let state = control.read().await?;
    let not_found = || Error::NotFound { kind: "node", reference: request.id.clone() };
    let mut node = (**state.node(node_id).ok_or_else(not_found)?).clone();
    let is_demoted = (node.spec.role, spec.role) == (NodeRole::Manager, NodeRole::Worker);
    let refused = |error: roles::Error| Error::Precondition(error.to_string());
    roles::ask(&state, &mut node, spec.role).map_err(refused)?;
    if let (true, Some(manager)) = (is_demoted, &node.manager_status) {
        control.inner.consensus.ask_to_remove(manager.raft_id).await.map_err(|error| {
            let (name, why) = (node_name(&node), reason(&error));
            Error::Precondition(format!("node {name} cannot be demoted: {why}"))
        })?;
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
    loop {
        match try_remove(control, &request).await {
            // The swarm's settings, which name whom it refuses, have just been written.
            Err(Error::Refused(Refusal::OutOfSequence { .. })) => {}
            done => return done,
        }
    }
}

async fn try_remove(control: &ControlService, request: &RemoveNodeRequest) -> Result<(), Error> {
    let node_id = NodeId(parse_id(Kind::Node, &request.id)?);
    let state = control.read().await?;
    let not_found = || Error::NotFound { kind: "node", reference: request.id.clone() };
    let node = state.node(node_id).ok_or_else(not_found)?;
    let removal = roles::check_removal(node, request.force);
    let raft_id = removal.map_err(|why| Error::Precondition(why.to_string()))?;
    if let Some(raft_id) = raft_id {
        control.inner.consensus.remove_manager(raft_id).await.map_err(|error| {
            Error::Precondition(format!("manager {node_id} cannot be removed: {}", reason(&error)))
        })?;
    }
    control.write(remove_node(&state, node_id, clock::now())).await?;
    Ok(())
}
