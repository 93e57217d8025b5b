//! What a node says of itself, as it is written down: what a manager of before does not know waits until all know it.

use skep_common::Node;
use skep_common::object::{NodeDescription, PortCondition};

use crate::level::{CONTROL, FACTS};

/// The node with what it says of itself, where every manager understands `level`; ports that it cannot serve only
/// where it has said so in this session.
pub fn describe(
    node: &Node,
    said: NodeDescription,
    conditions: Option<&Vec<PortCondition>>,
    level: u32,
) -> Node {
    let mut described = node.clone();
    let stored = described.description.replace(said);
    if level < CONTROL
        && let Some(description) = &mut described.description
    {
        // A manager that has not said its level yet is no reason to forget what is stored.
        description.tls_info = stored.and_then(|stored| stored.tls_info);
    }
    if let Some(conditions) = conditions.filter(|said| level >= FACTS || said.is_empty()) {
        described.status.port_conditions.clone_from(conditions);
    }
    described
}

#[cfg(test)]
mod tests {
    use skep_common::ServiceId;
    use skep_common::spec::PortProtocol;

    use super::*;
    use crate::level::of_object;
    use crate::testing::node;

    #[test]
    fn what_managers_do_not_know_waits() {
        let said =
            NodeDescription { tls_info: Some(Default::default()), ..NodeDescription::default() };
        let held = vec![PortCondition {
            service_id: ServiceId(1),
            protocol: PortProtocol::Tcp,
            published_port: 80,
            message: "is held".into(),
        }];
        let written = |level| {
            let described = describe(&node(1), said.clone(), Some(&held), level);
            of_object(&skep_common::Object::Node(Box::new(described)))
        };
        assert_eq!([1, FACTS - 1, FACTS, CONTROL].map(written), [1, 1, FACTS, CONTROL]);
        let whole = describe(&node(1), said.clone(), Some(&held), CONTROL);
        let bare = NodeDescription::default();
        let kept = describe(&whole, bare.clone(), None, CONTROL - 1);
        assert_eq!(kept, whole, "no reason to forget it");
        assert_eq!(
            describe(&whole, bare, Some(&Vec::new()), CONTROL).description.unwrap().tls_info,
            None
        );
        assert!(describe(&whole, said, Some(&Vec::new()), 1).status.port_conditions.is_empty());
    }
}
