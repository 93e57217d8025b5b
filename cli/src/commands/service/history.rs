//! `skep service history`: the specs that a service had.

use anyhow::{Result, bail};
use clap::Args;

/// `skep service history`
#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {}

pub(super) fn run(_args: &HistoryArgs) -> Result<()> {
    bail!("service history is not supported yet")
}
