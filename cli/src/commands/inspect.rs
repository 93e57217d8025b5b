//! `inspect` of every kind of object: gets all that were named, and prints what was found before it fails
//! over the rest. Wording: docker/cli `cli/command/inspect`.

use anyhow::{Result, bail};
use clap::Args;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Failures;
use crate::client::Client;
use crate::format::inspect;
use crate::ui::Ui;

/// How objects are shown.
#[derive(Debug, Args)]
pub(crate) struct InspectFlags {
    /// Format output: json, or TEMPLATE
    #[arg(long, short)]
    format: Option<String>,
    /// Print the information in a human friendly format
    #[arg(long)]
    pretty: bool,
}

/// Prints the objects of a kind that the references mean; `pretty` is the text of one for people.
pub(super) async fn print<T: DeserializeOwned>(
    flags: &InspectFlags,
    (kind, references): (&str, &[String]),
    pretty: impl Fn(&T) -> String,
    client: &Client,
    ui: &mut Ui,
) -> Result<()> {
    if flags.pretty && flags.format.is_some() {
        bail!("--format is incompatible with human friendly format");
    }
    let (documents, failures) = get_all::<Value>(client, (kind, references)).await;
    if flags.pretty {
        for document in documents {
            ui.line(pretty(&serde_json::from_value(document)?))?;
        }
    } else {
        ui.data(inspect(&documents, flags.format.as_deref())?)?;
    }
    failures.finish()
}

/// The objects of a kind that the references mean, and why the others were not found.
pub(super) async fn get_all<T: DeserializeOwned>(
    client: &Client,
    (kind, references): (&str, &[String]),
) -> (Vec<T>, Failures) {
    let (mut objects, mut failures) = (Vec::new(), Failures::default());
    for reference in references {
        match client.get(kind, reference).await {
            Ok(object) => objects.push(object),
            Err(error) => failures.add(&error),
        }
    }
    (objects, failures)
}
