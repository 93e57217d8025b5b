//! One service of a document as a [`ServiceSpec`].
//!
//! Source: docker/cli `cli/compose/convert/service.go`. Lists whose order means nothing are sorted,
//! so that the same file always gives the same spec.

use std::collections::BTreeMap;

use super::fields::{Field, Section};
use super::network::Networks;
use super::payloads::Payloads;
use super::tree::{Key, Node, Value};
use super::units::capabilities;
use super::{Report, deploy, known, published};
use crate::spec::{
    ContainerSpec, DnsConfig, EndpointSpec, HealthConfig, Labels, LogDriver, ServiceSpec, TaskSpec,
    Ulimit,
};

/// The label that names the stack of a service, task or container.
pub const STACK_LABEL: &str = "com.docker.stack.namespace";
/// The label that keeps the image's name as the file has it.
pub const IMAGE_LABEL: &str = "com.docker.stack.image";

/// What is the same for every service of a deploy.
pub(super) struct Context<'a> {
    pub(super) stack: &'a str,
    pub(super) environment: &'a BTreeMap<String, String>,
    pub(super) secrets: &'a Payloads,
    pub(super) configs: &'a Payloads,
}

/// The spec of the service `key`.
pub(super) fn convert(
    context: &Context<'_>,
    networks: &mut Networks,
    key: &Key,
    node: &Node,
    report: &mut Report,
) -> ServiceSpec {
    let owner = format!("service {}", key.name);
    let name = format!("{}_{}", context.stack, key.name);
    check_name(&key.name, &name, &owner, key, report);
    let section = Section::new(owner.clone(), String::new(), node, report);
    section.check(known::SERVICE, known::SERVICE_LATER, report);

    let image = match section.get("image") {
        Some(field) => field.text(report).unwrap_or_default(),
        None => {
            // What is no mapping at all was reported as such.
            if matches!(node.value, Value::Map(_) | Value::Null) {
                report.error(key.at, format!("{owner} has no image; add 'image: NAME'"));
            }
            String::new()
        }
    };
    let deploy = deploy::convert(&section, report);
    let mut labels = deploy.labels;
    labels.insert(STACK_LABEL.into(), context.stack.into());
    labels.insert(IMAGE_LABEL.into(), image.clone());

    let ports = section.get("ports").map(|field| published::convert(&field, report));
    let ports = ports.filter(|ports| !ports.is_empty());
    let mode = section.get("network_mode");
    let field = section.get("networks");
    let networks = networks.of_service(&key.name, field.as_ref(), mode.as_ref(), report);
    let endpoint_spec =
        EndpointSpec { mode: deploy.endpoint_mode, ports, ingress_policy: deploy.ingress_policy };
    let has_endpoint = endpoint_spec != EndpointSpec::default();
    ServiceSpec {
        name,
        labels: Some(labels),
        task_template: TaskSpec {
            container_spec: Some(container(context, image, &section, report)),
            resources: deploy.resources,
            restart_policy: deploy.restart_policy,
            placement: deploy.placement,
            log_driver: section.get("logging").map(|field| log_driver(&field, report)),
            networks: Some(networks),
            ..TaskSpec::default()
        },
        mode: Some(deploy.mode),
        update_config: deploy.update_config,
        rollback_config: deploy.rollback_config,
        endpoint_spec: has_endpoint.then_some(endpoint_spec),
        ..ServiceSpec::default()
    }
}

/// Longest name of a service: it is a DNS label.
const NAME_LENGTH_MAX: usize = 63;

fn check_name(short: &str, full: &str, owner: &str, key: &Key, report: &mut Report) {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if short.is_empty() || !short.chars().all(is_word) {
        let rule = "use letters, digits, '.', '_' and '-'";
        report.error(key.at, format!("{owner} has a name that is not allowed; {rule}"));
    } else if full.len() > NAME_LENGTH_MAX {
        report.error(
            key.at,
            format!("{owner} gets the name {full}, which is longer than {NAME_LENGTH_MAX} characters; shorten it"),
        );
    }
}

fn container(
    context: &Context<'_>,
    image: String,
    section: &Section<'_>,
    report: &mut Report,
) -> ContainerSpec {
    let text =
        |key: &str, report: &mut Report| section.get(key).and_then(|field| field.text(report));
    let texts = |key: &str, report: &mut Report| {
        let list = section.get(key).map(|field| field.texts(report));
        list.filter(|list| !list.is_empty())
    };
    let flag =
        |key: &str, report: &mut Report| section.get(key).and_then(|field| field.boolean(report));
    let command = |key: &str, report: &mut Report| {
        section.get(key).and_then(|field| field.command(report)).filter(|words| !words.is_empty())
    };
    let (add, drop) = capabilities(
        &texts("cap_add", report).unwrap_or_default(),
        &texts("cap_drop", report).unwrap_or_default(),
    );
    let mut labels: Labels =
        section.get("labels").map(|field| plain_pairs(&field, report)).unwrap_or_default();
    labels.insert(STACK_LABEL.into(), context.stack.into());
    ContainerSpec {
        image,
        labels: Some(labels),
        command: command("entrypoint", report),
        args: command("command", report),
        hostname: text("hostname", report),
        env: section
            .get("environment")
            .map(|field| environment(&field, context.environment, report))
            .filter(|list| !list.is_empty()),
        dir: text("working_dir", report),
        user: text("user", report),
        groups: texts("group_add", report),
        stop_signal: text("stop_signal", report),
        tty: flag("tty", report),
        open_stdin: flag("stdin_open", report),
        read_only: flag("read_only", report),
        stop_grace_period: section
            .get("stop_grace_period")
            .and_then(|field| field.duration(report)),
        healthcheck: section.get("healthcheck").map(|field| healthcheck(&field, report)),
        hosts: section.get("extra_hosts").map(|field| hosts(&field, report)),
        dns_config: dns_config(section, report),
        init: flag("init", report),
        sysctls: section.get("sysctls").map(|field| plain_pairs(&field, report)),
        capability_add: (!add.is_empty()).then_some(add),
        capability_drop: (!drop.is_empty()).then_some(drop),
        ulimits: section.get("ulimits").map(|field| ulimits(&field, report)),
        oom_score_adj: section.get("oom_score_adj").and_then(|field| field.number(report)),
        secrets: section
            .get("secrets")
            .map(|field| context.secrets.secrets_of(&field, report))
            .filter(|list| !list.is_empty()),
        configs: section
            .get("configs")
            .map(|field| context.configs.configs_of(&field, report))
            .filter(|list| !list.is_empty()),
        extra: Default::default(),
    }
}

/// `dns`, `dns_search` and `dns_opt`; the first two may be one text.
fn dns_config(section: &Section<'_>, report: &mut Report) -> Option<DnsConfig> {
    let list = |key: &str, report: &mut Report| {
        let field = section.get(key)?;
        let texts = match field.node.value {
            Value::List(_) => field.texts(report),
            _ => field.text(report).into_iter().collect(),
        };
        (!texts.is_empty()).then_some(texts)
    };
    let config = DnsConfig {
        nameservers: list("dns", report),
        search: list("dns_search", report),
        options: list("dns_opt", report),
    };
    (!config.is_empty()).then_some(config)
}

/// `NAME=VALUE` each, sorted; a name without value takes the caller's.
fn environment(
    field: &Field<'_>,
    caller: &BTreeMap<String, String>,
    report: &mut Report,
) -> Vec<String> {
    let mut list = Vec::new();
    for (name, value) in field.pairs(report) {
        match value.or_else(|| caller.get(&name).cloned()) {
            Some(value) => list.push(format!("{name}={value}")),
            None => report.warn(
                field.node.at,
                format!("{}: {name} has no value here and is not set in the environment; it is left out", field.name),
            ),
        }
    }
    list
}

/// Labels and the like: a name without value has an empty one.
pub(super) fn plain_pairs(field: &Field<'_>, report: &mut Report) -> Labels {
    let pairs = field.pairs(report).into_iter();
    pairs.map(|(name, value)| (name, value.unwrap_or_default())).collect()
}

/// The server says what of it has no effect yet.
fn log_driver(field: &Field<'_>, report: &mut Report) -> LogDriver {
    let section = field.section(report);
    section.check(known::LOGGING, &[], report);
    let name = section.get("driver").and_then(|field| field.text(report));
    let options = section.get("options").map(|field| plain_pairs(&field, report));
    let driver = LogDriver { name, options };
    if let Err(error) = driver.rotation() {
        let options = section.get("options").map_or(field.node.at, |field| field.node.at);
        report.error(options, format!("{}: {error}", field.name));
    }
    driver
}

fn healthcheck(field: &Field<'_>, report: &mut Report) -> HealthConfig {
    let section = field.section(report);
    section.check(known::HEALTHCHECK, &[], report);
    let test = section.get("test").and_then(|field| health_test(&field, report));
    let duration =
        |key: &str, report: &mut Report| section.get(key).and_then(|field| field.duration(report));
    if section.get("disable").and_then(|field| field.boolean(report)) == Some(true) {
        if test.is_some() {
            report.error(
                field.node.at,
                format!("{} has both 'test' and 'disable'; remove one", field.name),
            );
        }
        return HealthConfig { test: Some(vec!["NONE".into()]), ..Default::default() };
    }
    HealthConfig {
        test,
        interval: duration("interval", report),
        timeout: duration("timeout", report),
        start_period: duration("start_period", report),
        start_interval: duration("start_interval", report),
        retries: section.get("retries").and_then(|field| field.number(report)),
        extra: Default::default(),
    }
}

fn health_test(field: &Field<'_>, report: &mut Report) -> Option<Vec<String>> {
    if let Value::Text(text) = &field.node.value {
        return Some(vec!["CMD-SHELL".into(), text.clone()]);
    }
    let words = field.command(report)?;
    let first = words.first().map(String::as_str);
    if !matches!(first, Some("NONE" | "CMD" | "CMD-SHELL")) {
        let message = format!("{} must begin with NONE, CMD or CMD-SHELL", field.name);
        report.error(field.node.at, message);
        return None;
    }
    Some(words)
}

/// `host:ip` or `host=ip` as a list, or a mapping, in the form of /etc/hosts.
fn hosts(field: &Field<'_>, report: &mut Report) -> Vec<String> {
    let line = |host: &str, ip: &str| {
        let ip = ip.trim().trim_start_matches('[').trim_end_matches(']');
        (!host.is_empty() && !ip.is_empty()).then(|| format!("{ip} {}", host.trim()))
    };
    if let Value::Map(_) = field.node.value {
        let pairs = field.pairs(report).into_iter();
        return pairs.filter_map(|(host, ip)| line(&host, &ip.unwrap_or_default())).collect();
    }
    let mut lines = Vec::new();
    for item in field.items(report) {
        let field = field.item(item);
        let Some(text) = field.text(report) else { continue };
        let pair = text.split_once('=').or_else(|| text.split_once(':'));
        match pair.and_then(|(host, ip)| line(host, ip)) {
            Some(line) => lines.push(line),
            None => field.refuse("made of HOST:IP", report),
        }
    }
    lines
}

/// A number for both limits, or a mapping with `soft` and `hard`; sorted by name.
fn ulimits(field: &Field<'_>, report: &mut Report) -> Vec<Ulimit> {
    let mut ulimits = Vec::new();
    for (key, node) in field.entries(report) {
        let entry = field.entry(key, node);
        let (soft, hard) = if let Value::Map(_) = node.value {
            let section = entry.section(report);
            section.check(&["soft", "hard"], &[], report);
            let both: Vec<Option<i64>> = ["soft", "hard"]
                .map(|key| match section.get(key) {
                    Some(field) => field.number(report),
                    None => {
                        report.error(node.at, format!("{} has no '{key}'; add it", entry.name));
                        None
                    }
                })
                .into();
            (both[0], both[1])
        } else {
            let both = entry.number(report);
            (both, both)
        };
        if let (Some(soft), Some(hard)) = (soft, hard) {
            ulimits.push(Ulimit { name: key.name.clone(), soft, hard });
        }
    }
    ulimits.sort_by(|a, b| a.name.cmp(&b.name));
    ulimits
}
