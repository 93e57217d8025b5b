//! The routing mesh of one node: every published port of the cluster answers here.
//!
//! Connections and flows of datagrams are translated (DNAT) to healthy tasks anywhere in the cluster, in exact turns. The
//! task sees an outside client's own address: the node that hosts it marks a connection that came
//! through the tunnel with the number of the node that sent it, and routes the answers back there.
//! Clients inside the cluster (nodes and tasks) are masqueraded.
//!
//! Where a node has IPv6, its published ports answer there in the same way: each address of the pool has
//! a twin, and everything above has its counterpart, over the same tunnel.
//!
//! ```text
//!            client                         node 2, with a task
//!               │ 10.98.0.1:8080               ┌────────────────────────────┐
//!  node 1 ──────▼───────────────┐   VXLAN      │ skep-vx ── routing ── skep-ing ── eth0 of the task
//!  │ dnat ─► 10.192.8.1:80 ─ skep-vx ═════════►│ mark 1                         │
//!  │ un-dnat ◄──────────────────│◄═════════════│ fwmark 1 ─► table 20001 ◄──────┘
//!  └────────────────────────────┘              └────────────────────────────┘
//! ```
//!
//! [`Mesh`] is driven by the agent: [`Mesh::apply`] for each table from the manager,
//! [`Mesh::attach`] and [`Mesh::detach`] for each task. Applying the same table again is cheap,
//! checks everything, and repairs what other programs broke; do it now and then.
//!
//! # Reading order
//!
//! `kernel` (the order of things), `layout` (the rules), `rules` and `routes` (observe and
//! change), `flows`, `ejection`, `links`, `uplink`, `ports`, `hold`, `hand_over`, `relay`, `balance`, `upstream`, `tally`, `carry`, `passage`,
//! `datagrams`, `refusal`; and `user_space`, which stands in for `kernel` where that lacks what it takes.
//!
//! # Invariants
//!
//! - The kernel's state is the truth: it is read back before it is changed, so a daemon that
//!   restarts takes over without disturbing a connection.
//! - A port passes between the rules and the daemon under one listener: no client is refused meanwhile.
//! - When [`Mesh::apply`] returns, the kernel's rules are those of the table without such backends, and no flow of datagrams
//!   goes to a task that the table does not name.
//! - A backend that refuses or does not answer gets no connections of this node until it does; the last
//!   backends of a port stay.
//! - Nothing host-wide is changed but the forwarding of IPv4, and of IPv6 where it is served; in other
//!   programs' tables only `filter FORWARD` gets rules, tagged with the comment "skep mesh". Nothing depends on
//!   br_netfilter.
//! - The end of the daemon leaves forwarding as it is; only [`Mesh::teardown`] removes it. Connections that go
//!   through the daemon end with it: those of loopback clients, and of ports that it balances.
//!
//! A published port costs the daemon up to four file descriptors; its limit must allow for that.
//! The operator must let the tunnel's UDP port (4789) in from the other nodes, as with Swarm.

mod balance;
pub(crate) mod carry;
mod datagrams;
mod ejection;
mod flows;
mod hand_over;
mod hold;
mod kernel;
mod layout;
pub(in crate::net) mod links;
pub(in crate::net) mod options;
mod passage;
pub(crate) mod places;
mod ports;
mod program;
mod refusal;
pub(crate) mod relay;
mod routes;
mod rules;
pub(crate) mod tally;
mod uplink;
mod upstream;
mod user_space;

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use skep_runtime::TaskSet;
use skep_worker_core::mesh::MeshTable;
use tokio::sync::Notify;

pub use self::options::{MarkField, Options};
pub use self::passage::{Carrier, Passages};
pub use self::ports::Condition;
pub use self::program::Program;
pub use super::sysctl::host_has_ipv6;

pub(in crate::net) use self::kernel::probe_rules;
use self::kernel::{Balancing, Kernel};
use self::relay::Relays;
use self::tally::Tally;
use self::uplink::Uplinks;
use self::user_space::UserSpace;
use super::Error;
use super::thread::KernelThread;

/// What is in effect after [`Mesh::apply`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The version of the table, to be acknowledged.
    pub version: u64,
    /// Ports that are not served here, and why.
    pub conditions: Vec<Condition>,
}

/// The routing mesh of this node. Clones share it.
#[derive(Debug, Clone)]
pub struct Mesh {
    driver: Driver,
    uplinks: Arc<KernelThread<Uplinks>>,
    relays: Arc<Mutex<Relays>>,
    tally: Tally,
    ejection: Arc<Ejection>,
}

/// What serves the ports.
#[derive(Debug, Clone)]
enum Driver {
    Kernel(Arc<KernelThread<Kernel>>),
    UserSpace(Arc<KernelThread<UserSpace>>),
}

impl Driver {
    /// Runs `job` on its thread and returns what it returned.
    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Balancing) -> T + Send + 'static,
    ) -> Result<T, Error> {
        match self {
            Self::Kernel(thread) => thread.run(|kernel| job(kernel)).await,
            Self::UserSpace(thread) => thread.run(|user_space| job(user_space)).await,
        }
    }
}

/// What looks for backends that do not answer, and ends with the last mesh that shares it.
#[derive(Debug, Default)]
struct Ejection {
    tasks: TaskSet,
    table_changed: Arc<Notify>,
}

impl Drop for Ejection {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

impl Mesh {
    /// Sets the mesh up in the network namespace of the calling thread, or takes over what an
    /// earlier daemon left there. Nothing is carried through other nodes' daemons.
    ///
    /// Must be called within a Tokio runtime.
    pub async fn start(options: Options) -> Result<Self, Error> {
        Self::start_through(options, None).await
    }

    /// The same; what no tunnel leads to goes by the passages.
    pub async fn start_through(
        mut options: Options,
        passages: Option<Arc<dyn Passages>>,
    ) -> Result<Self, Error> {
        // Tasks of such a node are reached by IPv4 alone.
        options.ipv6 &= !options.is_in_user_space;
        let slices = options.slices()?;
        let tally = Tally::default();
        let relays = Relays::new(options.underlay, passages, tally.clone());
        let relays = Arc::new(Mutex::new(relays));
        let ejection = Ejection::default();
        let of_driver = options.clone();
        let driver = if options.is_in_user_space {
            let start = move || Ok((UserSpace::start(of_driver)?, ()));
            let (thread, ()) = KernelThread::start("skep-mesh", start).await?;
            Driver::UserSpace(Arc::new(thread))
        } else {
            let start = move || Kernel::start(of_driver);
            let (thread, changes) = KernelThread::start("skep-mesh", start).await?;
            relays.lock().unwrap_or_else(PoisonError::into_inner).follow(changes);
            let thread = Arc::new(thread);
            ejection::start(&ejection.tasks, thread.clone(), ejection.table_changed.clone());
            Driver::Kernel(thread)
        };
        let open = move || Ok((Uplinks::open(options, slices)?, ()));
        let (uplinks, ()) = KernelThread::start("skep-uplinks", open).await?;
        let (uplinks, ejection) = (Arc::new(uplinks), Arc::new(ejection));
        Ok(Self { driver, uplinks, relays, tally, ejection })
    }

    /// Puts a table into effect; returns when the kernel's rules are changed.
    ///
    /// A port that another program holds is left to it and reported as a condition. After an
    /// error the same table may be applied again. Order is the caller's: the last table counts,
    /// whatever its version.
    pub async fn apply(&self, table: &MeshTable) -> Result<Applied, Error> {
        let version = table.version;
        let table = table.clone();
        let relays = self.relays.clone();
        let runtime = tokio::runtime::Handle::current();
        let table_changed = self.ejection.table_changed.clone();
        // Listeners follow on the thread: a caller that stops waiting must not separate them.
        let result = self.driver.run(move |balancing| {
            let _runtime = runtime.enter();
            let result = balancing.apply(&table, &mut |changes| {
                relays.lock().unwrap_or_else(PoisonError::into_inner).follow(changes);
            });
            table_changed.notify_one();
            result
        });
        Ok(Applied { version, conditions: result.await?? })
    }

    /// Has the kernel forget requests for connections that tasks did not answer before the table withdrew
    /// them: sent again, they go to other tasks. To be called after [`Mesh::apply`], and again as long as it
    /// returns true or fails, as far apart as an answer may take.
    pub async fn settle(&self) -> Result<bool, Error> {
        match &self.driver {
            Driver::Kernel(thread) => thread.run(Kernel::settle).await?,
            Driver::UserSpace(_) => Ok(false), // Nothing of it is in the kernel.
        }
    }

    /// Whether a port that another program had is free, or has another holder, since the last
    /// [`Mesh::apply`]: applying the table again then changes what is served or said.
    pub async fn has_other_conditions(&self) -> Result<bool, Error> {
        self.driver.run(|balancing| balancing.has_other_conditions()).await
    }

    /// What is counted of connections that the daemon relays.
    pub(in crate::net) fn tally(&self) -> Tally {
        self.tally.clone()
    }

    /// Gives the container of a task its uplink, called `interface` in there, with an address of the
    /// node's slice, and the default route by it. Fine if it has it already.
    pub async fn attach(
        &self,
        task_id: &str,
        pid: u32,
        interface: &str,
        address: Ipv4Addr,
    ) -> Result<(), Error> {
        let (task_id, interface) = (task_id.to_owned(), interface.to_owned());
        self.uplinks.run(move |uplinks| uplinks.attach(&task_id, pid, &interface, address)).await?
    }

    /// Gives a container that an earlier daemon connected what its uplink lacks by now. Fine if it has none.
    pub async fn renew(&self, task_id: &str, pid: u32) -> Result<(), Error> {
        let task_id = task_id.to_owned();
        self.uplinks.run(move |uplinks| uplinks.renew(&task_id, pid)).await?
    }

    /// Takes the uplink of a task away. Fine if there is none.
    pub async fn detach(&self, task_id: &str) -> Result<(), Error> {
        let task_id = task_id.to_owned();
        self.uplinks.run(move |uplinks| uplinks.detach(&task_id)).await?
    }

    /// Removes everything of the mesh from this node, and nothing else: for a node that leaves
    /// the swarm or is removed. `ip_forward` stays on, since others may rely on it.
    ///
    /// The mesh is of no use afterwards; start another one instead.
    pub async fn teardown(&self) -> Result<(), Error> {
        self.end_tasks().await;
        self.driver.run(|balancing| balancing.teardown()).await?
    }

    /// Removes what an earlier daemon's mesh left on this node, as [`Mesh::teardown`] does: for a node
    /// that leaves the swarm before it has started one. Fine if there is nothing.
    pub async fn remove(run_dir: &Path) -> Result<(), Error> {
        let run_dir = run_dir.to_owned();
        // The thread is in the caller's network namespace, and ends with its handle.
        let remove = move || Ok(((), Kernel::remove(run_dir)?));
        KernelThread::start("skep-mesh", remove).await.map(drop)
    }

    /// Lets go of the node's ports and of the lock, so that another daemon may take over.
    /// Forwarding stays as it is; a daemon that just ends has the same effect.
    ///
    /// The mesh is of no use afterwards; start another one instead.
    pub async fn shutdown(&self) -> Result<(), Error> {
        self.end_tasks().await;
        self.driver.run(|balancing| balancing.release()).await?
    }

    async fn end_tasks(&self) {
        self.ejection.tasks.clone().shutdown().await;
        let tasks = self.relays.lock().unwrap_or_else(PoisonError::into_inner).end();
        tasks.shutdown().await;
    }
}
