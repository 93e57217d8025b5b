//! `skep swarm ca`: the root of the certificates, and its change.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Deserialize;
use skep_common::Node;
use skep_common::compose::units::parse_duration;
use skep_common::object::{NodeState, RootRotation, TlsInfo};
use skep_common::spec::Nanos;
use skep_proto::{ListRequest, RotateCaRequest, UpdateSwarmRequest};

use super::swarm_update::change;
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// Between two looks at a change under way.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// Nodes that are waited for and named at once.
const NAMED_MAX: usize = 5;

/// `skep swarm ca`
#[derive(Debug, Args)]
pub(crate) struct CaArgs {
    /// Rotate the swarm CA - if no certificate or key are provided, new ones will be generated
    #[arg(long)]
    rotate: bool,
    /// Path to the PEM-formatted root CA certificate to use for the new cluster
    #[arg(long, value_name = "FILE", requires = "rotate", requires = "ca_key")]
    ca_cert: Option<PathBuf>,
    /// Path to the PEM-formatted root CA key to use for the new cluster
    #[arg(long, value_name = "FILE", requires = "rotate", requires = "ca_cert")]
    ca_key: Option<PathBuf>,
    /// Validity period for node certificates (ns|us|ms|s|m|h)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "rotate")]
    cert_expiry: Option<Nanos>,
    /// Exit immediately instead of waiting for the root rotation to converge
    #[arg(long, short, requires = "rotate")]
    detach: bool,
    /// Suppress progress output
    #[arg(long, short)]
    quiet: bool,
}

/// What is read of the swarm.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Roots {
    root_ca_cert: String,
    root_rotation: Option<RootRotation>,
}

pub(super) async fn run(args: &CaArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    if !args.rotate {
        return show(&roots(client).await?, ui);
    }
    if let Some(expiry) = args.cert_expiry {
        let apply = |spec: &mut skep_common::spec::SwarmSpec| {
            spec.ca_config.get_or_insert_default().node_cert_expiry = Some(expiry);
        };
        change(client, apply, UpdateSwarmRequest::default()).await?;
    }
    let request = RotateCaRequest {
        ca_cert_pem: read(args.ca_cert.as_deref())?,
        ca_key_pem: read(args.ca_key.as_deref())?,
    };
    client.control().rotate_ca(request).await.map_err(Refusal)?;
    if args.detach {
        return Ok(());
    }
    follow(args.quiet, client, ui).await
}

fn read(path: Option<&Path>) -> Result<String> {
    let Some(path) = path else { return Ok(String::new()) };
    std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))
}

async fn roots(client: &Client) -> Result<Roots> {
    client.get("cluster", "default").await
}

fn show(roots: &Roots, ui: &mut Ui) -> Result<()> {
    Ok(ui.line(roots.root_ca_cert.trim_end())?)
}

/// Says how far the change is until it has ended, then shows the new root.
async fn follow(is_quiet: bool, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut said = String::new();
    loop {
        let now = roots(client).await?;
        let Some(rotation) = &now.root_rotation else { return show(&now, ui) };
        let request = ListRequest { kind: "node".into(), ..ListRequest::default() };
        let nodes: Vec<Node> = client.list(request).await?;
        let line = progress(rotation, &nodes);
        if !is_quiet && line != said {
            ui.note(&line)?;
            said = line;
        }
        tokio::time::sleep(LOOK_PERIOD).await;
    }
}

/// One line: how many nodes are ready for the next step, and who is not.
fn progress(rotation: &RootRotation, nodes: &[Node]) -> String {
    let info = |node: &Node| node.description.as_ref().and_then(|said| said.tls_info.clone());
    let trusts = |info: &TlsInfo| info.trust_root.contains(rotation.ca_cert.trim());
    let is_renewed = |info: &TlsInfo| info.cert_issuer_public_key == rotation.public_key;
    let is_signing = rotation.trusted_at.is_some();
    let is_ready = |node: &&Node| {
        info(node).is_some_and(|info| if is_signing { is_renewed(&info) } else { trusts(&info) })
    };
    let late: Vec<&Node> = nodes.iter().filter(|node| !is_ready(node)).collect();
    let what = if is_signing { "rotated TLS certificates" } else { "rotated CA certificates" };
    let mut line = format!("{what}: {}/{} nodes", nodes.len() - late.len(), nodes.len());
    let away = late.iter().filter(|node| node.status.state != NodeState::Ready);
    let names: Vec<&str> = away.map(|node| node.hostname()).take(NAMED_MAX).collect();
    if !names.is_empty() {
        line.push_str(&format!(
            "; waiting for {}: start what is down, or remove it with skep node rm",
            names.join(", ")
        ));
    }
    line
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn progress_counts_nodes_and_names_who_is_away() {
        let node = |name: &str, state: &str, trust: &str, issuer: &str| -> Node {
            let node = json!({
                "ID": format!("{name:0>25}"), "Number": 1, "Spec": {},
                "Version": {"Index": 1},
                "CreatedAt": "2023-11-14T22:00:00Z", "UpdatedAt": "2023-11-14T22:00:00Z",
                "Description": {
                    "Hostname": name,
                    "TLSInfo": {"TrustRoot": trust, "CertIssuerPublicKey": issuer},
                },
                "Status": {"State": state, "Addr": "10.0.0.1"},
            });
            serde_json::from_value(node).unwrap()
        };
        let nodes = [
            node("n1", "ready", "OLD\nNEW\n", "new"),
            node("n2", "ready", "OLD\nNEW\n", "old"),
            node("n3", "down", "OLD\n", "old"),
        ];
        let mut rotation: RootRotation = serde_json::from_value(json!({
            "CaCert": "NEW\n", "CaKey": "", "CrossSignedCert": "", "StartedAt": "2023-11-14T22:00:00Z",
            "PublicKey": "new",
        }))
        .unwrap();
        assert_eq!(
            progress(&rotation, &nodes),
            "rotated CA certificates: 2/3 nodes; waiting for n3: start what is down, or remove it with skep node rm"
        );
        rotation.trusted_at = Some(rotation.started_at);
        assert_eq!(progress(&rotation, &nodes[..2]), "rotated TLS certificates: 1/2 nodes");
    }
}
