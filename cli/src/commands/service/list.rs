//! `skep service ls`, and the rows of `stack services`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use skep_common::object::Slot;
use skep_common::spec::{ModeKind, PortConfig, PortProtocol, PublishMode};
use skep_common::{Service, ServiceId, Task, TaskState};

use super::super::filter::{self, Filter, Filters};
use super::super::progress_job::Job;
use crate::client::Client;
use crate::format::human::{familiar_image, natural_order};
use crate::format::{View, hidden, plain_cell, render, shown};
use crate::ui::Ui;

/// Columns of a list of services.
pub(in super::super) const VIEW: View = View {
    columns: &[
        shown("ID", "ID"),
        shown("NAME", "Name"),
        shown("MODE", "Mode"),
        shown("REPLICAS", "Replicas"),
        shown("IMAGE", "Image"),
        shown("PORTS", "Ports"),
        hidden("CONDITIONS", "Conditions"),
    ],
    cell: plain_cell,
};

/// `skep service ls [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Filter output based on conditions provided
    #[arg(long, short, value_parser = filter::parse, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Only display IDs
    #[arg(long, short)]
    quiet: bool,
}

pub(super) async fn run(args: &LsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let filters = Filters::new(&args.filter, &["id", "name", "label", "mode"])?;
    let mut services: Vec<Service> = client.list_all("service").await?;
    services.retain(|service| {
        filters.is_match("id", |id| service.id.to_string().starts_with(id))
            && filters.is_match("name", |name| service.spec.name.starts_with(name))
            && filters.is_match("mode", |mode| mode_word(service) == mode)
            && filters.match_labels("label", service.spec.labels.as_ref())
    });
    let tasks: Vec<Task> = client.list_all("task").await?;
    let conditions = if args.quiet { Vec::new() } else { condition_notes(&services) };
    ui.data(render(&VIEW, &rows(services, &tasks), args.format.as_deref(), args.quiet)?)?;
    show_notes(&conditions, ui)
}

/// What keeps services from being reached, a line each.
pub(in super::super) fn condition_notes(services: &[Service]) -> Vec<String> {
    let notes = services.iter().flat_map(|service| {
        let name = &service.spec.name;
        service.conditions.iter().map(move |one| format!("WARNING: {name}: {}", one.message))
    });
    notes.collect()
}

/// Shows them beside the list, which is data.
pub(in super::super) fn show_notes(notes: &[String], ui: &mut Ui) -> Result<()> {
    notes.iter().try_for_each(|note| Ok(ui.note(note)?))
}

/// A row per service, by name.
pub(in super::super) fn rows(mut services: Vec<Service>, tasks: &[Task]) -> Vec<Value> {
    services.sort_by(|a, b| natural_order(&a.spec.name, &b.spec.name));
    let mut by_service: BTreeMap<ServiceId, Vec<&Task>> = BTreeMap::new();
    for task in tasks {
        by_service.entry(task.service_id).or_default().push(task);
    }
    let row = |service: &Service| {
        let tasks = by_service.get(&service.id).map(Vec::as_slice).unwrap_or_default();
        let messages: Vec<&str> =
            service.conditions.iter().map(|one| one.message.as_str()).collect();
        json!({
            "ID": service.id.short(),
            "Name": service.spec.name,
            "Mode": mode_word(service),
            "Replicas": replicas(service, tasks),
            "Image": familiar_image(&service.spec.container().image),
            "Ports": ports(&service.endpoint.ports),
            "Conditions": messages.join("; "),
        })
    };
    services.iter().map(row).collect()
}

/// The mode as lists show it.
fn mode_word(service: &Service) -> &'static str {
    service.spec.mode_kind().map_or("replicated", ModeKind::name)
}

/// How many tasks run and how many shall; of a job also how many of all have completed.
/// Source: docker/cli `service/formatter.go`, `Replicas`.
fn replicas(service: &Service, tasks: &[&Task]) -> String {
    if let Some(job) = Job::of(service, tasks.iter().copied()) {
        let (running, concurrent) = (job.n_running(), job.concurrent());
        return format!("{running}/{concurrent} ({}/{} completed)", job.n_done(), job.total());
    }
    let live = || tasks.iter().filter(|task| task.desired_state.wants_run());
    let runs =
        |task: &&&Task| task.desired_state.may_start() && task.status.state == TaskState::Running;
    let running = live().filter(runs).count();
    // Without a number, the nodes that have one that is to run.
    let slots = || live().map(|task| task.slot_key()).collect::<BTreeSet<Slot>>().len() as u64;
    let desired = service.spec.replicas().unwrap_or_else(slots);
    let placement = service.spec.task_template.placement.as_ref();
    match placement.and_then(|placement| placement.max_replicas) {
        Some(max) if max > 0 => format!("{running}/{desired} (max {max} per node)"),
        _ => format!("{running}/{desired}"),
    }
}

/// A run of ports that are shown as one.
#[derive(Debug, Clone, Copy)]
struct Run {
    protocol: PortProtocol,
    published: (u16, u16),
    target: (u16, u16),
}

impl Run {
    /// Whether the next port belongs to it: consecutive numbers on both sides, or one target for all.
    fn takes(&self, protocol: PortProtocol, published: u16, target: u16) -> bool {
        let is_range = self.target.0 != self.target.1;
        let follows = target == self.target.1.saturating_add(1);
        let is_same = target == self.target.1 && !is_range;
        let is_start = self.published.0 == self.published.1;
        let fits = if is_start {
            follows || is_same
        } else if is_range {
            follows
        } else {
            is_same
        };
        self.protocol == protocol && published == self.published.1.saturating_add(1) && fits
    }

    fn text(&self) -> String {
        let side = |(start, end): (u16, u16)| {
            if start == end { start.to_string() } else { format!("{start}-{end}") }
        };
        format!("*:{}->{}/{}", side(self.published), side(self.target), self.protocol.name())
    }
}

/// Ports of the routing mesh: `*:8080->80/tcp`.
pub(in super::super) fn ports(ports: &[PortConfig]) -> String {
    let ingress =
        ports.iter().filter(|port| port.publish_mode.unwrap_or_default() == PublishMode::Ingress);
    let mut sorted: Vec<(PortProtocol, u16, u16)> = ingress
        .filter_map(|port| {
            Some((port.protocol.unwrap_or_default(), port.published_port?, port.target_port))
        })
        .collect();
    sorted.sort_unstable();
    let mut runs: Vec<Run> = Vec::new();
    for (protocol, published, target) in sorted {
        match runs.last_mut() {
            Some(run) if run.takes(protocol, published, target) => {
                run.published.1 = published;
                run.target.1 = target;
            }
            _ => runs.push(Run {
                protocol,
                published: (published, published),
                target: (target, target),
            }),
        }
    }
    runs.iter().map(Run::text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use skep_common::compose::ports::parse_short;

    #[test]
    fn ports_are_grouped() {
        for (given, expect) in [
            ("8080:80", "*:8080->80/tcp"),
            ("80:80 81:80 82:80", "*:80-82->80/tcp"),
            ("80:80 81:81", "*:80-81->80-81/tcp"),
            ("80:80 81:81 82:80", "*:80-81->80-81/tcp, *:82->80/tcp"),
            ("80:80 82:82", "*:80->80/tcp, *:82->82/tcp"),
            ("53:53/udp 53:53", "*:53->53/tcp, *:53->53/udp"),
            ("80", ""),
        ] {
            let given: Vec<PortConfig> =
                given.split(' ').flat_map(|text| parse_short(text).unwrap().ports).collect();
            assert_eq!(ports(&given), expect);
        }
    }
}
