//! Deploys and removes a stack: its services, in one transaction.
//!
//! A stack is a stored object; its services also carry Docker's label, so that its clients see them,
//! and so that what `docker stack deploy` made is adopted. As there, services that a file no longer
//! has are removed only where `prune` is asked. Source: docker/cli `cli/command/stack`.

use rand::Rng;
use skep_common::spec::{ServiceSpec, StackSpec};
use skep_common::{Kind, Meta, Object, ServiceId, Stack, StackId, Timestamp};

use crate::command::{Action, Command, Expect, Outcome, Refusal};
use crate::service;
use crate::store::State;

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
        error: service::Error,
    },
    /// Two of its services contradict each other.
    #[error("service {name}: {refusal}")]
    Refused {
        /// The service's full name.
        name: String,
        /// What the store says.
        refusal: Refusal,
    },
    /// Two services of the file have one name.
    #[error("the stack has two services named {name}")]
    Twice {
        /// The name.
        name: String,
    },
    /// Neither a stored stack nor a service with its label.
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

/// What a deploy does, by the services' full names.
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
}

/// The actions that make a stack what `spec` says.
pub fn deploy(
    state: &State,
    spec: StackSpec,
    prune: bool,
    now: Timestamp,
    rng: &mut impl Rng,
) -> Result<Deployment, Error> {
    if spec.name.is_empty() || spec.name.contains(|c: char| c.is_whitespace() || c == '/') {
        return Err(Error::Name { name: spec.name });
    }
    let mut deployment = Deployment::default();
    // Each service is checked against what the ones before it take, such as ports.
    let mut scratch = state.clone();
    let names: Vec<&str> = spec.services.iter().map(|service| service.name.as_str()).collect();
    if let Some(name) = names.iter().enumerate().find(|(n, name)| names[..*n].contains(*name)) {
        return Err(Error::Twice { name: (*name.1).to_owned() });
    }
    if prune {
        let gone = service::of_stack(state, &spec.name)
            .filter(|service| !names.contains(&service.spec.name.as_str()));
        for service in gone {
            let name = service.spec.name.clone();
            if let Some(action) = service::remove(service) {
                deployment.add(&mut scratch, now, &name, action)?;
            }
            deployment.removed.push(name);
        }
    }
    for service in &spec.services {
        deploy_service(&mut deployment, &mut scratch, &spec.name, service, now, rng)?;
    }
    let stored = state.id_by_name(Kind::Stack, &spec.name).and_then(|id| state.stack(StackId(id)));
    if stored.is_none_or(|stored| stored.spec != spec) {
        let id = stored.map_or_else(|| StackId::random(rng), |stored| stored.id);
        let expect = stored.map_or(Expect::Absent, |stored| Expect::Version(stored.meta.version));
        let object = Object::Stack(Box::new(Stack { id, meta: Meta::default(), spec }));
        deployment.actions.push(Action::Put { object, expect });
    }
    Ok(deployment)
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
    let refused = |error| Error::Service { name: name.clone(), error };
    let mut spec = spec.clone();
    spec.labels.get_or_insert_default().insert(NAMESPACE_LABEL.to_owned(), stack.to_owned());
    let old = service::of_stack(scratch, stack).find(|service| service.spec.name == name).cloned();
    let Some(old) = old else {
        let (_, action) =
            service::create(scratch, ServiceId::random(rng), spec).map_err(refused)?;
        deployment.add(scratch, now, &name, action)?;
        deployment.created.push(name);
        return Ok(());
    };
    // A forced update is the operator's, not the file's: a deploy must not undo it.
    let force_update = &mut spec.task_template.force_update;
    *force_update = force_update.or(old.spec.task_template.force_update);
    match service::update(scratch, &old, old.meta.version, spec).map_err(refused)? {
        Some(action) => {
            deployment.add(scratch, now, &name, action)?;
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
        name: &str,
        action: Action,
    ) -> Result<(), Error> {
        let index = scratch.version().index + 1;
        let (outcome, _) = scratch.apply(index, &Command::new(now, vec![action.clone()]));
        if let Outcome::Refused(refusal) = outcome {
            return Err(Error::Refused { name: name.to_owned(), refusal });
        }
        self.actions.push(action);
        Ok(())
    }
}

/// The actions that remove a stack, and the names of its services.
pub fn remove(state: &State, name: &str) -> Result<(Vec<Action>, Vec<String>), Error> {
    let services: Vec<_> = service::of_stack(state, name).collect();
    let stored = state.id_by_name(Kind::Stack, name);
    if services.is_empty() && stored.is_none() {
        return Err(Error::NotFound { name: name.to_owned() });
    }
    let names = services.iter().map(|service| service.spec.name.clone()).collect();
    let mut actions: Vec<Action> =
        services.into_iter().filter_map(|service| service::remove(service)).collect();
    actions.extend(stored.map(|id| Action::Delete { kind: Kind::Stack, id }));
    Ok((actions, names))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
        let (actions, removed) = remove(&world.state, "shop").unwrap();
        assert_eq!(removed, ["shop_a"]);
        world.apply(actions);
        assert_eq!(remove(&world.state, "shop"), Err(Error::NotFound { name: "shop".to_owned() }));
        assert_eq!(step(&mut world, file, false), "+a");
        let service = world.state.service_by_name("shop_a").unwrap();
        assert_eq!((service.id, service.pending_delete), (id, false));
        assert_eq!(service.endpoint.ports[0].published_port, Some(80));
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
