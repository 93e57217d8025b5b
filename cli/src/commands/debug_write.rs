//! `skep debug write`: load for tests of consensus that notices a lost write.
//!
//! Each lane counts in a label of a service of its own, which has no tasks. An update names the version
//! that the lane's last acknowledgement gave, so that a lost write makes the next one out of sequence;
//! and whenever a lane reads again, what it finds must not be behind what was acknowledged.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use skep_common::Service;
use skep_common::spec::{ContainerSpec, Labels, Replicated, ServiceMode, ServiceSpec, TaskSpec};
use skep_proto::{CreateServiceRequest, GetRequest, UpdateServiceRequest};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// The label that a lane counts in.
const LABEL: &str = "count";
/// A lane gives up when nothing was acknowledged for this long: longer than any election.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between attempts while the swarm has no leader.
const PAUSE: Duration = Duration::from_millis(50);
/// Acknowledgements on their way to the printer.
const QUEUE: usize = 256;

/// `skep debug write [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct WriteArgs {
    /// How many writes in all
    #[arg(long)]
    count: u64,
    /// How many lanes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    concurrency: u64,
    /// What the lanes' services are named after
    #[arg(long, default_value = "write")]
    name: String,
    /// Print `SERVICE COUNT` for each write as soon as it is acknowledged
    #[arg(long)]
    print: bool,
}

/// Writes, and says how many were acknowledged.
pub(super) async fn run(args: WriteArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let lanes = args.concurrency.min(args.count.max(1));
    let (acknowledged, mut written) = mpsc::channel(QUEUE);
    let lane = |number: u64| {
        let share = args.count / lanes + u64::from(number < args.count % lanes);
        let name = format!("{}-{number}", args.name);
        Lane { client, name, acknowledged: acknowledged.clone() }.run(share)
    };
    let writing = futures::future::try_join_all((0..lanes).map(lane));
    let print = async {
        let mut n_acknowledged = 0u64;
        while let Some((name, count)) = written.recv().await {
            n_acknowledged += 1;
            if args.print {
                ui.line(format_args!("{name} {count}"))?;
            }
        }
        anyhow::Ok(n_acknowledged)
    };
    let writing = async {
        let result = writing.await;
        drop(acknowledged);
        result
    };
    let (result, printed) = tokio::join!(writing, print);
    let n_acknowledged = printed?;
    if args.print {
        ui.note(format_args!("{n_acknowledged} of {} writes acknowledged", args.count))?;
    } else {
        ui.line(format_args!("{n_acknowledged} of {} writes acknowledged", args.count))?;
    }
    result.map(drop)
}

/// One service and its counter.
struct Lane<'a> {
    client: &'a Client,
    name: String,
    acknowledged: mpsc::Sender<(String, u64)>,
}

impl Lane<'_> {
    async fn run(self, share: u64) -> Result<()> {
        let mut held = self.create().await?;
        let first = count_of(&held.spec);
        for count in first + 1..=first + share {
            self.write(&mut held, count).await?;
            // The printer has gone only where its output has.
            let _ = self.acknowledged.send((self.name.clone(), count)).await;
        }
        Ok(())
    }

    /// Makes the service, or takes up the one that an earlier run made.
    async fn create(&self) -> Result<Service> {
        let spec_json =
            serde_json::to_string(&spec(&self.name)).context("a spec has no failing parts")?;
        self.patiently(|| async {
            let request = CreateServiceRequest { spec_json: spec_json.clone() };
            match self.client.control().create_service(request).await {
                Err(status) if status.code() != Code::AlreadyExists => Err(status),
                _ => Ok(()),
            }
        })
        .await?;
        self.read().await
    }

    async fn read(&self) -> Result<Service> {
        let document = self
            .patiently(|| async {
                let request = GetRequest { kind: "service".into(), reference: self.name.clone() };
                Ok(self.client.control().get(request).await?.into_inner())
            })
            .await?;
        serde_json::from_str(&document.json).context("the daemon's service cannot be read")
    }

    /// Raises the counter to `count`, once.
    async fn write(&self, held: &mut Service, count: u64) -> Result<()> {
        loop {
            let mut spec = held.spec.clone();
            spec.labels.get_or_insert_default().insert(LABEL.into(), count.to_string());
            let request = UpdateServiceRequest {
                id: held.id.to_string(),
                version: held.meta.version.index,
                spec_json: serde_json::to_string(&spec).context("a spec has no failing parts")?,
                rollback: false,
                rollback_to: 0,
            };
            match self.client.control().update_service(request).await {
                Ok(answer) => {
                    held.spec = spec;
                    held.meta.version.index = answer.into_inner().version;
                    return Ok(());
                }
                Err(status) if is_passing(&status) => {}
                Err(status) => return Err(Refusal(status).into()),
            }
            // Lost with its leader, or written without a word: the store tells.
            *held = self.read().await?;
            match count_of(&held.spec) {
                found if found == count => return Ok(()),
                found if found + 1 == count => {}
                found => bail!(
                    "{}: {} was acknowledged, and the store has {found}: a write was lost",
                    self.name,
                    count - 1
                ),
            }
        }
    }

    /// Asks again while there is no leader.
    async fn patiently<T, F>(&self, ask: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let asking = async {
            loop {
                match ask().await {
                    Err(status) if is_passing(&status) => tokio::time::sleep(PAUSE).await,
                    other => return other,
                }
            }
        };
        let answer = tokio::time::timeout(PATIENCE, asking).await;
        Ok(answer
            .with_context(|| format!("{}: no answer within {PATIENCE:?}", self.name))?
            .map_err(Refusal)?)
    }
}

fn is_passing(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Aborted | Code::DeadlineExceeded)
}

fn count_of(spec: &ServiceSpec) -> u64 {
    let count = spec.labels.as_ref().and_then(|labels| labels.get(LABEL));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn spec(name: &str) -> ServiceSpec {
    let container = ContainerSpec { image: "scratch".into(), ..ContainerSpec::default() };
    ServiceSpec {
        name: name.to_owned(),
        labels: Some(Labels::from([(LABEL.to_owned(), "0".to_owned())])),
        task_template: TaskSpec { container_spec: Some(container), ..TaskSpec::default() },
        mode: Some(ServiceMode {
            replicated: Some(Replicated { replicas: Some(0) }),
            ..ServiceMode::default()
        }),
        ..ServiceSpec::default()
    }
}
