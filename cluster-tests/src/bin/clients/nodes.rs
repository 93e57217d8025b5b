//! Follows the states of nodes, so that none that lasts for a moment only is missed.

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use skep_proto::WatchRequest;
use skep_proto::control_client::ControlClient;
use skep_proto::watch_event::Action;
use skep_runtime::transport::{ChannelPool, Peer};

/// What matters of a node.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    status: Status,
    description: Description,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Status {
    state: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Description {
    hostname: String,
}

/// Prints `HOSTNAME STATE` for each change of a node, and `synced` when the nodes that there are have been printed.
pub(crate) async fn follow(pool: &ChannelPool, words: &[&str]) -> Result<()> {
    let [address] = words else { bail!("ADDRESS is missing") };
    let mut client = ControlClient::new(pool.channel(address, Peer::Manager));
    let watch = WatchRequest { kinds: vec!["node".to_owned()], ..WatchRequest::default() };
    let mut events = client.watch(watch).await.context("failed to watch nodes")?.into_inner();
    while let Some(event) = events.message().await.context("the watch failed")? {
        match event.action() {
            Action::Synced => println!("synced"),
            Action::Initial | Action::Changed => {
                let node: Node =
                    serde_json::from_str(&event.json).context("a node cannot be read")?;
                println!("{} {}", node.description.hostname, node.status.state);
            }
            Action::Removed => {}
        }
    }
    Ok(())
}
