//! A container's cgroup, in one hierarchy or in many: counts, kills, removes.
//!
//! Blocking; called by the shim and on the daemon's blocking threads. libcontainer makes the cgroup
//! and its limits.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skep_worker_core::oci::{CgroupLayout, device_filter};

use super::host;
use crate::sys;

/// First pause before a busy cgroup is removed again; each next one is twice as long.
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// Removals of a busy cgroup: pauses up to this number sum to about two seconds.
const N_BUSY_TRIES: u32 = 11;

/// Rounds of listing and killing. A frozen group needs one; without a freezer a process may fork
/// while it is being killed, and each round halves what is left at least.
const N_KILL_ROUNDS: usize = 32;

/// The cgroup of one container in every hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    directories: Vec<PathBuf>,
    memory: Option<PathBuf>,
    is_v2: bool,
}

impl Cgroup {
    /// The cgroup at `path`, which starts with a slash, below the mounts of this host.
    pub fn open(path: &str) -> io::Result<Self> {
        let layout = host::cgroup_layout(&fs::read_to_string("/proc/self/mountinfo")?);
        Ok(Self::at(&layout, path))
    }

    /// The cgroup at `path` in `layout`; it need not exist.
    pub fn at(layout: &CgroupLayout, path: &str) -> Self {
        let relative = path.trim_start_matches('/');
        match layout {
            CgroupLayout::V2 => {
                let directory = Path::new(host::CGROUP_ROOT).join(relative);
                let memory = Some(directory.clone());
                Self { directories: vec![directory], memory, is_v2: true }
            }
            CgroupLayout::V1(controllers) => {
                let of = |name: &str| {
                    let has = |names: &[String]| names.iter().any(|known| known == name);
                    controllers.iter().find(move |controller| has(&controller.names))
                };
                let directories =
                    controllers.iter().map(|mount| mount.mount_point.join(relative)).collect();
                let memory = of("memory").map(|mount| mount.mount_point.join(relative));
                Self { directories, memory, is_v2: false }
            }
        }
    }

    /// Whether any part of it exists.
    pub fn exists(&self) -> bool {
        self.directories.iter().any(|directory| directory.exists())
    }

    /// How many processes of it the kernel killed because memory ran out.
    pub fn n_oom_kills(&self) -> u64 {
        let file = if self.is_v2 { "memory.events" } else { "memory.oom_control" };
        let text = self.memory.as_ref().map(|directory| fs::read_to_string(directory.join(file)));
        let text = text.and_then(Result::ok).unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    /// All processes of it and of the cgroups below it.
    pub fn pids(&self) -> BTreeSet<i32> {
        let mut pids = BTreeSet::new();
        for directory in self.directories.iter().filter(|directory| directory.exists()) {
            visit(directory, &mut |directory| {
                let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            });
        }
        // A process of another pid namespace reads as 0, which would signal our own group.
        pids.remove(&0);
        pids
    }

    /// Sends SIGKILL to every process of it.
    pub fn kill_all(&self) {
        if !self.exists() {
            return;
        }
        let kill_file = self.directories.first().map(|directory| directory.join("cgroup.kill"));
        if self.is_v2 && kill_file.is_some_and(|file| fs::write(file, "1").is_ok()) {
            return;
        }
        self.set_frozen(true);
        let mut killed = BTreeSet::new();
        for _ in 0..N_KILL_ROUNDS {
            let pids = self.pids();
            if pids.is_subset(&killed) {
                break;
            }
            for pid in &pids {
                // ESRCH: it ended by itself, which is as good.
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            killed.extend(pids);
        }
        // A frozen process dies when it is thawed.
        self.set_frozen(false);
    }

    /// Stops or continues all processes, where the kernel can, so that none forks away.
    fn set_frozen(&self, is_frozen: bool) {
        for directory in &self.directories {
            let (file, value) = match (self.is_v2, is_frozen) {
                (true, true) => ("cgroup.freeze", "1"),
                (true, false) => ("cgroup.freeze", "0"),
                (false, true) => ("freezer.state", "FROZEN"),
                (false, false) => ("freezer.state", "THAWED"),
            };
            let file = directory.join(file);
            if file.exists() {
                // Best effort: killing goes on in rounds without it.
                let _ = fs::write(file, value);
            }
        }
    }

    /// Kills what runs in it and removes it.
    ///
    /// The kernel may call it busy for a moment after its last process ended; that is retried for
    /// about two seconds.
    pub fn remove(&self) -> io::Result<()> {
        let mut pause = BUSY_PAUSE;
        for attempt in 1..=N_BUSY_TRIES {
            self.kill_all();
            match self.try_remove() {
                Err(error) if is_busy(&error) && attempt < N_BUSY_TRIES => {
                    std::thread::sleep(pause);
                    pause *= 2;
                }
                other => return other,
            }
        }
        Ok(())
    }

    fn try_remove(&self) -> io::Result<()> {
        let mut result = Ok(());
        for directory in &self.directories {
            let mut found = Vec::new();
            if directory.exists() {
                visit(directory, &mut |directory| found.push(directory.to_path_buf()));
            }
            // Children come after their parents in the list.
            for directory in found.iter().rev() {
                match fs::remove_dir(directory) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => result = Err(error),
                    _ => {}
                }
            }
        }
        result
    }

    /// Denies devices that containers must not use. v1 has a controller for it; here it is a BPF
    /// program.
    pub fn restrict_devices(&self) -> io::Result<()> {
        let Some(directory) = self.directories.first().filter(|_| self.is_v2) else {
            return Ok(());
        };
        let program = device_filter::program(&device_filter::default_rules());
        sys::attach_device_filter(File::open(directory)?.as_fd(), &program)
    }
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EBUSY as i32)
}

/// Calls `action` for `directory` and all directories below it, parents first.
fn visit(directory: &Path, action: &mut dyn FnMut(&Path)) {
    action(directory);
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            visit(&entry.path(), action);
        }
    }
}
