//! `skep network check`: what gets through between two nodes. Docker has no such command.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use skep_common::Node;
use skep_proto::{CheckNetworkRequest, NetworkCheck};

use crate::client::{Client, Refusal};
use crate::format::{View, plain_cell, render, shown};
use crate::ui::Ui;

const VIEW: View = View {
    columns: &[
        shown("CHECK", "Check"),
        shown("FROM", "From"),
        shown("TO", "To"),
        shown("RESULT", "Result"),
        shown("DETAIL", "Detail"),
        shown("WHAT TO DO", "WhatToDo"),
    ],
    cell: plain_cell,
};

/// `skep network check [OPTIONS] NODE NODE`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Host name or id of a node
    #[arg(value_name = "NODE")]
    from: String,
    /// Host name or id of another node
    #[arg(value_name = "NODE")]
    to: String,
}

pub(super) async fn run(args: &CheckArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let from: Node = client.get("node", &args.from).await?;
    let to: Node = client.get("node", &args.to).await?;
    let request = CheckNetworkRequest { from: from.id.to_string(), to: to.id.to_string() };
    let answer = client.control().check_network(request).await.map_err(Refusal)?.into_inner();
    let rows: Vec<Value> = answer.checks.iter().map(row).collect();
    ui.data(render(&VIEW, &rows, args.format.as_deref(), false)?)?;
    let n_failed = answer.checks.iter().filter(|check| !check.ok).count();
    if n_failed > 0 {
        bail!("{n_failed} of {} checks failed between {} and {}", rows.len(), args.from, args.to);
    }
    Ok(())
}

fn row(check: &NetworkCheck) -> Value {
    json!({
        "Check": check.name,
        "From": check.from,
        "To": check.to,
        "Result": if check.ok { "ok" } else { "failed" },
        "Detail": check.detail,
        "WhatToDo": check.remedy,
    })
}
