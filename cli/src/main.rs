//! `skep`: the client commands and, under the same name, the daemon and what it starts.
//!
//! Reading order: [`args`] (the command line), [`commands`] (what each client command does), [`client`]
//! (the way to the daemon), [`mod@format`] (tables, JSON, templates), [`ui`] (where text goes); [`daemon`];
//! [`lab`]; [`helpers`] (what the daemon starts beside containers).

mod args;
mod client;
mod commands;
mod daemon;
mod format;
mod helpers;
mod lab;
mod ui;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    // What must run before any thread exists (the shim, the processes of a lab, the daemon with a
    // runtime of its own) is chosen here, before the client's runtime.
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Where help cannot be printed there is nobody to read it.
            let _ = error.print();
            return commands::usage_code(&error).into();
        }
    };
    let result = match cli.command {
        args::Command::Shim(shim) => helpers::shim(&shim),
        args::Command::ExecIn(exec_in) => helpers::exec_in(exec_in),
        args::Command::Daemon(daemon) => daemon::run(daemon),
        args::Command::Lab(lab) => lab::run(lab),
        _ => return commands::main(cli).into(),
    };
    result.unwrap_or_else(|error| {
        use std::io::Write as _;
        // Where an error cannot be printed there is nobody to read it.
        let _ = writeln!(std::io::stderr(), "{error:#}");
        ExitCode::FAILURE
    })
}
