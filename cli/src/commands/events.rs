//! `skep events`: what happened, and what happens.

use anyhow::{Result, bail};
use clap::Args;

/// `skep events`
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {}

pub(super) fn run(_args: &EventsArgs) -> Result<()> {
    bail!("events is not supported yet")
}
