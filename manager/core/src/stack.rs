//! Deploys and removes a stack: its networks, secrets, configs and services, in one transaction.
//!
//! A stack is a stored object; its parts also carry Docker's label, so that its clients see them,
//! and so that what `docker stack deploy` made is adopted. As there, services that a file no longer
//! has are removed only where `prune` is asked, and the rest likewise. A network is never changed: what
//! tasks have of it was made of it. Source: docker/cli `cli/command/stack`.

mod payloads;

use std::collections::BTreeSet;

use rand::Rng;
use skep_common::object::{Config, Secret};
use skep_common::spec::{NetworkSpec, ServiceSpec, StackSpec};
use skep_common::{Kind, Meta, NetworkId, Object, ServiceId, Stack, StackId, Timestamp};

use crate::command::{Action, Command, Expect, Outcome, Refusal};
use crate::store::State;
use crate::{network, secrets, service};
pub use payloads::Deployed;

/// The label by which Docker's clients know the services of a stack.
pub const NAMESPACE_LABEL: &str = "com.docker.stack.namespace";

/// Why a stack is not deployed or removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// One of its services is refused, so none is touched.
    #[error("service {name}: {error}")]
    Service {
        /// The service's full name.
        name: String,
        /// Why.
        error: Box<service::Error>,
    },
    /// One of its networks is refused, so nothing is touched.
    #[error("network {name}: {error}")]
    Network {
        /// The network's full name.
        name: String,
        /// Why.
        error: network::Error,
    },
    /// Remove the stack and deploy it again, or give the network another name in the file.
    #[error(
        "network {name} of the file differs from the one that the stack has, and a network cannot be changed: \
         remove the stack first, or give the network another name"
    )]
    NetworkDiffers {
        /// The network's full name.
        name: String,
    },
    /// One of its secrets or configs is refused, so nothing is touched.
    #[error("{kind} {name}: {error}", kind = .kind.name())]
    Payload {
        /// A secret or a config.
        kind: Kind,
        /// Its full name.
        name: String,
        /// Why.
        error: secrets::Error,
    },
    /// Create some of them by themselves, and name them in the file as external.
    #[error(
        "the secrets and configs of the stack have {n_bytes} bytes, more than {}: create some by themselves, and make \
         them external in the file",
        payloads::BYTES_MAX
    )]
    TooLarge {
        /// How many.
        n_bytes: usize,
    },
    /// Two of its parts contradict each other.
    #[error("{kind} {name}: {refusal}", kind = .kind.name())]
    Refused {
        /// What it is.
        kind: Kind,
        /// Its full name.
        name: String,
        /// What the store says.
        refusal: Refusal,
    },
    /// Two parts of the file have one name.
    #[error("the stack has two {kind}s named {name}", kind = .kind.name())]
    Twice {
        /// What they are.
        kind: Kind,
        /// The name.
        name: String,
    },
    /// Neither a stored stack nor a service or a network with its label.
    #[error("nothing found in stack: {name}")]
    NotFound {
        /// The stack.
        name: String,
    },
    /// The name is part of every service's name.
    #[error("invalid stack name: {name:?}")]
    Name {
        /// The name.
        name: String,
    },
}

/// What a deploy does, by the full names of services and networks.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Deployment {
    /// One transaction; empty where nothing changes.
    pub actions: Vec<Action>,
    /// Services that are new.
    pub created: Vec<String>,
    /// Services with another spec.
    pub updated: Vec<String>,
    /// Services that are as the file says.
    pub unchanged: Vec<String>,
    /// Services that go.
    pub removed: Vec<String>,
    /// Networks that are new.
    pub created_networks: Vec<String>,
    /// What became of secrets.
    pub secrets: Deployed,
    /// What became of configs.
    pub configs: Deployed,
}

/// The actions that make a stack what `spec` says.
pub fn deploy(
    state: &State,
    mut spec: StackSpec,
    prune: bool,
    now: Timestamp,
    rng: &mut impl Rng,
) -> Result<Deployment, Error> {
    if spec.name.is_empty() || spec.name.contains(|c: char| c.is_whitespace() || c == '/') {
        return Err(Error::Name { name: spec.name });
    }
    payloads::check_size(&spec)?;
    let mut deployment = Deployment::default();
    // Each service is checked against what the ones before it take, such as ports.
    let mut scratch = state.clone();
    let names = names(Kind::Service, spec.services.iter().map(|service| &*service.name))?;
    let networks = self::names(Kind::Network, spec.networks.iter().map(|network| &*network.name))?;
    if prune {
        let gone = service::of_stack(state, &spec.name)
            .filter(|service| !names.contains(&service.spec.name.as_str()));
        for service in gone {
            let name = service.spec.name.clone();
            if let Some(action) = service::remove(service) {
                deployment.add(&mut scratch, now, (Kind::Service, &name), action)?;
            }
            deployment.removed.push(name);
        }
    }
    for network in &spec.networks {
        deploy_network(&mut deployment, &mut scratch, &spec.name, network, now, rng)?;
    }
    let part = payloads::Deploy { stack: &spec.name, services: &names, now };
    payloads::deploy::<Secret>(&mut deployment, &mut scratch, &part, &spec.secrets, rng)?;
    payloads::deploy::<Config>(&mut deployment, &mut scratch, &part, &spec.configs, rng)?;
    for service in &spec.services {
        deploy_service(&mut deployment, &mut scratch, &spec.name, service, now, rng)?;
    }
    if prune {
        prune_networks(&mut deployment, &mut scratch, &spec.name, &networks, now)?;
        let (changes, view) = (&mut deployment, &mut scratch);
        payloads::prune::<Secret>(changes, view, &spec.name, &spec.secrets, now)?;
        payloads::prune::<Config>(changes, view, &spec.name, &spec.configs, now)?;
    }
    // Their bytes are theirs alone.
    spec.secrets.iter_mut().for_each(|secret| secret.data = None);
    spec.configs.iter_mut().for_each(|config| config.data = None);
    let stored = state.id_by_name(Kind::Stack, &spec.name).and_then(|id| state.stack(StackId(id)));
    if stored.is_none_or(|stored| stored.spec != spec) {
        let id = stored.map_or_else(|| StackId::random(rng), |stored| stored.id);
        let expect = stored.map_or(Expect::Absent, |stored| Expect::Version(stored.meta.version));
        let object = Object::Stack(Box::new(Stack { id, meta: Meta::default(), spec }));
        deployment.actions.push(Action::Put { object, expect });
    }
    Ok(deployment)
}

/// The names of the file's parts of one kind, which must differ.
fn names<'a>(kind: Kind, names: impl Iterator<Item = &'a str>) -> Result<BTreeSet<&'a str>, Error> {
    let mut known = BTreeSet::new();
    for name in names {
        if !known.insert(name) {
            return Err(Error::Twice { kind, name: name.to_owned() });
        }
    }
    Ok(known)
}

fn deploy_network(
    deployment: &mut Deployment,
    scratch: &mut State,
    stack: &str,
    spec: &NetworkSpec,
    now: Timestamp,
    rng: &mut impl Rng,
) -> Result<(), Error> {
    let name = spec.name.clone();
    let mut spec = spec.clone();
    spec.labels.get_or_insert_default().insert(NAMESPACE_LABEL.to_owned(), stack.to_owned());
    if let Some(old) = network::of_stack(scratch, stack).find(|old| old.spec.name == name) {
        return if old.spec == spec { Ok(()) } else { Err(Error::NetworkDiffers { name }) };
    }
    let created = network::create(scratch, NetworkId::random(rng), spec);
    let (_, action) = created.map_err(|error| Error::Network { name: name.clone(), error })?;
    deployment.add(scratch, now, (Kind::Network, &name), action)?;
    deployment.created_networks.push(name);
    Ok(())
}

/// Removes the stack's networks that the file does not have, but for those that other services are on.
/// Tasks of the services that have just left one may end there.
fn prune_networks(
    deployment: &mut Deployment,
    scratch: &mut State,
    stack: &str,
    kept: &BTreeSet<&str>,
    now: Timestamp,
) -> Result<(), Error> {
    let networks = network::of_stack(scratch, stack);
    let gone: Vec<_> = networks.filter(|old| !kept.contains(&*old.spec.name)).cloned().collect();
    for network in gone {
        if let Some(action) = network::prune(scratch, &network) {
            deployment.add(scratch, now, (Kind::Network, &network.spec.name), action)?;
        }
    }
    Ok(())
}

fn deploy_service(
    deployment: &mut Deployment,
    scratch: &mut State,
    stack: &str,
    spec: &ServiceSpec,
    now: Timestamp,
    rng: &mut impl Rng,
) -> Result<(), Error> {
    let name = spec.name.clone();
    let refused =
        |error: service::Error| Error::Service { name: name.clone(), error: Box::new(error) };
    let mut spec = spec.clone();
    spec.labels.get_or_insert_default().insert(NAMESPACE_LABEL.to_owned(), stack.to_owned());
    let old = service::of_stack(scratch, stack).find(|service| service.spec.name == name).cloned();
    let Some(old) = old else {
        let (_, action) =
            service::create(scratch, ServiceId::random(rng), spec).map_err(refused)?;
        deployment.add(scratch, now, (Kind::Service, &name), action)?;
        deployment.created.push(name);
        return Ok(());
    };
    // A forced update is the operator's, not the file's: a deploy must not undo it.
    let force_update = &mut spec.task_template.force_update;
    *force_update = force_update.or(old.spec.task_template.force_update);
    match service::update(scratch, &old, old.meta.version, spec).map_err(refused)? {
        Some(action) => {
            deployment.add(scratch, now, (Kind::Service, &name), action)?;
            deployment.updated.push(name);
        }
        None => deployment.unchanged.push(name),
    }
    Ok(())
}

impl Deployment {
    fn add(
        &mut self,
        scratch: &mut State,
        now: Timestamp,
        (kind, name): (Kind, &str),
        action: Action,
    ) -> Result<(), Error> {
        let index = scratch.version().index + 1;
        let (outcome, _) = scratch.apply(index, &Command::new(now, vec![action.clone()]));
        if let Outcome::Refused(refusal) = outcome {
            return Err(Error::Refused { kind, name: name.to_owned(), refusal });
        }
        self.actions.push(action);
        Ok(())
    }
}

/// What the removal of a stack does.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Removal {
    /// One transaction.
    pub actions: Vec<Action>,
    /// Full names of its services.
    pub services: Vec<String>,
    /// Full names of its networks.
    pub networks: Vec<String>,
    /// Full names of its secrets.
    pub secrets: Vec<String>,
    /// Full names of its configs.
    pub configs: Vec<String>,
}

/// The actions that remove a stack: all of it or, where something of it is used by others, nothing.
pub fn remove(state: &State, name: &str, now: Timestamp) -> Result<Removal, Error> {
    let services: Vec<_> = service::of_stack(state, name).collect();
    let networks: Vec<_> = network::of_stack(state, name).collect();
    let stored = state.id_by_name(Kind::Stack, name);
    let has_parts = !services.is_empty() || !networks.is_empty() || payloads::are_any(state, name);
    if !has_parts && stored.is_none() {
        return Err(Error::NotFound { name: name.to_owned() });
    }
    let mut deployment = Deployment::default();
    // Networks are looked at without the services that go.
    let mut scratch = state.clone();
    for service in &services {
        if let Some(action) = service::remove(service) {
            deployment.add(&mut scratch, now, (Kind::Service, &service.spec.name), action)?;
        }
    }
    for network in &networks {
        let name = &network.spec.name;
        let removed = network::remove(&scratch, network);
        let action = removed.map_err(|error| Error::Network { name: name.clone(), error })?;
        if let Some(action) = action {
            deployment.add(&mut scratch, now, (Kind::Network, name), action)?;
        }
    }
    payloads::remove::<Secret>(&mut deployment, &mut scratch, name, now)?;
    payloads::remove::<Config>(&mut deployment, &mut scratch, name, now)?;
    let mut actions = deployment.actions;
    actions.extend(stored.map(|id| Action::Delete { kind: Kind::Stack, id }));
    Ok(Removal {
        actions,
        services: services.iter().map(|service| service.spec.name.clone()).collect(),
        networks: networks.iter().map(|network| network.spec.name.clone()).collect(),
        secrets: deployment.secrets.removed,
        configs: deployment.configs.removed,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use skep_common::spec::SecretSpec;

    use super::*;
    use crate::testing::{World, service as web};

    fn file(services: &[(&str, &str, u16)]) -> StackSpec {
        let service = |(name, image, port): &(&str, &str, u16)| {
            serde_json::from_value(json!({
                "Name": format!("shop_{name}"),
                "TaskTemplate": {"ContainerSpec": {"Image": image}},
                "EndpointSpec": {"Ports": [{"TargetPort": 80, "PublishedPort": port}]},
            }))
            .unwrap()
        };
        let services = services.iter().map(service).collect();
        StackSpec { name: "shop".to_owned(), services, ..StackSpec::default() }
    }

    /// Words of a deploy that is committed: `+` created, `*` updated, `=` unchanged, `-` removed.
    fn step(world: &mut World, spec: StackSpec, prune: bool) -> String {
        let deployed = deploy(&world.state, spec, prune, world.now, &mut world.rng);
        let deployment = match deployed {
            Ok(deployment) => deployment,
            Err(error) => return error.to_string(),
        };
        let mut words = Vec::new();
        for (mark, names) in [
            ("+", &deployment.created),
            ("*", &deployment.updated),
            ("=", &deployment.unchanged),
            ("-", &deployment.removed),
        ] {
            words.extend(names.iter().map(|name| format!("{mark}{}", &name[5..])));
        }
        world.apply(deployment.actions);
        words.join(" ")
    }

    #[test]
    fn a_deploy_is_one_transaction_that_touches_only_what_differs() {
        let mut world = World::new("1", web(0), "");
        let two = [("a", "i:1", 80), ("b", "i:1", 81)];
        assert_eq!(step(&mut world, file(&two), false), "+a +b");
        let version = world.state.version();
        assert_eq!(step(&mut world, file(&two), false), "=a =b");
        assert_eq!(world.state.version(), version, "nothing to write");
        let changed = [("a", "i:2", 80), ("b", "i:1", 81)];
        assert_eq!(step(&mut world, file(&changed), false), "*a =b");
        let one = &changed[..1];
        assert_eq!(step(&mut world, file(one), false), "=a", "docker does not prune unless asked");
        assert!(world.state.service_by_name("shop_b").is_some_and(|b| !b.pending_delete));
        let swapped = [("a", "i:2", 80), ("c", "i:1", 81)];
        assert_eq!(step(&mut world, file(&swapped), true), "+c =a -b", "its port is free at once");
        let conflict = [("a", "i:2", 80), ("d", "i:1", 80)];
        let text = step(&mut world, file(&conflict), false);
        assert!(text.starts_with("service shop_d: port '80' (tcp) is already in use"), "{text}");
        assert!(world.state.service_by_name("shop_d").is_none(), "all or nothing");
    }

    #[test]
    fn a_stack_can_be_deployed_again_while_it_is_being_removed() {
        let mut world = World::new("1", web(0), "");
        let file = file(&[("a", "i:1", 80)]);
        assert_eq!(step(&mut world, file.clone(), false), "+a");
        world.step();
        let id = world.state.service_by_name("shop_a").unwrap().id;
        let task = world.state.tasks_of_service(id).next().unwrap().clone();
        assert!(task.status.err.contains("no image named i:1"), "{}", task.status.err);
        let removal = remove(&world.state, "shop", world.now).unwrap();
        assert_eq!(removal.services, ["shop_a"]);
        world.apply(removal.actions);
        assert_eq!(
            remove(&world.state, "shop", world.now),
            Err(Error::NotFound { name: "shop".to_owned() })
        );
        assert_eq!(step(&mut world, file, false), "+a");
        let service = world.state.service_by_name("shop_a").unwrap();
        assert_eq!((service.id, service.pending_delete), (id, false));
        assert_eq!(service.endpoint.ports[0].published_port, Some(80));
    }

    /// The file with a secret that service `a` finds, and whether service `b` does.
    fn with_secret(data: &str, has_b: bool) -> StackSpec {
        let mut file = file(&[("a", "i:1", 80), ("b", "i:1", 81)]);
        if !has_b {
            file.services.pop();
        }
        for service in &mut file.services {
            let reference = json!([{"SecretName": "shop_key", "File": {"Name": "key"}}]);
            let container = service.task_template.container_spec.as_mut().unwrap();
            container.secrets = serde_json::from_value(reference).unwrap();
        }
        let data = Some(skep_common::spec::Base64(data.as_bytes().to_vec()));
        let spec = SecretSpec { name: "shop_key".to_owned(), data, ..SecretSpec::default() };
        StackSpec { secrets: vec![spec], ..file }
    }

    #[test]
    fn changed_bytes_are_a_version_and_unchanged_ones_change_nothing() {
        let mut world = World::new("1", web(0), "");
        assert_eq!(step(&mut world, with_secret("one", true), false), "+a +b");
        let version = world.state.version();
        assert_eq!(step(&mut world, with_secret("one", true), false), "=a =b");
        assert_eq!(world.state.version(), version, "nothing to write");
        let old = world.state.service_by_name("shop_a").unwrap().spec.clone();
        assert_eq!(
            step(&mut world, with_secret("two", false), false),
            "*b *a",
            "b is not in the file"
        );
        for name in ["shop_a", "shop_b"] {
            let service = world.state.service_by_name(name).unwrap();
            let keys: Vec<u64> =
                secrets::keys_of(&service.spec.task_template).map(|key| key.version).collect();
            assert_eq!(keys, [2], "{name}");
        }
        let previous = world.state.service_by_name("shop_a").unwrap().previous_spec.clone();
        assert_eq!(previous, Some(old), "it was updated once");
        let stored = world.state.stacks().values().next().unwrap();
        assert_eq!(stored.spec.secrets[0].data, None);
        let without = file(&[("a", "i:1", 80)]);
        assert_eq!(step(&mut world, without, true), "*a -b");
        assert_eq!(world.state.secrets().len(), 0, "nobody uses it any more");
    }

    #[test]
    fn a_stack_goes_with_its_secrets_unless_others_use_them() {
        let mut world = World::new("1", web(0), "");
        step(&mut world, with_secret("one", true), false);
        let mut other = with_secret("one", false).services.remove(0);
        other.name = "other".to_owned();
        other.endpoint_spec = None;
        let (other_id, action) = service::create(&world.state, ServiceId(1), other).unwrap();
        world.apply(vec![action]);
        assert_eq!(
            remove(&world.state, "shop", world.now).unwrap_err().to_string(),
            "secret shop_key: secret 'shop_key' is in use by the following service: other"
        );
        let other = world.state.service(other_id).unwrap().clone();
        world.apply(vec![service::remove(&other).unwrap()]);
        let removal = remove(&world.state, "shop", world.now).unwrap();
        assert_eq!(removal.secrets, ["shop_key"]);
        world.apply(removal.actions);
        assert_eq!(world.state.secrets().len(), 0);
    }

    #[test]
    fn a_secret_of_somebody_else_is_not_taken() {
        let mut world = World::new("1", web(0), "");
        let spec = with_secret("one", true).secrets.remove(0);
        let action = secrets::create::<Secret>(&world.state, 1, spec, world.now).unwrap();
        world.apply(vec![action]);
        let text = step(&mut world, with_secret("two", true), false);
        assert_eq!(text, "secret shop_key: secret shop_key already exists");
        let mut large = with_secret("x", true);
        let bytes = vec![0; 500_000];
        large.secrets[0].data = Some(skep_common::spec::Base64(bytes));
        large.secrets = vec![large.secrets[0].clone(); 17];
        let text = step(&mut world, large, false);
        assert!(
            text.starts_with("the secrets and configs of the stack have 8500000 bytes"),
            "{text}"
        );
    }

    #[test]
    fn a_forced_update_survives_a_deploy() {
        let mut world = World::new("1", web(0), "");
        let file = file(&[("a", "i:1", 80)]);
        step(&mut world, file.clone(), false);
        let mut service = (**world.state.service_by_name("shop_a").unwrap()).clone();
        service.spec.task_template.force_update = Some(3);
        world.replace(Object::Service(Box::new(service)));
        assert_eq!(step(&mut world, file, false), "=a");
    }

    /// The file with services on networks, each made of the words of its spec.
    fn on(networks: &[(&str, serde_json::Value)], service_on: &[&str]) -> StackSpec {
        let mut file = file(&[("a", "i:1", 80)]);
        let targets = service_on.iter().map(|target| json!({"Target": target})).collect();
        let targets: serde_json::Value = serde_json::Value::Array(targets);
        file.services[0].task_template.networks = serde_json::from_value(targets).unwrap();
        file.networks = networks
            .iter()
            .map(|(name, spec)| {
                let spec: NetworkSpec = serde_json::from_value(spec.clone()).unwrap();
                NetworkSpec { name: (*name).to_owned(), ..spec }
            })
            .collect();
        file
    }

    #[test]
    fn networks_come_and_go_with_their_stack() {
        let mut world = World::new("1", web(0), "");
        let ids = |world: &World| {
            let id = |name| world.state.network_by_name(name).map(|network| network.id);
            ["shop_front", "shop_back"].map(id)
        };
        let plain = || json!({});
        let both = on(&[("shop_front", plain()), ("shop_back", plain())], &["shop_front"]);
        assert_eq!(step(&mut world, both.clone(), false), "+a");
        let [Some(front), Some(back)] = ids(&world) else { panic!("both are made") };
        assert_eq!(step(&mut world, both.clone(), false), "=a");
        assert_eq!(ids(&world), [Some(front), Some(back)], "they are the same ones");

        let other = on(&[("shop_front", json!({"Internal": true}))], &["shop_front"]);
        let text = step(&mut world, other, false);
        assert!(text.starts_with("network shop_front of the file differs from the one"), "{text}");
        let one = on(&[("shop_front", plain())], &["shop_front"]);
        assert_eq!(step(&mut world, one.clone(), false), "=a");
        assert_eq!(ids(&world), [Some(front), Some(back)], "kept unless asked");
        assert_eq!(step(&mut world, one.clone(), true), "=a");
        assert_eq!(ids(&world), [Some(front), None]);
        let unknown = on(&[("shop_front", plain())], &["outside"]);
        assert_eq!(step(&mut world, unknown, false), "service shop_a: network outside not found");

        // Who is not of the stack keeps it whole.
        let mut guest = on(&[], &["shop_front"]).services.remove(0);
        guest.name = "guest".to_owned();
        guest.endpoint_spec = None;
        let (id, action) = service::create(&world.state, ServiceId(77), guest).unwrap();
        world.apply(vec![action]);
        let text = remove(&world.state, "shop", world.now).unwrap_err().to_string();
        assert_eq!(text, "network shop_front: network shop_front is in use by service guest");
        let guest = world.state.service(id).unwrap().clone();
        world.apply(service::remove(&guest).into_iter().collect());
        let removal = remove(&world.state, "shop", world.now).unwrap();
        assert_eq!(removal.networks, ["shop_front"]);
        world.apply(removal.actions);
        assert_eq!(ids(&world), [None, None]);
        assert_eq!(step(&mut world, both, false), "+a", "at once");
        assert_ne!(ids(&world)[0], Some(front), "a network of its own");
    }

    #[test]
    fn what_is_wrong_with_a_stack_is_named() {
        let mut world = World::new("1", web(0), "");
        let twice = file(&[("a", "i:1", 80), ("a", "i:1", 81)]);
        assert_eq!(step(&mut world, twice, false), "the stack has two services named shop_a");
        let invalid = file(&[("a", "", 80)]);
        let text = step(&mut world, invalid, false);
        assert_eq!(text, "service shop_a: ContainerSpec: image reference must be provided");
        let unnamed = StackSpec { name: "a b".to_owned(), ..StackSpec::default() };
        assert_eq!(step(&mut world, unnamed, false), "invalid stack name: \"a b\"");
    }
}
