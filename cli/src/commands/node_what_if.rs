//! `skep node what-if`: what would become of tasks, were nodes down.

use anyhow::{Result, bail};
use clap::Args;

/// `skep node what-if`
#[derive(Debug, Args)]
pub(crate) struct WhatIfArgs {}

pub(super) fn run(_args: &WhatIfArgs) -> Result<()> {
    bail!("node what-if is not supported yet")
}
