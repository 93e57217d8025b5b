//! The secrets and configs of this node's tasks, in memory alone.
//!
//! Managers send each before the first task that uses it, and say when none does any more. A daemon that
//! has just started has none: a task that is to be made then waits for its session. What containers have
//! is theirs, whatever is forgotten here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use skep_common::Task;
use skep_proto::SecretAssignment;
use tokio::sync::watch;

use crate::executor::{Error, Payload, TaskPayloads, payload_key};

/// How long what managers owe a task may take, once they have spoken.
const WAIT: Duration = Duration::from_secs(30);

/// What this node holds; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Payloads {
    held: Arc<watch::Sender<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    by_key: BTreeMap<String, Arc<Payload>>,
    /// Whether managers have said since this daemon started what this node is to hold.
    is_told: bool,
}

impl Payloads {
    /// What is held, as `secret NAME@VERSION`, for people.
    pub fn names(&self) -> Vec<String> {
        let held = self.held.borrow();
        let mut names: Vec<String> = held
            .by_key
            .values()
            .map(|payload| format!("{} {}@{}", payload.kind, payload.name, payload.version))
            .collect();
        names.sort();
        names
    }

    /// Takes what a message brings. One that is whole replaces everything.
    pub(super) fn add(&self, is_whole: bool, assigned: Vec<SecretAssignment>) {
        self.held.send_modify(|held| {
            held.is_told = true;
            if is_whole {
                held.by_key.clear();
            }
            for one in assigned {
                let key = payload_key(&one.id, one.version);
                held.by_key.insert(key, Arc::new(Payload::from(one)));
            }
        });
    }

    /// Forgets versions that no task of this node uses any more.
    pub(super) fn forget(&self, keys: &[String]) {
        self.held.send_modify(|held| {
            for key in keys {
                held.by_key.remove(key);
            }
        });
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.held.send_modify(|held| held.by_key.clear());
    }

    /// What a task uses, once this node has all of it. Cancel-safe.
    pub(super) async fn of_task(&self, task: &Task) -> Result<TaskPayloads, Error> {
        self.of_task_within(task, WAIT).await
    }

    async fn of_task_within(&self, task: &Task, wait: Duration) -> Result<TaskPayloads, Error> {
        let wanted = wanted(task)?;
        if wanted.is_empty() {
            return Ok(TaskPayloads::new());
        }
        let has_all = |held: &Held| wanted.iter().all(|(key, _)| held.by_key.contains_key(key));
        let mut held = self.held.subscribe();
        let ended = |_| Error("the agent has ended".to_owned());
        held.wait_for(|held| held.is_told || has_all(held)).await.map_err(ended)?;
        let complete = tokio::time::timeout(wait, held.wait_for(has_all)).await;
        let Ok(complete) = complete else {
            let held = self.held.borrow();
            let missing = wanted.iter().find(|(key, _)| !held.by_key.contains_key(key));
            let missing = missing.map_or("one", |(_, label)| label);
            return Err(Error(format!("{missing} was not sent to this node in time")));
        };
        let complete = complete.map_err(ended)?;
        let found = wanted
            .iter()
            .filter_map(|(key, _)| Some((key.clone(), Arc::clone(complete.by_key.get(key)?))));
        Ok(found.collect())
    }
}

/// The keys of what a task uses, each with a label for people.
fn wanted(task: &Task) -> Result<Vec<(String, String)>, Error> {
    let container = task.spec.container_spec.as_ref();
    let secrets = container.into_iter().flat_map(|container| container.secrets.iter().flatten());
    let secrets = secrets.map(|secret| {
        let id = secret.secret_id.map(|id| id.to_string());
        ("secret", &secret.secret_name, id.zip(secret.version))
    });
    let configs = container.into_iter().flat_map(|container| container.configs.iter().flatten());
    let configs = configs.filter(|config| config.file.is_some()).map(|config| {
        let id = config.config_id.map(|id| id.to_string());
        ("config", &config.config_name, id.zip(config.version))
    });
    let keys = secrets.chain(configs).map(|(kind, name, found)| match found {
        Some((id, version)) => Ok((payload_key(&id, version), format!("{kind} {name}"))),
        None => Err(Error(format!("{kind} {name} has no version: update the service"))),
    });
    keys.collect()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::agent::tests::task;
    use skep_common::{SecretId, TaskState};

    fn assigned(version: u64) -> SecretAssignment {
        SecretAssignment {
            id: SecretId(1).to_string(),
            version,
            kind: "secret".to_owned(),
            name: "key".to_owned(),
            data: b"hidden".to_vec().into(),
            templating: String::new(),
        }
    }

    fn user() -> Task {
        let mut task = task(1, "api", TaskState::Running);
        let container = serde_json::json!({"Image": "i", "Secrets": [
            {"File": {"Name": "key"}, "SecretID": SecretId(1), "SecretName": "key", "Version": 2},
        ]});
        let spec = Arc::make_mut(&mut task.spec);
        spec.container_spec = serde_json::from_value(container).unwrap();
        task
    }

    #[tokio::test]
    async fn a_start_waits_for_managers_and_then_not_for_ever() {
        let payloads = Payloads::default();
        let task = user();
        let waits = payloads.of_task_within(&task, Duration::ZERO).now_or_never();
        assert!(waits.is_none(), "nobody has said anything yet");
        payloads.add(true, vec![assigned(1)]);
        let error = payloads.of_task_within(&task, Duration::ZERO).await.unwrap_err();
        assert_eq!(error.0, "secret key was not sent to this node in time");
        let (found, ()) = tokio::join!(payloads.of_task(&task), async {
            payloads.add(false, vec![assigned(2)]);
        });
        assert_eq!(found.unwrap().into_values().next().unwrap().version, 2);
        assert_eq!(payloads.names(), ["secret key@1", "secret key@2"]);
        payloads.forget(&[payload_key(&SecretId(1).to_string(), 1)]);
        assert_eq!(payloads.names(), ["secret key@2"]);
        payloads.add(true, Vec::new());
        assert_eq!(payloads.names(), [""; 0], "a whole set replaces everything");
    }

    #[test]
    fn nothing_prints_them() {
        let payloads = Payloads::default();
        payloads.add(true, vec![assigned(1)]);
        let text = format!("{payloads:?}");
        assert!(
            text.contains("key") && !text.contains("hidden") && !text.contains("104"),
            "{text}"
        );
    }
}
