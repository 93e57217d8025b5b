//! `skep swarm`: make, join and leave a swarm. Wording: docker/cli `cli/command/swarm`.

use anyhow::Result;
use clap::{Args, Subcommand};
use skep_proto::{
    InitSwarmRequest, InitSwarmResponse, JoinSwarmRequest, JoinTokenRequest, LeaveSwarmRequest,
};

use super::swarm_update::SettingsArgs;
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// Manage Swarm
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Initialize a swarm
    Init(InitArgs),
    /// Join a swarm as a node and/or manager
    Join(JoinArgs),
    /// Manage join tokens
    JoinToken(JoinTokenArgs),
    /// Leave the swarm
    Leave(LeaveArgs),
    /// Write the swarm into a file
    Backup(super::swarm_backup::BackupArgs),
    /// Make this machine the only manager of the swarm in such a file
    Restore(super::swarm_backup::RestoreArgs),
    /// Display and rotate the root CA
    Ca(super::swarm_ca::CaArgs),
    /// Unlock swarm
    Unlock(super::swarm_lock::UnlockArgs),
    /// Manage the unlock key
    UnlockKey(super::swarm_lock::UnlockKeyArgs),
    /// Update the swarm
    Update(super::swarm_update::UpdateArgs),
}

/// Where a node listens unless told otherwise: Docker's default.
const DEFAULT_LISTEN: &str = "0.0.0.0:2377";

/// Where a node listens and how others reach it.
#[derive(Debug, Args)]
pub(crate) struct AddressArgs {
    /// Advertised address
    #[arg(
        long,
        help = "Advertised address (format: \"<ip|interface>[:port]\")",
        default_value = "",
        hide_default_value = true
    )]
    pub(super) advertise_addr: String,
    /// Listen address
    #[arg(long, help = "Listen address (format: \"<ip>[:port]\")", default_value = DEFAULT_LISTEN)]
    pub(super) listen_addr: String,
    /// Availability of the node
    #[arg(long, default_value = "active", value_parser = ["active", "pause", "drain"])]
    pub(super) availability: String,
}

/// `skep swarm init`
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    #[command(flatten)]
    address: AddressArgs,
    /// Pool of the ingress network, of which each node gets a part (CIDR)
    #[arg(long, default_value = "", hide_default_value = true)]
    ingress_addr_pool: String,
    /// Default address pool in CIDR format, of which networks get their subnets
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    default_addr_pool: Vec<String>,
    /// Prefix length of networks' subnets of the default address pools (default 20)
    #[arg(long, value_name = "BITS")]
    default_addr_pool_mask_length: Option<u32>,
    #[command(flatten)]
    settings: SettingsArgs,
    /// Force create a new cluster from current state
    #[arg(
        long,
        help = "Go on with this manager alone, with the state that it has, where the others are lost for good"
    )]
    force_new_cluster: bool,
}

/// `skep swarm join`
#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// Token for entry into the swarm
    #[arg(long)]
    token: String,
    #[command(flatten)]
    address: AddressArgs,
    /// Address of a manager
    #[arg(
        value_name = "HOST:PORT",
        required = true,
        help = "Address of a manager (format: \"<ip>[:port]\")"
    )]
    remotes: Vec<String>,
}

/// `skep swarm join-token`
#[derive(Debug, Args)]
pub(crate) struct JoinTokenArgs {
    /// Which role the token gives
    #[arg(value_parser = ["worker", "manager"])]
    role: String,
    /// Rotate join token
    #[arg(long)]
    rotate: bool,
    /// Only display token
    #[arg(long, short)]
    quiet: bool,
}

/// `skep swarm leave`
#[derive(Debug, Args)]
pub(crate) struct LeaveArgs {
    /// Force this node to leave the swarm, ignoring warnings
    #[arg(long, short)]
    force: bool,
}

pub(super) async fn run(command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    match command {
        Command::Init(args) => init(args, client, ui).await,
        Command::Join(args) => join(args, client, ui).await,
        Command::JoinToken(args) => join_token(args, client, ui).await,
        Command::Leave(args) => {
            let request = LeaveSwarmRequest { force: args.force };
            client.machine().leave_swarm(request).await.map_err(Refusal)?;
            Ok(ui.line("Node left the swarm.")?)
        }
        Command::Backup(args) => super::swarm_backup::backup(&args, client, ui).await,
        Command::Restore(args) => super::swarm_backup::restore(args, client, ui).await,
        Command::Ca(args) => super::swarm_ca::run(&args, client, ui).await,
        Command::Unlock(args) => super::swarm_lock::unlock(&args, client, ui).await,
        Command::UnlockKey(args) => super::swarm_lock::unlock_key(&args, client, ui).await,
        Command::Update(args) => super::swarm_update::run(&args, client, ui).await,
    }
}

async fn init(args: InitArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let spec_json = args.settings.of_new_swarm()?;
    // A former manager goes on listening where it did.
    let is_default = args.force_new_cluster && args.address.listen_addr == DEFAULT_LISTEN;
    let request = InitSwarmRequest {
        advertise_addr: args.address.advertise_addr,
        listen_addr: if is_default { String::new() } else { args.address.listen_addr },
        force_new_cluster: args.force_new_cluster,
        availability: args.address.availability,
        spec_json,
        ingress_pool: args.ingress_addr_pool,
        default_addr_pool: args.default_addr_pool,
        subnet_size: args.default_addr_pool_mask_length.unwrap_or_default(),
        ..InitSwarmRequest::default()
    };
    let made = client.machine().init_swarm(request).await.map_err(Refusal)?.into_inner();
    tell_begun(&made, ui)?;
    if !made.unlock_key.is_empty() {
        ui.line("")?;
        super::swarm_lock::tell(&made.unlock_key, ui)?;
    }
    Ok(())
}

/// Says that a swarm has begun, and how others come to it.
pub(super) fn tell_begun(made: &InitSwarmResponse, ui: &mut Ui) -> Result<()> {
    ui.line(format_args!(
        "Swarm initialized: current node ({}) is now a manager.\n",
        made.node_id
    ))?;
    for note in &made.notes {
        ui.line(format_args!("{note}\n"))?;
    }
    ui.line(join_command("worker", &made.worker_token, &made.address))?;
    ui.line(
        "To add a manager to this swarm, run 'skep swarm join-token manager' and follow the instructions.",
    )?;
    Ok(())
}

async fn join(args: JoinArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let request = JoinSwarmRequest {
        token: args.token,
        remotes: args.remotes,
        advertise_addr: args.address.advertise_addr,
        listen_addr: args.address.listen_addr,
        availability: args.address.availability,
    };
    let joined = client.machine().join_swarm(request).await.map_err(Refusal)?.into_inner();
    Ok(ui.line(format_args!("This node joined a swarm as a {}.", joined.role))?)
}

async fn join_token(args: JoinTokenArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let request = JoinTokenRequest { role: args.role.clone(), rotate: args.rotate };
    let answer = client.control().join_token(request).await.map_err(Refusal)?.into_inner();
    if args.quiet {
        return Ok(ui.line(answer.token)?);
    }
    if args.rotate {
        ui.line(format_args!("Successfully rotated {} join token.\n", args.role))?;
    }
    Ok(ui.line(join_command(&args.role, &answer.token, &answer.address))?)
}

fn join_command(role: &str, token: &str, address: &str) -> String {
    format!(
        "To add a {role} to this swarm, run the following command:\n\n    skep swarm join --token {token} {address}\n"
    )
}
