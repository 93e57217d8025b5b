//! `skep config`.

use clap::Args;

use super::payload::{self, Kind};
use crate::client::Client;
use crate::ui::Ui;
use anyhow::Result;

/// `skep config COMMAND`
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    command: payload::Command,
}

pub(super) async fn run(args: ConfigArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    payload::run(Kind::Config, args.command, client, ui).await
}
