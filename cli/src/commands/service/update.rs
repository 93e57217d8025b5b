//! `skep service update` and `service rollback`.
//!
//! Flags change the spec that was read; when someone else wrote in between, the spec is read again
//! and the flags are laid over that. Source: docker/cli `service/update.go`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use clap::Args;
use skep_common::compose::units::capability;
use skep_common::spec::generic::parse_wanted;
use skep_common::spec::{
    ConfigReference, ContainerSpec, DnsConfig, EndpointSpec, GenericResource, Labels,
    NetworkAttachmentConfig, PlacementPreference, PortConfig, Predefined, SecretReference,
    ServiceSpec, TaskSpec, Ulimit,
};
use skep_common::{Network, Service};
use skep_proto::{PlanRequest, UpdateServiceRequest};

use super::super::plan;
use super::create::{parse_host, parse_ulimit, set_environment};
use super::flags::{
    Publish, SpecFlags, WaitFlags, Words, environment_entry, parse_environment, parse_label,
    parse_network, parse_publish, parse_words, sort_ports,
};
use super::payloads::{self, parse_config, parse_secret};
use super::placement::{change_generic, change_preferences, parse_preference};
use super::{Waiting, caller_environment, converge};
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// How often an update that lost a race reads and asks again. The status of a running update is
/// written a few times a second at most.
const ATTEMPTS_MAX: usize = 5;

/// `skep service update [OPTIONS] SERVICE`
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// Service image tag
    #[arg(long)]
    image: Option<String>,
    /// Service command args
    #[arg(long, value_parser = parse_words, value_name = "COMMAND")]
    args: Option<Words>,
    /// Add or update an environment variable
    #[arg(long, value_parser = parse_environment, value_name = "NAME[=VALUE]")]
    env_add: Vec<String>,
    /// Remove an environment variable
    #[arg(long, value_name = "NAME")]
    env_rm: Vec<String>,
    /// Add or update a service label
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    label_add: Vec<(String, String)>,
    /// Remove a label by its key
    #[arg(long, value_name = "NAME")]
    label_rm: Vec<String>,
    /// Add or update a container label
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    container_label_add: Vec<(String, String)>,
    /// Remove a container label by its key
    #[arg(long, value_name = "NAME")]
    container_label_rm: Vec<String>,
    /// Add or update a published port
    #[arg(long, value_parser = parse_publish, value_name = "PORT")]
    publish_add: Vec<Publish>,
    /// Remove a published port by its target port
    #[arg(long, value_parser = parse_publish, value_name = "PORT")]
    publish_rm: Vec<Publish>,
    /// Add a network
    #[arg(long, value_parser = parse_network, value_name = "NETWORK")]
    network_add: Vec<NetworkAttachmentConfig>,
    /// Remove a network
    #[arg(long, value_name = "NETWORK")]
    network_rm: Vec<String>,
    /// Add or update a placement constraint
    #[arg(long, value_name = "CONSTRAINT")]
    constraint_add: Vec<String>,
    /// Remove a constraint
    #[arg(long, value_name = "CONSTRAINT")]
    constraint_rm: Vec<String>,
    /// Add a placement preference
    #[arg(long, value_parser = parse_preference, value_name = "spread=KEY")]
    placement_pref_add: Vec<PlacementPreference>,
    /// Remove a placement preference
    #[arg(long, value_parser = parse_preference, value_name = "spread=KEY")]
    placement_pref_rm: Vec<PlacementPreference>,
    /// Add or update a user defined resource
    #[arg(long, value_parser = parse_wanted, value_name = "KIND=NUMBER")]
    generic_resource_add: Vec<GenericResource>,
    /// Remove a user defined resource
    #[arg(long, value_name = "KIND")]
    generic_resource_rm: Vec<String>,
    /// Add a secret to the service: NAME or source=NAME,target=FILE,uid=UID,gid=GID,mode=0400,version=N
    #[arg(long, value_parser = parse_secret, value_name = "SECRET")]
    secret_add: Vec<SecretReference>,
    /// Remove a secret
    #[arg(long, value_name = "SECRET")]
    secret_rm: Vec<String>,
    /// Add a configuration file to the service; written as secrets
    #[arg(long, value_parser = parse_config, value_name = "CONFIG")]
    config_add: Vec<ConfigReference>,
    /// Remove a configuration file
    #[arg(long, value_name = "CONFIG")]
    config_rm: Vec<String>,
    /// Add an additional supplementary user group to the container
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
    /// Remove a previously added supplementary user group from the container
    #[arg(long, value_name = "GROUP")]
    group_rm: Vec<String>,
    /// Add a custom host-to-IP mapping (host:ip)
    #[arg(long, value_parser = parse_host, value_name = "HOST:IP")]
    host_add: Vec<String>,
    /// Remove a custom host-to-IP mapping (host:ip)
    #[arg(long, value_parser = parse_host, value_name = "HOST:IP")]
    host_rm: Vec<String>,
    /// Add or update a custom DNS server
    #[arg(long, value_name = "IP")]
    dns_add: Vec<std::net::IpAddr>,
    /// Remove a custom DNS server
    #[arg(long, value_name = "IP")]
    dns_rm: Vec<std::net::IpAddr>,
    /// Add or update a DNS option
    #[arg(long, value_name = "OPTION")]
    dns_option_add: Vec<String>,
    /// Remove a DNS option
    #[arg(long, value_name = "OPTION")]
    dns_option_rm: Vec<String>,
    /// Add or update a custom DNS search domain
    #[arg(long, value_name = "DOMAIN")]
    dns_search_add: Vec<String>,
    /// Remove a DNS search domain
    #[arg(long, value_name = "DOMAIN")]
    dns_search_rm: Vec<String>,
    /// Add or update a Sysctl option
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    sysctl_add: Vec<(String, String)>,
    /// Remove a Sysctl option
    #[arg(long, value_name = "NAME")]
    sysctl_rm: Vec<String>,
    /// Add or update a ulimit option
    #[arg(long, value_parser = parse_ulimit, value_name = "NAME=SOFT[:HARD]")]
    ulimit_add: Vec<Ulimit>,
    /// Remove a ulimit option
    #[arg(long, value_name = "NAME")]
    ulimit_rm: Vec<String>,
    /// Add Linux capabilities
    #[arg(long)]
    cap_add: Vec<String>,
    /// Drop Linux capabilities
    #[arg(long)]
    cap_drop: Vec<String>,
    /// Force update even if no changes require it
    #[arg(long)]
    force: bool,
    /// Rollback to previous specification
    #[arg(long)]
    rollback: bool,
    /// Show what would be done, and write nothing: which tasks would be created, moved and stopped, and where;
    /// exit code 2 where one would fit nowhere. `--plan=json` and `--plan=TEMPLATE` format it
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "table", value_name = "FORMAT", conflicts_with = "rollback")]
    plan: Option<String>,
    #[command(flatten)]
    flags: SpecFlags,
    #[command(flatten)]
    wait: WaitFlags,
    /// Name or id of the service
    service: String,
}

/// `skep service rollback [OPTIONS] SERVICE`
#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    /// The revision to go back to, as `service history` numbers them (default: the previous specification)
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    to: Option<u64>,
    #[command(flatten)]
    wait: WaitFlags,
    /// Name or id of the service
    service: String,
}

/// Lays the flags over `spec`.
fn apply(
    args: &UpdateArgs,
    spec: &mut ServiceSpec,
    caller: &BTreeMap<String, String>,
) -> Result<()> {
    args.flags.apply(spec)?;
    if args.force {
        let counter = spec.task_template.force_update.get_or_insert(0);
        *counter += 1;
    }
    change_map(&mut spec.labels, &args.label_add, &args.label_rm);
    change_constraints(args, &mut spec.task_template);
    change_generic(&mut spec.task_template, &args.generic_resource_add, &args.generic_resource_rm);
    change_preferences(&mut spec.task_template, &args.placement_pref_add, &args.placement_pref_rm);
    change_ports(args, &mut spec.endpoint_spec);
    let container = spec.task_template.container_spec.get_or_insert_default();
    change_container(args, container, caller);
    change_capabilities(args, container);
    let payloads = payloads::Changes {
        add_secrets: &args.secret_add,
        remove_secrets: &args.secret_rm,
        add_configs: &args.config_add,
        remove_configs: &args.config_rm,
    };
    payloads.apply(container);
    Ok(())
}

fn change_container(
    args: &UpdateArgs,
    container: &mut ContainerSpec,
    caller: &BTreeMap<String, String>,
) {
    if let Some(image) = &args.image {
        container.image.clone_from(image);
    }
    if let Some(Words(words)) = &args.args {
        container.args = (!words.is_empty()).then(|| words.clone());
    }
    change_map(&mut container.labels, &args.container_label_add, &args.container_label_rm);
    change_map(&mut container.sysctls, &args.sysctl_add, &args.sysctl_rm);
    change_list(&mut container.env, |list| {
        list.retain(|entry| {
            !args.env_rm.iter().any(|name| entry.split('=').next() == Some(name.as_str()))
        });
        for entry in args.env_add.iter().filter_map(|text| environment_entry(text, caller)) {
            set_environment(list, entry);
        }
    });
    change_words(&mut container.groups, &args.group_add, &args.group_rm);
    change_words(&mut container.hosts, &args.host_add, &args.host_rm);
    change_dns(args, &mut container.dns_config);
    change_list(&mut container.ulimits, |list| {
        let is_replaced = |known: &Ulimit| args.ulimit_add.iter().any(|new| new.name == known.name);
        list.retain(|known| !args.ulimit_rm.contains(&known.name) && !is_replaced(known));
        list.extend(args.ulimit_add.iter().cloned());
        list.sort_by(|a, b| a.name.cmp(&b.name));
    });
}

fn change_dns(args: &UpdateArgs, config: &mut Option<DnsConfig>) {
    let texts = |list: &[std::net::IpAddr]| -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    };
    let mut after = config.clone().unwrap_or_default();
    change_words(&mut after.nameservers, &texts(&args.dns_add), &texts(&args.dns_rm));
    change_words(&mut after.options, &args.dns_option_add, &args.dns_option_rm);
    change_words(&mut after.search, &args.dns_search_add, &args.dns_search_rm);
    if after != config.clone().unwrap_or_default() {
        *config = (!after.is_empty()).then_some(after);
    }
}

/// Changes a list whose absence means that it is empty.
fn change_list<T: Clone + PartialEq>(list: &mut Option<Vec<T>>, change: impl FnOnce(&mut Vec<T>)) {
    let before = list.clone().unwrap_or_default();
    let mut after = before.clone();
    change(&mut after);
    if after != before {
        *list = (!after.is_empty()).then_some(after);
    }
}

fn change_words(list: &mut Option<Vec<String>>, add: &[String], remove: &[String]) {
    change_list(list, |list| {
        list.retain(|word| !remove.contains(word));
        for word in add {
            if !list.contains(word) {
                list.push(word.clone());
            }
        }
    });
}

fn change_map(map: &mut Option<Labels>, add: &[(String, String)], remove: &[String]) {
    let mut after = map.clone().unwrap_or_default();
    after.retain(|name, _| !remove.contains(name));
    after.extend(add.iter().cloned());
    if after != map.clone().unwrap_or_default() {
        *map = (!after.is_empty()).then_some(after);
    }
}

fn change_constraints(args: &UpdateArgs, task: &mut TaskSpec) {
    if args.constraint_add.is_empty() && args.constraint_rm.is_empty() {
        return;
    }
    let placement = task.placement.get_or_insert_default();
    change_words(&mut placement.constraints, &args.constraint_add, &args.constraint_rm);
}

/// How specs name a network: by its id, or by the name of one that every node has.
fn target(network: &Network) -> String {
    let predefined = Predefined::ALL.into_iter().find(|one| one.id() == network.id);
    predefined.map_or_else(|| network.id.to_string(), |one| one.name().to_owned())
}

/// Networks to be on and to leave, as specs name them.
#[derive(Debug, Default)]
struct Networks {
    add: Vec<NetworkAttachmentConfig>,
    remove: Vec<String>,
}

impl Networks {
    async fn resolve(args: &UpdateArgs, client: &Client) -> Result<Self> {
        let mut networks = Self::default();
        for config in &args.network_add {
            let network: Network = client.get("network", &config.target).await?;
            let target = target(&network);
            networks.add.push(NetworkAttachmentConfig { target, ..config.clone() });
        }
        for reference in &args.network_rm {
            let network: Network = client.get("network", reference).await?;
            networks.remove.push(target(&network));
        }
        Ok(networks)
    }

    /// A network that is left and joined in one update is joined with its new aliases.
    fn change(&self, spec: &mut ServiceSpec) -> Result<()> {
        if self.add.is_empty() && self.remove.is_empty() {
            return Ok(());
        }
        let mut networks = spec.networks().to_vec();
        networks.retain(|config| !self.remove.contains(&config.target));
        for config in &self.add {
            if networks.iter().any(|known| known.target == config.target) {
                bail!("service is already attached to network {}", config.target);
            }
            networks.push(config.clone());
        }
        spec.networks = None;
        spec.task_template.networks = (!networks.is_empty()).then_some(networks);
        Ok(())
    }
}

/// Ports go by target port, protocol and mode; a new port takes the place of the one that is
/// published under its number.
fn change_ports(args: &UpdateArgs, endpoint: &mut Option<EndpointSpec>) {
    if args.publish_add.is_empty() && args.publish_rm.is_empty() {
        return;
    }
    let endpoint = endpoint.get_or_insert_default();
    let kind = |port: &PortConfig| {
        (port.protocol.unwrap_or_default(), port.publish_mode.unwrap_or_default() as u8)
    };
    change_list(&mut endpoint.ports, |ports| {
        for removed in args.publish_rm.iter().flat_map(|Publish(ports)| ports) {
            ports.retain(|port| {
                port.target_port != removed.target_port || kind(port) != kind(removed)
            });
        }
        for added in args.publish_add.iter().flat_map(|Publish(ports)| ports) {
            ports.retain(|port| {
                added.published_port.is_none()
                    || port.published_port != added.published_port
                    || kind(port) != kind(added)
            });
            ports.push(added.clone());
        }
        sort_ports(ports);
    });
}

/// Dropping what was added takes it from the added ones, and the other way round.
fn change_capabilities(args: &UpdateArgs, container: &mut ContainerSpec) {
    let set =
        |names: &[String]| -> BTreeSet<String> { names.iter().map(|n| capability(n)).collect() };
    let (to_add, to_drop) = (set(&args.cap_add), set(&args.cap_drop));
    if to_add.is_empty() && to_drop.is_empty() {
        return;
    }
    let mut added = set(container.capability_add.as_deref().unwrap_or_default());
    let mut dropped = set(container.capability_drop.as_deref().unwrap_or_default());
    for name in to_drop.difference(&to_add) {
        if !added.remove(name) {
            dropped.insert(name.clone());
        }
    }
    for name in &to_add {
        if !dropped.remove(name) {
            added.insert(name.clone());
        }
    }
    let list = |names: BTreeSet<String>| {
        let names: Vec<String> =
            if names.contains("ALL") { vec!["ALL".into()] } else { names.into_iter().collect() };
        (!names.is_empty()).then_some(names)
    };
    container.capability_add = list(added);
    container.capability_drop = list(dropped);
}

/// Reads the service, changes its spec and writes it back, again when someone was faster.
pub(super) async fn change(
    client: &Client,
    reference: &str,
    ui: &mut Ui,
    change: impl Fn(&mut ServiceSpec) -> Result<()>,
) -> Result<Waiting> {
    for attempt in 1.. {
        let service: Service = client.get("service", reference).await?;
        let mut spec = service.spec.clone();
        change(&mut spec)?;
        let request = UpdateServiceRequest {
            id: service.id.to_string(),
            version: service.meta.version.index,
            spec_json: serde_json::to_string(&spec)?,
            rollback: false,
            rollback_to: 0,
        };
        match send(client, request, ui).await {
            Ok(()) => return waiting_after(client, &service).await,
            Err(error) if attempt < ATTEMPTS_MAX && is_outdated(&error) => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the last attempt returns")
}

async fn send(client: &Client, request: UpdateServiceRequest, ui: &mut Ui) -> Result<()> {
    let answer = client.control().update_service(request).await.map_err(Refusal)?.into_inner();
    for warning in answer.warnings {
        ui.note(warning)?;
    }
    Ok(())
}

fn is_outdated(error: &anyhow::Error) -> bool {
    let refusal = error.downcast_ref::<Refusal>();
    refusal.is_some_and(|refusal| refusal.0.code() == tonic::Code::Aborted)
}

/// Shows what an update would do.
async fn show_plan(args: &UpdateArgs, format: &str, client: &Client, ui: &mut Ui) -> Result<()> {
    let networks = Networks::resolve(args, client).await?;
    for attempt in 1.. {
        let service: Service = client.get("service", &args.service).await?;
        let mut spec = service.spec.clone();
        networks.change(&mut spec)?;
        apply(args, &mut spec, &caller_environment())?;
        let request = PlanRequest {
            spec_json: serde_json::to_string(&spec)?,
            id: service.id.to_string(),
            version: service.meta.version.index,
            stack: None,
        };
        match client.control().plan(request).await {
            Ok(answer) => return plan::show(&answer.into_inner(), Some(format), ui),
            Err(status) if attempt < ATTEMPTS_MAX && status.code() == tonic::Code::Aborted => {}
            Err(status) => return Err(Refusal(status).into()),
        }
    }
    unreachable!("the last attempt returns")
}

pub(super) async fn run(args: &UpdateArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    if let Some(format) = &args.plan {
        return show_plan(args, format, client, ui).await;
    }
    let waiting = if args.rollback {
        let blank = ServiceSpec {
            task_template: TaskSpec {
                container_spec: Some(Default::default()),
                ..Default::default()
            },
            ..Default::default()
        };
        let mut touched = blank.clone();
        apply(args, &mut touched, &BTreeMap::new())?;
        if touched != blank {
            bail!("other flags may not be combined with --rollback");
        }
        send_rollback(client, &args.service, 0, ui).await?
    } else {
        let caller = caller_environment();
        let networks = Networks::resolve(args, client).await?;
        change(client, &args.service, ui, |spec| {
            networks.change(spec)?;
            apply(args, spec, &caller)
        })
        .await?
    };
    ui.line(&args.service)?;
    converge(waiting, &args.wait, client, ui).await
}

/// What to wait for once a change of `before` was accepted. An update that changes nothing is not
/// written: the service as it is must then be what it should be.
async fn waiting_after(client: &Client, before: &Service) -> Result<Waiting> {
    let after: Service = client.get("service", &before.id.to_string()).await?;
    if after.meta.version == before.meta.version {
        return Ok(Waiting::for_new(before.id.to_string()));
    }
    Ok(Waiting::for_changed(before))
}

/// Rolls back to a revision, or to the previous spec where that is 0.
async fn send_rollback(
    client: &Client,
    reference: &str,
    rollback_to: u64,
    ui: &mut Ui,
) -> Result<Waiting> {
    let service: Service = client.get("service", reference).await?;
    let request = UpdateServiceRequest {
        id: service.id.to_string(),
        version: service.meta.version.index,
        spec_json: String::new(),
        rollback: true,
        rollback_to,
    };
    send(client, request, ui).await?;
    waiting_after(client, &service).await
}

pub(super) async fn rollback(args: &RollbackArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let to = args.to.unwrap_or(0);
    let waiting = send_rollback(client, &args.service, to, ui).await?;
    ui.line(&args.service)?;
    converge(waiting, &args.wait, client, ui).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use serde_json::{Value, json};

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: UpdateArgs,
    }

    fn base() -> Value {
        json!({
            "Name": "web", "Labels": {"a": "1", "b": "2"},
            "TaskTemplate": {
                "ContainerSpec": {
                    "Image": "img:1", "Args": ["x"], "Env": ["A=1", "B=2"],
                    "CapabilityAdd": ["CAP_CHOWN"], "CapabilityDrop": ["CAP_KILL"],
                    "Mounts": [{"Target": "/kept"}],
                },
                "Placement": {"Constraints": ["node.role==worker"]},
                "LogDriver": {"Name": "local", "Options": {"max-file": "2"}},
            },
            "Mode": {"Replicated": {"Replicas": 2}},
            "UpdateConfig": {"Parallelism": 4},
            "EndpointSpec": {"Ports": [
                {"Protocol": "udp", "TargetPort": 53, "PublishedPort": 53, "PublishMode": "ingress"},
                {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"},
            ]},
        })
    }

    /// The fields that differ from the base, as `pointer=value`; a field that went has no value.
    fn changes(line: &str) -> Result<Vec<String>> {
        let words = skep_common::compose::units::split_words(line)?;
        let words = ["update".to_owned()].into_iter().chain(words).chain(["web".to_owned()]);
        let line = Line::try_parse_from(words)?;
        let mut spec: ServiceSpec = serde_json::from_value(base())?;
        apply(&line.args, &mut spec, &BTreeMap::new())?;
        let mut out = Vec::new();
        diff("", &base(), &serde_json::to_value(spec)?, &mut out);
        Ok(out)
    }

    fn diff(path: &str, before: &Value, after: &Value, out: &mut Vec<String>) {
        match (before, after) {
            (Value::Object(a), Value::Object(b)) => {
                let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
                for key in keys {
                    let path = format!("{path}/{key}");
                    diff(
                        &path,
                        a.get(key).unwrap_or(&Value::Null),
                        b.get(key).unwrap_or(&Value::Null),
                        out,
                    );
                }
            }
            (a, b) if a == b => {}
            (_, Value::Null) => out.push(format!("{path}=")),
            (_, b) => out.push(format!("{path}={b}")),
        }
    }

    #[test]
    fn networks_that_every_node_has_are_named_by_name() {
        let network = |id| Network {
            id,
            meta: skep_common::Meta::default(),
            spec: skep_common::spec::NetworkSpec::default(),
            vni: 0,
            subnets: Vec::new(),
            pending_delete: false,
        };
        for one in Predefined::ALL {
            assert_eq!(target(&network(one.id())), one.name());
        }
        let made = skep_common::NetworkId(9);
        assert_eq!(target(&network(made)), made.to_string());
    }

    #[test]
    fn networks_are_joined_and_left_by_id() {
        let config = |target: &str, alias: Option<&str>| NetworkAttachmentConfig {
            target: target.into(),
            aliases: alias.map(|alias| vec![alias.into()]),
            driver_opts: None,
        };
        let mut spec = ServiceSpec {
            networks: Some(vec![config("a", None), config("b", None)]),
            ..ServiceSpec::default()
        };
        let networks = Networks {
            add: vec![config("c", None), config("b", Some("db"))],
            remove: vec!["b".into()],
        };
        networks.change(&mut spec).unwrap();
        assert_eq!(
            spec.networks(),
            [config("a", None), config("c", None), config("b", Some("db"))]
        );
        assert_eq!(spec.networks, None, "they stand in one place");
        let again = Networks { add: vec![config("a", None)], remove: Vec::new() };
        let error = again.change(&mut spec).unwrap_err().to_string();
        assert_eq!(error, "service is already attached to network a");
        let leave = ["a", "b", "c"].map(str::to_owned).to_vec();
        Networks { add: Vec::new(), remove: leave }.change(&mut spec).unwrap();
        assert_eq!(spec, ServiceSpec::default());
    }

    #[test]
    fn secrets_and_configs_are_added_by_name() {
        let file = json!({"Name": "/etc/c", "UID": "0", "GID": "0", "Mode": 0o400});
        let added = json!([{"ConfigName": "c", "File": file}]);
        let got = changes("--config-add source=c,target=/etc/c,mode=0400").unwrap();
        let (path, value) = got[0].split_once('=').unwrap();
        assert_eq!(path, "/TaskTemplate/ContainerSpec/Configs");
        assert_eq!(serde_json::from_str::<Value>(value).unwrap(), added);
        assert_eq!(changes("--secret-rm gone").unwrap(), [""; 0]);
    }

    #[test]
    fn only_what_was_given_changes() {
        let container = "/TaskTemplate/ContainerSpec";
        for (line, expect) in [
            ("", vec![]),
            ("--force", vec!["/TaskTemplate/ForceUpdate=1".to_owned()]),
            ("--replicas 5", vec!["/Mode/Replicated/Replicas=5".into()]),
            ("--image img:2", vec![format!("{container}/Image=\"img:2\"")]),
            ("--args 'y z'", vec![format!("{container}/Args=[\"y\",\"z\"]")]),
            ("--args ''", vec![format!("{container}/Args=")]),
            ("--env-add B=3 --env-add C=4 --env-rm A", vec![format!("{container}/Env=[\"B=3\",\"C=4\"]")]),
            ("--env-rm A --env-rm B", vec![format!("{container}/Env=")]),
            ("--env-rm GONE", vec![]),
            ("--label-add c=3 --label-rm a", vec!["/Labels/a=".into(), "/Labels/c=\"3\"".into()]),
            ("--container-label-add c=3", vec![format!("{container}/Labels={{\"c\":\"3\"}}")]),
            ("--constraint-rm node.role==worker", vec!["/TaskTemplate/Placement/Constraints=".into()]),
            (
                "--constraint-add node.role==worker --constraint-add a==b",
                vec!["/TaskTemplate/Placement/Constraints=[\"node.role==worker\",\"a==b\"]".into()],
            ),
            (
                "--placement-pref-add spread=node.labels.zone --placement-pref-rm spread=node.labels.x",
                vec!["/TaskTemplate/Placement/Preferences=[{\"Spread\":{\"SpreadDescriptor\":\"node.labels.zone\"}}]".into()],
            ),
            (
                "--generic-resource-add GPU=2 --generic-resource-rm SSD",
                vec!["/TaskTemplate/Resources={\"Reservations\":{\"GenericResources\":[{\"DiscreteResourceSpec\":{\"Kind\":\"GPU\",\"Value\":2}}]}}".into()],
            ),
            ("--generic-resource-rm GPU", vec![]),
            ("--placement-pref-rm spread=node.labels.zone", vec![]),
            ("--placement-strategy binpack", vec!["/TaskTemplate/Placement/Strategy=\"binpack\"".into()]),
            (
                "--publish-rm 80",
                vec!["/EndpointSpec/Ports=[{\"Protocol\":\"udp\",\"PublishMode\":\"ingress\",\"PublishedPort\":53,\"TargetPort\":53}]".into()],
            ),
            (
                "--publish-rm 53/udp --publish-add 8080:81",
                vec!["/EndpointSpec/Ports=[{\"Protocol\":\"tcp\",\"PublishMode\":\"ingress\",\"PublishedPort\":8080,\"TargetPort\":81}]".into()],
            ),
            ("--publish-rm 53", vec![]),
            ("--cap-add kill", vec![format!("{container}/CapabilityDrop=")]),
            ("--cap-drop chown", vec![format!("{container}/CapabilityAdd=")]),
            ("--cap-drop sys_time", vec![format!("{container}/CapabilityDrop=[\"CAP_KILL\",\"CAP_SYS_TIME\"]")]),
            ("--update-delay 2s", vec!["/UpdateConfig/Delay=2000000000".into()]),
            ("--rollback-delay 2s", vec!["/RollbackConfig={\"Delay\":2000000000,\"Parallelism\":1}".into()]),
            ("--health-cmd x", vec![format!("{container}/Healthcheck={{\"Test\":[\"CMD-SHELL\",\"x\"]}}")]),
            (
                "--log-opt max-file=3 --log-opt max-size=1m",
                vec![
                    "/TaskTemplate/LogDriver/Options/max-file=\"3\"".into(),
                    "/TaskTemplate/LogDriver/Options/max-size=\"1m\"".into(),
                ],
            ),
            (
                "--log-driver json-file",
                vec![
                    "/TaskTemplate/LogDriver/Name=\"json-file\"".into(),
                    "/TaskTemplate/LogDriver/Options=".into(),
                ],
            ),
            ("--hostname h --user ''", vec![format!("{container}/Hostname=\"h\"")]),
            ("--limit-memory 1g", vec!["/TaskTemplate/Resources={\"Limits\":{\"MemoryBytes\":1073741824}}".into()]),
        ] {
            let got: Vec<String> = changes(line).unwrap();
            let sorted = |text: &str| -> (String, Value) {
                let (path, value) = text.split_once('=').unwrap();
                (path.into(), serde_json::from_str(value).unwrap_or(Value::Null))
            };
            let got: Vec<_> = got.iter().map(|text| sorted(text)).collect();
            let expect: Vec<_> = expect.iter().map(|text| sorted(text)).collect();
            assert_eq!(got, expect, "{line}");
        }
    }
}
