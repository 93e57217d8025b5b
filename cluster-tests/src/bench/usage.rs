//! What a lab takes of memory and processor time, as the kernel accounts it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use skep_cluster_tests::Lab;

use super::bytes_as_mib;
use super::figures::{Samples, Unit};

/// The daemons of some nodes of a lab, by their directories in `/proc`.
pub(crate) fn daemons(lab: &Lab, nodes: &[&str]) -> Vec<PathBuf> {
    let is_of_node = |dir: &PathBuf| {
        let line = fs::read(dir.join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let is_named = |node: &&str| words.contains(&node.as_bytes());
        words.contains(&&b"--hostname"[..]) && nodes.iter().any(is_named)
    };
    processes(lab, "daemon").into_iter().filter(is_of_node).collect()
}

/// The shims of a lab's containers, by their directories in `/proc`.
pub(crate) fn shims(lab: &Lab) -> Vec<PathBuf> {
    processes(lab, "shim")
}

/// The proportional set size of each process; one that has ended meanwhile has none.
pub(crate) fn memory(processes: &[PathBuf]) -> Samples {
    let mut samples = Samples::new(Unit::Mebibytes);
    for bytes in processes.iter().filter_map(|process| proportional_set_size(process)) {
        samples.add(bytes_as_mib(bytes));
    }
    samples
}

/// The processor time that a lab's nodes took since it began, with what has ended meanwhile; none
/// where the kernel does not account it.
pub(crate) fn processor_time(lab: &Lab) -> Option<Duration> {
    let read = |path: String| fs::read_to_string(path).ok();
    let name = lab.name();
    // One hierarchy per controller first: a unified one beside those may account nothing.
    let nanoseconds = read(format!("/sys/fs/cgroup/cpuacct/skep-lab/{name}/cpuacct.usage"))
        .or_else(|| read(format!("/sys/fs/cgroup/cpu,cpuacct/skep-lab/{name}/cpuacct.usage")));
    if let Some(text) = nanoseconds {
        return text.trim().parse().ok().map(Duration::from_nanos);
    }
    let stat = read(format!("/sys/fs/cgroup/skep-lab/{name}/cpu.stat"))?;
    let usage = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    usage.parse().ok().map(Duration::from_micros)
}

/// Processes that a benchmark started, by their program's name and a word of their command line that no other
/// lab's have.
pub(crate) fn named(name: &str, word: &str) -> Vec<PathBuf> {
    let is_one = |dir: &PathBuf| {
        let comm = fs::read_to_string(dir.join("comm")).unwrap_or_default();
        let line = fs::read(dir.join("cmdline")).unwrap_or_default();
        let has_word = || line.split(|byte| *byte == 0).any(|found| found == word.as_bytes());
        comm.trim_end() == name && has_word()
    };
    all_processes().filter(is_one).collect()
}

/// What processes, with all their threads, took of the processors since they began.
pub(crate) fn time_of(processes: &[PathBuf]) -> Duration {
    processes.iter().filter_map(|process| time_of_one(process)).sum()
}

fn time_of_one(process: &Path) -> Option<Duration> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // The second field is a name that may hold anything; user and system time are the 14th and 15th.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u64>);
    let ticks = ticks.next()?.ok()? + ticks.next()?.ok()?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok()??;
    Some(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// Processes of a lab that run `skep COMMAND`; their cgroup says which lab they belong to.
fn processes(lab: &Lab, command: &str) -> Vec<PathBuf> {
    let cgroup = format!("/skep-lab/{}/", lab.name());
    let is_one = |dir: &PathBuf| {
        let Ok(line) = fs::read(dir.join("cmdline")) else { return false };
        let mut words = line.split(|byte| *byte == 0);
        let is_command = words.nth(1).is_some_and(|word| word == command.as_bytes());
        let in_lab = || fs::read_to_string(dir.join("cgroup")).is_ok_and(|c| c.contains(&cgroup));
        is_command && in_lab()
    };
    all_processes().filter(is_one).collect()
}

fn all_processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").expect("/proc is there").flatten();
    entries.map(|entry| entry.path())
}

fn proportional_set_size(process: &Path) -> Option<u64> {
    let text = fs::read_to_string(process.join("smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
