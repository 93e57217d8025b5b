//! What tests of a swarm ask again and again: which tasks there are, and which of them truly run.
//!
//! Two sources that know nothing of each other: `skep service ps`, and the processes of this
//! machine. [`Lab::wait_until_settled`] compares them, so that a container that runs twice, or one
//! that the swarm has forgotten, is a failure wherever it is called.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use crate::command::{Output, run, skep_binary};
use crate::lab::{Lab, Node};
use crate::load::{Record, Report};
use crate::wait::wait_until;

/// The image that [`Lab::import_whoami`] stores.
pub const WHOAMI: &str = "whoami:latest";
/// The variables that make whoami's answers, and its processes, say whose task it is.
const WHOAMI_ENVIRONMENT: [&str; 4] = [
    "SERVICE_NAME={{.Service.Name}}",
    "TASK_SLOT={{.Task.Slot}}",
    "NODE_HOSTNAME={{.Node.Hostname}}",
    "TASK_ID={{.Task.ID}}",
];
/// For what takes a second or two, on a machine that is busy with other tests.
pub const SETTLES_WITHIN: Duration = Duration::from_secs(90);

/// A task, as `skep service ps` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TaskRow {
    /// Its whole id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Such as `web.1`.
    pub name: String,
    /// Its number among the service's tasks.
    pub slot: u64,
    /// The node's name; empty while there is none.
    pub node: String,
    /// Such as `Running`.
    pub desired_state: String,
    /// Such as `Running`, without its age: two looks at an unchanged task are equal.
    pub current_state: String,
    /// Why it waits or failed; in quotes where there is one.
    pub error: String,
}

impl TaskRow {
    /// The first word of its current state.
    pub fn state(&self) -> &str {
        self.current_state.split(' ').next().unwrap_or_default()
    }

    /// Whether it runs and is to run.
    pub fn is_running(&self) -> bool {
        self.desired_state == "Running" && self.state() == "Running"
    }
}

/// The rows of a service, or what the client said instead.
pub type Tasks = Result<Vec<TaskRow>, Output>;

impl Node<'_> {
    /// All tasks of a service that the managers know.
    pub fn try_tasks(&self, service: &str) -> Tasks {
        let args = ["service", "ps", "--no-trunc", "--format", "json", service];
        let output = self.skep(&args);
        if !output.status.success() {
            return Err(output);
        }
        let parse = |row| {
            let mut row: TaskRow = serde_json::from_value(row).expect("a row has these columns");
            row.current_state = row.state().to_owned();
            row
        };
        Ok(output.json_lines().into_iter().map(parse).collect())
    }

    /// All tasks of a service that the managers know; panics when the client fails.
    #[track_caller]
    pub fn tasks(&self, service: &str) -> Vec<TaskRow> {
        match self.try_tasks(service) {
            Ok(tasks) => tasks,
            Err(output) => panic!("failed: {output}"),
        }
    }

    /// Waits until the tasks of a service are as wanted.
    ///
    /// A client that fails, as it may while there is no leader, is asked again.
    #[track_caller]
    pub fn wait_for_tasks<T>(
        &self,
        service: &str,
        what: &str,
        mut look: impl FnMut(&[TaskRow]) -> Option<T>,
    ) -> T {
        let what = format!("{service}: {what}");
        wait_until(SETTLES_WITHIN, &what, || match self.try_tasks(service) {
            Ok(tasks) => (look(&tasks), format!("{tasks:#?}")),
            Err(output) => (None, output.to_string()),
        })
    }

    /// Creates a service of whoami, without waiting for it.
    #[track_caller]
    pub fn create_whoami(&self, name: &str, flags: &[&str]) {
        let mut args = vec!["service", "create", "--detach", "--name", name];
        args.extend(WHOAMI_ENVIRONMENT.iter().flat_map(|variable| ["--env", *variable]));
        args.extend(flags);
        args.push(WHOAMI);
        self.skep(&args).ok();
    }
}

impl Lab {
    /// Deploys a stack from a Compose file, in which `IMAGE` is whoami, through n1.
    #[track_caller]
    pub fn deploy_whoami(&self, stack: &str, compose: &str) -> Output {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("stack.yml");
        fs::write(&file, compose.replace("IMAGE", WHOAMI)).expect("write the Compose file");
        let file = file.to_str().expect("temporary directories have plain names");
        self.node("n1").skep(&["stack", "deploy", "--compose-file", file, stack]).ok()
    }

    /// Compiles and packs whoami, and stores the image through n1.
    #[track_caller]
    pub fn import_whoami(&self) {
        self.import_whoami_through("n1");
    }

    /// The same through another node.
    #[track_caller]
    pub fn import_whoami_through(&self, via: &str) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let archive = whoami_archive(dir.path());
        let change = "ENTRYPOINT [\"/whoami\"]";
        self.node(via).skep(&["image", "import", "--change", change, &archive, WHOAMI]).ok();
    }

    /// Every whoami that runs as a container's first process, on whichever node.
    pub fn whoamis(&self) -> Vec<Whoami> {
        let entries = fs::read_dir("/proc").expect("/proc is there").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(|pid| Whoami::read(self.name(), pid)).collect()
    }

    /// Every whoami of a service; see [`Lab::whoamis`].
    pub fn whoamis_of(&self, service: &str) -> Vec<Whoami> {
        let mut all = self.whoamis();
        all.retain(|whoami| whoami.service() == service);
        all
    }

    /// Waits until a service has as many running tasks as wanted, no other task that is to run,
    /// and exactly their containers run, each on its node. Gives the tasks in the order of slots.
    #[track_caller]
    pub fn wait_until_settled(&self, via: &str, service: &str, n_tasks: usize) -> Vec<TaskRow> {
        let what = format!("{service} has {n_tasks} tasks, which run, each once");
        wait_until(SETTLES_WITHIN, &what, || {
            let rows = match self.node(via).try_tasks(service) {
                Ok(rows) => rows,
                Err(output) => return (None, output.to_string()),
            };
            let processes = self.whoamis_of(service);
            let is_wanted = |row: &&TaskRow| row.desired_state == "Running";
            let mut wanted: Vec<TaskRow> = rows.iter().filter(is_wanted).cloned().collect();
            wanted.sort_by_key(|row| row.slot);
            let listed: BTreeSet<(&str, &str)> =
                wanted.iter().map(|row| (row.node.as_str(), row.id.as_str())).collect();
            let real: BTreeSet<(&str, &str)> =
                processes.iter().map(|p| (p.node.as_str(), p.task.as_str())).collect();
            let is_settled = wanted.len() == n_tasks
                && wanted.iter().all(TaskRow::is_running)
                && listed == real
                && processes.len() == n_tasks;
            let seen = format!("{rows:#?}\nprocesses: {processes:#?}");
            (is_settled.then_some(wanted), seen)
        })
    }

    /// Waits until a client's request ends so, such as `Ok` or `Connect`. A node hears of a task a moment after the
    /// managers call it running: a port that is new to it refuses until then.
    #[track_caller]
    pub fn wait_for_outcome(&self, url: &str, outcome: &str) {
        wait_until(SETTLES_WITHIN, &format!("{url} gives {outcome}"), || {
            let report = self.send("client", url, 1);
            let is_so = report.records.iter().all(|record| record.outcome == outcome);
            (is_so.then_some(()), format!("{report:#?}"))
        });
    }

    /// Asks until connections are shared out as `expect` says, by a line of the answers such as `Slot`: a node hears
    /// of a task a moment after the managers call it running. What fails meanwhile is not looked at.
    #[track_caller]
    pub fn wait_for_turns(&self, from: &str, url: &str, field: &str, expect: &[(&str, usize)]) {
        let expect: BTreeMap<&str, usize> = expect.iter().copied().collect();
        let n_requests = expect.values().sum::<usize>() as u64;
        wait_until(SETTLES_WITHIN, &format!("{url} is answered by {expect:?}"), || {
            let report = self.send(from, url, n_requests);
            let is_so = report.count_by(field) == expect;
            (is_so.then_some(()), format!("{report:#?}"))
        });
    }

    /// Waits until `node ls` shows the state, such as `Down`, for a node.
    #[track_caller]
    pub fn wait_for_node(&self, via: &str, node: &str, status: &str) {
        wait_until(SETTLES_WITHIN, &format!("{node} is {status}"), || {
            let output = self.node(via).skep(&["node", "ls", "--format", "json"]);
            let is_so = output.status.success()
                && output
                    .json_lines()
                    .iter()
                    .any(|row| row["Hostname"] == node && row["Status"] == status);
            (is_so.then_some(()), output.to_string())
        });
    }
}

/// Compiles whoami, and packs its root file system into a file of the directory.
#[track_caller]
pub fn whoami_archive(dir: &Path) -> String {
    let archive = dir.join("whoami.tar");
    let script =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/make-whoami-image.sh");
    let mut command = Command::new(script);
    command.arg(&archive);
    run(command).ok();
    archive.to_str().expect("temporary directories have plain names").to_owned()
}

/// A container of whoami that runs on this machine.
#[derive(Debug, Clone)]
pub struct Whoami {
    /// Its first process, as the host numbers it.
    pub pid: u32,
    /// The node that it runs on.
    pub node: String,
    /// The task that it is, by the name of its cgroup.
    pub task: String,
    /// Its environment.
    pub environment: BTreeMap<String, String>,
}

impl Whoami {
    /// Reads a process, if it is such a container of this lab and not a zombie.
    fn read(lab: &str, pid: u32) -> Option<Self> {
        let dir = Path::new("/proc").join(pid.to_string());
        if fs::read_to_string(dir.join("comm")).ok()?.trim() != "whoami" {
            return None;
        }
        // A zombie has no command line; the image's health check has an argument.
        let command_line = fs::read(dir.join("cmdline")).ok()?;
        if command_line != b"/whoami\0" {
            return None;
        }
        let cgroups = fs::read_to_string(dir.join("cgroup")).ok()?;
        let prefix = format!("/skep-lab/{lab}/");
        let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
        // Hybrid cgroups: in those that containers have no cgroup of, it is its shim's, `NODE/init`.
        let mut below =
            paths.filter_map(|path| path.strip_prefix(&prefix)).filter_map(|p| p.split_once('/'));
        let (node, task) = below.find(|(_, task)| *task != "init")?;
        let environment = fs::read(dir.join("environ")).ok()?;
        let environment = String::from_utf8_lossy(&environment);
        let pairs = environment.split('\0').filter_map(|pair| pair.split_once('='));
        let environment = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let task = task.rsplit('/').next().unwrap_or(task).to_owned();
        Some(Self { pid, node: node.to_owned(), task, environment })
    }

    /// The name of its service, by its environment.
    pub fn service(&self) -> &str {
        self.environment.get("SERVICE_NAME").map_or("", String::as_str)
    }

    /// Sends requests from its network, each to the next of the URLs.
    #[track_caller]
    pub fn requests(&self, urls: &[String], n_requests: usize) -> Report {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.pid)).arg(skep_binary());
        command.args(["lab", "http", "--record", "--requests", &n_requests.to_string()]);
        command.args(urls);
        let output = run(command).ok();
        let mut records = output.json_lines();
        let summary = records.pop().expect("a load ends with a summary");
        let parse = |row| serde_json::from_value(row).expect("a record has these fields");
        Report {
            summary: serde_json::from_value(summary).expect("a summary has these fields"),
            records: records.into_iter().map(parse).collect(),
        }
    }

    /// Whether one of its threads sleeps: so a request for `/slow/…` has reached it.
    pub fn is_sleeping(&self) -> bool {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten();
        let waits_in = |dir: fs::DirEntry| fs::read_to_string(dir.path().join("wchan")).ok();
        threads.flatten().filter_map(waits_in).any(|function| function.contains("nanosleep"))
    }
}

impl Record {
    /// The value of a line of whoami's answer, such as `Slot`.
    #[track_caller]
    pub fn field(&self, name: &str) -> &str {
        let body = self.body.as_deref().unwrap_or_default();
        let value = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.unwrap_or_else(|| panic!("no {name} in the answer: {self:#?}"))
    }
}

impl Report {
    /// How many answers have each value of a line, such as `Slot`.
    #[track_caller]
    pub fn count_by(&self, name: &str) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for record in self.records.iter().filter(|record| record.is_ok()) {
            *counts.entry(record.field(name)).or_default() += 1;
        }
        counts
    }
}
