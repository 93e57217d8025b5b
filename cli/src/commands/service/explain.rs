//! `skep service explain`: why tasks wait.
//!
//! Docker has no such command. The daemon finds the reasons anew: a manager that was asked looks at its
//! own view of the swarm, with the code by which the leader places tasks.

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use skep_common::{Service, Task, TaskId};
use skep_proto::{ExplainRequest, ExplainResponse};

use crate::client::{Client, Refusal, is_not_found};
use crate::format::human::capitalize;
use crate::format::{View, hidden, plain_cell, render, shown, tabulate};
use crate::ui::Ui;

const VIEW: View = View {
    columns: &[
        shown("ID", "ID"),
        shown("NAME", "Name"),
        shown("STATE", "State"),
        shown("REASON", "Reason"),
        hidden("FILTERS", "Filters"),
    ],
    cell: plain_cell,
};

/// Names of tasks above what they have in common.
const NAMES_MAX: usize = 3;

/// `skep service explain [OPTIONS] SERVICE|TASK`
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Do not truncate output
    #[arg(long)]
    no_trunc: bool,
    /// Only display task IDs
    #[arg(long, short)]
    quiet: bool,
    /// Name or id of a service or a task
    #[arg(value_name = "SERVICE|TASK")]
    reference: String,
}

pub(super) async fn run(args: &ExplainArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let request = find(&args.reference, client).await?;
    let is_service = request.task_id.is_empty();
    let answer = client.control().explain(request).await.map_err(Refusal)?.into_inner();
    let rows = rows(&answer, args.no_trunc);
    let is_plain = matches!(args.format.as_deref(), None | Some("" | "table")) && !args.quiet;
    for note in &answer.notes {
        ui.note(format_args!("{}: {note}", answer.service_name))?;
    }
    if rows.is_empty() && is_service && is_plain {
        return Ok(ui.note(format_args!("No task of {} waits.", answer.service_name))?);
    }
    let mut text = render(&VIEW, &rows, args.format.as_deref(), args.quiet)?;
    if is_plain {
        text += &details(&rows);
    }
    Ok(ui.data(text)?)
}

/// A service of this name or id, or else a task.
async fn find(reference: &str, client: &Client) -> Result<ExplainRequest> {
    match client.get::<Service>("service", reference).await {
        Ok(service) => {
            let service_id = service.id.to_string();
            return Ok(ExplainRequest { service_id, ..ExplainRequest::default() });
        }
        Err(error) if is_not_found(&error) => {}
        Err(error) => return Err(error),
    }
    match client.get::<Task>("task", reference).await {
        Ok(task) => {
            Ok(ExplainRequest { task_id: task.id.to_string(), ..ExplainRequest::default() })
        }
        Err(error) if is_not_found(&error) => {
            anyhow::bail!("no such service or task: {reference}")
        }
        Err(error) => Err(error),
    }
}

fn rows(answer: &ExplainResponse, is_whole: bool) -> Vec<Value> {
    let id = |id: &str| match is_whole {
        true => id.to_owned(),
        false => id.parse().map_or_else(|_| id.to_owned(), |id: TaskId| id.short()),
    };
    let row = |task: &skep_proto::ExplainedTask| {
        let filters: Vec<Value> = task
            .filters
            .iter()
            .map(|row| json!({"Filter": row.name, "Nodes": row.n_nodes, "Nearest": row.nearest}))
            .collect();
        json!({
            "ID": id(&task.task_id), "Name": task.name, "State": capitalize(&task.state),
            "Reason": task.reason, "Filters": filters,
        })
    };
    answer.tasks.iter().map(row).collect()
}

/// What each filter ruled out, once for tasks that have it in common.
fn details(rows: &[Value]) -> String {
    let mut groups: Vec<(&Value, Vec<String>)> = Vec::new();
    let has_filters = |row: &&Value| row["Filters"].as_array().is_some_and(|rows| !rows.is_empty());
    for row in rows.iter().filter(has_filters) {
        let name = plain_cell("Name", row);
        match groups.iter_mut().find(|(filters, _)| **filters == row["Filters"]) {
            Some((_, names)) => names.push(name),
            None => groups.push((&row["Filters"], vec![name])),
        }
    }
    let group = |(filters, names): &(&Value, Vec<String>)| {
        let header = ["FILTER", "NODES", "NEAREST"].map(str::to_owned).to_vec();
        let cells = |row: &Value| {
            ["Filter", "Nodes", "Nearest"].map(|field| plain_cell(field, row)).to_vec()
        };
        let filters = filters.as_array().into_iter().flatten().map(cells);
        format!(
            "\n{}:\n{}",
            listed(names),
            tabulate(std::iter::once(header).chain(filters).collect())
        )
    };
    groups.iter().map(group).collect()
}

fn listed(names: &[String]) -> String {
    match names.len() {
        0..=NAMES_MAX => names.join(", "),
        n_names => format!("{} and {} more", names[..NAMES_MAX].join(", "), n_names - NAMES_MAX),
    }
}
