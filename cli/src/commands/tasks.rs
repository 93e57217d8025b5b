//! `ps` of services, nodes and stacks. Wording: docker/cli `cli/command/task`.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use skep_common::spec::PublishMode;
use skep_common::{Node, NodeId, Service, Task, Timestamp};
use skep_proto::ListRequest;

use super::filter::{self, Filter, Filters};
use super::service;
use crate::client::Client;
use crate::format::human::{capitalize, duration, ellipsis, familiar_image, natural_order};
use crate::format::{View, hidden, plain_cell, render, shown};
use crate::ui::Ui;

/// Longest error in a table. docker/cli `maxErrLength`.
const ERROR_LENGTH_MAX: usize = 30;

const VIEW: View = View {
    columns: &[
        shown("ID", "ID"),
        shown("NAME", "Name"),
        shown("IMAGE", "Image"),
        shown("NODE", "Node"),
        shown("DESIRED STATE", "DesiredState"),
        shown("CURRENT STATE", "CurrentState"),
        shown("ERROR", "Error"),
        shown("PORTS", "Ports"),
        hidden("SLOT", "Slot"),
    ],
    cell: table_cell,
};

/// In a table, earlier tasks of a slot are set off from the latest one.
fn table_cell(field: &str, row: &Value) -> String {
    let is_earlier = row["earlier"] == Value::Bool(true);
    match field {
        "Name" if is_earlier => format!(" \\_ {}", plain_cell(field, row)),
        _ => plain_cell(field, row),
    }
}

/// The flags of every `ps`.
#[derive(Debug, Args)]
pub(super) struct ListFlags {
    /// Filter output based on conditions provided
    #[arg(long, short, value_parser = filter::parse, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Do not map IDs to Names
    #[arg(long)]
    no_resolve: bool,
    /// Do not truncate output
    #[arg(long)]
    no_trunc: bool,
    /// Only display task IDs
    #[arg(long, short)]
    quiet: bool,
}

/// `skep service ps [OPTIONS] SERVICE [SERVICE...]`
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    #[command(flatten)]
    list: ListFlags,
    /// Names or ids of services
    #[arg(required = true, value_name = "SERVICE")]
    services: Vec<String>,
}

/// Tasks of services.
pub(super) async fn service_ps(args: &PsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut missing = Vec::new();
    let mut services = Vec::new();
    for reference in &args.services {
        match client.get::<Service>("service", reference).await {
            Ok(service) => services.push(service),
            Err(error) if crate::client::is_not_found(&error) => {
                missing.push(format!("no such service: {reference}"));
            }
            Err(error) => return Err(error),
        }
    }
    if !services.is_empty() {
        let service_ids = services.iter().map(|service| service.id.to_string()).collect();
        let request = ListRequest { kind: "task".into(), service_ids, ..Default::default() };
        print(&args.list, client.list(request).await?, client, ui).await?;
        if !args.list.quiet {
            service::show_notes(&service::condition_notes(&services), ui)?;
        }
    }
    if !missing.is_empty() {
        bail!(missing.join("\n"));
    }
    Ok(())
}

/// Prints tasks, by name, the latest of a slot first.
pub(super) async fn print(
    flags: &ListFlags,
    mut tasks: Vec<Task>,
    client: &Client,
    ui: &mut Ui,
) -> Result<()> {
    let filters = Filters::new(&flags.filter, &["id", "name", "node", "desired-state", "label"])?;
    let nodes: Vec<Node> = client.list_all("node").await?;
    let hostnames: BTreeMap<NodeId, String> =
        nodes.iter().map(|node| (node.id, hostname(node))).collect();
    let self_id = match flags.filter.is_empty() {
        true => None,
        // `node=self` is this node.
        false => client.get::<Node>("node", "self").await.ok().map(|node| node.id),
    };
    tasks.retain(|task| {
        let node = task.node_id.map(|id| (id, hostnames.get(&id)));
        filters.is_match("id", |id| task.id.to_string().starts_with(id))
            && filters.is_match("name", |name| task.name().starts_with(name))
            && filters.is_match("desired-state", |state| task.desired_state.name() == state)
            && filters.is_match("node", |wanted| {
                node.is_some_and(|(id, hostname)| {
                    id.to_string().starts_with(wanted)
                        || hostname.is_some_and(|hostname| hostname == wanted)
                        || (wanted == "self" && Some(id) == self_id)
                })
            })
            && filters.match_labels(
                "label",
                task.spec.container_spec.as_ref().and_then(|container| container.labels.as_ref()),
            )
    });
    let rows = rows(flags, tasks, &hostnames, (ui.now)());
    Ok(ui.data(render(&VIEW, &rows, flags.format.as_deref(), flags.quiet)?)?)
}

/// A node's name for people.
pub(super) fn hostname(node: &Node) -> String {
    match &node.description {
        Some(description) if !description.hostname.is_empty() => description.hostname.clone(),
        _ => node.id.to_string(),
    }
}

fn rows(
    flags: &ListFlags,
    tasks: Vec<Task>,
    hostnames: &BTreeMap<NodeId, String>,
    now: Timestamp,
) -> Vec<Value> {
    let name = |task: &Task| match flags.no_resolve {
        true => format!("{}.{}", task.service_id, task.slot_key()),
        false => task.name(),
    };
    let mut named: Vec<(String, Task)> =
        tasks.into_iter().map(|task| (name(&task), task)).collect();
    named.sort_by(|(a, a_task), (b, b_task)| {
        natural_order(a, b).then_with(|| b_task.meta.created_at.cmp(&a_task.meta.created_at))
    });
    let mut previous = None;
    let mut rows = Vec::new();
    for (name, task) in &named {
        let is_earlier = previous == Some(name);
        previous = Some(name);
        let node = task.node_id.map(|id| match hostnames.get(&id) {
            Some(hostname) if !flags.no_resolve => hostname.clone(),
            _ => id.to_string(),
        });
        let image = task.spec.container_spec.as_ref().map(|container| container.image.as_str());
        let image = image.unwrap_or_default();
        let age = duration(now.since(task.status.timestamp)).to_lowercase();
        let error = match flags.no_trunc {
            true => task.status.remark(),
            false => ellipsis(&task.status.remark(), ERROR_LENGTH_MAX),
        };
        rows.push(json!({
            "ID": if flags.no_trunc { task.id.to_string() } else { task.id.short() },
            "Name": name,
            "Image": if flags.no_trunc { image.to_owned() } else { familiar_image(image) },
            "Node": node.unwrap_or_default(),
            "DesiredState": capitalize(task.desired_state.name()),
            "CurrentState": format!("{} {age} ago", capitalize(task.status.state.name())),
            "Error": if error.is_empty() { error } else { format!("\"{error}\"") },
            "Ports": host_ports(task),
            "Slot": task.slot,
            "earlier": is_earlier,
        }));
    }
    rows
}

/// Ports that the task itself holds on its node: `*:8080->80/tcp`.
fn host_ports(task: &Task) -> String {
    let ports = task.status.port_status.iter().flat_map(|status| &status.ports);
    let texts: Vec<String> = ports
        .filter(|port| port.publish_mode == Some(PublishMode::Host))
        .map(|port| {
            let published = port.published_port.unwrap_or_default();
            format!(
                "*:{published}->{}/{}",
                port.target_port,
                port.protocol.unwrap_or_default().name()
            )
        })
        .collect();
    texts.join(",")
}
