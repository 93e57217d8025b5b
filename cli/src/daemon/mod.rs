//! `skep daemon`: composes manager and worker into the one process of a machine.
//!
//! ```text
//! unix socket ─► Machine (init, join, leave, load)        port 2377 ─► Ca, Raft, Dispatcher (managers)
//!             ├► Control, where this node is a manager               ├► Containers (managers)
//!             └► Containers, by asking a manager                     └► Peer (every node)
//! ```
//!
//! Reading order: [`DaemonArgs`] and [`run`]; `options` (flags and file), `kernel` (what the machine must
//! have), `machine` (what the socket answers), `node` (what runs while this machine is in a swarm),
//! `join` (how it gets there), `resume` (how it comes back, or why it cannot), `renewal`.

mod address;
mod containers;
mod images;
mod join;
mod kernel;
mod local_control;
mod machine;
mod metrics;
mod node;
mod options;
mod record;
mod recovery;
mod renewal;
mod restore;
mod resume;
mod role;
mod unlock;

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use skep_common::object::IngressBalancer;
use skep_proto::containers_server::ContainersServer;
use skep_proto::control_server::ControlServer;
use skep_proto::machine_server::MachineServer;
use skep_runtime::transport::{bind_unix, serve_unix};
use skep_runtime::{TaskSet, telemetry};
use tokio::signal::unix::{SignalKind, signal};
use tonic::service::Routes;

pub(crate) use options::DaemonArgs;

use containers::LocalContainers;
use machine::Machine;
use options::Options;

/// Threads that run the daemon's tasks. Two keep its memory small; disk work has threads of its own.
const WORKER_THREADS: usize = 2;
/// Threads for disk work at most: the default of 512 is a gigabyte of stacks.
const BLOCKING_THREADS_MAX: usize = 16;

/// Runs until SIGTERM or SIGINT. Containers live on.
pub(crate) fn run(args: DaemonArgs) -> Result<ExitCode> {
    telemetry::init();
    let options = Options::resolve(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let result = runtime.block_on(serve(options));
    // A client that hangs in the middle of an upload must not keep the daemon from ending.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve(mut options: Options) -> Result<()> {
    let missing = kernel::check();
    if let Some(fatal) = missing.fatal() {
        anyhow::bail!("{fatal}");
    }
    for warning in missing.warnings() {
        tracing::warn!(warning, "the kernel lacks something");
    }
    options.ingress = missing.ingress(options.ingress_balancer);
    let mut warnings = missing.warnings().to_vec();
    if options.ingress.balancer == IngressBalancer::UserSpace {
        let reason = &options.ingress.reason;
        tracing::warn!(reason, "this node balances published ports in user space");
        warnings.push(format!(
            "published ports are balanced in user space, and overlay networks do not reach this node: {reason}"
        ));
    }
    raise_file_limit();
    make_directory(&options.data_dir)?;
    make_directory(&options.run_dir)?;
    let mut terminate = signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?;

    let socket = options.socket();
    let listener = bind_unix(&socket).await?;
    let tasks = TaskSet::new();
    let metrics_addr = options.metrics_addr;
    let machine = Machine::open(options, warnings).await?;
    let routes = Routes::new(MachineServer::new(machine.clone())).add_service(
        ControlServer::new(machine.control())
            .max_decoding_message_size(skep_common::limits::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(skep_common::limits::MESSAGE_BYTES_MAX),
    );
    let routes = routes.add_service(ContainersServer::new(LocalContainers::new(machine.clone())));
    let serving = tasks.clone();
    tasks.spawn_to_end("unix socket", async move {
        if let Err(error) = serve_unix(listener, routes, &serving).await {
            tracing::error!(error = %telemetry::Chain(&error), "the client socket is not served any more");
        }
    });
    if let Some(address) = metrics_addr {
        metrics::serve(address, machine.clone(), &tasks).await?;
    }
    tracing::info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "skep daemon is ready");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; containers go on");
    machine.stop().await;
    let _ = std::fs::remove_file(&socket); // The next daemon replaces what is left.
    tokio::time::timeout(std::time::Duration::from_secs(5), tasks.shutdown()).await.ok();
    Ok(())
}

/// Published ports, connections and container processes are file descriptors; the usual soft limit of
/// 1024 is for programs that use `select`.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "failed to raise the limit of open files");
    }
}

fn make_directory(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("failed to make the directory {}", path.display()))
}
