//! `skep service inspect`.

use anyhow::Result;
use clap::Args;

use super::super::inspect::{self, InspectFlags};
use super::pretty::pretty;
use crate::client::Client;
use crate::ui::Ui;

/// `skep service inspect [OPTIONS] SERVICE [SERVICE...]`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    flags: InspectFlags,
    /// Names or ids of services
    #[arg(required = true, value_name = "SERVICE")]
    services: Vec<String>,
}

pub(super) async fn run(args: &InspectArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let now = (ui.now)();
    let pretty = |service: &_| pretty(service, now);
    inspect::print(&args.flags, ("service", &args.services), pretty, client, ui).await
}
