//! `skep swarm update`: the settings of the swarm.

use anyhow::{Result, bail};
use clap::Args;

/// `skep swarm update`
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {}

pub(super) fn run(_args: &UpdateArgs) -> Result<()> {
    bail!("swarm update is not supported yet")
}
