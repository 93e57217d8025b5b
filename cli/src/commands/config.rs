//! `skep config`. Wording: docker/cli `cli/command/config`.

use anyhow::{Result, bail};
use clap::Args;

/// `skep config`
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {}

pub(super) fn run(_args: &ConfigArgs) -> Result<()> {
    bail!("config is not supported yet")
}
