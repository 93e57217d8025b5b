//! `skep node`. Wording: docker/cli `cli/command/node`.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_common::spec::{Availability, NodeRole, NodeSpec};
use skep_common::{Node, Task};
use skep_proto::{ListRequest, RemoveNodeRequest, UpdateNodeRequest};

use super::Failures;
use super::filter::{self, Filter, Filters};
use super::inspect::{self, InspectFlags};
use super::node_pretty::pretty;
use super::tasks::{self, ListFlags, hostname};
use crate::client::{Client, Refusal, is_not_found};
use crate::format::human::{capitalize, natural_order};
use crate::format::{View, hidden, plain_cell, render, shown};
use crate::ui::Ui;

/// How often an update that lost a race reads and asks again.
const ATTEMPTS_MAX: usize = 5;

/// Manage Swarm nodes
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Demote one or more nodes from manager in the swarm
    Demote(NodesArgs),
    /// Display detailed information on one or more nodes
    Inspect(InspectArgs),
    /// List nodes in the swarm
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Promote one or more nodes to manager in the swarm
    Promote(NodesArgs),
    /// List tasks running on one or more nodes, defaults to current node
    Ps(PsArgs),
    /// Remove one or more nodes from the swarm
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// Update a node
    Update(UpdateArgs),
    /// Say what would become of tasks, images and the managers' majority, were nodes down
    WhatIf(super::node_what_if::WhatIfArgs),
}

/// Some nodes.
#[derive(Debug, Args)]
pub(crate) struct NodesArgs {
    /// Host names or ids of nodes
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<String>,
}

/// `skep node inspect [OPTIONS] self|NODE [NODE...]`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    flags: InspectFlags,
    /// Host names or ids of nodes
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<String>,
}

/// `skep node ls [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Filter output based on conditions provided
    #[arg(long, short, value_parser = filter::parse, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Only display IDs
    #[arg(long, short)]
    quiet: bool,
}

/// `skep node ps [OPTIONS] [NODE...]`
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    #[command(flatten)]
    list: ListFlags,
    /// Host names or ids of nodes
    #[arg(value_name = "NODE", default_value = "self")]
    nodes: Vec<String>,
}

/// `skep node rm [OPTIONS] NODE [NODE...]`
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Force remove a node from the swarm
    #[arg(long, short)]
    force: bool,
    /// Host names or ids of nodes
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<String>,
}

/// `skep node update [OPTIONS] NODE`
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// Availability of the node ("active", "pause", "drain")
    #[arg(long, value_parser = parse_availability)]
    availability: Option<Availability>,
    /// Role of the node ("worker", "manager")
    #[arg(long, value_parser = parse_role)]
    role: Option<NodeRole>,
    /// Add or update a node label ("key=value")
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    label_add: Vec<(String, String)>,
    /// Remove a node label if exists
    #[arg(long, value_name = "NAME")]
    label_rm: Vec<String>,
    /// Host name or id of the node
    node: String,
}

fn parse_availability(text: &str) -> Result<Availability, String> {
    [Availability::Active, Availability::Pause, Availability::Drain]
        .into_iter()
        .find(|availability| availability.name() == text)
        .ok_or_else(|| {
            format!("invalid availability \"{text}\", only active, pause and drain are supported")
        })
}

fn parse_role(text: &str) -> Result<NodeRole, String> {
    [NodeRole::Worker, NodeRole::Manager]
        .into_iter()
        .find(|role| role.name() == text)
        .ok_or_else(|| format!("invalid role \"{text}\", only worker and manager are supported"))
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    if name.is_empty() {
        return Err(format!("invalid label {text:?}: write NAME=VALUE"));
    }
    Ok((name.into(), value.into()))
}

pub(super) async fn run(command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    match command {
        Command::Demote(args) => set_role(&args, NodeRole::Worker, client, ui).await,
        Command::Inspect(InspectArgs { flags, nodes }) => {
            inspect::print(&flags, ("node", &nodes), pretty, client, ui).await
        }
        Command::Ls(args) => ls(&args, client, ui).await,
        Command::Promote(args) => set_role(&args, NodeRole::Manager, client, ui).await,
        Command::Ps(args) => ps(&args, client, ui).await,
        Command::Rm(args) => rm(&args, client, ui).await,
        Command::WhatIf(args) => super::node_what_if::run(&args, client, ui).await,
        Command::Update(args) => {
            change(client, &args.node, |spec| apply(&args, spec)).await?;
            Ok(ui.line(&args.node)?)
        }
    }
}

/// The self mark stands in the id's column of the table, as Docker's client has it.
const VIEW: View = View {
    columns: &[
        shown("ID", "ID"),
        shown("HOSTNAME", "Hostname"),
        shown("STATUS", "Status"),
        shown("AVAILABILITY", "Availability"),
        shown("MANAGER STATUS", "ManagerStatus"),
        shown("ENGINE VERSION", "EngineVersion"),
        hidden("TLS STATUS", "TLSStatus"),
        hidden("", "Self"),
    ],
    cell: table_cell,
};

fn table_cell(field: &str, row: &Value) -> String {
    let text = plain_cell(field, row);
    match field {
        "ID" if row["Self"] == Value::Bool(true) => format!("{text} *"),
        "ID" => format!("{text}  "),
        _ => text,
    }
}

async fn ls(args: &LsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let known = ["id", "label", "node.label", "membership", "name", "role"];
    let filters = Filters::new(&args.filter, &known)?;
    let mut nodes: Vec<Listed> = client.list_all("node").await?;
    nodes.retain(|Listed { node, .. }| {
        filters.is_match("id", |id| node.id.to_string().starts_with(id))
            && filters.is_match("name", |name| hostname(node).starts_with(name))
            && filters.is_match("role", |role| node.spec.role.name() == role)
            && filters.is_match("membership", |membership| membership == "accepted")
            && filters.match_labels("node.label", node.spec.labels.as_ref())
            && filters.match_labels(
                "label",
                node.description.as_ref().map(|description| &description.engine.labels),
            )
    });
    nodes.sort_by(|Listed { node: a, .. }, Listed { node: b, .. }| {
        natural_order(&hostname(a), &hostname(b)).then(a.id.cmp(&b.id))
    });
    let this: Node = client.get("node", "self").await?;
    let rows: Vec<Value> = nodes.iter().map(|one| row(one, one.node.id == this.id)).collect();
    Ok(ui.data(render(&VIEW, &rows, args.format.as_deref(), args.quiet)?)?)
}

/// Whether it is there, and what is wrong with it all the same.
fn status(node: &Node) -> String {
    let state = capitalize(node.status.state.name());
    let is_full = node.description.as_ref().is_some_and(|said| said.disk_full.is_some());
    if is_full { format!("{state}, disk full") } else { state }
}

/// A node, with what the manager that answers adds to it.
#[derive(Debug, Deserialize)]
struct Listed {
    #[serde(flatten)]
    node: Node,
    #[serde(rename = "TLSStatus", default)]
    tls_status: String,
}

fn row(Listed { node, tls_status }: &Listed, is_self: bool) -> Value {
    let manager = node.manager_status.as_ref();
    let manager =
        manager.map(|manager| if manager.leader { "leader" } else { &manager.reachability });
    let description = node.description.as_ref();
    json!({
        "ID": node.id,
        "Self": is_self,
        "Hostname": description.map(|description| description.hostname.as_str()).unwrap_or_default(),
        "Status": status(node),
        "Availability": capitalize(node.spec.availability.name()),
        "ManagerStatus": capitalize(manager.unwrap_or_default()),
        "EngineVersion": description
            .map(|description| description.engine.engine_version.as_str())
            .unwrap_or_default(),
        "TLSStatus": tls_status,
    })
}

async fn ps(args: &PsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    let mut node_ids = Vec::new();
    for reference in &args.nodes {
        match client.get::<Node>("node", reference).await {
            Ok(node) => node_ids.push(node.id.to_string()),
            Err(error) if is_not_found(&error) => failures.add(&error),
            Err(error) => return Err(error),
        }
    }
    if !node_ids.is_empty() {
        let request = ListRequest { kind: "task".into(), node_ids, ..Default::default() };
        let tasks: Vec<Task> = client.list(request).await?;
        tasks::print(&args.list, tasks, client, ui).await?;
    }
    failures.finish()
}

async fn rm(args: &RmArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    for reference in &args.nodes {
        match remove(client, reference, args.force).await {
            Ok(()) => ui.line(reference)?,
            Err(error) => failures.add(&error),
        }
    }
    failures.finish()
}

async fn remove(client: &Client, reference: &str, force: bool) -> Result<()> {
    let node: Node = client.get("node", reference).await?;
    let request = RemoveNodeRequest { id: node.id.to_string(), force };
    client.control().remove_node(request).await.map_err(Refusal)?;
    Ok(())
}

fn apply(args: &UpdateArgs, spec: &mut NodeSpec) -> Result<()> {
    spec.availability = args.availability.unwrap_or(spec.availability);
    spec.role = args.role.unwrap_or(spec.role);
    let mut labels = spec.labels.take().unwrap_or_default();
    for name in &args.label_rm {
        if labels.remove(name).is_none() {
            bail!("key {name} doesn't exist in node's labels");
        }
    }
    labels.extend(args.label_add.iter().cloned());
    spec.labels = (!labels.is_empty()).then_some(labels);
    Ok(())
}

/// Reads the node, changes its spec and writes it back, again when someone was faster.
async fn change(
    client: &Client,
    reference: &str,
    change: impl Fn(&mut NodeSpec) -> Result<()>,
) -> Result<()> {
    for attempt in 1.. {
        let node: Node = client.get("node", reference).await?;
        let mut spec = node.spec.clone();
        change(&mut spec)?;
        let request = UpdateNodeRequest {
            id: node.id.to_string(),
            version: node.meta.version.index,
            spec_json: serde_json::to_string(&spec)?,
        };
        match client.control().update_node(request).await {
            Ok(_) => return Ok(()),
            Err(status) if attempt < ATTEMPTS_MAX && status.code() == tonic::Code::Aborted => {}
            Err(status) => return Err(Refusal(status).into()),
        }
    }
    unreachable!("the last attempt returns")
}

async fn set_role(args: &NodesArgs, role: NodeRole, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    for reference in &args.nodes {
        let (is_same, done) = match role {
            NodeRole::Manager => ("is already a manager.", "promoted to a manager in the swarm."),
            NodeRole::Worker => ("is already a worker.", "demoted in the swarm."),
        };
        let result = async {
            let node: Node = client.get("node", reference).await?;
            if node.spec.role == role {
                return Ok(format!("Node {reference} {is_same}"));
            }
            change(client, reference, |spec| {
                spec.role = role;
                Ok(())
            })
            .await?;
            anyhow::Ok(match role {
                NodeRole::Manager => format!("Node {reference} {done}"),
                NodeRole::Worker => format!("Manager {reference} {done}"),
            })
        };
        match result.await {
            Ok(line) => ui.line(line)?,
            Err(error) => failures.add(&error),
        }
    }
    failures.finish()
}
