//! The part of the mesh that lives on a dedicated thread and blocks on the kernel.

use std::fs::{self, File, TryLockError};
use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnet::IpNet;
use skep_worker_core::mesh::{
    Endpoint, MeshTable, Objects, Op, Outcome, PortKey, Protocol, Slices, leave_out, relays,
    twin_net,
};

use super::ejection::{Ejector, Sample};
use super::flows::KernelFlows;
use super::hand_over::{HandOver, Passing};
use super::layout::Layout;
use super::links;
use super::options::Options;
use super::ports::{Condition, Follow, ListenerChanges, Ports};
use super::routes::Routes;
use super::rules::{Rules, Wanted};
use crate::net::rtnetlink::RouteChannel;
use crate::net::{Error, first_failure, sysctl};

/// The file in the run directory whose lock says that a daemon drives this node's mesh.
const LOCK_FILE: &str = "mesh.lock";

/// What serves the published ports of a node, on a thread of its own.
pub(super) trait Balancing: Send + 'static {
    /// Puts a table into effect. Whatever the outcome, the listeners have followed what changed for them.
    fn apply(&mut self, table: &MeshTable, follow: Follow<'_>) -> Result<Vec<Condition>, Error>;

    /// Whether a port that the last table could not be given is free, or has another holder: the table must be
    /// applied again.
    fn has_other_conditions(&self) -> bool;

    /// Lets go of the ports and of the lock; what serves without the daemon stays.
    fn release(&mut self) -> Result<(), Error>;

    /// Removes everything of the mesh from the kernel, and nothing else.
    fn teardown(&mut self) -> Result<(), Error>;
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
    ports: Ports,
    hand_over: HandOver,
    flows: KernelFlows,
    ejector: Ejector,
    /// What the last table wants, of IPv4 and IPv6; nothing before there was one.
    wanted: Option<(Objects, Option<Objects>)>,
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
        let mtu = links::mesh_mtu(&mut channel, &options)?;
        let mut rules = open_rules(&options, &slices)?;
        // What an earlier daemon published stays until the first table says otherwise.
        let (present, present6) = rules.observe()?;
        let present6_or_none = present6.clone().unwrap_or_default();
        let mut kernel = Self {
            routes: Routes::open(&options)?,
            routes6: open_routes6(&options)?,
            rules,
            ports: Ports::new(links::carries_ipv6(&options, mtu)),
            hand_over: HandOver::default(),
            flows: KernelFlows::new([&present, &present6_or_none], slices.pool()),
            ejector: Ejector::open()?,
            wanted: None,
            options,
            slices,
            channel,
            lock,
        };
        let mut changes = ListenerChanges::default();
        for key in present.ports.keys() {
            kernel.ports.hold_again(*key, &mut changes);
        }
        kernel.rules.converge((&present, present6.as_ref()))?;
        Ok((kernel, changes))
    }

    /// Routing that is added, then all rules at once, then routing that is deleted. A failure of
    /// one peer's routing must not keep the others' ports from changing, so it is returned beside; an error means
    /// that the rules are as they were.
    fn converge(
        &mut self,
        wanted: &Objects,
        twin: Option<&Objects>,
    ) -> Result<Option<Error>, Error> {
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
        converge_rules(&mut self.rules, &mut self.ejector, (wanted, twin))?;
        let ports = [wanted, twin.unwrap_or(&nothing)];
        failures.extend(self.flows.converge(ports, &mut self.channel).err());
        failures.extend(change_routing(true));
        let mut failures = failures.into_iter();
        let first = failures.next();
        for error in failures {
            tracing::warn!(error = &error as &dyn std::error::Error, "mesh routing is incomplete");
        }
        Ok(first)
    }

    /// Has the kernel forget requests that backends did not answer before they were withdrawn; returns whether
    /// it must be called again.
    pub(super) fn settle(&mut self) -> Result<bool, Error> {
        self.flows.settle(&mut self.channel)
    }

    /// Reads which backends answer.
    pub(super) fn sample(&mut self) -> Result<Sample, Error> {
        // First, since it may fail: an attempt that nobody is told of never ends, and reading decides nothing.
        self.follow_ejector()?;
        self.ejector.sample()
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
        converge_rules(&mut self.rules, &mut self.ejector, wanted)
    }

    /// The same where no mesh was started, of what an earlier daemon left.
    pub(super) fn remove(run_dir: PathBuf) -> Result<(), Error> {
        // What is removed has the same names whatever number and address the node had.
        let options = Options::new(1, Ipv4Addr::UNSPECIFIED, "", run_dir);
        let _lock = lock(&options)?;
        let slices = options.slices()?;
        // A kernel without nftables has interfaces of a daemon that balanced in user space.
        let rules = open_rules(&options, &slices).and_then(|mut rules| rules.remove());
        let routes = Routes::open(&options).and_then(|mut routes| routes.remove_rules());
        let routes6 = open_routes6(&options)
            .and_then(|routes| routes.map_or(Ok(()), |mut routes| routes.remove_rules()));
        let links = RouteChannel::open().and_then(|mut channel| links::remove(&mut channel));
        first_failure([rules, routes, routes6, links])
    }
}

impl Balancing for Kernel {
    fn apply(&mut self, table: &MeshTable, follow: Follow<'_>) -> Result<Vec<Condition>, Error> {
        self.options.check_table(table)?;
        let version = table.version;
        let invalid = |source| Error::Table { version, source };
        let mut wanted = Objects::of(table).map_err(invalid)?;
        let mut twin = Objects::twin_of(table).map_err(invalid)?;
        let mut changes = ListenerChanges { balance: relays(table), ..ListenerChanges::default() };
        let mut conditions = Vec::new();
        for refused in self.ports.take(table.ports.iter(), &mut changes) {
            if !refused.is_served {
                wanted.ports.remove(&refused.condition.port());
                changes.balance.remove(&refused.condition.port());
            }
            conditions.push(refused.condition);
        }
        self.ports.note(&conditions);
        if let Some(twin) = &mut twin {
            twin.ports.retain(|key, _| wanted.ports.contains_key(key));
        }
        self.ejector.learn(table, [&wanted, twin.as_ref().unwrap_or(&Objects::default())]);
        let passing = self.hand_over.begin(table, &wanted, &mut changes);
        // Before the rules: what they take no longer must find whoever serves it, and listeners are bound by now
        // and must be served also if something below fails.
        follow(changes);
        let converged = self.converge(&wanted, twin.as_ref());
        let passing = converged.is_ok().then_some(passing);
        follow(after_rules(&mut self.ports, &mut self.hand_over, table, passing));
        converged?.map_or(Ok(conditions), Err)
    }

    fn has_other_conditions(&self) -> bool {
        self.ports.has_other_conditions()
    }

    fn release(&mut self) -> Result<(), Error> {
        self.ports.release();
        unlock(&self.lock, &self.options)
    }

    fn teardown(&mut self) -> Result<(), Error> {
        let routes = [Some(&mut self.routes), self.routes6.as_mut()];
        let removed = remove_all(&mut self.rules, routes, &mut self.channel);
        removed.and(self.release())
    }
}

/// What listeners follow when the rules have changed: until then clients may have come past them. Where they could
/// not be changed (`passing` is absent), the daemon lets go of what is not published all the same.
fn after_rules(
    ports: &mut Ports,
    hand_over: &mut HandOver,
    table: &MeshTable,
    passing: Option<Passing>,
) -> ListenerChanges {
    let by_rules = passing.map_or_else(Vec::new, |passing| hand_over.end(passing));
    ListenerChanges { by_rules, withdraw: ports.keep(table), ..ListenerChanges::default() }
}

/// Makes the rules of a published port in the calling thread's network namespace, which must be a scratch one.
pub(in crate::net) fn probe_rules() -> Result<(), Error> {
    let options = Options::new(1, Ipv4Addr::LOCALHOST, "", PathBuf::new());
    let slices = options.slices()?;
    let key = PortKey { protocol: Protocol::Tcp, port: 1 };
    let endpoint = |address: Ipv4Addr| Endpoint { address: address.into(), port: 1 };
    let backends = slices.task_addresses(1).take(2).map(endpoint).collect();
    let wanted = Objects { ports: [(key, backends)].into(), ..Objects::default() };
    open_rules(&options, &slices)?.converge((&wanted, None))
}

/// Brings the rules to what is wanted, without the backends that do not answer.
fn converge_rules(
    rules: &mut Rules,
    ejector: &mut Ejector,
    (wanted, twin): Wanted<'_>,
) -> Result<(), Error> {
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
    ejector.settle();
    Ok(())
}

fn remove_all(
    rules: &mut Rules,
    routes: [Option<&mut Routes>; 2],
    channel: &mut RouteChannel,
) -> Result<(), Error> {
    let mut removed = vec![rules.remove()];
    removed.extend(routes.into_iter().flatten().map(Routes::remove_rules));
    removed.push(links::remove(channel));
    first_failure(removed)
}

pub(super) fn open_rules(options: &Options, slices: &Slices) -> Result<Rules, Error> {
    let slice = slices.slice(options.self_number);
    let [ipv4, ipv6] = [IpNet::from(slice), twin_net(slice).into()];
    Rules::open(Layout::new(options, ipv4), Layout::new(options, ipv6))
}

/// The routing of IPv6, where the kernel has any, be it only to remove what an earlier daemon left.
pub(super) fn open_routes6(options: &Options) -> Result<Option<Routes>, Error> {
    sysctl::has_ipv6_settings().then(|| Routes::open_ipv6(options)).transpose()
}

/// Lets another daemon drive the node's mesh.
pub(super) fn unlock(lock: &File, options: &Options) -> Result<(), Error> {
    let path = options.run_dir.join(LOCK_FILE);
    lock.unlock().map_err(|e| Error::file("unlock", path, e))
}

/// Fails where another daemon drives the node's mesh.
pub(super) fn lock(options: &Options) -> Result<File, Error> {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use skep_worker_core::mesh::PublishedPort;

    use super::*;

    fn table(published: &[u16]) -> MeshTable {
        let port = |published: &u16| PublishedPort {
            published: *published,
            protocol: Protocol::Tcp,
            service_id: String::new(),
            service: String::new(),
            proxy_protocol: None,
            backends: Vec::new(),
        };
        MeshTable {
            version: 1,
            self_number: 1,
            pool: MeshTable::default_pool(),
            slice_prefix: MeshTable::default_slice_prefix(),
            peers: Vec::new(),
            ipv6: BTreeMap::new(),
            daemons: BTreeMap::new(),
            ports: published.iter().map(port).collect(),
        }
    }

    #[test]
    fn a_relayed_port_is_withdrawn_also_where_the_rules_stay_as_they_were() {
        let free = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let key = PortKey { protocol: Protocol::Tcp, port };
        let (mut ports, mut hand_over) = (Ports::new(false), HandOver::default());
        let refused = ports.take(table(&[port]).ports.iter(), &mut ListenerChanges::default());
        assert!(refused.is_empty(), "{refused:?}");
        let changes = after_rules(&mut ports, &mut hand_over, &table(&[port]), None);
        assert_eq!((changes.by_rules, changes.withdraw), (vec![], vec![]));
        let changes = after_rules(&mut ports, &mut hand_over, &table(&[]), None);
        assert_eq!((changes.by_rules, changes.withdraw), (vec![], vec![key]));
    }
}
