//! `skep secret`.

use clap::Args;

use super::payload::{self, Kind};
use crate::client::Client;
use crate::ui::Ui;
use anyhow::Result;

/// `skep secret COMMAND`
#[derive(Debug, Args)]
pub(crate) struct SecretArgs {
    #[command(subcommand)]
    command: payload::Command,
}

pub(super) async fn run(args: SecretArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    payload::run(Kind::Secret, args.command, client, ui).await
}
