//! The cgroup subtrees of labs, in every hierarchy the machine has.
//!
//! Both layouts are served: one unified hierarchy (v2), and one hierarchy per controller (v1, also
//! beside a unified one without controllers). A path such as `/skep-lab/lab/n1` is made, read and
//! removed in all of them alike.
//!
//! # Sources
//!
//! Kernel documentation: admin-guide/cgroup-v1 (`cpusets`, `freezer-subsystem`), cgroup-v2.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use skep_runtime::sys::PidFd;

use super::poll::poll_until;

/// A cgroup's last process may still be exiting, and a v1 controller may hold it a little longer.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(5);

/// One mounted hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    mount_point: PathBuf,
    is_v2: bool,
    /// v1 `cpuset`: a new cgroup takes no process until its sets are filled.
    is_cpuset: bool,
}

impl Hierarchy {
    fn dir(&self, cgroup: &str) -> PathBuf {
        self.mount_point.join(cgroup.trim_start_matches('/'))
    }
}

fn hierarchies() -> Vec<Hierarchy> {
    // Not readable means no /proc: then nothing else of a lab works either, and says so.
    parse_mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

fn parse_mounts(mountinfo: &str) -> Vec<Hierarchy> {
    let parse_line = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mount_point = PathBuf::from(mount.split(' ').nth(4)?);
        let mut words = filesystem.split(' ');
        let is_v2 = match words.next()? {
            "cgroup" => false,
            "cgroup2" => true,
            _ => return None,
        };
        let is_cpuset = !is_v2 && words.nth(1)?.split(',').any(|option| option == "cpuset");
        Some(Hierarchy { mount_point, is_v2, is_cpuset })
    };
    mountinfo.lines().filter_map(parse_line).collect()
}

/// Makes a cgroup, and those above it, in every hierarchy.
pub(super) fn create(cgroup: &str) -> Result<()> {
    let hierarchies = hierarchies();
    if hierarchies.is_empty() {
        bail!("no cgroup hierarchy is mounted: mount one, for example at /sys/fs/cgroup");
    }
    for hierarchy in hierarchies {
        let mut dir = hierarchy.mount_point.clone();
        for part in cgroup.split('/').filter(|part| !part.is_empty()) {
            if hierarchy.is_v2 {
                enable_controllers(&dir);
            }
            let above = dir.clone();
            dir.push(part);
            create_one(&dir).with_context(|| format!("make cgroup {}", dir.display()))?;
            if hierarchy.is_cpuset {
                fill_cpuset(&above, &dir).with_context(|| format!("set {}", dir.display()))?;
            }
        }
    }
    Ok(())
}

fn create_one(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        done => done,
    }
}

/// Hands every controller down that can be; one that cannot is missing below, and is no error.
fn enable_controllers(dir: &Path) {
    let controllers = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

fn fill_cpuset(above: &Path, dir: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(dir.join(file))?.trim().is_empty() {
            fs::write(dir.join(file), fs::read_to_string(above.join(file))?.trim())?;
        }
    }
    Ok(())
}

/// Moves the calling process into a cgroup, in every hierarchy.
pub(super) fn join(cgroup: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        let file = hierarchy.dir(cgroup).join("cgroup.procs");
        fs::write(&file, "0").with_context(|| format!("join {}", file.display()))?;
    }
    Ok(())
}

/// Tells whether a cgroup exists in any hierarchy.
pub(super) fn exists(cgroup: &str) -> bool {
    hierarchies().iter().any(|hierarchy| hierarchy.dir(cgroup).exists())
}

/// The names of the cgroups directly below one, in order.
pub(super) fn children(cgroup: &str) -> Vec<String> {
    let mut names = BTreeSet::new();
    for hierarchy in hierarchies() {
        let dirs = child_dirs(&hierarchy.dir(cgroup));
        names.extend(dirs.iter().filter_map(|dir| Some(dir.file_name()?.to_str()?.to_owned())));
    }
    names.into_iter().collect()
}

/// The pids in a cgroup and all below it.
fn processes(cgroup: &str) -> BTreeSet<i32> {
    let mut pids = BTreeSet::new();
    for hierarchy in hierarchies() {
        for dir in subtree(&hierarchy.dir(cgroup)) {
            let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            // 0 is a process of a PID namespace that cannot be seen from here.
            pids.extend(
                text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|p| *p > 0),
            );
        }
    }
    pids
}

/// Thaws what is frozen: with cgroup v1 a frozen process does not even die.
pub(super) fn thaw(cgroup: &str) {
    for hierarchy in hierarchies() {
        for dir in subtree(&hierarchy.dir(cgroup)) {
            let (file, thawed) = match hierarchy.is_v2 {
                true => ("cgroup.freeze", "0"),
                false => ("freezer.state", "THAWED"),
            };
            // Hierarchies without the freezer have no such file.
            if dir.join(file).exists() {
                let _ = fs::write(dir.join(file), thawed);
            }
        }
    }
}

/// Ends every process in a cgroup and below, and removes it.
///
/// Gone already is done. An error names what would not go.
pub(super) fn remove(cgroup: &str) -> Result<()> {
    let mut last_error = None;
    let removed = poll_until(REMOVE_TIMEOUT, || match try_remove(cgroup) {
        Ok(()) => Some(()),
        Err(error) => {
            last_error = Some(error);
            None
        }
    });
    match (removed, last_error) {
        (None, Some(error)) => Err(error).with_context(|| {
            let pids: Vec<String> = processes(cgroup).iter().map(i32::to_string).collect();
            format!("cgroup {cgroup} cannot be removed; processes in it: [{}]", pids.join(", "))
        }),
        _ => Ok(()),
    }
}

fn try_remove(cgroup: &str) -> Result<()> {
    kill_all(cgroup)?;
    for hierarchy in hierarchies() {
        let mut dirs = subtree(&hierarchy.dir(cgroup));
        dirs.reverse(); // Children come before the cgroup they are in.
        for dir in dirs {
            match fs::remove_dir(&dir) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| dir.display().to_string());
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn kill_all(cgroup: &str) -> Result<()> {
    let pids = processes(cgroup);
    for pid in &pids {
        let Ok(handle) = PidFd::open(*pid) else { continue };
        // The pid may have changed hands since it was read; the handle is on whoever has it now.
        if processes(cgroup).contains(pid) {
            handle.send_signal(Signal::SIGKILL).with_context(|| format!("kill {pid}"))?;
        }
    }
    if !pids.is_empty() {
        thaw(cgroup);
    }
    Ok(())
}

/// Removes a cgroup if nothing is in it.
pub(super) fn remove_if_empty(cgroup: &str) {
    for hierarchy in hierarchies() {
        // Not empty means in use, and absent means done.
        let _ = fs::remove_dir(hierarchy.dir(cgroup));
    }
}

/// A cgroup's directory and all below it, each after the one it is in; empty when absent.
fn subtree(dir: &Path) -> Vec<PathBuf> {
    let mut dirs = if dir.is_dir() { vec![dir.to_owned()] } else { Vec::new() };
    let mut next = 0;
    while next < dirs.len() {
        dirs.extend(child_dirs(&dirs[next]));
        next += 1;
    }
    dirs
}

fn child_dirs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_layouts_are_found() {
        let check = |mountinfo: &str, expect: &[(&str, bool, bool)]| {
            let found = parse_mounts(mountinfo);
            let found: Vec<_> = found
                .iter()
                .map(|h| (h.mount_point.to_str().unwrap(), h.is_v2, h.is_cpuset))
                .collect();
            assert_eq!(found, expect);
        };
        check(
            "27 1 254:0 / / rw - ext4 /dev/vda rw\n\
             34 31 0:31 / /sys/fs/cgroup/cpuset rw shared:9 - cgroup cgroup rw,cpuset\n\
             33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            &[
                ("/sys/fs/cgroup/cpuset", false, true),
                ("/sys/fs/cgroup/cpu,cpuacct", false, false),
                ("/sys/fs/cgroup/unified", true, false),
            ],
        );
        check(
            "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate",
            &[("/sys/fs/cgroup", true, false)],
        );
    }
}
