//! The routing mesh and the networks of this node, which start when the leader has given it its number.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ipnet::Ipv4Net;
use skep_common::object::NetworkAttachment;
use skep_common::{Task, TaskId};
use skep_proto::PortCondition;
use skep_runtime::telemetry::Chain;
use skep_worker_core::mesh::MeshTable;
use skep_worker_core::network::NetworkTables;
use tokio::sync::watch;

use crate::agent::Balancers;
use crate::executor::Error;
use crate::net::{Attachment, Condition, Mesh, NetworkOptions, Networks, Options, host_has_ipv6};

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

/// How long the table of a task's network may come after the task: it is sent before.
const TABLE_WAIT: Duration = Duration::from_secs(30);

/// Connects containers to the mesh and to their networks; clones share it.
#[derive(Debug, Clone)]
pub struct Uplink {
    underlay: Underlay,
    started: Arc<watch::Sender<Option<Started>>>,
    tables: Arc<watch::Sender<Arc<NetworkTables>>>,
    /// First processes of containers that an earlier daemon left, until the mesh starts.
    found: Arc<Mutex<BTreeMap<TaskId, u32>>>,
}

#[derive(Debug, Clone)]
struct Started {
    mesh: Mesh,
    networks: Networks,
}

impl Uplink {
    /// A mesh that is not started yet.
    pub fn new(underlay: Underlay) -> Self {
        Self {
            underlay,
            started: Arc::new(watch::Sender::new(None)),
            tables: Arc::default(),
            found: Arc::default(),
        }
    }

    /// The networks of this node as its leader last told them.
    pub fn tables(&self) -> watch::Receiver<Arc<NetworkTables>> {
        self.tables.subscribe()
    }

    /// Notes the containers that an earlier daemon left.
    pub(super) fn take_over(&self, running: impl Iterator<Item = (TaskId, i32)>) {
        let running = running.map(|(task_id, pid)| (task_id, pid.cast_unsigned()));
        self.found().extend(running);
    }

    fn found(&self) -> MutexGuard<'_, BTreeMap<TaskId, u32>> {
        self.found.lock().expect("nothing panics while it holds the table")
    }

    /// Connects a container, once the mesh and the tables of its networks are there.
    pub(super) async fn attach(&self, task: &Task, pid: i32) -> Result<(), Error> {
        let (attachments, uplink) = attachments(&task.networks_attachments)?;
        let address = task.ingress_address();
        if attachments.is_empty() && address.is_none() {
            return Ok(());
        }
        let mut started = self.started.subscribe();
        let started = started.wait_for(Option::is_some).await;
        let started = started
            .ok()
            .and_then(|started| started.clone())
            .ok_or_else(|| Error("the mesh has ended".into()))?;
        let pid = pid.cast_unsigned();
        if !attachments.is_empty() {
            self.tables_of(&attachments).await?;
            let attached = started.networks.attach(task.id, pid, attachments).await;
            attached.map_err(|error| Error::of(&error))?;
        }
        if let Some(address) = address {
            let attached = started.mesh.attach(&task.id.to_string(), pid, &uplink, address).await;
            attached.map_err(|error| Error::of(&error))?;
        }
        Ok(())
    }

    /// Returns when the tables name all networks of the attachments.
    async fn tables_of(&self, attachments: &[Attachment]) -> Result<(), Error> {
        let mut tables = self.tables.subscribe();
        let names_all =
            |tables: &Arc<NetworkTables>| tables.have(attachments.iter().map(|one| one.network_id));
        let named = tokio::time::timeout(TABLE_WAIT, tables.wait_for(names_all)).await;
        match named {
            Ok(named) => named.map(drop).map_err(|_| Error("the mesh has ended".into())),
            Err(_) => Err(Error("its leader did not tell this node of all its networks".into())),
        }
    }

    /// Disconnects a container; fine if it is not connected.
    pub(super) async fn detach(&self, task_id: TaskId) -> Result<(), Error> {
        self.found().remove(&task_id);
        let started = self.started.borrow().clone();
        let Some(Started { mesh, networks }) = started else { return Ok(()) };
        let id = task_id.to_string();
        let (uplink, networks) = tokio::join!(mesh.detach(&id), networks.detach(task_id));
        uplink.and(networks).map_err(|error| Error::of(&error))
    }

    /// Removes everything of the mesh and of networks from this node: when it leaves the swarm.
    pub async fn teardown(&self) {
        let started = self.started.borrow().clone();
        let removed = match started {
            Some(Started { mesh, networks }) => [networks.teardown().await, mesh.teardown().await],
            None => return Self::remove(&self.underlay.run_dir).await,
        };
        for error in removed.into_iter().filter_map(Result::err) {
            tracing::warn!(error = %Chain(&error), "failed to remove the node's networks");
        }
    }

    /// The same where none was started, of what an earlier daemon left.
    pub async fn remove(run_dir: &Path) {
        // The mesh's lock says that no other daemon is at work here.
        let removed = match Mesh::remove(run_dir).await {
            Ok(()) => Networks::remove(run_dir).await,
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(error = %Chain(&error), "failed to remove the node's networks");
        }
    }

    /// Lets go of what only one mesh of this node may hold, while forwarding stays: for a node that stops in a
    /// daemon that goes on.
    pub async fn release(&self) {
        let started = self.started.borrow().clone();
        if let Some(Started { mesh, .. }) = started
            && let Err(error) = mesh.shutdown().await
        {
            tracing::warn!(error = %Chain(&error), "failed to let go of the routing mesh");
        }
    }

    async fn started(&self, table: &MeshTable) -> Result<Started, crate::net::Error> {
        let running = self.started.borrow().clone();
        if let Some(started) = running {
            return Ok(started);
        }
        let Underlay { address, interface, run_dir } = self.underlay.clone();
        let mut options = Options::new(table.self_number, address, interface.clone(), &run_dir);
        options.pool = table.pool;
        options.slice_prefix = table.slice_prefix;
        // Not as the table says: the first one may come before its managers know what this node has.
        options.ipv6 = host_has_ipv6();
        let vxlan_port = options.vxlan_port;
        let mesh = Mesh::start(options).await?;
        // From here on this is the only daemon of the node: the mesh holds its lock.
        let options = NetworkOptions { underlay: address, interface, run_dir, vxlan_port };
        let running = self.found().clone();
        let networks = match Networks::start(options, self.tables(), running).await {
            Ok(networks) => networks,
            Err(error) => {
                mesh.shutdown().await?;
                return Err(error);
            }
        };
        let started = Started { mesh, networks };
        self.started.send_replace(Some(started.clone()));
        Ok(started)
    }
}

/// A task's places on overlay networks, and the name of its uplink, which comes last.
fn attachments(of_task: &[NetworkAttachment]) -> Result<(Vec<Attachment>, String), Error> {
    let overlays = of_task.iter().filter_map(|one| Some((one, one.network_id?)));
    let attachments = overlays.enumerate().map(|(number, (one, network_id))| {
        let address = Ipv4Net::new(one.address, one.prefix)
            .map_err(|_| Error(format!("its address {}/{} is none", one.address, one.prefix)))?;
        let interface = interface_name(number);
        Ok(Attachment { network_id, interface, address, ipv6: one.ipv6 })
    });
    let attachments = attachments.collect::<Result<Vec<_>, _>>()?;
    let uplink = interface_name(attachments.len());
    Ok((attachments, uplink))
}

fn interface_name(number: usize) -> String {
    format!("eth{number}")
}

#[tonic::async_trait]
impl Balancers for Uplink {
    async fn apply(
        &mut self,
        table: &MeshTable,
        networks: &Arc<NetworkTables>,
    ) -> Result<Vec<PortCondition>, Box<dyn std::error::Error + Send + Sync>> {
        self.tables.send_replace(Arc::clone(networks));
        let started = self.started(table).await?;
        // A failure of the one must not keep the other from changing.
        let (applied, connected) =
            tokio::join!(started.mesh.apply(table), started.networks.apply());
        let applied = applied?;
        connected?;
        Ok(applied.conditions.iter().map(port_condition).collect())
    }
}

fn port_condition(condition: &Condition) -> PortCondition {
    let port = match condition {
        Condition::PortHeld { port, .. } | Condition::PortFailed { port, .. } => port,
    };
    PortCondition { port: port.port.into(), message: condition.to_string() }
}

#[cfg(test)]
mod tests {
    use skep_common::NetworkId;

    use super::*;

    #[test]
    fn overlays_come_in_their_order_and_the_uplink_last() {
        let uplink = NetworkAttachment::uplink(Ipv4Addr::new(10, 192, 4, 1), 22);
        let overlay = |id: u128, ipv6: Option<&str>| NetworkAttachment {
            ingress: false,
            address: Ipv4Addr::new(10, 0, 1, 5),
            prefix: 24,
            network_id: Some(NetworkId(id)),
            ipv6: ipv6.map(|address| address.parse().unwrap()),
            aliases: Vec::new(),
        };
        assert_eq!(
            attachments(std::slice::from_ref(&uplink)).unwrap(),
            (Vec::new(), "eth0".into())
        );
        let both = [uplink, overlay(9, None), overlay(3, Some("fd00::5/64"))];
        let (places, uplink) = attachments(&both).unwrap();
        assert_eq!(uplink, "eth2");
        let texts: Vec<String> = places
            .iter()
            .map(|one| format!("{} {} {:?}", one.interface, one.network_id.0, one.ipv6))
            .collect();
        assert_eq!(texts, ["eth0 9 None", "eth1 3 Some(fd00::5/64)"]);
        assert_eq!(places[0].address.to_string(), "10.0.1.5/24");
        assert_eq!(
            attachments(&[NetworkAttachment { prefix: 33, ..overlay(1, None) }]).unwrap_err().0,
            "its address 10.0.1.5/33 is none",
        );
    }
}
