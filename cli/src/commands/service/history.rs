//! `skep service history`: the specs that a service had.

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use skep_common::object::Revision;
use skep_common::spec::ServiceSpec;
use skep_common::{Service, Timestamp};
use skep_proto::ServiceHistoryRequest;

use crate::client::{Client, Refusal};
use crate::format::human::{duration, ellipsis, familiar_image};
use crate::format::{View, plain_cell, render, shown};
use crate::ui::Ui;

const VIEW: View = View {
    columns: &[
        shown("REVISION", "Revision"),
        shown("REPLACED", "Replaced"),
        shown("IMAGE", "Image"),
        shown("CHANGED", "Changed"),
    ],
    cell: plain_cell,
};

/// Longest list of changed fields in a row of the table.
const CHANGED_LENGTH_MAX: usize = 60;

/// `skep service history [OPTIONS] SERVICE`
#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Don't truncate output
    #[arg(long)]
    no_trunc: bool,
    /// Only display the numbers of the revisions
    #[arg(long, short)]
    quiet: bool,
    /// Name or id of the service
    service: String,
}

pub(super) async fn run(args: &HistoryArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let service: Service = client.get("service", &args.service).await?;
    let request = ServiceHistoryRequest { id: service.id.to_string() };
    let answer = client.control().service_history(request).await.map_err(Refusal)?.into_inner();
    let parse = |json: &String| serde_json::from_str(json);
    let revisions: Vec<Revision> =
        answer.revisions_json.iter().map(parse).collect::<Result<_, _>>()?;
    let mut rows = rows(&service, &revisions, (ui.now)())?;
    if !args.no_trunc {
        for row in &mut rows {
            let changed = row["Changed"].as_str().unwrap_or_default();
            row["Changed"] = ellipsis(changed, CHANGED_LENGTH_MAX).into();
        }
    }
    if args.quiet {
        return rows.iter().try_for_each(|row| Ok(ui.line(&row["Revision"])?));
    }
    Ok(ui.data(render(&VIEW, &rows, args.format.as_deref(), false)?)?)
}

/// A row for the service as it is, and one for each revision, the newest first.
fn rows(service: &Service, revisions: &[Revision], now: Timestamp) -> Result<Vec<Value>> {
    let row = |number: u64, replaced: String, spec: &ServiceSpec, before: Option<&Revision>| {
        let changed = match before {
            Some(before) => changed(&before.spec, spec)?.join(", "),
            None => String::new(),
        };
        let image = familiar_image(&spec.container().image);
        anyhow::Ok(json!({
            "Revision": number, "Replaced": replaced, "Image": image, "Changed": changed,
        }))
    };
    let current = "current".to_owned();
    let mut rows = vec![row(service.revision.max(1), current, &service.spec, revisions.first())?];
    for (index, revision) in revisions.iter().enumerate() {
        let ago = duration(now.since(revision.replaced_at)).to_lowercase();
        let before = revisions.get(index + 1);
        rows.push(row(revision.number, format!("{ago} ago"), &revision.spec, before)?);
    }
    Ok(rows)
}

/// The names of the fields in which two specs differ.
fn changed(old: &ServiceSpec, new: &ServiceSpec) -> Result<Vec<String>> {
    let mut names = Vec::new();
    differences(&serde_json::to_value(old)?, &serde_json::to_value(new)?, "Spec", &mut names);
    names.dedup();
    Ok(names)
}

/// Whatever is no object is one field, by the name that it has in the object around it.
fn differences(old: &Value, new: &Value, name: &str, names: &mut Vec<String>) {
    if old == new {
        return;
    }
    let (Value::Object(old), Value::Object(new)) = (old, new) else {
        names.push(name.to_owned());
        return;
    };
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        match (old.get(key), new.get(key)) {
            (Some(old), Some(new)) => differences(old, new, key, names),
            _ => names.push(key.clone()),
        }
    }
}
