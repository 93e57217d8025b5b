//! What happened, one step after another, for people and programs that follow it.
//!
//! [`of`] names the steps of one command by what was there before and after. Every manager applies the same
//! commands, so that all of them tell the same events under the same versions. [`Ring`] keeps the newest, and knows
//! from which version on it has all; [`Filter`] selects.
//!
//! Kinds, actions and attributes are those of `docker events` with the scope swarm (`daemon/events.go` of moby).
//! Differs from Docker: it has none of tasks, stacks and images of the swarm. A task's are those of its container
//! (`start`, `die`, `oom`, `health_status: …`), and `assign`, `reject` and `orphan`.

mod filter;
mod ring;
mod task;

use skep_common::object::UpdateStatus;
use skep_common::spec::Labels;
use skep_common::{ConfigId, Kind, NetworkId, Node, NodeId, SecretId, Service, ServiceId};
use skep_common::{ImageId, StackId, TaskId, Timestamp};

pub use self::filter::Filter;
pub use self::ring::{Page, Ring};
use crate::scheduler::node_name;
use crate::stack::NAMESPACE_LABEL;
use crate::store::{Change, State};

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The version of the store that has it. Several may have the same, and then their order is fixed.
    pub version: u64,
    /// By the clock of the manager that proposed it: of two managers, a later event may have an earlier time.
    pub at: Timestamp,
    /// What it happened to.
    pub kind: Kind,
    /// `create`, `update`, `remove`, …
    pub action: &'static str,
    /// The 128 bits of its id.
    pub id: u128,
    /// In the order of keys.
    pub attributes: Vec<(&'static str, String)>,
}

impl Event {
    /// An attribute.
    pub fn attribute(&self, key: &str) -> Option<&str> {
        self.attributes.iter().find(|(known, _)| *known == key).map(|(_, value)| &**value)
    }

    /// Its id, as clients know it.
    pub fn id_text(&self) -> String {
        ServiceId(self.id).to_string() // All kinds have ids of one form.
    }

    fn size(&self) -> usize {
        let of_attributes = self.attributes.iter().map(|(_, value)| value.capacity());
        size_of::<Self>()
            + self.attributes.capacity() * size_of::<(&str, String)>()
            + of_attributes.sum::<usize>()
    }
}

/// Actions, and what they say of an object.
type Steps = Vec<(&'static str, Attributes)>;
type Attributes = Vec<(&'static str, String)>;

/// The steps of a command that made `new` of `old` at that time.
pub fn of(old: &State, new: &State, changes: &[Change], at: Timestamp) -> Vec<Event> {
    let version = new.version().index;
    let mut events = Vec::new();
    for change in changes {
        let (kind, id) = (change.kind, change.id);
        for (action, mut attributes) in steps(old, new, change) {
            attributes.sort_unstable_by_key(|(key, _)| *key);
            events.push(Event { version, at, kind, action, id, attributes });
        }
    }
    events
}

fn steps(old: &State, new: &State, change: &Change) -> Steps {
    let id = change.id;
    match change.kind {
        Kind::Task => {
            let (before, after) = (old.task(TaskId(id)), new.task(TaskId(id)));
            task::steps(before.map(|task| &**task), after.map(|task| &**task), (old, new))
        }
        Kind::Service => {
            let of = |state: &State| state.service(ServiceId(id)).cloned();
            let is_there = |service: &Service| !service.pending_delete;
            let (old, new) = (of(old), of(new));
            named(
                old.as_deref().filter(|service| is_there(service)),
                new.as_deref().filter(|service| is_there(service)),
                service_attributes,
                service_changes,
            )
        }
        Kind::Node => {
            let of = |state: &State| state.node(NodeId(id)).cloned();
            let attributes = |node: &Node| vec![("name", node_name(node))];
            named(of(old).as_deref(), of(new).as_deref(), attributes, node_changes)
        }
        Kind::Network => {
            let of = |state: &State| {
                state.network(NetworkId(id)).filter(|network| !network.pending_delete).cloned()
            };
            created_or_removed(of(old), of(new), |network| network.spec.name.clone())
        }
        Kind::Secret => {
            let of = |state: &State| state.secret(SecretId(id)).cloned();
            simple(of(old), of(new), |secret| secret.spec.name.clone())
        }
        Kind::Config => {
            let of = |state: &State| state.config(ConfigId(id)).cloned();
            simple(of(old), of(new), |config| config.spec.name.clone())
        }
        Kind::Stack => {
            let of = |state: &State| state.stack(StackId(id)).cloned();
            simple(of(old), of(new), |stack| stack.spec.name.clone())
        }
        Kind::Image => {
            let of = |state: &State| state.image(ImageId(id)).cloned();
            created_or_removed(of(old), of(new), |image| image.name.clone())
        }
        Kind::Cluster => vec![("update", Vec::new())],
        Kind::Revision => Vec::new(), // That of its service is told.
    }
}

/// What users see come, change and go.
fn named<T: PartialEq>(
    old: Option<&T>,
    new: Option<&T>,
    attributes: impl Fn(&T) -> Attributes,
    changes: impl Fn(&T, &T, &mut Attributes),
) -> Steps {
    match (old, new) {
        (None, None) => Vec::new(),
        (None, Some(new)) => vec![("create", attributes(new))],
        (Some(old), None) => vec![("remove", attributes(old))],
        (Some(old), Some(new)) => {
            let mut said = attributes(new);
            changes(old, new, &mut said);
            vec![("update", said)]
        }
    }
}

fn simple<T: PartialEq>(old: Option<T>, new: Option<T>, name: impl Fn(&T) -> String) -> Steps {
    named(old.as_ref(), new.as_ref(), |one| vec![("name", name(one))], |_, _, _| {})
}

/// The same of what users cannot change, though managers do.
fn created_or_removed<T: PartialEq>(
    old: Option<T>,
    new: Option<T>,
    name: impl Fn(&T) -> String,
) -> Steps {
    if old.is_some() == new.is_some() { Vec::new() } else { simple(old, new, name) }
}

/// Says of something that changed what it was and what it is.
fn differ(
    said: &mut Attributes,
    [key_old, key_new]: [&'static str; 2],
    old: impl ToString,
    new: impl ToString,
) {
    let (old, new) = (old.to_string(), new.to_string());
    if old != new {
        said.extend([(key_old, old), (key_new, new)]);
    }
}

fn stack_of(labels: Option<&Labels>) -> Option<(&'static str, String)> {
    let stack = labels.and_then(|labels| labels.get(NAMESPACE_LABEL));
    stack.map(|stack| ("stack", stack.clone()))
}

fn service_attributes(service: &Service) -> Attributes {
    let mut said = vec![("name", service.spec.name.clone())];
    said.extend(stack_of(service.spec.labels.as_ref()));
    said
}

fn service_changes(old: &Service, new: &Service, said: &mut Attributes) {
    let image = |service: &Service| service.spec.container().image.clone();
    differ(said, ["image.old", "image.new"], image(old), image(new));
    let replicas = |service: &Service| match service.spec.replicas() {
        Some(replicas) => replicas.to_string(),
        None => String::new(),
    };
    differ(said, ["replicas.old", "replicas.new"], replicas(old), replicas(new));
    let state = |service: &Service| -> String {
        let status: Option<&UpdateStatus> = service.update_status.as_ref();
        status.map(|status| status.state.clone()).unwrap_or_default()
    };
    differ(said, ["updatestate.old", "updatestate.new"], state(old), state(new));
}

fn node_changes(old: &Node, new: &Node, said: &mut Attributes) {
    let availability = |node: &Node| node.spec.availability.name();
    differ(said, ["availability.old", "availability.new"], availability(old), availability(new));
    let role = |node: &Node| node.observed_role().name();
    differ(said, ["role.old", "role.new"], role(old), role(new));
    let desired = |node: &Node| node.spec.role.name();
    differ(said, ["desiredrole.old", "desiredrole.new"], desired(old), desired(new));
    let state = |node: &Node| node.status.state.name();
    differ(said, ["state.old", "state.new"], state(old), state(new));
}

#[cfg(test)]
mod tests;
