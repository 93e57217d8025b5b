//! What an image name in a spec means in this swarm.
//!
//! A name is normalised as Docker does (`nginx` is `docker.io/library/nginx:latest`); a service is
//! pinned (`NAME:TAG@sha256:…`) when it is created, or, where its image is loaded later, each of its
//! tasks when it is placed. A task that has a node is always pinned.
//!
//! Source: distribution `reference/normalize.go`, `ParseDockerRef`.

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::Rng;
use skep_common::spec::ContainerSpec;
use skep_common::{Image, ImageId, Kind, Meta, NodeId, Object};

use crate::command::{Action, Expect};
use crate::secrets;
use crate::store::State;

/// Why no node can get an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Nobody loaded it yet.
    #[error("no image named {name} in this swarm: load it with skep image load")]
    Unknown {
        /// The name, as the spec has it.
        name: String,
    },
    /// Every node that had it is down or gone. It comes back with one of them, or by loading it again.
    #[error(
        "no living holder of image {name}: start a node that has it, or load it with skep image load"
    )]
    NoHolder {
        /// The name, as the spec has it.
        name: String,
    },
}

/// The name with registry, repository and tag, without a digest.
pub fn normalise(name: &str) -> String {
    let name = split_digest(name).0;
    let (domain, path) = match name.split_once('/') {
        Some((first, rest)) if is_domain(first) => (first, rest),
        _ => ("docker.io", name),
    };
    let domain = if domain == "index.docker.io" { "docker.io" } else { domain };
    let library = if domain == "docker.io" && !path.contains('/') { "library/" } else { "" };
    tagged(&format!("{domain}/{library}{path}"))
}

/// The name as it was given, without a digest, and with the tag that it has or means.
pub fn tagged(name: &str) -> String {
    let name = split_digest(name).0;
    let has_tag = name.rsplit('/').next().is_some_and(|last| last.contains(':'));
    let tag = if has_tag { "" } else { ":latest" };
    format!("{name}{tag}")
}

fn is_domain(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.chars().any(char::is_uppercase)
}

/// The name and, where it is pinned, the digest of its manifest.
pub fn split_digest(name: &str) -> (&str, Option<&str>) {
    match name.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (name, None),
    }
}

/// The name with the digest that it means now; `None` where the swarm does not know it.
pub fn pin(state: &State, name: &str) -> Option<String> {
    if split_digest(name).1.is_some() {
        return Some(name.to_owned());
    }
    let image = state.image_by_name(&normalise(name))?;
    Some(format!("{}@{}", tagged(name), image.digest))
}

/// A node's word that it holds an image, and under which names it was loaded there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Normalised names; without any, the image is known by its digest alone.
    pub names: Vec<String>,
    /// Digest of its manifest.
    pub digest: String,
    /// Bytes of all its blobs.
    pub size: u64,
    /// When it was made, as its config says.
    pub created: Option<String>,
}

/// The actions that make or move the names of an image that a node holds.
///
/// A digest that loses its last name, but that a service or a task is pinned to, keeps a record named
/// `NAME@DIGEST`: its tasks can still be moved, and its copies are kept.
pub fn register(
    state: &State,
    node_id: NodeId,
    registration: &Registration,
    rng: &mut impl Rng,
) -> Vec<Action> {
    let Registration { names, digest, size, created } = registration;
    let same = state.images().values().filter(|record| record.digest == *digest);
    let mut holders: BTreeSet<NodeId> = same.flat_map(|record| record.holders.clone()).collect();
    holders.insert(node_id);
    let mut names: BTreeSet<String> = names.iter().map(|name| normalise(name)).collect();
    if names.is_empty() && !state.images().values().any(|record| record.digest == *digest) {
        names.insert(digest.clone());
    }
    let mut actions = Vec::new();
    let mut put = |name: String, digest: &str, holders: &BTreeSet<NodeId>, old: Option<&Image>| {
        let image = Image {
            id: old.map_or_else(|| ImageId::random(rng), |old| old.id),
            meta: Meta::default(),
            name,
            digest: digest.to_owned(),
            size: *size,
            created: created.clone(),
            holders: holders.clone(),
        };
        let expect = old.map_or(Expect::Absent, |old| Expect::Version(old.meta.version));
        actions.push(Action::Put { object: Object::Image(Box::new(image)), expect });
    };
    let mut superseded: BTreeSet<&str> = BTreeSet::new();
    for name in &names {
        let old = state.image_by_name(name);
        if old.is_some_and(|old| old.digest == *digest) {
            continue;
        }
        put(name.clone(), digest, &holders, old.map(|old| &**old));
        superseded.extend(old.map(|old| old.digest.as_str()));
    }
    for old_digest in superseded {
        let has_digest = |record: &&Arc<Image>| record.digest == old_digest;
        let records: Vec<&Arc<Image>> = state.images().values().filter(has_digest).collect();
        let keeps_name = records.iter().any(|record| !names.contains(&record.name));
        let Some(old) = records.first().filter(|_| !keeps_name && is_pinned(state, old_digest))
        else {
            continue;
        };
        let mut kept = (***old).clone();
        kept.id = ImageId::random(rng);
        kept.name = format!("{}@{old_digest}", old.name);
        actions.push(Action::Put { object: Object::Image(Box::new(kept)), expect: Expect::Absent });
    }
    // Records of this digest that kept their name learn of the new holder.
    actions.push(Action::ImageHolder { digest: digest.clone(), node_id, holds: true });
    actions
}

/// The actions that erase records of superseded digests that nothing is pinned to any more.
pub fn unused(state: &State) -> Vec<Action> {
    let is_superseded = |record: &&Arc<Image>| split_digest(&record.name).1.is_some();
    let superseded: Vec<&Arc<Image>> = state.images().values().filter(is_superseded).collect();
    if superseded.is_empty() {
        return Vec::new(); // Mostly so; all services and tasks are a lot to look at.
    }
    let pinned: BTreeSet<&str> = pins(state).collect();
    let unused = superseded.into_iter().filter(|record| !pinned.contains(record.digest.as_str()));
    unused.map(|record| Action::Delete { kind: Kind::Image, id: record.id.0 }).collect()
}

fn is_pinned(state: &State, digest: &str) -> bool {
    pins(state).any(|pinned| pinned == digest)
}

/// The digests that services, their previous specs and tasks are pinned to.
fn pins(state: &State) -> impl Iterator<Item = &str> {
    let of_services = state.services().values().flat_map(|service| {
        let specs = service.previous_spec.iter().chain([&service.spec]);
        specs.map(|spec| &spec.task_template.container_spec)
    });
    let of_tasks = state.tasks().values().map(|task| &task.spec.container_spec);
    let containers = of_services.chain(of_tasks).flatten();
    containers.filter_map(|container| split_digest(&container.image).1)
}

/// The pinned form of a spec's image, where at least one node that is not down holds it.
pub(crate) fn resolve(state: &State, name: &str) -> Result<String, Missing> {
    let pinned = pin(state, name);
    let unknown = || Missing::Unknown { name: split_digest(name).0.to_owned() };
    let pinned = pinned.ok_or_else(unknown)?;
    let digest = split_digest(&pinned).1.unwrap_or_default();
    let mut records = state.images().values().filter(|image| image.digest == digest).peekable();
    if records.peek().is_none() {
        return Err(unknown());
    }
    let is_alive = |id: &NodeId| {
        let node = state.node(*id);
        node.is_some_and(|node| node.status.state != skep_common::object::NodeState::Down)
    };
    if records.any(|image| image.holders.iter().any(is_alive)) {
        Ok(pinned)
    } else {
        Err(Missing::NoHolder { name: split_digest(name).0.to_owned() })
    }
}

/// Whether two container specs are equal, where `wanted` may lack the digest that `task` has, and with
/// it the tag that a name without one means.
pub(crate) fn is_same_container(
    wanted: Option<&ContainerSpec>,
    task: Option<&ContainerSpec>,
) -> bool {
    let (Some(wanted), Some(task)) = (wanted, task) else { return wanted == task };
    if split_digest(&wanted.image).1.is_some() || wanted.image == task.image {
        return wanted == task || secrets::is_same_container(wanted, task);
    }
    if tagged(&wanted.image) != tagged(&task.image) {
        return false;
    }
    let mut unpinned = task.clone();
    unpinned.image.clone_from(&wanted.image);
    secrets::is_same_container(wanted, &unpinned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{World, service};

    /// The records as words `NAME=DIGEST@HOLDERS`, without what every name begins with.
    fn records(world: &World) -> String {
        let words = world.state.images().values().map(|record| {
            let name = record.name.trim_start_matches("docker.io/library/");
            let holders: Vec<String> = record.holders.iter().map(|id| id.0.to_string()).collect();
            format!("{name}={}@{}", &record.digest[7..], holders.join(","))
        });
        let mut words: Vec<String> = words.collect();
        words.sort();
        words.join(" ")
    }

    fn load(world: &mut World, node: u128, names: &[&str], digest: &str) {
        let registration = Registration {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            digest: format!("sha256:{digest}"),
            size: 1,
            created: None,
        };
        let actions = register(&world.state, NodeId(node), &registration, &mut world.rng);
        world.apply(actions);
    }

    #[test]
    fn a_name_means_what_was_loaded_last() {
        let mut web = service(1);
        let container =
            ContainerSpec { image: "a@sha256:1".to_owned(), ..ContainerSpec::default() };
        web.spec.task_template.container_spec = Some(container);
        let mut world = World::new("1 2 3", web, "");
        load(&mut world, 1, &["a"], "1");
        assert_eq!(records(&world), "a:latest=1@1");
        load(&mut world, 2, &["a"], "1");
        assert_eq!(records(&world), "a:latest=1@1,2", "another holder");
        load(&mut world, 3, &["b"], "1");
        assert_eq!(records(&world), "a:latest=1@1,2,3 b:latest=1@1,2,3", "another name");
        load(&mut world, 1, &["b"], "2");
        assert_eq!(records(&world), "a:latest=1@1,2,3 b:latest=2@1", "a name moves");
        load(&mut world, 1, &["a"], "2");
        let pinned = "a:latest=2@1 a:latest@sha256:1=1@1,2,3 b:latest=2@1";
        assert_eq!(records(&world), pinned, "the old one lost its last name, but is pinned");
        assert_eq!(resolve(&world.state, "a@sha256:1").as_deref(), Ok("a@sha256:1"));
        assert_eq!(unused(&world.state), []);
        let mut web = world.web();
        web.spec.task_template.container_spec = None;
        world.replace(Object::Service(Box::new(web)));
        let actions = unused(&world.state);
        world.apply(actions);
        assert_eq!(records(&world), "a:latest=2@1 b:latest=2@1");
        load(&mut world, 2, &[], "3");
        assert_eq!(records(&world), "a:latest=2@1 b:latest=2@1 sha256:3=3@2", "no name at all");
        load(&mut world, 1, &["b"], "3");
        assert_eq!(records(&world), "a:latest=2@1 b:latest=3@1,2 sha256:3=3@1,2");
    }

    #[test]
    fn names_are_normalised_as_docker_does() {
        for (name, expect) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("traefik/whoami", "docker.io/traefik/whoami:latest"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("quay.io/x@sha256:0123", "quay.io/x:latest"),
            ("nginx:1@sha256:0123", "docker.io/library/nginx:1"),
        ] {
            assert_eq!(normalise(name), expect, "{name}");
        }
    }

    #[test]
    fn a_digest_added_at_placement_is_no_difference() {
        let of =
            |image: &str| ContainerSpec { image: image.to_owned(), ..ContainerSpec::default() };
        for (wanted, task, expect) in [
            ("a", "a", true),
            ("a", "a:latest@sha256:1", true),
            ("a:latest", "a:latest@sha256:1", true),
            ("h:5000/a", "h:5000/a:latest@sha256:1", true),
            ("a", "a@sha256:1", true),
            ("a", "a:1@sha256:1", false),
            ("a", "b:latest@sha256:1", false),
            ("a:1", "a@sha256:1", false),
            ("a@sha256:2", "a@sha256:1", false),
            ("a@sha256:1", "a", false),
        ] {
            let same = is_same_container(Some(&of(wanted)), Some(&of(task)));
            assert_eq!(same, expect, "{wanted} {task}");
        }
    }
}
