//! `skep debug write`: load for tests of consensus. Services without replicas cost nothing but their
//! entries in the log.

use anyhow::{Result, bail};
use clap::Args;
use futures::StreamExt as _;
use skep_common::spec::{ContainerSpec, Replicated, ServiceMode, ServiceSpec, TaskSpec};
use skep_proto::CreateServiceRequest;

use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// `skep debug write [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct WriteArgs {
    /// How many services
    #[arg(long)]
    count: usize,
    /// How many at once
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// What their names begin with
    #[arg(long, default_value = "write")]
    name: String,
    /// Print the name of each acknowledged one as soon as it is
    #[arg(long)]
    print: bool,
}

/// Writes, and says how many were acknowledged. Nothing is tried twice.
pub(super) async fn run(args: WriteArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let writes = (0..args.count).map(|number| {
        let name = format!("{}-{number}", args.name);
        let client = client.clone();
        async move {
            let spec_json =
                serde_json::to_string(&spec(&name)).expect("a spec has no failing parts");
            let answer = client.control().create_service(CreateServiceRequest { spec_json }).await;
            (name, answer.map(drop).map_err(Refusal))
        }
    });
    let mut answers = futures::stream::iter(writes).buffer_unordered(args.concurrency.max(1));
    let (mut n_acknowledged, mut last_refusal) = (0usize, None);
    while let Some((name, answer)) = answers.next().await {
        match answer {
            Ok(()) => {
                n_acknowledged += 1;
                if args.print {
                    ui.line(&name)?;
                }
            }
            Err(refusal) => last_refusal = Some(refusal),
        }
    }
    ui.note(format_args!("{n_acknowledged} of {} writes acknowledged", args.count))?;
    match last_refusal {
        Some(refusal) => bail!(refusal),
        None => Ok(()),
    }
}

fn spec(name: &str) -> ServiceSpec {
    let container = ContainerSpec { image: "scratch".into(), ..ContainerSpec::default() };
    ServiceSpec {
        name: name.to_owned(),
        task_template: TaskSpec { container_spec: Some(container), ..TaskSpec::default() },
        mode: Some(ServiceMode {
            replicated: Some(Replicated { replicas: Some(0) }),
            ..ServiceMode::default()
        }),
        ..ServiceSpec::default()
    }
}
