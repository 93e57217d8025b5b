//! The keys of the Compose specification: those that skep acts on and those that it does not yet.
//!
//! Source: compose-spec `schema/compose-spec.json`; docker/cli `cli/compose/schema`.

/// Top level, acted on. `version` and `name` say nothing that a swarm needs.
pub(super) const TOP: &[&str] = &["configs", "name", "networks", "secrets", "services", "version"];
/// Top level, not yet.
pub(super) const TOP_LATER: &[&str] = &["volumes", "include", "models"];

/// Of a service, acted on.
pub(super) const SERVICE: &[&str] = &[
    "cap_add",
    "cap_drop",
    "command",
    "configs",
    "deploy",
    "dns",
    "dns_opt",
    "dns_search",
    "entrypoint",
    "environment",
    "extra_hosts",
    "group_add",
    "healthcheck",
    "hostname",
    "image",
    "init",
    "labels",
    "logging",
    "network_mode",
    "networks",
    "oom_score_adj",
    "ports",
    "read_only",
    "restart",
    "secrets",
    "stdin_open",
    "stop_grace_period",
    "stop_signal",
    "sysctls",
    "tty",
    "ulimits",
    "user",
    "working_dir",
];
/// Of a service, not yet (or never meant for a swarm).
pub(super) const SERVICE_LATER: &[&str] = &[
    "annotations",
    "attach",
    "blkio_config",
    "build",
    "cgroup",
    "cgroup_parent",
    "cgroupns_mode",
    "container_name",
    "cpu_count",
    "cpu_percent",
    "cpu_period",
    "cpu_quota",
    "cpu_rt_period",
    "cpu_rt_runtime",
    "cpu_shares",
    "cpus",
    "cpuset",
    "credential_spec",
    "depends_on",
    "develop",
    "device_cgroup_rules",
    "devices",
    "domainname",
    "driver_opts",
    "env_file",
    "expose",
    "extends",
    "external_links",
    "gpus",
    "ipc",
    "isolation",
    "label_file",
    "links",
    "mac_address",
    "mem_limit",
    "mem_reservation",
    "mem_swappiness",
    "memswap_limit",
    "models",
    "oom_kill_disable",
    "pid",
    "pids_limit",
    "platform",
    "post_start",
    "pre_stop",
    "privileged",
    "profiles",
    "provider",
    "pull_policy",
    "pull_refresh_after",
    "runtime",
    "scale",
    "security_opt",
    "shm_size",
    "storage_opt",
    "tmpfs",
    "use_api_socket",
    "userns_mode",
    "uts",
    "volumes",
    "volumes_from",
];

/// Of a health check.
pub(super) const HEALTHCHECK: &[&str] =
    &["disable", "interval", "retries", "start_interval", "start_period", "test", "timeout"];

/// Of `logging`.
pub(super) const LOGGING: &[&str] = &["driver", "options"];

/// Of a port in long syntax, acted on.
pub(super) const PORT: &[&str] = &["mode", "name", "protocol", "published", "target"];
/// Of a port in long syntax, not yet.
pub(super) const PORT_LATER: &[&str] = &["app_protocol", "host_ip"];

/// Of `deploy`.
pub(super) const DEPLOY: &[&str] = &[
    "endpoint_mode",
    "labels",
    "mode",
    "placement",
    "replicas",
    "resources",
    "restart_policy",
    "rollback_config",
    "update_config",
];
/// Of `deploy.placement`, acted on.
pub(super) const PLACEMENT: &[&str] = &["constraints", "max_replicas_per_node", "preferences"];
/// Of one of `deploy.placement.preferences`.
pub(super) const PREFERENCE: &[&str] = &["spread"];
/// Of `deploy.resources`.
pub(super) const RESOURCES: &[&str] = &["limits", "reservations"];
/// Of `deploy.resources.limits`.
pub(super) const LIMITS: &[&str] = &["cpus", "memory", "pids"];
/// Of `deploy.resources.reservations`, acted on.
pub(super) const RESERVATIONS: &[&str] = &["cpus", "generic_resources", "memory"];
/// Of one of `generic_resources`.
pub(super) const GENERIC_RESOURCE: &[&str] = &["discrete_resource_spec"];
/// Of its `discrete_resource_spec`.
pub(super) const DISCRETE_RESOURCE: &[&str] = &["kind", "value"];
/// Of `deploy.resources.reservations`, not yet.
pub(super) const RESERVATIONS_LATER: &[&str] = &["devices", "pids"];
/// Of `deploy.restart_policy`.
pub(super) const RESTART_POLICY: &[&str] = &["condition", "delay", "max_attempts", "window"];
/// Of `deploy.update_config` and `deploy.rollback_config`.
pub(super) const UPDATE_CONFIG: &[&str] =
    &["delay", "failure_action", "max_failure_ratio", "monitor", "order", "parallelism"];

/// Of a secret, acted on.
pub(super) const SECRET: &[&str] =
    &["driver", "environment", "external", "file", "labels", "name", "template_driver"];
/// Of a secret, not yet.
pub(super) const SECRET_LATER: &[&str] = &["driver_opts"];
/// Of a config, acted on.
pub(super) const CONFIG: &[&str] =
    &["content", "environment", "external", "file", "labels", "name", "template_driver"];
/// Of a service's reference to a secret or a config.
pub(super) const REFERENCE: &[&str] = &["gid", "mode", "source", "target", "uid"];

/// Of a network, acted on.
pub(super) const NETWORK: &[&str] = &[
    "attachable",
    "driver",
    "driver_opts",
    "enable_ipv6",
    "external",
    "internal",
    "ipam",
    "labels",
    "name",
];
/// Of a network, not yet.
pub(super) const NETWORK_LATER: &[&str] = &["enable_ipv4"];
/// Of `ipam`, acted on.
pub(super) const IPAM: &[&str] = &["config", "driver"];
/// Of `ipam`, not yet.
pub(super) const IPAM_LATER: &[&str] = &["options"];
/// Of an item of `ipam.config`.
pub(super) const IPAM_CONFIG: &[&str] = &["aux_addresses", "gateway", "ip_range", "subnet"];
/// Of a service's place on a network, acted on.
pub(super) const ATTACHMENT: &[&str] = &["aliases"];
/// Of a service's place on a network, not yet.
pub(super) const ATTACHMENT_LATER: &[&str] = &[
    "driver_opts",
    "gw_priority",
    "interface_name",
    "ipv4_address",
    "ipv6_address",
    "link_local_ips",
    "mac_address",
    "priority",
];
