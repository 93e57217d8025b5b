//! The mapping from a service's stored specification to the builder's input.

use std::collections::BTreeMap;

use serde_json::Value;
use skep_common::spec::{ContainerSpec, ResourceRequirements};

use super::input::{ContainerInput, Limits, Ulimit};

/// The builder's input for `spec` with `resources`.
///
/// Mounts stay empty: the agent resolves volumes, secrets and configs to paths of its node first.
/// Host names and variables may hold templates; they are taken as they are.
pub fn container_input(
    spec: &ContainerSpec,
    resources: Option<&ResourceRequirements>,
) -> ContainerInput {
    ContainerInput {
        command: spec.command.clone().unwrap_or_default(),
        args: spec.args.clone().unwrap_or_default(),
        env: spec.env.clone().unwrap_or_default(),
        dir: spec.dir.clone().filter(|dir| !dir.is_empty()),
        user: spec.user.clone().filter(|user| !user.is_empty()),
        groups: spec.groups.clone().unwrap_or_default(),
        hostname: spec.hostname.clone().filter(|name| !name.is_empty()),
        tty: spec.tty.unwrap_or(false),
        open_stdin: spec.open_stdin.unwrap_or(false),
        read_only: spec.read_only.unwrap_or(false),
        capability_add: spec.capability_add.clone().unwrap_or_default(),
        capability_drop: spec.capability_drop.clone().unwrap_or_default(),
        sysctls: text_map(spec.sysctls.as_ref()),
        ulimits: spec
            .ulimits
            .iter()
            .flatten()
            .map(|limit| Ulimit { name: limit.name.clone(), soft: limit.soft, hard: limit.hard })
            .collect(),
        oom_score_adj: spec.oom_score_adj,
        init: spec.init.unwrap_or(false),
        no_new_privileges: has_no_new_privileges(spec),
        shm_bytes: None,
        mounts: Vec::new(),
        limits: limits(resources),
        host_network: false,
        labels: text_map(spec.labels.as_ref()),
    }
}

/// `Privileges.NoNewPrivileges`, which the model keeps among the fields it does not name.
fn has_no_new_privileges(spec: &ContainerSpec) -> bool {
    let privileges = spec.extra.get("Privileges");
    privileges.and_then(|value| value.get("NoNewPrivileges")).and_then(Value::as_bool) == Some(true)
}

/// Limits become limits; reservations concern the scheduler alone, as in Swarm.
fn limits(resources: Option<&ResourceRequirements>) -> Limits {
    let Some(limits) = resources.and_then(|resources| resources.limits.as_ref()) else {
        return Limits::default();
    };
    Limits {
        nano_cpus: limits.nano_cpus.unwrap_or(0),
        memory_bytes: limits.memory_bytes.unwrap_or(0),
        pids: limits.pids.unwrap_or(0),
    }
}

fn text_map(map: Option<&BTreeMap<String, String>>) -> BTreeMap<String, String> {
    map.cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_service_reaches_the_builder() {
        let spec: ContainerSpec = serde_json::from_value(serde_json::json!({
            "Image": "busybox", "Labels": {"l": "1"}, "Command": ["/c"], "Args": ["a"],
            "Hostname": "h", "Env": ["E=1"], "Dir": "/d", "User": "u:g", "Groups": ["g2"],
            "StopSignal": "SIGINT", "TTY": true, "OpenStdin": true, "ReadOnly": true,
            "Init": true, "Sysctls": {"net.core.somaxconn": "1024"},
            "CapabilityAdd": ["NET_ADMIN"], "CapabilityDrop": ["MKNOD"],
            "Ulimits": [{"Name": "nofile", "Soft": 10, "Hard": 20}], "OomScoreAdj": 7,
            "Privileges": {"NoNewPrivileges": true},
        }))
        .unwrap();
        let resources: ResourceRequirements = serde_json::from_value(serde_json::json!({
            "Limits": {"NanoCPUs": 500_000_000, "MemoryBytes": 64, "Pids": 9},
            "Reservations": {"MemoryBytes": 32},
        }))
        .unwrap();
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        let expect = ContainerInput {
            command: words("/c"),
            args: words("a"),
            env: words("E=1"),
            dir: Some("/d".into()),
            user: Some("u:g".into()),
            groups: words("g2"),
            hostname: Some("h".into()),
            tty: true,
            open_stdin: true,
            read_only: true,
            capability_add: words("NET_ADMIN"),
            capability_drop: words("MKNOD"),
            sysctls: BTreeMap::from([("net.core.somaxconn".into(), "1024".into())]),
            ulimits: vec![Ulimit { name: "nofile".into(), soft: 10, hard: 20 }],
            oom_score_adj: Some(7),
            init: true,
            no_new_privileges: true,
            shm_bytes: None,
            mounts: Vec::new(),
            limits: Limits { nano_cpus: 500_000_000, memory_bytes: 64, pids: 9 },
            host_network: false,
            labels: BTreeMap::from([("l".into(), "1".into())]),
        };
        assert_eq!(container_input(&spec, Some(&resources)), expect);
    }

    #[test]
    fn an_empty_spec_gives_the_defaults() {
        assert_eq!(container_input(&ContainerSpec::default(), None), ContainerInput::default());
    }
}
