//! `skep lab down`: removes a lab, and whatever a crashed one left.
//!
//! # Invariants
//!
//! - What exists is found by looking (directories, cgroups, processes in them), not by trusting
//!   what was recorded: the record may be missing or cut short.
//! - Every step is tried, whatever became of those before; all that failed is told.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::signal::Signal;
use skep_runtime::sys::ProcessId;

use super::node::{NODE_DATA_DIR, NODE_RUN_DIR, power_off};
use super::state::{CGROUP_ROOT, Lab, LabPaths, Lock, all_names, remove_empty_roots, roots};
use super::{cgroup, link};

/// Marks a mount point that a lab made, below the root that lasts as long: see
/// [`make_mount_points`].
const MOUNT_POINT_MARKS: [(&str, &str); 2] =
    [(NODE_DATA_DIR, ".made-data-dir"), (NODE_RUN_DIR, ".made-run-dir")];

/// Arguments of `skep lab down`.
#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Remove every lab of this machine.
    #[arg(long)]
    all: bool,
}

/// Runs the command.
pub(super) fn run(name: &str, args: &DownArgs) -> Result<()> {
    if !args.all {
        let paths = LabPaths::new(name);
        if !paths.exists() {
            bail!(paths.not_found());
        }
        return remove(&paths);
    }
    let mut errors = Vec::new();
    for name in all_names() {
        match remove(&LabPaths::new(&name)) {
            Ok(()) => eprintln!("lab {name} removed"),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    if errors.is_empty() { Ok(()) } else { bail!(errors.join("\n")) }
}

fn remove(paths: &LabPaths) -> Result<()> {
    remove_locked(paths, paths.lock()?)
}

/// Removes a lab if, once nothing else changes it, it is still the one that is meant.
pub(super) fn remove_if(paths: &LabPaths, is_meant: impl Fn(&Lab) -> bool) -> Result<()> {
    let lock = paths.lock()?;
    match paths.load() {
        Ok(lab) if is_meant(&lab) => remove_locked(paths, lock),
        _ if paths.exists() => Ok(()),
        _ => lock.remove().and_then(|()| leave()),
    }
}

/// Removes a lab whose lock the caller holds, and the lock.
pub(super) fn remove_locked(paths: &LabPaths, lock: Lock) -> Result<()> {
    let demolished = demolish(paths);
    lock.remove()?;
    leave()?;
    demolished
}

fn demolish(paths: &LabPaths) -> Result<()> {
    let mut errors = Vec::new();
    let mut step = |done: Result<()>| errors.extend(done.err().map(|error| format!("{error:#}")));
    let lab = paths.load().ok();
    if let Some(lab) = &lab {
        step(stop_watchdog(lab));
        let members: Vec<&str> = lab.members().collect();
        step(power_off(paths, &members));
        step(link::remove_host_link(&lab.host_link));
    }
    // Processes that nobody recorded are found by their cgroup.
    step(cgroup::remove(&paths.cgroup()));
    for dir in [&paths.data, &paths.run] {
        step(remove_dir(dir));
    }
    match errors.is_empty() {
        true => Ok(()),
        false => bail!("lab {}: {}", paths.name, errors.join("; ")),
    }
}

fn stop_watchdog(lab: &Lab) -> Result<()> {
    let Some(watchdog) = lab.watchdog.filter(|dog| Some(*dog) != ProcessId::current().ok()) else {
        return Ok(());
    };
    match watchdog.open()? {
        Some(handle) => handle.send_signal(Signal::SIGKILL).context("end the watchdog"),
        None => Ok(()),
    }
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Makes the directories that nodes mount theirs on; the caller holds the lock of all labs.
///
/// A machine where skep is not installed has none, and the last lab removes what the first made.
pub(super) fn make_mount_points() -> Result<()> {
    for (dir, mark) in MOUNT_POINT_MARKS {
        if !Path::new(dir).exists() {
            let mark = mark_path(mark);
            fs::write(&mark, "").with_context(|| format!("write {}", mark.display()))?;
            super::state::make_dir(Path::new(dir), 0o700)?;
        }
    }
    Ok(())
}

fn mark_path(mark: &str) -> std::path::PathBuf {
    roots()[0].join(mark)
}

/// Removes what all labs share once the last one is gone.
fn leave() -> Result<()> {
    let global = Lock::acquire_global()?;
    if !all_names().is_empty() {
        return Ok(());
    }
    cgroup::remove_if_empty(CGROUP_ROOT);
    for (dir, mark) in MOUNT_POINT_MARKS {
        if fs::remove_file(mark_path(mark)).is_ok() {
            // Something else may have begun to use it meanwhile; then it stays.
            let _ = fs::remove_dir(dir);
        }
    }
    global.remove()?;
    remove_empty_roots();
    Ok(())
}
