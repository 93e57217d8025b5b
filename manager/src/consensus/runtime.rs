//! The threads that Raft runs on, apart from all else the daemon does.
//!
//! Heartbeats and votes wait for nobody: not for a reconcile pass, an image or a slow client.

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};

/// Raft's tasks are short; what takes long runs aside (`block_in_place`, `spawn_blocking`).
const THREADS: usize = 2;

const UNPOISONED: &str = "nothing panics while it holds the runtime";

/// Ends with its owner: all tasks on it stop at their next await.
#[derive(Debug)]
pub(crate) struct RaftRuntime {
    handle: Handle,
    runtime: Mutex<Option<Runtime>>,
}

impl RaftRuntime {
    pub(crate) fn new() -> io::Result<Self> {
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
