//! `skep secret`. Wording: docker/cli `cli/command/secret`.

use anyhow::{Result, bail};
use clap::Args;

/// `skep secret`
#[derive(Debug, Args)]
pub(crate) struct SecretArgs {}

pub(super) fn run(_args: &SecretArgs) -> Result<()> {
    bail!("secret is not supported yet")
}
