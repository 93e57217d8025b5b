//! Clients of the managers for benchmarks of the control plane, which are built as the daemon is.
//!
//! ```text
//! skep-clients write skep DATA_DIR WRITERS SECONDS ADDRESS…   services, with the certificate of that node
//! skep-clients write etcd WRITERS SECONDS ADDRESS…            the same bytes as values, by etcd's JSON gateway
//! skep-clients start DATA_DIR IMAGE REPLICAS ROUNDS ADDRESS   a service, until all of its tasks run
//! skep-clients nodes DATA_DIR ADDRESS                         nodes whose state changes, until it is ended
//! ```
//!
//! Results are lines of JSON. What fails ends the program with an error.

mod nodes;
mod starter;
mod writers;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use skep_runtime::identity::{Files, Stored};
use skep_runtime::transport::{ChannelPool, Tls};

const USAGE: &str = "usage: skep-clients write skep DATA_DIR WRITERS SECONDS ADDRESS...
       skep-clients write etcd WRITERS SECONDS ADDRESS...
       skep-clients start DATA_DIR IMAGE REPLICAS ROUNDS ADDRESS
       skep-clients nodes DATA_DIR ADDRESS";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = runtime.context("failed to start the runtime").and_then(|runtime| {
        runtime.block_on(async {
            match &words[..] {
                ["write", "skep", data_dir, rest @ ..] => {
                    writers::to_skep(channels(data_dir)?, rest).await
                }
                ["write", "etcd", rest @ ..] => writers::to_etcd(rest).await,
                ["start", data_dir, rest @ ..] => starter::run(&channels(data_dir)?, rest).await,
                ["nodes", data_dir, rest @ ..] => nodes::follow(&channels(data_dir)?, rest).await,
                _ => bail!("{USAGE}"),
            }
        })
    });
    if let Err(error) = result {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Connections that show the certificate of a node.
fn channels(data_dir: &str) -> Result<ChannelPool> {
    let stored = Files::in_data_dir(Path::new(data_dir)).load();
    let stored = stored.context("failed to read the node's certificate")?;
    let credentials = match stored {
        Stored::Open(credentials, _) => *credentials,
        Stored::Nothing => bail!("{data_dir} has no certificate"),
        Stored::Locked(_) => bail!("the key in {data_dir} is locked: unlock the manager first"),
    };
    Ok(ChannelPool::new(Tls::new(credentials).context("failed to set up TLS")?))
}
