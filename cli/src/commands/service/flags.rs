//! The flags that `service create` and `service update` share, laid over a spec.
//!
//! A flag that is not given leaves its field alone. Source: docker/cli `service/opts.go`,
//! `addServiceFlags`.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use clap::Args;
use skep_common::compose::ports::{parse_protocol, parse_range, parse_short};
use skep_common::compose::units::{
    ParseError, parse_bytes, parse_cpus, parse_duration, split_words,
};
use skep_common::spec::{
    ContainerSpec, EndpointSpec, HealthConfig, IngressPolicy, LogDriver, Nanos,
    NetworkAttachmentConfig, PortConfig, PortProtocol, ProxyProtocol, PublishMode,
    ResourceRequirements, Resources, RestartCondition, RestartPolicy, ServiceSpec, UpdateConfig,
};

use super::mode::ModeFlags;
use super::placement::PlacementFlags;

/// Whether and how loudly the command waits.
#[derive(Debug, Args)]
pub(crate) struct WaitFlags {
    /// Exit immediately instead of waiting for the service to converge
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", value_name = "BOOL", hide_default_value = true)]
    pub(crate) detach: bool,
    /// Suppress progress output
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Words of a command line that is given as one text.
#[derive(Debug, Clone)]
pub(super) struct Words(pub(super) Vec<String>);

/// Reads a command line as a shell does.
pub(super) fn parse_words(text: &str) -> Result<Words, ParseError> {
    split_words(text).map(Words)
}

/// The ports of one `--publish`.
#[derive(Debug, Clone)]
pub(super) struct Publish(pub(super) Vec<PortConfig>);

/// Reads `--network NAME` or `--network name=NAME,alias=ALIAS,…`. Source: docker/cli
/// `opts/network.go`.
pub(super) fn parse_network(text: &str) -> Result<NetworkAttachmentConfig, String> {
    if !text.contains('=') {
        return Ok(NetworkAttachmentConfig { target: text.into(), ..Default::default() });
    }
    let mut config = NetworkAttachmentConfig::default();
    for field in text.split(',') {
        let (key, value) = field.split_once('=').unwrap_or((field, ""));
        match key.trim().to_ascii_lowercase().as_str() {
            "name" => value.clone_into(&mut config.target),
            "alias" => config.aliases.get_or_insert_default().push(value.into()),
            "driver-opt" => {
                let (name, value) = value.split_once('=').unwrap_or((value, ""));
                config.driver_opts.get_or_insert_default().insert(name.into(), value.into());
            }
            other => {
                return Err(format!("invalid field key {other}: use name, alias or driver-opt"));
            }
        }
    }
    if config.target.is_empty() {
        return Err("network name/id is not specified: write name=NETWORK".into());
    }
    Ok(config)
}

/// Flags that set a field of the spec.
#[derive(Debug, Args)]
pub(super) struct SpecFlags {
    /// Working directory inside the container
    #[arg(long, short)]
    workdir: Option<String>,
    /// Username or UID (format: <name|uid>[:<group|gid>])
    #[arg(long, short)]
    user: Option<String>,
    /// Container hostname
    #[arg(long)]
    hostname: Option<String>,
    /// Overwrite the default ENTRYPOINT of the image
    #[arg(long, value_parser = parse_words, value_name = "COMMAND")]
    entrypoint: Option<Words>,
    #[command(flatten)]
    mode: ModeFlags,
    #[command(flatten)]
    placement: PlacementFlags,
    /// Endpoint mode
    #[arg(long, value_parser = ["vip", "dnsrr"])]
    endpoint_mode: Option<String>,
    /// Which tasks a node sends connections to published ports to: all in turn, or those of its own
    /// where it has healthy ones
    #[arg(long, value_parser = ["spread", "local"])]
    ingress_policy: Option<String>,
    /// Time to wait before force killing a container (ns|us|ms|s|m|h) (default 10s)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    stop_grace_period: Option<Nanos>,
    /// Signal to stop the container
    #[arg(long)]
    stop_signal: Option<String>,
    /// Allocate a pseudo-TTY
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    tty: Option<bool>,
    /// Mount the container's root filesystem as read only
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    read_only: Option<bool>,
    /// Use an init inside each service container to forward signals and reap processes
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    init: Option<bool>,
    /// Tune host's OOM preferences (-1000 to 1000)
    #[arg(long, allow_negative_numbers = true)]
    oom_score_adj: Option<i64>,
    /// Logging driver for service
    #[arg(long, value_name = "json-file|local")]
    log_driver: Option<String>,
    /// Logging driver options: max-size=SIZE (default 20m), max-file=COUNT (default 5)
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    log_opt: Vec<(String, String)>,
    #[command(flatten)]
    resources: ResourceFlags,
    #[command(flatten)]
    restart: RestartFlags,
    #[command(flatten)]
    update: UpdateFlags,
    #[command(flatten)]
    rollback: RollbackFlags,
    #[command(flatten)]
    health: HealthFlags,
}

#[derive(Debug, Args)]
struct ResourceFlags {
    /// Limit CPUs
    #[arg(long, value_parser = parse_cpus, value_name = "CPUS")]
    limit_cpu: Option<i64>,
    /// Limit Memory
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    limit_memory: Option<i64>,
    /// Limit maximum number of processes (default 0 = unlimited)
    #[arg(long)]
    limit_pids: Option<i64>,
    /// Reserve CPUs
    #[arg(long, value_parser = parse_cpus, value_name = "CPUS")]
    reserve_cpu: Option<i64>,
    /// Reserve Memory
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    reserve_memory: Option<i64>,
}

#[derive(Debug, Args)]
struct RestartFlags {
    /// Restart when condition is met (default "any")
    #[arg(long, value_parser = parse_condition, value_name = "none|on-failure|any")]
    restart_condition: Option<RestartCondition>,
    /// Delay between restart attempts (ns|us|ms|s|m|h) (default 5s)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    restart_delay: Option<Nanos>,
    /// Maximum number of restarts before giving up
    #[arg(long)]
    restart_max_attempts: Option<u64>,
    /// Window used to evaluate the restart policy (ns|us|ms|s|m|h)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    restart_window: Option<Nanos>,
}

#[derive(Debug, Args)]
struct UpdateFlags {
    /// Maximum number of tasks updated simultaneously (0 to update all at once) (default 1)
    #[arg(long)]
    update_parallelism: Option<u64>,
    /// Delay between updates (ns|us|ms|s|m|h) (default 0s)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    update_delay: Option<Nanos>,
    /// Action on update failure (default "pause")
    #[arg(long, value_parser = ["pause", "continue", "rollback"])]
    update_failure_action: Option<String>,
    /// Duration after each task update to monitor for failure (ns|us|ms|s|m|h) (default 5s)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    update_monitor: Option<Nanos>,
    /// Failure rate to tolerate during an update (default 0)
    #[arg(long, value_parser = parse_ratio, value_name = "RATIO")]
    update_max_failure_ratio: Option<f64>,
    /// Time within which each updated task must run, or else has failed (ns|us|ms|s|m|h) (default 10m)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    update_progress_deadline: Option<Nanos>,
    /// Update order (default "stop-first")
    #[arg(long, value_parser = ["start-first", "stop-first"])]
    update_order: Option<String>,
}

#[derive(Debug, Args)]
struct RollbackFlags {
    /// Maximum number of tasks rolled back simultaneously (0 to roll back all at once) (default 1)
    #[arg(long)]
    rollback_parallelism: Option<u64>,
    /// Delay between task rollbacks (ns|us|ms|s|m|h) (default 0s)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    rollback_delay: Option<Nanos>,
    /// Action on rollback failure (default "pause")
    #[arg(long, value_parser = ["pause", "continue"])]
    rollback_failure_action: Option<String>,
    /// Duration after each task rollback to monitor for failure (ns|us|ms|s|m|h) (default 5s)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    rollback_monitor: Option<Nanos>,
    /// Failure rate to tolerate during a rollback (default 0)
    #[arg(long, value_parser = parse_ratio, value_name = "RATIO")]
    rollback_max_failure_ratio: Option<f64>,
    /// Time within which each task rolled back must run, or else has failed (ns|us|ms|s|m|h) (default 10m)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    rollback_progress_deadline: Option<Nanos>,
    /// Rollback order (default "stop-first")
    #[arg(long, value_parser = ["start-first", "stop-first"])]
    rollback_order: Option<String>,
}

#[derive(Debug, Args)]
struct HealthFlags {
    /// Command to run to check health
    #[arg(long)]
    health_cmd: Option<String>,
    /// Time between running the check (ms|s|m|h)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    health_interval: Option<Nanos>,
    /// Maximum time to allow one check to run (ms|s|m|h)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    health_timeout: Option<Nanos>,
    /// Consecutive failures needed to report unhealthy
    #[arg(long)]
    health_retries: Option<u32>,
    /// Start period for the container to initialize before counting retries towards unstable (ms|s|m|h)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    health_start_period: Option<Nanos>,
    /// Time between running the check during the start period (ms|s|m|h)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    health_start_interval: Option<Nanos>,
    /// Disable any container-specified HEALTHCHECK
    #[arg(long)]
    no_healthcheck: bool,
}

/// Sets `field` to a given value; an absent one leaves it.
fn set<T: Clone>(field: &mut Option<T>, given: &Option<T>) {
    if given.is_some() {
        field.clone_from(given);
    }
}

/// As [`set`], where an empty text takes the field away.
fn set_text(field: &mut Option<String>, given: &Option<String>) {
    if let Some(text) = given {
        *field = (!text.is_empty()).then(|| text.clone());
    }
}

impl SpecFlags {
    /// Lays the given flags over `spec`.
    pub(super) fn apply(&self, spec: &mut ServiceSpec) -> Result<()> {
        self.mode.apply(spec)?;
        if self.endpoint_mode.is_some() {
            let endpoint: &mut EndpointSpec = spec.endpoint_spec.get_or_insert_default();
            set(&mut endpoint.mode, &self.endpoint_mode);
        }
        if let Some(policy) = &self.ingress_policy {
            let endpoint: &mut EndpointSpec = spec.endpoint_spec.get_or_insert_default();
            endpoint.ingress_policy = IngressPolicy::of(policy);
        }
        self.placement.apply(&mut spec.task_template.placement);
        self.apply_log_driver(&mut spec.task_template.log_driver);
        self.resources.apply(&mut spec.task_template.resources);
        self.restart.apply(&mut spec.task_template.restart_policy);
        self.update.apply(&mut spec.update_config);
        self.rollback.apply(&mut spec.rollback_config);
        let container = spec.task_template.container_spec.get_or_insert_default();
        self.apply_container(container);
        self.health.apply(&mut container.healthcheck)
    }

    /// A driver comes with its own options; options alone are for the driver that there is. Differs
    /// from Docker's client, which ignores options without a driver in silence.
    fn apply_log_driver(&self, driver: &mut Option<LogDriver>) {
        if self.log_driver.is_none() && self.log_opt.is_empty() {
            return;
        }
        let driver = driver.get_or_insert_default();
        set_text(&mut driver.name, &self.log_driver);
        let options: BTreeMap<String, String> = self.log_opt.iter().cloned().collect();
        driver.options = (!options.is_empty()).then_some(options);
    }

    fn apply_container(&self, container: &mut ContainerSpec) {
        set_text(&mut container.dir, &self.workdir);
        set_text(&mut container.user, &self.user);
        set_text(&mut container.hostname, &self.hostname);
        set_text(&mut container.stop_signal, &self.stop_signal);
        set(&mut container.stop_grace_period, &self.stop_grace_period);
        set(&mut container.tty, &self.tty);
        set(&mut container.read_only, &self.read_only);
        set(&mut container.init, &self.init);
        set(&mut container.oom_score_adj, &self.oom_score_adj);
        if let Some(Words(words)) = &self.entrypoint {
            container.command = (!words.is_empty()).then(|| words.clone());
        }
    }
}

impl ResourceFlags {
    fn apply(&self, resources: &mut Option<ResourceRequirements>) {
        if self.limit_cpu.or(self.limit_memory).or(self.limit_pids).is_some() {
            let limits: &mut Resources =
                resources.get_or_insert_default().limits.get_or_insert_default();
            set(&mut limits.nano_cpus, &self.limit_cpu);
            set(&mut limits.memory_bytes, &self.limit_memory);
            set(&mut limits.pids, &self.limit_pids);
        }
        if self.reserve_cpu.or(self.reserve_memory).is_some() {
            let reservations: &mut Resources =
                resources.get_or_insert_default().reservations.get_or_insert_default();
            set(&mut reservations.nano_cpus, &self.reserve_cpu);
            set(&mut reservations.memory_bytes, &self.reserve_memory);
        }
    }
}

impl RestartFlags {
    fn apply(&self, policy: &mut Option<RestartPolicy>) {
        let is_given = self.restart_condition.is_some()
            || self.restart_delay.is_some()
            || self.restart_max_attempts.is_some()
            || self.restart_window.is_some();
        if is_given {
            let policy = policy.get_or_insert_default();
            set(&mut policy.condition, &self.restart_condition);
            set(&mut policy.delay, &self.restart_delay);
            set(&mut policy.max_attempts, &self.restart_max_attempts);
            set(&mut policy.window, &self.restart_window);
        }
    }
}

/// Lays over `config` what was given; a new one updates one task at a time.
fn apply_update(config: &mut Option<UpdateConfig>, given: &UpdateConfig) {
    if *given == UpdateConfig::default() {
        return;
    }
    let config = config.get_or_insert_with(|| UpdateConfig {
        parallelism: Some(skep_common::limits::defaults::UPDATE_PARALLELISM),
        ..Default::default()
    });
    set(&mut config.parallelism, &given.parallelism);
    set(&mut config.delay, &given.delay);
    set(&mut config.failure_action, &given.failure_action);
    set(&mut config.monitor, &given.monitor);
    set(&mut config.progress_deadline, &given.progress_deadline);
    set(&mut config.max_failure_ratio, &given.max_failure_ratio);
    set(&mut config.order, &given.order);
}

impl UpdateFlags {
    fn apply(&self, config: &mut Option<UpdateConfig>) {
        let given = UpdateConfig {
            parallelism: self.update_parallelism,
            delay: self.update_delay,
            failure_action: self.update_failure_action.clone(),
            monitor: self.update_monitor,
            max_failure_ratio: self.update_max_failure_ratio,
            order: self.update_order.clone(),
            progress_deadline: self.update_progress_deadline,
        };
        apply_update(config, &given);
    }
}

impl RollbackFlags {
    fn apply(&self, config: &mut Option<UpdateConfig>) {
        let given = UpdateConfig {
            parallelism: self.rollback_parallelism,
            delay: self.rollback_delay,
            failure_action: self.rollback_failure_action.clone(),
            monitor: self.rollback_monitor,
            max_failure_ratio: self.rollback_max_failure_ratio,
            order: self.rollback_order.clone(),
            progress_deadline: self.rollback_progress_deadline,
        };
        apply_update(config, &given);
    }
}

impl HealthFlags {
    fn apply(&self, healthcheck: &mut Option<HealthConfig>) -> Result<()> {
        let is_given = self.health_cmd.is_some()
            || self.health_interval.is_some()
            || self.health_timeout.is_some()
            || self.health_retries.is_some()
            || self.health_start_period.is_some()
            || self.health_start_interval.is_some();
        if self.no_healthcheck {
            if is_given {
                bail!("--no-healthcheck conflicts with --health-* options");
            }
            let none = HealthConfig { test: Some(vec!["NONE".into()]), ..Default::default() };
            *healthcheck = Some(none);
            return Ok(());
        }
        if !is_given {
            return Ok(());
        }
        let health = healthcheck.get_or_insert_default();
        if health.test.as_ref().is_some_and(|test| test.first().is_some_and(|word| word == "NONE"))
        {
            health.test = None;
        }
        if let Some(command) = &self.health_cmd {
            health.test =
                (!command.is_empty()).then(|| vec!["CMD-SHELL".to_owned(), command.clone()]);
        }
        set(&mut health.interval, &self.health_interval);
        set(&mut health.timeout, &self.health_timeout);
        set(&mut health.retries, &self.health_retries);
        set(&mut health.start_period, &self.health_start_period);
        set(&mut health.start_interval, &self.health_start_interval);
        Ok(())
    }
}

fn parse_condition(text: &str) -> Result<RestartCondition, String> {
    match text {
        "none" => Ok(RestartCondition::None),
        "on-failure" => Ok(RestartCondition::OnFailure),
        "any" => Ok(RestartCondition::Any),
        _ => Err("must be one of none, on-failure, any".into()),
    }
}

fn parse_ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("must be a number between 0 and 1".into()),
    }
}

/// Reads `8080:80/tcp` or `published=8080,target=80,protocol=tcp,mode=host,proxy-protocol=v2`.
pub(super) fn parse_publish(text: &str) -> Result<Publish, String> {
    if !text.contains('=') {
        let short = parse_short(text).map_err(|error| error.to_string())?;
        return match short.address {
            Some(address) => Err(format!("hostip is not supported: remove {address}")),
            None => Ok(Publish(short.ports)),
        };
    }
    let mut target = None;
    let mut published = None;
    let mut port = PortConfig {
        protocol: Some(PortProtocol::Tcp),
        publish_mode: Some(PublishMode::Ingress),
        ..Default::default()
    };
    for field in text.split(',') {
        let (key, value) =
            field.split_once('=').ok_or_else(|| format!("invalid field: {field}"))?;
        let range =
            || parse_range(value).ok_or_else(|| format!("invalid {key} port (value {value:?})"));
        match key.to_ascii_lowercase().as_str() {
            "target" => target = Some(range()?),
            "published" => published = if value == "0" { None } else { Some(range()?) },
            "protocol" => {
                port.protocol = Some(parse_protocol(value).ok_or_else(|| {
                    format!("invalid protocol value '{value}': use tcp, udp or sctp")
                })?);
            }
            "mode" => {
                port.publish_mode = Some(match value {
                    "ingress" => PublishMode::Ingress,
                    "host" => PublishMode::Host,
                    _ => {
                        return Err(format!(
                            "invalid publish mode value ({value}): must be either 'ingress' or 'host'"
                        ));
                    }
                });
            }
            "proxy-protocol" => {
                let version = ProxyProtocol::of(value);
                let wrong =
                    || format!("invalid proxy protocol value '{value}': the only one is v2");
                port.proxy_protocol = Some(version.ok_or_else(wrong)?);
            }
            _ => return Err(format!("invalid field key {key}")),
        }
    }
    let target = target.ok_or("missing mandatory field \"target\"")?;
    let pairs = skep_common::compose::ports::pair(target, published)
        .ok_or("published and target are ranges of different lengths")?;
    let ports = pairs.into_iter().map(|(published_port, target_port)| PortConfig {
        target_port,
        published_port,
        ..port.clone()
    });
    Ok(Publish(ports.collect()))
}

/// `NAME=VALUE`; a name alone takes the caller's value and is left out where there is none.
pub(crate) fn environment_entry(text: &str, caller: &BTreeMap<String, String>) -> Option<String> {
    if text.contains('=') {
        return Some(text.to_owned());
    }
    caller.get(text).map(|value| format!("{text}={value}"))
}

/// Refuses an environment variable without a name.
pub(crate) fn parse_environment(text: &str) -> Result<String, String> {
    match text.split('=').next() {
        None | Some("") => Err(format!("invalid environment variable: {text}")),
        Some(_) => Ok(text.to_owned()),
    }
}

/// A label: `name` or `name=value`.
pub(crate) fn parse_label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    if name.is_empty() {
        return Err(format!("invalid label {text:?}: write NAME=VALUE"));
    }
    Ok((name.into(), value.into()))
}

/// Sorts ports so that the same set is always the same spec.
pub(super) fn sort_ports(ports: &mut Vec<PortConfig>) {
    ports.sort_by_key(|port| (port.published_port, port.target_port, port.protocol));
    ports.dedup();
}
