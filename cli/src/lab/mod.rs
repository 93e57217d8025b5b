//! `skep lab`: a swarm of real daemons on this one machine.
//!
//! The quick start, the classroom and the bed of the end-to-end tests. Every node of a lab is a
//! small machine: it has network, mount, UTS, IPC and PID namespaces, a cgroup subtree, a data and
//! a run directory of its own, and shares nothing with the others but the kernel.
//!
//! ```text
//!  host ──skeplabN (.254)──┐            one process each, pid 1 of its own PID namespace:
//!                       ┌──┴─────┐
//!  n1 (.1) ──── port ───┤ switch ├─── port ──── client (.250), an outside client
//!  n2 (.2) ──── port ───┤        ├─── port ──── n3 (.3) …
//!                       └────────┘
//! ```
//!
//! # Choices
//!
//! - **A PID namespace per node.** Its pid 1 is [`init`], started before the daemon. Power loss is
//!   one SIGKILL to it: the kernel ends everything in the namespace at once, and the network
//!   and mount namespaces end with their last process.
//! - **Namespaces are held by processes, never by bind mounts.** A bind mount would be copied into
//!   the mount namespace of every other lab and keep a dead network alive.
//! - **The bridge is in a network namespace of its own** (the member `switch`), so that neither the
//!   host's firewall nor br_netfilter matters. One veth pair connects the host.
//! - **The cgroup subtree is the list of a lab's processes.** Each init joins it before it makes
//!   anything, so that `down` finds what a crashed `up` left, whatever was recorded.
//! - **A cut cable takes the switch's end of a port down:** the node loses its carrier.
//! - No default route leads out of a lab: what tries to leave fails at once instead of timing out.
//!
//! # Reading order
//!
//! [`state`] (what is recorded where), `up`, [`node`] (boot, kill, start, cut, heal), [`init`],
//! `down`; then `link` (netlink) and [`cgroup`].
//!
//! # Invariants
//!
//! - Commands of one lab that change it run one after another, under a lock file.
//! - A process is signalled only after its pid *and* start time were compared.
//! - A lab whose `up` did not finish is torn down by its watchdog, whatever ended `up`.
//! - One second after `kill` or `down`, no process, mount, cgroup or link of it is left.
//! - [`run`] is called while the process has one thread: `setns` and `unshare` need that.

mod cgroup;
mod control;
mod down;
mod exec;
mod http;
mod init;
mod link;
mod list;
mod node;
mod poll;
mod state;
mod swarm;
mod up;
mod watchdog;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};

/// What `skep lab` was asked.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// The lab; several can run side by side.
    #[arg(long, global = true, default_value = "lab", env = "SKEP_LAB")]
    name: String,
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Starts a swarm of real daemons on this machine.
    Up(up::UpArgs),
    /// Lists the nodes of a lab.
    Ls(list::ListArgs),
    /// Runs a command on a node.
    Exec {
        /// The node: n1, n2, …
        node: String,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Runs a command on a machine of the lab's network that is no node of the swarm.
    Client {
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Ends nodes as if their power went: daemon, shims and containers at once.
    Kill {
        /// Ends the daemon alone; containers run on.
        #[arg(long, hide = true)]
        daemon_only: bool,
        /// The nodes; all of them go in the same instant.
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Starts killed nodes again, on the data they had.
    Start {
        /// The nodes.
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Pulls the network cable of nodes.
    Cut {
        /// The nodes.
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Plugs the network cable of nodes in again.
    Heal {
        /// The nodes.
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Prints what the daemon of a node logged.
    Logs {
        /// The node.
        node: String,
    },
    /// Removes a lab and all it made.
    Down(down::DownArgs),
    /// Sends HTTP requests and reports every outcome; nothing is tried twice.
    #[command(hide = true)]
    Http(http::HttpArgs),
    /// Runs a member's init.
    #[command(hide = true)]
    Init(init::InitArgs),
    /// Removes the lab when a process has ended.
    #[command(hide = true)]
    Watchdog(watchdog::WatchdogArgs),
}

/// Does what the arguments ask. Must be called before the process has a second thread.
pub(crate) fn run(args: LabArgs) -> Result<ExitCode> {
    state::check_name(&args.name)?;
    let name = args.name.as_str();
    match args.command {
        LabCommand::Http(http) => return http::run(&http),
        LabCommand::Init(init) => return init::run(&init),
        _ if !nix::unistd::geteuid().is_root() => bail!(
            "a lab needs root, since it makes namespaces, cgroups and network links: run it with sudo"
        ),
        LabCommand::Watchdog(watchdog) => watchdog::run(name, &watchdog)?,
        LabCommand::Up(up) => up::run(name, &up)?,
        LabCommand::Ls(list) => list::run(name, &list)?,
        LabCommand::Exec { node, command } => return exec::run(name, &node, &command),
        LabCommand::Client { command } => return exec::run(name, state::CLIENT, &command),
        LabCommand::Kill { daemon_only: true, nodes } => node::kill_daemons(name, &nodes)?,
        LabCommand::Kill { daemon_only: false, nodes } => node::kill(name, &nodes)?,
        LabCommand::Start { nodes } => node::start(name, &nodes)?,
        LabCommand::Cut { nodes } => node::plug(name, &nodes, node::Cable::Cut)?,
        LabCommand::Heal { nodes } => node::plug(name, &nodes, node::Cable::Whole)?,
        LabCommand::Logs { node } => list::print_log(name, &node)?,
        LabCommand::Down(down) => down::run(name, &down)?,
    }
    Ok(ExitCode::SUCCESS)
}
