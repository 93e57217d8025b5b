//! `skep network`. Wording: docker/cli `cli/command/network`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead as _;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use skep_common::spec::{Ipam, IpamConfig, NetworkSpec, Predefined};
use skep_common::{Network, NetworkId, Service, Task};
use skep_proto::{CreateNetworkRequest, RemoveNetworkRequest};

use super::Failures;
use super::filter::{self, Filter, Filters};
use super::inspect::get_all;
use super::network_check;
use super::network_inspect::{Facts, document};
use super::service::flags::parse_label;
use crate::client::{Client, Refusal, is_not_found};
use crate::format::human::{natural_order, short_id};
use crate::format::{View, hidden, inspect, plain_cell, render, shown};
use crate::ui::Ui;

/// Manage networks
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check what gets through between two nodes
    Check(network_check::CheckArgs),
    /// Create a network
    Create(CreateArgs),
    /// Display detailed information on one or more networks
    Inspect(InspectArgs),
    /// List networks
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Remove all unused networks
    Prune(PruneArgs),
    /// Remove one or more networks
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
}

/// `skep network create [OPTIONS] NETWORK`
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Enable manual container attachment
    #[arg(long)]
    attachable: bool,
    /// Auxiliary IPv4 or IPv6 addresses that no container gets
    #[arg(long, value_parser = parse_label, value_name = "NAME=IP")]
    aux_address: Vec<(String, String)>,
    /// Driver to manage the Network
    #[arg(long, short, default_value = "overlay")]
    driver: String,
    /// IPv4 or IPv6 Gateway for the subnet
    #[arg(long, value_name = "IP")]
    gateway: Vec<String>,
    /// Restrict external access to the network
    #[arg(long)]
    internal: bool,
    /// Allocate container ip from a sub-range
    #[arg(long, value_name = "CIDR")]
    ip_range: Vec<String>,
    /// Enable IPv6 address assignment
    #[arg(long)]
    ipv6: bool,
    /// Set metadata on a network
    #[arg(long, value_parser = parse_label, value_name = "NAME=VALUE")]
    label: Vec<(String, String)>,
    /// Set driver specific options
    #[arg(long, short, value_parser = parse_label, value_name = "NAME=VALUE")]
    opt: Vec<(String, String)>,
    /// Control the network's scope
    #[arg(long, value_parser = ["swarm"])]
    scope: Option<String>,
    /// Subnet in CIDR format that represents a network segment
    #[arg(long, value_name = "CIDR")]
    subnet: Vec<String>,
    /// Name of the network
    #[arg(value_name = "NETWORK")]
    name: String,
}

/// `skep network inspect [OPTIONS] NETWORK [NETWORK...]`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Format output: json, or TEMPLATE
    #[arg(long, short)]
    format: Option<String>,
    /// Also show the services on the network, their tasks, and the nodes that have them
    #[arg(long, short)]
    verbose: bool,
    /// Names or ids of networks
    #[arg(required = true, value_name = "NETWORK")]
    networks: Vec<String>,
}

/// `skep network ls [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Filter output based on conditions provided
    #[arg(long, short, value_parser = filter::parse, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Do not truncate the output
    #[arg(long)]
    no_trunc: bool,
    /// Only display network IDs
    #[arg(long, short)]
    quiet: bool,
}

/// `skep network prune [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Provide filter values (label=KEY[=VALUE])
    #[arg(long, value_parser = filter::parse, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// Do not prompt for confirmation
    #[arg(long, short)]
    force: bool,
}

/// `skep network rm [OPTIONS] NETWORK [NETWORK...]`
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Do not error if the network does not exist
    #[arg(long, short)]
    force: bool,
    /// Names or ids of networks
    #[arg(required = true, value_name = "NETWORK")]
    networks: Vec<String>,
}

pub(super) async fn run(command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    match command {
        Command::Check(args) => network_check::run(&args, client, ui).await,
        Command::Create(args) => create(&args, client, ui).await,
        Command::Inspect(args) => inspect_networks(&args, client, ui).await,
        Command::Ls(args) => ls(&args, client, ui).await,
        Command::Prune(args) => prune(&args, client, ui).await,
        Command::Rm(args) => rm(&args, client, ui).await,
    }
}

/// The spec that the command line asks for.
fn spec(args: &CreateArgs) -> Result<NetworkSpec> {
    let map = |pairs: &[(String, String)]| {
        (!pairs.is_empty()).then(|| pairs.iter().cloned().collect::<BTreeMap<_, _>>())
    };
    let flag = |is_set: bool| is_set.then_some(true);
    let config = subnets(args)?;
    Ok(NetworkSpec {
        name: args.name.clone(),
        labels: map(&args.label),
        driver: Some(args.driver.clone()),
        internal: flag(args.internal),
        attachable: flag(args.attachable),
        enable_ipv6: flag(args.ipv6),
        ipam: (!config.is_empty()).then(|| Ipam { config: Some(config), ..Ipam::default() }),
        options: map(&args.opt),
        ..NetworkSpec::default()
    })
}

/// Puts each range, gateway and auxiliary address to the subnet that it is of.
fn subnets(args: &CreateArgs) -> Result<Vec<IpamConfig>> {
    let mut nets: Vec<(ipnet::IpNet, IpamConfig)> = Vec::new();
    for text in &args.subnet {
        let Ok(net) = text.parse::<ipnet::IpNet>() else {
            bail!("invalid subnet {text:?}: write it in CIDR format, for example 10.20.0.0/16");
        };
        let config = IpamConfig { subnet: Some(text.clone()), ..IpamConfig::default() };
        nets.push((net, config));
    }
    let mut lay = |kind: &str, text: &str, set: &mut dyn FnMut(&mut IpamConfig) -> bool| {
        let address = text.split('/').next().and_then(|text| text.parse::<std::net::IpAddr>().ok());
        let Some(address) = address else { bail!("invalid {kind} {text:?}") };
        let Some((_, config)) = nets.iter_mut().find(|(net, _)| net.contains(&address)) else {
            bail!("no matching subnet for {kind} {text}: give its subnet with --subnet");
        };
        if !set(config) {
            bail!("the subnet of {kind} {text} has another {kind} already");
        }
        Ok(())
    };
    for range in &args.ip_range {
        lay("range", range, &mut |config| config.ip_range.replace(range.clone()).is_none())?;
    }
    for gateway in &args.gateway {
        lay("gateway", gateway, &mut |config| config.gateway.replace(gateway.clone()).is_none())?;
    }
    for (name, address) in &args.aux_address {
        lay("aux-address", address, &mut |config| {
            let addresses = config.auxiliary_addresses.get_or_insert_default();
            addresses.insert(name.clone(), address.clone()).is_none()
        })?;
    }
    Ok(nets.into_iter().map(|(_, config)| config).collect())
}

async fn create(args: &CreateArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let request = CreateNetworkRequest { spec_json: serde_json::to_string(&spec(args)?)? };
    let answer = client.control().create_network(request).await.map_err(Refusal)?.into_inner();
    for warning in &answer.warnings {
        ui.note(warning)?;
    }
    Ok(ui.line(answer.id)?)
}

const VIEW: View = View {
    columns: &[
        shown("NETWORK ID", "ID"),
        shown("NAME", "Name"),
        shown("DRIVER", "Driver"),
        shown("SCOPE", "Scope"),
        hidden("IPV6", "IPv6"),
        hidden("INTERNAL", "Internal"),
        hidden("LABELS", "Labels"),
        hidden("CREATED AT", "CreatedAt"),
    ],
    cell: plain_cell,
};

fn row(network: &Network, is_whole: bool) -> Value {
    let id = network.id.to_string();
    let labels =
        network.spec.labels.iter().flatten().map(|(name, value)| format!("{name}={value}"));
    json!({
        "ID": if is_whole { &id } else { short_id(&id) },
        "Name": network.spec.name,
        "Driver": network.spec.driver.as_deref().unwrap_or("overlay"),
        "Scope": scope(network),
        "IPv6": network.spec.enable_ipv6.unwrap_or_default().to_string(),
        "Internal": network.spec.internal.unwrap_or_default().to_string(),
        "Labels": labels.collect::<Vec<_>>().join(","),
        "CreatedAt": network.meta.created_at,
    })
}

/// Where a network is: in the whole swarm, or on each node one of its own.
pub(super) fn scope(network: &Network) -> &'static str {
    if is_predefined(network) { "local" } else { "swarm" }
}

fn is_predefined(network: &Network) -> bool {
    Predefined::ALL.iter().any(|one| one.id() == network.id)
}

/// Whether it is there without having been made.
fn is_builtin(network: &Network) -> bool {
    is_predefined(network) || network.spec.ingress.unwrap_or_default()
}

async fn ls(args: &LsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let known = ["dangling", "driver", "id", "label", "name", "scope", "type"];
    let filters = Filters::new(&args.filter, &known)?;
    let mut networks: Vec<Network> = client.list_all("network").await?;
    let used = used(client).await?;
    networks.retain(|network| {
        let is_builtin = is_builtin(network);
        let is_dangling = !is_builtin && !used.contains(&network.id);
        filters.is_match("id", |id| network.id.to_string().starts_with(id))
            && filters.is_match("name", |name| network.spec.name.contains(name))
            && filters.is_match("driver", |driver| {
                network.spec.driver.as_deref().unwrap_or("overlay") == driver
            })
            && filters.is_match("scope", |word| word == scope(network))
            && filters.is_match("type", |kind| (kind == "builtin") == is_builtin)
            && filters.is_match("dangling", |word| (word == "true") == is_dangling)
            && filters.match_labels("label", network.spec.labels.as_ref())
    });
    networks.sort_by(|a, b| natural_order(&a.spec.name, &b.spec.name));
    let rows: Vec<Value> = networks.iter().map(|network| row(network, args.no_trunc)).collect();
    Ok(ui.data(render(&VIEW, &rows, args.format.as_deref(), args.quiet)?)?)
}

/// The networks that a service asks for, or that a task is still on.
async fn used(client: &Client) -> Result<BTreeSet<NetworkId>> {
    let services: Vec<Service> = client.list_all("service").await?;
    let tasks: Vec<Task> = client.list_all("task").await?;
    let targets = services.iter().flat_map(|service| service.spec.networks());
    let of_services = targets.filter_map(|config| config.target.parse().ok());
    let living = tasks.iter().filter(|task| !task.status.state.is_terminal());
    let of_tasks = living.flat_map(|task| &task.networks_attachments);
    Ok(of_services.chain(of_tasks.filter_map(|attachment| attachment.network_id)).collect())
}

async fn inspect_networks(args: &InspectArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let facts = Facts::read(client).await?;
    let (networks, failures) = get_all(client, ("network", &args.networks)).await;
    let documents: Vec<Value> =
        networks.iter().map(|network| document(network, &facts, args.verbose)).collect();
    ui.data(inspect(&documents, args.format.as_deref())?)?;
    failures.finish()
}

async fn rm(args: &RmArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    for reference in &args.networks {
        match remove(client, reference).await {
            Ok(()) => ui.line(reference)?,
            Err(error) if args.force && is_not_found(&error) => {}
            Err(error) => failures.add(&error),
        }
    }
    failures.finish()
}

async fn remove(client: &Client, reference: &str) -> Result<()> {
    let network: Network = client.get("network", reference).await?;
    let request = RemoveNetworkRequest { id: network.id.to_string() };
    client.control().remove_network(request).await.map_err(Refusal)?;
    Ok(())
}

async fn prune(args: &PruneArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let filters = Filters::new(&args.filter, &["label"])?;
    if !args.force && !is_confirmed(ui)? {
        return Ok(());
    }
    let mut networks: Vec<Network> = client.list_all("network").await?;
    let used = used(client).await?;
    networks.retain(|network| {
        !is_builtin(network)
            && !used.contains(&network.id)
            && filters.match_labels("label", network.spec.labels.as_ref())
    });
    let mut failures = Failures::default();
    let mut removed = Vec::new();
    for network in &networks {
        match remove(client, &network.id.to_string()).await {
            Ok(()) => removed.push(network.spec.name.as_str()),
            // Someone else was faster.
            Err(error) if is_not_found(&error) => {}
            Err(error) => failures.add(&error),
        }
    }
    if !removed.is_empty() {
        ui.line(format_args!("Deleted Networks:\n{}\n", removed.join("\n")))?;
    }
    failures.finish()
}

fn is_confirmed(ui: &mut Ui) -> Result<bool> {
    ui.note(
        "WARNING! This will remove all custom networks not used by at least one service or task.\nAre you sure you want to continue? [y/N]",
    )?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: CreateArgs,
    }

    fn parse(line: &str) -> Result<Value> {
        let words = ["create"].into_iter().chain(line.split_whitespace());
        Ok(serde_json::to_value(spec(&Line::try_parse_from(words)?.args)?)?)
    }

    #[test]
    fn flags_make_the_spec() {
        let plain = json!({"Name": "front", "Driver": "overlay"});
        assert_eq!(parse("front").unwrap(), plain);
        let line = "-d overlay --attachable --internal --ipv6 --label a=1 -o encrypted \
                    --subnet fd00:1::/64 --subnet 10.20.0.0/16 --gateway 10.20.0.254 \
                    --ip-range 10.20.1.0/24 --aux-address router=10.20.0.1 back";
        let expect = json!({
            "Name": "back", "Driver": "overlay", "Labels": {"a": "1"}, "Internal": true,
            "Attachable": true, "EnableIPv6": true, "Options": {"encrypted": ""},
            "IPAM": {"Config": [
                {"Subnet": "fd00:1::/64"},
                {
                    "Subnet": "10.20.0.0/16", "Gateway": "10.20.0.254", "IPRange": "10.20.1.0/24",
                    "AuxiliaryAddresses": {"router": "10.20.0.1"},
                },
            ]},
        });
        assert_eq!(parse(line).unwrap(), expect);
    }

    #[test]
    fn addresses_must_be_of_a_subnet() {
        for (line, expect) in [
            ("--subnet 10.0.0 n", "invalid subnet \"10.0.0\""),
            ("--gateway 10.0.0.1 n", "no matching subnet for gateway 10.0.0.1"),
            ("--subnet 10.0.0.0/24 --ip-range 10.1.0.0/25 n", "no matching subnet for range"),
            (
                "--subnet 10.0.0.0/24 --gateway 10.0.0.1 --gateway 10.0.0.2 n",
                "has another gateway already",
            ),
            ("--subnet 10.0.0.0/24 --gateway x n", "invalid gateway \"x\""),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(expect), "{line}: {error}");
        }
    }
}
