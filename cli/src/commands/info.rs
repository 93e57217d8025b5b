//! `skep info` and `skep version`.

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use skep_proto::{InfoRequest, InfoResponse};

use crate::client::{Client, Refusal};
use crate::format::templated;
use crate::ui::Ui;

/// `skep info [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Format output: json, or TEMPLATE
    #[arg(long, short)]
    format: Option<String>,
}

/// `skep version [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    /// Format output: json, or TEMPLATE
    #[arg(long, short)]
    format: Option<String>,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

async fn ask(client: &Client) -> Result<InfoResponse> {
    Ok(client.machine().info(InfoRequest {}).await.map_err(Refusal)?.into_inner())
}

pub(super) async fn info(args: &InfoArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let info = ask(client).await?;
    let document = json!({
        "ServerVersion": info.version,
        "Name": info.hostname,
        "DataDir": info.data_dir,
        "Warnings": info.warnings,
        "Swarm": {
            "LocalNodeState": local_state(&info),
            "Error": info.error,
            "NodeID": info.node_id,
            "Cluster": {"ID": info.cluster_id},
            "Role": info.role,
            "ControlAvailable": info.role == "manager",
            "NodeAddr": info.advertise_addr,
            "Payloads": info.payloads,
            "RemoteManagers": info.managers.iter().map(|addr| json!({"Addr": addr})).collect::<Vec<_>>(),
        },
    });
    if let Some(format) = &args.format {
        return Ok(ui.line(formatted(format, &document)?)?);
    }
    let swarm = local_state(&info);
    let mut text = format!(
        "Server Version: {}\nName: {}\nData Directory: {}\nSwarm: {swarm}\n",
        info.version, info.hostname, info.data_dir
    );
    if !info.error.is_empty() {
        text.push_str(&format!(" Error: {}\n", info.error));
    }
    if swarm == "locked" {
        text.push_str(&format!(" NodeID: {}\n", info.node_id));
    } else if !info.node_id.is_empty() {
        text.push_str(&format!(
            " NodeID: {}\n Is Manager: {}\n ClusterID: {}\n Node Address: {}\n Manager Addresses:\n",
            info.node_id,
            info.role == "manager",
            info.cluster_id,
            info.advertise_addr
        ));
        info.managers.iter().for_each(|address| text.push_str(&format!("  {address}\n")));
    }
    ui.data(text)?;
    for warning in &info.warnings {
        ui.note(format_args!("WARNING: {warning}"))?;
    }
    Ok(())
}

/// Docker's word for the part that this machine has in a swarm.
fn local_state(info: &InfoResponse) -> &'static str {
    match (info.error.is_empty(), info.node_id.is_empty()) {
        _ if info.state == "locked" => "locked",
        (false, _) => "error",
        (true, true) => "inactive",
        (true, false) => "active",
    }
}

fn formatted(format: &str, document: &Value) -> Result<String> {
    match format {
        "json" => Ok(document.to_string()),
        template => templated(template, document),
    }
}

/// Prints the client's version first, so that it is seen also when no daemon answers.
pub(super) async fn version(args: &VersionArgs, host: &str, ui: &mut Ui) -> Result<()> {
    let answer = match Client::connect(host).await {
        Ok(client) => ask(&client).await,
        Err(error) => Err(error),
    };
    let server = answer.as_ref().ok().map(|info| info.version.clone());
    match &args.format {
        Some(format) => {
            let server = server.map(|version| json!({"Version": version}));
            let document = json!({"Client": {"Version": VERSION}, "Server": server});
            ui.line(formatted(format, &document)?)?;
        }
        None => {
            ui.line(format_args!("Client:\n Version: {VERSION}"))?;
            if let Some(version) = server {
                ui.line(format_args!("\nServer:\n Version: {version}"))?;
            }
        }
    }
    answer.map(drop)
}
