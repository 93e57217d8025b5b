//! The threads that Raft runs on, apart from all else the daemon does.
//!
//! Heartbeats and votes wait for nobody: not for a reconcile pass, an image or a slow client.

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use skep_runtime::TaskSet;
use tokio::runtime::{Builder, Handle, Runtime, RuntimeFlavor};

/// Raft's tasks are short; what takes long runs aside (`block_in_place`, `spawn_blocking`).
const THREADS: usize = 2;

const UNPOISONED: &str = "nothing panics while it holds the runtime";

/// Where Raft runs.
#[derive(Debug, Clone)]
pub enum Threads {
    /// On threads of its own, and so does the writer of its log.
    Own,
    /// Where its caller runs, for tests in virtual time: all of a manager stands still with it. The log's writer is
    /// one of these tasks.
    OfCaller(TaskSet),
}

/// Runs what takes long where it holds up nobody. A runtime with one thread has none to spare: it waits.
pub(crate) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => Ok(work()),
        _ => tokio::task::spawn_blocking(work).await.map_err(io::Error::other),
    }
}

/// Ends with its owner: all tasks on it stop at their next await.
#[derive(Debug)]
pub(crate) struct RaftRuntime {
    handle: Handle,
    runtime: Mutex<Option<Runtime>>,
}

impl RaftRuntime {
    pub(crate) fn new(threads: &Threads) -> io::Result<Self> {
        if let Threads::OfCaller(_) = threads {
            return Ok(Self { handle: Handle::current(), runtime: Mutex::new(None) });
        }
        let mut builder = Builder::new_multi_thread();
        let runtime =
            builder.worker_threads(THREADS).thread_name("skep-raft").enable_all().build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Mutex::new(Some(runtime)) })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Stops all tasks and waits, up to `patience`, until they are gone.
    pub(crate) async fn stop(&self, patience: Duration) {
        let Some(runtime) = self.runtime.lock().expect(UNPOISONED).take() else { return };
        // A runtime may only be waited for outside of async code.
        let stop = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(patience)).await;
        drop(stop); // Fails only when the caller's own runtime stops too.
    }
}

impl Drop for RaftRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.lock().expect(UNPOISONED).take() {
            runtime.shutdown_background();
        }
    }
}
