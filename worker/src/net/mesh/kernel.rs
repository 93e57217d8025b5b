//! The part of the mesh that lives on a dedicated thread and blocks on the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnet::IpNet;
use skep_worker_core::mesh::{
    Endpoint, MeshTable, Objects, Op, Outcome, PortKey, Protocol, Relay, Slices, leave_out, relays,
    twin_net,
};

use super::ejection::{Ejector, Sample};
use super::flows::KernelFlows;
use super::hold::{Hold, Listeners, hold, hold_relayed};
use super::layout::Layout;
use super::links;
use super::options::Options;
use super::program::{Program, holder_after};
use super::routes::Routes;
use super::rules::{Rules, Wanted};
use crate::net::rtnetlink::RouteChannel;
use crate::net::{Error, sysctl};

/// The file in the run directory whose lock says that a daemon drives this node's mesh.
const LOCK_FILE: &str = "mesh.lock";

/// Something about a published port that its service's users should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Another program of this node has the port, so the mesh leaves it alone here. Remedy: stop
    /// that program; the next table, or the same one again, takes the port.
    PortHeld {
        /// The service that publishes the port.
        service_id: String,
        /// The port.
        port: PortKey,
        /// The program, where the kernel shows it.
        program: Option<Program>,
    },
    /// The port could not be taken for another reason, and is not served here. On a kernel without SCTP
    /// a port of it is served all the same to clients elsewhere, by tasks of nodes that have it.
    PortFailed {
        /// The service that publishes the port.
        service_id: String,
        /// The port.
        port: PortKey,
        /// What the kernel said.
        reason: String,
    },
}

impl Condition {
    /// The port.
    pub fn port(&self) -> PortKey {
        match self {
            Self::PortHeld { port, .. } | Self::PortFailed { port, .. } => *port,
        }
    }

    /// The service that publishes it.
    pub fn service_id(&self) -> &str {
        match self {
            Self::PortHeld { service_id, .. } | Self::PortFailed { service_id, .. } => service_id,
        }
    }

    /// What is the matter with the port, and what to do: the end of a sentence about it.
    pub fn advice(&self) -> String {
        match self {
            Self::PortHeld { .. } => {
                format!("{}: stop it or publish another port", self.reason())
            }
            Self::PortFailed { .. } => self.reason(),
        }
    }

    fn reason(&self) -> String {
        match self {
            Self::PortHeld { program: Some(program), .. } => format!("is held by {program}"),
            Self::PortHeld { program: None, .. } => "is held by another program".to_owned(),
            Self::PortFailed { reason, .. } => format!("could not be taken: {reason}"),
        }
    }
}

impl std::fmt::Display for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "port {} {}", self.port(), self.reason())
    }
}

/// What changed for the listeners, which live on the runtime.
#[derive(Debug, Default)]
pub(super) struct ListenerChanges {
    pub(super) serve: Vec<(PortKey, Listeners)>,
    pub(super) withdraw: Vec<PortKey>,
    /// What every relayed port is balanced to.
    pub(super) balance: BTreeMap<PortKey, Relay>,
    /// Whether a port passes between the rules and the daemon: the same table must be applied again when
    /// the listeners of withdrawn ports are closed.
    pub(super) is_halfway: bool,
}

/// The kernel's state of the mesh on this node.
#[derive(Debug)]
pub(super) struct Kernel {
    options: Options,
    slices: Slices,
    channel: RouteChannel,
    routes: Routes,
    routes6: Option<Routes>,
    rules: Rules,
    holds: BTreeMap<PortKey, Hold>,
    flows: KernelFlows,
    ejector: Ejector,
    /// What the last table wants, of IPv4 and IPv6; nothing before there was one.
    wanted: Option<(Objects, Option<Objects>)>,
    /// Ports that the last table could not be given.
    conditions: Vec<Condition>,
    lock: File,
}

impl Kernel {
    /// Takes over what the kernel has, repairs what differs, and makes what is missing.
    pub(super) fn start(options: Options) -> Result<(Self, ListenerChanges), Error> {
        let slices = options.slices()?;
        let lock = lock(&options)?;
        let mut channel = RouteChannel::open()?;
        links::check_pool(&mut channel, slices.pool())?;
        sysctl::ensure_forwarding()?;
        if options.ipv6 {
            sysctl::ensure_ipv6_forwarding()?;
        }
        links::ensure(&mut channel, &options, &slices)?;
        let mut rules = open_rules(&options, &slices)?;
        // What an earlier daemon published stays until the first table says otherwise.
        let (present, present6) = rules.observe()?;
        let present6_or_none = present6.clone().unwrap_or_default();
        let mut kernel = Self {
            routes: Routes::open(&options)?,
            routes6: open_routes6(&options)?,
            rules,
            holds: BTreeMap::new(),
            flows: KernelFlows::new([&present, &present6_or_none], slices.pool()),
            ejector: Ejector::open()?,
            wanted: None,
            conditions: Vec::new(),
            options,
            slices,
            channel,
            lock,
        };
        let mut changes = ListenerChanges::default();
        for key in present.ports.keys() {
            match hold(*key) {
                Ok((hold, listeners)) => {
                    kernel.holds.insert(*key, hold);
                    changes.serve.push((*key, listeners));
                }
                Err(error) if is_without_sctp(*key, &error) => {}
                Err(error) => tracing::warn!(port = %key, %error, "failed to hold the port again"),
            }
        }
        kernel.rules.converge((&present, present6.as_ref()))?;
        Ok((kernel, changes))
    }

    /// Puts a table into effect. Whatever the outcome, the listeners must follow the changes.
    pub(super) fn apply(
        &mut self,
        table: &MeshTable,
    ) -> (ListenerChanges, Result<Vec<Condition>, Error>) {
        let mut changes = ListenerChanges::default();
        let result = self.try_apply(table, &mut changes);
        (changes, result)
    }

    fn try_apply(
        &mut self,
        table: &MeshTable,
        changes: &mut ListenerChanges,
    ) -> Result<Vec<Condition>, Error> {
        self.options.check_table(table)?;
        let version = table.version;
        let invalid = |source| Error::Table { version, source };
        let mut wanted = Objects::of(table).map_err(invalid)?;
        let mut twin = Objects::twin_of(table).map_err(invalid)?;
        changes.balance = relays(table);
        let conditions = self.take_ports(table, &mut wanted, changes);
        self.conditions.clone_from(&conditions);
        if let Some(twin) = &mut twin {
            twin.ports.retain(|key, _| wanted.ports.contains_key(key));
        }
        self.ejector.learn(table, [&wanted, twin.as_ref().unwrap_or(&Objects::default())]);
        // Listeners are bound by now: they must be served also if something below fails.
        self.converge(&wanted, twin.as_ref())?;
        let relayed = changes.balance.keys();
        let published: BTreeSet<PortKey> = wanted.ports.keys().chain(relayed).copied().collect();
        let withdrawn = self.holds.keys().filter(|key| !published.contains(key));
        changes.withdraw.extend(withdrawn.copied());
        self.holds.retain(|key, _| published.contains(key));
        Ok(conditions)
    }

    /// Whether a port of [`Self::conditions`] is free, or another program has it: the table must be
    /// applied again. Costs nothing where there are none.
    pub(super) fn has_other_conditions(&self) -> bool {
        self.conditions.iter().any(|condition| match condition {
            Condition::PortHeld { program: Some(program), .. } => !program.holds_still(),
            _ => hold(condition.port()).is_ok(),
        })
    }

    /// Holds every port that is not held yet; takes those that others have out of `wanted`.
    fn take_ports(
        &mut self,
        table: &MeshTable,
        wanted: &mut Objects,
        changes: &mut ListenerChanges,
    ) -> Vec<Condition> {
        let mut conditions = Vec::new();
        for published in &table.ports {
            let key = PortKey { protocol: published.protocol, port: published.published };
            let is_relayed = changes.balance.contains_key(&key);
            if let Some(present) = self.holds.get(&key) {
                if present.is_relayed != is_relayed {
                    self.holds.remove(&key);
                    wanted.ports.remove(&key);
                    changes.balance.remove(&key);
                    changes.withdraw.push(key);
                    changes.is_halfway = true;
                }
                continue;
            }
            match if is_relayed { hold_relayed(key) } else { hold(key) } {
                Ok((hold, listeners)) => {
                    self.holds.insert(key, hold);
                    changes.serve.push((key, listeners));
                }
                Err(error) => {
                    // A port that no program could take is served by the rules alone.
                    if !is_without_sctp(key, &error) {
                        wanted.ports.remove(&key);
                        changes.balance.remove(&key);
                    }
                    let known = self.conditions.iter().find(|known| known.port() == key);
                    conditions.push(refused(published.service_id.clone(), key, &error, known));
                }
            }
        }
        conditions
    }

    /// Routing that is added, then all rules at once, then routing that is deleted. A failure of
    /// one peer's routing must not keep the others' ports from changing, so it is reported last.
    fn converge(&mut self, wanted: &Objects, twin: Option<&Objects>) -> Result<(), Error> {
        let devices = links::ensure(&mut self.channel, &self.options, &self.slices)?;
        // A table that names this node is of use only where its interfaces carry it.
        let twin = twin.filter(|_| devices.has_ipv6);
        let (nothing, mut failures) = (Objects::default(), Vec::new());
        let ops = self.routes.observe(devices)?.diff(wanted);
        let mut both = vec![(&mut self.routes, ops)];
        if let Some(routes) = &mut self.routes6 {
            let ops = routes.observe(devices)?.diff(twin.unwrap_or(&nothing));
            both.push((routes, ops));
        }
        let mut change_routing = |is_after: bool| -> Vec<Error> {
            let of_one = both.iter_mut().flat_map(|(routes, ops)| {
                let is_now = |op: &&Op| !op.is_rules() && op.is_after_rules() == is_after;
                ops.iter().filter(is_now).filter_map(|op| routes.change(op, devices).err())
            });
            of_one.collect()
        };
        failures.extend(change_routing(false));
        self.wanted = Some((wanted.clone(), twin.cloned()));
        failures.extend(converge_rules(&mut self.rules, &mut self.ejector, (wanted, twin))?);
        let ports = [wanted, twin.unwrap_or(&nothing)];
        failures.extend(self.flows.converge(ports, &mut self.channel).err());
        failures.extend(change_routing(true));
        let mut failures = failures.into_iter();
        let first = failures.next();
        for error in failures {
            tracing::warn!(error = &error as &dyn std::error::Error, "mesh routing is incomplete");
        }
        first.map_or(Ok(()), Err)
    }

    /// Has the kernel forget requests that backends did not answer before they were withdrawn.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        self.flows.settle(&mut self.channel)
    }

    /// Reads which backends answer.
    pub(super) fn sample(&mut self) -> Result<Sample, Error> {
        let sample = self.ejector.sample()?;
        self.follow_ejector()?;
        Ok(sample)
    }

    /// Takes over how the node's own attempt to connect to a backend ended.
    pub(super) fn conclude(&mut self, endpoint: &Endpoint, outcome: Outcome) -> Result<(), Error> {
        self.ejector.conclude(endpoint, outcome);
        self.follow_ejector()
    }

    fn follow_ejector(&mut self) -> Result<(), Error> {
        if !self.ejector.is_due() {
            return Ok(());
        }
        let Some((wanted, twin)) = &self.wanted else { return Ok(()) };
        let wanted = (wanted, twin.as_ref());
        converge_rules(&mut self.rules, &mut self.ejector, wanted)?.map_or(Ok(()), Err)
    }

    /// Lets go of the ports and of the lock; forwarding stays.
    pub(super) fn release(&mut self) -> Result<(), Error> {
        self.holds.clear();
        let path = self.options.run_dir.join(LOCK_FILE);
        self.lock.unlock().map_err(|e| Error::file("unlock", path, e))
    }

    /// Removes everything of the mesh from the kernel, and nothing else.
    pub(super) fn teardown(&mut self) -> Result<(), Error> {
        let routes = [Some(&mut self.routes), self.routes6.as_mut()];
        let removed = remove_all(&mut self.rules, routes, &mut self.channel);
        removed.and(self.release())
    }

    /// The same where no mesh was started, of what an earlier daemon left.
    pub(super) fn remove(run_dir: PathBuf) -> Result<(), Error> {
        // What is removed has the same names whatever number and address the node had.
        let options = Options::new(1, Ipv4Addr::UNSPECIFIED, "", run_dir);
        let _lock = lock(&options)?;
        let mut rules = open_rules(&options, &options.slices()?)?;
        let (mut routes, mut routes6) = (Routes::open(&options)?, open_routes6(&options)?);
        let routes = [Some(&mut routes), routes6.as_mut()];
        remove_all(&mut rules, routes, &mut RouteChannel::open()?)
    }
}

/// Brings the rules to what is wanted, without the backends that do not answer. What fails after that is
/// returned beside.
fn converge_rules(
    rules: &mut Rules,
    ejector: &mut Ejector,
    (wanted, twin): Wanted<'_>,
) -> Result<Option<Error>, Error> {
    let left_out = ejector.left_out();
    if left_out.is_empty() {
        rules.converge((wanted, twin))?;
    } else {
        let (mut wanted, mut twin) = (wanted.clone(), twin.cloned());
        for objects in [Some(&mut wanted), twin.as_mut()].into_iter().flatten() {
            leave_out(&mut objects.ports, &left_out);
        }
        rules.converge((&wanted, twin.as_ref()))?;
    }
    Ok(ejector.settle().err())
}

fn remove_all(
    rules: &mut Rules,
    routes: [Option<&mut Routes>; 2],
    channel: &mut RouteChannel,
) -> Result<(), Error> {
    let mut removed = vec![rules.remove()];
    removed.extend(routes.into_iter().flatten().map(Routes::remove_rules));
    removed.push(links::remove(channel));
    removed.into_iter().collect()
}

fn open_rules(options: &Options, slices: &Slices) -> Result<Rules, Error> {
    let slice = slices.slice(options.self_number);
    let [ipv4, ipv6] = [IpNet::from(slice), twin_net(slice).into()];
    Rules::open(Layout::new(options, ipv4), Layout::new(options, ipv6))
}

/// The routing of IPv6, where the kernel has any, be it only to remove what an earlier daemon left.
fn open_routes6(options: &Options) -> Result<Option<Routes>, Error> {
    sysctl::has_ipv6_settings().then(|| Routes::open_ipv6(options)).transpose()
}

fn is_without_sctp(port: PortKey, error: &io::Error) -> bool {
    port.protocol == Protocol::Sctp && error.kind() == io::ErrorKind::Unsupported
}

/// Why a port could not be taken; `known` is what was said of it before.
fn refused(
    service_id: String,
    port: PortKey,
    error: &io::Error,
    known: Option<&Condition>,
) -> Condition {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            let known = match known {
                Some(Condition::PortHeld { program, .. }) => program.as_ref(),
                _ => None,
            };
            Condition::PortHeld { service_id, port, program: holder_after(port, known) }
        }
        _ if is_without_sctp(port, error) => {
            let reason = "this kernel has no SCTP (CONFIG_IP_SCTP; try: modprobe sctp)".to_owned();
            Condition::PortFailed { service_id, port, reason }
        }
        _ => Condition::PortFailed { service_id, port, reason: error.to_string() },
    }
}

fn lock(options: &Options) -> Result<File, Error> {
    let dir = &options.run_dir;
    fs::create_dir_all(dir).map_err(|e| Error::file("make the directory", dir, e))?;
    let path = dir.join(LOCK_FILE);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|e| Error::file("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path }),
        Err(TryLockError::Error(e)) => Err(Error::file("lock", &path, e)),
    }
}
