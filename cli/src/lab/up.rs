//! `skep lab up`: makes the switch, boots the nodes, and joins them into a swarm.
//!
//! # Invariants
//!
//! - The lab is recorded before the first thing is made, and its watchdog runs before the second:
//!   an `up` that fails, is interrupted or is killed leaves nothing.
//! - Subnet and host link are chosen and recorded under the lock that all labs share.

use std::fs::OpenOptions;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use skep_runtime::clock::monotonic;
use skep_runtime::sys::{ChildSetup, ProcessId, prepare_child};

use super::link::{self, HostNetwork, PREFIX_LENGTH};
use super::state::{
    CLIENT, HOST_NUMBER, Lab, LabPaths, Lock, N_NODES_MAX, Node, Phase, Role, SWITCH, all_names,
    make_dir,
};
use super::{cgroup, down, node, swarm};

/// Arguments of `skep lab up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// How many nodes are managers: n1 and those that follow.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    managers: u8,
    /// How many nodes are workers.
    #[arg(long, default_value_t = 2)]
    workers: u8,
    /// The lab's network, a /24; by default the first of 10.77.x.0/24 that is free.
    #[arg(long, value_name = "ADDRESS/24", value_parser = parse_subnet)]
    subnet: Option<Ipv4Addr>,
    /// Numbers of nodes that balance published ports in user space, as on a kernel without nftables or VXLAN.
    #[arg(long, value_name = "NUMBER", value_delimiter = ',')]
    user_space: Vec<u8>,
    /// Leave the daemons without a swarm.
    #[arg(long, hide = true)]
    no_swarm: bool,
    /// Remove the lab when this process has ended.
    #[arg(long, hide = true, value_name = "PID")]
    until_exit_of: Option<i32>,
    /// The program to run as `PROGRAM daemon …` on the nodes instead of this one.
    #[arg(long, hide = true, value_name = "PROGRAM")]
    daemon: Option<PathBuf>,
    /// Give the daemons `--runtime none`: tasks count as running without containers.
    #[arg(long, hide = true)]
    no_containers: bool,
}

fn parse_subnet(text: &str) -> Result<Ipv4Addr, String> {
    let parse = || {
        let (address, length) = text.split_once('/')?;
        let address: Ipv4Addr = address.parse().ok()?;
        (length.parse() == Ok(PREFIX_LENGTH) && address.octets()[3] == 0).then_some(address)
    };
    parse().ok_or_else(|| "not the first address of a /24, such as 10.77.0.0/24".to_owned())
}

/// Runs the command.
pub(super) fn run(name: &str, args: &UpArgs) -> Result<()> {
    let n_nodes = u16::from(args.managers) + u16::from(args.workers);
    if n_nodes > u16::from(N_NODES_MAX) {
        bail!("{n_nodes} nodes are too many for one lab: at most {N_NODES_MAX}");
    }
    let until = args.until_exit_of.map(|pid| {
        ProcessId::of(pid).with_context(|| format!("process {pid} of --until-exit-of is gone"))
    });
    let until = until.transpose()?;

    let paths = LabPaths::new(name);
    let lock = paths.lock()?;
    if paths.exists() {
        bail!("a lab {name} is there already: remove it with `skep lab --name {name} down`");
    }
    let started = monotonic();
    match make(&paths, args, until) {
        Ok(lab) => {
            say_what_next(&lab, monotonic() - started);
            Ok(())
        }
        Err(error) => {
            // The error that came first is the one to tell; what cannot be removed is told too.
            if let Err(left) = down::remove_locked(&paths, lock) {
                eprintln!("lab {name}: not all of it could be removed: {left:#}");
            }
            Err(error).with_context(|| format!("lab {name} did not start, and was removed"))
        }
    }
}

fn make(paths: &LabPaths, args: &UpArgs, until: Option<ProcessId>) -> Result<Lab> {
    let mut lab = record(paths, args)?;
    lab.watchdog = Some(start_watchdog(paths, &lab, until)?);
    paths.save(&lab)?;
    let n_nodes = lab.nodes.len();
    eprintln!("lab {}: {n_nodes} nodes on {}/{PREFIX_LENGTH}", lab.name, lab.subnet);

    node::boot_helper(paths, SWITCH)?;
    link::make_switch(&node::netns_of(paths, SWITCH)?)?;
    let switch = node::netns_of(paths, SWITCH)?;
    link::plug_in_host(&switch, &lab.host_link, lab.address(HOST_NUMBER))?;
    node::boot_helper(paths, CLIENT)?;
    node::plug_in_client(paths, &lab)?;

    let program = match &args.daemon {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("find the program")?,
    };
    start_nodes(paths, &lab, &program)?;
    if !args.no_swarm {
        swarm::form(&lab)?;
    }
    lab.phase = Phase::Up;
    paths.save(&lab)?;
    Ok(lab)
}

/// Chooses what must differ from other labs and from the host's network, and writes it down.
fn record(paths: &LabPaths, args: &UpArgs) -> Result<Lab> {
    let _global = Lock::acquire_global()?;
    let host = HostNetwork::read()?;
    let others: Vec<Lab> =
        all_names().iter().filter_map(|name| LabPaths::new(name).load().ok()).collect();
    let taken_links: Vec<&str> = others.iter().map(|lab| lab.host_link.as_str()).collect();
    let taken: Vec<(Ipv4Addr, u8)> =
        others.iter().map(|lab| (lab.subnet, PREFIX_LENGTH)).chain(host.routes.clone()).collect();
    let subnet = match args.subnet {
        Some(subnet) => Some(subnet).filter(|subnet| is_free(*subnet, &taken)),
        None => free_subnet(&taken),
    };
    let subnet = subnet.context(match args.subnet {
        Some(_) => "the subnet overlaps a route of this machine or another lab: give another one",
        None => "no 10.77.x.0/24 is free on this machine: give a free /24 with --subnet",
    })?;
    let roles = std::iter::repeat_n(Role::Manager, args.managers.into())
        .chain(std::iter::repeat_n(Role::Worker, args.workers.into()));
    let nodes = (1..).zip(roles).map(|(number, role): (u8, Role)| Node {
        name: format!("n{number}"),
        number,
        role,
        is_cut: false,
        is_in_user_space: args.user_space.contains(&number),
    });
    let lab = Lab {
        id: ProcessId::current()?.to_string(),
        name: paths.name.clone(),
        phase: Phase::Starting,
        subnet,
        host_link: host.free_link_name(&taken_links),
        watchdog: None,
        daemon_program: args.daemon.clone(),
        has_no_containers: args.no_containers,
        nodes: nodes.collect(),
    };
    make_dir(&paths.run, 0o755)?;
    paths.save(&lab)?;
    make_dir(&paths.data, 0o700)?;
    down::make_mount_points()?;
    cgroup::create(&paths.cgroup())?;
    Ok(lab)
}

fn free_subnet(taken: &[(Ipv4Addr, u8)]) -> Option<Ipv4Addr> {
    (0..=255).map(|x| Ipv4Addr::new(10, 77, x, 0)).find(|subnet| is_free(*subnet, taken))
}

/// Two networks overlap when they agree in the shorter of the two prefixes.
fn is_free(subnet: Ipv4Addr, taken: &[(Ipv4Addr, u8)]) -> bool {
    taken.iter().filter(|(_, length)| *length > 0).all(|(network, length)| {
        let shorter = u32::from(PREFIX_LENGTH.min(*length));
        let mask = u32::MAX << (u32::BITS - shorter);
        u32::from(subnet) & mask != u32::from(*network) & mask
    })
}

fn start_watchdog(paths: &LabPaths, lab: &Lab, until: Option<ProcessId>) -> Result<ProcessId> {
    let log = OpenOptions::new().create(true).append(true).open(paths.run.join("watchdog.log"));
    let mut command = Command::new("/proc/self/exe");
    command.arg0("skep").args(["lab", "--name", &paths.name, "watchdog", "--id", &lab.id]);
    command.arg("--up").arg(ProcessId::current()?.to_string());
    if let Some(until) = until {
        command.arg("--until-exit-of").arg(until.to_string());
    }
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(log.context("make the watchdog's log")?);
    // No signal of the terminal reaches it: it cleans up after exactly those.
    prepare_child(&mut command, ChildSetup { new_session: true, ..Default::default() });
    let child = command.spawn().context("start the watchdog")?;
    ProcessId::of(i32::try_from(child.id())?).context("the watchdog ended at once")
}

/// Boots all nodes, then waits for all daemons: they start side by side.
fn start_nodes(paths: &LabPaths, lab: &Lab, program: &std::path::Path) -> Result<()> {
    let started = monotonic();
    for node in &lab.nodes {
        node::boot_node(paths, lab, node, program.to_owned())?;
    }
    for node in &lab.nodes {
        node::wait_for_daemon(paths, &node.name)?;
        let seconds = (monotonic() - started).as_secs_f32();
        let address = lab.address(node.number);
        eprintln!("  {:<5}{address:<13}{:<9}daemon up after {seconds:.1} s", node.name, node.role);
    }
    Ok(())
}

fn say_what_next(lab: &Lab, taken: Duration) {
    let (name, seconds) = (&lab.name, taken.as_secs_f32());
    let skep_lab = match name.as_str() {
        "lab" => "skep lab".to_owned(),
        name => format!("skep lab --name {name}"),
    };
    let last = lab.nodes.last().map_or("n1", |node| node.name.as_str());
    eprintln!("lab {name} is up after {seconds:.1} s. Try next:");
    eprintln!("  {skep_lab} exec n1 -- skep node ls");
    eprintln!("  {skep_lab} kill {last}     as if its power went; `start {last}` brings it back");
    eprintln!("  {skep_lab} cut {last}      pulls its network cable; `heal {last}` plugs it in");
    eprintln!("  {skep_lab} down        removes it all");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_subnet_that_no_route_overlaps_is_taken() {
        let check = |taken: &[(&str, u8)], expect: Option<&str>| {
            let taken: Vec<(Ipv4Addr, u8)> =
                taken.iter().map(|(a, l)| (a.parse().unwrap(), *l)).collect();
            let expect: Option<Ipv4Addr> = expect.map(|text| text.parse().unwrap());
            assert_eq!(free_subnet(&taken), expect, "{taken:?}");
        };
        check(&[], Some("10.77.0.0"));
        check(&[("0.0.0.0", 0)], Some("10.77.0.0"));
        check(&[("10.77.0.0", 24), ("10.77.2.0", 24)], Some("10.77.1.0"));
        check(&[("10.77.0.5", 32)], Some("10.77.1.0"));
        check(&[("10.77.0.0", 17)], Some("10.77.128.0"));
        check(&[("10.0.0.0", 8)], None);
    }

    #[test]
    fn a_subnet_is_the_first_address_of_a_24() {
        assert_eq!(parse_subnet("172.30.5.0/24"), Ok(Ipv4Addr::new(172, 30, 5, 0)));
        for text in ["172.30.5.1/24", "172.30.5.0/16", "172.30.5.0", "x/24"] {
            assert!(parse_subnet(text).is_err(), "{text}");
        }
    }
}
