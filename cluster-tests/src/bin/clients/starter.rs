//! Creates a service and watches until all of its tasks run; then removes it, and waits until they are gone.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use skep_proto::control_client::ControlClient;
use skep_proto::watch_event::Action;
use skep_proto::{CreateServiceRequest, RemoveServiceRequest, WatchEvent, WatchRequest};
use skep_runtime::clock::monotonic;
use skep_runtime::transport::{ChannelPool, Peer};
use tonic::Streaming;
use tonic::transport::Channel;

/// What matters of a task.
#[derive(Deserialize)]
struct Task {
    #[serde(rename = "ServiceID")]
    service_id: String,
    #[serde(rename = "Status")]
    status: TaskStatus,
}

#[derive(Deserialize)]
struct TaskStatus {
    #[serde(rename = "State")]
    state: String,
}

/// Prints a line of JSON for each round: the seconds until all ran, and until the service was created.
pub(crate) async fn run(pool: &ChannelPool, words: &[&str]) -> Result<()> {
    let [image, n_replicas, n_rounds, address] = words else {
        bail!("IMAGE, REPLICAS, ROUNDS or ADDRESS is missing")
    };
    let n_replicas: usize = n_replicas.parse().context("REPLICAS is no number")?;
    let n_rounds: usize = n_rounds.parse().context("ROUNDS is no number")?;
    let mut client = ControlClient::new(pool.channel(address, Peer::Manager));
    let watch = WatchRequest { kinds: vec!["task".to_owned()], ..WatchRequest::default() };
    let events = client.watch(watch).await.context("failed to watch tasks")?.into_inner();
    let mut watcher = Watcher { events, live: BTreeSet::new() };
    watcher.until_synced().await?;
    for round in 0..n_rounds {
        let name = format!("start-{}-{round}", std::process::id());
        let (created, running) =
            start(&mut client, &mut watcher, (&name, image), n_replicas).await?;
        println!(r#"{{"Created":{created},"Running":{running}}}"#);
    }
    Ok(())
}

async fn start(
    client: &mut ControlClient<Channel>,
    watcher: &mut Watcher,
    (name, image): (&str, &str),
    n_replicas: usize,
) -> Result<(f64, f64)> {
    let spec_json = format!(
        r#"{{"Name":"{name}","TaskTemplate":{{"ContainerSpec":{{"Image":"{image}"}}}},"Mode":{{"Replicated":{{"Replicas":{n_replicas}}}}}}}"#
    );
    let began = monotonic();
    let created = client.create_service(CreateServiceRequest { spec_json }).await;
    let service = created.context("the service was not created")?.into_inner();
    let created = (monotonic() - began).as_secs_f64();
    watcher.until_running(&service.id, n_replicas).await?;
    let running = (monotonic() - began).as_secs_f64();
    let removal = RemoveServiceRequest { id: service.id };
    client.remove_service(removal).await.context("the service was not removed")?;
    watcher.until_gone().await?;
    Ok((created, running))
}

/// Follows all tasks.
struct Watcher {
    events: Streaming<WatchEvent>,
    /// Tasks that there are.
    live: BTreeSet<String>,
}

impl Watcher {
    async fn next(&mut self) -> Result<WatchEvent> {
        let event = self.events.message().await.context("the watch failed")?;
        let event = event.context("the manager ended the watch")?;
        match event.action() {
            Action::Initial | Action::Changed => drop(self.live.insert(event.id.clone())),
            Action::Removed => drop(self.live.remove(&event.id)),
            Action::Synced => {}
        }
        Ok(event)
    }

    async fn until_synced(&mut self) -> Result<()> {
        while self.next().await?.action() != Action::Synced {}
        Ok(())
    }

    async fn until_running(&mut self, service_id: &str, n_replicas: usize) -> Result<()> {
        let mut running = BTreeSet::new();
        while running.len() < n_replicas {
            let event = self.next().await?;
            if event.json.is_empty() {
                continue;
            }
            let task: Task = serde_json::from_str(&event.json).context("a task cannot be read")?;
            if task.service_id == service_id && task.status.state == "running" {
                running.insert(event.id);
            }
        }
        Ok(())
    }

    async fn until_gone(&mut self) -> Result<()> {
        while !self.live.is_empty() {
            self.next().await?;
        }
        Ok(())
    }
}
