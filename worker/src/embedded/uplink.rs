//! The routing mesh of this node, which starts when the leader has given the node its number.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use skep_common::TaskId;
use skep_proto::PortCondition;
use skep_runtime::telemetry::Chain;
use skep_worker_core::mesh::MeshTable;
use tokio::sync::watch;

use crate::agent::Balancers;
use crate::executor::Error;
use crate::net::{Condition, Mesh, Options};

/// Where the mesh's tunnel ends on this node.
#[derive(Debug, Clone)]
pub struct Underlay {
    /// The node's address.
    pub address: Ipv4Addr,
    /// The interface that has it.
    pub interface: String,
    /// The daemon's run directory.
    pub run_dir: PathBuf,
}

/// Connects containers to the mesh; clones share it.
#[derive(Debug, Clone)]
pub struct Uplink {
    underlay: Underlay,
    started: Arc<watch::Sender<Option<Mesh>>>,
}

impl Uplink {
    /// A mesh that is not started yet.
    pub fn new(underlay: Underlay) -> Self {
        Self { underlay, started: Arc::new(watch::Sender::new(None)) }
    }

    /// Connects a container, once the mesh is there.
    pub(super) async fn attach(
        &self,
        task_id: TaskId,
        pid: i32,
        address: Ipv4Addr,
    ) -> Result<(), Error> {
        let mut started = self.started.subscribe();
        let mesh = started.wait_for(Option::is_some).await;
        let mesh = mesh
            .ok()
            .and_then(|mesh| mesh.clone())
            .ok_or_else(|| Error("the mesh has ended".into()))?;
        let pid = pid.cast_unsigned();
        mesh.attach(&task_id.to_string(), pid, address).await.map_err(|error| Error::of(&error))
    }

    /// Disconnects a container; fine if it is not connected.
    pub(super) async fn detach(&self, task_id: TaskId) -> Result<(), Error> {
        let mesh = self.started.borrow().clone();
        match mesh {
            Some(mesh) => {
                mesh.detach(&task_id.to_string()).await.map_err(|error| Error::of(&error))
            }
            None => Ok(()),
        }
    }

    /// Removes everything of the mesh from this node: when it leaves the swarm.
    pub async fn teardown(&self) {
        let mesh = self.started.borrow().clone();
        let removed = match mesh {
            Some(mesh) => mesh.teardown().await,
            // An earlier daemon may have left one.
            None => Mesh::remove(&self.underlay.run_dir).await,
        };
        if let Err(error) = removed {
            tracing::warn!(error = %Chain(&error), "failed to remove the routing mesh");
        }
    }

    /// Lets go of what only one mesh of this node may hold, while forwarding stays: for a node that stops in a
    /// daemon that goes on.
    pub async fn release(&self) {
        let mesh = self.started.borrow().clone();
        if let Some(mesh) = mesh
            && let Err(error) = mesh.shutdown().await
        {
            tracing::warn!(error = %Chain(&error), "failed to let go of the routing mesh");
        }
    }

    async fn mesh(&self, table: &MeshTable) -> Result<Mesh, crate::net::Error> {
        let running = self.started.borrow().clone();
        if let Some(mesh) = running {
            return Ok(mesh);
        }
        let Underlay { address, interface, run_dir } = self.underlay.clone();
        let mut options = Options::new(table.self_number, address, interface, run_dir);
        options.pool = table.pool;
        options.slice_prefix = table.slice_prefix;
        let mesh = Mesh::start(options).await?;
        self.started.send_replace(Some(mesh.clone()));
        Ok(mesh)
    }
}

#[tonic::async_trait]
impl Balancers for Uplink {
    async fn apply(
        &mut self,
        table: &MeshTable,
    ) -> Result<Vec<PortCondition>, Box<dyn std::error::Error + Send + Sync>> {
        let applied = self.mesh(table).await?.apply(table).await?;
        Ok(applied.conditions.iter().map(port_condition).collect())
    }
}

fn port_condition(condition: &Condition) -> PortCondition {
    let port = match condition {
        Condition::PortHeld { port, .. } | Condition::PortFailed { port, .. } => port,
    };
    PortCondition { port: port.port.into(), message: condition.to_string() }
}
