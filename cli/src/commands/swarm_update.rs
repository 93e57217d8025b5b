//! `skep swarm update`, and the settings that `init` takes as well.

use anyhow::{Result, bail};
use clap::Args;
use serde::Deserialize;
use skep_common::Version;
use skep_common::compose::units::parse_duration;
use skep_common::spec::{Nanos, PlacementStrategy, SwarmSpec};
use skep_proto::UpdateSwarmRequest;

use super::swarm_lock;
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// How often an update that lost a race reads and asks again.
const ATTEMPTS_MAX: usize = 5;

/// Settings of the swarm; what is not given stays as it is.
#[derive(Debug, Args)]
pub(crate) struct SettingsArgs {
    /// Validity period for node certificates (ns|us|ms|s|m|h) (default 2160h0m0s)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    cert_expiry: Option<Nanos>,
    /// Dispatcher heartbeat period, from 200ms to 1m (ns|us|ms|s|m|h) (default 1s, up to 5s beyond 1,000 nodes)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    dispatcher_heartbeat: Option<Nanos>,
    /// Number of additional Raft snapshots to retain (default 0)
    #[arg(long, value_name = "NUMBER")]
    max_snapshots: Option<u64>,
    /// Number of log entries between Raft snapshots (default 10000)
    #[arg(long, value_name = "NUMBER")]
    snapshot_interval: Option<u64>,
    /// Task history retention limit (default 5)
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    task_history_limit: Option<i64>,
    /// Change manager autolocking setting (true|false)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    autolock: Option<bool>,
    /// Which nodes come first for services that name no strategy: spread or binpack (default spread)
    #[arg(long, value_name = "STRATEGY", value_parser = strategy)]
    placement_strategy: Option<PlacementStrategy>,
}

fn strategy(text: &str) -> Result<PlacementStrategy, String> {
    PlacementStrategy::of(text).ok_or_else(|| "use spread or binpack".to_owned())
}

impl SettingsArgs {
    fn is_empty(&self) -> bool {
        let Self { cert_expiry, dispatcher_heartbeat, max_snapshots, snapshot_interval, .. } = self;
        let Self { task_history_limit, placement_strategy, autolock, .. } = self;
        cert_expiry.is_none()
            && dispatcher_heartbeat.is_none()
            && max_snapshots.is_none()
            && snapshot_interval.is_none()
            && task_history_limit.is_none()
            && placement_strategy.is_none()
            && autolock.is_none()
    }

    /// Lays what was given over the settings.
    fn apply(&self, spec: &mut SwarmSpec) {
        if let Some(expiry) = self.cert_expiry {
            spec.ca_config.get_or_insert_default().node_cert_expiry = Some(expiry);
        }
        if let Some(period) = self.dispatcher_heartbeat {
            spec.dispatcher.get_or_insert_default().heartbeat_period = Some(period);
        }
        if let Some(number) = self.max_snapshots {
            spec.raft.get_or_insert_default().keep_old_snapshots = Some(number);
        }
        if let Some(number) = self.snapshot_interval {
            spec.raft.get_or_insert_default().snapshot_interval = Some(number);
        }
        if let Some(is_locked) = self.autolock {
            spec.encryption_config.get_or_insert_default().auto_lock_managers = Some(is_locked);
        }
        if let Some(limit) = self.task_history_limit {
            let orchestration = spec.orchestration.get_or_insert_default();
            orchestration.task_history_retention_limit = Some(limit);
        }
        if let Some(strategy) = self.placement_strategy {
            spec.orchestration.get_or_insert_default().strategy = Some(strategy);
        }
    }

    /// The settings of a new swarm as JSON; empty where none was given.
    pub(super) fn of_new_swarm(&self) -> Result<String> {
        if self.is_empty() {
            return Ok(String::new());
        }
        let mut spec = SwarmSpec { name: "default".into(), ..SwarmSpec::default() };
        self.apply(&mut spec);
        Ok(serde_json::to_string(&spec)?)
    }
}

/// `skep swarm update`
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    #[command(flatten)]
    settings: SettingsArgs,
}

pub(super) async fn run(args: &UpdateArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    if args.settings.is_empty() {
        bail!("nothing to update: name a setting, see skep swarm update --help");
    }
    let request = UpdateSwarmRequest::default();
    let before = change(client, |spec| args.settings.apply(spec), request).await?;
    ui.line("Swarm updated.")?;
    let config = before.encryption_config;
    let was_locked = config.and_then(|config| config.auto_lock_managers).unwrap_or(false);
    if args.settings.autolock == Some(true) && !was_locked {
        ui.line("")?;
        swarm_lock::tell(&swarm_lock::ask(client).await?, ui)?;
    }
    Ok(())
}

/// What is read of the swarm.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Settings {
    version: Version,
    spec: SwarmSpec,
}

/// Reads the settings, changes them, and asks for them until nobody else wrote meanwhile. Gives what they
/// were.
pub(super) async fn change(
    client: &Client,
    apply: impl Fn(&mut SwarmSpec),
    request: UpdateSwarmRequest,
) -> Result<SwarmSpec> {
    for attempt in 1.. {
        let cluster: Settings = client.get("cluster", "default").await?;
        let mut spec = cluster.spec.clone();
        apply(&mut spec);
        let request = UpdateSwarmRequest {
            version: cluster.version.index,
            spec_json: serde_json::to_string(&spec)?,
            ..request.clone()
        };
        match client.control().update_swarm(request).await {
            Ok(_) => return Ok(cluster.spec),
            Err(status) if status.code() == tonic::Code::Aborted && attempt < ATTEMPTS_MAX => {}
            Err(status) => return Err(Refusal(status).into()),
        }
    }
    unreachable!("the last attempt returns")
}
