//! From a task's secrets and configs to the files of its container: where each is, and its template.
//!
//! Source: SwarmKit `template/{context,expand,getter}.go`.

use std::path::{Path, PathBuf};

use serde_json::Value;
use skep_common::Task;
use skep_common::placeholder::{self, NodeFacts};
use skep_common::spec::{Base64, ContainerSpec, FileTarget};
use skep_common::template::Error as TemplateError;
use skep_worker_core::oci::payloads::{PayloadFile, SECRETS};

use crate::executor::{Error, Payload, TaskPayloads, payload_key};

/// A file that a task wants, and what is in it.
struct Wanted<'a> {
    kind: &'static str,
    target: &'a FileTarget,
    payload: &'a Payload,
}

/// The files of a task's container.
pub(super) fn files(
    task: &Task,
    payloads: &TaskPayloads,
    facts: &NodeFacts,
) -> Result<Vec<PayloadFile>, Error> {
    let Some(container) = &task.spec.container_spec else { return Ok(Vec::new()) };
    let wanted = wanted(container, payloads)?;
    wanted.iter().map(|one| file(one, &wanted, task, container, facts)).collect()
}

fn wanted<'a>(
    container: &'a ContainerSpec,
    payloads: &'a TaskPayloads,
) -> Result<Vec<Wanted<'a>>, Error> {
    let find = |id: Option<String>, version: Option<u64>, name: &str| {
        let found =
            id.zip(version).and_then(|(id, version)| payloads.get(&payload_key(&id, version)));
        found.map(|found| &**found).ok_or_else(|| Error(format!("{name} is not on this node")))
    };
    let mut all = Vec::new();
    for secret in container.secrets.iter().flatten() {
        let Some(target) = &secret.file else { continue };
        let id = secret.secret_id.map(|id| id.to_string());
        let payload = find(id, secret.version, &secret.secret_name)?;
        all.push(Wanted { kind: "secret", target, payload });
    }
    for config in container.configs.iter().flatten() {
        let Some(target) = &config.file else { continue };
        let id = config.config_id.map(|id| id.to_string());
        let payload = find(id, config.version, &config.config_name)?;
        all.push(Wanted { kind: "config", target, payload });
    }
    Ok(all)
}

fn file(
    wanted: &Wanted<'_>,
    all: &[Wanted<'_>],
    task: &Task,
    container: &ContainerSpec,
    facts: &NodeFacts,
) -> Result<PayloadFile, Error> {
    let (name, target) = (&wanted.payload.name, wanted.target);
    let number = |text: &str| {
        text.parse().map_err(|_| Error(format!("{} {name}: {text:?} is no number", wanted.kind)))
    };
    let data = match wanted.payload.templating.is_empty() {
        true => wanted.payload.data.to_vec(),
        false => expanded(wanted, all, task, container, facts)
            .map_err(|why| Error(format!("{} {name}: {why}", wanted.kind)))?,
    };
    Ok(PayloadFile {
        target: absolute(wanted),
        uid: number(&target.uid)?,
        gid: number(&target.gid)?,
        mode: target.mode,
        data: Base64(data),
    })
}

/// Relative targets begin at /run/secrets, or for configs at the root.
fn absolute(wanted: &Wanted<'_>) -> PathBuf {
    let base = if wanted.kind == "secret" { SECRETS } else { "/" };
    Path::new(base).join(&wanted.target.name)
}

/// The bytes of a template, filled in for the task.
fn expanded(
    wanted: &Wanted<'_>,
    all: &[Wanted<'_>],
    task: &Task,
    container: &ContainerSpec,
    facts: &NodeFacts,
) -> Result<Vec<u8>, String> {
    let text = std::str::from_utf8(&wanted.payload.data).map_err(|_| "is no text".to_owned())?;
    let functions = |function: &str, arguments: &[Value]| {
        let [Value::String(argument)] = arguments else { return None };
        match function {
            "secret" | "config" => Some(by_target(function, argument, all)),
            "env" => {
                let entries = container.env.iter().flatten();
                let mut entries = entries.filter_map(|line| line.split_once('='));
                // The later one counts, as for the program.
                let found = entries.rfind(|(name, _)| name == argument);
                Some(Ok(found.map_or("", |(_, value)| value).into()))
            }
            _ => None,
        }
    };
    let text = placeholder::expand_with(text, task, facts, &functions);
    Ok(text.map_err(|error| error.to_string())?.into_bytes())
}

/// The bytes of another file of the task, as they are stored.
fn by_target(function: &str, target: &str, all: &[Wanted<'_>]) -> Result<Value, TemplateError> {
    let wrong = |why: &str| TemplateError::Call {
        function: function.to_owned(),
        why: format!("{target:?} {why}"),
    };
    let found = all.iter().find(|one| one.kind == function && one.target.name == target);
    let found = found.ok_or_else(|| wrong("is no target of this service"))?;
    let text = std::str::from_utf8(&found.payload.data).map_err(|_| wrong("is no text"))?;
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;
    use skep_common::{ConfigId, NodeId, SecretId};

    use super::*;

    fn payload(kind: &str, data: &str, templating: &str) -> Arc<Payload> {
        Arc::new(Payload {
            kind: kind.to_owned(),
            name: "one".to_owned(),
            version: 3,
            data: data.as_bytes().to_vec().into(),
            templating: templating.to_owned(),
        })
    }

    /// A task with a secret, and a config with this text.
    fn render(text: &str, templating: &str) -> Result<Vec<PayloadFile>, Error> {
        let task = json!({
            "ID": skep_common::TaskId(8), "SpecVersion": {"Index": 1},
            "ServiceID": skep_common::ServiceId(9), "ServiceName": "api", "Slot": 2,
            "Status": {"State": "assigned"}, "DesiredState": "running",
            "ServiceLabels": {"team": "a"},
            "Spec": {"ContainerSpec": {
                "Image": "i", "Env": ["A=1", "A=2"],
                "Secrets": [{
                    "SecretID": SecretId(1), "SecretName": "one", "Version": 3,
                    "File": {"Name": "key", "UID": "5", "GID": "6", "Mode": 256},
                }],
                "Configs": [
                    {"ConfigID": ConfigId(2), "ConfigName": "one", "Version": 3,
                     "File": {"Name": "etc/page", "UID": "0", "GID": "0", "Mode": 292}},
                    {"ConfigID": ConfigId(9), "ConfigName": "for the runtime", "Runtime": {}},
                ],
            }},
        });
        let task: Task = serde_json::from_value(task).unwrap();
        let facts = NodeFacts {
            node_id: NodeId(1),
            hostname: "n1".to_owned(),
            architecture: "x86_64".to_owned(),
        };
        let payloads = TaskPayloads::from([
            (payload_key(&SecretId(1).to_string(), 3), payload("secret", "hidden", "")),
            (payload_key(&ConfigId(2).to_string(), 3), payload("config", text, templating)),
        ]);
        files(&task, &payloads, &facts)
    }

    #[test]
    fn each_is_where_the_service_wants_it() {
        let files = render("{{not a template}}", "").unwrap();
        let [secret, config] = files.as_slice() else { panic!("{files:?}") };
        assert_eq!(secret.target, Path::new("/run/secrets/key"));
        assert_eq!((secret.uid, secret.gid, secret.mode), (5, 6, 0o400));
        assert_eq!(config.target, Path::new("/etc/page"));
        assert_eq!(config.data.0, b"{{not a template}}");
    }

    #[test]
    fn templates_are_filled_in_for_the_task() {
        for (text, expect) in [
            ("plain", "plain"),
            ("{{.Service.Name}}.{{.Task.Slot}} on {{.Node.Hostname}}", "api.2 on n1"),
            (r#"{{index .Service.Labels "team"}}"#, "a"),
            (r#"pw={{secret "key"}} a={{env "A"}}{{env "NONE"}}"#, "pw=hidden a=2"),
            (
                r#"{{secret "other"}}"#,
                "error: config one: secret: \"other\" is no target of this service",
            ),
            (
                r#"{{.Nosuch}}"#,
                "error: config one: there is no field \".Nosuch\" (there are: .Node .Service .Task)",
            ),
        ] {
            let found = match render(text, "golang") {
                Ok(files) => String::from_utf8(files[1].data.0.clone()).unwrap(),
                Err(Error(error)) => format!("error: {error}"),
            };
            assert_eq!(found, expect, "{text}");
        }
    }
}
