//! The last steps inside the container before its program runs.
//!
//! Both executors run in a process that libcontainer cloned from the shim or the exec helper, with
//! the container's namespaces, user and capabilities.

use std::ffi::CString;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use libcontainer::oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::default::DefaultExecutor;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use libcontainer::{capabilities, seccomp};

use nix::errno::Errno;
use nix::unistd::execv;

use super::super::error::chain;
use super::small_init;
use crate::sys;

/// Exit code of a program that exists and cannot be executed; the shell's convention.
const EXIT_NOT_EXECUTABLE: i32 = 126;

/// Exit code of a program that does not exist.
const EXIT_NOT_FOUND: i32 = 127;

/// Starts the container's program, with a small init before it where asked.
#[derive(Clone)]
pub(super) struct InitExecutor {
    /// Closed by a successful `exec`; otherwise it takes the reason.
    result: Rc<OwnedFd>,
    has_init: bool,
}

impl InitExecutor {
    pub(super) fn new(result: Rc<OwnedFd>, has_init: bool) -> Self {
        Self { result, has_init }
    }
}

impl Executor for InitExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let run = || -> Result<(), ExecutorError> {
            sys::reset_signals().map_err(other)?;
            if self.has_init {
                small_init::fork_child(&self.result).map_err(other)?;
            }
            execute(spec)
        };
        let Err(error) = run() else { return Ok(()) };
        if let Ok(copy) = self.result.try_clone() {
            // The shim may have been killed; the exit code tells as much.
            let _ = std::fs::File::from(copy).write_all(error.to_string().as_bytes());
        }
        // Not returning: the runtime would exit with a code that means nothing to the user.
        let is_missing = Errno::last() == Errno::ENOENT;
        std::process::exit(if is_missing { EXIT_NOT_FOUND } else { EXIT_NOT_EXECUTABLE })
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        DefaultExecutor {}.validate(spec)
    }
}

/// Starts a further program in a running container.
///
/// libcontainer gives such a program no seccomp filter. It is loaded here, while the process still
/// has CAP_SYS_ADMIN, and only then are the capabilities reduced to the container's.
#[derive(Clone)]
pub(in super::super) struct ExecExecutor {
    seccomp: Option<LinuxSeccomp>,
    capabilities: LinuxCapabilities,
}

impl ExecExecutor {
    /// For a container with this filter and these capabilities.
    pub(in super::super) fn new(
        seccomp: Option<LinuxSeccomp>,
        capabilities: LinuxCapabilities,
    ) -> Self {
        Self { seccomp, capabilities }
    }
}

impl Executor for ExecExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if let Some(filter) = &self.seccomp {
            seccomp::initialize_seccomp(filter).map_err(other)?;
        }
        let syscall = create_syscall();
        capabilities::drop_privileges(&self.capabilities, syscall.as_ref()).map_err(other)?;
        sys::reset_signals().map_err(other)?;
        execute(spec)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        DefaultExecutor {}.validate(spec)
    }
}

/// Replaces this process by the program, found in PATH as the shell would.
///
/// Unlike the runtime's own way it does not hand what is no program to /bin/sh.
fn execute(spec: &Spec) -> Result<(), ExecutorError> {
    let arguments = spec.process().as_ref().and_then(|process| process.args().as_ref());
    let arguments = arguments.ok_or(ExecutorError::InvalidArg)?;
    let words: Vec<CString> = arguments
        .iter()
        .map(|word| CString::new(word.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|_| ExecutorError::InvalidArg)?;
    let name = arguments.first().ok_or(ExecutorError::InvalidArg)?;
    let paths = std::env::var("PATH").unwrap_or_default();
    let candidates: Vec<String> = if name.contains('/') {
        vec![name.clone()]
    } else {
        paths.split(':').map(|directory| format!("{directory}/{name}")).collect()
    };
    let mut failure = (name.clone(), Errno::ENOENT);
    for candidate in candidates {
        let path = CString::new(candidate.as_bytes()).map_err(|_| ExecutorError::InvalidArg)?;
        let Err(error) = execv(&path, &words);
        // A later directory may have it; of the failures the most telling one is kept.
        if failure.1 == Errno::ENOENT {
            failure = (candidate, error);
        }
        if !matches!(error, Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES) {
            break;
        }
    }
    let (path, error) = failure;
    error.set();
    Err(ExecutorError::Other(format!("exec {path}: {}", error.desc())))
}

fn other(error: impl std::error::Error) -> ExecutorError {
    ExecutorError::Other(chain(&error))
}
