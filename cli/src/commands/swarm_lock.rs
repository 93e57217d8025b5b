//! `skep swarm unlock` and `unlock-key`: managers that start locked.

use std::io::{BufRead as _, IsTerminal as _};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use skep_proto::{UnlockKeyRequest, UnlockRequest, UpdateSwarmRequest};

use super::swarm_update::change;
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// `skep swarm unlock`
#[derive(Debug, Args)]
pub(crate) struct UnlockArgs {}

/// `skep swarm unlock-key`
#[derive(Debug, Args)]
pub(crate) struct UnlockKeyArgs {
    /// Rotate unlock key
    #[arg(long)]
    rotate: bool,
    /// Only display token
    #[arg(long, short)]
    quiet: bool,
}

pub(super) async fn unlock(_: &UnlockArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let key = read_key(ui)?;
    client.machine().unlock(UnlockRequest { key }).await.map_err(Refusal)?;
    Ok(())
}

/// A line of standard input; on a terminal it is asked for, and not shown.
pub(super) fn read_key(ui: &mut Ui) -> Result<String> {
    let stdin = std::io::stdin();
    let mut key = String::new();
    if !stdin.is_terminal() {
        stdin.lock().read_line(&mut key).context("failed to read the unlock key")?;
        return Ok(key.trim().to_owned());
    }
    ui.message("Please enter unlock key: ")?;
    let shown = tcgetattr(&stdin).context("failed to ask the terminal")?;
    let mut hidden = shown.clone();
    hidden.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&stdin, SetArg::TCSAFLUSH, &hidden).context("failed to hide what is typed")?;
    let read = stdin.lock().read_line(&mut key);
    tcsetattr(&stdin, SetArg::TCSANOW, &shown).context("failed to show what is typed again")?;
    ui.note("")?;
    read.context("failed to read the unlock key")?;
    Ok(key.trim().to_owned())
}

pub(super) async fn unlock_key(args: &UnlockKeyArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    if args.rotate {
        let request = UpdateSwarmRequest { rotate_unlock_key: true, ..Default::default() };
        change(client, |_| {}, request).await?;
        if !args.quiet {
            ui.line("Successfully rotated manager unlock key.\n")?;
        }
    }
    let key = ask(client).await?;
    if key.is_empty() {
        bail!("no unlock key is set: managers do not start locked");
    }
    match args.quiet {
        true => ui.line(key)?,
        false => tell(&key, ui)?,
    }
    Ok(())
}

/// The key, empty where there is none.
pub(super) async fn ask(client: &Client) -> Result<String> {
    let answer = client.control().unlock_key(UnlockKeyRequest {}).await.map_err(Refusal)?;
    Ok(answer.into_inner().key)
}

/// Says what the key is for.
pub(super) fn tell(key: &str, ui: &mut Ui) -> Result<()> {
    ui.line(format_args!(
        "To unlock a swarm manager after it restarts, run the `skep swarm unlock`\ncommand and provide the following key:\n\n    {key}\n\nKeep this key where the managers are not: without it, none of them can be\nrestarted.\n"
    ))?;
    Ok(())
}
