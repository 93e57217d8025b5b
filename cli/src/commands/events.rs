//! `skep events`: what happened, and what happens. docker/cli `cli/command/system/events.go`.
//!
//! Differs from Docker: it has swarm events alone, of tasks too, and follows only where that is asked.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::json;
use skep_common::Timestamp;
use skep_proto::{Event, EventFilter, EventsRequest, InfoRequest};
use time::OffsetDateTime;
use time::macros::format_description;
use tonic::{Code, Status};

use super::filter::{self, Filter};
use super::service::{Since, parse_since};
use crate::client::{Client, Refusal};
use crate::format::templated;
use crate::ui::Ui;

/// How long a follower tries to go on where its stream broke, as it does when its daemon restarts.
const RESUME_WITHIN: Duration = Duration::from_secs(30);
const RESUME_PERIOD: Duration = Duration::from_millis(200);

/// `skep events [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Filter output based on conditions provided
    #[arg(long, value_parser = filter::parse)]
    filter: Vec<Filter>,
    /// Show events as they happen, from now on or since the given time
    #[arg(long, short)]
    follow: bool,
    /// Format output: json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Show all events created since timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)
    #[arg(long, value_parser = parse_since)]
    since: Option<Since>,
    /// Stream events until this timestamp
    #[arg(long, value_parser = parse_since)]
    until: Option<Since>,
}

/// Where a follower goes on: behind so many events of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Position {
    version: u64,
    n_seen: usize,
}

impl Position {
    /// Whether an event is news. Those of one version come in one order, and all or none of them are kept.
    fn takes(&mut self, event: &Event, skipped: &mut usize) -> bool {
        if event.version == self.version && *skipped < self.n_seen {
            *skipped += 1;
            return false;
        }
        if event.version != self.version {
            *self = Self { version: event.version, n_seen: 0 };
            *skipped = 0;
        }
        self.n_seen += 1;
        *skipped = self.n_seen;
        true
    }
}

pub(super) async fn run(args: &EventsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let now = (ui.now)();
    // All that is kept, where neither a beginning nor what comes is asked for.
    let first = if args.follow { Timestamp(0) } else { Timestamp(1) };
    let filters = args.filter.iter().map(|filter| {
        let (key, value) = filter.pair();
        EventFilter { key: key.to_owned(), value: value.to_owned() }
    });
    let mut request = EventsRequest {
        since_nanos: args.since.map_or(first, |since| since.at(now)).0,
        until_nanos: args.until.map_or(0, |until| until.at(now).0),
        follow: args.follow,
        from_version: 0,
        filters: filters.collect(),
    };
    let mut position = Position::default();
    loop {
        let Some(status) = follow(args, client, ui, &request, &mut position).await? else {
            return Ok(());
        };
        if !args.follow || !is_broken(&status) {
            return Err(Refusal(status).into());
        }
        if position.version > 0 {
            request.from_version = position.version - 1;
        } else if request.since_nanos == 0 {
            request.since_nanos = now.0; // Nothing has come since then.
        }
        wait_for_daemon(client, status).await?;
    }
}

/// Whether the connection broke, or the manager is stopping. What a broken connection is to tonic depends on how
/// it broke.
fn is_broken(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown)
}

/// Shows events until the stream ends, or breaks with what is returned.
async fn follow(
    args: &EventsArgs,
    client: &Client,
    ui: &mut Ui,
    request: &EventsRequest,
    position: &mut Position,
) -> Result<Option<Status>> {
    let mut stream = match client.control().events(request.clone()).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return Ok(Some(status)),
    };
    let mut n_skipped = 0;
    loop {
        let event = match stream.message().await {
            Ok(Some(event)) => event,
            Ok(None) => return Ok(None),
            Err(status) => return Ok(Some(status)),
        };
        if event.gap {
            ui.note("Events before these are not kept any more on this manager.")?;
        } else if position.takes(&event, &mut n_skipped) {
            ui.line(shown(&event, args.format.as_deref())?)?;
        }
    }
}

/// Returns when the daemon answers again.
async fn wait_for_daemon(client: &Client, broken: Status) -> Result<()> {
    let answers = async {
        while client.machine().info(InfoRequest {}).await.is_err() {
            tokio::time::sleep(RESUME_PERIOD).await;
        }
    };
    tokio::time::timeout(RESUME_WITHIN, answers).await.map_err(|_| Refusal(broken).into())
}

fn shown(event: &Event, format: Option<&str>) -> Result<String> {
    let actor = json!({"ID": event.id, "Attributes": attributes(event)});
    let (seconds, nanos) = (event.time_nanos / NANOS, event.time_nanos);
    match format {
        None | Some("") => Ok(text(event)),
        Some("json") => Ok(json!({
            "Type": event.kind,
            "Action": event.action,
            "Actor": actor,
            "scope": "swarm",
            "time": seconds,
            "timeNano": nanos,
            "version": event.version,
        })
        .to_string()),
        Some(template) => templated(
            template,
            &json!({
                "Type": event.kind,
                "Action": event.action,
                "Actor": actor,
                "Scope": "swarm",
                "Time": seconds,
                "TimeNano": nanos,
                "Version": event.version,
            }),
        ),
    }
}

/// In the order of keys.
fn attributes(event: &Event) -> BTreeMap<String, String> {
    event.attributes.clone().into_iter().collect()
}

const NANOS: i64 = 1_000_000_000;

/// `2026-11-26T22:00:00.000000000Z service update ID (image=…, name=web)`.
fn text(event: &Event) -> String {
    let moment = OffsetDateTime::from_unix_timestamp_nanos(event.time_nanos.into())
        .expect("an i64 of nanoseconds lies between the years 1677 and 2262");
    let form =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:9]Z");
    let moment = moment.format(form).expect("such a moment has every part");
    let pairs = attributes(event).into_iter().map(|(key, value)| format!("{key}={value}"));
    let pairs: Vec<String> = pairs.collect();
    let pairs = if pairs.is_empty() { String::new() } else { format!(" ({})", pairs.join(", ")) };
    format!("{moment} {} {} {}{pairs}", event.kind, event.action, event.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(version: u64, action: &str) -> Event {
        let attributes = [("name".to_owned(), "web".to_owned()), ("image".into(), "nginx".into())];
        Event {
            version,
            time_nanos: 1_500_000_000_000_000_007,
            kind: "service".into(),
            action: action.into(),
            id: "abc".into(),
            attributes: attributes.into(),
            gap: false,
        }
    }

    #[test]
    fn an_event_is_shown_as_docker_shows_it() {
        let event = event(7, "update");
        for (format, expect) in [
            (None, "2017-07-14T02:40:00.000000007Z service update abc (image=nginx, name=web)"),
            (
                Some("{{.Action}} {{.Actor.Attributes.name}} {{.TimeNano}}"),
                "update web 1500000000000000007",
            ),
            (
                Some("json"),
                r#"{"Action":"update","Actor":{"Attributes":{"image":"nginx","name":"web"},"ID":"abc"},"Type":"service","scope":"swarm","time":1500000000,"timeNano":1500000000000000007,"version":7}"#,
            ),
        ] {
            assert_eq!(shown(&event, format).unwrap(), expect);
        }
    }

    #[test]
    fn what_was_seen_before_a_break_is_not_shown_again() {
        let mut position = Position::default();
        let mut take = |events: &[(u64, &str)]| -> Vec<bool> {
            let mut n_skipped = 0;
            let mut takes = |(version, action): &(u64, &str)| {
                position.takes(&event(*version, action), &mut n_skipped)
            };
            events.iter().map(&mut takes).collect()
        };
        assert_eq!(take(&[(3, "create"), (4, "a"), (4, "b")]), [true; 3]);
        let again = [(4, "a"), (4, "b"), (4, "c"), (5, "a"), (5, "b")];
        assert_eq!(take(&again), [false, false, true, true, true]);
        assert_eq!(take(&[(5, "a"), (5, "b"), (6, "a")]), [false, false, true]);
    }
}
