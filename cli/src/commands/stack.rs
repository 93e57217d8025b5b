//! `skep stack`. Wording: docker/cli `cli/command/stack`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use skep_common::compose::{self, STACK_LABEL, Source};
use skep_common::{Service, Stack, Task};
use skep_proto::{ListRequest, RemoveStackRequest};

use super::filter::{self, Filter, Filters};
use super::service::{self, caller_environment};
use super::stack_deploy::{self, DeployArgs};
use super::tasks::{self, ListFlags};
use super::{Failures, progress};
use crate::client::{Client, Refusal, is_not_found};
use crate::format::human::natural_order;
use crate::format::{View, plain_cell, render, shown};
use crate::ui::Ui;

/// Manage Swarm stacks
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Outputs the final config file, after doing merges and interpolations
    Config(ConfigArgs),
    /// Deploy a new stack or update an existing stack
    #[command(visible_alias = "up")]
    Deploy(DeployArgs),
    /// List stacks
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// List the tasks in the stack
    Ps(PsArgs),
    /// Remove one or more stacks
    #[command(visible_aliases = ["remove", "down"])]
    Rm(RmArgs),
    /// List the services in the stack
    Services(ServicesArgs),
}

/// `skep stack config [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// Path to a Compose file, or "-" to read from stdin
    #[arg(long, short = 'c', required = true, value_delimiter = ',', value_name = "FILE")]
    compose_file: Vec<PathBuf>,
    /// Skip interpolation and output only merged config
    #[arg(long)]
    skip_interpolation: bool,
}

/// `skep stack ls [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
}

/// `skep stack ps [OPTIONS] STACK`
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    #[command(flatten)]
    list: ListFlags,
    /// Name of the stack
    stack: String,
}

/// `skep stack rm STACK [STACK...]`
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Do not wait for stack removal
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", value_name = "BOOL")]
    detach: bool,
    /// Names of stacks
    #[arg(required = true, value_name = "STACK")]
    stacks: Vec<String>,
}

/// `skep stack services [OPTIONS] STACK`
#[derive(Debug, Args)]
pub(crate) struct ServicesArgs {
    /// Filter output based on conditions provided
    #[arg(long, short, value_parser = filter::parse, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Only display IDs
    #[arg(long, short)]
    quiet: bool,
    /// Name of the stack
    stack: String,
}

pub(super) async fn run(command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    match command {
        Command::Config(args) => config(&args, ui),
        Command::Deploy(args) => stack_deploy::run(&args, client, ui).await,
        Command::Ls(args) => ls(&args, client, ui).await,
        Command::Ps(args) => ps(&args, client, ui).await,
        Command::Rm(args) => rm(&args, client, ui).await,
        Command::Services(args) => services(&args, client, ui).await,
    }
}

/// Reads the files; `-` is standard input.
pub(super) fn read(paths: &[PathBuf]) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in paths {
        let name = path.display().to_string();
        let text = match name.as_str() {
            "-" => std::io::read_to_string(std::io::stdin()),
            _ => std::fs::read_to_string(path),
        };
        let text = text.with_context(|| format!("failed to read the Compose file {name}"))?;
        sources.push(Source { name, text });
    }
    Ok(sources)
}

/// The specs of the files. Files that they name are found beside the first of them.
pub(super) fn load(
    stack: &str,
    paths: &[PathBuf],
    sources: &[Source],
) -> Result<compose::Loaded, compose::Errors> {
    let first = paths.first().map(PathBuf::as_path).and_then(Path::parent);
    let directory = first.unwrap_or(Path::new("")).to_owned();
    let read = |path: &str| std::fs::read(directory.join(path)).map_err(|error| error.to_string());
    compose::load(stack, sources, &caller_environment(), &read)
}

/// `stack config`: needs no daemon.
pub(super) fn config(args: &ConfigArgs, ui: &mut Ui) -> Result<()> {
    let sources = read(&args.compose_file)?;
    let environment = caller_environment();
    let environment = (!args.skip_interpolation).then_some(&environment);
    let yaml = compose::config(&sources, environment)?;
    // The whole conversion checks what the document means; its errors are the user's here too.
    if environment.is_some() {
        let loaded = load("config", &args.compose_file, &sources)?;
        for warning in loaded.warnings {
            ui.note(warning)?;
        }
    }
    Ok(ui.data(yaml)?)
}

const VIEW: View =
    View { columns: &[shown("NAME", "Name"), shown("SERVICES", "Services")], cell: plain_cell };

async fn ls(args: &LsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let stacks: Vec<Stack> = client.list_all("stack").await?;
    let services: Vec<Service> = client.list_all("service").await?;
    // A stack that another client made is known by its label alone.
    let mut counts: BTreeMap<String, usize> =
        stacks.into_iter().map(|stack| (stack.spec.name, 0)).collect();
    for service in &services {
        if let Some(name) = service.spec.labels.as_ref().and_then(|labels| labels.get(STACK_LABEL))
        {
            *counts.entry(name.clone()).or_default() += 1;
        }
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by(|(a, _), (b, _)| natural_order(a, b));
    let rows: Vec<Value> = counts
        .into_iter()
        .map(|(name, count)| json!({"Name": name, "Services": count.to_string()}))
        .collect();
    Ok(ui.data(render(&VIEW, &rows, args.format.as_deref(), false)?)?)
}

fn of_stack(kind: &str, stack: &str) -> ListRequest {
    ListRequest { kind: kind.into(), stack: stack.into(), ..Default::default() }
}

async fn ps(args: &PsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let tasks: Vec<Task> = client.list(of_stack("task", &args.stack)).await?;
    if tasks.is_empty() {
        bail!("nothing found in stack: {}", args.stack);
    }
    tasks::print(&args.list, tasks, client, ui).await
}

/// The services of a stack.
pub(super) async fn list_services(client: &Client, stack: &str) -> Result<Vec<Service>> {
    client.list(of_stack("service", stack)).await
}

async fn services(args: &ServicesArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let filters = Filters::new(&args.filter, &["id", "name", "label"])?;
    let mut services = list_services(client, &args.stack).await?;
    services.retain(|service| {
        filters.is_match("id", |id| service.id.to_string().starts_with(id))
            && filters.is_match("name", |name| service.spec.name.starts_with(name))
            && filters.match_labels("label", service.spec.labels.as_ref())
    });
    if services.is_empty() {
        return Ok(ui.note(format_args!("Nothing found in stack: {}", args.stack))?);
    }
    let tasks: Vec<Task> = client.list(of_stack("task", &args.stack)).await?;
    let notes = if args.quiet { Vec::new() } else { service::condition_notes(&services) };
    let rows = service::rows(services, &tasks);
    ui.data(render(&service::VIEW, &rows, args.format.as_deref(), args.quiet)?)?;
    service::show_notes(&notes, ui)
}

async fn rm(args: &RmArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    for stack in &args.stacks {
        let services = list_services(client, stack).await?;
        let request = RemoveStackRequest { name: stack.clone() };
        let removed = match client.control().remove_stack(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                let error = anyhow::Error::new(Refusal(status));
                if is_not_found(&error) {
                    ui.note(format_args!("Nothing found in stack: {stack}"))?;
                } else {
                    failures.add(&error);
                }
                continue;
            }
        };
        for name in &removed.removed {
            ui.line(format_args!("Removing service {name}"))?;
        }
        for name in &removed.removed_networks {
            ui.line(format_args!("Removing network {name}"))?;
        }
        for name in &removed.removed_secrets {
            ui.line(format_args!("Removing secret {name}"))?;
        }
        for name in &removed.removed_configs {
            ui.line(format_args!("Removing config {name}"))?;
        }
        if !args.detach {
            let ids: BTreeSet<String> =
                services.iter().map(|service| service.id.to_string()).collect();
            progress::wait_removed(client, ids).await?;
        }
    }
    failures.finish()
}
