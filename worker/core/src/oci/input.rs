//! What a specification is built from.
//!
//! The structs are serialised into the container's run directory: the shim, another process, reads
//! them there.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The `config` object of an OCI image, as far as it concerns the run time.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// Start of the command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Rest of the command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// `NAME=value` each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<Vec<String>>,
    /// `user[:group]`, names or numbers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Absolute directory; empty is `/`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// Signal that asks the process to end; empty is SIGTERM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

/// The fields of a service's container that shape its specification.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerInput {
    /// Replaces the image's entrypoint; `[""]` removes it.
    pub command: Vec<String>,
    /// Replaces the image's command.
    pub args: Vec<String>,
    /// `NAME=value` each; `NAME` alone removes a variable of the image.
    pub env: Vec<String>,
    /// Working directory.
    pub dir: Option<String>,
    /// `user[:group]`, names or numbers.
    pub user: Option<String>,
    /// Further groups, names or numbers.
    pub groups: Vec<String>,
    /// Host name; absent is the first twelve characters of the id.
    pub hostname: Option<String>,
    /// Whether the process gets a terminal.
    pub tty: bool,
    /// Whether standard input stays open, with nobody writing to it.
    pub open_stdin: bool,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// Capabilities beyond the default set; `ALL` is all.
    pub capability_add: Vec<String>,
    /// Capabilities taken from the default set; `ALL` is all.
    pub capability_drop: Vec<String>,
    /// Kernel parameters of the container's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Resource limits of processes.
    pub ulimits: Vec<Ulimit>,
    /// Added to the kernel's score when memory runs out.
    pub oom_score_adj: Option<i64>,
    /// Whether an init process reaps the container's orphans.
    pub init: bool,
    /// Whether set-user-id programs stay without effect.
    pub no_new_privileges: bool,
    /// Size of /dev/shm in bytes; absent is 64 MiB.
    pub shm_bytes: Option<u64>,
    /// Mounts beyond the default ones.
    pub mounts: Vec<MountInput>,
    /// Resource limits of the whole container.
    pub limits: Limits,
    /// Whether it has its host's network instead of one of its own.
    pub host_network: bool,
    /// Labels of the container.
    pub labels: BTreeMap<String, String>,
}

/// Resource limits of a container; zero is no limit, as in Docker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// CPU time, in billionths of a CPU.
    pub nano_cpus: i64,
    /// Memory in bytes.
    pub memory_bytes: i64,
    /// Number of processes and threads.
    pub pids: i64,
}

/// A resource limit of a process (`setrlimit`); -1 is unlimited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// Name without `RLIMIT_`, lower case: `nofile`.
    pub name: String,
    /// Soft limit.
    pub soft: i64,
    /// Hard limit.
    pub hard: i64,
}

/// A mount of the container, in the words of the OCI specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountInput {
    /// Absolute path in the container.
    pub target: PathBuf,
    /// File system type; `bind` for a directory or file of the host.
    pub kind: String,
    /// Absolute path on the host, or the name of the file system.
    pub source: PathBuf,
    /// Options of fstab.
    pub options: Vec<String>,
}

/// Files that the runtime writes and the container sees in /etc.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneratedFiles {
    /// Becomes /etc/hosts.
    pub hosts: PathBuf,
    /// Becomes /etc/hostname.
    pub hostname: PathBuf,
    /// Becomes /etc/resolv.conf.
    pub resolv_conf: PathBuf,
}

/// All that the builder needs but the user and the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecInput {
    /// Id of the container, unique on this host.
    pub id: String,
    /// Absolute path of the mounted root file system.
    pub root: PathBuf,
    /// Absolute cgroup that holds the containers' cgroups: `/skep/<node>`.
    pub cgroup_parent: String,
    /// The image's share.
    pub image: ImageConfig,
    /// The service's share.
    pub container: ContainerInput,
    /// Files of /etc.
    pub files: GeneratedFiles,
}

impl SpecInput {
    /// The container's cgroup, relative to the mount of every hierarchy, with a leading slash.
    pub fn cgroup_path(&self) -> String {
        format!("/{}/{}", self.cgroup_parent.trim_matches('/'), self.id)
    }
}

/// Processor architectures with a seccomp table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// AMD and Intel, 64 bits.
    X86_64,
    /// ARM, 64 bits.
    Aarch64,
}

impl Arch {
    /// The architecture this program was compiled for.
    pub const NATIVE: Self =
        if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 };
}

/// A mounted cgroup v1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// Its controllers as the mount lists them: `cpu,cpuacct`.
    pub names: Vec<String>,
    /// Where it is mounted on the host.
    pub mount_point: PathBuf,
}

/// How cgroups are mounted on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupLayout {
    /// One hierarchy for all controllers.
    V2,
    /// A hierarchy per controller, with or without an unused v2 hierarchy beside them.
    V1(Vec<Controller>),
}

/// What the builder must know of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// Processor architecture.
    pub arch: Arch,
    /// Cgroup hierarchies.
    pub cgroup: CgroupLayout,
    /// Whether the kernel can limit swap per cgroup.
    pub has_swap_limit: bool,
    /// Highest capability of the kernel (`/proc/sys/kernel/cap_last_cap`).
    pub last_capability: u8,
    /// Paths that this host must hide beyond the default ones.
    pub masked_paths: Vec<String>,
}
