//! Measures how long a node takes to put tables of 1,000 services with 10 backends each into effect.
//!
//! `make bench SCENARIO=rules` runs it in a network namespace of its own (`unshare --net --mount`), which it
//! needs, and reads what it prints: one sample a line, the figure's name and seconds. The argument is
//! the number of rounds.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use skep_common::{NetworkId, ServiceId, TaskId};
use skep_runtime::clock;
use skep_worker::net::secure::Keyring;
use skep_worker::net::{Attachment, Mesh, NetworkOptions, Networks, Options};
use skep_worker_core::mesh::{Backend, MeshTable, Peer, Protocol, PublishedPort};
use skep_worker_core::network::{EndpointEntry, NetworkTable, NetworkTables, ServiceEntry};
use tokio::sync::watch;

const N_SERVICES: u16 = 1_000;
const N_BACKENDS: u16 = 10;
/// Backends of a service are on as many nodes; this one is the first.
const SELF: u16 = 1;
/// How often one backend changes in each round.
const N_CHANGES: u16 = 5;
const FIRST_PORT: u16 = 10_000;
const UNDERLAY: [u8; 3] = [10, 98, 0];
const INTERFACE: &str = "eth0";
const NETWORK: NetworkId = NetworkId(1);
/// The task of the container that this node has.
const OWN_TASK: TaskId = TaskId(1 << 32);

fn main() -> Result<()> {
    let n_rounds: u16 = std::env::args().nth(1).context("which number of rounds?")?.parse()?;
    // Two lines of headings, and one for the loopback that every namespace begins with.
    let n_lines = std::fs::read_to_string("/proc/self/net/dev")?.lines().count();
    ensure!(n_lines == 3, "this changes the network: run it with `unshare --net --mount`");
    // A published port takes four file descriptors.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    ip("link set lo up")?;
    ip(&format!("link add {INTERFACE} type veth peer name cable"))?;
    ip("link set cable up")?;
    ip(&format!("address add {}/24 dev {INTERFACE}", underlay(SELF)))?;
    ip(&format!("link set {INTERFACE} up"))?;
    let dir = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        measure_ports(dir.path(), n_rounds).await?;
        measure_addresses(dir.path(), n_rounds).await
    })
}

fn print(figure: &str, since: Instant) {
    println!("{figure} {:.6}", since.elapsed().as_secs_f64());
}

fn ip(arguments: &str) -> Result<()> {
    let status = Command::new("ip").args(arguments.split(' ')).status()?;
    ensure!(status.success(), "failed: ip {arguments}");
    Ok(())
}

fn underlay(number: u16) -> Ipv4Addr {
    let [a, b, c] = UNDERLAY;
    Ipv4Addr::new(a, b, c, u8::try_from(number).expect("few nodes"))
}

/// Published ports, in the mesh of this node.
async fn measure_ports(dir: &Path, n_rounds: u16) -> Result<()> {
    let mesh = Mesh::start(Options::new(SELF, underlay(SELF), INTERFACE, dir)).await?;
    for round in 0..n_rounds {
        // Listeners of ports that are published no longer end a moment later: each round has its own.
        let first_port = FIRST_PORT + round * N_SERVICES;
        mesh.apply(&mesh_table(first_port, 0)?).await?;
        let mut table = mesh_table(first_port, N_SERVICES)?;
        let since = clock::monotonic();
        let applied = mesh.apply(&table).await?;
        print("ports-all", since);
        ensure!(applied.conditions.is_empty(), "not published: {:?}", applied.conditions);
        for number in 0..N_CHANGES {
            let port = &mut table.ports[usize::from(number * 150)];
            let backend = port.backends.pop().context("a port has backends")?;
            for is_back in [false, true] {
                if is_back {
                    table.ports[usize::from(number * 150)].backends.push(backend.clone());
                }
                let since = clock::monotonic();
                mesh.apply(&table).await?;
                print("ports-one", since);
            }
        }
        let since = clock::monotonic();
        mesh.apply(&table).await?;
        print("ports-again", since);
    }
    mesh.teardown().await?;
    Ok(())
}

fn mesh_table(first_port: u16, n_ports: u16) -> Result<MeshTable> {
    let peers = (1..=N_BACKENDS).map(|number| Peer { number, underlay: underlay(number) });
    let mut table = MeshTable {
        version: 1,
        self_number: SELF,
        pool: MeshTable::default_pool(),
        slice_prefix: MeshTable::default_slice_prefix(),
        peers: peers.collect(),
        ipv6: BTreeMap::new(),
        daemons: BTreeMap::new(),
        ports: Vec::new(),
    };
    let slices = table.slices()?;
    for service in 0..n_ports {
        let backend = |node: u16| Backend {
            task_id: format!("task-{service}-{node}"),
            address: add(slices.slice(node).network(), 1 + u32::from(service)),
            target_port: 80,
        };
        table.ports.push(PublishedPort {
            published: first_port + service,
            protocol: Protocol::Tcp,
            service_id: format!("service-{service}"),
            service: format!("service-{service}"),
            proxy_protocol: None,
            backends: (1..=N_BACKENDS).map(backend).collect(),
        });
    }
    Ok(table)
}

fn add(address: Ipv4Addr, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(address) + number)
}

/// Virtual addresses, in the one container of this node.
async fn measure_addresses(dir: &Path, n_rounds: u16) -> Result<()> {
    let options = NetworkOptions {
        underlay: underlay(SELF),
        interface: INTERFACE.to_owned(),
        run_dir: dir.to_owned(),
        vxlan_port: 4789,
        keyring: Arc::new(Keyring::open(dir)?),
    };
    let (sender, receiver) = watch::channel(Arc::new(network_tables(network(0))));
    let networks = Networks::start(options, receiver, BTreeMap::new()).await?;
    networks.apply().await?;
    let mut container = Container::start()?;
    let attachment = Attachment {
        network_id: NETWORK,
        interface: INTERFACE.to_owned(),
        address: format!("{}/16", own_address()).parse()?,
        ipv6: None,
    };
    networks.attach(OWN_TASK, container.0.id(), vec![attachment]).await?;
    let apply = async |figure: Option<&str>, tables: NetworkTables| {
        let tables = Arc::new(tables);
        let since = clock::monotonic();
        sender.send_replace(tables);
        networks.apply().await?;
        figure.inspect(|figure| print(figure, since));
        anyhow::Ok(())
    };
    for _ in 0..n_rounds {
        apply(None, network_tables(network(0))).await?;
        let mut all = network(N_SERVICES);
        apply(Some("addresses-all"), network_tables(all.clone())).await?;
        for number in 0..u128::from(N_CHANGES) {
            for is_serving in [false, true] {
                let endpoint = all.endpoints.get_mut(&TaskId(number * 1_500));
                endpoint.context("an endpoint")?.serving = is_serving;
                apply(Some("addresses-one"), network_tables(all.clone())).await?;
            }
        }
        let since = clock::monotonic();
        networks.apply().await?;
        print("addresses-again", since);
    }
    networks.detach(OWN_TASK).await?;
    networks.teardown().await?;
    container.end()
}

fn network_tables(network: NetworkTable) -> NetworkTables {
    NetworkTables {
        version: 1,
        self_number: SELF,
        peers: (1..=N_BACKENDS).map(|number| (number, underlay(number))).collect(),
        keys: BTreeMap::new(),
        networks: BTreeMap::from([(NETWORK, Arc::new(network))]),
    }
}

fn own_address() -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 255, 1)
}

/// A network with as many services beside the container's own.
fn network(n_services: u16) -> NetworkTable {
    let endpoint = |service_id, address: Ipv4Addr, node_number| EndpointEntry {
        service_id,
        name: format!("web.{address}"),
        hostname: None,
        addresses: vec![address.into()],
        node_number,
        serving: true,
    };
    let own_service = ServiceId(u128::from(N_SERVICES));
    let own = (OWN_TASK, endpoint(own_service, own_address(), SELF));
    let mut network = NetworkTable {
        name: "bench".to_owned(),
        vni: 0x5000,
        subnets: vec!["10.0.0.0/16".parse().expect("a subnet")],
        endpoints: BTreeMap::from([own]),
        ..NetworkTable::default()
    };
    for service in 0..n_services {
        let service_id = ServiceId(u128::from(service));
        let vip: IpAddr = add(Ipv4Addr::new(10, 0, 128, 0), u32::from(service)).into();
        let (name, virtual_ips) = (format!("service-{service}"), vec![vip]);
        network
            .services
            .insert(service_id, ServiceEntry { name, virtual_ips, ..Default::default() });
        for backend in 0..N_BACKENDS {
            let number = u32::from(service * N_BACKENDS + backend);
            let address = add(Ipv4Addr::new(10, 0, 1, 0), number);
            let task_id = TaskId(number.into());
            network.endpoints.insert(task_id, endpoint(service_id, address, 1 + backend));
        }
    }
    network
}

/// A process in a network namespace of its own; it ends with this one, which has its standard input.
struct Container(Child);

impl Container {
    fn start() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo ready; exec cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("a pipe was asked for")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line == "ready\n", "the container did not start");
        Ok(Self(child))
    }

    fn end(&mut self) -> Result<()> {
        drop(self.0.stdin.take());
        self.0.wait()?;
        Ok(())
    }
}
