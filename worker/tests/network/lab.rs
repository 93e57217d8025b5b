//! A lab of network namespaces: a switch, nodes, containers on networks, and an outside machine.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};
use serde_json::Value;
use skep_common::wireguard::WireguardKeys;

use crate::helper::{Endpoint, Network, Request, TCP_PORT, UDP_PORT};
use crate::machine::Machine;

pub(crate) const N: u16 = 3;
const OUTSIDE_HOST: u16 = 9;

/// A node: its namespace, and its daemon.
pub(crate) struct Node {
    pub(crate) host: Machine,
    pub(crate) daemon: Machine,
}

/// A container, and where it is.
pub(crate) struct Container {
    pub(crate) machine: Machine,
    node: u16,
}

pub(crate) struct Lab {
    pub(crate) nodes: Vec<Node>,
    pub(crate) outside: Machine,
    pub(crate) networks: BTreeMap<u128, Network>,
    containers: BTreeMap<u128, Container>,
    pub(crate) version: u64,
    /// Public keys of the nodes.
    pub(crate) keys: BTreeMap<u16, WireguardKeys>,
    _switch: Machine,
    run_dir: tempfile::TempDir,
}

pub(crate) fn underlay(number: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 98, 0, u8::try_from(number).expect("a small number"))
}

/// The address of a task on every network: 10.0.1.<task>.
pub(crate) fn address(task: u128) -> IpAddr {
    IpAddr::from([10, 0, 1, u8::try_from(task).expect("a small number")])
}

pub(crate) fn address6(task: u128) -> IpAddr {
    format!("fd00:1::{task}").parse().expect("an address")
}

/// The address of a task in a subnet, with its prefix: the task's number comes last.
fn in_subnet(subnet: IpNet, task: u128) -> IpNet {
    match subnet {
        IpNet::V4(subnet) => {
            let [a, b, c, _] = subnet.network().octets();
            let last = u8::try_from(task).expect("a small number");
            Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, last), subnet.prefix_len()).into()
        }
        IpNet::V6(subnet) => {
            let text = format!("{}{task}/{}", subnet.network(), subnet.prefix_len());
            text.parse().expect("an address")
        }
    }
}

pub(crate) const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 1, 2));

pub(crate) fn vip6() -> IpAddr {
    address6(2)
}

pub(crate) fn tcp(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, TCP_PORT)
}

pub(crate) fn udp(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, UDP_PORT)
}

impl Lab {
    /// Nodes on one switch, daemons started; no network, no container.
    pub(crate) fn new() -> Self {
        let switch = Machine::new();
        switch.ip("link add br0 type bridge");
        switch.ip("link set br0 up");
        let nodes = (1..=N).map(|number| {
            let host = Machine::new();
            plug(&switch, &host, number);
            let daemon = host.beside();
            Node { host, daemon }
        });
        let nodes = nodes.collect();
        let outside = Machine::new();
        plug(&switch, &outside, OUTSIDE_HOST);
        let mut lab = Self {
            nodes,
            outside,
            networks: BTreeMap::new(),
            containers: BTreeMap::new(),
            version: 0,
            keys: BTreeMap::new(),
            _switch: switch,
            run_dir: tempfile::tempdir().expect("a directory"),
        };
        for number in 1..=N {
            lab.start(number);
        }
        lab
    }

    pub(crate) fn run_dir(&self, number: u16) -> String {
        self.run_dir.path().join(number.to_string()).display().to_string()
    }

    /// Starts the node's networks, which finds the containers that run there.
    pub(crate) fn start(&mut self, number: u16) {
        let here = self.containers.iter().filter(|(_, container)| container.node == number);
        let running = here.map(|(task, container)| (*task, container.machine.pid())).collect();
        let run_dir = self.run_dir(number);
        let request = Request::Start { number, underlay: underlay(number), run_dir, running };
        let keys = self.node(number).daemon.ask(&request);
        self.keys.insert(number, serde_json::from_value(keys).expect("keys"));
    }

    /// Ends the node's daemon as a crash would; another is at hand, which is not started.
    pub(crate) fn kill(&mut self, number: u16) {
        let daemon = self.node(number).host.beside();
        std::mem::replace(&mut self.node(number).daemon, daemon).kill();
    }

    pub(crate) fn node(&mut self, number: u16) -> &mut Node {
        &mut self.nodes[usize::from(number) - 1]
    }

    /// The container of a task.
    pub(crate) fn task(&mut self, task: u128) -> &mut Machine {
        &mut self.containers.get_mut(&task).expect("a container").machine
    }

    /// A network with 10.0.1.0/24, and the virtual address of its service.
    pub(crate) fn add_network(&mut self, id: u128) -> &mut Network {
        let vni = 0x5000 + u32::try_from(id).expect("a small number");
        let subnets =
            vec!["10.0.1.0/24".parse().expect("CIDR"), "fd00:1::/64".parse().expect("CIDR")];
        let (vips, endpoints) = (vec![VIP, vip6()], Vec::new());
        let (mtu, encrypted) = (None, false);
        let network = Network { id, vni, mtu, encrypted, subnets, vips, endpoints };
        self.networks.entry(id).or_insert(network)
    }

    /// A task on a node and on a network, in the tables of all nodes, connected and serving.
    pub(crate) fn add_task(&mut self, network: u128, task: u128, node: u16) {
        self.place(network, task, node);
        self.apply();
        self.connect(&[network], task, node).expect("connected");
        self.task(task).ask(&Request::Serve { name: task.to_string() });
        self.endpoint(network, task).serving = true;
        self.apply();
    }

    /// Names a task in the table of a network.
    pub(crate) fn place(&mut self, network: u128, task: u128, node: u16) {
        let network = self.networks.get_mut(&network).expect("a network");
        let addresses = network.subnets.iter().map(|subnet| in_subnet(*subnet, task).addr());
        let addresses = addresses.collect();
        network.endpoints.push(Endpoint { task, node, addresses, serving: false });
    }

    /// Makes the container of a task and connects it.
    pub(crate) fn connect(
        &mut self,
        networks: &[u128],
        task: u128,
        node: u16,
    ) -> Result<Value, String> {
        let machine = Machine::new();
        let pid = machine.pid();
        let attachments = networks.iter().enumerate().map(|(n, network)| {
            let default =
                ["10.0.1.0/24", "fd00:1::/64"].map(|subnet| subnet.parse().expect("CIDR"));
            let subnets =
                self.networks.get(network).map_or(default.to_vec(), |n| n.subnets.clone());
            let (mut ipv4, mut ipv6) = (None, None);
            for subnet in subnets {
                match in_subnet(subnet, task) {
                    IpNet::V4(address) => ipv4 = Some(address),
                    IpNet::V6(address) => ipv6 = Some(address),
                }
            }
            (*network, format!("eth{n}"), ipv4.expect("IPv4"), ipv6)
        });
        let attachments = attachments.collect();
        self.containers.insert(task, Container { machine, node });
        self.node(node).daemon.try_ask(&Request::Attach { task, pid, attachments })
    }

    pub(crate) fn endpoint(&mut self, network: u128, task: u128) -> &mut Endpoint {
        let network = self.networks.get_mut(&network).expect("a network");
        network.endpoints.iter_mut().find(|one| one.task == task).expect("an endpoint")
    }

    pub(crate) fn remove_endpoint(&mut self, network: u128, task: u128) {
        let network = self.networks.get_mut(&network).expect("a network");
        network.endpoints.retain(|endpoint| endpoint.task != task);
    }

    /// Applies the tables on every node.
    #[track_caller]
    pub(crate) fn apply(&mut self) {
        self.version += 1;
        for number in 1..=N {
            self.apply_on(number);
        }
    }

    #[track_caller]
    pub(crate) fn apply_on(&mut self, number: u16) -> Value {
        let request = Request::Apply {
            version: self.version,
            number,
            peers: (1..=N).map(|number| (number, underlay(number))).collect(),
            keys: self.keys.clone(),
            networks: self.networks.values().cloned().collect(),
        };
        self.node(number).daemon.ask(&request)
    }

    /// What a task's connections are answered: which task, each time.
    #[track_caller]
    pub(crate) fn get(&mut self, task: u128, request: &Request) -> Vec<String> {
        let answers = self.task(task).ask(request);
        let answers: Vec<String> = serde_json::from_value(answers).expect("texts");
        answers.into_iter().map(|a| a.split(' ').next().unwrap_or_default().to_owned()).collect()
    }
}

fn plug(switch: &Machine, machine: &Machine, number: u16) {
    let pid = machine.pid();
    switch.ip(&format!("link add p{number} type veth peer name eth0 netns {pid}"));
    switch.ip(&format!("link set p{number} master br0 up"));
    machine.ip("link set lo up");
    machine.ip(&format!("addr add {}/24 dev eth0", underlay(number)));
    machine.ip("link set eth0 up");
}
