//! A lab of network namespaces: a switch, nodes, tasks and an outside client.
//!
//! Nothing of it is in the host's namespace, and everything ends with the helper processes, which
//! end when this test does.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;
use skep_worker_core::mesh::{Backend, MeshTable, Peer, Protocol, PublishedPort, Slices};

use crate::helper::Request;
use crate::machine::Machine;

pub(crate) const N: u16 = 3;
pub(crate) const TARGET_PORT: u16 = 80;
const CLIENT_HOST: u8 = 9;
/// How long a loaded machine may take for something that is sure to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// A recording of changes in a namespace.
pub(crate) struct Recorder {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Machine {
    /// The answers of `count` connections.
    #[track_caller]
    pub(crate) fn get(&mut self, address: SocketAddrV4, count: usize) -> Vec<String> {
        let answers = self.ask(&Request::Get { address, count });
        serde_json::from_value(answers).expect("texts")
    }

    #[track_caller]
    pub(crate) fn open(&mut self, id: &str, address: SocketAddrV4) {
        self.ask(&Request::Open { id: id.into(), address, local: None });
    }

    #[track_caller]
    pub(crate) fn use_connection(&mut self, id: &str, path: &str) -> String {
        let answer = self.ask(&Request::Use { id: id.into(), path: path.into() });
        answer.as_str().expect("a text").to_owned()
    }

    /// The answers of `count` sockets that send one datagram each.
    #[track_caller]
    pub(crate) fn get_udp(&mut self, address: SocketAddr, count: usize) -> Vec<String> {
        let answers = self.ask(&Request::GetUdp { address, count });
        serde_json::from_value(answers).expect("texts")
    }

    /// The answer to one more datagram of a socket that sends from one port.
    #[track_caller]
    pub(crate) fn use_udp(&mut self, id: &str) -> String {
        let answer = self.ask(&Request::UseUdp { id: id.into() });
        answer.as_str().expect("a text").to_owned()
    }

    #[track_caller]
    pub(crate) fn open_udp(&mut self, id: &str, address: SocketAddr) {
        self.ask(&Request::OpenUdp { id: id.into(), address, local: None });
    }

    /// The answers of `count` connections to an address of either IP version.
    #[track_caller]
    pub(crate) fn get_any(&mut self, address: SocketAddr, count: usize) -> Vec<String> {
        let answers = self.ask(&Request::GetAny { address, count });
        serde_json::from_value(answers).expect("texts")
    }

    /// Packets that came in by an interface.
    #[track_caller]
    pub(crate) fn received(&self, interface: &str) -> u64 {
        let links = self.ip(&format!("-s -j link show {interface}"));
        let links: Value = serde_json::from_str(&links).expect("JSON");
        links[0]["stats64"]["rx"]["packets"].as_u64().expect("a count")
    }

    /// Starts to record changes of links, addresses, routes, rules and neighbours.
    pub(crate) fn record_changes(&self) -> Recorder {
        let mut command = Command::new("nsenter");
        command.arg(self.namespace()).args("ip monitor all".split(' ')).stdout(Stdio::piped());
        let mut child = command.spawn().expect("ip monitor");
        let stdout = child.stdout.take().expect("piped");
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(stdout).lines();
            lines.map_while(Result::ok).all(|line| sender.send(line).is_ok())
        });
        let recorder = Recorder { child, lines };
        // It listens as soon as it reports one of the changes that are made for it.
        while recorder.lines.recv_timeout(Duration::from_millis(20)).is_err() {
            self.ip("route replace blackhole 192.0.2.1 table 999");
            self.ip("route del blackhole 192.0.2.1 table 999");
        }
        recorder
    }

    /// The changes since the recording began.
    pub(crate) fn changes(&self, mut recorder: Recorder) -> Vec<String> {
        self.ip("route add blackhole 192.0.2.2 table 999");
        let mut changes = Vec::new();
        loop {
            let line = recorder.lines.recv_timeout(PATIENCE).expect("the last change");
            if line.contains("192.0.2.2") {
                break;
            }
            changes.push(line);
        }
        self.ip("route del blackhole 192.0.2.2 table 999");
        recorder.child.kill().expect("kill");
        recorder.child.wait().expect("wait");
        changes.retain(|line| !line.contains("192.0.2.1"));
        changes
    }
}

/// A node: its namespace, its daemon, and the task on it.
pub(crate) struct Node {
    pub(crate) host: Machine,
    pub(crate) daemon: Machine,
    pub(crate) task: Machine,
}

pub(crate) struct Lab {
    pub(crate) client: Machine,
    pub(crate) nodes: Vec<Node>,
    pub(crate) slices: Slices,
    pub(crate) version: u64,
    /// Of the ports that are published.
    pub(crate) protocol: Protocol,
    /// The nodes with IPv6.
    pub(crate) ipv6: BTreeMap<u16, BTreeSet<Ipv6Addr>>,
    /// The nodes that balance in user space.
    pub(crate) user_space: BTreeSet<u16>,
    switch: Machine,
    run_dir: tempfile::TempDir,
}

pub(crate) fn underlay(number: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 98, 0, u8::try_from(number).expect("a small number"))
}

pub(crate) fn underlay6(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 98, 0, 0, 0, 0, 0, number)
}

pub(crate) fn node_address6(number: u16, port: u16) -> SocketAddr {
    SocketAddr::new(underlay6(number).into(), port)
}

pub(crate) fn node_address(number: u16, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(underlay(number), port)
}

pub(crate) fn task_name(number: u16) -> String {
    format!("task{number:021}")
}

pub(crate) fn client_address() -> Ipv4Addr {
    underlay(u16::from(CLIENT_HOST))
}

impl Lab {
    /// Machines on one switch; meshes started, tasks attached and serving; no table applied.
    pub(crate) fn new() -> Self {
        let mut lab = Self::bare();
        for number in 1..=N {
            lab.start(number);
            lab.attach(number);
        }
        lab
    }

    /// Machines on one switch, and nothing of skep.
    pub(crate) fn bare() -> Self {
        let switch = Machine::new();
        switch.ip("link add br0 type bridge");
        switch.ip("link set br0 up");
        let client = Machine::new();
        plug(&switch, &client, CLIENT_HOST.into());
        let slices = Slices::new(MeshTable::default_pool(), 22).expect("the defaults");
        let nodes = (1..=N).map(|number| {
            let mut host = Machine::new();
            plug(&switch, &host, number);
            // As distributions have it: packets must come in where their answers would go out.
            let path = "/proc/sys/net/ipv4/conf/all/rp_filter".into();
            host.ask(&Request::Write { path, text: "1".into() });
            let (daemon, mut task) = (host.beside(), Machine::new());
            task.ask(&Request::Serve { name: number.to_string(), port: TARGET_PORT });
            Node { host, daemon, task }
        });
        let nodes = nodes.collect();
        let run_dir = tempfile::tempdir().expect("a directory");
        let protocol = Protocol::Tcp;
        let ipv6 = BTreeMap::new();
        let user_space = BTreeSet::new();
        Self { client, nodes, slices, version: 0, protocol, ipv6, user_space, switch, run_dir }
    }

    pub(crate) fn run_dir(&self, number: u16) -> String {
        self.run_dir.path().join(number.to_string()).display().to_string()
    }

    pub(crate) fn start_request(&self, number: u16) -> Request {
        Request::Start {
            number,
            underlay: underlay(number),
            run_dir: self.run_dir(number),
            pool: MeshTable::default_pool().to_string(),
            ipv6: self.ipv6.contains_key(&number),
            is_in_user_space: self.user_space.contains(&number),
        }
    }

    pub(crate) fn start(&mut self, number: u16) {
        let request = self.start_request(number);
        self.node(number).daemon.ask(&request);
    }

    pub(crate) fn attach(&mut self, number: u16) {
        let address = self.task_address(number);
        let node = self.node(number);
        let (task_id, pid) = (task_name(number), node.task.pid());
        node.daemon.ask(&Request::Attach { task_id, pid, address });
    }

    pub(crate) fn node(&mut self, number: u16) -> &mut Node {
        &mut self.nodes[usize::from(number) - 1]
    }

    pub(crate) fn task_address(&self, number: u16) -> Ipv4Addr {
        self.slices.task_addresses(number).next().expect("a slice has task addresses")
    }

    /// A new version of the table with all nodes; ports are pairs of port and backing nodes.
    pub(crate) fn table(&self, number: u16, ports: &[(u16, &[u16])]) -> MeshTable {
        let ports = ports.iter().map(|(published, nodes)| PublishedPort {
            published: *published,
            protocol: self.protocol,
            service_id: format!("service-{published}"),
            service: String::new(),
            proxy_protocol: None,
            backends: nodes.iter().map(|node| self.backend(*node)).collect(),
        });
        MeshTable {
            version: self.version,
            self_number: number,
            pool: MeshTable::default_pool(),
            slice_prefix: MeshTable::default_slice_prefix(),
            peers: (1..=N).map(|number| Peer { number, underlay: underlay(number) }).collect(),
            ipv6: self.ipv6.clone(),
            daemons: BTreeMap::new(),
            ports: ports.collect(),
        }
    }

    fn backend(&self, node: u16) -> Backend {
        let address = self.task_address(node);
        Backend { task_id: task_name(node), address, target_port: TARGET_PORT }
    }

    /// Applies the next version of the table on every node; returns all conditions.
    #[track_caller]
    pub(crate) fn publish(&mut self, ports: &[(u16, &[u16])]) -> Vec<String> {
        self.version += 1;
        let mut conditions = Vec::new();
        for number in 1..=N {
            let table = self.table(number, ports);
            let answer = self.node(number).daemon.ask(&Request::Apply(table));
            conditions.extend(serde_json::from_value::<Vec<String>>(answer).expect("texts"));
        }
        conditions
    }

    /// Applies a table without node 1 on the nodes that are left.
    pub(crate) fn publish_without_node_1(&mut self) {
        self.version += 1;
        for number in 2..=N {
            let mut table = self.table(number, &[(8080, &[2, 3])]);
            table.peers.retain(|peer| peer.number != 1);
            self.node(number).daemon.ask(&Request::Apply(table));
        }
    }

    /// Asserts that the clients' connections through a node take exact turns over all tasks.
    #[track_caller]
    pub(crate) fn assert_turns(&mut self, who: Client, through: SocketAddrV4) {
        let protocol = self.protocol;
        let count_of = 2 * usize::from(N);
        let client = self.client(who);
        let answers = match protocol {
            Protocol::Tcp => client.get(through, count_of),
            Protocol::Udp => client.get_udp(through.into(), count_of),
            Protocol::Sctp => panic!("clients of SCTP have tests of their own"),
        };
        let expect = (1..=N).map(|number| (number.to_string(), 2)).collect();
        assert_eq!(count(&answers), expect, "{who:?} through {through}: {answers:?}");
        if who == Client::Outside {
            let seen: BTreeSet<&str> = answers.iter().filter_map(|a| a.split(' ').nth(1)).collect();
            let own = client_address().to_string();
            assert_eq!(seen, BTreeSet::from([own.as_str()]), "addresses that tasks saw");
        }
    }

    pub(crate) fn client(&mut self, who: Client) -> &mut Machine {
        match who {
            Client::Outside => &mut self.client,
            Client::Node(number) => &mut self.node(number).host,
            Client::Task(number) => &mut self.node(number).task,
        }
    }

    /// Sets whether bridged packets go through iptables' hooks; false if the kernel has no such
    /// setting.
    pub(crate) fn set_bridge_netfilter(&mut self, is_on: bool) -> bool {
        let path = "/proc/sys/net/bridge/bridge-nf-call-iptables".to_owned();
        let text = u8::from(is_on).to_string();
        let machines = self.nodes.iter_mut().map(|node| &mut node.host);
        let mut machines = machines.chain([&mut self.switch]);
        machines.all(|machine| {
            let request = Request::Write { path: path.clone(), text: text.clone() };
            machine.try_ask(&request).is_ok()
        })
    }
}

/// Who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    Outside,
    Node(u16),
    Task(u16),
}

/// How many answers each task gave.
pub(crate) fn count(answers: &[String]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        let name = answer.split(' ').next().unwrap_or_default();
        *counts.entry(name.to_owned()).or_default() += 1;
    }
    counts
}

fn plug(switch: &Machine, machine: &Machine, number: u16) {
    let pid = machine.pid();
    switch.ip(&format!("link add p{number} type veth peer name eth0 netns {pid}"));
    switch.ip(&format!("link set p{number} master br0 up"));
    machine.ip("link set lo up");
    // An address of the link that is usable at once, instead of the kernel's own.
    machine.ip("link set eth0 addrgenmode none");
    machine.ip(&format!("addr add fe80::{number}/64 dev eth0 nodad"));
    machine.ip(&format!("addr add {}/24 dev eth0", underlay(number)));
    machine.ip("link set eth0 up");
    machine.ip(&format!("addr add {}/64 dev eth0 nodad", underlay6(number)));
}
