//! The processes that the daemon starts beside containers: single-threaded from first to last.

use std::path::PathBuf;

use clap::Args;

/// Arguments of `skep shim`.
#[derive(Debug, Args)]
pub(crate) struct ShimArgs {
    /// The container's run directory.
    #[arg(long)]
    dir: PathBuf,
}

/// Arguments of `skep exec-in`.
#[derive(Debug, Args)]
pub(crate) struct ExecInArgs {
    /// The container's run directory.
    #[arg(long)]
    dir: PathBuf,
    /// A variable beyond those of the container.
    #[arg(long)]
    env: Vec<String>,
    /// What to run.
    #[arg(required = true, last = true)]
    argv: Vec<String>,
}

/// Holds one container until it ends.
pub(crate) fn shim(args: &ShimArgs) -> ! {
    skep_worker::container::shim_main(&args.dir)
}

/// Runs one command in a container.
pub(crate) fn exec_in(args: ExecInArgs) -> ! {
    skep_worker::container::exec_in_main(&args.dir, args.argv, &args.env)
}
