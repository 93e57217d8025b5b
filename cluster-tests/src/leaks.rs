//! Looks for what a lab or a node left on the machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::wait::wait_until;

/// What was killed must be gone after this time.
const GONE_WITHIN: Duration = Duration::from_secs(1);
/// The namespaces of a node that must end with it.
const NAMESPACES: [&str; 5] = ["pid", "net", "mnt", "uts", "ipc"];

/// What a lab is known by.
#[derive(Debug, Clone)]
pub struct LabTraces {
    /// Its name.
    pub name: String,
    /// The host's end of the link to its switch.
    pub host_link: String,
}

impl LabTraces {
    /// Lists processes, mounts, cgroups, links and files of the lab.
    pub fn left(&self) -> Vec<String> {
        let name = &self.name;
        let mut left = processes_in_cgroup(&format!("/skep-lab/{name}"));
        left.extend(processes_of_command(name));
        left.extend(mounts_naming(name));
        left.extend(cgroups(&format!("skep-lab/{name}")));
        if links_of("self").contains(&self.host_link) {
            left.push(format!("link {}", self.host_link));
        }
        let dirs = [format!("/run/skep-lab/{name}"), format!("/var/lib/skep-lab/{name}")];
        let lock = format!("/run/skep-lab/.{name}.lock");
        let files = dirs.into_iter().chain([lock]).filter(|path| Path::new(path).exists());
        left.extend(files.map(|path| format!("file {path}")));
        left
    }

    /// Panics unless, within a second, nothing of the lab is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        wait_until(GONE_WITHIN, "nothing of the lab is left", || none_of(self.left()));
    }
}

/// What a running node is known by: taken before it is killed.
#[derive(Debug, Clone)]
pub struct NodeTraces {
    lab: String,
    name: String,
    /// Such as `pid:[4026532201]`; unlike a cgroup no process can leave these unseen.
    namespaces: BTreeSet<String>,
}

impl NodeTraces {
    #[track_caller]
    pub(crate) fn take(lab: &str, name: &str) -> Self {
        let init = init_of(lab, name);
        let namespaces = NAMESPACES.iter().map(|kind| {
            let link = format!("/proc/{init}/ns/{kind}");
            namespace(Path::new(&link)).expect("the node runs")
        });
        Self { lab: lab.to_owned(), name: name.to_owned(), namespaces: namespaces.collect() }
    }

    /// Lists processes, mounts, cgroups and links of the node.
    pub fn left(&self) -> Vec<String> {
        let (lab, name) = (&self.lab, &self.name);
        let mut left = processes_in_cgroup(&format!("/skep-lab/{lab}/{name}"));
        for pid in pids() {
            let shared = NAMESPACES
                .iter()
                .filter_map(|kind| namespace(Path::new(&format!("/proc/{pid}/ns/{kind}"))));
            let shared: Vec<String> = shared.filter(|ns| self.namespaces.contains(ns)).collect();
            if !shared.is_empty() {
                left.push(format!("process {pid} {:?} in {shared:?}", command_line(pid)));
            }
        }
        left.extend(mounts_naming(&format!("{lab}/{name}")));
        left.extend(cgroups(&format!("skep-lab/{lab}/{name}")));
        let port = format!("p-{name}");
        if links_of(&init_of(lab, "switch").to_string()).contains(&port) {
            left.push(format!("link {port} in the switch"));
        }
        left
    }

    /// Panics unless, within a second, nothing of the node is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        wait_until(GONE_WITHIN, "nothing of the node is left", || none_of(self.left()));
    }
}

fn none_of(left: Vec<String>) -> (Option<()>, String) {
    (left.is_empty().then_some(()), left.join("\n  "))
}

#[track_caller]
fn init_of(lab: &str, member: &str) -> i64 {
    let path = format!("/run/skep-lab/{lab}/{member}/init.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let record: serde_json::Value = serde_json::from_str(&text).expect("init.json is JSON");
    record["Pid"].as_i64().expect("a pid")
}

fn namespace(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.to_string_lossy().into_owned())
}

/// All processes of the machine but zombies, which hold nothing any more.
fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc is there").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_zombie = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_none_or(|(_, rest)| rest.starts_with(" Z"))
    };
    pids.filter(|pid| !is_zombie(pid)).collect()
}

fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

fn processes_in_cgroup(cgroup: &str) -> Vec<String> {
    let is_inside = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let mut paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
        let below = format!("{cgroup}/");
        paths.any(|path| path == cgroup || path.starts_with(&below))
    };
    let found = pids().into_iter().filter(is_inside);
    found.map(|pid| format!("process {pid} {:?} in {cgroup}", command_line(pid))).collect()
}

/// Watchdogs, and whatever else was started for the lab by name, this process aside.
fn processes_of_command(lab: &str) -> Vec<String> {
    let needle = format!("--name {lab} ");
    let found = pids().into_iter().filter(|pid| command_line(*pid).contains(&needle));
    found.map(|pid| format!("process {pid} {:?}", command_line(pid))).collect()
}

/// Mounts that name the lab's directories, in whatever mount namespace.
fn mounts_naming(what: &str) -> Vec<String> {
    let needle = format!("skep-lab/{what}/");
    let mut found = BTreeSet::new();
    for pid in pids() {
        let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        let lines = text.lines().filter(|line| line.contains(&needle));
        found.extend(lines.map(|line| format!("mount {line}")));
    }
    found.into_iter().collect()
}

fn cgroups(path: &str) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("/proc is there");
    let mount_points = text.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        filesystem.starts_with("cgroup").then(|| mount.split(' ').nth(4))?
    });
    let dirs = mount_points.map(|dir| PathBuf::from(dir).join(path));
    dirs.filter(|dir| dir.exists()).map(|dir| format!("cgroup {}", dir.display())).collect()
}

/// The interfaces of a process's network.
fn links_of(pid: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    lines.collect()
}
