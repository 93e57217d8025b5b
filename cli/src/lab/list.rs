//! `skep lab ls` and `skep lab logs`.
//!
//! The state of a node is observed, not recorded: `up`, `cut` (runs without its cable),
//! `daemon-down` (its init and containers run, its daemon does not) or `down`.

use std::fs::File;
use std::io::{self, ErrorKind, Write};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use super::control::{Request, request};
use super::node::running_init;
use super::state::{Lab, LabPaths, Node, all_names};
use crate::format::{View, hidden, plain_cell, render, shown};

/// The fields of a node, for `--format`.
const VIEW: View = View {
    columns: &[
        shown("NAME", "Name"),
        shown("ADDRESS", "Address"),
        shown("ROLE", "Role"),
        shown("STATE", "State"),
        hidden("LAB", "Lab"),
    ],
    cell: plain_cell,
};

/// Arguments of `skep lab ls`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// `json`, one object a line, or a template such as '{{.Name}} {{.Address}}'.
    #[arg(long)]
    format: Option<String>,
    /// The nodes of every lab.
    #[arg(long)]
    all: bool,
}

/// Runs `skep lab ls`.
pub(super) fn run(name: &str, args: &ListArgs) -> Result<()> {
    let names = if args.all { all_names() } else { vec![name.to_owned()] };
    let mut rows = Vec::new();
    for name in names {
        let paths = LabPaths::new(&name);
        let lab = paths.load()?;
        rows.extend(lab.nodes.iter().map(|node| row(&paths, &lab, node)));
    }
    let text = render(&VIEW, &rows, args.format.as_deref(), false)?;
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        done => done.context("write"),
    }
}

fn row(paths: &LabPaths, lab: &Lab, node: &Node) -> Value {
    let member = paths.member(&node.name);
    let is_daemon_running =
        || request(&member, Request::Status).is_ok_and(|status| status.is_daemon_running);
    let state = match running_init(&member) {
        None => "down",
        Some(_) if !is_daemon_running() => "daemon-down",
        Some(_) if node.is_cut => "cut",
        Some(_) => "up",
    };
    json!({
        "Lab": lab.name,
        "Name": node.name,
        "Address": lab.address(node.number),
        "Role": node.role,
        "State": state,
    })
}

/// Runs `skep lab logs`.
pub(super) fn print_log(name: &str, node: &str) -> Result<()> {
    let paths = LabPaths::new(name);
    paths.load()?.node(node)?;
    let path = paths.member(node).daemon_log();
    let mut log = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    match io::copy(&mut log, &mut io::stdout()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        done => done.map(drop).context("print the log"),
    }
}
