//! An executor that runs nothing: what remains is what managers and agents take.
//!
//! For benchmarks of the control plane. A task is ready, started and running as soon as it is asked for, and
//! ends when it is stopped; nothing of it outlives the daemon.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use skep_common::object::ContainerStatus;
use skep_common::{Task, TaskId};
use skep_worker_core::health::HealthCheck;
use tokio_util::sync::CancellationToken;

use crate::executor::{Error, Executor, Exit, Found, TaskPayloads};

/// What a process gives that SIGTERM ended.
const TERMINATED: i32 = 143;
const NOT_POISONED: &str = "nothing panics while it holds the tasks";

/// Takes every task for running until it is stopped.
#[derive(Debug, Default)]
pub struct NoContainers {
    /// Is cancelled when a task is stopped.
    stopped: Mutex<BTreeMap<TaskId, CancellationToken>>,
}

impl NoContainers {
    fn stopped(&self, task_id: TaskId) -> CancellationToken {
        self.stopped.lock().expect(NOT_POISONED).entry(task_id).or_default().clone()
    }
}

#[tonic::async_trait]
impl Executor for NoContainers {
    async fn prepare(&self, _: &Task, _: &TaskPayloads) -> Result<(), Error> {
        Ok(())
    }

    async fn start(&self, _: &Task) -> Result<ContainerStatus, Error> {
        Ok(ContainerStatus::default())
    }

    async fn health_check(&self, _: &Task) -> Result<Option<HealthCheck>, Error> {
        Ok(None)
    }

    async fn run_check(&self, _: TaskId, _: &[String], _: Duration) -> (bool, String) {
        (true, String::new())
    }

    async fn wait(&self, task_id: TaskId) -> Exit {
        self.stopped(task_id).cancelled().await;
        Exit { code: TERMINATED, oom_killed: false, error: None }
    }

    async fn stop(&self, task: &Task) -> Result<(), Error> {
        self.stopped(task.id).cancel();
        Ok(())
    }

    async fn remove(&self, task_id: TaskId) -> Result<(), Error> {
        self.stopped.lock().expect(NOT_POISONED).remove(&task_id);
        Ok(())
    }

    async fn find(&self) -> Result<Vec<(TaskId, Found)>, Error> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use skep_common::object::TaskStatus;
    use skep_common::spec::TaskSpec;
    use skep_common::{Meta, ServiceId, TaskState, Version};

    use super::*;

    fn task() -> Task {
        Task {
            id: TaskId(7),
            meta: Meta::default(),
            spec: TaskSpec::default().into(),
            spec_version: Version::default(),
            service_id: ServiceId(1),
            slot: 1,
            node_id: None,
            status: TaskStatus::default(),
            desired_state: TaskState::Running,
            networks_attachments: Vec::new(),
            service_name: "web".into(),
            start_after: None,
            host_ports: Vec::new(),
            standalone: None,
            job_iteration: None,
            preset_node: None,
            assigned_generic_resources: Vec::new(),
            service_labels: None,
        }
    }

    #[tokio::test]
    async fn a_task_runs_until_it_is_stopped() {
        let executor = NoContainers::default();
        let task = task();
        executor.prepare(&task, &TaskPayloads::new()).await.unwrap();
        executor.start(&task).await.unwrap();
        assert_eq!(executor.wait(task.id).now_or_never(), None);
        executor.stop(&task).await.unwrap();
        let exit = Exit { code: TERMINATED, oom_killed: false, error: None };
        assert_eq!(executor.wait(task.id).now_or_never(), Some(exit));
        executor.remove(task.id).await.unwrap();
        assert_eq!(executor.find().await.unwrap(), []);
    }
}
