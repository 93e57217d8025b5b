//! `skep swarm backup` and `restore`: a swarm in one file.

use anyhow::{Result, bail};
use clap::Args;

/// `skep swarm backup`
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {}

pub(super) fn backup(_args: &BackupArgs) -> Result<()> {
    bail!("swarm backup is not supported yet")
}

/// `skep swarm restore`
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {}

pub(super) fn restore(_args: &RestoreArgs) -> Result<()> {
    bail!("swarm restore is not supported yet")
}
