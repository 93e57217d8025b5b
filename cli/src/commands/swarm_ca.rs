//! `skep swarm ca`: the root of the certificates, and its change.

use anyhow::{Result, bail};
use clap::Args;

/// `skep swarm ca`
#[derive(Debug, Args)]
pub(crate) struct CaArgs {}

pub(super) fn run(_args: &CaArgs) -> Result<()> {
    bail!("swarm ca is not supported yet")
}
