//! The command line: Docker's grammar, one tree.
//!
//! Source: docker/cli `cli/command/{swarm,node,service,stack}`. Each command's flags live beside the
//! code that runs it, in [`crate::commands`].

use clap::{Parser, Subcommand};

use crate::commands::{
    completion, config, container, debug, events, image, info, inspect_any, network, node, secret,
    service, stack, swarm,
};

/// A Docker Swarm successor in one program.
#[derive(Debug, Parser)]
#[command(name = "skep", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// The daemon's socket
    #[arg(
        long,
        short = 'H',
        global = true,
        env = "SKEP_HOST",
        value_name = "unix://PATH",
        default_value = crate::client::DEFAULT_HOST,
        hide_env = true,
        help_heading = "Global options"
    )]
    pub(crate) host: String,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do. The daemon, the lab and the hidden helpers are no clients: `main` runs them before any
/// thread exists.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a container on this node
    Run(container::RunArgs),
    /// List this node's containers
    Ps(container::PsArgs),
    /// Stop containers of this node that no service made
    Stop(container::StopArgs),
    /// Remove containers of this node that no service made
    Rm(container::RmArgs),
    /// Manage Swarm
    #[command(subcommand)]
    Swarm(swarm::Command),
    /// Manage networks
    #[command(subcommand)]
    Network(network::Command),
    /// Manage Swarm nodes
    #[command(subcommand)]
    Node(node::Command),
    /// Manage Swarm services
    #[command(subcommand)]
    Service(service::Command),
    /// Manage Swarm stacks
    #[command(subcommand)]
    Stack(stack::Command),
    /// Manage images
    #[command(subcommand)]
    Image(image::Command),
    /// Manage secrets
    Secret(secret::SecretArgs),
    /// Manage configs
    Config(config::ConfigArgs),
    /// Show services, tasks, nodes, networks, secrets and configs whole
    Inspect(inspect_any::InspectArgs),
    /// Get events from the swarm
    Events(events::EventsArgs),
    /// Look inside
    #[command(subcommand)]
    Debug(debug::Command),
    /// Display information about this node
    Info(info::InfoArgs),
    /// Show the version information of client and daemon
    Version(info::VersionArgs),
    /// Print the completion script of a shell
    Completion(completion::Args),
    /// Run the daemon of this machine
    Daemon(crate::daemon::DaemonArgs),
    /// A swarm of real daemons on this one machine
    Lab(crate::lab::LabArgs),
    /// Runs beside one container.
    #[command(hide = true)]
    Shim(crate::helpers::ShimArgs),
    /// Runs a command inside a container.
    #[command(hide = true)]
    ExecIn(crate::helpers::ExecInArgs),
}
