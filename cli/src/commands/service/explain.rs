//! `skep service explain`: why tasks wait.

use anyhow::{Result, bail};
use clap::Args;

/// `skep service explain`
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {}

pub(super) fn run(_args: &ExplainArgs) -> Result<()> {
    bail!("service explain is not supported yet")
}
