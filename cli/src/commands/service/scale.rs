//! `skep service scale` and `service rm`.

use anyhow::{Result, anyhow};
use clap::Args;
use skep_common::Service;
use skep_proto::RemoveServiceRequest;

use super::super::Failures;
use super::flags::WaitFlags;
use super::mode::set_replicas;
use super::update::change;
use super::{Waiting, converge};
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// `skep service scale SERVICE=REPLICAS [SERVICE=REPLICAS...]`
#[derive(Debug, Args)]
pub(crate) struct ScaleArgs {
    #[command(flatten)]
    wait: WaitFlags,
    /// Services and how many tasks each shall have
    #[arg(required = true, value_name = "SERVICE=REPLICAS", value_parser = parse_scale)]
    scales: Vec<Scale>,
}

/// One `SERVICE=REPLICAS`.
#[derive(Debug, Clone)]
struct Scale {
    service: String,
    replicas: u64,
}

fn parse_scale(text: &str) -> Result<Scale, String> {
    let (service, number) = text.split_once('=').ok_or_else(|| {
        format!("invalid scale specifier '{text}': scale specifier must be SERVICE=REPLICAS")
    })?;
    let replicas =
        number.parse().map_err(|_| format!("{service}: invalid replicas value {number}"))?;
    Ok(Scale { service: service.into(), replicas })
}

/// `skep service rm SERVICE [SERVICE...]`
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Names or ids of services
    #[arg(required = true, value_name = "SERVICE")]
    services: Vec<String>,
}

pub(super) async fn run(args: &ScaleArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    let mut scaled: Vec<(&Scale, Waiting)> = Vec::new();
    for scale in &args.scales {
        let result =
            change(client, &scale.service, ui, |spec| match set_replicas(spec, scale.replicas) {
                true => Ok(()),
                false => {
                    Err(anyhow!("scale can only be used with replicated or replicated-job mode"))
                }
            });
        match result.await {
            Ok(waiting) => {
                ui.line(format_args!("{} scaled to {}", scale.service, scale.replicas))?;
                scaled.push((scale, waiting));
            }
            Err(error) => failures.add(&anyhow!("{}: {error:#}", scale.service)),
        }
    }
    for (scale, waiting) in scaled {
        if let Err(error) = converge(waiting, &args.wait, client, ui).await {
            failures.add(&anyhow!("{}: {error:#}", scale.service));
        }
    }
    failures.finish()
}

pub(super) async fn rm(args: &RmArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    for reference in &args.services {
        match remove(client, reference).await {
            Ok(()) => ui.line(reference)?,
            Err(error) => failures.add(&error),
        }
    }
    failures.finish()
}

async fn remove(client: &Client, reference: &str) -> Result<()> {
    let service: Service = client.get("service", reference).await?;
    let request = RemoveServiceRequest { id: service.id.to_string() };
    client.control().remove_service(request).await.map_err(Refusal)?;
    Ok(())
}
