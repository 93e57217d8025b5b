//! The routing mesh and the networks of this node, which start when the leader has given it its number.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ipnet::Ipv4Net;
use skep_common::object::NetworkAttachment;
use skep_common::spec::Predefined;
use skep_common::{Task, TaskId};
use skep_proto::PortCondition;
use skep_runtime::telemetry::Chain;
use skep_worker_core::dns::Directory;
use skep_worker_core::mesh::{Gate, MeshTable};
use skep_worker_core::network::NetworkTables;
use tokio::sync::watch;

use super::config;
use crate::agent::Balancers;
use crate::executor::Error;
use crate::net;
use crate::net::loopback;
use crate::net::secure::{Keyring, PeerSession, Sessions};
use crate::net::{
    Accounting, Attachment, Condition, Mesh, NetworkOptions, Networks, Options, Passages,
    host_has_ipv6,
};

/// Where the mesh's tunnel ends on this node.
#[derive(Debug, Clone)]
pub struct Underlay {
    /// The node's address.
    pub address: Ipv4Addr,
    /// The interface that has it.
    pub interface: String,
    /// The daemon's run directory.
    pub run_dir: PathBuf,
    /// The node's keys, for encrypted networks.
    pub keyring: Arc<Keyring>,
}

/// How long the table of a task's network may come after the task: it is sent before.
const TABLE_WAIT: Duration = Duration::from_secs(30);

/// Connects containers to the mesh and to their networks; clones share it.
#[derive(Debug, Clone)]
pub struct Uplink {
    underlay: Underlay,
    is_counting: bool,
    started: Arc<watch::Sender<Option<Started>>>,
    tables: Arc<watch::Sender<Arc<NetworkTables>>>,
    /// The names of the same networks.
    directory: Arc<watch::Sender<Arc<Directory>>>,
    /// What keeps encrypted networks from the other nodes.
    encryption_failure: Arc<watch::Sender<Option<String>>>,
    /// First processes of containers that an earlier daemon left, until the mesh starts.
    found: Arc<Mutex<BTreeMap<TaskId, u32>>>,
    /// Why the daemon balances published ports, and no overlay network reaches this node.
    user_space: Option<Arc<str>>,
    /// The way to tasks that no tunnel leads to.
    passages: Option<Arc<dyn Passages>>,
    /// Whose connections may end here, and where.
    gate: Arc<watch::Sender<Arc<Gate>>>,
}

#[derive(Debug, Clone)]
struct Started {
    mesh: Mesh,
    /// Absent where the daemon balances.
    networks: Option<Networks>,
    /// Where connections are counted.
    accounting: Option<Accounting>,
}

impl Uplink {
    /// A mesh that is not started yet.
    pub fn new(underlay: Underlay) -> Self {
        Self {
            underlay,
            is_counting: false,
            started: Arc::new(watch::Sender::new(None)),
            tables: Arc::default(),
            directory: Arc::default(),
            encryption_failure: Arc::default(),
            found: Arc::default(),
            user_space: None,
            passages: None,
            gate: Arc::default(),
        }
    }

    /// What no tunnel leads to is reached by these ways.
    #[must_use]
    pub fn through(self, passages: Arc<dyn Passages>) -> Self {
        Self { passages: Some(passages), ..self }
    }

    /// The daemon balances published ports, for that reason, and no overlay network reaches this node.
    #[must_use]
    pub fn in_user_space(self, reason: &str) -> Self {
        Self { user_space: Some(reason.into()), ..self }
    }

    /// Whose connections may end on this node, and where.
    pub fn gate(&self) -> watch::Receiver<Arc<Gate>> {
        self.gate.subscribe()
    }

    /// Whether connections through published ports are to be counted, which costs each packet a little.
    #[must_use]
    pub fn counting(self, is_counting: bool) -> Self {
        Self { is_counting, ..self }
    }

    /// Where the tunnel ends on this node.
    pub fn underlay(&self) -> Ipv4Addr {
        self.underlay.address
    }

    /// The interface that has that address.
    pub fn interface(&self) -> &str {
        &self.underlay.interface
    }

    /// What was counted, as text for a collector; empty where nothing is.
    pub async fn metrics(&self) -> Result<String, crate::net::Error> {
        let started = self.started.borrow().clone();
        match started.and_then(|started| started.accounting) {
            Some(accounting) => accounting.text().await,
            None => Ok(String::new()),
        }
    }

    /// Begins to count, or removes what an earlier daemon counted by. Ports are served in any case.
    async fn account(&self, mesh: &Mesh, pool: Ipv4Net) -> Option<Accounting> {
        let accounting = match self.is_counting {
            true => Accounting::start(mesh, pool, host_has_ipv6()).await.map(Some),
            false => Accounting::remove().await.map(|()| None),
        };
        told(accounting)
    }

    /// The networks of this node as its leader last told them.
    pub fn tables(&self) -> watch::Receiver<Arc<NetworkTables>> {
        self.tables.subscribe()
    }

    /// Follows what keeps encrypted networks of this node from the other nodes, in words.
    pub fn encryption_failure(&self) -> watch::Receiver<Option<String>> {
        self.encryption_failure.subscribe()
    }

    fn note_encryption(&self, failure: Option<&crate::net::Error>) {
        let failure = failure.map(|error| Chain(error).to_string());
        self.encryption_failure.send_if_modified(|known| {
            let is_news = *known != failure;
            if is_news && let Some(error) = &failure {
                tracing::error!(error, "encrypted networks of this node reach no other node");
            }
            *known = failure;
            is_news
        });
    }

    /// What names of these networks mean.
    pub(super) fn directory(&self) -> watch::Receiver<Arc<Directory>> {
        self.directory.subscribe()
    }

    /// Takes over the leader's tables. What changed of names is made here, so that no question waits for it.
    fn take(&self, networks: &Arc<NetworkTables>) {
        log_changes(&self.tables.borrow(), networks);
        let directory = self.directory.borrow().follow(networks);
        self.directory.send_replace(Arc::new(directory));
        self.tables.send_replace(Arc::clone(networks));
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
            return self.isolate(task, pid).await;
        }
        if let Some(reason) = self.user_space.as_ref().filter(|_| !attachments.is_empty()) {
            return Err(Error(format!("its node cannot carry overlay networks: {reason}")));
        }
        let mut started = self.started.subscribe();
        let started = started.wait_for(Option::is_some).await;
        let started = started
            .ok()
            .and_then(|started| started.clone())
            .ok_or_else(|| Error("the mesh has ended".into()))?;
        let pid = pid.cast_unsigned();
        if let Some(networks) = started.networks.filter(|_| !attachments.is_empty()) {
            self.tables_of(&attachments).await?;
            let attached = networks.attach(task.id, pid, attachments).await;
            attached.map_err(|error| Error::of(&error))?;
        }
        if let Some(address) = address {
            let attached = started.mesh.attach(&task.id.to_string(), pid, &uplink, address).await;
            attached.map_err(|error| Error::of(&error))?;
        }
        Ok(())
    }

    /// A container that is connected to nothing has its loopback, where it has no network of others.
    async fn isolate(&self, task: &Task, pid: i32) -> Result<(), Error> {
        if !config::is_on(task, Predefined::None) {
            return Ok(());
        }
        let raised = loopback::raise(&task.id.to_string(), pid.cast_unsigned()).await;
        raised.map_err(|error| Error::of(&error))
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
        let Some(Started { mesh, networks, .. }) = started else { return Ok(()) };
        let id = task_id.to_string();
        let from_networks = async {
            match networks {
                Some(networks) => networks.detach(task_id).await,
                None => Ok(()),
            }
        };
        let (uplink, networks) = tokio::join!(mesh.detach(&id), from_networks);
        uplink.and(networks).map_err(|error| Error::of(&error))
    }

    /// The nodes that encrypted networks have sessions with; `None` where they are not started.
    pub async fn sessions(&self) -> Option<Sessions> {
        let started = self.started.borrow().clone();
        started?.networks?.sessions().await.ok()
    }

    /// What WireGuard has with the node of that number, which is greeted before if asked for; `None` where no
    /// encrypted network has tasks on both.
    pub(crate) async fn session_with(
        &self,
        number: u16,
        is_greeted: bool,
    ) -> Result<Option<PeerSession>, crate::net::Error> {
        let (started, tables) = (self.started.borrow().clone(), self.tables.borrow().clone());
        match started.and_then(|started| started.networks) {
            Some(networks) => networks.session_with(tables, number, is_greeted).await,
            None => Ok(None),
        }
    }

    /// Removes everything of the mesh and of networks from this node: when it leaves the swarm.
    pub async fn teardown(&self) {
        let started = self.started.borrow().clone();
        let removed = match started {
            Some(Started { mesh, networks: None, .. }) => [mesh.teardown().await, Ok(())],
            Some(Started { mesh, networks: Some(networks), .. }) => {
                let uncounted = Accounting::remove().await;
                [networks.teardown().await, mesh.teardown().await.and(uncounted)]
            }
            None => return Self::remove(&self.underlay.run_dir).await,
        };
        for error in removed.into_iter().filter_map(Result::err) {
            tracing::warn!(error = %Chain(&error), "failed to remove the node's networks");
        }
    }

    /// The same where none was started, of what an earlier daemon left.
    pub async fn remove(run_dir: &Path) {
        let mesh = Mesh::remove(run_dir).await;
        // The mesh's lock says that no other daemon is at work here.
        let removed = match mesh {
            Err(error @ (net::Error::Locked { .. } | net::Error::File { .. })) => Err(error),
            mesh => mesh.and(Networks::remove(run_dir).await).and(Accounting::remove().await),
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
        let Underlay { address, interface, run_dir, keyring } = self.underlay.clone();
        let mut options = Options::new(table.self_number, address, interface.clone(), &run_dir);
        options.pool = table.pool;
        options.slice_prefix = table.slice_prefix;
        // Not as the table says: the first one may come before its managers know what this node has.
        options.ipv6 = host_has_ipv6();
        options.is_in_user_space = self.user_space.is_some();
        let vxlan_port = options.vxlan_port;
        let mesh = Mesh::start_through(options, self.passages.clone()).await?;
        if self.user_space.is_some() {
            return Ok(self.started_in_user_space(mesh).await);
        }
        // From here on this is the only daemon of the node: the mesh holds its lock.
        let options = NetworkOptions { underlay: address, interface, run_dir, vxlan_port, keyring };
        let running = self.found().clone();
        let networks = match Networks::start(options, self.tables(), running).await {
            Ok(networks) => networks,
            Err(error) => {
                mesh.shutdown().await?;
                return Err(error);
            }
        };
        let running = self.found().clone();
        renew(&mesh, running).await;
        let accounting = self.account(&mesh, table.pool).await;
        let started = Started { mesh, networks: Some(networks), accounting };
        self.started.send_replace(Some(started.clone()));
        Ok(started)
    }

    async fn started_in_user_space(&self, mesh: Mesh) -> Started {
        if let Err(error) = Networks::remove(&self.underlay.run_dir).await {
            tracing::debug!(error = %Chain(&error), "there are no networks to remove on this kernel");
        }
        let running = self.found().clone();
        renew(&mesh, running).await;
        if let Err(error) = Accounting::remove().await {
            tracing::debug!(error = %Chain(&error), "there are no rules that count to remove on this kernel");
        }
        let accounting = match self.is_counting {
            true => told(Accounting::start_in_user_space(&mesh).await.map(Some)),
            false => None,
        };
        let started = Started { mesh, networks: None, accounting };
        self.started.send_replace(Some(started.clone()));
        started
    }
}

fn told(accounting: Result<Option<Accounting>, crate::net::Error>) -> Option<Accounting> {
    accounting.unwrap_or_else(|error| {
        tracing::warn!(error = %Chain(&error), "connections are not counted");
        None
    })
}

/// Gives containers that an earlier daemon connected what they lack by now, as IPv6.
async fn renew(mesh: &Mesh, running: BTreeMap<TaskId, u32>) {
    for (task_id, pid) in running {
        if let Err(error) = mesh.renew(&task_id.to_string(), pid).await {
            // It has ended since it was found, or goes on with what it has.
            tracing::warn!(task.id = %task_id, error = %Chain(&error), "a container's uplink stays as it was");
        }
    }
}

fn log_changes(old: &NetworkTables, new: &NetworkTables) {
    for (id, table) in &new.networks {
        if old.networks.get(id).is_some_and(|old| Arc::ptr_eq(old, table)) {
            continue;
        }
        let serving = || table.endpoints.values().filter(|endpoint| endpoint.serving).count();
        tracing::debug!(network = table.name, serving = serving(), "a network's table changes");
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
        self.take(networks);
        let started = self.started(table).await?;
        self.gate.send_if_modified(|known| {
            let next = known.follow(table);
            let is_news = **known != next;
            if is_news {
                *known = Arc::new(next);
            }
            is_news
        });
        if let Some(accounting) = &started.accounting
            && let Err(error) = accounting.learn(table, skep_runtime::clock::now()).await
        {
            tracing::warn!(error = %Chain(&error), "what was counted may be of other tasks");
        }
        // A failure of the one must not keep the other from changing.
        let connect = async {
            match &started.networks {
                Some(networks) => networks.apply().await,
                None => Ok(None),
            }
        };
        let (applied, connected) = tokio::join!(started.mesh.apply(table), connect);
        let applied = applied?;
        self.note_encryption(connected?.as_ref());
        Ok(applied.conditions.iter().map(port_condition).collect())
    }

    async fn settle(&mut self) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        let started = self.started.borrow().clone();
        let Some(Started { mesh, networks, .. }) = started else { return Ok(false) };
        let of_networks = async {
            match networks {
                Some(networks) => networks.settle().await,
                None => Ok(false),
            }
        };
        // A failure of the one must not keep the other from its look.
        let (ports, containers) = tokio::join!(mesh.settle(), of_networks);
        match (ports, containers) {
            (Err(ports), Err(containers)) => {
                Err(format!("{}; {}", Chain(&ports), Chain(&containers)).into())
            }
            (ports, containers) => Ok(ports? | containers?),
        }
    }

    async fn has_other_conditions(&mut self) -> bool {
        let started = self.started.borrow().clone();
        match started {
            // A failure is told when the table is applied.
            Some(Started { mesh, .. }) => mesh.has_other_conditions().await.unwrap_or(true),
            None => false,
        }
    }
}

fn port_condition(condition: &Condition) -> PortCondition {
    let port = condition.port();
    PortCondition {
        port: port.port.into(),
        protocol: port.protocol.to_string(),
        service_id: condition.service_id().to_owned(),
        message: condition.advice(),
    }
}

#[cfg(test)]
mod tests {
    use skep_common::{NetworkId, ServiceId};
    use skep_worker_core::dns::{Answer, Kind, Question, Scope, answer};
    use skep_worker_core::network::{NetworkTable, ServiceEntry};

    use super::*;

    #[test]
    fn names_are_ready_when_the_tables_are_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let underlay = Underlay {
            address: Ipv4Addr::LOCALHOST,
            interface: "lo".into(),
            run_dir: PathBuf::new(),
            keyring: Arc::new(Keyring::open(dir.path()).unwrap()),
        };
        let uplink = Uplink::new(underlay);
        let directory = uplink.directory();
        let address = Ipv4Addr::new(10, 0, 1, 2);
        let web = ServiceEntry {
            name: "web".into(),
            virtual_ips: vec![address.into()],
            ..ServiceEntry::default()
        };
        let table = NetworkTable { services: [(ServiceId(7), web)].into(), ..Default::default() };
        let networks = [(NetworkId(1), Arc::new(table))].into();
        uplink.take(&Arc::new(NetworkTables { networks, ..NetworkTables::default() }));
        let question = Question { name: "web".into(), kind: Kind::A, reversed: None };
        let scope = Scope { networks: vec![NetworkId(1)], ..Scope::default() };
        let answer = answer(&question, &scope, &directory.borrow(), 0);
        assert!(matches!(answer, Answer::Addresses { addresses, .. } if addresses == [address]));
    }

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
