//! Nodes that were removed: refused for as long as their certificates may be good.
//!
//! Managers refuse them whatever they ask for. Source: SwarmKit's `BlacklistedCertificates`
//! (`manager/controlapi/node.go`), which only its certificate authority and its dispatcher look at.

use std::time::Duration;

use skep_common::object::Cluster;
use skep_common::spec::Nanos;
use skep_common::{NodeId, Object, Timestamp};

use crate::command::{Action, Expect};
use crate::level;
use crate::store::State;
use crate::swarm::{CERTIFICATE_LIFE, certificate_life};

/// Beyond the life of a certificate: clocks of machines differ. SwarmKit's `expiredCertGrace`.
const MARGIN: Duration = Duration::from_hours(7 * 24);

/// Refuses a node from now on. `None` while a manager of before would drop the mark.
pub(crate) fn keep_out(state: &State, node_id: NodeId, now: Timestamp) -> Option<Action> {
    let is_understood = level::of_managers(state) >= level::CONTROL;
    is_understood.then(|| keep_all_out(state, &[node_id], now)).flatten()
}

/// Refuses nodes from now on, whatever the managers understand: for one of this version that has no others.
pub(crate) fn keep_all_out(state: &State, nodes: &[NodeId], now: Timestamp) -> Option<Action> {
    let cluster = state.cluster()?;
    let mut changed = (**cluster).clone();
    let until = now.after(longest_life(cluster) + MARGIN);
    changed.blacklisted.extend(nodes.iter().map(|node_id| (*node_id, until)));
    Some(put(changed))
}

/// How long any certificate of the swarm may be good: that of a node may be of a time when they lived longer.
fn longest_life(cluster: &Cluster) -> Duration {
    let longest = cluster.longest_node_cert_expiry.map_or(CERTIFICATE_LIFE, Nanos::duration);
    longest.max(certificate_life(&cluster.spec)).max(CERTIFICATE_LIFE)
}

/// Forgets those whose certificates have long ended.
pub fn forget(state: &State, now: Timestamp) -> Option<Action> {
    let cluster = state.cluster()?;
    if cluster.blacklisted.values().all(|until| now < *until) {
        return None;
    }
    let mut changed = (**cluster).clone();
    changed.blacklisted.retain(|_, until| now < *until);
    Some(put(changed))
}

/// Whether a node was removed.
pub fn is_kept_out(state: &State, node_id: NodeId) -> bool {
    state.cluster().is_some_and(|cluster| cluster.blacklisted.contains_key(&node_id))
}

fn put(cluster: Cluster) -> Action {
    let expect = Expect::Version(cluster.meta.version);
    Action::Put { object: Object::Cluster(Box::new(cluster)), expect }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NOW, World, cluster, node, service};

    #[test]
    fn a_removed_node_is_refused_until_its_certificate_has_long_ended() {
        let manager = |format_level| {
            let mut manager = node(1);
            manager.manager_status = Some(skep_common::object::ManagerStatus::default());
            manager.description.get_or_insert_default().format_level = format_level;
            Object::Node(Box::new(manager))
        };
        let mut world = World::new("", service(0), "");
        world.put(vec![Object::Cluster(Box::new(cluster())), manager(level::CONTROL - 1)]);
        let (old, gone) = (NodeId(2), NodeId(3));
        for node_id in [old, gone] {
            let mut node = node(u16::try_from(node_id.0).unwrap());
            node.id = node_id;
            world.put(vec![Object::Node(Box::new(node))]);
        }
        world.apply(crate::remove_node(&world.state, old, NOW));
        assert!(!is_kept_out(&world.state, old), "an older manager would admit it all the same");

        world.replace(manager(level::CONTROL));
        world.apply(crate::remove_node(&world.state, gone, NOW));
        assert!(world.state.node(gone).is_none() && is_kept_out(&world.state, gone));
        let until = NOW.after(CERTIFICATE_LIFE + MARGIN);
        assert_eq!(forget(&world.state, Timestamp(until.0 - 1)), None);
        world.apply(forget(&world.state, until).into_iter().collect());
        assert!(!is_kept_out(&world.state, gone));
        assert_eq!(forget(&world.state, until), None);
    }

    #[test]
    fn a_removed_node_is_refused_for_as_long_as_any_certificate_was_ever_good() {
        let days = |n_days: u64| Duration::from_hours(n_days * 24);
        for (name, lives, expect) in [
            ("the default", &[][..], days(90)),
            ("a short one", &[1], days(90)),
            ("a long one", &[400], days(400)),
            ("a long one that was shortened", &[400, 1], days(400)),
            ("twice", &[400, 1, 200, 30], days(400)),
            ("longer again", &[400, 1, 500], days(500)),
            ("longer than the default, and back to it", &[100, 90], days(100)),
        ] {
            let mut changed = cluster();
            for n_days in lives {
                let mut spec = changed.spec.clone();
                let config = spec.ca_config.get_or_insert_default();
                config.node_cert_expiry = Some(days(*n_days).into());
                changed = crate::swarm::with_spec(&changed, spec, false, Vec::new).unwrap();
            }
            let mut world = World::new("", service(0), "");
            let mut manager = node(1);
            manager.description.get_or_insert_default().format_level = level::CONTROL;
            manager.manager_status = Some(skep_common::object::ManagerStatus::default());
            world.put(vec![
                Object::Cluster(Box::new(changed)),
                Object::Node(Box::new(manager)),
                Object::Node(Box::new(node(2))),
            ]);
            let gone = node(2).id;
            world.apply(crate::remove_node(&world.state, gone, NOW));
            let until = world.state.cluster().unwrap().blacklisted[&gone];
            assert_eq!(until, NOW.after(expect + MARGIN), "{name}");
        }
    }
}
