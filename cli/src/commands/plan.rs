//! What a command would do, for `--plan` and `node what-if`: rows of tasks, and an exit code.

use anyhow::Result;
use serde_json::{Value, json};
use skep_common::TaskId;
use skep_proto::{PlanResponse, PlannedTask};

use super::ExitWith;
use crate::format::human::natural_order;
use crate::format::{View, hidden, plain_cell, render, shown};
use crate::ui::Ui;

/// The exit code where something would not fit, or be lost.
const CODE_AMISS: u8 = 2;

const VIEW: View = View {
    columns: &[
        shown("ACTION", "Action"),
        shown("NAME", "Name"),
        shown("FROM", "From"),
        shown("TO", "To"),
        shown("REASON", "Reason"),
        hidden("TASK", "Task"),
    ],
    cell: plain_cell,
};

/// Shows what would be done; an error, without words, where something would not fit or be lost.
pub(super) fn show(answer: &PlanResponse, format: Option<&str>, ui: &mut Ui) -> Result<()> {
    for warning in &answer.warnings {
        ui.note(warning)?;
    }
    let rows = rows(answer);
    let is_plain = matches!(format, None | Some("" | "table"));
    if rows.is_empty() && is_plain {
        ui.note("No task would be created, moved or stopped.")?;
    } else {
        ui.data(render(&VIEW, &rows, format, false)?)?;
    }
    for step in &answer.steps {
        ui.note(step)?;
    }
    match answer.unplaced.is_empty() && answer.losses.is_empty() {
        true => Ok(()),
        false => Err(ExitWith(CODE_AMISS).into()),
    }
}

/// What is lost, then a row for each slot that changes, by name.
fn rows(answer: &PlanResponse) -> Vec<Value> {
    let moved = |task: &PlannedTask| match task {
        task if task.from_node.is_empty() => "place",
        task if task.from_node == task.to_node => "replace",
        _ => "move",
    };
    let created = answer.created.iter().map(|task| ("create", task));
    let moved = answer.moved.iter().map(|task| (moved(task), task));
    let stopped = answer.stopped.iter().map(|task| ("stop", task));
    let unplaced = answer.unplaced.iter().map(|task| ("no place", task));
    let mut tasks: Vec<(&str, &PlannedTask)> =
        created.chain(moved).chain(stopped).chain(unplaced).collect();
    tasks.sort_by(|(_, a), (_, b)| natural_order(&a.name, &b.name));
    let lost = answer.losses.iter().map(|loss| {
        json!({"Action": "lose", "Name": "", "From": "", "To": "", "Reason": loss, "Task": ""})
    });
    let row = |(action, task): &(&str, &PlannedTask)| {
        let id = task.task_id.parse::<TaskId>().map(|id| id.to_string()).unwrap_or_default();
        json!({
            "Action": action, "Name": task.name, "From": task.from_node, "To": task.to_node,
            "Reason": task.reason, "Task": id,
        })
    };
    lost.chain(tasks.iter().map(row)).collect()
}
