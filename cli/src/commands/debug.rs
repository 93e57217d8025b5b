//! `skep debug`: what an operator or a test looks at when something is odd.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use skep_proto::{DigestRequest, ManagerDigest};

use crate::client::{Client, Refusal};
use crate::format::{View, plain_cell, render, shown};
use crate::ui::Ui;

/// Look inside
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the version and the digest of every manager's store
    Digest(DigestArgs),
    /// Write many services without tasks, and print those that were acknowledged
    #[command(hide = true)]
    Write(super::debug_write::WriteArgs),
}

/// `skep debug digest [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct DigestArgs {
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
}

const VIEW: View = View {
    columns: &[
        shown("NODE ID", "NodeID"),
        shown("HOSTNAME", "Hostname"),
        shown("VERSION", "Version"),
        shown("DIGEST", "Digest"),
        shown("ERROR", "Error"),
    ],
    cell: plain_cell,
};

pub(super) async fn run(command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    let args = match command {
        Command::Write(args) => return super::debug_write::run(args, client, ui).await,
        Command::Digest(args) => args,
    };
    let answer = client.control().digest(DigestRequest {}).await.map_err(Refusal)?.into_inner();
    let row = |manager: &ManagerDigest| {
        json!({
            "NodeID": manager.node_id,
            "Hostname": manager.hostname,
            "Version": manager.version,
            "Digest": manager.digest,
            "Error": manager.error,
        })
    };
    let rows: Vec<Value> = answer.managers.iter().map(row).collect();
    ui.data(render(&VIEW, &rows, args.format.as_deref(), false)?)?;
    match contradiction(&answer.managers) {
        Some(version) => bail!("managers have different stores at version {version}"),
        None => Ok(()),
    }
}

/// A version at which two managers have different digests.
fn contradiction(managers: &[ManagerDigest]) -> Option<u64> {
    let answered = || managers.iter().filter(|manager| manager.error.is_empty());
    answered()
        .find(|a| answered().any(|b| a.version == b.version && a.digest != b.digest))
        .map(|manager| manager.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_version_with_two_digests_is_a_contradiction() {
        let manager = |version, digest: &str, error: &str| ManagerDigest {
            version,
            digest: digest.into(),
            error: error.into(),
            ..Default::default()
        };
        for (managers, expect) in [
            (vec![manager(7, "a", ""), manager(7, "a", "")], None),
            (vec![manager(7, "a", ""), manager(8, "b", "")], None),
            (vec![manager(7, "a", ""), manager(7, "", "no answer")], None),
            (vec![manager(6, "a", ""), manager(7, "a", ""), manager(7, "b", "")], Some(7)),
        ] {
            assert_eq!(contradiction(&managers), expect);
        }
    }
}
