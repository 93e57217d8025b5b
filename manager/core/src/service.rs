//! What becomes of a service when it is created, updated, rolled back or removed.
//!
//! Each function makes the action that a control API proposes; the store checks once more what may
//! have changed in between (names, ports, versions). Source: SwarmKit `manager/controlapi/service.go`.

use skep_common::object::UpdateStatus;
use skep_common::spec::{ModeKind, ServiceSpec};
use skep_common::{Meta, Object, Service, ServiceId, Timestamp, Version};

use crate::command::{Action, Expect};
use crate::store::State;
use crate::{image, level, network, ports, secrets, validate};

/// Why a request about a service is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The spec cannot be run as asked.
    #[error(transparent)]
    Invalid(#[from] validate::Error),
    /// A port cannot be published.
    #[error(transparent)]
    Port(#[from] ports::Error),
    /// It cannot be on its networks.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// Choose another name, or update that service.
    #[error("name conflicts with an existing object: service {name} already exists")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Create a new service instead.
    #[error("renaming services is not supported")]
    Rename,
    /// Create a new service instead.
    #[error("service mode change is not allowed")]
    ModeChange,
    /// There was no update yet, or it was rolled back already.
    #[error("service {name} does not have a previous spec")]
    NoPreviousSpec {
        /// Its name.
        name: String,
    },
    /// Choose one of those that are kept; there are none from before all managers could keep them.
    #[error("service {name} has no revision {number} to go back to: {}", choice(known))]
    NoSuchRevision {
        /// Its name.
        name: String,
        /// What was asked for.
        number: u64,
        /// The numbers that it has.
        known: Vec<u64>,
    },
    /// It was removed, and only waits for its tasks to stop.
    #[error("service {name} is being removed")]
    BeingRemoved {
        /// Its name.
        name: String,
    },
}

fn choice(known: &[u64]) -> String {
    let known: Vec<String> = known.iter().map(u64::to_string).collect();
    match known.is_empty() {
        true => "no earlier one is kept".to_owned(),
        false => format!("choose one of {}", known.join(", ")),
    }
}

/// A service made of `spec`. Where one of that name is still being removed, it is taken over: its id
/// stays, its old tasks go on stopping, and new ones start after them.
pub fn create(
    state: &State,
    id: ServiceId,
    mut spec: ServiceSpec,
) -> Result<(ServiceId, Action), Error> {
    validate::service_spec(&spec)?;
    network::resolve(state, &mut spec)?;
    secrets::resolve(state, &mut spec)?;
    let mut service = Service {
        id,
        meta: Meta::default(),
        spec: pinned(state, spec),
        previous_spec: None,
        spec_version: Version::default(),
        update_status: None,
        endpoint: skep_common::object::Endpoint::default(),
        pending_delete: false,
        conditions: Vec::new(),
        job_status: None,
        revision: u64::from(keeps_revisions(state)),
    };
    let mut expect = Expect::Absent;
    if let Some(old) = state.service_by_name(&service.spec.name) {
        if !old.pending_delete {
            return Err(Error::NameTaken { name: old.spec.name.clone() });
        }
        service.id = old.id;
        expect = Expect::Version(old.meta.version);
    }
    allocate(state, &mut service)?;
    Ok((service.id, put(service, expect)))
}

/// The service with a new spec; its tasks are replaced as its update policy says. `version` is what
/// the caller read; `None` where a spec like the stored one changes nothing. Where its update is paused,
/// such a spec lets it go on.
pub fn update(
    state: &State,
    service: &Service,
    version: Version,
    mut spec: ServiceSpec,
) -> Result<Option<Action>, Error> {
    validate::service_spec(&spec)?;
    if service.pending_delete {
        return Err(Error::BeingRemoved { name: service.spec.name.clone() });
    }
    if spec.name != service.spec.name {
        return Err(Error::Rename);
    }
    let mode = |spec: &ServiceSpec| spec.mode_kind().map(|kind| std::mem::discriminant(&kind));
    if mode(&spec) != mode(&service.spec) {
        return Err(Error::ModeChange);
    }
    network::resolve(state, &mut spec)?;
    secrets::resolve(state, &mut spec)?;
    let spec = keep_pin(state, &service.spec, spec);
    if spec == service.spec && version == service.meta.version {
        return Ok(is_paused(service).then(|| resumed(service, version)));
    }
    let mut new = service.clone();
    new.previous_spec = Some(service.spec.clone());
    new.update_status = None;
    new.spec = spec;
    number(state, &mut new);
    allocate(state, &mut new)?;
    Ok(Some(put(new, Expect::Version(version))))
}

pub(crate) fn is_paused(service: &Service) -> bool {
    let status = service.update_status.as_ref().map(|status| status.state.as_str());
    matches!(status, Some("paused" | "rollback_paused"))
}

/// The service whose update starts anew with what it has not replaced yet.
fn resumed(service: &Service, version: Version) -> Action {
    let mut new = service.clone();
    if new.update_status.as_ref().is_some_and(|status| status.state == "rollback_paused") {
        new.previous_spec = None; // It is what the service came from: no failure leads back there.
    }
    new.update_status = None;
    put(new, Expect::Version(version))
}

/// The service with its previous spec; asked a second time, it goes forward again.
pub fn rollback(
    state: &State,
    service: &Service,
    version: Version,
    now: Timestamp,
) -> Result<Action, Error> {
    let none = || Error::NoPreviousSpec { name: service.spec.name.clone() };
    let spec = match service.pending_delete {
        true => service.spec.clone(), // Refused for that.
        false => service.previous_spec.clone().ok_or_else(none)?,
    };
    go_back(state, service, version, spec, now)
}

/// The service with the spec of a revision, which becomes a new one.
pub fn rollback_to(
    state: &State,
    service: &Service,
    version: Version,
    number: u64,
    now: Timestamp,
) -> Result<Action, Error> {
    let revisions = || state.revisions_of(service.id);
    let found = revisions().find(|revision| revision.number == number);
    let spec =
        found.map(|revision| revision.spec.clone()).ok_or_else(|| Error::NoSuchRevision {
            name: service.spec.name.clone(),
            number,
            known: revisions().map(|revision| revision.number).collect(),
        })?;
    go_back(state, service, version, spec, now)
}

fn go_back(
    state: &State,
    service: &Service,
    version: Version,
    spec: ServiceSpec,
    now: Timestamp,
) -> Result<Action, Error> {
    if service.pending_delete {
        return Err(Error::BeingRemoved { name: service.spec.name.clone() });
    }
    let mut new = service.clone();
    new.previous_spec = Some(std::mem::replace(&mut new.spec, spec));
    // A job has no update that would end: it begins anew.
    let is_job = new.spec.mode_kind().is_some_and(ModeKind::is_job);
    new.update_status = (!is_job).then(|| UpdateStatus {
        state: "rollback_started".to_owned(),
        started_at: Some(now),
        completed_at: None,
        message: "manually requested rollback".to_owned(),
    });
    network::resolve(state, &mut new.spec)?;
    secrets::are_there(state, &new.spec)?;
    number(state, &mut new);
    allocate(state, &mut new)?;
    Ok(put(new, Expect::Version(version)))
}

/// Whether all managers keep the specs that services had.
fn keeps_revisions(state: &State) -> bool {
    level::of_managers(state) >= level::CONTROL
}

/// Gives the service a number where it has none yet, which makes the store keep what it was.
pub(crate) fn number(state: &State, service: &mut Service) {
    if keeps_revisions(state) {
        service.revision = service.revision.max(1);
    }
}

/// The service on its way out: its tasks are stopped and erased, then it is. Its ports and virtual
/// addresses are free at once. `None` where it is on its way already.
pub fn remove(service: &Service) -> Option<Action> {
    if service.pending_delete {
        return None;
    }
    let mut new = service.clone();
    new.pending_delete = true;
    new.endpoint.ports.clear();
    new.endpoint.virtual_ips.clear();
    Some(put(new, Expect::Present))
}

/// Gives the service the ports and the virtual addresses of its spec; those that it has are kept.
fn allocate(state: &State, service: &mut Service) -> Result<(), Error> {
    service.endpoint.ports = ports::allocate(state, service)?;
    service.endpoint.virtual_ips = network::virtual_ips(state, service);
    Ok(())
}

fn put(service: Service, expect: Expect) -> Action {
    Action::Put { object: Object::Service(Box::new(service)), expect }
}

/// The spec with its image pinned to what the name means now; where the swarm does not know it, with the
/// tag that it means. Source: moby `client/service_create.go`, `resolveContainerSpecImage`.
fn pinned(state: &State, mut spec: ServiceSpec) -> ServiceSpec {
    if let Some(container) = &mut spec.task_template.container_spec {
        let pinned = image::pin(state, &container.image);
        container.image = pinned.unwrap_or_else(|| image::tagged(&container.image));
    }
    spec
}

/// As [`pinned`]; an image that the swarm no longer knows by this name keeps the pin that it had.
fn keep_pin(state: &State, old: &ServiceSpec, new: ServiceSpec) -> ServiceSpec {
    let mut spec = pinned(state, new);
    let old_image = old.task_template.container_spec.as_ref().map(|container| &container.image);
    if let (Some(container), Some(old_image)) = (&mut spec.task_template.container_spec, old_image)
        && image::split_digest(old_image).1.is_some()
        && image::tagged(old_image) == image::tagged(&container.image)
        && image::split_digest(&container.image).1.is_none()
    {
        container.image.clone_from(old_image);
    }
    spec
}

/// The services of a stack, by name, without those that are being removed.
pub fn of_stack<'a>(
    state: &'a State,
    stack: &'a str,
) -> impl Iterator<Item = &'a std::sync::Arc<Service>> {
    let is_of = move |service: &&std::sync::Arc<Service>| {
        let labels = service.spec.labels.as_ref();
        let label = labels.and_then(|labels| labels.get(crate::stack::NAMESPACE_LABEL));
        !service.pending_delete && label.is_some_and(|label| label == stack)
    };
    state.services().values().filter(is_of)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use skep_common::Kind;

    use super::*;
    use crate::testing::{World, node, service as web};
    use crate::{Outcome, Refusal};

    fn spec(part: &serde_json::Value) -> ServiceSpec {
        let mut whole = json!({"Name": "api", "TaskTemplate": {"ContainerSpec": {"Image": "i"}}});
        whole.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
        serde_json::from_value(whole).unwrap()
    }

    fn created() -> (World, ServiceId) {
        let mut world = World::new("1", web(0), "");
        let (id, action) = create(&world.state, ServiceId(1), spec(&json!({}))).unwrap();
        world.apply(vec![action]);
        (world, id)
    }

    #[test]
    fn a_name_that_becomes_free_meanwhile_is_a_race_that_the_next_view_decides() {
        let (mut world, id) = created();
        let action = remove(world.state.service(id).unwrap()).unwrap();
        world.apply(vec![action]);
        let view = world.state.clone();
        let (reused, action) = create(&view, ServiceId(2), spec(&json!({}))).unwrap();
        assert_eq!(reused, id, "it takes the place of the one that is being removed");
        world.apply(vec![Action::Delete { kind: Kind::Service, id: id.0 }]);
        let version = world.state.version().index + 1;
        let command = crate::Command::new(world.now, vec![action]);
        let (outcome, _) = world.state.apply(version, &command);
        let Outcome::Refused(refusal) = outcome else { panic!("{outcome:?}") };
        assert_eq!(refusal, Refusal::NotFound { kind: Kind::Service });
        assert!(refusal.is_race());
        let (fresh, action) = create(&world.state, ServiceId(2), spec(&json!({}))).unwrap();
        assert_eq!(fresh, ServiceId(2));
        world.apply(vec![action]);
        assert!(!world.state.service(fresh).unwrap().pending_delete);
    }

    #[test]
    fn what_is_not_allowed_is_refused_in_swarms_words() {
        let (world, id) = created();
        let service = world.state.service(id).unwrap();
        let refused = |part: serde_json::Value| {
            let result = update(&world.state, service, service.meta.version, spec(&part));
            result.map(|_| ()).unwrap_err().to_string()
        };
        assert_eq!(refused(json!({"Name": "b"})), "renaming services is not supported");
        assert_eq!(refused(json!({"Mode": {"Global": {}}})), "service mode change is not allowed");
        assert_eq!(
            create(&world.state, ServiceId(2), spec(&json!({}))).unwrap_err().to_string(),
            "name conflicts with an existing object: service api already exists"
        );
        assert_eq!(
            rollback(&world.state, service, service.meta.version, world.now)
                .unwrap_err()
                .to_string(),
            "service api does not have a previous spec"
        );
    }

    #[test]
    fn an_update_and_its_rollback_swap_the_specs() {
        let (mut world, id) = created();
        let get = |world: &World| (**world.state.service(id).unwrap()).clone();
        let old = get(&world);
        let labels = [("a".to_owned(), "b".to_owned())].into();
        let labelled = ServiceSpec { labels: Some(labels), ..old.spec.clone() };
        let same = update(&world.state, &old, old.meta.version, old.spec.clone()).unwrap();
        assert_eq!(same, None, "an equal spec is no update");
        let action =
            update(&world.state, &old, old.meta.version, labelled.clone()).unwrap().unwrap();
        world.apply(vec![action]);
        let new = get(&world);
        assert_eq!((&new.spec, new.previous_spec.as_ref()), (&labelled, Some(&old.spec)));
        assert!(new.spec_version > old.spec_version);
        let action = rollback(&world.state, &new, new.meta.version, world.now).unwrap();
        world.apply(vec![action]);
        let back = get(&world);
        assert_eq!((&back.spec, back.previous_spec.as_ref()), (&old.spec, Some(&labelled)));
        assert_eq!(back.update_status.unwrap().state, "rollback_started");
    }

    #[test]
    fn revisions_are_numbered_and_bounded() {
        let (mut world, id) = created();
        let mut manager = node(2);
        manager.manager_status = Some(skep_common::object::ManagerStatus::default());
        manager.description.as_mut().unwrap().format_level = level::CONTROL;
        let get = |world: &World| (**world.state.service(id).unwrap()).clone();
        let set = |world: &mut World, value: &str| {
            world.now = world.now.after(std::time::Duration::from_secs(1));
            let service = get(world);
            let labelled = spec(&json!({"Labels": {"a": value}}));
            let action = update(&world.state, &service, service.meta.version, labelled).unwrap();
            world.apply(vec![action.unwrap()]);
        };
        let kept = |world: &World| -> Vec<u64> {
            world.state.revisions_of(id).map(|revision| revision.number).collect()
        };
        set(&mut world, "one");
        assert_eq!((get(&world).revision, kept(&world)), (0, vec![]), "not all managers keep them");
        world.put(vec![Object::Node(Box::new(manager))]);
        set(&mut world, "two");
        assert_eq!((get(&world).revision, kept(&world)), (2, vec![1]));
        let first = world.state.revisions_of(id).next().unwrap().clone();
        assert_eq!(
            (first.replaced_at, first.spec.labels.clone().unwrap()["a"].as_str()),
            (world.now, "one")
        );
        let status = Service { update_status: Some(UpdateStatus::default()), ..get(&world) };
        world.replace(Object::Service(Box::new(status)));
        assert_eq!((get(&world).revision, kept(&world)), (2, vec![1]), "a status is no spec");
        for number in 3..=14 {
            set(&mut world, &number.to_string());
        }
        assert_eq!((get(&world).revision, kept(&world)), (14, (4..=13).collect()));

        let service = get(&world);
        let to =
            |number| rollback_to(&world.state, &service, service.meta.version, number, world.now);
        for number in [0, 3, 14] {
            assert_eq!(
                to(number).unwrap_err().to_string(),
                format!(
                    "service api has no revision {number} to go back to: \
                     choose one of 4, 5, 6, 7, 8, 9, 10, 11, 12, 13"
                )
            );
        }
        let action = to(5).unwrap();
        world.apply(vec![action]);
        let back = get(&world);
        assert_eq!((back.revision, kept(&world)), (15, (5..=14).collect()));
        assert_eq!(back.spec.labels.unwrap()["a"], "5");
        assert_eq!(back.previous_spec.unwrap().labels.unwrap()["a"], "14");
        assert_eq!(back.update_status.unwrap().state, "rollback_started");

        let bytes = world.state.encode();
        let decoded = State::decode(&bytes).unwrap();
        assert_eq!(decoded.revisions_of(id).count(), 10, "a snapshot has them");
        assert_eq!(decoded.encode(), bytes);
        let leaving = remove(&get(&world)).unwrap();
        world.apply(vec![leaving]);
        let (again, action) = create(&world.state, ServiceId(9), spec(&json!({}))).unwrap();
        world.apply(vec![action]);
        assert_eq!((again, get(&world).revision, kept(&world)), (id, 1, vec![]), "another service");
    }

    #[test]
    fn an_image_is_pinned_when_it_is_known_and_keeps_its_pin() {
        let (mut world, id) = created();
        let image = |world: &World| world.state.service(id).unwrap().spec.container().image.clone();
        assert_eq!(image(&world), "i:latest", "nobody knows it yet");
        let registration = image::Registration {
            names: vec!["i".to_owned()],
            digest: format!("sha256:{}", "1".repeat(64)),
            size: 1,
            created: None,
        };
        let actions =
            image::register(&world.state, skep_common::NodeId(1), &registration, &mut world.rng);
        world.apply(actions.clone());
        let old = (**world.state.service(id).unwrap()).clone();
        let action =
            update(&world.state, &old, old.meta.version, spec(&json!({}))).unwrap().unwrap();
        world.apply(vec![action]);
        let pin = format!("i:latest@sha256:{}", "1".repeat(64));
        assert_eq!(image(&world), pin);
        let record = *world.state.images().keys().next().unwrap();
        world.apply(vec![Action::Delete { kind: skep_common::Kind::Image, id: record.0 }]);
        let old = (**world.state.service(id).unwrap()).clone();
        let labelled = spec(&json!({"Labels": {"a": "b"}}));
        let action = update(&world.state, &old, old.meta.version, labelled).unwrap().unwrap();
        world.apply(vec![action]);
        assert_eq!(image(&world), pin, "the name is unknown now, the pin is not lost");
    }
}
