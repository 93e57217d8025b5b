//! `skep service logs`: the output of a service's tasks, or of one task, from all nodes.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use skep_common::compose::units::parse_duration;
use skep_common::spec::ModeKind;
use skep_common::{Node, Service, Task, Timestamp};
use skep_proto::{ListRequest, LogRecord, ServiceLogsRequest};
use time::OffsetDateTime;
use time::macros::format_description;

use crate::client::{Client, Refusal, is_not_found};
use crate::format::human::short_id;
use crate::ui::Ui;

/// `skep service logs [OPTIONS] SERVICE|TASK`
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Follow log output
    #[arg(long, short)]
    follow: bool,
    /// Number of lines to show from the end of the logs
    #[arg(long, short = 'n', default_value = "all", value_parser = parse_tail)]
    tail: Tail,
    /// Show logs since timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)
    #[arg(long, value_parser = parse_since)]
    since: Option<Since>,
    /// Show timestamps
    #[arg(long, short)]
    timestamps: bool,
    /// Do not neatly format logs
    #[arg(long)]
    raw: bool,
    /// Do not truncate output
    #[arg(long)]
    no_trunc: bool,
    /// Do not include task IDs in output
    #[arg(long)]
    no_task_ids: bool,
    /// Do not map IDs to Names in output
    #[arg(long)]
    no_resolve: bool,
    /// Name or id of a service, or id of a task
    #[arg(value_name = "SERVICE|TASK")]
    target: String,
}

/// Lines a task; `-1` is all.
#[derive(Debug, Clone, Copy)]
struct Tail(i64);

fn parse_tail(text: &str) -> Result<Tail, String> {
    match text {
        "all" => Ok(Tail(-1)),
        _ => match text.parse() {
            Ok(lines) => Ok(Tail(if lines < 0 { -1 } else { lines })),
            Err(_) => Err("must be a number of lines or all".into()),
        },
    }
}

/// A moment, or how long ago it was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::commands) enum Since {
    At(Timestamp),
    Ago(Duration),
}

impl Since {
    /// The moment, counted from now.
    pub(in crate::commands) fn at(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(moment) => moment,
            Self::Ago(duration) => {
                let nanos = i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
                Timestamp(now.0.saturating_sub(nanos))
            }
        }
    }
}

pub(in crate::commands) fn parse_since(text: &str) -> Result<Since, String> {
    if let Ok(duration) = parse_duration(text) {
        return Ok(Since::Ago(duration.duration()));
    }
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(Since::At(moment));
    }
    let date = format_description!("[year]-[month]-[day]");
    if let Ok(date) = time::Date::parse(text, date) {
        return Ok(Since::At(Timestamp::from_secs(date.midnight().assume_utc().unix_timestamp())));
    }
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..9e9).contains(&seconds) => Ok(Since::At(Timestamp((seconds * 1e9) as i64))),
        _ => Err("must be a timestamp such as 2013-01-02T13:23:37Z, seconds since 1970, or a duration such as 42m".into()),
    }
}

/// Whose output: the ids for the request and, for the columns, the highest slot.
struct Target {
    service_ids: Vec<String>,
    task_ids: Vec<String>,
    slot_max: u64,
    has_tty: bool,
}

/// The widest number among a service's slots.
fn slot_max(service: &Service) -> u64 {
    match service.spec.mode_kind() {
        Some(ModeKind::Replicated(replicas)) => replicas,
        Some(ModeKind::ReplicatedJob { total, .. }) => total.saturating_sub(1),
        Some(ModeKind::Global | ModeKind::GlobalJob) | None => 1,
    }
}

async fn find(client: &Client, reference: &str) -> Result<Target> {
    match client.get::<Service>("service", reference).await {
        Ok(service) => Ok(Target {
            service_ids: vec![service.id.to_string()],
            task_ids: Vec::new(),
            slot_max: slot_max(&service),
            has_tty: service.spec.container().tty == Some(true),
        }),
        Err(error) if is_not_found(&error) => match client.get::<Task>("task", reference).await {
            Ok(task) => Ok(Target {
                service_ids: Vec::new(),
                task_ids: vec![task.id.to_string()],
                slot_max: task.slot,
                has_tty: task
                    .spec
                    .container_spec
                    .as_ref()
                    .is_some_and(|spec| spec.tty == Some(true)),
            }),
            Err(error) if is_not_found(&error) => bail!("no such task or service: {reference}"),
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    }
}

pub(super) async fn run(args: &LogsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let target = find(client, &args.target).await?;
    if target.has_tty && !args.raw {
        bail!("tty service logs only supported with --raw");
    }
    let since = args.since.map_or(0, |since| since.at((ui.now)()).0);
    let mut names = Names::new(client, &target, args).await?;
    let request = ServiceLogsRequest {
        service_ids: target.service_ids,
        task_ids: target.task_ids,
        follow: args.follow,
        tail: args.tail.0,
        since_nanos: since,
    };
    let mut stream = client.control().service_logs(request).await.map_err(Refusal)?.into_inner();
    let mut n_missing = 0usize;
    while let Some(record) = stream.message().await.map_err(Refusal)? {
        if !record.error.is_empty() {
            n_missing += 1;
            let whose = names.task(client, &record).await;
            ui.note(format_args!("{whose}: {}", record.error))?;
            continue;
        }
        let text = if args.raw {
            stamped(args, &record, record.line.to_vec())
        } else {
            let mut text = format!("{}    | ", names.task(client, &record).await).into_bytes();
            text.extend_from_slice(&record.line);
            if !text.ends_with(b"\n") {
                text.push(b'\n');
            }
            stamped(args, &record, text)
        };
        if record.stderr { ui.message(text)? } else { ui.data(text)? }
    }
    match n_missing {
        0 => Ok(()),
        _ => bail!("warning: incomplete log stream: the logs of some tasks could not be retrieved"),
    }
}

/// The text with its time before it, if that was asked.
fn stamped(args: &LogsArgs, record: &LogRecord, text: Vec<u8>) -> Vec<u8> {
    if !args.timestamps {
        return text;
    }
    let nanos = i128::from(record.time_nanos);
    let moment = OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .expect("an i64 of nanoseconds lies between the years 1677 and 2262");
    let form =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:9]Z ");
    let mut stamped = moment.format(form).expect("such a moment has every part").into_bytes();
    stamped.extend(text);
    stamped
}

/// What tasks are called in the output: `web.1.xlg7…@node`, aligned.
struct Names {
    nodes: BTreeMap<String, String>,
    tasks: BTreeMap<String, Task>,
    width: usize,
    ready: BTreeMap<String, String>,
    is_resolved: bool,
    has_ids: bool,
    has_whole_ids: bool,
}

impl Names {
    async fn new(client: &Client, target: &Target, args: &LogsArgs) -> Result<Self> {
        let mut nodes = BTreeMap::new();
        if !args.raw && !args.no_resolve {
            for node in client.list_all::<Node>("node").await? {
                let hostname = node.description.map(|description| description.hostname);
                nodes.insert(node.id.to_string(), hostname.unwrap_or_else(|| node.id.to_string()));
            }
        }
        let mut tasks = BTreeMap::new();
        if !target.service_ids.is_empty() && !args.raw {
            let request = ListRequest {
                kind: "task".into(),
                service_ids: target.service_ids.clone(),
                ..Default::default()
            };
            for task in client.list::<Task>(request).await? {
                tasks.insert(task.id.to_string(), task);
            }
        }
        Ok(Self {
            nodes,
            tasks,
            width: target.slot_max.to_string().len(),
            ready: BTreeMap::new(),
            is_resolved: !args.no_resolve,
            has_ids: !args.no_task_ids,
            has_whole_ids: args.no_trunc,
        })
    }

    /// The name of the record's task; a task that is gone is named by its id.
    async fn task(&mut self, client: &Client, record: &LogRecord) -> String {
        let id = &record.task_id;
        if let Some(ready) = self.ready.get(id) {
            return ready.clone();
        }
        if !self.tasks.contains_key(id) && !id.is_empty() {
            // Made after the command began.
            if let Ok(task) = client.get::<Task>("task", id).await {
                self.tasks.insert(id.clone(), task);
            }
        }
        let (mut name, padding) = match self.tasks.get(id) {
            Some(task) => {
                let service =
                    if self.is_resolved { &task.service_name } else { &record.service_id };
                let padding = self.width.saturating_sub(task.slot_key().to_string().len());
                (format!("{service}.{}", task.slot_key()), padding)
            }
            None => (record.service_id.clone(), 0),
        };
        if self.has_ids && !id.is_empty() {
            name.push('.');
            name.push_str(if self.has_whole_ids { id } else { short_id(id) });
        }
        let node = self.nodes.get(&record.node_id).unwrap_or(&record.node_id);
        let name = format!("{name}@{node}{}", " ".repeat(padding));
        self.ready.insert(id.clone(), name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_moment_or_an_age() {
        for (text, expect) in [
            ("42m", Some(Since::Ago(Duration::from_secs(2520)))),
            ("2013-01-02T13:23:37Z", Some(Since::At(Timestamp::from_secs(1_357_133_017)))),
            ("2013-01-02", Some(Since::At(Timestamp::from_secs(1_357_084_800)))),
            ("1357133017", Some(Since::At(Timestamp::from_secs(1_357_133_017)))),
            ("1.5", Some(Since::At(Timestamp(1_500_000_000)))),
            ("yesterday", None),
        ] {
            assert_eq!(parse_since(text).ok(), expect, "{text}");
        }
        assert_eq!(parse_tail("all").unwrap().0, -1);
        assert_eq!(parse_tail("5").unwrap().0, 5);
        assert!(parse_tail("x").is_err());
    }
}
