//! The client commands: each parses its flags, asks the daemon and prints.
//!
//! Driven by `main` through [`run`]. Reading order: [`service`] (flags to spec, spec update, lists),
//! [`progress`] (waiting until a service has converged), `tasks` (`ps` of services, nodes and stacks),
//! then the others.
//!
//! Exit codes are Docker's: 0 done, 1 refused or failed, 125 a command line that cannot be read, and of `run`
//! the container's. A
//! reader that went away (`skep … | head`) ends the command with 141 and without a word.

pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod container;
pub(crate) mod debug;
mod debug_write;
pub(crate) mod events;
mod filter;
pub(crate) mod image;
pub(crate) mod info;
mod inspect;
pub(crate) mod inspect_any;
pub(crate) mod network;
mod network_check;
mod network_inspect;
pub(crate) mod node;
mod node_pretty;
mod node_what_if;
mod payload;
mod progress;
mod progress_job;
pub(crate) mod secret;
pub(crate) mod service;
pub(crate) mod stack;
mod stack_deploy;
pub(crate) mod swarm;
mod swarm_backup;
mod swarm_ca;
mod swarm_lock;
mod swarm_update;
mod tasks;
#[cfg(test)]
mod tests;

use anyhow::Result;

use crate::args::{Cli, Command};
use crate::client::Client;
use crate::ui::Ui;

/// Exit code of a command whose reader went away: 128 + SIGPIPE, as the shell reports Docker's.
const CODE_BROKEN_PIPE: u8 = 141;
/// Exit code of a command line that cannot be read. docker/cli `cli.FlagErrorFunc`.
const CODE_USAGE: u8 = 125;

/// Runs one command on a runtime of its own and gives the exit code.
pub(crate) fn main(cli: Cli) -> u8 {
    let mut ui = Ui::standard();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(cli, &mut ui));
            // A read of standard input that still waits must not hold the command back.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(anyhow::Error::new(error).context("failed to start the runtime")),
    };
    finish(result, &mut ui)
}

/// Runs one command.
async fn run(cli: Cli, ui: &mut Ui) -> Result<()> {
    let command = match cli.command {
        Command::Completion(args) => return completion::run(&args, ui),
        Command::Version(args) => return info::version(&args, &cli.host, ui).await,
        Command::Stack(stack::Command::Config(args)) => return stack::config(&args, ui),
        command => command,
    };
    let client = Client::connect(&cli.host).await?;
    let result = ask(command, &client, ui).await;
    if let (Ok(()), Some(why)) = (&result, client.stale()) {
        ui.note(format_args!("WARNING: {why}"))?;
    }
    result
}

async fn ask(command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    match command {
        Command::Run(args) => container::run(&args, client, ui).await,
        Command::Ps(args) => container::ps(&args, client, ui).await,
        Command::Stop(args) => container::stop(&args, client, ui).await,
        Command::Rm(args) => container::rm(&args, client, ui).await,
        Command::Swarm(command) => swarm::run(command, client, ui).await,
        Command::Network(command) => network::run(command, client, ui).await,
        Command::Node(command) => node::run(command, client, ui).await,
        Command::Service(command) => service::run(command, client, ui).await,
        Command::Stack(command) => stack::run(command, client, ui).await,
        Command::Image(command) => image::run(command, client, ui).await,
        Command::Debug(command) => debug::run(command, client, ui).await,
        Command::Info(args) => info::info(&args, client, ui).await,
        Command::Secret(args) => secret::run(args, client, ui).await,
        Command::Config(args) => config::run(args, client, ui).await,
        Command::Inspect(args) => inspect_any::run(&args, client, ui).await,
        Command::Events(args) => events::run(&args, client, ui).await,
        Command::Completion(_) | Command::Version(_) => unreachable!("handled above"),
        Command::Daemon(_) | Command::Lab(_) | Command::Shim(_) | Command::ExecIn(_) => {
            unreachable!("main runs what is no client")
        }
    }
}

/// Prints what went wrong and gives the exit code.
fn finish(result: Result<()>, ui: &mut Ui) -> u8 {
    let Err(error) = result else { return 0 };
    if let Some(ExitWith(code)) = error.downcast_ref() {
        return *code;
    }
    let is_broken_pipe = error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    });
    if is_broken_pipe {
        return CODE_BROKEN_PIPE;
    }
    // A message that cannot be written has nowhere else to go.
    let _ = ui.note(format_args!("{error:#}"));
    1
}

/// The end of a command that has said all and whose exit code says the rest.
#[derive(Debug, thiserror::Error)]
#[error("exit code {0}")]
struct ExitWith(u8);

/// The exit code of a command line that clap refused, or of `--help`.
pub(crate) fn usage_code(error: &clap::Error) -> u8 {
    use clap::error::ErrorKind;
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
        ErrorKind::MissingRequiredArgument
        | ErrorKind::TooFewValues
        | ErrorKind::MissingSubcommand
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => 1,
        _ => CODE_USAGE,
    }
}

/// Gathers the failures of a command that goes on with its other arguments.
#[derive(Debug, Default)]
struct Failures(Vec<String>);

impl Failures {
    fn add(&mut self, error: &anyhow::Error) {
        self.0.push(format!("{error:#}"));
    }

    fn finish(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(anyhow::anyhow!(self.0.join("\n"))) }
    }
}
