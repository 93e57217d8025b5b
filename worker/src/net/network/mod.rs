//! The overlay networks of one node: tasks on a network reach each other by address, and the addresses
//! of services, on whichever node they are.
//!
//! Every network is a namespace of its own, so that subnets may overlap and nothing of the node leads
//! in (`segment`). Addresses of services are translated in each container, to healthy tasks in exact
//! turns (`rules`).
//!
//! [`Networks`] is driven by the agent: [`Networks::apply`] for each table, [`Networks::attach`] and
//! [`Networks::detach`] for each task. Applying the same tables again checks everything and repairs what
//! other programs broke.
//!
//! # Reading order
//!
//! `plane` (the order of things), `segment`, `reach`, `interface`, `container`, `rules`, `removal`.
//!
//! # Invariants
//!
//! - The kernel's state is the truth: it is read back before it is changed, so a daemon that restarts
//!   takes over without disturbing a connection.
//! - When [`Networks::apply`] returns, tunnels and rules of every container are those of the tables.
//! - The end of the daemon leaves networks as they are. A network goes when the tables name it no longer
//!   and no container is on it, or with [`Networks::teardown`].
//! - A network that asks for encryption never sends anything in clear ([`super::secure`]).

mod container;
mod interface;
mod plane;
mod reach;
mod removal;
mod rules;
mod segment;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::{Ipv4Net, Ipv6Net};
use skep_common::{NetworkId, TaskId};
use skep_worker_core::network::NetworkTables;
use tokio::sync::watch;

use self::plane::Plane;
use self::removal::Removal;
use super::Error;
use super::secure::{Keyring, PeerSession, Sessions};
use super::thread::KernelThread;

/// What the networks of one node are set up with.
#[derive(Debug, Clone)]
pub struct NetworkOptions {
    /// The address that other nodes reach this one at.
    pub underlay: Ipv4Addr,
    /// The interface that has it; its MTU decides that of networks.
    pub interface: String,
    /// The daemon's run directory: keeps the namespaces of networks.
    pub run_dir: PathBuf,
    /// The UDP port of tunnels, which is the mesh's.
    pub vxlan_port: u16,
    /// The node's keys, for encrypted networks.
    pub keyring: Arc<Keyring>,
}

/// A container's place on one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The network.
    pub network_id: NetworkId,
    /// The name of the container's interface on it.
    pub interface: String,
    /// The IPv4 address in its subnet.
    pub address: Ipv4Net,
    /// The IPv6 address in its subnet, where the network has that.
    pub ipv6: Option<Ipv6Net>,
}

/// The overlay networks of this node. Clones share them.
#[derive(Debug, Clone)]
pub struct Networks {
    plane: Arc<KernelThread<Plane>>,
    removal: Removal,
}

impl Networks {
    /// Takes over what an earlier daemon left in the network namespace of the calling thread. `running`
    /// are the first processes of containers that it left.
    pub async fn start(
        options: NetworkOptions,
        tables: watch::Receiver<Arc<NetworkTables>>,
        running: BTreeMap<TaskId, u32>,
    ) -> Result<Self, Error> {
        let start = move || {
            let removal = Removal::start()?;
            let plane = Plane::start(options, tables, &running, removal.clone())?;
            Ok((plane, removal))
        };
        let (plane, removal) = KernelThread::start("skep-networks", start).await?;
        Ok(Self { plane: Arc::new(plane), removal })
    }

    /// Puts the newest tables into effect; returns when the kernel is changed. After an error the same
    /// tables may be applied again. Gives what keeps encrypted networks from the other nodes, where something
    /// does; all others are in force then.
    pub async fn apply(&self) -> Result<Option<Error>, Error> {
        self.plane.run(Plane::apply).await?
    }

    /// Has the kernel forget requests for connections that tasks did not answer before the tables withdrew
    /// them. To be called after [`Networks::apply`], and again as long as it returns true or fails, as far apart as
    /// an answer may take. A failure of one container does not keep it from the others.
    pub async fn settle(&self) -> Result<bool, Error> {
        self.plane.run(Plane::settle).await?
    }

    /// Connects the container of a task to its networks, whose tables have come. Fine if it is.
    pub async fn attach(
        &self,
        task_id: TaskId,
        pid: u32,
        attachments: Vec<Attachment>,
    ) -> Result<(), Error> {
        self.plane.run(move |plane| plane.attach(task_id, pid, &attachments)).await?
    }

    /// Disconnects the container of a task. Fine if it is on no network.
    pub async fn detach(&self, task_id: TaskId) -> Result<(), Error> {
        let ports = self.plane.run(move |plane| plane.release(task_id)).await??;
        self.removal.remove(ports).await?;
        let unused = self.plane.run(Plane::drop_unused).await??;
        self.removal.remove(unused).await
    }

    /// The nodes that encrypted networks have sessions with.
    pub async fn sessions(&self) -> Result<Sessions, Error> {
        self.plane.run(Plane::sessions).await
    }

    /// What WireGuard has with the node of that number, which is greeted before if asked for; `None` where no
    /// encrypted network has tasks on both.
    pub async fn session_with(
        &self,
        tables: Arc<NetworkTables>,
        number: u16,
        is_greeted: bool,
    ) -> Result<Option<PeerSession>, Error> {
        self.plane.run(move |plane| plane.session_with(&tables, number, is_greeted)).await?
    }

    /// Removes all networks from this node: for a node that leaves the swarm or is removed.
    pub async fn teardown(&self) -> Result<(), Error> {
        let networks = self.plane.run(Plane::give_up).await?;
        let removed = self.removal.remove(networks).await;
        removed.and(self.plane.run(Plane::remove_secure).await?)
    }

    /// Removes what an earlier daemon left, as [`Networks::teardown`] does. Fine if there is nothing.
    pub async fn remove(run_dir: &Path) -> Result<(), Error> {
        let run_dir = run_dir.to_owned();
        let remove = move || Ok(((), Plane::remove(&run_dir)?));
        KernelThread::start("skep-networks", remove).await.map(drop)
    }
}
