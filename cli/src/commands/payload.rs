//! What `skep secret` and `skep config` have in common: both are bytes under a name, in versions.
//!
//! Wording: docker/cli `cli/command/{secret,config}`. `update` is skep's own: the bytes become a new
//! version, and the services that use the old one are updated to it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use skep_common::Service;
use skep_common::object::Secret;
use skep_common::spec::{Base64, Driver, Labels, SecretSpec};
use skep_proto::{
    CreateConfigRequest, CreateSecretRequest, RemoveConfigRequest, RemoveSecretRequest,
    UpdateConfigRequest, UpdateSecretRequest,
};

use super::Failures;
use super::filter::{self, Filter, Filters};
use super::inspect::{self, InspectFlags};
use super::progress::{self, Waiting};
use super::service::flags::{WaitFlags, parse_label};
use crate::client::{Client, Refusal};
use crate::format::human::{duration, natural_order};
use crate::format::{View, hidden, plain_cell, render, shown};
use crate::ui::Ui;

/// How often an update that lost a race reads and asks again.
const ATTEMPTS_MAX: usize = 5;
/// More than either may have: what is larger is refused by the daemon, and not read to its end here.
const READ_BYTES_MAX: u64 = 1 << 20;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Secret,
    Config,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::Config => "config",
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create one from a file or STDIN as content
    Create(CreateArgs),
    /// Display detailed information on one or more
    Inspect(InspectArgs),
    /// List them
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Remove one or more
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// Give one new content, and update the services that use it
    Update(UpdateArgs),
}

/// `skep secret create [OPTIONS] NAME [FILE|-]`
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Labels
    #[arg(long, short, value_parser = parse_label, value_name = "NAME=VALUE")]
    label: Vec<(String, String)>,
    /// Template driver: the content is filled in for each task
    #[arg(long, value_name = "golang")]
    template_driver: Option<String>,
    /// Its name
    name: String,
    /// The file with its content, or "-" to read from STDIN
    #[arg(value_name = "FILE|-")]
    file: PathBuf,
}

/// `skep secret inspect [OPTIONS] NAME [NAME...]`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    flags: InspectFlags,
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// `skep secret ls [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Filter output based on conditions provided: id, label, name
    #[arg(long, short, value_parser = filter::parse, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Only display IDs
    #[arg(long, short)]
    quiet: bool,
}

/// `skep secret rm NAME [NAME...]`
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// `skep secret update [OPTIONS] NAME [FILE|-]`
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// Add or update a label
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    label_add: Vec<(String, String)>,
    /// Remove a label by its key
    #[arg(long, value_name = "NAME")]
    label_rm: Vec<String>,
    #[command(flatten)]
    wait: WaitFlags,
    /// Name or id
    name: String,
    /// The file with its new content, or "-" to read from STDIN; without one only labels change
    #[arg(value_name = "FILE|-")]
    file: Option<PathBuf>,
}

pub(super) async fn run(kind: Kind, command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    match command {
        Command::Create(args) => create(kind, &args, client, ui).await,
        Command::Inspect(args) => {
            let pretty = |one: &Secret| pretty(kind, one);
            inspect::print(&args.flags, (kind.word(), &args.names), pretty, client, ui).await
        }
        Command::Ls(args) => ls(kind, &args, client, ui).await,
        Command::Rm(args) => rm(kind, &args, client, ui).await,
        Command::Update(args) => update(kind, &args, client, ui).await,
    }
}

/// The bytes of a file, or of standard input.
fn read(kind: Kind, file: &Path) -> Result<Base64> {
    use std::io::Read as _;
    let mut data = Vec::new();
    let context = || format!("error reading content from {:?}", file.display().to_string());
    let done = match file.as_os_str() == "-" {
        true => std::io::stdin().lock().take(READ_BYTES_MAX).read_to_end(&mut data),
        false => {
            let opened = std::fs::File::open(file).with_context(context)?;
            opened.take(READ_BYTES_MAX).read_to_end(&mut data)
        }
    };
    done.with_context(context)?;
    if data.is_empty() {
        bail!("{} has no content: it must have at least one byte", kind.word());
    }
    Ok(Base64(data))
}

async fn create(kind: Kind, args: &CreateArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let labels: Labels = args.label.iter().cloned().collect();
    let spec = SecretSpec {
        name: args.name.clone(),
        labels: (!labels.is_empty()).then_some(labels),
        data: Some(read(kind, &args.file)?),
        templating: args.template_driver.clone().map(|name| Driver { name, options: None }),
        ..SecretSpec::default()
    };
    let spec_json = serde_json::to_string(&spec)?;
    let (id, warnings) = match kind {
        Kind::Secret => {
            let answer = client.control().create_secret(CreateSecretRequest { spec_json }).await;
            let answer = answer.map_err(Refusal)?.into_inner();
            (answer.id, answer.warnings)
        }
        Kind::Config => {
            let answer = client.control().create_config(CreateConfigRequest { spec_json }).await;
            let answer = answer.map_err(Refusal)?.into_inner();
            (answer.id, answer.warnings)
        }
    };
    for warning in warnings {
        ui.note(warning)?;
    }
    Ok(ui.line(id)?)
}

/// The newest version that there is.
fn newest(one: &Secret) -> u64 {
    one.versions.last_key_value().map_or(0, |(number, _)| *number)
}

const VIEW: View = View {
    columns: &[
        shown("ID", "ID"),
        shown("NAME", "Name"),
        shown("VERSION", "Version"),
        shown("CREATED", "CreatedAt"),
        shown("UPDATED", "UpdatedAt"),
        hidden("DRIVER", "Driver"),
        hidden("LABELS", "Labels"),
    ],
    cell: plain_cell,
};

async fn ls(kind: Kind, args: &LsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let filters = Filters::new(&args.filter, &["id", "label", "name"])?;
    let mut all: Vec<Secret> = client.list_all(kind.word()).await?;
    all.retain(|one| {
        filters.is_match("id", |id| one.id.to_string().starts_with(id))
            && filters.is_match("name", |name| one.spec.name.starts_with(name))
            && filters.match_labels("label", one.spec.labels.as_ref())
    });
    all.sort_by(|a, b| natural_order(&a.spec.name, &b.spec.name));
    let now = (ui.now)();
    let row = |one: &Secret| {
        let labels = one.spec.labels.iter().flatten();
        let labels = labels.map(|(name, value)| format!("{name}={value}"));
        json!({
            "ID": one.id,
            "Name": one.spec.name,
            "Version": newest(one).to_string(),
            "CreatedAt": format!("{} ago", duration(now.since(one.meta.created_at))),
            "UpdatedAt": format!("{} ago", duration(now.since(one.meta.updated_at))),
            "Driver": one.spec.driver.as_ref().map_or("", |driver| driver.name.as_str()),
            "Labels": labels.collect::<Vec<_>>().join(","),
        })
    };
    let rows: Vec<Value> = all.iter().map(row).collect();
    Ok(ui.data(render(&VIEW, &rows, args.format.as_deref(), args.quiet)?)?)
}

/// The text of `inspect --pretty`. Only configs show their content.
fn pretty(kind: Kind, one: &Secret) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = writeln!(out, "ID:\t\t\t{}\nName:\t\t\t{}", one.id, one.spec.name);
    let labels = one.spec.labels.iter().flatten();
    let labels: String = labels.map(|(name, value)| format!(" - {name}={value}\n")).collect();
    let _ = match labels.is_empty() {
        true => writeln!(out, "Labels:"),
        false => write!(out, "Labels:\n{labels}"),
    };
    if let Some(driver) = &one.spec.templating {
        let _ = writeln!(out, "Template Driver:\t{}", driver.name);
    }
    let versions: Vec<String> = one.versions.keys().map(ToString::to_string).collect();
    let _ = writeln!(out, "Versions:\t\t{}", versions.join(", "));
    let _ = writeln!(out, "Created at:            \t{}", one.meta.created_at);
    let _ = write!(out, "Updated at:            \t{}", one.meta.updated_at);
    if let (Kind::Config, Some(data)) = (kind, &one.spec.data) {
        let _ = write!(out, "\nData:\n{}", String::from_utf8_lossy(&data.0));
    }
    out
}

async fn rm(kind: Kind, args: &RmArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    for reference in &args.names {
        match remove(kind, client, reference).await {
            Ok(()) => ui.line(reference)?,
            Err(error) => failures.add(&error),
        }
    }
    failures.finish()
}

async fn remove(kind: Kind, client: &Client, reference: &str) -> Result<()> {
    let one: Secret = client.get(kind.word(), reference).await?;
    let (id, mut control) = (one.id.to_string(), client.control());
    let removed = match kind {
        Kind::Secret => control.remove_secret(RemoveSecretRequest { id }).await.map(drop),
        Kind::Config => control.remove_config(RemoveConfigRequest { id }).await.map(drop),
    };
    Ok(removed.map_err(Refusal)?)
}

async fn update(kind: Kind, args: &UpdateArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let data = args.file.as_deref().map(|file| read(kind, file)).transpose()?;
    if data.is_none() && args.label_add.is_empty() && args.label_rm.is_empty() {
        bail!("nothing to update: give a file with the new content, or labels");
    }
    let before: Vec<Service> = client.list_all("service").await?;
    let before: BTreeMap<String, Service> =
        before.into_iter().map(|service| (service.spec.name.clone(), service)).collect();
    let followers = change(kind, args, data.as_ref(), client).await?;
    ui.line(&args.name)?;
    if !followers.is_empty() {
        ui.note(format_args!("updating {}", followers.join(", ")))?;
    }
    if args.wait.detach {
        return Ok(());
    }
    let mut failures = Failures::default();
    for service in followers.iter().filter_map(|name| before.get(name)) {
        let waiting = Waiting::for_changed(service);
        if let Err(error) = progress::wait(client, waiting, args.wait.quiet, ui).await {
            failures.add(&anyhow::anyhow!("{}: {error:#}", service.spec.name));
        }
    }
    failures.finish()
}

/// Writes the changed spec, again when someone was faster; the services that follow.
async fn change(
    kind: Kind,
    args: &UpdateArgs,
    data: Option<&Base64>,
    client: &Client,
) -> Result<Vec<String>> {
    for attempt in 1.. {
        let one: Secret = client.get(kind.word(), &args.name).await?;
        let mut spec = one.spec.clone();
        let mut labels = spec.labels.take().unwrap_or_default();
        labels.retain(|name, _| !args.label_rm.contains(name));
        labels.extend(args.label_add.iter().cloned());
        spec.labels = (!labels.is_empty()).then_some(labels);
        spec.data = data.cloned();
        let (id, version) = (one.id.to_string(), one.meta.version.index);
        let (spec_json, data_changes) = (serde_json::to_string(&spec)?, data.is_some());
        let mut control = client.control();
        let answer = match kind {
            Kind::Secret => {
                let request = UpdateSecretRequest { id, version, spec_json, data_changes };
                let answer = control.update_secret(request).await;
                answer.map(|answer| answer.into_inner().services)
            }
            Kind::Config => {
                let request = UpdateConfigRequest { id, version, spec_json, data_changes };
                let answer = control.update_config(request).await;
                answer.map(|answer| answer.into_inner().services)
            }
        };
        match answer {
            Err(status) if attempt < ATTEMPTS_MAX && status.code() == tonic::Code::Aborted => {}
            answer => return Ok(answer.map_err(Refusal)?),
        }
    }
    unreachable!("the last attempt returns")
}
