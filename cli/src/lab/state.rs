//! What is recorded of a lab, and where.
//!
//! ```text
//! /run/skep-lab/.lock                  lock: choosing subnets, sharing mount points
//! /run/skep-lab/.NAME.lock             lock: one changing command of a lab at a time
//! /run/skep-lab/NAME/lab.json          the lab; written whole, then renamed
//! /run/skep-lab/NAME/MEMBER/           spec.json, init.json (pid, start time), control.sock, init.log
//! /run/skep-lab/NAME/MEMBER/run/       the node's /run/skep
//! /var/lib/skep-lab/NAME/NODE/data/    the node's /var/lib/skep
//! /var/lib/skep-lab/NAME/NODE/daemon.log
//! ```
//!
//! What can be observed is not recorded: whether a node or its daemon runs is asked of the kernel
//! and of the node's init.

use std::fmt;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use skep_runtime::sys::ProcessId;

/// The member that holds the bridge.
pub(super) const SWITCH: &str = "switch";
/// The member that is an outside client.
pub(super) const CLIENT: &str = "client";
/// The last number of the client's address; nodes have 1 to 249.
pub(super) const CLIENT_NUMBER: u8 = 250;
/// The last number of the host's address.
pub(super) const HOST_NUMBER: u8 = 254;
/// Most nodes of one lab: their addresses end below the client's.
pub(super) const N_NODES_MAX: u8 = CLIENT_NUMBER - 1;

const RUN_ROOT: &str = "/run/skep-lab";
const DATA_ROOT: &str = "/var/lib/skep-lab";
/// Longest name of a lab: socket paths below its directory must stay under 108 bytes.
const NAME_LENGTH_MAX: usize = 31;

/// A lab, as recorded in `lab.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Lab {
    /// Tells this lab from a later one of the same name.
    pub id: String,
    pub name: String,
    pub phase: Phase,
    /// The first address of the /24.
    pub subnet: Ipv4Addr,
    /// The host's end of its link to the switch.
    pub host_link: String,
    pub watchdog: Option<ProcessId>,
    /// What nodes run instead of this program, in tests of the lab itself.
    pub daemon_program: Option<PathBuf>,
    /// Its daemons take tasks for running without containers.
    #[serde(default)]
    pub has_no_containers: bool,
    pub nodes: Vec<Node>,
}

/// How far `up` came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// `up` still runs, or was ended before it was done.
    Starting,
    Up,
}

/// A node of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Node {
    /// `n1`, `n2`, …: also its host name.
    pub name: String,
    /// The last number of its address.
    pub number: u8,
    pub role: Role,
    /// The cable is pulled; that outlasts a power loss.
    pub is_cut: bool,
    /// Its daemon balances published ports.
    #[serde(default)]
    pub is_in_user_space: bool,
}

/// What a node joined the swarm as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    Manager,
    Worker,
}

impl Role {
    /// The word of `skep swarm join-token`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Manager => "manager",
            Self::Worker => "worker",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Lab {
    /// The address of the member with this number.
    pub(super) fn address(&self, number: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.subnet.octets();
        Ipv4Addr::new(a, b, c, number)
    }

    /// Finds a node by its name.
    pub(super) fn node(&self, name: &str) -> Result<&Node> {
        let found = self.nodes.iter().find(|node| node.name == name);
        found.with_context(|| {
            let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
            format!("lab {} has no node {name}; it has {}", self.name, names.join(", "))
        })
    }

    /// All members: the nodes, the client and the switch.
    pub(super) fn members(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().map(|node| node.name.as_str()).chain([CLIENT, SWITCH])
    }
}

/// Where a lab's files are.
#[derive(Debug, Clone)]
pub(super) struct LabPaths {
    pub name: String,
    pub run: PathBuf,
    pub data: PathBuf,
}

impl LabPaths {
    pub(super) fn new(name: &str) -> Self {
        let (run, data) = (Path::new(RUN_ROOT).join(name), Path::new(DATA_ROOT).join(name));
        Self { name: name.to_owned(), run, data }
    }

    /// The cgroup of the whole lab.
    pub(super) fn cgroup(&self) -> String {
        format!("{CGROUP_ROOT}/{}", self.name)
    }

    pub(super) fn member(&self, name: &str) -> MemberPaths {
        MemberPaths {
            run: self.run.join(name),
            data: self.data.join(name),
            cgroup: format!("{}/{name}", self.cgroup()),
        }
    }

    /// Tells whether anything of a lab with this name is on the machine.
    pub(super) fn exists(&self) -> bool {
        self.run.exists() || self.data.exists() || super::cgroup::exists(&self.cgroup())
    }

    /// Reads the lab; a clear error when there is none.
    pub(super) fn load(&self) -> Result<Lab> {
        let path = self.run.join("lab.json");
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => bail!(self.not_found()),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    /// Says that there is no such lab, and which there are.
    pub(super) fn not_found(&self) -> String {
        match all_names().as_slice() {
            [] => format!("there is no lab {}: start one with `skep lab up`", self.name),
            names => format!("there is no lab {}; there is: {}", self.name, names.join(", ")),
        }
    }

    pub(super) fn save(&self, lab: &Lab) -> Result<()> {
        write_json(&self.run.join("lab.json"), lab)
    }

    /// Waits for the lab's lock; commands that change a lab hold it.
    pub(super) fn lock(&self) -> Result<Lock> {
        Lock::acquire(&format!(".{}.lock", self.name))
    }
}

/// Where a member's files are.
#[derive(Debug, Clone)]
pub(super) struct MemberPaths {
    pub run: PathBuf,
    pub data: PathBuf,
    /// Daemon and init are in the child `init`, containers in children of their own.
    pub cgroup: String,
}

impl MemberPaths {
    pub(super) fn spec(&self) -> PathBuf {
        self.run.join("spec.json")
    }

    pub(super) fn control_socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    pub(super) fn init_log(&self) -> PathBuf {
        self.run.join("init.log")
    }

    /// What the node sees as /run/skep.
    pub(super) fn run_dir(&self) -> PathBuf {
        self.run.join("run")
    }

    /// What the node sees as /var/lib/skep.
    pub(super) fn data_dir(&self) -> PathBuf {
        self.data.join("data")
    }

    pub(super) fn daemon_log(&self) -> PathBuf {
        self.data.join("daemon.log")
    }

    /// Where the first stage of an init records the second.
    pub(super) fn init(&self) -> PathBuf {
        self.run.join("init.json")
    }

    /// The init that was recorded; it may be gone.
    pub(super) fn load_init(&self) -> Option<ProcessId> {
        let bytes = fs::read(self.init()).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

/// The cgroup above those of all labs.
pub(super) const CGROUP_ROOT: &str = "/skep-lab";

/// A lock file; the lock ends with the value, or with the process.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    _file: Flock<File>,
}

impl Lock {
    fn acquire(file_name: &str) -> Result<Self> {
        let path = Path::new(RUN_ROOT).join(file_name);
        loop {
            make_dir(Path::new(RUN_ROOT), 0o755)?;
            let file = match File::create(&path) {
                Ok(file) => file,
                // Another lab's `down` has just removed the directory.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            };
            let file = lock_file(file).with_context(|| format!("lock {}", path.display()))?;
            // The holder before may have removed the file: then this lock guards nothing.
            if is_same_file(&file, &path) {
                return Ok(Self { path, _file: file });
            }
        }
    }

    /// Waits for the lock that all labs share.
    pub(super) fn acquire_global() -> Result<Self> {
        Self::acquire(".lock")
    }

    /// Removes the file while it is still locked.
    pub(super) fn remove(self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("remove {}", self.path.display()))
    }
}

fn lock_file(mut file: File) -> Result<Flock<File>> {
    loop {
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EINTR)) => file = again,
            Err((_, error)) => return Err(error.into()),
        }
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    let (Ok(open), Ok(named)) = (file.metadata(), fs::metadata(path)) else { return false };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

/// Checks the name of a lab: it becomes part of paths, cgroups and messages.
pub(super) fn check_name(name: &str) -> Result<()> {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let is_fine = !name.is_empty()
        && name.len() <= NAME_LENGTH_MAX
        && !name.starts_with('-')
        && name.chars().all(is_word);
    if !is_fine {
        bail!(
            "{name:?} is no name for a lab: at most {NAME_LENGTH_MAX} of a-z, 0-9 and -, \
             not starting with -"
        );
    }
    Ok(())
}

/// The names of all labs of which anything is left, in order.
pub(super) fn all_names() -> Vec<String> {
    let mut names = super::cgroup::children(CGROUP_ROOT);
    for root in [RUN_ROOT, DATA_ROOT] {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        names.extend(entries.filter_map(|entry| entry.file_name().into_string().ok()));
    }
    names.retain(|name| check_name(name).is_ok());
    names.sort();
    names.dedup();
    names
}

/// The directories above those of all labs.
pub(super) fn roots() -> Vec<PathBuf> {
    [RUN_ROOT, DATA_ROOT].map(PathBuf::from).to_vec()
}

/// Removes the directories above the labs' own when the last lab is gone.
pub(super) fn remove_empty_roots() {
    for root in [RUN_ROOT, DATA_ROOT] {
        // Not empty means in use, and absent means done.
        let _ = fs::remove_dir(root);
    }
}

/// Makes a directory and those above it; an existing one stays as it is.
pub(super) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.with_context(|| format!("make directory {}", path.display()))
}

/// Writes a file whole or not at all.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let new_path = path.with_extension("new");
    let text = serde_json::to_vec_pretty(value).context("encode")?;
    fs::write(&new_path, text).with_context(|| format!("write {}", new_path.display()))?;
    fs::rename(&new_path, path).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_short_word() {
        for name in ["lab", "t12-3", "0"] {
            check_name(name).unwrap();
        }
        for name in ["", "-x", "Lab", "a/b", "..", "a.b", &"x".repeat(32)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn paths_of_sockets_fit_for_the_longest_name() {
        let member = LabPaths::new(&"x".repeat(NAME_LENGTH_MAX)).member("switch");
        for path in [member.control_socket(), member.run_dir().join("skep.sock")] {
            assert!(path.as_os_str().len() < 108, "{}", path.display());
        }
    }
}
