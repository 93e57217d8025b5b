//! `skep inspect`: an object of any kind by its id or name. Wording: docker/cli `cli/command/system/inspect.go`.

use anyhow::{Result, anyhow};
use clap::Args;
use serde_json::Value;

use super::Failures;
use crate::client::{Client, Refusal};
use crate::format::inspect;
use crate::ui::Ui;

/// Where a name without a type is looked for, in this order.
const KINDS: [&str; 6] = ["network", "service", "task", "node", "secret", "config"];

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Format output: json, or TEMPLATE
    #[arg(long, short)]
    format: Option<String>,
    /// Only inspect objects of the given type
    #[arg(long = "type", value_name = "TYPE", value_parser = KINDS)]
    kind: Option<String>,
    /// Names, ids or unique prefixes of ids
    #[arg(required = true, value_name = "NAME|ID")]
    references: Vec<String>,
}

/// Prints what was found before it fails over the rest.
pub(super) async fn run(args: &InspectArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let (mut documents, mut failures) = (Vec::new(), Failures::default());
    for reference in &args.references {
        match find(args.kind.as_deref(), reference, client).await {
            Ok(document) => documents.push(document),
            Err(error) => failures.add(&error),
        }
    }
    ui.data(inspect(&documents, args.format.as_deref())?)?;
    failures.finish()
}

async fn find(kind: Option<&str>, reference: &str, client: &Client) -> Result<Value> {
    let kinds = KINDS.iter().filter(|one| kind.is_none_or(|kind| kind == **one));
    for kind in kinds {
        match client.get_json(kind, reference).await {
            Ok(json) => return Ok(serde_json::from_str(&json)?),
            Err(Refusal(status)) if status.code() == tonic::Code::NotFound => {}
            Err(refusal) => return Err(refusal.into()),
        }
    }
    Err(match kind {
        Some(kind) => anyhow!("Error: No such {kind}: {reference}"),
        None => anyhow!("Error: No such object: {reference}"),
    })
}
