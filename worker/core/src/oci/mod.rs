//! Builds the OCI runtime specification of a container, with Docker's defaults.
//!
//! [`build`] is the one entry: image configuration, container fields, the resolved user and what the
//! host offers go in, an [`oci_spec::runtime::Spec`] comes out. The shim of a container drives it
//! after it mounted the root file system and read `/etc/passwd` and `/etc/group` from it.
//!
//! # Reading order
//!
//! [`input`] (what goes in), [`spec`] (the builder), then what it is made of: [`process`] (argv and
//! environment), [`user`], [`capabilities`], [`mounts`], [`seccomp`], [`device_filter`] (what cgroup
//! v2 needs in place of the devices controller), [`signal`] and [`from_common`].
//!
//! # Invariants
//!
//! - Nothing here reads a file, a clock or the environment: equal inputs give equal specifications.
//! - A container gets no inheritable and no ambient capability, and never `no_new_privileges:
//!   false`: the runtime would load the seccomp filter too late for it.
//! - HOME is always set, so that the runtime never looks a user up with code of the image.
//!
//! # Sources
//!
//! moby `daemon/pkg/oci/defaults.go`, `daemon/oci_linux.go`, `profiles/seccomp`; the OCI runtime
//! specification 1.2.

pub mod capabilities;
pub mod device_filter;
pub mod from_common;
pub mod input;
pub mod mounts;
pub mod payloads;
pub mod process;
pub mod seccomp;
pub mod signal;
pub mod spec;
pub mod user;

pub use input::{
    Arch, CgroupLayout, ContainerInput, Controller, GeneratedFiles, HostFacts, ImageConfig, Limits,
    MountInput, SpecInput, Ulimit,
};
pub use spec::build;
pub use user::ResolvedUser;

/// Why no specification can be made of an input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The container is on the host's network, whose parameters are not its own.
    #[error("sysctl {0:?} not allowed in host network namespace")]
    SysctlOfHost(String),
    /// Neither the image nor the service says what to run.
    #[error("no command specified")]
    NoCommand,
    /// The name is no capability that this release knows.
    #[error("unknown capability {0:?}")]
    UnknownCapability(String),
    /// The name is no resource limit of Linux.
    #[error("unknown ulimit {0:?}")]
    UnknownUlimit(String),
    /// A limit is below -1, or its soft value above its hard one.
    #[error("invalid ulimit {name}={soft}:{hard}")]
    InvalidUlimit {
        /// Name without `RLIMIT_`.
        name: String,
        /// Soft limit as given.
        soft: i64,
        /// Hard limit as given.
        hard: i64,
    },
    /// The image has no such user, and the text is not a number.
    #[error("unable to find user {0}: no matching entries in passwd file")]
    UnknownUser(String),
    /// The image has no such group, and the text is not a number.
    #[error("unable to find group {0}: no matching entries in group file")]
    UnknownGroup(String),
    /// The working directory must be absolute.
    #[error("the working directory {0:?} is invalid, it needs to be an absolute path")]
    RelativeWorkingDirectory(String),
    /// The kernel accepts -1000 to 1000.
    #[error("invalid value {0}, range for oom score adj is [-1000, 1000]")]
    OomScoreAdj(i64),
    /// Neither a name nor a number of a signal.
    #[error("invalid signal: {0}")]
    UnknownSignal(String),
    /// Paths, arguments and variables end at the first NUL byte for the kernel.
    #[error("{0} holds a NUL byte")]
    NulByte(&'static str),
}
