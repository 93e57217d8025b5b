//! `skep service create`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use skep_common::compose::units::capabilities;
use skep_common::spec::generic::parse_wanted;
use skep_common::spec::{
    ConfigReference, ContainerSpec, DnsConfig, EndpointSpec, GenericResource, Labels,
    NetworkAttachmentConfig, PlacementPreference, SecretReference, ServiceSpec, TaskSpec, Ulimit,
};
use skep_proto::{CreateServiceRequest, PlanRequest};

use super::super::plan;
use super::flags::{
    Publish, SpecFlags, WaitFlags, environment_entry, parse_environment, parse_label,
    parse_network, parse_publish, sort_ports,
};
use super::payloads::{parse_config, parse_secret};
use super::placement::{change_generic, change_preferences, parse_preference};
use super::{Waiting, caller_environment, converge, mode, names};
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// How many names are drawn before the user is asked for one.
const ATTEMPTS_MAX: usize = 10;

/// `skep service create [OPTIONS] IMAGE [COMMAND] [ARG...]`
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Service name
    #[arg(long)]
    name: Option<String>,
    /// Service mode
    #[arg(long, default_value = "replicated", value_parser = mode::WORDS)]
    mode: String,
    /// Set environment variables
    #[arg(long, short, value_parser = parse_environment, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Read in a file of environment variables
    #[arg(long, value_name = "FILE")]
    env_file: Vec<std::path::PathBuf>,
    /// Service labels
    #[arg(long, short, value_parser = parse_label, value_name = "NAME=VALUE")]
    label: Vec<(String, String)>,
    /// Container labels
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    container_label: Vec<(String, String)>,
    /// Publish a port as a node port
    #[arg(long, short, value_parser = parse_publish, value_name = "PORT")]
    publish: Vec<Publish>,
    /// Network attachments
    #[arg(long, value_parser = parse_network, value_name = "NETWORK")]
    network: Vec<NetworkAttachmentConfig>,
    /// Placement constraints
    #[arg(long)]
    constraint: Vec<String>,
    /// Placement preferences
    #[arg(long, value_parser = parse_preference, value_name = "spread=KEY")]
    placement_pref: Vec<PlacementPreference>,
    /// User defined resources
    #[arg(long, value_parser = parse_wanted, value_name = "KIND=NUMBER")]
    generic_resource: Vec<GenericResource>,
    /// Specify secrets to expose to the service: NAME or
    /// source=NAME,target=FILE,uid=UID,gid=GID,mode=0400,version=N
    #[arg(long, value_parser = parse_secret, value_name = "SECRET")]
    secret: Vec<SecretReference>,
    /// Specify configurations to expose to the service; written as secrets
    #[arg(long, value_parser = parse_config, value_name = "CONFIG")]
    config: Vec<ConfigReference>,
    /// Set one or more supplementary user groups for the container
    #[arg(long)]
    group: Vec<String>,
    /// Set one or more custom host-to-IP mappings (host:ip)
    #[arg(long = "add-host", value_parser = parse_host, value_name = "HOST:IP")]
    add_host: Vec<String>,
    /// Set custom DNS servers
    #[arg(long, value_name = "IP")]
    dns: Vec<std::net::IpAddr>,
    /// Set DNS options
    #[arg(long, value_name = "OPTION")]
    dns_option: Vec<String>,
    /// Set custom DNS search domains
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// Sysctl options
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    sysctl: Vec<(String, String)>,
    /// Ulimit options
    #[arg(long, value_parser = parse_ulimit, value_name = "NAME=SOFT[:HARD]")]
    ulimit: Vec<Ulimit>,
    /// Add Linux capabilities
    #[arg(long)]
    cap_add: Vec<String>,
    /// Drop Linux capabilities
    #[arg(long)]
    cap_drop: Vec<String>,
    /// Show what would be done, and write nothing: which tasks would be created, moved and stopped, and where;
    /// exit code 2 where one would fit nowhere. `--plan=json` and `--plan=TEMPLATE` format it
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "table", value_name = "FORMAT")]
    plan: Option<String>,
    #[command(flatten)]
    flags: SpecFlags,
    #[command(flatten)]
    wait: WaitFlags,
    /// The image
    image: String,
    /// What runs in it instead of its own command
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

fn list<T>(items: Vec<T>) -> Option<Vec<T>> {
    (!items.is_empty()).then_some(items)
}

fn labels(pairs: &[(String, String)]) -> Option<Labels> {
    (!pairs.is_empty()).then(|| pairs.iter().cloned().collect())
}

fn dns_config(args: &CreateArgs) -> Option<DnsConfig> {
    let config = DnsConfig {
        nameservers: list(args.dns.iter().map(ToString::to_string).collect()),
        search: list(args.dns_search.clone()),
        options: list(args.dns_option.clone()),
    };
    (!config.is_empty()).then_some(config)
}

/// `HOST:IP` as a line of /etc/hosts.
pub(super) fn parse_host(text: &str) -> Result<String, String> {
    match text.split_once(':') {
        Some((host, ip)) if !host.is_empty() && ip.parse::<std::net::IpAddr>().is_ok() => {
            Ok(format!("{ip} {host}"))
        }
        _ => Err(format!("bad format for add-host: {text:?}: write HOST:IP")),
    }
}

/// `nofile=1024:2048`.
pub(super) fn parse_ulimit(text: &str) -> Result<Ulimit, String> {
    let fail = || format!("invalid ulimit argument: {text}: write NAME=SOFT[:HARD]");
    let (name, limits) = text.split_once('=').ok_or_else(fail)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| text.parse::<i64>().map_err(|_| fail());
    let (soft, hard) = (number(soft)?, number(hard)?);
    if hard != -1 && soft > hard {
        return Err(format!(
            "ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"
        ));
    }
    Ok(Ulimit { name: name.into(), soft, hard })
}

/// The spec that the command line asks for. `from_files` are the lines of `--env-file`.
fn spec(
    args: &CreateArgs,
    from_files: &[String],
    caller: &BTreeMap<String, String>,
) -> Result<ServiceSpec> {
    let mut env = Vec::new();
    for entry in
        from_files.iter().chain(&args.env).filter_map(|text| environment_entry(text, caller))
    {
        set_environment(&mut env, entry);
    }
    let (add, drop) = capabilities(&args.cap_add, &args.cap_drop);
    let container = ContainerSpec {
        image: args.image.clone(),
        args: list(args.args.clone()),
        env: list(env),
        labels: labels(&args.container_label),
        groups: list(args.group.clone()),
        hosts: list(args.add_host.clone()),
        dns_config: dns_config(args),
        sysctls: labels(&args.sysctl),
        ulimits: list(args.ulimit.clone()),
        capability_add: list(add),
        capability_drop: list(drop),
        secrets: list(args.secret.clone()),
        configs: list(args.config.clone()),
        ..Default::default()
    };
    let mut ports: Vec<_> = args.publish.iter().flat_map(|Publish(ports)| ports.clone()).collect();
    sort_ports(&mut ports);
    let mut spec = ServiceSpec {
        name: args.name.clone().unwrap_or_default(),
        labels: labels(&args.label),
        task_template: TaskSpec {
            container_spec: Some(container),
            networks: list(args.network.clone()),
            ..Default::default()
        },
        mode: Some(mode::of_word(&args.mode)),
        endpoint_spec: list(ports)
            .map(|ports| EndpointSpec { ports: Some(ports), ..EndpointSpec::default() }),
        ..Default::default()
    };
    if let Some(constraints) = list(args.constraint.clone()) {
        spec.task_template.placement.get_or_insert_default().constraints = Some(constraints);
    }
    change_preferences(&mut spec.task_template, &args.placement_pref, &[]);
    change_generic(&mut spec.task_template, &args.generic_resource, &[]);
    args.flags.apply(&mut spec)?;
    mode::complete(&mut spec);
    Ok(spec)
}

/// Sets or adds a variable of a list of `NAME=VALUE`.
pub(super) fn set_environment(list: &mut Vec<String>, entry: String) {
    let name = |text: &str| text.split('=').next().unwrap_or_default().to_owned();
    let wanted = name(&entry);
    match list.iter_mut().find(|known| name(known) == wanted) {
        Some(known) => *known = entry,
        None => list.push(entry),
    }
}

/// The lines of the files that are neither empty nor comments.
fn environment_files(paths: &[std::path::PathBuf]) -> Result<Vec<String>> {
    let mut entries = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("failed to read the environment file {}", path.display()))?;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if line.starts_with('=')
                || line.split('=').next().is_some_and(|name| name.contains(' '))
            {
                bail!("{}:{}: {line:?} has no valid name before '='", path.display(), number + 1);
            }
            entries.push(line.to_owned());
        }
    }
    Ok(entries)
}

pub(super) async fn run(args: &CreateArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut spec = spec(args, &environment_files(&args.env_file)?, &caller_environment())?;
    if let Some(format) = &args.plan {
        if args.name.is_none() {
            spec.name = names::random(&mut rand::rng());
        }
        let spec_json = serde_json::to_string(&spec)?;
        let request = PlanRequest { spec_json, ..PlanRequest::default() };
        let answer = client.control().plan(request).await.map_err(Refusal)?;
        return plan::show(&answer.into_inner(), Some(format), ui);
    }
    let mut attempt = 1;
    let made = loop {
        if args.name.is_none() {
            spec.name = names::random(&mut rand::rng());
        }
        let request = CreateServiceRequest { spec_json: serde_json::to_string(&spec)? };
        match client.control().create_service(request).await {
            Ok(made) => break made.into_inner(),
            // A name that was drawn may be taken; one that was given is the user's to change.
            Err(status)
                if args.name.is_none()
                    && attempt < ATTEMPTS_MAX
                    && status.code() == tonic::Code::AlreadyExists => {}
            Err(status) => return Err(Refusal(status).into()),
        }
        attempt += 1;
    };
    for warning in made.warnings {
        ui.note(warning)?;
    }
    ui.line(&made.id)?;
    converge(Waiting::for_new(made.id), &args.wait, client, ui).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use serde_json::{Value, json};

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: CreateArgs,
    }

    fn parse(line: &str) -> Result<Value> {
        let words = skep_common::compose::units::split_words(line)?;
        let line = Line::try_parse_from(["create".to_owned()].into_iter().chain(words))?;
        let caller = [("FROM".to_owned(), "caller".to_owned())].into();
        Ok(serde_json::to_value(spec(&line.args, &["F=file".into()], &caller)?)?)
    }

    #[track_caller]
    fn check(line: &str, expect: &Value) {
        assert_eq!(&parse(line).unwrap(), expect, "{line}");
    }

    #[test]
    fn names_are_resolved_as_flags_say() {
        let config = |line: &str| {
            parse(&format!("{line} i"))
                .map(|spec| spec["TaskTemplate"]["ContainerSpec"]["DNSConfig"].clone())
        };
        for (line, expect) in [
            ("", json!(null)),
            (
                "--dns 10.0.0.2 --dns fd00::2 --dns-search lab --dns-option ndots:2",
                json!({"Nameservers": ["10.0.0.2", "fd00::2"], "Search": ["lab"], "Options": ["ndots:2"]}),
            ),
        ] {
            assert_eq!(config(line).unwrap(), expect, "{line}");
        }
        let error = config("--dns ns1").unwrap_err().to_string();
        assert!(error.contains("invalid value 'ns1' for '--dns <IP>'"), "{error}");
    }

    #[test]
    fn networks_are_named_in_two_ways() {
        let networks = |line: &str| {
            parse(&format!("{line} i")).map(|spec| spec["TaskTemplate"]["Networks"].clone())
        };
        for (line, expect) in [
            ("", json!(null)),
            ("--network front", json!([{"Target": "front"}])),
            (
                "--network name=front,alias=www,alias=web,driver-opt=a=1 --network back",
                json!([
                    {"Target": "front", "Aliases": ["www", "web"], "DriverOpts": {"a": "1"}},
                    {"Target": "back"},
                ]),
            ),
        ] {
            assert_eq!(networks(line).unwrap(), expect, "{line}");
        }
        for (line, expect) in [
            ("--network alias=www", "network name/id is not specified: write name=NETWORK"),
            ("--network name=a,ip=1", "invalid field key ip: use name, alias or driver-opt"),
        ] {
            let error = networks(line).unwrap_err().to_string();
            assert!(error.contains(expect), "{line}: {error}");
        }
    }

    #[test]
    fn flags_make_the_spec() {
        check(
            "--name web --replicas 3 -p 8080:80 nginx:1 nginx -g 'daemon off;'",
            &json!({
                "Name": "web",
                "TaskTemplate": {"ContainerSpec": {
                    "Image": "nginx:1", "Args": ["nginx", "-g", "daemon off;"], "Env": ["F=file"],
                }},
                "Mode": {"Replicated": {"Replicas": 3}},
                "EndpointSpec": {"Ports": [
                    {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"},
                ]},
            }),
        );
        check(
            "-e A=1 -e FROM -e GONE -e F=flag --entrypoint 'sh -c' --container-label c=d -l a -w /srv -u 1000:1000 \
             --hostname h --cap-add net_admin --cap-drop all --sysctl net.core.somaxconn=10 --ulimit nofile=1:2 \
             --stop-grace-period 30s --stop-signal SIGINT --read-only -t --init=false --add-host db:10.0.0.1 img",
            &json!({
                "Name": "", "Labels": {"a": ""},
                "TaskTemplate": {"ContainerSpec": {
                    "Image": "img", "Labels": {"c": "d"}, "Command": ["sh", "-c"], "Hostname": "h",
                    "Env": ["F=flag", "A=1", "FROM=caller"], "Dir": "/srv", "User": "1000:1000",
                    "StopSignal": "SIGINT", "TTY": true, "ReadOnly": true, "StopGracePeriod": 30_000_000_000_i64,
                    "Hosts": ["10.0.0.1 db"], "Init": false, "Sysctls": {"net.core.somaxconn": "10"},
                    "CapabilityAdd": ["CAP_NET_ADMIN"], "CapabilityDrop": ["ALL"],
                    "Ulimits": [{"Name": "nofile", "Soft": 1, "Hard": 2}],
                }},
                "Mode": {"Replicated": {"Replicas": 1}},
            }),
        );
    }

    #[test]
    fn policies_and_resources() {
        check(
            "--limit-cpu 0.5 --limit-memory 64M --limit-pids 10 --reserve-cpu .25 --reserve-memory 32m \
             --constraint node.role==worker --constraint 'node.labels.a != b' --replicas-max-per-node 2 \
             --placement-pref spread=node.labels.zone --placement-pref spread=engine.labels.rack \
             --placement-strategy binpack --generic-resource GPU=2 \
             --restart-condition on-failure --restart-delay 1s --restart-max-attempts 3 --restart-window 1m \
             --update-parallelism 2 --update-delay 1s --update-order start-first --update-failure-action rollback \
             --update-monitor 10s --update-max-failure-ratio 0.2 --update-progress-deadline 30s \
             --rollback-order stop-first \
             --health-cmd 'curl -f http://localhost' --health-interval 5s --health-timeout 2s --health-retries 3 \
             --health-start-period 1m -p published=53,target=53,protocol=udp,mode=host --endpoint-mode dnsrr \
             --ingress-policy local \
             --log-driver local --log-opt max-size=10m --log-opt max-file=3 img",
            &json!({
                "Name": "",
                "TaskTemplate": {
                    "ContainerSpec": {
                        "Image": "img", "Env": ["F=file"],
                        "Healthcheck": {
                            "Test": ["CMD-SHELL", "curl -f http://localhost"], "Interval": 5_000_000_000_i64,
                            "Timeout": 2_000_000_000_i64, "StartPeriod": 60_000_000_000_i64, "Retries": 3,
                        },
                    },
                    "Resources": {
                        "Limits": {"NanoCPUs": 500_000_000, "MemoryBytes": 67_108_864, "Pids": 10},
                        "Reservations": {
                            "NanoCPUs": 250_000_000, "MemoryBytes": 33_554_432,
                            "GenericResources": [{"DiscreteResourceSpec": {"Kind": "GPU", "Value": 2}}],
                        },
                    },
                    "RestartPolicy": {
                        "Condition": "on-failure", "Delay": 1_000_000_000, "MaxAttempts": 3,
                        "Window": 60_000_000_000_i64,
                    },
                    "Placement": {
                        "Constraints": ["node.role==worker", "node.labels.a != b"], "MaxReplicas": 2,
                        "Preferences": [
                            {"Spread": {"SpreadDescriptor": "node.labels.zone"}},
                            {"Spread": {"SpreadDescriptor": "engine.labels.rack"}},
                        ],
                        "Strategy": "binpack",
                    },
                    "LogDriver": {"Name": "local", "Options": {"max-file": "3", "max-size": "10m"}},
                },
                "Mode": {"Replicated": {"Replicas": 1}},
                "UpdateConfig": {
                    "Parallelism": 2, "Delay": 1_000_000_000, "FailureAction": "rollback",
                    "Monitor": 10_000_000_000_i64, "MaxFailureRatio": 0.2, "Order": "start-first",
                    "ProgressDeadline": 30_000_000_000_i64,
                },
                "RollbackConfig": {"Parallelism": 1, "Order": "stop-first"},
                "EndpointSpec": {"Mode": "dnsrr", "IngressPolicy": "local", "Ports": [
                    {"Protocol": "udp", "TargetPort": 53, "PublishedPort": 53, "PublishMode": "host"},
                ]},
            }),
        );
    }

    #[test]
    fn ports_and_modes() {
        check(
            "-p target=80,published=8080,proxy-protocol=v2 img",
            &json!({
                "Name": "",
                "TaskTemplate": {"ContainerSpec": {"Image": "img", "Env": ["F=file"]}},
                "Mode": {"Replicated": {"Replicas": 1}},
                "EndpointSpec": {"Ports": [{
                    "Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress",
                    "ProxyProtocol": "v2",
                }]},
            }),
        );
        check(
            "--no-healthcheck --mode global -p 8000-8001:80 img",
            &json!({
                "Name": "",
                "TaskTemplate": {"ContainerSpec": {
                    "Image": "img", "Env": ["F=file"], "Healthcheck": {"Test": ["NONE"]},
                }},
                "Mode": {"Global": {}},
                "EndpointSpec": {"Ports": [
                    {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8000, "PublishMode": "ingress"},
                    {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8001, "PublishMode": "ingress"},
                ]},
            }),
        );
    }

    #[test]
    fn a_job_runs_all_of_its_tasks_at_once_unless_it_is_told() {
        for (line, expect) in [
            ("--mode replicated-job", json!({"TotalCompletions": 1, "MaxConcurrent": 1})),
            (
                "--mode replicated-job --replicas 6",
                json!({"TotalCompletions": 6, "MaxConcurrent": 6}),
            ),
            (
                "--mode replicated-job --replicas 6 --max-concurrent 2",
                json!({"TotalCompletions": 6, "MaxConcurrent": 2}),
            ),
        ] {
            let spec = serde_json::to_value(parse(&format!("{line} img")).unwrap()).unwrap();
            assert_eq!(spec["Mode"], json!({"ReplicatedJob": expect}), "{line}");
        }
    }

    #[test]
    fn wrong_flags_are_refused_in_a_sentence() {
        for (line, expect) in [
            ("--replicas x img", "invalid value 'x' for '--replicas <REPLICAS>'"),
            ("-p 127.0.0.1:80:80 img", "hostip is not supported: remove 127.0.0.1"),
            ("-p published=80 img", "missing mandatory field \"target\""),
            ("-p target=80,mode=x img", "must be either 'ingress' or 'host'"),
            ("-p target=80,proxy-protocol=v1 img", "'v1': the only one is v2"),
            ("-p 80/icmp img", "none of tcp, udp and sctp"),
            ("--limit-memory 64X img", "is not a size such as 64M"),
            ("--update-delay 5 img", "is not a duration such as 30s"),
            ("--update-max-failure-ratio 2 img", "between 0 and 1"),
            (
                "--ulimit nofile=3:2 img",
                "ulimit soft limit must be less than or equal to hard limit",
            ),
            ("--placement-pref binpack=x img", "only spread is supported"),
            ("--generic-resource GPU=UUID1 img", "write a number of 1 or more"),
            ("--placement-pref spread= img", "nothing to spread over"),
            ("--placement-strategy random img", "must be spread or binpack"),
            ("-e =x img", "invalid environment variable: =x"),
            (
                "--no-healthcheck --health-cmd x img",
                "--no-healthcheck conflicts with --health-* options",
            ),
            (
                "--mode global-job --replicas 2 img",
                "replicas can only be used with replicated or replicated-job mode",
            ),
            (
                "--replicas 2 --max-concurrent 2 img",
                "max-concurrent can only be used with replicated-job mode",
            ),
            ("", "<IMAGE>"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(expect), "{line}: {error}");
        }
    }
}
