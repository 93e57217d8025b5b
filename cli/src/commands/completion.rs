//! `skep completion`: the completion script of a shell.

use anyhow::Result;
use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::ui::Ui;

/// Which shell.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Name {
    Bash,
    Zsh,
    Fish,
}

/// `skep completion SHELL`
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: Name,
}

pub(super) fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let shell = match args.shell {
        Name::Bash => Shell::Bash,
        Name::Zsh => Shell::Zsh,
        Name::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::args::Cli::command(), "skep", &mut script);
    Ok(ui.data(script)?)
}
