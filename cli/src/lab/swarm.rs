//! Makes one swarm of a lab's daemons, by the commands a user would type.
//!
//! Workers join side by side. Managers join one after another: each of them changes the Raft
//! group, and a group takes one change at a time.

use std::io;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::poll::poll_until;
use super::state::{Lab, Node, Role};

/// The port of all traffic between nodes.
const PORT: u16 = 2377;
/// A join that was accepted is followed by a session within a second or two.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Initialises the swarm on the first node and has the others join; returns when all are ready.
pub(super) fn form(lab: &Lab) -> Result<()> {
    let (first, others) = lab.nodes.split_first().context("a lab has a node")?;
    let address = lab.address(first.number).to_string();
    skep(lab, first, &["swarm", "init", "--advertise-addr", &address])?;
    let token = |role: Role| -> Result<String> {
        let output = skep(lab, first, &["swarm", "join-token", "-q", role.as_str()])?;
        Ok(output.trim().to_owned())
    };
    let (manager_token, worker_token) = (token(Role::Manager)?, token(Role::Worker)?);
    let remote = format!("{address}:{PORT}");
    let join = |node: &Node| -> Result<()> {
        let token = match node.role {
            Role::Manager => &manager_token,
            Role::Worker => &worker_token,
        };
        let own = lab.address(node.number).to_string();
        skep(lab, node, &["swarm", "join", "--token", token, "--advertise-addr", &own, &remote])?;
        eprintln!("  {} joined as {}", node.name, node.role);
        Ok(())
    };
    let (managers, workers): (Vec<&Node>, Vec<&Node>) =
        others.iter().partition(|node| node.role == Role::Manager);
    std::thread::scope(|scope| {
        let joins: Vec<_> =
            workers.into_iter().map(|node| scope.spawn(move || join(node))).collect();
        let mut done = managers.into_iter().try_for_each(join);
        for thread in joins {
            let joined = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            done = done.and(joined);
        }
        done
    })?;
    wait_until_ready(lab, first)
}

/// A line of `skep node ls --format json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NodeLine {
    hostname: String,
    status: String,
}

fn wait_until_ready(lab: &Lab, first: &Node) -> Result<()> {
    let mut last_seen = String::new();
    let ready = poll_until(READY_TIMEOUT, || -> Option<Result<()>> {
        match list_nodes(lab, first) {
            Ok((text, n_ready)) if n_ready < lab.nodes.len() => last_seen = text,
            Ok(_) => return Some(Ok(())),
            Err(error) => return Some(Err(error)),
        }
        None
    });
    ready.unwrap_or_else(|| {
        let n_nodes = lab.nodes.len();
        let seconds = READY_TIMEOUT.as_secs();
        bail!("not all {n_nodes} nodes were ready within {seconds} s; last seen:\n{last_seen}")
    })
}

fn list_nodes(lab: &Lab, first: &Node) -> Result<(String, usize)> {
    let text = skep(lab, first, &["node", "ls", "--format", "json"])?;
    let mut n_ready = 0;
    for line in text.lines() {
        let node: NodeLine =
            serde_json::from_str(line).with_context(|| format!("unexpected line {line:?}"))?;
        let is_ours = lab.nodes.iter().any(|ours| ours.name == node.hostname);
        n_ready += usize::from(is_ours && node.status == "Ready");
    }
    Ok((text, n_ready))
}

/// Runs the client on a node and gives what it printed.
fn skep(lab: &Lab, node: &Node, args: &[&str]) -> Result<String> {
    let output = exec(lab, node, args).context("run the client")?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        // Tokens are secrets: only the subcommand is named.
        let command = args[..2.min(args.len())].join(" ");
        bail!("`skep {command}` on {} failed: {}", node.name, complaint.trim());
    }
    String::from_utf8(output.stdout).context("the client's output is not text")
}

fn exec(lab: &Lab, node: &Node, args: &[&str]) -> io::Result<Output> {
    // A process of its own: entering a node's namespaces needs a single thread.
    let mut command = Command::new("/proc/self/exe");
    command.args(["lab", "--name", &lab.name, "exec", &node.name, "--", "skep"]).args(args);
    command.stdin(Stdio::null()).output()
}
