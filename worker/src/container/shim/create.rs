//! Makes a container up to the point where it waits for its start.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use skep_runtime::sys::ProcessId;
use skep_worker_core::oci::payloads::PayloadFile;
use skep_worker_core::oci::{self, user};

use super::super::cgroup::Cgroup;
use super::super::dirs::{DataDir, RunDir, write_atomically};
use super::super::error::{Context, Error, unwrapped};
use super::super::host;
use super::super::logs::format::Stream;
use super::super::payloads;
use super::super::protocol::{Phase, ShimConfig, ShimState};
use super::super::rootfs::{HostMounts, make_directories, mount_overlay, read_text, replace_link};
use super::console::Console;
use super::executor::InitExecutor;
use super::messages::Messages;
use super::output::Output;
use super::{OOM_SCORE_ADJ, write_state};

/// How soon the kernel kills this process when memory runs out.
const OOM_SCORE_FILE: &str = "/proc/self/oom_score_adj";

/// A container that waits for its start, and the ends of its pipes.
pub(super) struct Waiting {
    pub(super) container: Container,
    pub(super) init: ProcessId,
    pub(super) state: ShimState,
    pub(super) cgroup: Cgroup,
    pub(super) outputs: Vec<Output>,
    /// Ends when the program is executed; until then it may bring the reason why it is not.
    pub(super) exec_result: OwnedFd,
    /// Holds the container's standard input open, where it is to stay open.
    pub(super) _stdin: Option<OwnedFd>,
}

/// Makes the container; on failure nothing of it runs and no cgroup is left.
pub(super) fn create(
    run: &RunDir,
    data: &DataDir,
    config: &ShimConfig,
    files: Vec<PayloadFile>,
    mut state: ShimState,
) -> Result<Waiting, Error> {
    let input = &config.spec;
    let own_score =
        fs::read_to_string(OOM_SCORE_FILE).during(|| format!("read {OOM_SCORE_FILE}"))?;
    let host_mounts = HostMounts::leave()?;
    let root = mount_overlay(run, data, &config.layers)?;
    payloads::write(run, &files)?;
    drop(files);
    write_spec(run, config, &root)?;

    let (exec_result, exec_result_write) = pipe()?;
    let executor = InitExecutor::new(Rc::new(exec_result_write), input.container.init);
    let runtime_root = run.runtime_root();
    fs::create_dir_all(&runtime_root).during(|| format!("create {}", runtime_root.display()))?;
    let mut builder = ContainerBuilder::new(input.id.clone(), SyscallType::Linux)
        .with_root_path(&runtime_root)
        .map_err(|error| create_error(&input.id, &error))?
        .with_executor(executor);

    let mut stdin = None;
    let mut outputs = Vec::new();
    let mut console = None;
    if input.container.tty {
        console = Some(Console::listen(run)?);
        builder = builder.with_console_socket(Some(run.console_socket()));
    } else {
        let (read, write) = pipe()?;
        if input.container.open_stdin {
            stdin = Some(write);
            builder = builder.with_stdin(read);
        } else {
            builder = builder.with_stdin(open_null()?);
        }
        let (stdout, stdout_write) = pipe()?;
        let (stderr, stderr_write) = pipe()?;
        builder = builder.with_stdout(stdout_write).with_stderr(stderr_write);
        outputs.push(Output::new(stdout, Stream::Stdout)?);
        outputs.push(Output::new(stderr, Stream::Stderr)?);
    }
    let cgroup = Cgroup::open(&input.cgroup_path()).during(|| "find the cgroup mounts".into())?;
    let messages = Messages::collect(run)?;
    let built =
        builder.as_init(run.path()).with_systemd(false).with_detach(true).as_sibling(false).build();
    let container = built.map_err(|error| {
        // The runtime removes it too, but gives up where the kernel calls it busy.
        let _ = cgroup.remove();
        let reason = messages.explain(&unwrapped(&error));
        Error::Create { id: input.id.clone(), reason }
    })?;

    let finish = || -> Result<ProcessId, Error> {
        let pid = container.pid().map(|pid| pid.as_raw()).ok_or(io::Error::other("no pid"));
        let init = pid.and_then(ProcessId::of).during(|| "read the container's pid".into())?;
        if let Some(console) = console {
            outputs.push(Output::new(console.accept()?, Stream::Stdout)?);
        }
        cgroup.restrict_devices().during(|| "restrict the container's devices".into())?;
        host_mounts.enter()?;
        protect_from_oom(&own_score);
        state.init = Some(init);
        state.phase = Phase::Created;
        write_state(run, &state)?;
        Ok(init)
    };
    let init = finish().inspect_err(|_| {
        let _ = cgroup.remove();
    })?;
    Ok(Waiting { container, init, state, cgroup, outputs, exec_result, _stdin: stdin })
}

/// Resolves the user in the image, makes the working directory, writes `config.json`.
fn write_spec(run: &RunDir, config: &ShimConfig, root: &Path) -> Result<(), Error> {
    let input = &config.spec;
    let invalid =
        |error: oci::Error| Error::Create { id: input.id.clone(), reason: error.to_string() };
    let passwd = read_text(root, "/etc/passwd")?;
    let group = read_text(root, "/etc/group")?;
    let user_text = oci::spec::user_text(input);
    let user =
        user::resolve(user_text, &input.container.groups, &passwd, &group).map_err(invalid)?;
    let host = host::facts().during(|| "read what the host offers".into())?;
    let spec = oci::build(input, &user, &host).map_err(invalid)?;
    for name in ["hosts", "hostname", "resolv.conf"] {
        replace_link(root, "/etc", name)?;
    }
    make_directories(root, &oci::spec::working_directory(input).map_err(invalid)?)?;
    let text = serde_json::to_vec(&spec).map_err(io::Error::from);
    text.and_then(|text| write_atomically(&run.spec(), &text))
        .during(|| format!("write {}", run.spec().display()))
}

/// Takes back the container's score, which the runtime set on this process for it to inherit.
///
/// Where the right to go below the daemon's own score is missing, the shim keeps that one.
fn protect_from_oom(own_score: &str) {
    if fs::write(OOM_SCORE_FILE, OOM_SCORE_ADJ).is_err() {
        let _ = fs::write(OOM_SCORE_FILE, own_score.trim());
    }
}

fn create_error(id: &str, error: &libcontainer::error::LibcontainerError) -> Error {
    Error::Create { id: id.to_owned(), reason: unwrapped(error) }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    pipe2(OFlag::O_CLOEXEC).during(|| "make a pipe".into())
}

fn open_null() -> Result<OwnedFd, Error> {
    let path = PathBuf::from("/dev/null");
    let file = OpenOptions::new().read(true).open(path).during(|| "open /dev/null".into())?;
    Ok(file.into())
}
