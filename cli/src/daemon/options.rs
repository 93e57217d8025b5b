//! The daemon's settings: flags, then the TOML file, then defaults.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use serde::Deserialize;
use skep_common::object::IngressDescription;
use skep_common::spec::{GenericResource, generic};

/// Where settings are read from when no flag names a file.
const DEFAULT_CONFIG: &str = "/etc/skep/daemon.toml";

/// Flags of `skep daemon`. Each has a setting of the same name in the TOML file (with `_` for `-`).
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct DaemonArgs {
    /// TOML file with settings (default /etc/skep/daemon.toml, where it exists)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory for everything that must survive a reboot (default /var/lib/skep)
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Directory for sockets and running containers (default /run/skep)
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Name of this node (default the host name)
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Address that other nodes reach this one at, where `swarm init` and `swarm join` name none
    #[arg(long, value_name = "IP|INTERFACE[:PORT]")]
    advertise_addr: Option<String>,
    /// Address at which metrics are served at /metrics, to whoever asks (default none)
    #[arg(long, value_name = "IP:PORT")]
    metrics_addr: Option<SocketAddr>,
    /// Cgroup below which containers get theirs (default /skep)
    #[arg(long, value_name = "PATH")]
    cgroup_parent: Option<String>,
    /// What balances published ports: auto is the kernel, where it can (default auto)
    #[arg(long, value_enum, value_name = "auto|user-space")]
    ingress_balancer: Option<BalancerChoice>,
    /// Label of this node's engine, for constraints on engine.labels.KEY
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// What this node has for tasks that ask for it: a number of a kind, or one by name
    #[arg(long = "node-generic-resource", value_name = "KIND=VALUE")]
    node_generic_resources: Vec<String>,
    /// What runs tasks: containers, or nothing, for benchmarks of the control plane (default containers)
    #[arg(long, value_enum, value_name = "containers|none", hide = true)]
    runtime: Option<RuntimeChoice>,
}

/// What is to run tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum RuntimeChoice {
    /// A container each.
    #[default]
    Containers,
    /// Nothing: a task counts as running at once, and ends when it is stopped.
    None,
}

/// What is to balance published ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum BalancerChoice {
    /// The kernel, or the daemon where the kernel lacks what it takes.
    #[default]
    Auto,
    /// The daemon.
    UserSpace,
}

/// The TOML file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    data_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    hostname: Option<String>,
    advertise_addr: Option<String>,
    metrics_addr: Option<SocketAddr>,
    cgroup_parent: Option<String>,
    ingress_balancer: Option<BalancerChoice>,
    labels: BTreeMap<String, String>,
    node_generic_resources: Vec<String>,
}

/// Settings with every value decided.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) data_dir: PathBuf,
    pub(super) run_dir: PathBuf,
    pub(super) hostname: String,
    pub(super) advertise_addr: Option<String>,
    pub(super) metrics_addr: Option<SocketAddr>,
    pub(super) cgroup_parent: String,
    pub(super) ingress_balancer: BalancerChoice,
    /// What that comes to on this machine's kernel.
    pub(super) ingress: IngressDescription,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) generic_resources: Vec<GenericResource>,
    pub(super) runtime: RuntimeChoice,
}

impl Options {
    pub(super) fn resolve(args: DaemonArgs) -> Result<Self> {
        let file = read_file(args.config)?;
        let mut labels = file.labels;
        for label in args.labels {
            let (key, value) = label.split_once('=').with_context(|| {
                format!("--label {label:?} has no value: write --label KEY=VALUE")
            })?;
            labels.insert(key.to_owned(), value.to_owned());
        }
        let given = match args.node_generic_resources.is_empty() {
            true => file.node_generic_resources,
            false => args.node_generic_resources,
        };
        let generic_resources = generic::parse_of_node(&given).map_err(anyhow::Error::msg)?;
        let hostname = match args.hostname.or(file.hostname) {
            Some(hostname) => hostname,
            None => nix::unistd::gethostname()
                .context("failed to read the host name: give --hostname")?
                .to_string_lossy()
                .into_owned(),
        };
        let cgroup_parent = args.cgroup_parent.or(file.cgroup_parent);
        Ok(Self {
            data_dir: args.data_dir.or(file.data_dir).unwrap_or_else(|| "/var/lib/skep".into()),
            run_dir: args.run_dir.or(file.run_dir).unwrap_or_else(|| "/run/skep".into()),
            hostname,
            advertise_addr: args.advertise_addr.or(file.advertise_addr),
            metrics_addr: args.metrics_addr.or(file.metrics_addr),
            cgroup_parent: cgroup_parent.unwrap_or_else(|| "/skep".into()),
            ingress_balancer: args.ingress_balancer.or(file.ingress_balancer).unwrap_or_default(),
            ingress: IngressDescription::default(),
            labels,
            generic_resources,
            runtime: args.runtime.unwrap_or_default(),
        })
    }

    /// Options of a daemon whose files are all below `directory`.
    #[cfg(test)]
    pub(super) fn for_test(directory: &std::path::Path) -> Self {
        Self {
            data_dir: directory.to_owned(),
            run_dir: directory.join("run"),
            hostname: "n1".to_owned(),
            advertise_addr: None,
            metrics_addr: None,
            cgroup_parent: "/skep".to_owned(),
            ingress_balancer: BalancerChoice::default(),
            ingress: IngressDescription::default(),
            labels: Default::default(),
            generic_resources: Vec::new(),
            runtime: RuntimeChoice::default(),
        }
    }

    /// Where this node's containers live.
    pub(super) fn containers(&self) -> skep_worker::container::Options {
        skep_worker::container::Options {
            containers_dir: self.run_dir.join("containers"),
            state_dir: self.data_dir.join("containers"),
            cgroup_parent: self.cgroup_parent.clone(),
            self_exe: "/proc/self/exe".into(),
        }
    }

    /// Where clients connect.
    pub(super) fn socket(&self) -> PathBuf {
        self.run_dir.join("skep.sock")
    }
}

fn read_file(named: Option<PathBuf>) -> Result<File> {
    let path = named.clone().unwrap_or_else(|| DEFAULT_CONFIG.into());
    match std::fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text).with_context(|| {
            format!(
                "{} is not a valid configuration: correct it, or start without it",
                path.display()
            )
        }),
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
            Ok(File::default())
        }
        Err(error) => Err(error).with_context(|| format!("failed to read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(toml: &str, args: DaemonArgs) -> Result<Options> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.toml");
        std::fs::write(&path, toml).unwrap();
        Options::resolve(DaemonArgs { config: Some(path), ..args })
    }

    #[test]
    fn flags_come_before_the_file_and_the_file_before_defaults() {
        let flags = DaemonArgs {
            hostname: Some("flag".into()),
            labels: vec!["disk=ssd".into()],
            ..DaemonArgs::default()
        };
        let toml = "hostname = \"file\"\nrun_dir = \"/run/other\"\n[labels]\ndisk = \"hdd\"\nrow = \"a\"\n";
        let options = resolve(toml, flags).unwrap();
        assert_eq!(options.hostname, "flag");
        assert_eq!(options.socket(), PathBuf::from("/run/other/skep.sock"));
        assert_eq!(options.data_dir, PathBuf::from("/var/lib/skep"));
        let labels: Vec<(&str, &str)> =
            options.labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(labels, [("disk", "ssd"), ("row", "a")]);
        assert_eq!(options.ingress_balancer, BalancerChoice::Auto);
        let forced = "ingress_balancer = \"user-space\"\n";
        let options = resolve(forced, DaemonArgs::default()).unwrap();
        assert_eq!(options.ingress_balancer, BalancerChoice::UserSpace);
    }

    #[test]
    fn generic_resources_are_those_of_the_flags_or_of_the_file() {
        let toml = "node_generic_resources = [\"GPU=a\", \"GPU=b\"]\n";
        let given = |toml, flags: &[&str]| {
            let flags = flags.iter().map(ToString::to_string).collect();
            let args = DaemonArgs { node_generic_resources: flags, ..DaemonArgs::default() };
            let resources = resolve(toml, args).map(|options| options.generic_resources);
            resources.map(|all| generic::environment(&all).join(" "))
        };
        assert_eq!(given("", &[]).unwrap(), "");
        assert_eq!(given(toml, &[]).unwrap(), "DOCKER_RESOURCE_GPU=a,b");
        assert_eq!(given(toml, &["SSD=3"]).unwrap(), "DOCKER_RESOURCE_SSD=3");
        let error = given(toml, &["GPU"]).unwrap_err().to_string();
        assert!(error.contains("write KIND=VALUE"), "{error}");
    }

    #[test]
    fn a_wrong_key_is_named_with_its_place() {
        let error =
            format!("{:#}", resolve("hostnam = \"x\"\n", DaemonArgs::default()).unwrap_err());
        assert!(error.contains("daemon.toml") && error.contains("hostnam"), "{error}");
        let missing =
            DaemonArgs { config: Some("/nonexistent.toml".into()), ..DaemonArgs::default() };
        let error = format!("{:#}", Options::resolve(missing).unwrap_err());
        assert!(error.contains("/nonexistent.toml"), "{error}");
    }
}
