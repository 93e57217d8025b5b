//! `skep stack deploy`: files to specs, one transaction, and on request a wait.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::Args;
use skep_common::Service;
use skep_proto::{DeployStackRequest, DeployStackResponse, PlanRequest};

use super::progress::{self, Waiting};
use super::stack::{list_services, load, read};
use super::{Failures, plan};
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// `skep stack deploy [OPTIONS] STACK`
#[derive(Debug, Args)]
pub(crate) struct DeployArgs {
    /// Path to a Compose file, or "-" to read from stdin
    #[arg(long, short = 'c', required = true, value_delimiter = ',', value_name = "FILE")]
    compose_file: Vec<PathBuf>,
    /// Prune services that are no longer referenced
    #[arg(long)]
    prune: bool,
    /// Exit immediately instead of waiting for the stack services to converge (default true)
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    detach: Option<bool>,
    /// Show what would be done, and write nothing: which tasks would be created, moved and stopped, and where;
    /// exit code 2 where one would fit nowhere. `--plan=json` and `--plan=TEMPLATE` format it
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "table", value_name = "FORMAT")]
    plan: Option<String>,
    /// Suppress progress output
    #[arg(long, short)]
    quiet: bool,
    /// Name of the stack
    stack: String,
}

pub(super) async fn run(args: &DeployArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let loaded = load(&args.stack, &args.compose_file, &read(&args.compose_file)?)?;
    for warning in &loaded.warnings {
        ui.note(warning)?;
    }
    let request =
        DeployStackRequest { spec_json: serde_json::to_string(&loaded.spec)?, prune: args.prune };
    if let Some(format) = &args.plan {
        let request = PlanRequest { stack: Some(request), ..PlanRequest::default() };
        let answer = client.control().plan(request).await.map_err(Refusal)?;
        return plan::show(&answer.into_inner(), Some(format), ui);
    }
    let before = list_services(client, &args.stack).await?;
    let before: BTreeMap<String, Service> =
        before.into_iter().map(|service| (service.spec.name.clone(), service)).collect();
    let answer = client.control().deploy_stack(request).await.map_err(Refusal)?.into_inner();
    report(args, &answer, &before, ui)?;
    if args.detach != Some(false) {
        return Ok(());
    }
    wait(args, &answer, &before, client, ui).await
}

fn report(
    args: &DeployArgs,
    answer: &DeployStackResponse,
    before: &BTreeMap<String, Service>,
    ui: &mut Ui,
) -> Result<()> {
    for warning in &answer.warnings {
        ui.note(warning)?;
    }
    if args.detach.is_none() {
        ui.note(
            "Since --detach=false was not specified, tasks will be created in the background.",
        )?;
    }
    for name in &answer.removed {
        ui.line(format_args!("Removing service {name}"))?;
    }
    for name in &answer.created_networks {
        ui.line(format_args!("Creating network {name}"))?;
    }
    for (verb, kind, names) in [
        ("Creating", "secret", &answer.created_secrets),
        ("Updating", "secret", &answer.updated_secrets),
        ("Removing", "secret", &answer.removed_secrets),
        ("Creating", "config", &answer.created_configs),
        ("Updating", "config", &answer.updated_configs),
        ("Removing", "config", &answer.removed_configs),
    ] {
        for name in names {
            ui.line(format_args!("{verb} {kind} {name}"))?;
        }
    }
    for name in &answer.created {
        ui.line(format_args!("Creating service {name}"))?;
    }
    for (names, word) in [(&answer.updated, "Updating"), (&answer.unchanged, "Unchanged")] {
        for name in names {
            let id = before.get(name).map(|service| format!(" (id: {})", service.id));
            ui.line(format_args!("{word} service {name}{}", id.unwrap_or_default()))?;
        }
    }
    Ok(())
}

/// Waits for every service that was made or changed.
async fn wait(
    args: &DeployArgs,
    answer: &DeployStackResponse,
    before: &BTreeMap<String, Service>,
    client: &Client,
    ui: &mut Ui,
) -> Result<()> {
    let mut failures = Failures::default();
    for name in answer.created.iter().chain(&answer.updated) {
        let waiting = match before.get(name) {
            Some(service) => Waiting::for_changed(service),
            None => {
                let service: Service = client.get("service", name).await?;
                Waiting::for_new(service.id.to_string())
            }
        };
        if let Err(error) = progress::wait(client, waiting, args.quiet, ui).await {
            failures.add(&anyhow!("{name}: {error:#}"));
        }
    }
    failures.finish()
}
