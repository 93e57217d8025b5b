//! `skep node what-if`: what would become of tasks, were nodes down.

use anyhow::Result;
use clap::Args;
use skep_common::Node;
use skep_proto::WhatIfRequest;

use super::plan;
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// `skep node what-if [OPTIONS] --down NODE [NODE...]`
#[derive(Debug, Args)]
pub(crate) struct WhatIfArgs {
    /// Host names or ids of the nodes that would be down
    #[arg(long, required = true, num_args = 1.., value_delimiter = ',', value_name = "NODE")]
    down: Vec<String>,
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
}

pub(super) async fn run(args: &WhatIfArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut down_node_ids = Vec::new();
    for reference in &args.down {
        let node: Node = client.get("node", reference).await?;
        down_node_ids.push(node.id.to_string());
    }
    let answer =
        client.control().what_if(WhatIfRequest { down_node_ids }).await.map_err(Refusal)?;
    plan::show(&answer.into_inner(), args.format.as_deref(), ui)
}
