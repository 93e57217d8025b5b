//! The executor of real nodes: embedded runtime, image store and routing mesh together.
//!
//! Reading order: [`Embedded`] (the [`Executor`]), `config` and `payloads` (from a task to a
//! container), [`uplink`] (the
//! mesh, which starts when the leader has given this node its place), `logs`.

mod config;
mod logs;
mod names;
mod payloads;
pub mod uplink;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use skep_common::limits::defaults;
use skep_common::object::ContainerStatus;
use skep_common::placeholder::NodeFacts;
use skep_common::spec::{HealthConfig, Nanos};
use skep_common::{Task, TaskId};
use skep_worker_core::health::HealthCheck;
use skep_worker_core::image::{Digest, Healthcheck, ImageConfig};
use skep_worker_core::oci::signal;

use crate::agent::Images;
use crate::container::{AdoptedState, ContainerRuntime, Error as ContainerError, ExitStatus};
use crate::executor::{Error, Executor, Exit, Found, TaskPayloads};
use crate::net::names::{self as sockets_of_names, NameSockets};
use names::Names;
use uplink::Uplink;

/// Runs tasks as containers of this machine; clones are the same.
#[derive(Debug, Clone)]
pub struct Embedded {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    containers: ContainerRuntime,
    images: Images,
    uplink: Uplink,
    names: Names,
    facts: NodeFacts,
    /// First processes of containers that wait for their start.
    created: Mutex<BTreeMap<TaskId, i32>>,
}

impl Embedded {
    /// Composes the parts.
    pub fn new(
        containers: ContainerRuntime,
        images: Images,
        uplink: Uplink,
        facts: NodeFacts,
    ) -> Self {
        let names = Names::new(uplink.directory());
        let created = Mutex::default();
        Self { inner: Arc::new(Inner { containers, images, uplink, names, facts, created }) }
    }

    fn created(&self) -> MutexGuard<'_, BTreeMap<TaskId, i32>> {
        self.inner.created.lock().expect("nothing panics while it holds the table")
    }

    /// Starts a container's program; where it is on overlay networks its names are answered from then on.
    async fn start_container(&self, task: &Task, id: &str, pid: i32) -> Result<(), Error> {
        let containers = &self.inner.containers;
        let Some(scope) = config::scope(task) else {
            return containers.start(id).await.map(drop).map_err(|error| Error::of(&error));
        };
        let sockets = sockets_of_names::open(id, pid.cast_unsigned()).await;
        let sockets = sockets.map_err(|error| Error::of(&error))?;
        let copies = sockets.try_clone().map_err(|error| Error::of(&error))?;
        // Before the start, behind which nothing may fail.
        self.inner.names.serve(task.id, scope, sockets)?;
        let kept = [copies.udp.as_fd(), copies.tcp.as_fd()];
        let started = containers.start_keeping(id, &kept).await;
        started.map(drop).map_err(|error| {
            self.inner.names.stop(task.id);
            Error::of(&error)
        })
    }

    /// Goes on answering the names of a container that an earlier daemon started.
    async fn serve_again(&self, task_id: TaskId) -> Result<(), Error> {
        let kept = self.inner.containers.kept(&task_id.to_string()).await;
        let (scope, kept) = kept.map_err(|error| Error::of(&error))?;
        let Some(scope) = scope else { return Ok(()) };
        let [udp, tcp] = <[OwnedFd; 2]>::try_from(kept)
            .map_err(|kept| Error(format!("its shim keeps {} sockets, not two", kept.len())))?;
        let sockets = NameSockets { udp: udp.into(), tcp: tcp.into() };
        self.inner.names.serve(task_id, scope, sockets)
    }

    /// Takes a container out of what reaches it.
    async fn disconnect(&self, task_id: TaskId) -> Result<(), Error> {
        self.created().remove(&task_id);
        self.inner.names.stop(task_id);
        self.inner.uplink.detach(task_id).await
    }

    async fn image_config(&self, task: &Task) -> Result<(Digest, ImageConfig), Error> {
        let digest = config::image_digest(task)?;
        let image = self.inner.images.store().config(digest).await;
        Ok((digest, image.map_err(|error| Error::of(&error))?))
    }
}

#[tonic::async_trait]
impl Executor for Embedded {
    async fn prepare(&self, task: &Task, payloads: &TaskPayloads) -> Result<(), Error> {
        let digest = config::image_digest(task)?;
        let layers = self.inner.images.ensure(digest).await.map_err(|error| Error::of(&error))?;
        let (_, image) = self.image_config(task).await?;
        // Left over from a daemon that was killed in the middle, or an earlier attempt, whose output stays.
        self.disconnect(task.id).await?;
        let cleared = self.inner.containers.clear(&task.id.to_string()).await;
        cleared.map_err(|error| Error::of(&error))?;
        let mut config = config::container(task, &image, layers, &self.inner.facts)?;
        config.payloads = payloads::files(task, payloads, &self.inner.facts)?;
        let created =
            self.inner.containers.create(&config).await.map_err(|error| Error::of(&error))?;
        self.created().insert(task.id, created.pid);
        Ok(())
    }

    async fn start(&self, task: &Task) -> Result<ContainerStatus, Error> {
        let id = task.id.to_string();
        let pid = self.created().remove(&task.id);
        let pid = pid.ok_or_else(|| Error("its container has not been made".into()))?;
        self.inner.uplink.attach(task, pid).await?;
        self.start_container(task, &id, pid).await?;
        Ok(ContainerStatus { container_id: id, pid, ..ContainerStatus::default() })
    }

    async fn health_check(&self, task: &Task) -> Result<Option<HealthCheck>, Error> {
        let (_, image) = self.image_config(task).await?;
        let of_image = image.healthcheck.as_ref().map(health_config);
        let spec = task.spec.container_spec.as_ref();
        Ok(HealthCheck::resolve(spec.and_then(|spec| spec.healthcheck.as_ref()), of_image.as_ref()))
    }

    async fn run_check(
        &self,
        task_id: TaskId,
        argv: &[String],
        timeout: Duration,
    ) -> (bool, String) {
        match self.inner.containers.exec(&task_id.to_string(), argv, &[], timeout).await {
            Ok(outcome) if outcome.is_timed_out => {
                (false, format!("health check exceeded timeout ({timeout:?})"))
            }
            Ok(outcome) => (outcome.exit_code == 0, outcome.output),
            Err(error) => (false, Error::of(&error).0),
        }
    }

    async fn wait(&self, task_id: TaskId) -> Exit {
        let exit = match self.inner.containers.wait(&task_id.to_string()).await {
            Ok(ExitStatus { exit_code, oom_killed, .. }) => {
                Exit { code: exit_code, oom_killed, error: None }
            }
            Err(error) => Exit { code: -1, oom_killed: false, error: Some(Error::of(&error).0) },
        };
        self.inner.names.stop(task_id);
        // The address may be given to another task from now on.
        if let Err(error) = self.inner.uplink.detach(task_id).await {
            tracing::warn!(task.id = %task_id, %error, "failed to disconnect an ended container");
        }
        exit
    }

    async fn stop(&self, task: &Task) -> Result<(), Error> {
        let spec = task.spec.container_spec.as_ref();
        let grace = spec.and_then(|spec| spec.stop_grace_period).map(Nanos::duration);
        let grace = grace.unwrap_or(defaults::STOP_GRACE_PERIOD);
        let of_spec =
            spec.and_then(|spec| spec.stop_signal.clone()).filter(|signal| !signal.is_empty());
        let name = match of_spec {
            Some(name) => Some(name),
            None => self.image_config(task).await.ok().and_then(|(_, image)| image.stop_signal),
        };
        let number = name.map_or(Ok(libc::SIGTERM), |name| signal::parse(&name));
        let number = number.map_err(|error| Error::of(&error))?;
        match self.inner.containers.stop(&task.id.to_string(), number, grace).await {
            Ok(_) | Err(ContainerError::NotFound(_) | ContainerError::Lost(_)) => Ok(()),
            Err(error) => Err(Error::of(&error)),
        }
    }

    async fn remove(&self, task_id: TaskId) -> Result<(), Error> {
        self.disconnect(task_id).await?;
        self.inner.containers.remove(&task_id.to_string()).await.map_err(|error| Error::of(&error))
    }

    async fn find(&self) -> Result<Vec<(TaskId, Found)>, Error> {
        let adopted = self.inner.containers.adopt().await.map_err(|error| Error::of(&error))?;
        // What networks they are on is read back from the kernel when the mesh starts.
        self.inner.uplink.take_over(adopted.iter().filter_map(|container| {
            match (container.id.parse(), &container.state) {
                (Ok(task_id), AdoptedState::Running { pid, .. }) => Some((task_id, *pid)),
                _ => None,
            }
        }));
        for container in &adopted {
            if let (Ok(task_id), AdoptedState::Running { .. }) =
                (container.id.parse(), &container.state)
                && let Err(error) = self.serve_again(task_id).await
            {
                let error = &error.0;
                tracing::warn!(task.id = %task_id, error, "failed to go on answering for names");
            }
        }
        let with_task = adopted.into_iter().filter_map(|container| {
            let task_id = container.id.parse().ok()?;
            let pid = match container.state {
                AdoptedState::Running { pid, .. } => pid,
                AdoptedState::Exited(_) | AdoptedState::Lost => 0,
            };
            let status =
                ContainerStatus { container_id: container.id, pid, ..ContainerStatus::default() };
            Some((task_id, Found::Started(status)))
        });
        Ok(with_task.collect())
    }
}

/// An image's health check in the words of a service's.
fn health_config(check: &Healthcheck) -> HealthConfig {
    HealthConfig {
        test: Some(check.test.clone()),
        interval: check.interval.map(Into::into),
        timeout: check.timeout.map(Into::into),
        start_period: check.start_period.map(Into::into),
        start_interval: check.start_interval.map(Into::into),
        retries: check.retries.and_then(|retries| u32::try_from(retries).ok()),
        ..HealthConfig::default()
    }
}
