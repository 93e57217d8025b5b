//! The part of the networks that lives on a dedicated thread and blocks on the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use skep_common::{NetworkId, TaskId};
use skep_worker_core::network::{Balance, NetworkTable, NetworkTables};
use tokio::sync::watch;

use super::container::Container;
use super::removal::{Removal, Target};
use super::segment::{Segment, Settings};
use super::{Attachment, NetworkOptions};
use crate::net::Error;
use crate::net::namespace::{self, Home};
use crate::net::rtnetlink::RouteChannel;
use crate::net::secure::{self, PeerSession, Secure, Sessions};

/// The directory in the run directory with a file for each network's namespace.
const NAMESPACES: &str = "netns";

/// The kernel's state of this node's networks.
#[derive(Debug)]
pub(super) struct Plane {
    options: NetworkOptions,
    home: Home,
    host: RouteChannel,
    /// The newest tables.
    tables: watch::Receiver<Arc<NetworkTables>>,
    /// The tables that were applied last, whole.
    in_force: Option<Arc<NetworkTables>>,
    /// What each table means for containers.
    balances: BTreeMap<NetworkId, (Arc<NetworkTable>, Arc<Balance>)>,
    segments: BTreeMap<NetworkId, Segment>,
    containers: BTreeMap<TaskId, Container>,
    secure: Secure,
    removal: Removal,
}

impl Plane {
    /// Finds the networks and the containers on them that an earlier daemon left, and changes nothing.
    /// `running` are first processes of containers; `removal` deletes what the plane gives up.
    pub(super) fn start(
        options: NetworkOptions,
        tables: watch::Receiver<Arc<NetworkTables>>,
        running: &BTreeMap<TaskId, u32>,
        removal: Removal,
    ) -> Result<Self, Error> {
        let home = Home::here()?;
        let segments = find_segments(&home, &options.run_dir)?;
        let host = RouteChannel::open()?;
        let (balances, containers) = (BTreeMap::new(), BTreeMap::new());
        let secure = Secure::new(Arc::clone(&options.keyring));
        let mut plane = Self {
            options,
            home,
            host,
            tables,
            in_force: None,
            balances,
            segments,
            containers,
            secure,
            removal,
        };
        let mut networks: BTreeMap<TaskId, BTreeMap<NetworkId, u32>> = BTreeMap::new();
        for (network_id, segment) in &mut plane.segments {
            for (alias, index) in segment.ports()? {
                if let Ok(task_id) = alias.parse() {
                    networks.entry(task_id).or_default().insert(*network_id, index);
                }
            }
        }
        for (task_id, networks) in networks {
            let Some(pid) = running.get(&task_id) else { continue };
            if let Err(error) = plane.adopt(task_id, *pid, networks) {
                // It has ended since it was found: whoever waits for it disconnects it.
                tracing::warn!(task.id = %task_id, %error, "failed to find a container's networks");
            }
        }
        Ok(plane)
    }

    fn adopt(
        &mut self,
        task_id: TaskId,
        pid: u32,
        networks: BTreeMap<NetworkId, u32>,
    ) -> Result<(), Error> {
        let namespace = self.home.of_container(&task_id.to_string(), pid)?;
        let container = Container::open(&self.home, &namespace, task_id, networks)?;
        self.containers.insert(task_id, container);
        Ok(())
    }

    /// Puts the newest tables into effect. A failure of one network or container keeps no other from
    /// changing; the first is returned. What keeps encryption alone from its tables is no failure of theirs:
    /// nothing is sent in clear meanwhile, and all other networks are in force.
    pub(super) fn apply(&mut self) -> Result<Option<Error>, Error> {
        let tables = self.tables.borrow().clone();
        let mut failures = Vec::new();
        let before = self.in_force.take();
        let is_repair = before.as_ref().is_none_or(|before| Arc::ptr_eq(before, &tables));
        let is_elsewhere = |before: &Arc<NetworkTables>| {
            before.peers != tables.peers || before.keys != tables.keys
        };
        let is_moved = before.as_ref().is_none_or(is_elsewhere);
        let unencrypted = self.converge_secure(&tables).err();
        for (network_id, table) in &tables.networks {
            let known = before.as_ref().and_then(|before| before.networks.get(network_id));
            let is_same = known.is_some_and(|known| Arc::ptr_eq(known, table));
            // One that asks for more than this node can give is refused to each container.
            let is_refused = table.encrypted && !self.secure.is_possible();
            if is_refused || is_same && !is_repair && !is_moved {
                continue;
            }
            let failure = self.converge(*network_id, table, &tables, is_repair).err();
            match &unencrypted {
                Some(_) if table.encrypted => {} // It follows from that.
                _ => failures.extend(failure),
            }
        }
        let balances = self.balances(&tables);
        for container in self.containers.values_mut() {
            failures.extend(container.converge(&balances, is_repair).err());
        }
        let unused = self.drop_unused();
        failures.extend(unused.and_then(|unused| self.removal.remove_later(unused)).err());
        if failures.is_empty() {
            self.in_force = Some(tables);
        }
        first_of(failures).map(|()| unencrypted)
    }

    /// Has the kernel forget requests for connections that withdrawn tasks did not answer; returns whether it
    /// must be called again.
    pub(super) fn settle(&mut self) -> Result<bool, Error> {
        let mut is_unsettled = false;
        // The caller asks again after a failure, so that each would be told again and again.
        let mut first_failure = None;
        for settled in self.containers.values_mut().map(Container::settle) {
            match settled {
                Ok(is_left) => is_unsettled |= is_left,
                Err(error) => drop(first_failure.get_or_insert(error)),
            }
        }
        first_failure.map_or(Ok(is_unsettled), Err)
    }

    /// Connects a container to its networks, whose tables are known. Fine if it is connected already.
    pub(super) fn attach(
        &mut self,
        task_id: TaskId,
        pid: u32,
        attachments: &[Attachment],
    ) -> Result<(), Error> {
        let tables = self.tables.borrow().clone();
        let id = task_id.to_string();
        let namespace = self.home.of_container(&id, pid)?;
        let mut networks = BTreeMap::new();
        for attachment in attachments {
            let network_id = attachment.network_id;
            let table = tables.networks.get(&network_id);
            let table = table.ok_or(Error::NetworkUnknown { network_id })?;
            if table.encrypted {
                self.secure.check(&table.name)?;
                self.converge_secure(&tables)?;
            }
            self.converge(network_id, table, &tables, true)?;
            let settings = self.settings(table)?;
            let segment = self.segments.get_mut(&network_id);
            let segment = segment.ok_or(Error::NetworkUnknown { network_id })?;
            let index = segment.attach(&self.home, &id, &namespace, attachment, settings)?;
            networks.insert(network_id, index);
        }
        let mut container = Container::open(&self.home, &namespace, task_id, networks)?;
        container.converge(&self.balances(&tables), true)?;
        self.containers.insert(task_id, container);
        Ok(())
    }

    /// Lets go of a container; gives the ports of it that are to be deleted.
    pub(super) fn release(&mut self, task_id: TaskId) -> Result<Vec<Target>, Error> {
        self.containers.remove(&task_id);
        let id = task_id.to_string();
        let ports = self.segments.values_mut().filter_map(|segment| segment.port(&id).transpose());
        ports.collect()
    }

    /// Gives up the networks that the tables name no longer and that no container is on: they are to be
    /// deleted.
    pub(super) fn drop_unused(&mut self) -> Result<Vec<Target>, Error> {
        let tables = self.tables.borrow().clone();
        let mut unused = Vec::new();
        for (network_id, segment) in &mut self.segments {
            if !tables.networks.contains_key(network_id) && segment.ports()?.is_empty() {
                unused.push(*network_id);
            }
        }
        let segments = unused.iter().filter_map(|network_id| self.segments.remove(network_id));
        Ok(segments.map(Segment::into_target).collect())
    }

    /// Gives up all containers and networks; these are to be deleted.
    pub(super) fn give_up(&mut self) -> Vec<Target> {
        self.containers.clear();
        let segments = std::mem::take(&mut self.segments).into_values();
        segments.map(Segment::into_target).collect()
    }

    /// Removes WireGuard from this node, behind the last encrypted network.
    pub(super) fn remove_secure(&mut self) -> Result<(), Error> {
        self.secure.remove(&mut self.host)
    }

    /// Deletes, where no networks were started, what an earlier daemon left.
    pub(super) fn remove(run_dir: &Path) -> Result<(), Error> {
        let segments = find_segments(&Home::here()?, run_dir)?;
        let targets = segments.into_values().map(Segment::into_target).collect();
        let removal = Removal::start()?;
        removal.remove_later(targets)?;
        removal.wait()?;
        secure::remove(&mut RouteChannel::open()?)
    }

    /// The nodes that encrypted networks have sessions with.
    pub(super) fn sessions(&mut self) -> Sessions {
        self.secure.sessions()
    }

    /// What there is with another node, which is greeted before if asked for.
    pub(super) fn session_with(
        &mut self,
        tables: &NetworkTables,
        number: u16,
        is_greeted: bool,
    ) -> Result<Option<PeerSession>, Error> {
        self.secure.session_with(tables, number, is_greeted)
    }

    /// Brings WireGuard to what the tables ask for.
    fn converge_secure(&mut self, tables: &NetworkTables) -> Result<(), Error> {
        let underlay = (self.options.underlay, self.underlay_mtu()?);
        self.secure.converge(&mut self.host, underlay, tables)
    }

    fn underlay_mtu(&mut self) -> Result<u32, Error> {
        let interface = &self.options.interface;
        let link = self.host.link(interface)?;
        let link = link.ok_or_else(|| Error::NoInterface { interface: interface.clone() })?;
        Ok(link.mtu)
    }

    fn converge(
        &mut self,
        network_id: NetworkId,
        table: &NetworkTable,
        tables: &NetworkTables,
        is_repair: bool,
    ) -> Result<(), Error> {
        let settings = self.settings(table)?;
        if !self.segments.contains_key(&network_id) {
            let dir = self.options.run_dir.join(NAMESPACES);
            fs::create_dir_all(&dir).map_err(|e| Error::file("make the directory", &dir, e))?;
            let path = dir.join(network_id.to_string());
            // It may be on its way out still.
            self.removal.wait()?;
            let segment = Segment::open_or_make(&self.home, path)?;
            self.segments.insert(network_id, segment);
        }
        let segment = self.segments.get_mut(&network_id);
        let segment = segment.ok_or(Error::NetworkUnknown { network_id })?;
        segment.converge((&self.home, &mut self.host), settings, (tables, table), is_repair)
    }

    /// What the tables mean for containers; derived anew only where they changed.
    fn balances(&mut self, tables: &NetworkTables) -> BTreeMap<NetworkId, Arc<Balance>> {
        self.balances.retain(|network_id, _| tables.networks.contains_key(network_id));
        let derived = tables.networks.iter().map(|(network_id, table)| {
            let known = self.balances.entry(*network_id).or_default();
            if !Arc::ptr_eq(&known.0, table) {
                *known = (Arc::clone(table), Arc::new(Balance::of(table, &known.1)));
            }
            (*network_id, Arc::clone(&known.1))
        });
        derived.collect()
    }

    fn settings(&mut self, table: &NetworkTable) -> Result<Settings, Error> {
        let underlay_mtu = self.underlay_mtu()?;
        Ok(Settings::of(table, &self.options, underlay_mtu))
    }
}

/// The namespaces that are kept; files that keep none any more, as after a reboot, are removed.
fn find_segments(home: &Home, run_dir: &Path) -> Result<BTreeMap<NetworkId, Segment>, Error> {
    let dir = run_dir.join(NAMESPACES);
    let mut segments = BTreeMap::new();
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(segments),
        Err(error) => return Err(Error::file("list", dir, error)),
    };
    for entry in entries {
        let path: PathBuf = entry.map_err(|e| Error::file("list", &dir, e))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(network_id) = name.and_then(|name| name.parse().ok()) else { continue };
        match Segment::open(home, path.clone())? {
            Some(segment) => drop(segments.insert(network_id, segment)),
            None => namespace::forget(&path)?,
        }
    }
    Ok(segments)
}

fn first_of(failures: Vec<Error>) -> Result<(), Error> {
    let mut failures = failures.into_iter();
    let first = failures.next();
    for error in failures {
        tracing::warn!(error = &error as &dyn std::error::Error, "a network is incomplete");
    }
    first.map_or(Ok(()), Err)
}
