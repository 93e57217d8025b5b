//! What the unix socket answers about this machine: `skep.v1.Machine`.

use std::sync::Arc;

use skep_common::NodeId;
use skep_manager::space::Full;
use skep_proto::machine_server::Machine as MachineApi;
use skep_proto::{
    InfoRequest, InfoResponse, InitSwarmRequest, InitSwarmResponse, JoinSwarmRequest,
    JoinSwarmResponse, LeaveSwarmRequest, LeaveSwarmResponse, LoadImageRequest, LoadImageResponse,
    LogRecord, RestoreRequest, TaskLogsRequest, UnlockRequest, UnlockResponse,
};
use skep_runtime::TaskSet;
use skep_runtime::identity::Files;
use skep_worker::images::ImageStore;
use tokio::sync::{Mutex, MutexGuard, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::local_control::LocalControl;
use super::node::Node;
use super::options::Options;
use super::resume::{self, Obstacle};
use super::{images, join, restore, unlock};

/// This machine, in a swarm or not; clones are the same.
#[derive(Clone)]
pub(super) struct Machine {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) options: Options,
    pub(super) image_store: ImageStore,
    /// This node's identity, and the unlock key while this daemon runs.
    pub(super) files: Files,
    warnings: Vec<String>,
    changing: Mutex<()>,
    pub(super) membership: watch::Sender<Membership>,
    /// What goes on whatever clients do.
    pub(super) tasks: TaskSet,
}

/// Which part this machine has in a swarm.
#[derive(Clone)]
pub(super) enum Membership {
    Outside,
    Member(Arc<Node>),
    /// It is a manager whose key file is sealed: it takes part once it is unlocked.
    Locked(NodeId),
    /// Its files say that it is in one, but it takes no part.
    Failed(Arc<Obstacle>),
}

impl Machine {
    /// Opens the image store, which must be this daemon's alone, and takes up this machine's part in its
    /// swarm; see [`resume`] for when it cannot.
    pub(super) async fn open(options: Options, warnings: Vec<String>) -> anyhow::Result<Self> {
        let image_store = ImageStore::open(options.data_dir.join("images")).await?;
        let (membership, _) = watch::channel(Membership::Outside);
        let (changing, tasks) = (Mutex::default(), TaskSet::new());
        let files = Files::in_data_dir(&options.data_dir);
        let inner = Inner { options, image_store, files, warnings, changing, membership, tasks };
        let machine = Self { inner: Arc::new(inner) };
        resume::resume(&machine).await;
        machine.inner.tasks.spawn_to_end("membership", resume::keep(machine.clone()));
        Ok(machine)
    }

    /// Which part this machine has in a swarm at the moment.
    pub(super) fn membership(&self) -> Membership {
        self.inner.membership.borrow().clone()
    }

    /// Changes it; whoever does holds [`Machine::changing`].
    pub(super) fn set_membership(&self, membership: Membership) {
        self.inner.membership.send_replace(membership);
    }

    /// Is held while this machine enters or leaves a swarm.
    pub(super) async fn changing(&self) -> Result<MutexGuard<'_, ()>, Status> {
        let guard = self.inner.changing.lock().await;
        if self.inner.tasks.token().is_cancelled() {
            return Err(Status::unavailable("the daemon is stopping: ask again when it runs"));
        }
        Ok(guard)
    }

    /// Runs `work` to its end, also when the client that asked for it goes away: a machine that is half in a
    /// swarm would be of no use to anybody.
    async fn run_to_end<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let (answer, answered) = oneshot::channel();
        self.inner.tasks.spawn_to_end(name, async move {
            if let Err(Err(status)) = answer.send(work.await) {
                let why = status.message();
                tracing::warn!(why, "{name} failed after its client had gone");
            }
        });
        let panicked =
            || Status::internal(format!("{name} ended in a panic: see the daemon's log"));
        answered.await.unwrap_or_else(|_| Err(panicked()))
    }

    /// The node, where this machine is in a swarm.
    pub(super) fn node(&self) -> Option<Arc<Node>> {
        match &*self.inner.membership.borrow() {
            Membership::Member(node) => Some(Arc::clone(node)),
            Membership::Outside | Membership::Locked(_) | Membership::Failed(_) => None,
        }
    }

    /// What answers `skep.v1.Control` on this machine.
    pub(super) fn control(&self) -> LocalControl {
        LocalControl::new(self.clone())
    }

    /// Stops; containers live on.
    pub(super) async fn stop(&self) {
        self.inner.tasks.cancel();
        {
            // Whoever is changing the membership gets to the end of it.
            let _changing = self.inner.changing.lock().await;
            if let Some(node) = self.node() {
                node.stop().await;
            }
        }
        self.inner.tasks.shutdown().await;
    }
}

#[tonic::async_trait]
impl MachineApi for Machine {
    type ContainerLogsStream = ReceiverStream<Result<LogRecord, Status>>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let options = &self.inner.options;
        let mut info = InfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hostname: options.hostname.clone(),
            data_dir: options.data_dir.display().to_string(),
            warnings: self.inner.warnings.clone(),
            ..InfoResponse::default()
        };
        match self.membership() {
            Membership::Outside => {}
            Membership::Locked(node_id) => {
                "locked".clone_into(&mut info.state);
                info.node_id = node_id.to_string();
            }
            Membership::Failed(obstacle) => {
                "error".clone_into(&mut info.state);
                info.error.clone_from(&obstacle.sentence);
            }
            Membership::Member(node) => {
                let removed = node.refusal();
                info.state = if removed.is_some() { "error" } else { "active" }.to_owned();
                info.error = removed.unwrap_or_default().to_owned();
                info.node_id = node.node_id.to_string();
                info.cluster_id = node.cluster_id.to_string();
                info.role = node.role.name().to_owned();
                info.advertise_addr.clone_from(&node.record.advertise_addr);
                info.managers = node.managers.all();
                info.payloads = node.payloads.names();
                let space = node.manager.as_ref().map(|manager| manager.space());
                let full = space.and_then(|space| space.borrow().as_ref().map(Full::to_string));
                info.warnings.extend(full);
                let manager = node.manager.as_ref().filter(|_| removed.is_none());
                info.warnings.extend(manager.and_then(|manager| manager.without_quorum()));
            }
        }
        Ok(Response::new(info))
    }

    async fn init_swarm(
        &self,
        request: Request<InitSwarmRequest>,
    ) -> Result<Response<InitSwarmResponse>, Status> {
        let (machine, request) = (self.clone(), request.into_inner());
        let work = async move { join::init(&machine, request).await };
        Ok(Response::new(self.run_to_end("swarm init", work).await?))
    }

    async fn join_swarm(
        &self,
        request: Request<JoinSwarmRequest>,
    ) -> Result<Response<JoinSwarmResponse>, Status> {
        let (machine, request) = (self.clone(), request.into_inner());
        let work = async move { join::join(&machine, request).await };
        Ok(Response::new(self.run_to_end("swarm join", work).await?))
    }

    async fn leave_swarm(
        &self,
        request: Request<LeaveSwarmRequest>,
    ) -> Result<Response<LeaveSwarmResponse>, Status> {
        let (machine, force) = (self.clone(), request.into_inner().force);
        self.run_to_end("swarm leave", async move { join::leave(&machine, force).await }).await?;
        Ok(Response::new(LeaveSwarmResponse {}))
    }

    async fn load_image(
        &self,
        request: Request<Streaming<LoadImageRequest>>,
    ) -> Result<Response<LoadImageResponse>, Status> {
        Ok(Response::new(images::load(self, request.into_inner()).await?))
    }

    async fn container_logs(
        &self,
        request: Request<TaskLogsRequest>,
    ) -> Result<Response<Self::ContainerLogsStream>, Status> {
        let node = self.node();
        let node = node.ok_or_else(|| Status::failed_precondition("this node is in no swarm"))?;
        Ok(Response::new(node.logs(request.into_inner())?))
    }

    async fn unlock(
        &self,
        request: Request<UnlockRequest>,
    ) -> Result<Response<UnlockResponse>, Status> {
        let (machine, request) = (self.clone(), request.into_inner());
        let work = async move { unlock::unlock(&machine, request).await };
        Ok(Response::new(self.run_to_end("swarm unlock", work).await?))
    }

    async fn restore(
        &self,
        request: Request<Streaming<RestoreRequest>>,
    ) -> Result<Response<InitSwarmResponse>, Status> {
        let (header, bytes) = restore::receive(request.into_inner()).await?;
        let machine = self.clone();
        let work = async move { restore::restore(&machine, header, bytes).await };
        Ok(Response::new(self.run_to_end("swarm restore", work).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_client_began_ends_without_it() {
        let directory = tempfile::tempdir().unwrap();
        let options = Options::for_test(directory.path());
        let machine = Machine::open(options, Vec::new()).await.unwrap();
        let (begun, has_begun) = oneshot::channel();
        let (go_on, may_go_on) = oneshot::channel();
        let (ended, has_ended) = oneshot::channel();
        let asked = machine.run_to_end("work", async move {
            begun.send(()).unwrap();
            may_go_on.await.unwrap();
            ended.send(()).unwrap();
            Ok(())
        });
        tokio::select! {
            biased;
            _ = asked => panic!("it cannot end yet"),
            begun = has_begun => begun.unwrap(),
        }
        go_on.send(()).unwrap();
        has_ended.await.unwrap();
        assert_eq!(machine.run_to_end("work", async { Ok(7) }).await.unwrap(), 7);

        machine.stop().await;
        let refused = machine.changing().await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
    }
}
