//! `skep image`: archives into the swarm's image store. Wording: docker/cli `cli/command/image`.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::{Args, Subcommand};
use futures::StreamExt as _;
use serde_json::{Value, json};
use skep_common::{Image, Timestamp};
use skep_proto::load_image_request::Part;
use skep_proto::{LoadImageHeader, LoadImageRequest, LoadImageResponse};
use tokio::fs::File;
use tokio_util::io::ReaderStream;

use crate::client::{Client, Refusal};
use crate::format::human::{bytes_decimal, duration, familiar_image, natural_order, short_id};
use crate::format::{View, hidden, plain_cell, render, shown};
use crate::ui::Ui;

/// Bytes of an archive a message.
const CHUNK_BYTES: usize = 1 << 20;

/// Manage images
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Import the contents from a tarball to create a filesystem image
    Import(ImportArgs),
    /// Load an image from a tar archive or STDIN
    Load(LoadArgs),
    /// List images
    #[command(visible_alias = "list")]
    Ls(LsArgs),
}

/// `skep image load [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Read from tar archive file, instead of STDIN
    #[arg(long, short, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Suppress the load output
    #[arg(long, short)]
    quiet: bool,
}

/// `skep image import [OPTIONS] FILE|- NAME[:TAG]`
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Apply Dockerfile instruction to the created image
    #[arg(long, short, value_name = "INSTRUCTION")]
    change: Vec<String>,
    /// The tar archive of a root file system, or - for standard input
    file: PathBuf,
    /// Name of the image
    #[arg(value_name = "NAME[:TAG]")]
    name: String,
}

/// `skep image ls [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Do not truncate output
    #[arg(long)]
    no_trunc: bool,
    /// Only show image IDs
    #[arg(long, short)]
    quiet: bool,
}

pub(super) async fn run(command: Command, client: &Client, ui: &mut Ui) -> Result<()> {
    match command {
        Command::Import(args) => import(args, client, ui).await,
        Command::Load(args) => load(args, client, ui).await,
        Command::Ls(args) => ls(&args, client, ui).await,
    }
}

/// Sends an archive; a file that breaks off while it is read is the error that counts.
async fn send(client: &Client, header: LoadImageHeader, path: &Path) -> Result<LoadImageResponse> {
    let file = match path.to_str() {
        Some("-") => {
            std::io::stdin().as_fd().try_clone_to_owned().map(|fd| File::from_std(fd.into()))
        }
        _ => File::open(path).await,
    };
    let file = file.with_context(|| format!("failed to open {}", path.display()))?;
    let failure: Arc<Mutex<Option<std::io::Error>>> = Arc::default();
    let sink = Arc::clone(&failure);
    let keep = move |chunk: std::io::Result<Bytes>| {
        let data = chunk.map_err(|error| {
            *sink.lock().expect("no holder of this lock panics") = Some(error);
        });
        std::future::ready(data.ok().map(|data| part(Part::Data(data))))
    };
    // The first failure ends the stream: what it said stays in `failure`.
    let chunks =
        ReaderStream::with_capacity(file, CHUNK_BYTES).scan((), move |(), chunk| keep(chunk));
    let messages = futures::stream::iter([part(Part::Header(header))]).chain(chunks);
    let answer = client.machine().load_image(messages).await;
    if let Some(error) = failure.lock().expect("no holder of this lock panics").take() {
        return Err(error).with_context(|| format!("failed to read {}", path.display()));
    }
    Ok(answer.map_err(Refusal)?.into_inner())
}

fn part(part: Part) -> LoadImageRequest {
    LoadImageRequest { part: Some(part) }
}

async fn load(args: LoadArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    use std::io::IsTerminal as _;
    if args.input.is_none() && std::io::stdin().is_terminal() {
        bail!("requested load from stdin, but stdin is empty");
    }
    let path = args.input.unwrap_or_else(|| "-".into());
    let answer = send(client, LoadImageHeader::default(), &path).await?;
    if args.quiet {
        return Ok(());
    }
    for image in answer.images {
        for name in &image.names {
            ui.line(format_args!("Loaded image: {}", familiar_image(name)))?;
        }
        if image.names.is_empty() {
            ui.line(format_args!("Loaded image ID: {}", image.digest))?;
        }
    }
    Ok(())
}

async fn import(args: ImportArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let header = LoadImageHeader { import: true, name: args.name, changes: args.change };
    let answer = send(client, header, &args.file).await?;
    for image in answer.images {
        ui.line(image.digest)?;
    }
    Ok(())
}

const VIEW: View = View {
    columns: &[
        shown("REPOSITORY", "Repository"),
        shown("TAG", "Tag"),
        shown("IMAGE ID", "ID"),
        shown("CREATED", "CreatedSince"),
        shown("SIZE", "Size"),
        hidden("DIGEST", "Digest"),
        hidden("CREATED AT", "CreatedAt"),
        hidden("NODES", "Nodes"),
    ],
    cell: plain_cell,
};

async fn ls(args: &LsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut images: Vec<Image> = client.list_all("image").await?;
    images.sort_by(|a, b| natural_order(&a.name, &b.name));
    let now = (ui.now)();
    let rows: Vec<Value> = images.iter().map(|image| row(image, args.no_trunc, now)).collect();
    Ok(ui.data(render(&VIEW, &rows, args.format.as_deref(), args.quiet)?)?)
}

fn row(image: &Image, is_whole: bool, now: Timestamp) -> Value {
    let name = familiar_image(&image.name);
    let (repository, tag) = match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name.as_str(), "<none>"),
    };
    let created = image.created.as_deref().and_then(|text| text.parse::<Timestamp>().ok());
    json!({
        "Repository": repository,
        "Tag": tag,
        "ID": if is_whole { &image.digest } else { short_id(&image.digest) },
        "CreatedSince": created.map_or("N/A".to_owned(), |created| format!("{} ago", duration(now.since(created)))),
        "CreatedAt": image.created.clone().unwrap_or_default(),
        "Size": bytes_decimal(image.size),
        "Digest": image.digest,
        "Nodes": image.holders.len(),
    })
}
