//! Boots and ends members, and pulls and plugs cables: `kill`, `start`, `cut`, `heal`.
//!
//! # Invariants
//!
//! - Power loss ends all nodes named in one command before it waits for any of them.
//! - A node starts again on the data it had, with an empty run directory, as after a reboot.
//! - A cable that was cut stays cut over a power loss, until `heal`.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use skep_runtime::sys::{PidFd, ProcessId};

use super::control::{Request, request};
use super::init::{DaemonSpec, Spec, boot};
use super::link::{self, Netns};
use super::poll::poll_until;
use super::state::{CLIENT, CLIENT_NUMBER, Lab, LabPaths, MemberPaths, Node, SWITCH, make_dir};
use super::{cgroup, state};

/// Where a node sees its data directory.
pub(super) const NODE_DATA_DIR: &str = "/var/lib/skep";
/// Where a node sees its run directory.
pub(super) const NODE_RUN_DIR: &str = "/run/skep";
/// The daemon's client socket in its run directory.
const SOCKET: &str = "skep.sock";
/// A daemon that recovers a long log on a busy machine may take this long to listen.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(60);
/// A daemon that serves answers at once; one that does not yet is asked again.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// The client's connection preface and empty settings, which a server answers with its own. RFC 9113, 3.4.
const HTTP2_HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// What was killed is gone in milliseconds; this is for a machine under heavy load.
const DEATH_TIMEOUT: Duration = Duration::from_secs(20);
/// Lines of a daemon's log that an error shows.
const N_LOG_LINES: usize = 15;

/// How a node's cable is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cable {
    Cut,
    Whole,
}

/// The client's address for programs that run on a node.
pub(super) fn client_url() -> String {
    format!("unix://{NODE_RUN_DIR}/{SOCKET}")
}

/// The init of a member, if it runs.
pub(super) fn running_init(member: &MemberPaths) -> Option<ProcessId> {
    member.load_init().filter(|init| init.is_alive())
}

/// The network of a member that must run.
pub(super) fn netns_of(paths: &LabPaths, member: &str) -> Result<Netns> {
    let init = running_init(&paths.member(member))
        .with_context(|| format!("{member} of lab {} is down", paths.name))?;
    Netns::of(init)
}

/// Boots the switch or the client, which have namespaces but no daemon.
pub(super) fn boot_helper(paths: &LabPaths, name: &str) -> Result<()> {
    boot_member(paths, name, Vec::new(), None)
}

/// Boots a node up to its init, plugs its cable in, and starts its daemon.
pub(super) fn boot_node(paths: &LabPaths, lab: &Lab, node: &Node, program: PathBuf) -> Result<()> {
    let member = paths.member(&node.name);
    if member.run_dir().exists() {
        fs::remove_dir_all(member.run_dir()).context("empty the run directory")?;
    }
    make_dir(&member.run_dir(), 0o755)?;
    make_dir(&member.data_dir(), 0o700)?;
    let binds = vec![
        (member.data_dir(), PathBuf::from(NODE_DATA_DIR)),
        (member.run_dir(), PathBuf::from(NODE_RUN_DIR)),
    ];
    let daemon = DaemonSpec {
        program,
        args: daemon_args(lab, node, &member.cgroup),
        log: member.daemon_log(),
    };
    boot_member(paths, &node.name, binds, Some(daemon))?;

    let into = netns_of(paths, &node.name)?;
    let switch = netns_of(paths, SWITCH)?;
    link::remove_cable(&switch, &node.name)?;
    link::plug_in(&switch, &node.name, &into, lab.address(node.number), node.is_cut)?;
    request(&member, Request::StartDaemon)?;
    Ok(())
}

fn boot_member(
    paths: &LabPaths,
    name: &str,
    binds: Vec<(PathBuf, PathBuf)>,
    daemon: Option<DaemonSpec>,
) -> Result<()> {
    let member = paths.member(name);
    make_dir(&member.run, 0o700)?;
    let init_cgroup = format!("{}/init", member.cgroup);
    cgroup::create(&init_cgroup)?;
    match fs::remove_file(member.control_socket()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error)?,
        _ => {}
    }
    let spec = Spec {
        host_name: name.to_owned(),
        cgroup: init_cgroup,
        init_file: member.init(),
        control_socket: member.control_socket(),
        binds,
        // A node knows nothing of labs: neither its own nor the others' files.
        hidden: state::roots(),
        daemon,
    };
    boot(&member, &spec).with_context(|| format!("boot {name}"))
}

fn daemon_args(lab: &Lab, node: &Node, cgroup: &str) -> Vec<String> {
    let address = lab.address(node.number).to_string();
    let args = [
        "daemon",
        "--hostname",
        &node.name,
        "--data-dir",
        NODE_DATA_DIR,
        "--run-dir",
        NODE_RUN_DIR,
        "--advertise-addr",
        &address,
        "--cgroup-parent",
        cgroup,
    ];
    let balancer = node.is_in_user_space.then_some("--ingress-balancer=user-space");
    let runtime = lab.has_no_containers.then_some("--runtime=none");
    args.into_iter().chain(balancer).chain(runtime).map(str::to_owned).collect()
}

/// Plugs the client in.
pub(super) fn plug_in_client(paths: &LabPaths, lab: &Lab) -> Result<()> {
    let (switch, into) = (netns_of(paths, SWITCH)?, netns_of(paths, CLIENT)?);
    link::plug_in(&switch, CLIENT, &into, lab.address(CLIENT_NUMBER), false)
}

/// Waits until a node's daemon answers its clients; an error shows the end of its log.
pub(super) fn wait_for_daemon(paths: &LabPaths, node: &str) -> Result<()> {
    let member = paths.member(node);
    let socket = member.run_dir().join(SOCKET);
    let found = poll_until(DAEMON_TIMEOUT, || match answers(&socket) {
        Ok(()) => Some(Ok(())),
        Err(_) => match request(&member, Request::Status) {
            Ok(status) if status.is_daemon_running => None,
            Ok(status) => Some(Err(status.last_exit.unwrap_or_else(|| "was not started".into()))),
            Err(error) => Some(Err(format!("cannot be asked: {error:#}"))),
        },
    });
    let reason = match found {
        Some(Ok(())) => return Ok(()),
        Some(Err(reason)) => reason,
        None => format!("did not answer within {} s", DAEMON_TIMEOUT.as_secs()),
    };
    bail!("the daemon of {node} {reason}\n{}", log_end(&member.daemon_log()))
}

/// Whether somebody serves the socket. That it is there, or even takes connections, says too little: a
/// daemon listens before it looks at its data, and may end over that.
fn answers(socket: &Path) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(HTTP2_HELLO)?;
    stream.read_exact(&mut [0])
}

/// The last lines of a log, indented for an error message.
fn log_end(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let end = lines.iter().skip(lines.len().saturating_sub(N_LOG_LINES));
    match lines.is_empty() {
        true => "  its log is empty".to_owned(),
        false => end.map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n"),
    }
}

/// Ends members as if their power went, all in the same instant, and waits until they are gone.
pub(super) fn power_off(paths: &LabPaths, members: &[&str]) -> Result<()> {
    let mut handles: Vec<(&str, PidFd)> = Vec::new();
    for name in members {
        let init = paths.member(name).load_init();
        if let Some(handle) = init.map(ProcessId::open).transpose()?.flatten() {
            handles.push((name, handle));
        }
    }
    for (name, handle) in &handles {
        handle.send_signal(Signal::SIGKILL).with_context(|| format!("kill {name}"))?;
    }
    for (name, handle) in &handles {
        cgroup::thaw(&paths.member(name).cgroup);
        if !handle.wait_exit(Some(DEATH_TIMEOUT)).context("wait for the init")? {
            bail!("{name} still runs {} s after it was killed", DEATH_TIMEOUT.as_secs());
        }
    }
    Ok(())
}

/// `skep lab kill`.
pub(super) fn kill(name: &str, nodes: &[String]) -> Result<()> {
    let (paths, _lock, lab) = open(name)?;
    let nodes = find_all(&lab, nodes)?;
    let names: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
    power_off(&paths, &names)?;
    let switch = netns_of(&paths, SWITCH)?;
    for node in names {
        link::remove_cable(&switch, node)?;
        cgroup::remove(&paths.member(node).cgroup)?;
    }
    Ok(())
}

/// `skep lab kill --daemon-only`.
pub(super) fn kill_daemons(name: &str, nodes: &[String]) -> Result<()> {
    let (paths, _lock, lab) = open(name)?;
    for node in find_all(&lab, nodes)? {
        let member = paths.member(&node.name);
        running_init(&member).with_context(|| format!("node {} is down", node.name))?;
        request(&member, Request::KillDaemon)?;
    }
    Ok(())
}

/// `skep lab start`.
pub(super) fn start(name: &str, nodes: &[String]) -> Result<()> {
    let (paths, _lock, lab) = open(name)?;
    let nodes = find_all(&lab, nodes)?;
    let program = std::env::current_exe().context("find the program")?;
    for node in &nodes {
        let member = paths.member(&node.name);
        if running_init(&member).is_some() {
            request(&member, Request::StartDaemon)?;
        } else {
            // What a node leaves that ended otherwise than by `kill`.
            cgroup::remove(&member.cgroup)?;
            let program = lab.daemon_program.clone().unwrap_or_else(|| program.clone());
            boot_node(&paths, &lab, node, program)?;
        }
    }
    nodes.iter().try_for_each(|node| wait_for_daemon(&paths, &node.name))
}

/// `skep lab cut` and `skep lab heal`.
pub(super) fn plug(name: &str, nodes: &[String], cable: Cable) -> Result<()> {
    let (paths, _lock, mut lab) = open(name)?;
    find_all(&lab, nodes)?;
    let is_cut = cable == Cable::Cut;
    let switch = netns_of(&paths, SWITCH)?;
    for node in lab.nodes.iter_mut().filter(|node| nodes.contains(&node.name)) {
        node.is_cut = is_cut;
        // A node without power has no cable to change; the record counts when it starts.
        if running_init(&paths.member(&node.name)).is_some() {
            link::set_cable(&switch, &node.name, is_cut)?;
        }
    }
    paths.save(&lab)
}

fn open(name: &str) -> Result<(LabPaths, state::Lock, Lab)> {
    let paths = LabPaths::new(name);
    if !paths.exists() {
        bail!(paths.not_found());
    }
    let lock = paths.lock()?;
    let lab = paths.load()?;
    Ok((paths, lock, lab))
}

fn find_all<'a>(lab: &'a Lab, names: &[String]) -> Result<Vec<&'a Node>> {
    names.iter().map(|name| lab.node(name)).collect()
}
