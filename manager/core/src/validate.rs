//! Which specs are refused, and with which words.
//!
//! Rules and texts are SwarmKit's (`manager/controlapi/{common,service,node}.go`), since clients show
//! them. What is valid in Swarm but not done by skep yet is a refusal where a service would be wrong
//! without it, and a warning where it would merely lack something.

use std::collections::BTreeSet;
use std::time::Duration;

use skep_common::limits::MAX_ATTEMPTS_COUNTED;
use skep_common::spec::generic::is_kind;
use skep_common::spec::{
    ContainerSpec, DnsConfig, EndpointSpec, Extra, GenericResource, HealthConfig, ModeKind, Nanos,
    NodeSpec, PortConfig, PortProtocol, PublishMode, ResourceRequirements, Resources, ServiceSpec,
    TaskSpec, UpdateConfig,
};

use crate::constraint;
use crate::scheduler::parse_preferences;

/// A thousandth of a core.
const NANO_CPUS_MIN: i64 = 1_000_000;
/// 4 MiB: less does not hold a container's first process.
const MEMORY_BYTES_MIN: i64 = 4 << 20;
/// The least duration of a health check.
const HEALTH_DURATION_MIN: Duration = Duration::from_millis(1);
/// A label of a DNS name.
const NAME_LENGTH_MAX: usize = 63;

/// Why a spec is refused. The text says what to change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub String);

type Outcome = Result<(), Error>;

fn refuse(text: impl Into<String>) -> Outcome {
    Err(Error(text.into()))
}

/// Refuses a service spec that cannot be run as asked.
pub fn service_spec(spec: &ServiceSpec) -> Outcome {
    name(&spec.name)?;
    mode(spec)?;
    task_spec(&spec.task_template)?;
    update_config("UpdateConfig", spec.update_config.as_ref(), &["pause", "continue", "rollback"])?;
    update_config("RollbackConfig", spec.rollback_config.as_ref(), &["pause", "continue"])?;
    spec.endpoint_spec.as_ref().map_or(Ok(()), endpoint_spec)
}

/// Refuses a node spec.
pub fn node_spec(spec: &NodeSpec) -> Outcome {
    if let Some(given) = spec.name.as_ref().filter(|given| !given.is_empty()) {
        name(given)?;
    }
    match spec.labels.as_ref().is_some_and(|labels| labels.contains_key("")) {
        true => refuse("meta: labels must have a key"),
        false => Ok(()),
    }
}

/// `^[a-zA-Z0-9](?:[-_]*[A-Za-z0-9]+)*$`
fn name(name: &str) -> Outcome {
    if name.is_empty() {
        return refuse("meta: name must be provided");
    }
    if name.len() > NAME_LENGTH_MAX {
        return refuse("name must be 63 characters or fewer");
    }
    let is_inner = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let ends_well = !name.starts_with(['-', '_']) && !name.ends_with(['-', '_']);
    if !name.chars().all(is_inner) || !ends_well {
        return refuse(format!("name must be valid as a DNS name component: {name:?}"));
    }
    Ok(())
}

fn mode(spec: &ServiceSpec) -> Outcome {
    let Some(mode) = &spec.mode else { return Ok(()) };
    const MODES: &str = "Replicated, Global, ReplicatedJob and GlobalJob";
    if let Some(other) = mode.extra.iter().find(|(_, value)| !value.is_null()).map(|(key, _)| key) {
        return refuse(format!("service mode {other} is unknown: it must be one of {MODES}"));
    }
    match mode.kind() {
        None => refuse(format!("service mode must be one of {MODES}")),
        Some(ModeKind::ReplicatedJob { total: 1.., concurrent: 0 }) => {
            refuse("ReplicatedJob: MaxConcurrent must be at least 1, or no task ever runs")
        }
        // SwarmKit `manager/controlapi/service.go`, `validateJob`.
        Some(kind) if kind.is_job() && spec.update_config.is_some() => {
            refuse("Jobs may not have an update config")
        }
        Some(_) => Ok(()),
    }
}

/// Refuses what a task cannot be.
pub(crate) fn task_spec(spec: &TaskSpec) -> Outcome {
    let Some(container) = &spec.container_spec else {
        return refuse("TaskSpec: missing runtime: ContainerSpec must be provided");
    };
    container_spec(container)?;
    spec.resources.as_ref().map_or(Ok(()), requirements)?;
    if let Some(driver) = &spec.log_driver {
        driver.rotation().map_err(|error| Error(error.to_string()))?;
    }
    if let Some(policy) = &spec.restart_policy {
        not_negative("TaskSpec: restart-delay", policy.delay)?;
        not_negative("TaskSpec: restart-window", policy.window)?;
    }
    let placement = spec.placement.as_ref();
    let expressions = placement.and_then(|placement| placement.constraints.as_deref());
    constraint::parse_all(expressions.unwrap_or_default())
        .and_then(|constraints| constraint::check_keys(&constraints))
        .map_err(|error| Error(error.to_string()))?;
    parse_preferences(placement).map(|_| ()).map_err(Error)
}

fn not_negative(what: &str, duration: Option<Nanos>) -> Outcome {
    match duration {
        Some(Nanos(..0)) => refuse(format!("{what} cannot be negative")),
        _ => Ok(()),
    }
}

fn container_spec(spec: &ContainerSpec) -> Outcome {
    if spec.image.is_empty() {
        return refuse("ContainerSpec: image reference must be provided");
    }
    if !is_reference(&spec.image) {
        return refuse(format!("ContainerSpec: {:?} is not a valid repository/tag", spec.image));
    }
    not_negative("ContainerSpec: stop-grace-period", spec.stop_grace_period)?;
    let mounts = spec.extra.get("Mounts").and_then(|mounts| mounts.as_array());
    let mut targets = BTreeSet::new();
    for target in mounts.into_iter().flatten().filter_map(|mount| mount.get("Target")?.as_str()) {
        if !targets.insert(target) {
            return refuse(format!("ContainerSpec: duplicate mount point: {target}"));
        }
    }
    let malformed = spec.env.iter().flatten().find(|line| line.starts_with('=') || line.is_empty());
    if let Some(line) = malformed {
        return refuse(format!("ContainerSpec: invalid environment variable: {line:?}"));
    }
    spec.dns_config.as_ref().map_or(Ok(()), dns_config)?;
    spec.healthcheck.as_ref().map_or(Ok(()), health_config)
}

fn dns_config(config: &DnsConfig) -> Outcome {
    let is_address = |text: &&String| text.parse::<std::net::IpAddr>().is_ok();
    if let Some(text) = config.nameservers.iter().flatten().find(|text| !is_address(text)) {
        return refuse(format!("DNSConfig: {text:?} is not the IP address of a DNS server"));
    }
    // Each becomes a word of a line of resolv.conf.
    let mut words = config.search.iter().chain(&config.options).flatten();
    let is_word = |text: &&String| !text.is_empty() && !text.contains(char::is_whitespace);
    match words.find(|text| !is_word(text)) {
        Some(text) => refuse(format!("DNSConfig: {text:?} is not one word")),
        None => Ok(()),
    }
}

/// The shape of a reference; the names of registries are not looked up.
fn is_reference(image: &str) -> bool {
    let (name, digest) = crate::image::split_digest(image);
    let is_digest = |digest: &str| {
        let hex = digest.strip_prefix("sha256:").unwrap_or_default();
        hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let last = name.rsplit('/').next().unwrap_or_default();
    let (last, tag) = last.split_once(':').unwrap_or((last, "latest"));
    let is_tag_char = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let is_tag = !tag.is_empty()
        && tag.len() <= 128
        && tag.chars().all(is_tag_char)
        && !tag.starts_with(['.', '-']);
    let is_component = |part: &str| {
        let is_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        !part.is_empty()
            && part.chars().all(is_char)
            && !part.starts_with(['.', '_', '-'])
            && !part.ends_with(['.', '_', '-'])
    };
    let head = name.rsplit_once('/').map_or("", |(head, _)| head);
    let mut head = head.split('/').filter(|part| !part.is_empty());
    let is_domain = |part: &str| {
        !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || ".-:".contains(c))
    };
    head.next().is_none_or(|first| is_component(first) || is_domain(first))
        && head.all(is_component)
        && !name.starts_with('/')
        && !name.contains("//")
        && is_component(last)
        && is_tag
        && digest.is_none_or(is_digest)
}

fn health_config(config: &HealthConfig) -> Outcome {
    for (what, duration) in [
        ("Interval", config.interval),
        ("Timeout", config.timeout),
        ("StartPeriod", config.start_period),
        ("StartInterval", config.start_interval),
    ] {
        let is_short = |given: &Nanos| given.0 < 0 || given.duration() < HEALTH_DURATION_MIN;
        if duration.filter(|given| given.0 != 0).is_some_and(|given| is_short(&given)) {
            return refuse(format!(
                "ContainerSpec: {what} in HealthConfig cannot be less than 1ms"
            ));
        }
    }
    Ok(())
}

fn requirements(requirements: &ResourceRequirements) -> Outcome {
    requirements.limits.as_ref().map_or(Ok(()), resources)?;
    requirements.reservations.as_ref().map_or(Ok(()), resources)?;
    let reserved = requirements.reservations.as_ref();
    generic(reserved.and_then(|all| all.generic_resources.as_deref()).unwrap_or_default())
}

fn generic(wanted: &[GenericResource]) -> Outcome {
    let mut kinds = BTreeSet::new();
    for resource in wanted {
        let kind = resource.kind();
        let GenericResource::Discrete { value, .. } = resource else {
            return refuse(format!(
                "generic resource {kind:?}: a service asks for a number, not for one by name"
            ));
        };
        if !is_kind(kind) {
            return refuse(format!(
                "generic resource {kind:?}: a name has letters, digits, '-', '_' and '.'"
            ));
        }
        if *value < 1 {
            return refuse(format!("generic resource {kind:?}: ask for 1 or more, not {value}"));
        }
        if !kinds.insert(kind) {
            return refuse(format!("generic resource {kind:?} is asked for twice"));
        }
    }
    Ok(())
}

fn resources(resources: &Resources) -> Outcome {
    if let Some(given) = resources.nano_cpus.filter(|given| *given != 0 && *given < NANO_CPUS_MIN) {
        let cpus = given as f64 / 1e9;
        return refuse(format!("invalid cpu value {cpus}: Must be at least 0.001"));
    }
    match resources.memory_bytes.filter(|given| *given != 0 && *given < MEMORY_BYTES_MIN) {
        Some(given) => refuse(format!("invalid memory value {given}: Must be at least 4MiB")),
        None => Ok(()),
    }
}

fn update_config(what: &str, config: Option<&UpdateConfig>, actions: &[&str]) -> Outcome {
    let Some(config) = config else { return Ok(()) };
    not_negative(&format!("{what}: delay"), config.delay)?;
    not_negative(&format!("{what}: monitor"), config.monitor)?;
    not_negative(&format!("{what}: progress deadline"), config.progress_deadline)?;
    if config.max_failure_ratio.is_some_and(|ratio| !(0.0..=1.0).contains(&ratio)) {
        return refuse(format!("{what}: max failure ratio cannot be less than 0 or bigger than 1"));
    }
    let one_of = |field: &str, given: Option<&str>, known: &[&str]| match given {
        Some(given) if !given.is_empty() && !known.contains(&given) => {
            refuse(format!("{what}: {field} {given:?} is not one of {}", known.join(", ")))
        }
        _ => Ok(()),
    };
    one_of("failure action", config.failure_action.as_deref(), actions)?;
    one_of("order", config.order.as_deref(), &["stop-first", "start-first"])
}

fn endpoint_spec(spec: &EndpointSpec) -> Outcome {
    let ports = spec.ports.as_deref().unwrap_or_default();
    let mode = spec.mode.as_deref().unwrap_or("vip");
    if mode != "vip" && mode != "dnsrr" {
        return refuse(format!("EndpointSpec: mode {mode:?} is not one of vip, dnsrr"));
    }
    let is_ingress = |mode: Option<PublishMode>| mode.unwrap_or_default() == PublishMode::Ingress;
    if mode == "dnsrr" && ports.iter().any(|port| is_ingress(port.publish_mode)) {
        return refuse(
            "EndpointSpec: port published with ingress mode can't be used with dnsrr mode",
        );
    }
    let mut published = BTreeSet::new();
    for port in ports {
        if port.target_port == 0 {
            return refuse("EndpointSpec: target port must be between 1 and 65535");
        }
        let protocol = port.protocol.unwrap_or_default();
        if port.proxy_protocol.is_some() && protocol != PortProtocol::Tcp {
            return refuse(format!(
                "EndpointSpec: the PROXY protocol is for TCP: publish target port {}/{} without it",
                port.target_port,
                protocol.name()
            ));
        }
        let number = port.published_port.filter(|number| *number != 0);
        let key = number.map(|number| (protocol, number));
        if key.is_some_and(|key| !published.insert(key)) {
            return refuse("EndpointSpec: duplicate published ports provided");
        }
    }
    Ok(())
}

/// What a service lacks although it is accepted: fields without effect yet, for people.
pub fn warnings(spec: &ServiceSpec) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut note = |path: &str, extra: &Extra| {
        let given = extra.iter().filter(|(_, value)| !is_empty(value));
        warnings.extend(given.map(|(key, _)| format!("{path}{key} is kept but has no effect yet")));
    };
    let task = &spec.task_template;
    note("", &spec.extra);
    note("TaskTemplate.", &task.extra);
    if let Some(container) = &task.container_spec {
        note("TaskTemplate.ContainerSpec.", &container.extra);
    }
    if let Some(placement) = &task.placement {
        note("TaskTemplate.Placement.", &placement.extra);
    }
    for resources in
        task.resources.iter().flat_map(|all| [&all.limits, &all.reservations]).flatten()
    {
        note("TaskTemplate.Resources.", &resources.extra);
    }
    let later = without_effect(task).into_iter().filter(|(_, is_given)| *is_given);
    warnings.extend(later.map(|(path, _)| format!("{path} is kept but has no effect yet")));
    warnings.extend(task.log_driver.iter().flat_map(skep_common::spec::LogDriver::warnings));
    warnings.extend(stops_first(spec));
    let attempts = task.restart_policy.as_ref().and_then(|policy| policy.max_attempts);
    if attempts.is_some_and(|attempts| attempts > MAX_ATTEMPTS_COUNTED) {
        warnings.push(format!("MaxAttempts above {MAX_ATTEMPTS_COUNTED} counts as unlimited"));
    }
    warnings
}

/// What start-first means where two tasks of a slot may not be able to run at once.
fn stops_first(spec: &ServiceSpec) -> Option<String> {
    let mut configs = [&spec.update_config, &spec.rollback_config].into_iter().flatten();
    let is_start_first = configs.any(|config| config.order.as_deref() == Some("start-first"));
    let is_fixed = |port: &PortConfig| {
        port.publish_mode == Some(PublishMode::Host) && port.published_port.is_some_and(|n| n > 0)
    };
    let placement = spec.task_template.placement.as_ref();
    let is_limited = placement.and_then(|placement| placement.max_replicas).unwrap_or(0) > 0;
    (is_start_first && (is_limited || spec.ports().iter().any(is_fixed))).then(|| {
        "start-first stops the old task first where the new one fits on no node beside it, for a \
         host-mode port or MaxReplicas"
            .to_owned()
    })
}

/// Fields of a task that nothing acts on yet, and whether they are given.
fn without_effect(task: &TaskSpec) -> [(&'static str, bool); 2] {
    let container = task.container_spec.as_ref();
    let mut configs = container.iter().flat_map(|container| container.configs.iter().flatten());
    let resources = task.resources.as_ref();
    let limited = resources.and_then(|all| all.limits.as_ref()?.generic_resources.as_ref());
    [
        (
            "TaskTemplate.ContainerSpec.Configs.Runtime",
            configs.any(|config| config.runtime.is_some()),
        ),
        (
            "TaskTemplate.Resources.Limits.GenericResources",
            limited.is_some_and(|list| !list.is_empty()),
        ),
    ]
}

fn is_empty(value: &serde_json::Value) -> bool {
    use serde_json::Value;
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A valid spec with one part replaced.
    fn spec(part: serde_json::Value) -> ServiceSpec {
        let mut whole = json!({
            "Name": "web",
            "TaskTemplate": {"ContainerSpec": {"Image": "nginx"}},
            "Mode": {"Replicated": {"Replicas": 1}},
        });
        merge(&mut whole, part);
        serde_json::from_value(whole).unwrap()
    }

    fn merge(whole: &mut serde_json::Value, part: serde_json::Value) {
        match (whole, part) {
            (serde_json::Value::Object(whole), serde_json::Value::Object(part)) => {
                for (key, value) in part {
                    merge(whole.entry(key).or_insert(serde_json::Value::Null), value);
                }
            }
            (whole, part) => *whole = part,
        }
    }

    #[track_caller]
    fn check(part: &serde_json::Value, expect: &str) {
        let text =
            service_spec(&spec(part.clone())).map_or_else(|error| error.0, |()| String::new());
        assert_eq!(text, expect, "{part}");
    }

    #[test]
    fn names_modes_and_containers_are_refused_in_swarms_words() {
        let container = |part| json!({"TaskTemplate": {"ContainerSpec": part}});
        for (part, expect) in [
            (json!({}), ""),
            (json!({"Name": ""}), "meta: name must be provided"),
            (json!({"Name": "a.b"}), "name must be valid as a DNS name component: \"a.b\""),
            (json!({"Name": "-a"}), "name must be valid as a DNS name component: \"-a\""),
            (json!({"Name": "a".repeat(64)}), "name must be 63 characters or fewer"),
            (json!({"Name": "a--_b"}), ""),
            (
                json!({"Mode": {"Replicated": null, "Jobs": {}}}),
                "service mode Jobs is unknown: it must be one of Replicated, Global, \
                 ReplicatedJob and GlobalJob",
            ),
            (json!({"Mode": {"Replicated": null, "ReplicatedJob": {"TotalCompletions": 3}}}), ""),
            (json!({"Mode": {"Replicated": null, "GlobalJob": {}}}), ""),
            (
                json!({"Mode": {"Replicated": null, "ReplicatedJob": {"TotalCompletions": 3, "MaxConcurrent": 0}}}),
                "ReplicatedJob: MaxConcurrent must be at least 1, or no task ever runs",
            ),
            (
                json!({"Mode": {"Replicated": null, "GlobalJob": {}}, "UpdateConfig": {"Parallelism": 1}}),
                "Jobs may not have an update config",
            ),
            (json!({"Mode": {"Replicated": null, "Global": {}}}), ""),
            (
                json!({"Mode": {"Replicated": {}, "Global": {}}}),
                "service mode must be one of Replicated, Global, ReplicatedJob and GlobalJob",
            ),
            (
                json!({"TaskTemplate": {"ContainerSpec": null}}),
                "TaskSpec: missing runtime: ContainerSpec must be provided",
            ),
            (container(json!({"Image": ""})), "ContainerSpec: image reference must be provided"),
            (
                container(json!({"Image": "Nginx"})),
                "ContainerSpec: \"Nginx\" is not a valid repository/tag",
            ),
            (
                container(json!({"Image": "a:b:c"})),
                "ContainerSpec: \"a:b:c\" is not a valid repository/tag",
            ),
            (container(json!({"Image": "reg.io:5000/a/b:1.2"})), ""),
            (
                container(json!({"Healthcheck": {"Interval": 999_999}})),
                "ContainerSpec: Interval in HealthConfig cannot be less than 1ms",
            ),
            (container(json!({"Healthcheck": {"Timeout": 0}})), ""),
            (
                container(json!({"DNSConfig": {"Nameservers": ["10.0.0.2", "ns1"]}})),
                "DNSConfig: \"ns1\" is not the IP address of a DNS server",
            ),
            (
                container(json!({"DNSConfig": {"Search": ["a b"]}})),
                "DNSConfig: \"a b\" is not one word",
            ),
            (
                container(
                    json!({"DNSConfig": {"Nameservers": ["fd00::2"], "Options": ["ndots:2"]}}),
                ),
                "",
            ),
            (
                container(json!({"Mounts": [{"Target": "/a"}, {"Target": "/a"}]})),
                "ContainerSpec: duplicate mount point: /a",
            ),
        ] {
            check(&part, expect);
        }
    }

    #[test]
    fn resources_policies_and_ports_are_refused_in_swarms_words() {
        for (part, expect) in [
            (
                json!({"TaskTemplate": {"Resources": {"Limits": {"NanoCPUs": 999_999}}}}),
                "invalid cpu value 0.000999999: Must be at least 0.001",
            ),
            (
                json!({"TaskTemplate": {"Resources": {"Reservations": {"MemoryBytes": 4_194_303}}}}),
                "invalid memory value 4194303: Must be at least 4MiB",
            ),
            (
                json!({"TaskTemplate": {"LogDriver": {"Options": {"max-size": "much"}}}}),
                "log option max-size=\"much\" is no size above zero: write it as 500k, 10m or 1g",
            ),
            (
                json!({"TaskTemplate": {"LogDriver": {"Name": "local", "Options": {"max-file": "3"}}}}),
                "",
            ),
            (
                json!({"TaskTemplate": {"RestartPolicy": {"Delay": -1}}}),
                "TaskSpec: restart-delay cannot be negative",
            ),
            (
                json!({"UpdateConfig": {"MaxFailureRatio": 1.5}}),
                "UpdateConfig: max failure ratio cannot be less than 0 or bigger than 1",
            ),
            (
                json!({"RollbackConfig": {"FailureAction": "rollback"}}),
                "RollbackConfig: failure action \"rollback\" is not one of pause, continue",
            ),
            (
                json!({"UpdateConfig": {"Order": "any"}}),
                "UpdateConfig: order \"any\" is not one of stop-first, start-first",
            ),
            (
                json!({"EndpointSpec": {"Mode": "dnsrr", "Ports": [{"TargetPort": 80}]}}),
                "EndpointSpec: port published with ingress mode can't be used with dnsrr mode",
            ),
            (
                json!({"EndpointSpec": {"Ports": [{"TargetPort": 80, "PublishedPort": 8080}, {"TargetPort": 81, "PublishedPort": 8080}]}}),
                "EndpointSpec: duplicate published ports provided",
            ),
            (json!({"EndpointSpec": {"Ports": [{"TargetPort": 80}, {"TargetPort": 81}]}}), ""),
            (json!({"EndpointSpec": {"Ports": [{"TargetPort": 80, "ProxyProtocol": "v2"}]}}), ""),
            (
                json!({"EndpointSpec": {"Ports": [{"TargetPort": 53, "Protocol": "udp", "ProxyProtocol": "v2"}]}}),
                "EndpointSpec: the PROXY protocol is for TCP: publish target port 53/udp without it",
            ),
        ] {
            check(&part, expect);
        }
    }

    #[test]
    fn placements_and_generic_resources_are_refused_where_no_node_can_ever_fit() {
        let reserved = |list| json!({"TaskTemplate": {"Resources": {"Reservations": {"GenericResources": list}}}});
        for (part, expect) in [
            (
                json!({"TaskTemplate": {"Placement": {"Constraints": ["node.role=manager"]}}}),
                "constraint expected one operator from ==, !=: \"node.role=manager\"",
            ),
            (
                json!({"TaskTemplate": {"Placement": {"Constraints": ["node.rule==manager"]}}}),
                "invalid constraint key node.rule: use node.id, node.hostname, node.ip, node.role, \
                 node.platform.os, node.platform.arch, node.labels.KEY or engine.labels.KEY",
            ),
            (
                json!({"TaskTemplate": {"Placement": {"Preferences": [
                    {"Spread": {"SpreadDescriptor": "node.labels.zone"}},
                    {"Spread": {"SpreadDescriptor": "engine.labels.rack"}},
                ]}}}),
                "",
            ),
            (
                json!({"TaskTemplate": {"Placement": {"Preferences": [
                    {"Spread": {"SpreadDescriptor": "node.hostname"}},
                ]}}}),
                "invalid placement preference: cannot spread over \"node.hostname\": use node.labels.KEY \
                 or engine.labels.KEY",
            ),
            (
                json!({"TaskTemplate": {"Placement": {"Preferences": [{}]}}}),
                "invalid placement preference: it must have Spread",
            ),
            (reserved(json!([{"DiscreteResourceSpec": {"Kind": "GPU", "Value": 2}}])), ""),
            (
                reserved(json!([{"DiscreteResourceSpec": {"Kind": "GPU", "Value": 0}}])),
                "generic resource \"GPU\": ask for 1 or more, not 0",
            ),
            (
                reserved(json!([{"NamedResourceSpec": {"Kind": "GPU", "Value": "a"}}])),
                "generic resource \"GPU\": a service asks for a number, not for one by name",
            ),
            (
                reserved(json!([{"DiscreteResourceSpec": {"Kind": "G U", "Value": 1}}])),
                "generic resource \"G U\": a name has letters, digits, '-', '_' and '.'",
            ),
            (
                reserved(json!([
                    {"DiscreteResourceSpec": {"Kind": "GPU", "Value": 1}},
                    {"DiscreteResourceSpec": {"Kind": "GPU", "Value": 1}},
                ])),
                "generic resource \"GPU\" is asked for twice",
            ),
        ] {
            check(&part, expect);
        }
    }

    #[test]
    fn what_has_no_effect_is_said() {
        let given = spec(json!({
            "Networks": [],
            "TaskTemplate": {
                "Runtime": "container", "LogDriver": {"Name": "syslog"},
                "Networks": [{"Target": "front"}],
                "RestartPolicy": {"MaxAttempts": 1000},
            },
            "EndpointSpec": {"Ports": [
                {"TargetPort": 53, "Protocol": "udp"}, {"TargetPort": 54, "Protocol": "sctp"},
            ]},
        }));
        assert_eq!(
            warnings(&given),
            [
                "TaskTemplate.Runtime is kept but has no effect yet",
                "log driver syslog is not supported yet: output is kept in files on each node, as with json-file",
                "MaxAttempts above 100 counts as unlimited",
            ]
        );
    }
}
