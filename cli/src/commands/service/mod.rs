//! `skep service`. Wording and flags: docker/cli `cli/command/service`.

mod create;
mod endpoints;
mod explain;
pub(super) mod flags;
mod history;
mod inspect;
mod list;
mod logs;
mod mode;
mod names;
mod payloads;
mod placement;
mod pretty;
mod scale;
mod update;

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Subcommand;

use super::progress::{self, Waiting};
use crate::client::Client;
use crate::ui::Ui;

pub(super) use list::{VIEW, condition_notes, rows, show_notes};
pub(super) use logs::{Since, parse_since};

/// Manage Swarm services
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a new service
    Create(Box<create::CreateArgs>),
    /// List where the tasks of a service are reached, and whether connections go there
    Endpoints(endpoints::EndpointsArgs),
    /// Say why tasks wait: what ruled nodes out, and which came closest
    Explain(explain::ExplainArgs),
    /// List the specs that a service had, which `rollback --to` goes back to
    History(history::HistoryArgs),
    /// Display detailed information on one or more services
    Inspect(inspect::InspectArgs),
    /// Fetch the logs of a service or task
    Logs(logs::LogsArgs),
    /// List services
    #[command(visible_alias = "list")]
    Ls(list::LsArgs),
    /// List the tasks of one or more services
    Ps(super::tasks::PsArgs),
    /// Remove one or more services
    #[command(visible_alias = "remove")]
    Rm(scale::RmArgs),
    /// Revert changes to a service's configuration
    Rollback(update::RollbackArgs),
    /// Scale one or multiple replicated services
    Scale(scale::ScaleArgs),
    /// Update a service
    Update(Box<update::UpdateArgs>),
}

pub(super) async fn run(command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    match command {
        Command::Create(args) => create::run(&args, client, ui).await,
        Command::Endpoints(args) => endpoints::run(&args, client, ui).await,
        Command::Explain(args) => explain::run(&args, client, ui).await,
        Command::History(args) => history::run(&args, client, ui).await,
        Command::Inspect(args) => inspect::run(&args, client, ui).await,
        Command::Logs(args) => logs::run(&args, client, ui).await,
        Command::Ls(args) => list::run(&args, client, ui).await,
        Command::Ps(args) => super::tasks::service_ps(&args, client, ui).await,
        Command::Rm(args) => scale::rm(&args, client, ui).await,
        Command::Rollback(args) => update::rollback(&args, client, ui).await,
        Command::Scale(args) => scale::run(&args, client, ui).await,
        Command::Update(args) => update::run(&args, client, ui).await,
    }
}

/// The caller's variables, for `--env NAME`; one that is not UTF-8 does not count.
pub(super) fn caller_environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Waits until a service has converged, unless the user wants none of it.
async fn converge(
    waiting: Waiting,
    wait: &flags::WaitFlags,
    client: &Client,
    ui: &mut Ui,
) -> Result<()> {
    if wait.detach {
        return Ok(());
    }
    progress::wait(client, waiting, wait.quiet, ui).await
}
