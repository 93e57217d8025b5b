//! A runtime of its own for every test: directories, cgroup, a root file system of busybox.

use std::fs;
use std::future::Future;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use skep_common::spec::LogRotation;
use skep_worker::container::cgroup::Cgroup;
use skep_worker::container::{
    ContainerConfig, ContainerRuntime, Error, ExitStatus, LogOptions, LogRecord, Options, Stream,
};
use skep_worker_core::oci::{ContainerInput, ImageConfig};

const BUSYBOX: &str = "/bin/busybox";

/// Why the tests cannot run here.
pub(crate) fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("containers need root".into());
    }
    if !Path::new(BUSYBOX).exists() {
        return Some(format!("{BUSYBOX} is missing (Debian: busybox-static)"));
    }
    None
}

/// The directories and the cgroup of one test.
pub(crate) struct Environment {
    pub(crate) base: PathBuf,
    pub(crate) options: Options,
    pub(crate) runtime: ContainerRuntime,
}

/// Runs a test on a runtime of its own.
pub(crate) fn block_on<F: Future<Output = ()>>(test: impl FnOnce(Environment) -> F) {
    tokio().block_on(async { test(Environment::new()).await });
}

pub(crate) fn tokio() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().expect("a runtime")
}

pub(crate) fn options(base: &Path, cgroup_parent: &str) -> Options {
    Options {
        containers_dir: base.join("run"),
        state_dir: base.join("data"),
        cgroup_parent: cgroup_parent.into(),
        self_exe: "/proc/self/exe".into(),
    }
}

impl Environment {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("skep-test-container-{}-{number}", std::process::id());
        let base = std::env::temp_dir().join(&name);
        fs::create_dir_all(&base).unwrap();
        let options = options(&base, &format!("/{name}"));
        let runtime = ContainerRuntime::open(options.clone()).unwrap();
        Self { base, options, runtime }
    }

    /// A second daemon on the same directories.
    pub(crate) fn reopen(&self) -> ContainerRuntime {
        ContainerRuntime::open(self.options.clone()).unwrap()
    }

    pub(crate) fn cgroup(&self, id: &str) -> Cgroup {
        Cgroup::open(&format!("{}/{id}", self.options.cgroup_parent)).unwrap()
    }

    pub(crate) fn run_dir(&self, id: &str) -> PathBuf {
        self.options.containers_dir.join(id)
    }

    pub(crate) fn data_dir(&self, id: &str) -> PathBuf {
        self.options.state_dir.join(id)
    }

    /// Runs a container to its end.
    pub(crate) async fn run(&self, id: &str, container: ContainerInput) -> Outcome {
        self.run_config(&config(id, container)).await
    }

    /// Runs a shell script in a container to its end.
    pub(crate) async fn sh(&self, id: &str, script: &str) -> Outcome {
        self.run(id, shell(script)).await
    }

    pub(crate) async fn run_config(&self, config: &ContainerConfig) -> Outcome {
        self.start(config).await;
        self.outcome(&config.id).await
    }

    /// Makes and starts a container; gives its first process.
    pub(crate) async fn start(&self, config: &ContainerConfig) -> i32 {
        let created = self.runtime.create(config).await.unwrap();
        self.runtime.start(&config.id).await.unwrap();
        created.pid
    }

    /// Waits for the end, reads the log, removes the container.
    pub(crate) async fn outcome(&self, id: &str) -> Outcome {
        let exit = self.runtime.wait(id).await.unwrap();
        let records = self.records(id).await;
        self.runtime.remove(id).await.unwrap();
        assert!(!self.run_dir(id).exists() && !self.data_dir(id).exists());
        assert!(!self.cgroup(id).exists(), "the cgroup of {id} is left");
        Outcome { exit, records }
    }

    pub(crate) async fn records(&self, id: &str) -> Vec<LogRecord> {
        collect(self.runtime.logs(id, LogOptions::default()).await.unwrap()).await
    }

    /// Waits until the container has written a line of this text.
    pub(crate) async fn line(&self, id: &str, text: &str) {
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let mut reader = self.runtime.logs(id, options).await.unwrap();
        while let Some(record) = reader.next().await.unwrap() {
            if record.line == text {
                return;
            }
        }
        panic!("{id} ended without writing {text:?}");
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        // Also after a failed test: all of it is below this test's own cgroup and directories.
        Cgroup::open(&self.options.cgroup_parent).unwrap().remove().unwrap();
        fs::remove_dir_all(&self.base).unwrap();
    }
}

/// How a container ended and what it wrote.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) exit: ExitStatus,
    pub(crate) records: Vec<LogRecord>,
}

impl Outcome {
    fn text(&self, stream: Stream) -> String {
        let records = self.records.iter().filter(|record| record.stream == stream);
        let lines = records
            .map(|record| format!("{}{}", record.line, if record.is_partial { "" } else { "\n" }));
        lines.collect()
    }

    pub(crate) fn stdout(&self) -> String {
        self.text(Stream::Stdout)
    }

    pub(crate) fn stderr(&self) -> String {
        self.text(Stream::Stderr)
    }

    /// Standard output of a container that ended well.
    #[track_caller]
    pub(crate) fn good(&self) -> String {
        assert_eq!(self.exit.exit_code, 0, "{self:?}");
        self.stdout()
    }
}

pub(crate) async fn collect(mut reader: skep_worker::container::LogReader) -> Vec<LogRecord> {
    let mut records = Vec::new();
    while let Some(record) = reader.next().await.unwrap() {
        records.push(record);
    }
    records
}

/// A container that runs a shell script.
pub(crate) fn shell(script: &str) -> ContainerInput {
    ContainerInput {
        command: ["/bin/sh", "-c", script].map(String::from).to_vec(),
        ..ContainerInput::default()
    }
}

pub(crate) fn config(id: &str, container: ContainerInput) -> ContainerConfig {
    config_on(busybox_layer(), id, container)
}

/// The same on another layer.
pub(crate) fn config_on(layer: PathBuf, id: &str, container: ContainerInput) -> ContainerConfig {
    ContainerConfig {
        id: id.into(),
        layers: vec![layer],
        image: ImageConfig::default(),
        container,
        log: LogRotation::default(),
        etc_hosts: "127.0.0.1 localhost\n".into(),
        etc_resolv_conf: "nameserver 127.0.0.11\n".into(),
        names: None,
        payloads: Vec::new(),
    }
}

/// A layer with busybox, a few users and the usual directories; made once for all tests.
pub(crate) fn busybox_layer() -> PathBuf {
    static LAYER: OnceLock<PathBuf> = OnceLock::new();
    LAYER.get_or_init(|| make_layer().expect("a root file system")).clone()
}

/// Removed by [`LayerGuard`].
fn make_layer() -> std::io::Result<PathBuf> {
    let layer = layer_path();
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "var"] {
        fs::create_dir_all(layer.join(directory))?;
    }
    fs::copy(BUSYBOX, layer.join("bin/busybox"))?;
    for applet in [
        "sh", "cat", "echo", "env", "id", "ls", "sleep", "dd", "seq", "hostname", "mount", "mkdir",
        "touch", "kill", "ps", "grep", "true", "false", "pwd", "ulimit", "mknod", "stat", "tr",
        "head", "wc", "yes", "printf", "rm", "readlink", "setsid", "date", "awk", "mv",
    ] {
        symlink("busybox", layer.join("bin").join(applet))?;
    }
    fs::write(layer.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/srv:/bin/sh\n")?;
    fs::write(layer.join("etc/group"), "root:x:0:\nweb:x:33:\naudit:x:44:web\n")?;
    Ok(layer)
}

/// Whether a process with this pid runs, zombies not counted.
pub(crate) fn is_running(pid: i32) -> bool {
    skep_runtime::sys::ProcessId::of(pid).is_ok()
}

/// Overlay mounts of a test that this process can see.
pub(crate) fn overlays(base: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let base = base.to_str().unwrap();
    mounts.lines().filter(|line| line.contains(base)).map(String::from).collect()
}

#[track_caller]
pub(crate) fn expect_error<T: std::fmt::Debug>(result: Result<T, Error>, part: &str) {
    let error = result.expect_err("this must fail").to_string();
    assert!(error.contains(part), "{error}");
    let sentence = error.split(": ").next().unwrap_or_default();
    assert_eq!(error.matches(sentence).count(), 1, "said twice: {error}");
}

fn layer_path() -> PathBuf {
    std::env::temp_dir().join(format!("skep-test-layer-{}", std::process::id()))
}

/// Removes the layer when all tests have run, well or not.
pub(crate) struct LayerGuard;

impl Drop for LayerGuard {
    fn drop(&mut self) {
        match fs::remove_dir_all(layer_path()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                println!("failed to remove {}: {error}", layer_path().display());
            }
            _ => {}
        }
    }
}
