//! `skep swarm backup` and `restore`: a swarm in one file. Docker has none: there one copies directories.

use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::Args;
use skep_manager::consensus::backup::read_head;
use skep_proto::restore_request::Part;
use skep_proto::{BackupRequest, RestoreHeader, RestoreRequest};

use super::swarm::{AddressArgs, tell_begun};
use super::swarm_lock::read_key;
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// Bytes in one message.
const CHUNK_BYTES: usize = 1 << 20;

/// `skep swarm backup`
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// The file to write, or - for standard output
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// `skep swarm restore`
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    address: AddressArgs,
    /// A file that `skep swarm backup` wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(super) async fn backup(args: &BackupArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let bytes = fetch(client).await?;
    let head = read_head(&bytes).context("the daemon sent no backup")?;
    if args.file == Path::new("-") {
        if std::io::stdout().is_terminal() {
            bail!("a backup is no text for a terminal: name a file, or send it to a program");
        }
        ui.data(&bytes)?;
    } else {
        write(&args.file, &bytes)
            .with_context(|| format!("failed to write {}", args.file.display()))?;
    }
    let version = head.version;
    ui.note(format_args!("Backup of swarm {} at version {version}.", head.cluster_id))?;
    ui.note(match head.is_locked() {
        true => {
            "It is sealed with the unlock key of today (skep swarm unlock-key): keep that key as long as the file, and elsewhere."
        }
        false => {
            "Who can read it has the whole swarm, with its secrets and the key of its authority: keep it where only you can read it. With autolock on (skep swarm update --autolock), backups are sealed with the unlock key."
        }
    })?;
    Ok(())
}

/// All of it: a file that ends early is none.
async fn fetch(client: &Client) -> Result<Vec<u8>> {
    let mut chunks = client.control().backup(BackupRequest {}).await.map_err(Refusal)?.into_inner();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.message().await.map_err(Refusal)? {
        bytes.extend_from_slice(&chunk.data);
    }
    Ok(bytes)
}

/// Replaces the file by one that only its owner may read, once that is on the disk.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    let written = (|| {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&part)?;
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    })();
    if written.is_err() {
        drop(fs::remove_file(&part)); // It may never have been made.
    }
    written
}

pub(super) async fn restore(args: RestoreArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let path = &args.file;
    let bytes = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
    // The daemon reads all of it; here it only tells whether to ask for the key.
    let head = read_head(&bytes).with_context(|| format!("{} is not used", path.display()))?;
    let unlock_key = if head.is_locked() { read_key(ui)? } else { String::new() };
    let AddressArgs { advertise_addr, listen_addr, availability } = args.address;
    let header = RestoreHeader { advertise_addr, listen_addr, unlock_key, availability };
    let mut rest = Bytes::from(bytes);
    let mut parts = vec![Part::Header(header)];
    while !rest.is_empty() {
        parts.push(Part::Data(rest.split_to(rest.len().min(CHUNK_BYTES))));
    }
    let messages = parts.into_iter().map(|part| RestoreRequest { part: Some(part) });
    let restored = client.machine().restore(futures::stream::iter(messages)).await;
    tell_begun(&restored.map_err(Refusal)?.into_inner(), ui)
}
