//! `skep run`, `ps`, `stop` and `rm`: containers of this node. Wording: docker/cli `cli/command/container`.
//!
//! The node asks a manager, so that these work on workers too.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use skep_common::spec::{ContainerSpec, Labels, NetworkAttachmentConfig, TaskSpec};
use skep_common::{Task, TaskState, Timestamp};
use skep_proto::watch_event::Action;
use skep_proto::{
    ContainerRequest, ListContainersRequest, RemoveContainerRequest, RunContainerRequest,
    TaskLogsRequest, WatchEvent,
};
use tonic::Streaming;

use super::service::caller_environment;
use super::service::flags::{environment_entry, parse_environment, parse_label};
use super::{CODE_USAGE, ExitWith, Failures};
use crate::client::{Client, Refusal, is_not_found};
use crate::format::human::{duration, ellipsis, familiar_image};
use crate::format::{View, plain_cell, render, shown};
use crate::ui::Ui;

/// Exit code of a run that was refused or whose program never started. docker/cli `runStartContainerErr`.
const CODE_NOT_RUN: u8 = CODE_USAGE;
/// Exit code of a client that is told to end twice: 128 + SIGINT.
const CODE_INTERRUPTED: u8 = 130;
/// Between two questions to managers that do not answer.
const PAUSE: Duration = Duration::from_millis(500);
/// Characters of a command that the list shows.
const COMMAND_LENGTH_MAX: usize = 20;

/// `skep run [OPTIONS] IMAGE [COMMAND] [ARG...]`
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Run container in background and print container ID
    #[arg(long, short)]
    detach: bool,
    /// Assign a name to the container
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// Automatically remove the container when it exits
    #[arg(long)]
    rm: bool,
    /// Connect a container to a network
    #[arg(long, visible_alias = "net")]
    network: Vec<String>,
    /// Set environment variables
    #[arg(long, short, value_parser = parse_environment, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Set meta data on a container
    #[arg(long, short, value_parser = parse_label, value_name = "NAME=VALUE")]
    label: Vec<(String, String)>,
    /// Overwrite the default ENTRYPOINT of the image
    #[arg(long)]
    entrypoint: Option<String>,
    /// Username or UID (format: <name|uid>[:<group|gid>])
    #[arg(long, short)]
    user: Option<String>,
    /// Working directory inside the container
    #[arg(long, short)]
    workdir: Option<String>,
    /// Container host name
    #[arg(long)]
    hostname: Option<String>,
    #[arg(long, short, hide = true)]
    interactive: bool,
    #[arg(long, short, hide = true)]
    tty: bool,
    #[arg(long, short, hide = true)]
    volume: Vec<String>,
    #[arg(long, hide = true)]
    mount: Vec<String>,
    /// The image, and the command to run in it
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "IMAGE [COMMAND] [ARG...]"
    )]
    words: Vec<String>,
}

/// `skep ps [OPTIONS]`
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Show all containers (default shows just running)
    #[arg(long, short)]
    all: bool,
    /// Format output: table, 'table TEMPLATE', json, or TEMPLATE
    #[arg(long)]
    format: Option<String>,
    /// Don't truncate output
    #[arg(long)]
    no_trunc: bool,
    /// Only display container IDs
    #[arg(long, short)]
    quiet: bool,
}

/// `skep stop CONTAINER [CONTAINER...]`
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Names or ids of containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// `skep rm [OPTIONS] CONTAINER [CONTAINER...]`
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Force the removal of a running container
    #[arg(long, short)]
    force: bool,
    /// Names or ids of containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

fn spec(args: &RunArgs) -> Result<TaskSpec> {
    if args.interactive || args.tty {
        bail!(
            "-i and -t are not supported: nothing is sent to a container, and it has no terminal; run it without them"
        );
    }
    if !args.volume.is_empty() || !args.mount.is_empty() {
        bail!("volumes and mounts are not supported yet: run it without -v and --mount");
    }
    let Some((image, command)) = args.words.split_first() else { bail!("no image is named") };
    let caller = caller_environment();
    let env: Vec<String> =
        args.env.iter().filter_map(|entry| environment_entry(entry, &caller)).collect();
    let labels: Labels = args.label.iter().cloned().collect();
    let container_spec = ContainerSpec {
        image: image.clone(),
        labels: (!labels.is_empty()).then_some(labels),
        command: args.entrypoint.clone().map(|entrypoint| vec![entrypoint]),
        args: (!command.is_empty()).then(|| command.to_vec()),
        hostname: args.hostname.clone(),
        env: (!env.is_empty()).then_some(env),
        dir: args.workdir.clone(),
        user: args.user.clone(),
        ..ContainerSpec::default()
    };
    let attachment = |target: &String| NetworkAttachmentConfig {
        target: target.clone(),
        ..NetworkAttachmentConfig::default()
    };
    let networks: Vec<_> = args.network.iter().map(attachment).collect();
    Ok(TaskSpec {
        container_spec: Some(container_spec),
        networks: (!networks.is_empty()).then_some(networks),
        ..TaskSpec::default()
    })
}

/// Runs a container; in the foreground, ends as it ends.
pub(super) async fn run(args: &RunArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let request = RunContainerRequest {
        name: args.name.clone(),
        spec_json: serde_json::to_string(&spec(args)?)?,
        // In the foreground its output is read to the end before it is removed.
        auto_remove: args.rm && args.detach,
        id: String::new(),
    };
    let id = match client.containers().run(request).await {
        Ok(answer) => answer.into_inner().id,
        Err(status) => {
            ui.note(Refusal(status))?;
            return Err(ExitWith(CODE_NOT_RUN).into());
        }
    };
    let mut watched = Watched::open(client, &id).await?;
    let mut run = Run { client, id: &id, is_stopping: false };
    let task = run.until(watched.until(|task| task.status.state >= TaskState::Running)).await?;
    if was_started(&task) {
        if args.detach {
            return Ok(ui.line(&id)?);
        }
        run.until(copy_output(client, &id, ui)).await?;
    }
    let task = run.until(watched.until(|task| task.status.state.is_terminal())).await?;
    let code = exit_code(&task);
    if code.is_none() {
        ui.note(format_args!("Error response from daemon: {}", task.status.err))?;
    }
    if args.rm && !args.detach {
        remove(client, &id, false).await?;
    }
    match code.unwrap_or(CODE_NOT_RUN) {
        0 => Ok(()),
        code => Err(ExitWith(code).into()),
    }
}

/// A run in the foreground, which the user may end.
struct Run<'a> {
    client: &'a Client,
    id: &'a str,
    is_stopping: bool,
}

impl Run<'_> {
    /// Waits for `work`. The first interrupt stops the container, and the wait goes on to its end.
    async fn until<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                signal = interrupted() => signal?,
            }
            if std::mem::replace(&mut self.is_stopping, true) {
                return Err(ExitWith(CODE_INTERRUPTED).into());
            }
            let request = ContainerRequest { reference: self.id.to_owned() };
            self.client.containers().stop(request).await.map_err(Refusal)?;
        }
    }
}

async fn interrupted() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        signal = tokio::signal::ctrl_c() => signal?,
        _ = terminate.recv() => {}
    }
    Ok(())
}

fn was_started(task: &Task) -> bool {
    task.status.state == TaskState::Running || exit_code(task).is_some()
}

/// The code that its program ended with; `None` where it has not run.
fn exit_code(task: &Task) -> Option<u8> {
    let container = task.status.container_status.as_ref()?;
    let has_run = task.status.state.is_terminal() && !container.container_id.is_empty();
    has_run.then(|| u8::try_from(container.exit_code & 0xff).unwrap_or(u8::MAX))
}

async fn copy_output(client: &Client, id: &str, ui: &mut Ui) -> Result<()> {
    let request = TaskLogsRequest {
        task_id: id.to_owned(),
        follow: true,
        tail: -1,
        ..TaskLogsRequest::default()
    };
    let stream = client.machine().container_logs(request).await.map_err(Refusal)?;
    let mut stream = stream.into_inner();
    while let Some(record) = stream.message().await.map_err(Refusal)? {
        match record.stderr {
            true => ui.message(&record.line)?,
            false => ui.data(&record.line)?,
        }
    }
    Ok(())
}

/// The states of one container, as they come.
struct Watched<'a> {
    client: &'a Client,
    id: String,
    feed: Streaming<WatchEvent>,
    last: Option<Task>,
}

impl<'a> Watched<'a> {
    async fn open(client: &'a Client, id: &str) -> Result<Self> {
        let request = ContainerRequest { reference: id.to_owned() };
        let feed = client.containers().watch(request).await.map_err(Refusal)?.into_inner();
        Ok(Self { client, id: id.to_owned(), feed, last: None })
    }

    /// The container, once it is as wanted. A manager that goes away is followed by another one.
    async fn until(&mut self, is_wanted: impl Fn(&Task) -> bool) -> Result<Task> {
        loop {
            if let Some(task) = self.last.as_ref().filter(|task| is_wanted(task)) {
                return Ok(task.clone());
            }
            match self.feed.message().await {
                Ok(Some(event)) if event.action() == Action::Removed => {
                    bail!("container {} was removed", self.id);
                }
                Ok(Some(event)) if event.action() == Action::Synced => {}
                Ok(Some(event)) => self.last = Some(serde_json::from_str(&event.json)?),
                Ok(None) | Err(_) => self.follow_another().await?,
            }
        }
    }

    async fn follow_another(&mut self) -> Result<()> {
        loop {
            match Self::open(self.client, &self.id).await {
                Ok(opened) => {
                    self.feed = opened.feed;
                    return Ok(());
                }
                Err(error) if is_unavailable(&error) => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_unavailable(error: &anyhow::Error) -> bool {
    let refusal = error.downcast_ref::<Refusal>();
    refusal.is_some_and(|refusal| refusal.0.code() == tonic::Code::Unavailable)
}

const VIEW: View = View {
    columns: &[
        shown("CONTAINER ID", "ID"),
        shown("IMAGE", "Image"),
        shown("COMMAND", "Command"),
        shown("CREATED", "RunningFor"),
        shown("STATUS", "Status"),
        shown("NAMES", "Names"),
    ],
    cell: plain_cell,
};

/// The containers of this node.
pub(super) async fn ps(args: &PsArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let answer = client.containers().list(ListContainersRequest {}).await.map_err(Refusal)?;
    let jsons = answer.into_inner().jsons;
    let tasks = jsons.iter().map(|json| serde_json::from_str(json));
    let mut tasks: Vec<Task> = tasks.collect::<Result<_, _>>()?;
    tasks.retain(|task| args.all || task.status.state == TaskState::Running);
    tasks.reverse(); // The newest first, as Docker's.
    let rows: Vec<Value> = tasks.iter().map(|task| row(task, args.no_trunc, (ui.now)())).collect();
    Ok(ui.data(render(&VIEW, &rows, args.format.as_deref(), args.quiet)?)?)
}

fn row(task: &Task, is_whole: bool, now: Timestamp) -> Value {
    let spec = task.spec.container_spec.clone().unwrap_or_default();
    let words = [spec.command.unwrap_or_default(), spec.args.unwrap_or_default()].concat();
    let command = words.join(" ");
    let command = if is_whole { command } else { ellipsis(&command, COMMAND_LENGTH_MAX) };
    let ago = |at: Timestamp| duration(now.since(at));
    json!({
        "ID": if is_whole { task.id.to_string() } else { task.id.short() },
        "Image": if is_whole { spec.image } else { familiar_image(&spec.image) },
        "Command": format!("{command:?}"),
        "RunningFor": format!("{} ago", ago(task.meta.created_at)),
        "Status": status(task, &ago(task.status.timestamp)),
        "Names": task.container_name(),
        "State": task.status.state.name(),
    })
}

fn status(task: &Task, age: &str) -> String {
    match (task.status.state, exit_code(task)) {
        (TaskState::Running, _) if task.status.unhealthy => format!("Up {age} (unhealthy)"),
        (TaskState::Running, _) => format!("Up {age}"),
        (_, Some(code)) => format!("Exited ({code}) {age} ago"),
        (state, None) if state.is_terminal() => "Dead".to_owned(),
        _ => "Created".to_owned(),
    }
}

/// Stops containers and waits until they have ended.
pub(super) async fn stop(args: &StopArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    for reference in &args.containers {
        match stop_one(client, reference).await {
            Ok(()) => ui.line(reference)?,
            Err(error) => failures.add(&error),
        }
    }
    failures.finish()
}

async fn stop_one(client: &Client, reference: &str) -> Result<()> {
    let request = ContainerRequest { reference: reference.to_owned() };
    let answer = client.containers().stop(request).await.map_err(Refusal)?;
    let mut watched = match Watched::open(client, &answer.into_inner().id).await {
        Err(error) if is_not_found(&error) => return Ok(()), // It went by itself.
        watched => watched?,
    };
    watched.until(|task| task.status.state.is_terminal()).await.map(drop)
}

/// Removes containers.
pub(super) async fn rm(args: &RmArgs, client: &Client, ui: &mut Ui) -> Result<()> {
    let mut failures = Failures::default();
    for reference in &args.containers {
        match remove(client, reference, args.force).await {
            Ok(()) => ui.line(reference)?,
            Err(error) => failures.add(&error),
        }
    }
    failures.finish()
}

async fn remove(client: &Client, reference: &str, force: bool) -> Result<()> {
    let request = RemoveContainerRequest { reference: reference.to_owned(), force };
    client.containers().remove(request).await.map_err(Refusal)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: RunArgs,
    }

    fn parse(line: &str) -> Result<Value> {
        let words = ["run"].into_iter().chain(line.split_whitespace());
        Ok(serde_json::to_value(spec(&Line::try_parse_from(words)?.args)?)?)
    }

    #[test]
    fn flags_make_the_spec_and_what_follows_the_image_is_its_command() {
        let expect = json!({
            "ContainerSpec": {
                "Image": "busybox", "Labels": {"a": "b"}, "Command": ["/bin/sh"],
                "Args": ["-c", "true", "--rm"], "Hostname": "h", "Env": ["A=1"], "Dir": "/d",
                "User": "u",
            },
            "Networks": [{"Target": "front"}, {"Target": "back"}],
        });
        let line = "-d --rm --name n --network front --net back -e A=1 -l a=b --entrypoint /bin/sh \
                    -u u -w /d --hostname h busybox -c true --rm";
        assert_eq!(parse(line).unwrap(), expect);
        assert_eq!(parse("busybox").unwrap(), json!({"ContainerSpec": {"Image": "busybox"}}));
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        for (line, expect) in [
            ("-it busybox", "-i and -t are not supported"),
            ("-v /a:/b busybox", "volumes and mounts are not supported yet"),
            ("--mount type=tmpfs busybox", "volumes and mounts are not supported yet"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.starts_with(expect), "{line}: {error}");
        }
        assert!(parse("").is_err());
    }
}
