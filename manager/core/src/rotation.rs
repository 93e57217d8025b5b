//! A change of the root of certificates, step by step; the leader's loop takes each.
//!
//! 1. The new root is in the store. Nodes are told to trust both; certificates are signed with the old one.
//! 2. Every node says that it trusts both. From now on the new root signs, and nodes are told to renew.
//! 3. Every node has a certificate of the new root. It takes the old one's place; nodes are told to trust it alone.
//!
//! # Invariants
//!
//! - At any time, each node trusts the root that signed the certificate of each other node. So a step waits for
//!   all nodes of the store, also for those that are away: a node that never comes back is removed.
//! - Steps only go forward: a node that joins meanwhile is told of both roots.
//!
//! Differs from SwarmKit (`ca/reconciler.go`), which issues from the new root at once, with a certificate of the old
//! one in between: roots of earlier versions allow nothing in between.

use skep_common::object::{Cluster, RootRotation, TlsInfo};
use skep_common::{Node, Object, Timestamp};

use crate::command::{Action, Expect};
use crate::level;
use crate::store::State;

/// Why no change of the root begins.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It has come too far to be given up for another one.
    #[error(
        "the root is being changed already, and some nodes have certificates of the new one: wait until `skep swarm ca --rotate` ends, or remove the nodes that it waits for"
    )]
    Underway,
    /// Managers of before would decide without it.
    #[error(
        "the root cannot be changed before all managers run this version: they have format level {0}, and level 4 is needed"
    )]
    Level(u32),
}

/// A root that is to take the place of another one.
#[derive(Debug, Clone)]
pub struct NewRoot {
    /// Its certificate, PEM.
    pub ca_cert: String,
    /// Its private key, PEM.
    pub ca_key: String,
    /// Its key, certified by the old root, PEM.
    pub cross_signed_cert: String,
    /// Its public key, as nodes say it of their certificates' issuer.
    pub public_key: String,
}

/// The swarm with a change of its root begun. One that has not come to its second step is given up.
pub fn begin(
    view: &State,
    cluster: &Cluster,
    root: NewRoot,
    now: Timestamp,
) -> Result<Cluster, Error> {
    let known = level::of_managers(view);
    if known < level::CONTROL {
        return Err(Error::Level(known));
    }
    if cluster.root_rotation.as_ref().is_some_and(|running| running.trusted_at.is_some()) {
        return Err(Error::Underway);
    }
    let mut changed = cluster.clone();
    changed.root_rotation = Some(RootRotation {
        ca_cert: root.ca_cert,
        ca_key: root.ca_key,
        cross_signed_cert: root.cross_signed_cert,
        started_at: now,
        public_key: root.public_key,
        trusted_at: None,
    });
    Ok(changed)
}

/// The roots that nodes trust, PEM.
pub fn trust(cluster: &Cluster) -> String {
    let new = cluster.root_rotation.as_ref().map(|rotation| rotation.ca_cert.as_str());
    join(&[cluster.root_ca_cert.as_str(), new.unwrap_or_default()])
}

/// What one who joins is told of the roots: the first one is the one that the token names, the last one certifies
/// the one in between.
pub fn told_to_joiners(cluster: &Cluster) -> String {
    match &cluster.root_rotation {
        None => cluster.root_ca_cert.clone(),
        Some(rotation) => {
            join(&[&cluster.root_ca_cert, &rotation.ca_cert, &rotation.cross_signed_cert])
        }
    }
}

fn join(pems: &[&str]) -> String {
    let lines = pems.iter().flat_map(|pem| pem.lines());
    lines.filter(|line| !line.is_empty()).flat_map(|line| [line, "\n"]).collect()
}

/// Certificate and key of the root that signs now.
pub fn signing(cluster: &Cluster) -> (&str, &str) {
    match &cluster.root_rotation {
        Some(rotation) if rotation.trusted_at.is_some() => (&rotation.ca_cert, &rotation.ca_key),
        _ => (&cluster.root_ca_cert, &cluster.root_ca_key),
    }
}

fn info(node: &Node) -> Option<&TlsInfo> {
    node.description.as_ref()?.tls_info.as_ref()
}

/// Whether the node trusts the new root.
pub fn trusts(node: &Node, rotation: &RootRotation) -> bool {
    let wanted = join(&[rotation.ca_cert.as_str()]);
    info(node).is_some_and(|info| join(&[info.trust_root.as_str()]).contains(&wanted))
}

/// Whether the node's certificate is of the new root.
pub fn is_renewed(node: &Node, rotation: &RootRotation) -> bool {
    info(node).is_some_and(|info| info.cert_issuer_public_key == rotation.public_key)
}

/// Docker's word for how the node's certificates are.
///
/// A node trusts the root of its own certificate, so that the roots it trusts say enough while none is on its way.
pub fn tls_status(cluster: &Cluster, node: &Node) -> &'static str {
    let Some(info) = info(node) else { return "Unknown" };
    let is_trusting = join(&[info.trust_root.as_str()]) == trust(cluster);
    match is_trusting && !is_renewal_due(cluster, node) {
        true => "Ready",
        false => "Needs Rotation",
    }
}

/// Whether the node is to get a certificate now, and does not wait for its own time.
pub fn is_renewal_due(cluster: &Cluster, node: &Node) -> bool {
    let rotation = cluster.root_rotation.as_ref();
    let rotation = rotation.filter(|rotation| rotation.trusted_at.is_some());
    rotation.is_some_and(|rotation| !is_renewed(node, rotation))
}

/// The next step, where all nodes are ready for it.
pub fn advance(view: &State, now: Timestamp) -> Option<Action> {
    let cluster = view.cluster()?;
    let rotation = cluster.root_rotation.as_ref()?;
    let mut changed = (**cluster).clone();
    let mut nodes = view.nodes().values();
    if rotation.trusted_at.is_none() {
        if !nodes.all(|node| trusts(node, rotation)) {
            return None;
        }
        changed.root_rotation.as_mut()?.trusted_at = Some(now);
    } else {
        if !nodes.all(|node| trusts(node, rotation) && is_renewed(node, rotation)) {
            return None;
        }
        changed.root_ca_cert.clone_from(&rotation.ca_cert);
        changed.root_ca_key.clone_from(&rotation.ca_key);
        changed.root_rotation = None;
    }
    let expect = Expect::Version(cluster.meta.version);
    Some(Action::Put { object: Object::Cluster(Box::new(changed)), expect })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NOW, World, service};
    use skep_common::NodeId;

    struct Play(World);

    impl Play {
        fn new() -> Self {
            let mut world = World::new("1 2", service(0), "");
            let (mut cluster, expect) = match world.state.cluster() {
                Some(cluster) => ((**cluster).clone(), Expect::Version(cluster.meta.version)),
                None => (crate::testing::cluster(), Expect::Absent),
            };
            (cluster.root_ca_cert, cluster.root_ca_key) = ("old\n".into(), "old key".into());
            world.apply(vec![Action::Put { object: Object::Cluster(Box::new(cluster)), expect }]);
            Self(world)
        }

        fn cluster(&self) -> &Cluster {
            self.0.state.cluster().unwrap()
        }

        fn begin(&mut self, name: &str) -> Result<(), Error> {
            let root = NewRoot {
                ca_cert: format!("{name}\n"),
                ca_key: format!("{name} key"),
                cross_signed_cert: "cross\n".into(),
                public_key: format!("{name} public"),
            };
            let changed = begin(&self.0.state, self.cluster(), root, NOW)?;
            let expect = Expect::Version(self.cluster().meta.version);
            let object = Object::Cluster(Box::new(changed));
            self.0.apply(vec![Action::Put { object, expect }]);
            Ok(())
        }

        fn say(&mut self, number: u128, trust: &str, issuer: &str) {
            let mut node = (**self.0.state.node(NodeId(number)).unwrap()).clone();
            let expect = Expect::Version(node.meta.version);
            if number == 1 {
                node.manager_status = Some(skep_common::object::ManagerStatus::default());
            }
            let description = node.description.get_or_insert_default();
            description.format_level = level::CONTROL;
            description.tls_info = Some(TlsInfo {
                trust_root: trust.into(),
                cert_issuer_public_key: format!("{issuer} public"),
                ..TlsInfo::default()
            });
            self.0.apply(vec![Action::Put { object: Object::Node(Box::new(node)), expect }]);
        }

        fn statuses(&self) -> Vec<&'static str> {
            let nodes = self.0.state.nodes().values();
            nodes.map(|node| tls_status(self.cluster(), node)).collect()
        }

        /// Takes the steps that can be taken: `root, signing root, trust`.
        fn step(&mut self) -> String {
            while let Some(action) = advance(&self.0.state, NOW) {
                self.0.apply(vec![action]);
            }
            let cluster = self.cluster();
            let (signing, trust) = (signing(cluster).0.trim(), trust(cluster).replace('\n', " "));
            format!("{}, {signing}, {}", cluster.root_ca_cert.trim(), trust.trim())
        }
    }

    #[test]
    fn every_node_is_waited_for_at_each_step() {
        let mut play = Play::new();
        assert_eq!(play.step(), "old, old, old");
        for node in [1, 2] {
            play.say(node, "old\n", "old");
        }
        assert_eq!(play.statuses(), ["Ready", "Ready"]);
        play.begin("new").unwrap();
        assert_eq!(play.step(), "old, old, old new");
        assert_eq!(play.statuses(), ["Needs Rotation", "Needs Rotation"]);
        play.say(1, "old\nnew\n", "old");
        assert_eq!(play.step(), "old, old, old new", "one does not trust it yet");
        play.begin("newer").unwrap();
        play.say(1, "old\nnewer\n", "old");
        assert_eq!(play.step(), "old, old, old newer", "nobody had a certificate of the first one");
        play.say(2, "old\nnewer\n", "old");
        assert_eq!(play.step(), "old, newer, old newer");
        assert_eq!(play.begin("newest"), Err(Error::Underway));
        let due = |play: &Play, number| {
            is_renewal_due(play.cluster(), play.0.state.node(NodeId(number)).unwrap())
        };
        play.say(1, "old\nnewer\n", "newer");
        assert_eq!((due(&play, 1), due(&play, 2)), (false, true));
        assert_eq!(play.statuses(), ["Ready", "Needs Rotation"]);
        assert_eq!(play.step(), "old, newer, old newer", "one has an old certificate");
        play.0.apply(vec![Action::Delete { kind: skep_common::Kind::Node, id: 2 }]);
        assert_eq!(play.step(), "newer, newer, newer", "it was removed");
        assert_eq!(play.cluster().root_ca_key, "newer key");
        assert_eq!(play.statuses(), ["Needs Rotation"], "it trusts the old one, too");
        play.say(1, "newer\n", "newer");
        assert_eq!(play.statuses(), ["Ready"]);
    }
}
