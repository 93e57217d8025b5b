//! `skep service inspect`.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::Value;
use skep_common::Service;

use super::super::Failures;
use super::pretty::pretty;
use crate::client::Client;
use crate::format::inspect;
use crate::ui::Ui;

/// `skep service inspect [OPTIONS] SERVICE [SERVICE...]`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Format output: json, or TEMPLATE
    #[arg(long, short)]
    format: Option<String>,
    /// Print the information in a human friendly format
    #[arg(long)]
    pretty: bool,
    /// Names or ids of services
    #[arg(required = true, value_name = "SERVICE")]
    services: Vec<String>,
}

pub(super) async fn run(args: &InspectArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    if args.pretty && args.format.is_some() {
        bail!("--format is incompatible with human friendly format");
    }
    let mut failures = Failures::default();
    let mut documents: Vec<Value> = Vec::new();
    for reference in &args.services {
        match client.get::<Value>("service", reference).await {
            Ok(document) => documents.push(document),
            Err(error) => failures.add(&error),
        }
    }
    if args.pretty {
        for document in documents {
            let service: Service = serde_json::from_value(document)?;
            ui.line(pretty(&service, (ui.now)()))?;
        }
    } else {
        ui.data(inspect(&documents, args.format.as_deref())?)?;
    }
    failures.finish()
}
