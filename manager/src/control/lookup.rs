//! From what a client writes to an object, and from an object to what a client may see.

use std::collections::BTreeSet;

use skep_common::object::{JoinTokens, ManagerStatus};
use skep_common::spec::Predefined;
use skep_common::{Kind, NodeId, Object, ServiceId, Task, TaskId};
use skep_manager_core::{State, network, rotation};

use super::error::Error;

/// Finds one object: by id, then by name, then by a unique prefix of its id.
pub fn find(state: &State, kind: Kind, reference: &str, own_id: NodeId) -> Result<Object, Error> {
    if kind == Kind::Cluster {
        let cluster = state.cluster().cloned();
        return cluster
            .map(|cluster| Object::Cluster(Box::new((*cluster).clone())))
            .ok_or_else(|| Error::NotFound { kind: "cluster", reference: reference.to_owned() });
    }
    let own = own_id.to_string();
    let reference = if kind == Kind::Node && reference == "self" { &own } else { reference };
    let id = find_id(state, kind, reference)?;
    object(state, kind, id)
        .ok_or_else(|| Error::NotFound { kind: kind.name(), reference: reference.to_owned() })
}

fn find_id(state: &State, kind: Kind, reference: &str) -> Result<u128, Error> {
    let not_found = || Error::NotFound { kind: kind.name(), reference: reference.to_owned() };
    if reference.is_empty() {
        return Err(not_found());
    }
    if let Ok(id) = reference.parse::<TaskId>()
        && object(state, kind, id.0).is_some()
    {
        return Ok(id.0);
    }
    if let Some(one) = Predefined::find(reference).filter(|_| kind == Kind::Network) {
        return Ok(one.id().0);
    }
    if let Some(id) = state.id_by_name(kind, reference) {
        return Ok(id);
    }
    let ambiguous =
        |matches| Error::Ambiguous { kind: kind.name(), reference: reference.to_owned(), matches };
    let ids = ids(state, kind);
    let named: Vec<u128> = match kind {
        Kind::Node => {
            state.nodes().values().filter(|n| n.hostname() == reference).map(|n| n.id.0).collect()
        }
        Kind::Task => {
            let live = |task: &&std::sync::Arc<Task>| !task.status.state.is_terminal();
            let named = state.tasks().values().filter(|task| task.name() == reference);
            named.filter(live).map(|task| task.id.0).collect()
        }
        _ => Vec::new(),
    };
    let prefixed = || ids.filter(|id| TaskId(*id).to_string().starts_with(reference)).collect();
    let matches: Vec<u128> = if named.is_empty() { prefixed() } else { named };
    match matches.as_slice() {
        [] => Err(not_found()),
        [id] => Ok(*id),
        several => Err(ambiguous(several.len())),
    }
}

fn ids(state: &State, kind: Kind) -> Box<dyn Iterator<Item = u128> + '_> {
    match kind {
        Kind::Cluster => Box::new(state.cluster().map(|o| o.id.0).into_iter()),
        Kind::Node => Box::new(state.nodes().keys().map(|id| id.0)),
        Kind::Service => Box::new(state.services().keys().map(|id| id.0)),
        Kind::Task => Box::new(state.tasks().keys().map(|id| id.0)),
        Kind::Network => {
            let staying = state.networks().values().filter(|network| !network.pending_delete);
            let predefined = Predefined::ALL.into_iter().map(|one| one.id().0);
            Box::new(staying.map(|network| network.id.0).chain(predefined))
        }
        Kind::Secret => Box::new(state.secrets().keys().map(|id| id.0)),
        Kind::Config => Box::new(state.configs().keys().map(|id| id.0)),
        Kind::Stack => Box::new(state.stacks().keys().map(|id| id.0)),
        Kind::Image => Box::new(state.images().keys().map(|id| id.0)),
        Kind::Revision => Box::new(std::iter::empty()),
    }
}

/// The networks that every node has, which are not in the store.
pub fn predefined() -> impl Iterator<Item = Object> {
    network::predefined().into_iter().map(|network| Object::Network(Box::new(network)))
}

/// Whether clients must not see an object: a network whose removal was asked.
pub fn is_hidden(object: &Object) -> bool {
    matches!(object, Object::Network(network) if network.pending_delete)
}

/// The object with this id, whole, where clients may see it.
pub fn object(state: &State, kind: Kind, id: u128) -> Option<Object> {
    macro_rules! of {
        ($table:ident, $key:path, $variant:ident) => {
            state.$table().get(&$key(id)).map(|o| Object::$variant(Box::new((**o).clone())))
        };
    }
    let found = match kind {
        Kind::Cluster => {
            let cluster = state.cluster().filter(|cluster| cluster.id.0 == id);
            cluster.map(|cluster| Object::Cluster(Box::new((**cluster).clone())))
        }
        Kind::Node => of!(nodes, NodeId, Node),
        Kind::Service => of!(services, ServiceId, Service),
        Kind::Task => of!(tasks, TaskId, Task),
        Kind::Network => {
            let stored = of!(networks, skep_common::NetworkId, Network);
            stored.or_else(|| predefined().find(|network| network.raw_id() == id))
        }
        Kind::Secret => of!(secrets, skep_common::SecretId, Secret),
        Kind::Config => of!(configs, skep_common::ConfigId, Config),
        Kind::Stack => of!(stacks, skep_common::StackId, Stack),
        Kind::Image => of!(images, skep_common::ImageId, Image),
        Kind::Revision => None, // Asked for by its service's history alone.
    };
    found.filter(|object| !is_hidden(object))
}

/// What changes from one answer to the next and is therefore not stored: who leads, who is reachable.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Raft id of the leader.
    pub leader: Option<u64>,
    /// Raft ids of managers that do not answer.
    pub silent: BTreeSet<u64>,
}

/// The object as clients see it: without secrets, with the answering manager's facts filled in.
pub fn document(mut object: Object, state: &State, facts: &Facts) -> serde_json::Value {
    let mut tls_status = None;
    match &mut object {
        Object::Cluster(cluster) => {
            cluster.root_ca_key.clear();
            cluster.unlock_key = None;
            cluster.spec.ca_config.iter_mut().for_each(|config| config.signing_ca_key = None);
            cluster.root_rotation.iter_mut().for_each(|rotation| rotation.ca_key.clear());
            cluster.join_tokens = JoinTokens::default();
        }
        Object::Node(node) => {
            let cluster = state.cluster();
            tls_status =
                Some(cluster.map_or("Unknown", |cluster| rotation::tls_status(cluster, node)));
            if let Some(ManagerStatus { raft_id, leader, reachability, .. }) =
                &mut node.manager_status
            {
                *leader = facts.leader == Some(*raft_id);
                let is_silent = facts.silent.contains(raft_id);
                let word = if is_silent { "unreachable" } else { "reachable" };
                word.clone_into(reachability);
            }
        }
        Object::Secret(secret) => {
            secret.spec.data = None;
            for version in secret.versions.values_mut() {
                version.data = None;
                version.digest.clear(); // A password could be guessed by it.
            }
        }
        Object::Config(config) => {
            config.versions.values_mut().for_each(|version| version.data = None);
        }
        _ => {}
    }
    let value =
        serde_json::to_value(&object).expect("objects have string keys and no failing parts");
    // `Object` is an enum with the kind as its only key.
    match value {
        serde_json::Value::Object(map) => {
            let inner = map.into_iter().next().map(|(_, inner)| inner);
            let mut inner = inner.unwrap_or(serde_json::Value::Null);
            if let Some(status) = tls_status {
                inner["TLSStatus"] = status.into();
            }
            inner
        }
        other => other,
    }
}
