//! What the unix socket answers about this machine: `skep.v1.Machine`.

use std::sync::Arc;

use skep_proto::machine_server::Machine as MachineApi;
use skep_proto::{
    InfoRequest, InfoResponse, InitSwarmRequest, InitSwarmResponse, JoinSwarmRequest,
    JoinSwarmResponse, LeaveSwarmRequest, LeaveSwarmResponse, LoadImageRequest, LoadImageResponse,
};
use skep_runtime::identity::Files;
use skep_worker::images::ImageStore;
use tokio::sync::{Mutex, watch};
use tonic::{Request, Response, Status, Streaming};

use super::local_control::LocalControl;
use super::node::{Node, Parts};
use super::options::Options;
use super::record::RecordFile;
use super::{images, join};

/// This machine, in a swarm or not; clones are the same.
#[derive(Clone)]
pub(super) struct Machine {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) options: Options,
    pub(super) image_store: ImageStore,
    warnings: Vec<String>,
    /// Held while this machine enters or leaves a swarm.
    pub(super) changing: Mutex<()>,
    pub(super) node: watch::Sender<Option<Arc<Node>>>,
}

impl Machine {
    /// Opens the image store, and resumes this machine's part in its swarm.
    pub(super) async fn open(options: Options, warnings: Vec<String>) -> anyhow::Result<Self> {
        let image_store = ImageStore::open(options.data_dir.join("images")).await?;
        let (node, _) = watch::channel(None);
        let inner = Inner { options, image_store, warnings, changing: Mutex::new(()), node };
        let machine = Self { inner: Arc::new(inner) };
        machine.resume().await?;
        Ok(machine)
    }

    async fn resume(&self) -> anyhow::Result<()> {
        let options = &self.inner.options;
        let Some((credentials, raft_key)) = Files::in_data_dir(&options.data_dir).load()? else {
            return Ok(());
        };
        let file = RecordFile::in_data_dir(&options.data_dir);
        let record = file.load()?;
        let (is_voter, managers) = (record.is_voter, record.managers.clone());
        let image_store = self.inner.image_store.clone();
        let node =
            Node::start(options, Parts { credentials, raft_key, record, image_store }).await?;
        node.serve(options).await?;
        let node = Arc::new(node);
        self.inner.node.send_replace(Some(Arc::clone(&node)));
        if let (Some(manager), false) = (node.manager.clone(), is_voter) {
            // It was stopped in the middle of joining.
            manager
                .join(&managers)
                .await
                .map_err(|status| anyhow::anyhow!("{}", status.message()))?;
            file.update(|record| record.is_voter = true)?;
        }
        Ok(())
    }

    /// The node, where this machine is in a swarm.
    pub(super) fn node(&self) -> Option<Arc<Node>> {
        self.inner.node.borrow().clone()
    }

    /// What answers `skep.v1.Control` on this machine.
    pub(super) fn control(&self) -> LocalControl {
        LocalControl::new(self.clone())
    }

    /// Returns when this manager must not go on, with the reason.
    pub(super) async fn failed(&self) -> String {
        let mut nodes = self.inner.node.subscribe();
        loop {
            let manager = nodes.borrow_and_update().as_ref().and_then(|node| node.manager.clone());
            let stopped = async {
                match &manager {
                    Some(manager) => manager.stopped().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                reason = stopped => {
                    if let skep_manager::consensus::StopReason::Shutdown = reason {
                        // This machine leaves its swarm; it goes on without one.
                        if nodes.changed().await.is_err() {
                            std::future::pending::<()>().await;
                        }
                        continue;
                    }
                    return skep_runtime::telemetry::Chain(&reason).to_string();
                }
                changed = nodes.changed() => {
                    if changed.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
            }
        }
    }

    /// Stops; containers live on.
    pub(super) async fn stop(&self) {
        let _changing = self.inner.changing.lock().await;
        if let Some(node) = self.node() {
            node.stop().await;
        }
    }
}

#[tonic::async_trait]
impl MachineApi for Machine {
    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let options = &self.inner.options;
        let mut info = InfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hostname: options.hostname.clone(),
            data_dir: options.data_dir.display().to_string(),
            warnings: self.inner.warnings.clone(),
            ..InfoResponse::default()
        };
        if let Some(node) = self.node() {
            info.node_id = node.node_id.to_string();
            info.cluster_id = node.cluster_id.to_string();
            info.role = node.role.name().to_owned();
            info.advertise_addr.clone_from(&node.record.advertise_addr);
            info.managers = node.managers.all();
        }
        Ok(Response::new(info))
    }

    async fn init_swarm(
        &self,
        request: Request<InitSwarmRequest>,
    ) -> Result<Response<InitSwarmResponse>, Status> {
        Ok(Response::new(join::init(self, request.into_inner()).await?))
    }

    async fn join_swarm(
        &self,
        request: Request<JoinSwarmRequest>,
    ) -> Result<Response<JoinSwarmResponse>, Status> {
        Ok(Response::new(join::join(self, request.into_inner()).await?))
    }

    async fn leave_swarm(
        &self,
        request: Request<LeaveSwarmRequest>,
    ) -> Result<Response<LeaveSwarmResponse>, Status> {
        join::leave(self, request.into_inner().force).await?;
        Ok(Response::new(LeaveSwarmResponse {}))
    }

    async fn load_image(
        &self,
        request: Request<Streaming<LoadImageRequest>>,
    ) -> Result<Response<LoadImageResponse>, Status> {
        Ok(Response::new(images::load(self, request.into_inner()).await?))
    }
}
