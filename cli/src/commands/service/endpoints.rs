//! `skep service endpoints`: where each task of a service is reached, and whether connections go there.
//!
//! Docker has no such command; it is made of what any manager's store says.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use skep_common::serving::withheld;
use skep_common::{Network, NetworkId, Node, NodeId, Service, Task};
use skep_proto::ListRequest;

use super::super::tasks::hostname;
use super::list::ports;
use crate::client::Client;
use crate::format::human::{capitalize, natural_order};
use crate::format::{View, hidden, plain_cell, render, shown};
use crate::ui::Ui;

const VIEW: View = View {
    columns: &[
        shown("ID", "ID"),
        shown("NAME", "Name"),
        shown("NODE", "Node"),
        shown("STATE", "State"),
        shown("INGRESS", "Ingress"),
        shown("NETWORKS", "Networks"),
        shown("IN BALANCER", "InBalancer"),
        hidden("VIRTUAL IPS", "VirtualIPs"),
        hidden("PORTS", "Ports"),
    ],
    cell: plain_cell,
};

/// `skep service endpoints [OPTIONS] SERVICE`
#[derive(Debug, Args)]
pub(crate) struct EndpointsArgs {
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Do not truncate output
    #[arg(long)]
    no_trunc: bool,
    /// Only display task IDs
    #[arg(long, short)]
    quiet: bool,
    /// Name or id of the service
    #[arg(value_name = "SERVICE")]
    service: String,
}

/// What the addresses of a service mean.
#[derive(Debug)]
struct Names {
    nodes: BTreeMap<NodeId, Node>,
    networks: BTreeMap<NetworkId, String>,
}

impl Names {
    async fn read(client: &Client) -> Result<Self> {
        let nodes: Vec<Node> = client.list_all("node").await?;
        let networks: Vec<Network> = client.list_all("network").await?;
        Ok(Self {
            nodes: nodes.into_iter().map(|node| (node.id, node)).collect(),
            networks: networks.into_iter().map(|found| (found.id, found.spec.name)).collect(),
        })
    }

    /// A network that is being removed has no name any more.
    fn network(&self, id: NetworkId) -> String {
        self.networks.get(&id).cloned().unwrap_or_else(|| id.short())
    }
}

pub(super) async fn run(args: &EndpointsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let service: Service = client.get("service", &args.service).await?;
    let service_ids = vec![service.id.to_string()];
    let request = ListRequest { kind: "task".into(), service_ids, ..Default::default() };
    let tasks: Vec<Task> = client.list(request).await?;
    let names = Names::read(client).await?;
    let rows = rows(args.no_trunc, &service, tasks, &names);
    let table = render(&VIEW, &rows, args.format.as_deref(), args.quiet)?;
    let is_plain = matches!(args.format.as_deref(), None | Some("" | "table")) && !args.quiet;
    let head = if is_plain { head(&service, &names) } else { String::new() };
    Ok(ui.data(head + &table)?)
}

/// A row per task that has not ended.
fn rows(is_whole: bool, service: &Service, mut tasks: Vec<Task>, names: &Names) -> Vec<Value> {
    tasks.retain(|task| !task.status.state.is_terminal());
    tasks.sort_by(|a, b| natural_order(&a.name(), &b.name()).then(a.id.cmp(&b.id)));
    let virtual_ips = virtual_ips(service, names).join(", ");
    let row = |task: &Task| {
        let node = task.node_id.and_then(|node_id| names.nodes.get(&node_id));
        let withheld = withheld(task, node);
        let state = capitalize(task.status.state.name());
        let ingress = task.ingress_address().map(|address| address.to_string());
        json!({
            "ID": if is_whole { task.id.to_string() } else { task.id.short() },
            "Name": task.name(),
            "Node": node.map(hostname).or(task.node_id.map(|id| id.to_string())).unwrap_or_default(),
            "State": if task.status.unhealthy { format!("{state} (unhealthy)") } else { state },
            "Ingress": ingress.unwrap_or_default(),
            "Networks": addresses(task, names).join(", "),
            "InBalancer": withheld.map_or_else(|| "yes".to_owned(), |why| format!("no: {why}")),
            "VirtualIPs": virtual_ips,
            "Ports": ports(&service.endpoint.ports),
        })
    };
    tasks.iter().map(row).collect()
}

/// `network=address` of each network that a task is on.
fn addresses(task: &Task, names: &Names) -> Vec<String> {
    let mut texts = Vec::new();
    for attachment in &task.networks_attachments {
        let Some(network_id) = attachment.network_id else { continue };
        let network = names.network(network_id);
        texts.push(format!("{network}={}", attachment.address));
        texts.extend(attachment.ipv6.map(|net| format!("{network}={}", net.addr())));
    }
    texts
}

/// `network=address` of each virtual address of a service.
fn virtual_ips(service: &Service, names: &Names) -> Vec<String> {
    let vips = service.endpoint.virtual_ips.iter();
    vips.map(|vip| format!("{}={}", names.network(vip.network_id), vip.addr.addr())).collect()
}

/// What all tasks of the service stand behind.
fn head(service: &Service, names: &Names) -> String {
    let mut text = String::new();
    let virtual_ips = virtual_ips(service, names).join(", ");
    let ports = ports(&service.endpoint.ports);
    for (title, value) in [("Virtual IPs", virtual_ips), ("Published ports", ports)] {
        let value = if value.is_empty() { "none" } else { &value };
        let _ = writeln!(text, "{title}: {value}");
    }
    text.push('\n');
    text
}
