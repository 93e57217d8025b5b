//! What keeps services from being reached, as nodes say.
//!
//! Nodes report published ports that they cannot serve; the store keeps that with the node
//! (`docs/decisions/0020-conditions-are-kept-with-the-node.md`). A node that is down says nothing any
//! more.

use std::collections::BTreeMap;

use skep_common::ServiceId;
use skep_common::object::{NodeState, ServiceCondition};

use crate::scheduler::node_name;
use crate::store::State;

/// The conditions of all services that have some, in the order of nodes and ports.
pub fn by_service(state: &State) -> BTreeMap<ServiceId, Vec<ServiceCondition>> {
    said(state, |_| true)
}

/// The conditions of one service.
pub fn of_service(state: &State, service_id: ServiceId) -> Vec<ServiceCondition> {
    said(state, |id| id == service_id).remove(&service_id).unwrap_or_default()
}

fn said(
    state: &State,
    is_wanted: impl Fn(ServiceId) -> bool,
) -> BTreeMap<ServiceId, Vec<ServiceCondition>> {
    let mut found: BTreeMap<ServiceId, Vec<ServiceCondition>> = BTreeMap::new();
    for node in state.nodes().values().filter(|node| node.status.state != NodeState::Down) {
        let conditions = node.status.port_conditions.iter();
        for condition in conditions.filter(|condition| is_wanted(condition.service_id)) {
            let (port, protocol) = (condition.published_port, condition.protocol.name());
            let name = node_name(node);
            found.entry(condition.service_id).or_default().push(ServiceCondition {
                node_id: node.id,
                protocol: condition.protocol,
                published_port: port,
                message: format!("port {port}/{protocol} on {name} {}", condition.message),
            });
        }
    }
    for conditions in found.values_mut() {
        conditions.sort_by(|a, b| {
            (a.published_port, a.protocol, &a.message).cmp(&(
                b.published_port,
                b.protocol,
                &b.message,
            ))
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use skep_common::Object;
    use skep_common::object::PortCondition;
    use skep_common::spec::PortProtocol;

    use super::*;
    use crate::testing::{World, parse_node, service};

    #[test]
    fn a_service_has_the_conditions_of_living_nodes() {
        let mut world = World::new("", service(1), "");
        for word in ["1", "2", "3:down"] {
            let mut node = parse_node(word);
            node.status.port_conditions = vec![PortCondition {
                service_id: ServiceId(1),
                protocol: PortProtocol::Tcp,
                published_port: 8080,
                message: "is held by nginx (pid 812): stop it or publish another port".into(),
            }];
            world.put(vec![Object::Node(Box::new(node))]);
        }
        let conditions = of_service(&world.state, ServiceId(1));
        let texts: Vec<&str> = conditions.iter().map(|one| one.message.as_str()).collect();
        let name = |id| node_name(world.state.node(skep_common::NodeId(id)).unwrap());
        let expect = [1, 2].map(|id| {
            let on = name(id);
            format!(
                "port 8080/tcp on {on} is held by nginx (pid 812): stop it or publish another port"
            )
        });
        assert_eq!(texts, expect);
        assert!(of_service(&world.state, ServiceId(2)).is_empty());
    }
}
