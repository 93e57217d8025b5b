//! Ports that the daemon serves instead of the kernel: it accepts each connection and makes one of its own to
//! a task.
//!
//! Those with the PROXY protocol; where the kernel has no rules for it, all of TCP; and on the other nodes those
//! that have a task on such a node, which no tunnel leads to. A task beyond is reached by a passage: a stream
//! through the daemon of its node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;

use skep_common::NodeId;
use skep_common::spec::ProxyProtocol;

use super::{Backend, MeshTable, PortKey, Protocol, PublishedPort, Reason, Slices};

/// What the daemon must know of a port that it relays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// How tasks are told of clients.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The healthy tasks, ascending and without repetition.
    pub backends: Vec<Target>,
}

/// Where a connection is made to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// The task's address and port.
    pub address: SocketAddrV4,
    /// The task.
    pub task_id: String,
    /// The way there, where packets have none.
    pub passage: Option<Passage>,
}

/// A way through the daemon of the task's node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Passage {
    /// The node, by its certificate.
    pub node_id: NodeId,
    /// Where its daemon listens.
    pub daemon: SocketAddrV4,
    /// The task.
    pub task_id: String,
    /// The port that the task listens on.
    pub target_port: u16,
}

/// Which ports and backends of a table packets have no way to.
#[derive(Debug)]
pub(super) struct Reach {
    beyond_tunnel: BTreeSet<u16>,
    /// Absent where every node has a tunnel.
    slices: Option<Slices>,
}

impl Reach {
    pub(super) fn of(table: &MeshTable) -> Self {
        let beyond_tunnel = table.beyond_tunnel();
        let slices = table.slices().ok().filter(|_| !beyond_tunnel.is_empty());
        Self { beyond_tunnel, slices }
    }

    /// Whether the backend's node has no tunnel.
    pub(super) fn is_beyond_tunnel(&self, backend: &Backend) -> bool {
        let number = self.slices.and_then(|slices| slices.number_of(backend.address));
        number.is_some_and(|number| self.beyond_tunnel.contains(&number))
    }

    /// Whether the daemon relays connections of the port, which the kernel's rules then leave to it.
    pub(super) fn is_relayed(&self, port: &PublishedPort) -> bool {
        let is_beyond = |backend| self.is_beyond_tunnel(backend);
        port.protocol == Protocol::Tcp
            && (port.proxy_protocol.is_some() || port.backends.iter().any(is_beyond))
    }
}

/// The relayed ports of a node whose kernel serves the others.
pub fn relays(table: &MeshTable) -> BTreeMap<PortKey, Relay> {
    let reach = Reach::of(table);
    let relayed = table.ports.iter().filter(|port| reach.is_relayed(port));
    let relayed = relayed.map(|port| {
        let backends = port.backends.iter();
        let target = |backend| match reach.is_beyond_tunnel(backend) {
            true => by_passage(table, backend),
            false => Some(direct(backend)),
        };
        relay(port, backends.filter_map(target).collect())
    });
    relayed.collect()
}

/// The relayed ports of a node that the kernel serves nothing for: all of TCP. There is no tunnel either, so
/// that a way leads through the daemon of each other node.
pub fn user_space_relays(table: &MeshTable) -> BTreeMap<PortKey, Relay> {
    let slice = table.slices().ok().map(|slices| slices.slice(table.self_number));
    let relayed = table.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    let relayed = relayed.map(|port| {
        let backends = port.backends.iter();
        let target =
            |backend: &Backend| match slice.is_some_and(|own| own.contains(&backend.address)) {
                true => Some(direct(backend)),
                false => by_passage(table, backend),
            };
        relay(port, backends.filter_map(target).collect())
    });
    relayed.collect()
}

fn relay(port: &PublishedPort, backends: BTreeSet<Target>) -> (PortKey, Relay) {
    let key = PortKey { protocol: port.protocol, port: port.published };
    let backends = backends.into_iter().collect();
    (key, Relay { proxy_protocol: port.proxy_protocol, backends })
}

fn direct(backend: &Backend) -> Target {
    let address = SocketAddrV4::new(backend.address, backend.target_port);
    Target { task_id: backend.task_id.clone(), address, passage: None }
}

/// A port as the kernel's rules balance it, by IPv4.
pub fn in_rules(port: &PublishedPort) -> Relay {
    relay(port, port.backends.iter().map(direct).collect()).1
}

/// `None` where the table does not say how the node's daemon is reached.
fn by_passage(table: &MeshTable, backend: &Backend) -> Option<Target> {
    let number = table.slices().ok()?.number_of(backend.address)?;
    let daemon = table.daemons.get(&number)?;
    let passage = Passage {
        node_id: daemon.node_id,
        daemon: daemon.address,
        task_id: backend.task_id.clone(),
        target_port: backend.target_port,
    };
    Some(Target { passage: Some(passage), ..direct(backend) })
}

/// What a node goes by when another one asks for a passage.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Gate {
    /// The table that this is of.
    pub version: u64,
    /// The table by which ports and peers last changed: who has that one knows the same tasks.
    pub since: u64,
    /// The nodes of the swarm.
    pub nodes: BTreeSet<NodeId>,
    /// Where passages may end: at ports of the node's own tasks that are published, by task and port.
    pub targets: BTreeMap<(String, u16), SocketAddrV4>,
    /// All ports of tasks that are published, of which `since` says when they changed.
    pub ways: BTreeSet<(String, u16)>,
}

/// Whether a passage is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// To that address.
    To(SocketAddrV4),
    /// The table does not name the caller.
    NotOfSwarm,
    /// The table names no such task and port.
    NoSuchTask,
    /// The caller knows a later table, which is waited for.
    Later,
}

impl Gate {
    /// The same by another table.
    #[must_use]
    pub fn follow(&self, table: &MeshTable) -> Self {
        let nodes = table.daemons.values().map(|daemon| daemon.node_id).collect();
        let backends = table.ports.iter().flat_map(|port| &port.backends);
        let ways = backends.map(|backend| (backend.task_id.clone(), backend.target_port)).collect();
        let next = Self {
            version: table.version,
            since: self.since,
            nodes,
            targets: own_targets(table),
            ways,
        };
        let is_same = (&next.nodes, &next.ways) == (&self.nodes, &self.ways);
        Self {
            since: if is_same && self.since <= next.version { self.since } else { next.version },
            ..next
        }
    }

    /// Answers a caller that knows the task by a table of that version.
    pub fn admit(&self, caller: NodeId, way: &(String, u16), version: u64) -> Admission {
        let is_of_swarm = self.nodes.contains(&caller);
        match self.targets.get(way) {
            Some(address) if is_of_swarm => Admission::To(*address),
            _ if self.version < version => Admission::Later,
            _ if is_of_swarm => Admission::NoSuchTask,
            _ => Admission::NotOfSwarm,
        }
    }
}

fn own_targets(table: &MeshTable) -> BTreeMap<(String, u16), SocketAddrV4> {
    let Ok(slices) = table.slices() else { return BTreeMap::new() };
    let own = slices.slice(table.self_number);
    let streams = table.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    let backends = streams.flat_map(|port| &port.backends);
    let backends = backends.filter(|backend| own.contains(&backend.address));
    let target = |backend: &Backend| {
        ((backend.task_id.clone(), backend.target_port), direct(backend).address)
    };
    backends.map(target).collect()
}

/// Gives backends in exact turns, as long as they answer: who does not is left out until it does.
///
/// The port's last backends stay: where all are left out, all have their turn.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Turns {
    backends: Vec<Target>,
    left_out: BTreeMap<Target, Reason>,
    next: usize,
}

impl Turns {
    /// Replaces the backends; where they are the same, the turns go on. Who is named no longer is trusted when it
    /// comes again.
    pub fn set(&mut self, backends: &[Target]) {
        if self.backends != backends {
            self.left_out.retain(|backend, _| backends.contains(backend));
            self.backends = backends.to_vec();
            self.next = 0;
        }
    }

    /// Whether a client whom those in `failed` failed may wait for the backend: it is one of them, and no other one
    /// that is left to the client is better. Whoever [`Self::take`] gives may be waited for.
    pub fn is_given(&self, backend: &Target, failed: &BTreeSet<Target>) -> bool {
        let is_better = |other: &Target| !failed.contains(other) && !self.is_left_out(other);
        self.backends.contains(backend)
            && (!self.is_left_out(backend) || !self.backends.iter().any(is_better))
    }

    /// Whether there is another backend than this one, which is named.
    pub fn has_choice(&self, backend: &Target) -> bool {
        self.backends.len() > 1 && self.backends.contains(backend)
    }

    /// Whether the backend gets no turn while another one accepts.
    pub fn is_left_out(&self, backend: &Target) -> bool {
        self.left_out.contains_key(backend)
    }

    /// Leaves a backend out where there is a choice; returns what is to be said of it.
    pub fn leave_out(&mut self, backend: &Target, reason: Reason) -> Option<Verdict> {
        if !self.has_choice(backend) || self.is_left_out(backend) {
            return None;
        }
        self.left_out.insert(backend.clone(), reason);
        Some(if self.is_none_trusted() { Verdict::NoneAnswers } else { Verdict::LeftOut(reason) })
    }

    /// The backend has accepted; returns whether it was left out.
    pub fn take_back(&mut self, backend: &Target) -> bool {
        self.left_out.remove(backend).is_some()
    }

    fn is_none_trusted(&self) -> bool {
        self.left_out.len() == self.backends.len()
    }

    /// The next backend in turn that is not in `failed`, and of those left out only when there is no other; `None`
    /// where all have failed.
    ///
    /// One that is passed over has had its turn: its neighbour does not get the double of it.
    pub fn take(&mut self, failed: &BTreeSet<Target>) -> Option<Target> {
        self.take_if(|turns, backend| !failed.contains(backend) && !turns.is_left_out(backend))
            .or_else(|| self.take_if(|_, backend| !failed.contains(backend)))
    }

    fn take_if(&mut self, may_be: impl Fn(&Self, &Target) -> bool) -> Option<Target> {
        for _ in 0..self.backends.len() {
            let backend = self.backends.get(self.next)?;
            let is_it = may_be(self, backend);
            let backend = is_it.then(|| backend.clone());
            self.next = (self.next + 1) % self.backends.len();
            if backend.is_some() {
                return backend;
            }
        }
        None
    }
}

/// What is to be said of a backend that does not accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It gets no connections of the port any more.
    LeftOut(Reason),
    /// None of the port's accepts, so all get their turn.
    NoneAnswers,
}

#[cfg(test)]
mod tests {
    use super::super::{Daemon, Objects};
    use super::*;

    fn address(last: u8) -> Target {
        let address = SocketAddrV4::new([10, 192, 4, last].into(), 80);
        Target { task_id: String::new(), address, passage: None }
    }

    fn take(turns: &mut Turns, n: usize, dead: &[u8]) -> Vec<u8> {
        let connect = |turns: &mut Turns| {
            let mut failed = BTreeSet::new();
            loop {
                let backend = turns.take(&failed)?;
                let last = backend.address.ip().octets()[3];
                if !dead.contains(&last) {
                    return Some(last);
                }
                failed.insert(backend);
            }
        };
        (0..n).filter_map(|_| connect(turns)).collect()
    }

    #[test]
    fn turns_are_exact_and_pass_over_what_fails() {
        let mut turns = Turns::default();
        assert_eq!(turns.take(&BTreeSet::new()), None, "there is none");
        turns.set(&[1, 2, 3].map(address));
        assert_eq!(take(&mut turns, 4, &[]), [1, 2, 3, 1]);
        turns.set(&[1, 2, 3].map(address));
        assert_eq!(take(&mut turns, 2, &[]), [2, 3], "the same ones go on");
        assert_eq!(take(&mut turns, 4, &[2]), [1, 3, 1, 3], "its turns are nobody's");
        assert_eq!(take(&mut turns, 2, &[1, 2, 3]), [0; 0], "nobody is asked twice");
        turns.set(&[2, 3].map(address));
        assert_eq!(take(&mut turns, 3, &[]), [2, 3, 2]);
    }

    #[test]
    fn who_does_not_accept_has_no_turn_until_it_does_and_the_last_ones_stay() {
        let mut turns = Turns::default();
        turns.set(&[1].map(address));
        assert_eq!(turns.leave_out(&address(1), Reason::Silent), None, "the only one");
        turns.set(&[1, 2, 3].map(address));
        let out = turns.leave_out(&address(2), Reason::Refused);
        assert_eq!(out, Some(Verdict::LeftOut(Reason::Refused)));
        assert_eq!(turns.leave_out(&address(2), Reason::Silent), None, "known");
        assert_eq!(turns.leave_out(&address(9), Reason::Silent), None, "a stranger");
        let is_given = |turns: &Turns, backend: u8, failed: &[u8]| {
            turns.is_given(&address(backend), &failed.iter().copied().map(address).collect())
        };
        assert!(!is_given(&turns, 2, &[]) && is_given(&turns, 3, &[]));
        assert!(!is_given(&turns, 2, &[3]) && is_given(&turns, 2, &[1, 3]), "what is left");
        assert_eq!(take(&mut turns, 4, &[]), [1, 3, 1, 3]);
        assert_eq!(take(&mut turns, 2, &[1, 3]), [2, 2], "better than nobody");
        let out = turns.leave_out(&address(1), Reason::Silent);
        assert_eq!(out, Some(Verdict::LeftOut(Reason::Silent)));
        assert_eq!(turns.leave_out(&address(3), Reason::Silent), Some(Verdict::NoneAnswers));
        assert!([1, 2, 3].into_iter().all(|backend| is_given(&turns, backend, &[])));
        let mut all = take(&mut turns, 3, &[]);
        all.sort_unstable();
        assert_eq!(all, [1, 2, 3]);
        assert!(turns.take_back(&address(3)) && !turns.take_back(&address(3)));
        assert_eq!(take(&mut turns, 2, &[]), [3, 3]);
        turns.set(&[1, 3].map(address));
        assert_eq!(take(&mut turns, 2, &[]), [3, 3], "nothing new is said of the first");
        turns.set(&[1, 2, 3].map(address));
        assert_eq!(take(&mut turns, 2, &[]), [2, 3], "it was gone and is trusted again");
        let another = Target { task_id: "another".to_owned(), ..address(1) };
        turns.set(&[another.clone(), address(2)]);
        assert_eq!(turns.take(&BTreeSet::new()), Some(another), "another task has the address");
    }

    /// Nodes 1 to 3, of which those named have no tunnel, as node 1 is told; a port is
    /// `PROTOCOL[+proxy]:NODE,…`, a target the last number of the address' node, with `!` by a passage.
    fn table(beyond: &[u16], ports: &[&str]) -> MeshTable {
        let daemon = |number: u16| Daemon {
            node_id: NodeId(number.into()),
            address: SocketAddrV4::new([10, 98, 0, u8::try_from(number).unwrap()].into(), 2377),
            is_balancer: beyond.contains(&number),
        };
        let port = |(published, word): (u16, &&str)| {
            let (kind, nodes) = word.split_once(':').unwrap();
            let backend = |node: &str| Backend {
                task_id: format!("task{node}"),
                address: [10, 192, 4 * node.parse::<u8>().unwrap(), 1].into(),
                target_port: 80,
            };
            PublishedPort {
                published,
                protocol: if kind == "udp" { Protocol::Udp } else { Protocol::Tcp },
                service_id: String::new(),
                service: String::new(),
                proxy_protocol: kind.ends_with("+proxy").then_some(ProxyProtocol::V2),
                backends: nodes.split(',').filter(|n| !n.is_empty()).map(backend).collect(),
            }
        };
        MeshTable {
            version: 1,
            self_number: 1,
            pool: MeshTable::default_pool(),
            slice_prefix: MeshTable::default_slice_prefix(),
            peers: Vec::new(),
            ipv6: BTreeMap::new(),
            daemons: [1, 2, 3].map(|number| (number, daemon(number))).into(),
            ports: (1..).zip(ports).map(port).collect(),
        }
    }

    fn words(relays: &BTreeMap<PortKey, Relay>) -> String {
        let node = |target: &Target| {
            let by = target.passage.as_ref().map_or("", |_| "!");
            format!("{by}{}", target.address.ip().octets()[2] / 4)
        };
        let words = relays.iter().map(|(key, relay)| {
            let nodes: Vec<String> = relay.backends.iter().map(node).collect();
            format!("{key}:{}", nodes.join(","))
        });
        words.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_kernel_leaves_to_the_daemon_what_its_rules_cannot_reach() {
        for (name, beyond, ports, relayed, in_rules) in [
            (
                "nobody is beyond",
                &[][..],
                &["tcp:1,2", "tcp+proxy:1,3"][..],
                "2/tcp:1,3",
                "1/tcp:2",
            ),
            ("one is", &[3], &["tcp:1,2,3", "tcp:1,2"], "1/tcp:1,2,!3", "2/tcp:2"),
            ("a port that passes a header on", &[3], &["tcp+proxy:3"], "1/tcp:!3", ""),
            ("a port without tasks", &[3], &["tcp:"], "", "1/tcp:0"),
            ("no datagram has a way", &[3], &["udp:2,3"], "", "1/udp:1"),
            (
                "what is said of the node itself counts for others",
                &[1],
                &["tcp:1,2"],
                "",
                "1/tcp:2",
            ),
        ] {
            let table = table(beyond, ports);
            assert_eq!(words(&relays(&table)), relayed, "{name}");
            let rules = Objects::of(&table).unwrap().ports.into_iter();
            let rules: Vec<String> =
                rules.map(|(key, backends)| format!("{key}:{}", backends.len())).collect();
            assert_eq!(rules.join(" "), in_rules, "{name}");
        }
    }

    #[test]
    fn a_daemon_that_balances_goes_by_the_daemons_of_all_other_nodes() {
        for (name, beyond, ports, relayed) in [
            (
                "all of TCP",
                &[1][..],
                &["tcp:1,2,3", "tcp+proxy:2", "udp:1"][..],
                "1/tcp:1,!2,!3 2/tcp:!2",
            ),
            ("also before managers know of it", &[], &["tcp:1,2"], "1/tcp:1,!2"),
            ("a port without tasks refuses", &[1, 2], &["tcp:"], "1/tcp:"),
        ] {
            assert_eq!(words(&user_space_relays(&table(beyond, ports))), relayed, "{name}");
        }
        let mut table = table(&[1], &["tcp:1,2"]);
        let relay = &user_space_relays(&table).into_values().next().unwrap();
        let passage = Passage {
            node_id: NodeId(2),
            daemon: "10.98.0.2:2377".parse().unwrap(),
            task_id: "task2".into(),
            target_port: 80,
        };
        assert_eq!(relay.backends[1].passage, Some(passage));
        table.daemons.remove(&2);
        assert_eq!(words(&user_space_relays(&table)), "1/tcp:1", "nobody said how it is reached");
    }

    #[test]
    fn passages_end_at_published_ports_of_own_tasks() {
        let targets = own_targets(&table(&[], &["tcp:1,2", "udp:1", "tcp+proxy:1"]));
        let expect = [(("task1".to_owned(), 80), "10.192.4.1:80".parse().unwrap())];
        assert_eq!(targets, expect.into());
    }

    #[test]
    fn callers_and_tasks_are_refused_at_once_unless_a_later_table_may_name_them() {
        let told = |version: u64, ports: &[&str]| MeshTable { version, ..table(&[], ports) };
        let gate = Gate::default().follow(&told(5, &["tcp:1,2"]));
        let (here, there) = (("task1".to_owned(), 80), ("task2".to_owned(), 80));
        let to = Admission::To("10.192.4.1:80".parse().unwrap());
        for (caller, way, version, expect) in [
            (2, &here, 5, to),
            (2, &here, 9, to),
            (2, &there, 5, Admission::NoSuchTask),
            (2, &there, 6, Admission::Later),
            (9, &here, 5, Admission::NotOfSwarm),
            (9, &here, 6, Admission::Later),
            (9, &there, 4, Admission::NotOfSwarm),
        ] {
            assert_eq!(
                gate.admit(NodeId(caller), way, version),
                expect,
                "{caller} {way:?} {version}"
            );
        }
        // A table with news of other things says nothing that a node of the earlier one does not know.
        let gate = gate.follow(&told(7, &["tcp:1,2"]));
        assert_eq!((gate.version, gate.since), (7, 5));
        let gate = gate.follow(&told(8, &["tcp:1"]));
        assert_eq!((gate.version, gate.since), (8, 8));
        let gate = gate.follow(&told(2, &["tcp:1"]));
        assert_eq!((gate.version, gate.since), (2, 2), "of another leader");
    }
}
