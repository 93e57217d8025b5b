//! `skep swarm unlock` and `unlock-key`: managers that start locked.

use anyhow::{Result, bail};
use clap::Args;

/// `skep swarm unlock`
#[derive(Debug, Args)]
pub(crate) struct UnlockArgs {}

pub(super) fn unlock(_args: &UnlockArgs) -> Result<()> {
    bail!("swarm unlock is not supported yet")
}

/// `skep swarm unlock-key`
#[derive(Debug, Args)]
pub(crate) struct UnlockKeyArgs {}

pub(super) fn unlock_key(_args: &UnlockKeyArgs) -> Result<()> {
    bail!("swarm unlock-key is not supported yet")
}
