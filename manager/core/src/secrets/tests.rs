//! What becomes of secrets, configs and the services that use them.

use proptest::prelude::*;
use serde_json::{Value, json};
use skep_common::ServiceId;
use skep_common::object::UpdateStatus;
use skep_common::spec::{ConfigSpec, SecretSpec, ServiceSpec};

use super::*;
use crate::command::{Command, Outcome, Refusal};
use crate::service;
use crate::testing::{NOW, World, service as web};
use skep_common::{TaskState, Timestamp};

const KEY: u128 = 100;

fn secret_spec(name: &str, data: &str) -> SecretSpec {
    let data = Some(Base64(data.as_bytes().to_vec()));
    SecretSpec { name: name.to_owned(), data, ..SecretSpec::default() }
}

/// A node, and the secret `key`.
fn world() -> World {
    let mut world = World::new("1 2", web(0), "");
    let action = create::<Secret>(&world.state, KEY, secret_spec("key", "one"), NOW).unwrap();
    world.apply(vec![action]);
    world
}

fn secret(state: &State) -> &Secret {
    Secret::find(state, KEY).unwrap()
}

/// A service that finds the secret, with more of its reference.
fn user(name: &str, reference: &Value) -> ServiceSpec {
    let mut whole = json!({"SecretName": "key", "File": {"Name": "key"}});
    whole.as_object_mut().unwrap().extend(reference.as_object().unwrap().clone());
    let container = json!({"Image": "i@sha256:1", "Secrets": [whole]});
    let spec = json!({"Name": name, "TaskTemplate": {"ContainerSpec": container}});
    let mut spec: ServiceSpec = serde_json::from_value(spec).unwrap();
    spec.task_template.container_spec.as_mut().unwrap().image = "i".to_owned();
    spec
}

fn add(world: &mut World, id: u128, spec: ServiceSpec) {
    let (_, action) = service::create(&world.state, ServiceId(id), spec).unwrap();
    world.apply(vec![action]);
}

/// The version that a service names now.
fn version_of(world: &World, id: u128) -> u64 {
    let service = world.state.service(ServiceId(id)).unwrap();
    keys_of(&service.spec.task_template).next().unwrap().version
}

fn rotate(world: &mut World, data: &str) -> Update {
    let new = secret_spec("key", data);
    let update = update(&world.state, secret(&world.state), new, NOW, |_| true).unwrap();
    world.apply(update.actions.clone());
    update
}

fn versions(world: &World) -> Vec<u64> {
    secret(&world.state).versions.keys().copied().collect()
}

#[test]
fn what_cannot_be_kept_is_refused_in_swarms_words() {
    let world = world();
    let with = |edit: &dyn Fn(&mut SecretSpec)| {
        let mut spec = secret_spec("other", "x");
        edit(&mut spec);
        create::<Secret>(&world.state, 1, spec, NOW).err().map(|error| error.to_string())
    };
    let named = |name: &str| with(&|spec| spec.name = name.to_owned());
    let driver = |name: &str| Some(Driver { name: name.to_owned(), options: None });
    let rule = "invalid name, only 64 [a-zA-Z0-9-_.] characters allowed, and the start and end character must be \
                [a-zA-Z0-9]: ";
    for (name, found, expect) in [
        ("a name", named("a.b-c_1"), None),
        ("no name", named(""), Some("meta: name must be provided".to_owned())),
        ("a bad end", named("a-"), Some(format!("{rule}\"a-\""))),
        ("a space", named("a b"), Some(format!("{rule}\"a b\""))),
        ("a taken name", named("key"), Some("secret key already exists".to_owned())),
        (
            "no data",
            with(&|spec| spec.data = None),
            Some("secret data must be larger than 0 and less than 512000 bytes".to_owned()),
        ),
        ("all but too much", with(&|spec| spec.data = Some(Base64(vec![0; 511_999]))), None),
        (
            "too much",
            with(&|spec| spec.data = Some(Base64(vec![0; 512_000]))),
            Some("secret data must be larger than 0 and less than 512000 bytes".to_owned()),
        ),
        (
            "a plugin",
            with(&|spec| spec.driver = driver("vault")),
            Some(
                "secret other: driver \"vault\" is not supported: leave it out, and give the data"
                    .to_owned(),
            ),
        ),
        (
            "another template driver",
            with(&|spec| spec.templating = driver("jinja")),
            Some("secret other: template driver \"jinja\" is not supported: use golang".to_owned()),
        ),
        (
            "a template that is none",
            with(&|spec| {
                spec.templating = driver("golang");
                spec.data = Some(Base64(b"a {{ .Node".to_vec()));
            }),
            Some("secret other: template parsing error at character 3: unclosed action".to_owned()),
        ),
    ] {
        assert_eq!(found, expect, "{name}");
    }
    let spec = ConfigSpec {
        name: "key".into(),
        data: Some(Base64(vec![0; 600_000])),
        ..Default::default()
    };
    create::<Config>(&world.state, 1, spec, NOW)
        .expect("a config may be larger, and have its name");
}

#[test]
fn references_are_found_when_the_service_is_written() {
    let mut world = world();
    rotate(&mut world, "two");
    let find = |reference: Value| {
        let created = service::create(&world.state, ServiceId(1), user("api", &reference));
        match created.map_err(|error| error.to_string())?.1 {
            Action::Put { object: Object::Service(service), .. } => {
                let container = service.spec.task_template.container_spec.unwrap();
                let reference = container.secrets.unwrap().remove(0);
                Ok((
                    reference.secret_id.unwrap().0,
                    reference.secret_name,
                    reference.version.unwrap(),
                ))
            }
            _ => unreachable!("a service is created"),
        }
    };
    let id = SecretId(KEY);
    let found = |version| Ok((KEY, "key".to_owned(), version));
    let refused = |text: &str| Err(text.to_owned());
    for (reference, expect) in [
        (json!({}), found(2)),
        (json!({"SecretID": id, "SecretName": ""}), found(2)),
        (json!({"SecretID": id}), found(2)),
        (json!({"Version": 1}), found(2)),
        (json!({"Version": 2, "Pinned": true}), found(2)),
        (json!({"SecretName": "kex"}), refused("secret not found: kex")),
        (json!({"SecretID": id, "SecretName": "kex"}), refused("secret not found: kex")),
        (
            json!({"SecretID": SecretId(7), "SecretName": ""}),
            refused(&format!("secret not found: {}", SecretId(7))),
        ),
        (
            json!({"Version": 9, "Pinned": true}),
            refused("secret key has no version 9: there are 1, 2"),
        ),
        (json!({"File": null}), refused("malformed secret reference: key")),
        (
            json!({"File": {"Name": "../key"}}),
            refused(
                "malformed file secret reference, invalid target file name provided: \"../key\"",
            ),
        ),
        (
            json!({"File": {"Name": "a", "UID": "root"}}),
            refused("secret key: uid and gid must be numbers"),
        ),
    ] {
        let expect = match (&expect, reference["Version"].as_u64()) {
            (Ok((id, name, _)), Some(1)) => Ok((*id, name.clone(), 2)),
            _ => expect,
        };
        assert_eq!(find(reference.clone()), expect, "{reference}");
    }
    let mut twice = user("api", &json!({}));
    let secrets = &mut twice.task_template.container_spec.as_mut().unwrap().secrets;
    secrets.as_mut().unwrap().extend(
        user("api", &json!({"File": {"Name": "/run/secrets/key"}}))
            .task_template
            .container_spec
            .unwrap()
            .secrets
            .unwrap(),
    );
    assert_eq!(
        service::create(&world.state, ServiceId(1), twice).unwrap_err().to_string(),
        "secret references 'key' and 'key' have a conflicting target: '/run/secrets/key'"
    );
}

#[test]
fn a_new_version_rolls_its_users() {
    let mut world = world();
    rotate(&mut world, "two");
    add(&mut world, 1, user("floating", &json!({})));
    add(&mut world, 2, user("pinned", &json!({"Version": 1, "Pinned": true})));
    let before = world.state.service(ServiceId(1)).unwrap().clone();
    let update = rotate(&mut world, "three");
    assert_eq!((update.data_version, update.services), (3, vec!["floating".to_owned()]));
    assert_eq!((version_of(&world, 1), version_of(&world, 2)), (3, 1));
    let after = world.state.service(ServiceId(1)).unwrap();
    assert_eq!(after.previous_spec.as_ref(), Some(&before.spec), "it may go back");
    assert!(after.spec_version > before.spec_version);
    assert_eq!(
        find(&world.state, PayloadKey { kind: Kind::Secret, id: KEY, version: 3 }).unwrap().data,
        b"three"
    );
    let again = rotate(&mut world, "three");
    assert_eq!((again.actions.len(), again.data_version), (0, 3), "equal bytes are no version");
}

#[test]
fn labels_change_without_a_version_and_the_rest_does_not() {
    let mut world = world();
    let mut labelled = secret(&world.state).spec.clone();
    labelled.labels = Some([("a".to_owned(), "b".to_owned())].into());
    let update =
        super::update(&world.state, secret(&world.state), labelled.clone(), NOW, |_| true).unwrap();
    assert_eq!((update.actions.len(), update.data_version), (1, 1));
    world.apply(update.actions);
    assert_eq!(secret(&world.state).spec, labelled);
    let kept = secret(&world.state).versions[&1].data.clone();
    assert_eq!(kept, Some(Base64(b"one".to_vec())), "the store has the bytes still");
    let refused = |spec: SecretSpec| {
        super::update(&world.state, secret(&world.state), spec, NOW, |_| true)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refused(secret_spec("other", "x")), "renaming a secret is not supported");
    let mut templated = secret_spec("key", "x");
    templated.templating = Some(Driver { name: "golang".to_owned(), options: None });
    assert_eq!(
        refused(templated),
        "secret key: its template driver cannot be changed: create another secret"
    );
}

#[test]
fn what_services_use_is_not_erased() {
    let mut world = world();
    add(&mut world, 1, user("api", &json!({})));
    let text = "secret 'key' is in use by the following service: api";
    assert_eq!(remove(&world.state, secret(&world.state)).unwrap_err().to_string(), text);
    let delete = Action::Delete { kind: Kind::Secret, id: KEY };
    let index = world.state.version().index + 1;
    let outcome = world.state.apply(index, &Command::new(NOW, vec![delete])).0;
    assert!(
        matches!(&outcome, Outcome::Refused(refusal) if refusal.to_string() == text),
        "{outcome:?}"
    );
    let api = world.state.service(ServiceId(1)).unwrap().clone();
    world.apply(vec![service::remove(&api).unwrap()]);
    let action = remove(&world.state, secret(&world.state)).unwrap();
    world.apply(vec![action]);
    let mut api = (*api).clone();
    api.id = ServiceId(2);
    api.spec.name = "late".to_owned();
    let put = Action::Put { object: Object::Service(Box::new(api)), expect: Expect::Absent };
    let index = world.state.version().index + 1;
    let outcome = world.state.apply(index, &Command::new(NOW, vec![put])).0;
    let refusal =
        Refusal::PayloadNotFound { kind: Kind::Secret, name: "key".to_owned(), version: 1 };
    assert_eq!(outcome, Outcome::Refused(refusal), "it was resolved before the secret went");
}

#[test]
fn rollback_finds_the_old_data_and_stays_there_until_the_next_version() {
    let mut world = world();
    add(&mut world, 1, user("api", &json!({})));
    rotate(&mut world, "two");
    let api = world.state.service(ServiceId(1)).unwrap().clone();
    let action = service::rollback(&world.state, &api, api.meta.version, NOW).unwrap();
    world.apply(vec![action]);
    assert_eq!((version_of(&world, 1), versions(&world)), (1, vec![1, 2]));
    rotate(&mut world, "three");
    assert_eq!(version_of(&world, 1), 3);
}

#[test]
fn an_update_that_fails_goes_back_to_the_old_version_or_stops_where_it_is_gone() {
    for (is_there, expect) in [(true, "rollback_started"), (false, "paused")] {
        let mut world = world();
        let mut spec = user("api", &json!({}));
        spec.update_config =
            Some(serde_json::from_value(json!({"FailureAction": "rollback"})).unwrap());
        add(&mut world, 1, spec);
        world.step();
        let task_id = |world: &World| world.state.tasks_of_service(ServiceId(1)).last().unwrap().id;
        let first = task_id(&world);
        for state in [TaskState::Assigned, TaskState::Running] {
            world.report(first, state);
        }
        let mut api = (**world.state.service(ServiceId(1)).unwrap()).clone();
        let mut new = api.spec.clone();
        new.task_template.container_spec.as_mut().unwrap().secrets = None;
        let action = service::update(&world.state, &api, api.meta.version, new).unwrap().unwrap();
        world.apply(vec![action]);
        api = (**world.state.service(ServiceId(1)).unwrap()).clone();
        let status = UpdateStatus { state: "updating".to_owned(), ..UpdateStatus::default() };
        api.update_status = Some(status);
        world.replace(Object::Service(Box::new(api)));
        world.report(first, TaskState::Shutdown);
        world.step();
        world.report(task_id(&world), TaskState::Failed);
        if !is_there {
            let action = remove(&world.state, secret(&world.state)).unwrap();
            world.apply(vec![action]);
        }
        world.step();
        let status = world.state.service(ServiceId(1)).unwrap().update_status.clone().unwrap();
        assert_eq!(status.state, expect, "{}", status.message);
    }
}

#[test]
fn versions_that_nobody_needs_are_erased() {
    let mut world = world();
    world.step();
    assert_eq!(versions(&world), [1], "the newest stays without users");
    add(&mut world, 1, user("api", &json!({})));
    world.step();
    let old_task = world.state.tasks_of_service(ServiceId(1)).next().unwrap().id;
    world.report(old_task, TaskState::Running);
    for number in 2..=12 {
        rotate(&mut world, &format!("version {number}"));
    }
    // No update is to replace the task meanwhile: it holds on to the first version.
    let mut api = (**world.state.service(ServiceId(1)).unwrap()).clone();
    api.update_status =
        Some(UpdateStatus { state: "paused".to_owned(), ..UpdateStatus::default() });
    world.replace(Object::Service(Box::new(api)));
    world.step();
    world.step();
    assert_eq!(
        versions(&world),
        (1..=12).collect::<Vec<u64>>(),
        "a task has the first, and a rollback finds those of the ten specs before"
    );
    world.report(old_task, TaskState::Failed);
    world.step();
    let kept: Vec<u64> = (2..=12).collect();
    assert_eq!(versions(&world), kept, "the last task that had it has ended");
    world.expect_settled("nothing else is erased");
    let api = world.state.service(ServiceId(1)).unwrap().clone();
    world.apply(vec![service::remove(&api).unwrap()]);
    while !world.step().is_empty() {}
    assert_eq!(versions(&world), [12]);
    assert_eq!(
        find(&world.state, PayloadKey { kind: Kind::Secret, id: KEY, version: 12 }).unwrap().data,
        b"version 12"
    );
}

#[test]
fn a_version_that_came_into_use_meanwhile_stays() {
    let mut world = world();
    rotate(&mut world, "two");
    let plan = world.plan();
    assert_eq!(crate::testing::render(&world.state, &plan.actions), "Secret");
    add(&mut world, 1, user("api", &json!({"Version": 1, "Pinned": true})));
    world.apply(plan.actions);
    assert_eq!(versions(&world), [1, 2]);
}

#[test]
fn tasks_have_their_services_labels_only_where_a_template_may_name_them() {
    for (is_template, expect) in [(true, Some("b")), (false, None)] {
        let mut world = World::new("1", web(0), "");
        let mut spec = secret_spec("key", "{{.Service.Labels}}");
        spec.templating =
            is_template.then(|| Driver { name: TEMPLATE_DRIVER.to_owned(), options: None });
        let action = create::<Secret>(&world.state, KEY, spec, NOW).unwrap();
        world.apply(vec![action]);
        let mut spec = user("api", &json!({}));
        spec.labels = Some([("a".to_owned(), "b".to_owned())].into());
        add(&mut world, 1, spec);
        world.step();
        let task = world.state.tasks_of_service(ServiceId(1)).next().unwrap();
        let label = task.service_labels.as_ref().and_then(|labels| labels.get("a"));
        assert_eq!(label.map(String::as_str), expect);
    }
}

#[test]
fn a_job_is_not_run_again_for_a_new_version() {
    let mut world = world();
    let mut spec = user("migrate", &json!({}));
    spec.mode = Some(serde_json::from_value(json!({"ReplicatedJob": {}})).unwrap());
    add(&mut world, 1, spec);
    add(&mut world, 2, user("shop", &json!({})));
    assert_eq!(rotate(&mut world, "two").services, ["shop"]);
    assert_eq!((version_of(&world, 1), version_of(&world, 2)), (1, 2));
}

#[test]
fn too_many_users_are_not_updated_at_once() {
    let mut world = world();
    let users = (1..=USERS_MAX as u128 + 1).map(|id| {
        let spec = user(&format!("s{id}"), &json!({}));
        service::create(&world.state, ServiceId(1000 + id), spec).unwrap().1
    });
    let users = users.collect();
    world.apply(users);
    let update = |follows: fn(&Service) -> bool| {
        super::update(&world.state, secret(&world.state), secret_spec("key", "two"), NOW, follows)
    };
    assert_eq!(
        update(|_| true).unwrap_err().to_string(),
        "secret key has 1001 services that would be updated at once, and 1000 may be: pin some of them to a version \
         with version=N"
    );
    assert_eq!(update(|service| service.id != ServiceId(1001)).unwrap().services.len(), USERS_MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever is done in whatever order: what services name is there, and numbers only grow.
    #[test]
    fn what_is_named_is_there(steps in proptest::collection::vec((0_u8..6, 0_u128..3), 1..40)) {
        let mut world = world();
        let mut newest = 1;
        for (verb, which) in steps {
            let id = which + 1;
            let found = world.state.service(ServiceId(id)).cloned();
            let action = match (verb, found) {
                (0, None) => {
                    let spec = user(&format!("s{id}"), &json!({"Pinned": which == 0, "Version": newest}));
                    service::create(&world.state, ServiceId(id), spec).ok().map(|(_, action)| action)
                }
                (1, _) => {
                    newest = rotate(&mut world, &format!("{newest}")).data_version;
                    None
                }
                (2, Some(found)) => service::rollback(&world.state, &found, found.meta.version, NOW).ok(),
                (3, Some(found)) => service::remove(&found),
                (4, Some(_)) => {
                    let task = world.state.tasks_of_service(ServiceId(id)).next().map(|task| task.id);
                    if let Some(task_id) = task {
                        world.report(task_id, TaskState::Failed);
                    }
                    None
                }
                _ => None,
            };
            world.apply(action.into_iter().collect());
            world.now = Timestamp(world.now.0 + 6_000_000_000);
            world.step();
            prop_assert_eq!(secret(&world.state).versions.keys().last(), Some(&newest));
            for service in world.state.services().values().filter(|service| !service.pending_delete) {
                prop_assert!(are_there(&world.state, &service.spec).is_ok());
                prop_assert!(service.previous_spec.iter().all(|spec| are_there(&world.state, spec).is_ok()));
            }
        }
    }
}
