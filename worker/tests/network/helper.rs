//! What the machines of the lab do: daemons drive the networks of a node, containers serve and connect.
//!
//! Each reads one JSON request a line from stdin, and answers one line each.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::sys::socket as sys;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use skep_common::wireguard::WireguardKeys;
use skep_common::{NetworkId, ServiceId, TaskId};
use skep_runtime::clock;
use skep_worker::net::secure::Keyring;
use skep_worker::net::{Attachment, Mesh, NetworkOptions, Networks, Options};
use skep_worker_core::mesh::{MeshTable, Peer};
use skep_worker_core::network::{EndpointEntry, NetworkTable, NetworkTables, ServiceEntry};
use tokio::sync::watch;

use crate::capture::Capture;
use crate::machine::{ANSWER, HELPER};
use crate::storm::Storm;

const PATIENCE: Duration = Duration::from_secs(3);
pub(crate) const TCP_PORT: u16 = 80;
pub(crate) const UDP_PORT: u16 = 90;
pub(crate) const LARGE: usize = 1 << 20;

/// A network as a test writes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Network {
    pub(crate) id: u128,
    pub(crate) vni: u32,
    pub(crate) mtu: Option<u32>,
    pub(crate) encrypted: bool,
    pub(crate) subnets: Vec<IpNet>,
    pub(crate) vips: Vec<IpAddr>,
    /// Tasks of the one service.
    pub(crate) endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    pub(crate) task: u128,
    pub(crate) node: u16,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) serving: bool,
}

/// What a machine can be asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Start {
        number: u16,
        underlay: Ipv4Addr,
        run_dir: String,
        running: Vec<(u128, u32)>,
    },
    Apply {
        version: u64,
        number: u16,
        peers: BTreeMap<u16, Ipv4Addr>,
        keys: BTreeMap<u16, WireguardKeys>,
        networks: Vec<Network>,
    },
    Attach {
        task: u128,
        pid: u32,
        attachments: Vec<(u128, String, Ipv4Net, Option<Ipv6Net>)>,
    },
    /// Gives a container its uplink.
    Uplink {
        task: u128,
        pid: u32,
        interface: String,
        address: Ipv4Addr,
    },
    Detach {
        task: u128,
    },
    Teardown,
    /// Removes what another daemon left.
    Remove {
        run_dir: String,
    },
    /// Serves TCP and UDP on all addresses.
    Serve {
        name: String,
    },
    /// One connection each: the answers, or the kind of error.
    Get {
        address: SocketAddr,
        count: usize,
    },
    /// One datagram each, from a socket of its own.
    GetUdp {
        address: SocketAddr,
        count: usize,
    },
    /// A connection that is kept open, or a socket.
    Open {
        id: String,
        address: SocketAddr,
        is_udp: bool,
    },
    /// Sends the request for a connection, and does not wait for its answer.
    Begin {
        id: String,
        address: SocketAddrV4,
    },
    /// Has the kernel forget what withdrawn tasks did not answer.
    Settle,
    /// A question on it.
    Use {
        id: String,
        text: String,
    },
    /// Echo requests, each with another identifier: how many were answered.
    Ping {
        address: Ipv4Addr,
        count: u16,
    },
    /// Echo requests that came in.
    Echoes,
    /// Datagrams that came in.
    Datagrams,
    /// Begins to listen to every packet of the interface eth0.
    Capture,
    /// What was heard since the last time: how many packets by kind, of UDP by the lower port. Those with
    /// `clear` in them are called that.
    Captured {
        clear: String,
    },
    /// A step of the change to a new key, and the node's public keys after it.
    Rotate {
        step: Step,
    },
    /// Connections that are refused, one after the other, until its end.
    BeginStorm {
        address: SocketAddr,
    },
    /// What became of them.
    EndStorm,
    /// Holds a port of UDP as any other program would, or lets go of it.
    HoldUdp {
        address: Option<SocketAddr>,
    },
    /// Sends one datagram and waits for nothing.
    Send {
        to: SocketAddr,
        bytes: Vec<u8>,
    },
}

/// The steps of a change of keys.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Step {
    Begin,
    Switch,
    End,
}

#[derive(Default)]
struct State {
    capture: Option<Capture>,
    mesh: Option<Mesh>,
    networks: Option<Networks>,
    tables: Option<watch::Sender<Arc<NetworkTables>>>,
    keyring: Option<Arc<Keyring>>,
    streams: BTreeMap<String, TcpStream>,
    sockets: BTreeMap<String, UdpSocket>,
    datagrams: Arc<Mutex<usize>>,
    storm: Option<Storm>,
}

/// Runs the helper if this process is one.
pub(crate) fn run_if_asked() {
    if std::env::var_os(HELPER).is_none() {
        return;
    }
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().expect("runtime");
    let mut state = State::default();
    answer(Ok(json!("ready")));
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("stdin");
        let request: Request = serde_json::from_str(&line).expect("a request");
        answer(runtime.block_on(async { handle(&mut state, request).await }));
    }
    std::process::exit(0);
}

fn answer(result: Result<Value, String>) {
    let text = serde_json::to_string(&result).expect("an answer");
    let mut out = std::io::stdout().lock();
    // The harness may be in the middle of a line.
    writeln!(out, "\n{ANSWER}{text}").and_then(|()| out.flush()).expect("stdout");
}

fn text(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

async fn handle(state: &mut State, request: Request) -> Result<Value, String> {
    match request {
        Request::Start { number, underlay, run_dir, running } => {
            let options = Options::new(number, underlay, "eth0", &run_dir);
            let vxlan_port = options.vxlan_port;
            state.mesh = Some(Mesh::start(options).await.map_err(text)?);
            let interface = "eth0".to_owned();
            let keyring = Arc::new(Keyring::open(Path::new(&run_dir)).map_err(text)?);
            let run_dir = run_dir.into();
            let public = keyring.pairs().public();
            state.keyring = Some(Arc::clone(&keyring));
            let options = NetworkOptions { underlay, interface, run_dir, vxlan_port, keyring };
            let (tables, receiver) = watch::channel(Arc::default());
            let running = running.into_iter().map(|(task, pid)| (TaskId(task), pid)).collect();
            let networks = Networks::start(options, receiver, running).await.map_err(text)?;
            (state.networks, state.tables) = (Some(networks), Some(tables));
            return Ok(json!(public));
        }
        Request::Apply { version, number, peers, keys, networks } => {
            let mesh = mesh_table(version, number, &peers);
            state.mesh.as_ref().expect("started").apply(&mesh).await.map_err(text)?;
            let networks = networks.into_iter().map(table).collect();
            let tables = NetworkTables { version, self_number: number, peers, keys, networks };
            state.tables.as_ref().expect("started").send_replace(Arc::new(tables));
            let applied = state.networks.as_ref().expect("started").apply().await.map_err(text)?;
            return Ok(json!(applied.map(text)));
        }
        Request::Attach { task, pid, attachments } => {
            let attachments = attachments.into_iter().map(|(id, interface, address, ipv6)| {
                Attachment { network_id: NetworkId(id), interface, address, ipv6 }
            });
            let networks = state.networks.as_ref().expect("started");
            networks.attach(TaskId(task), pid, attachments.collect()).await.map_err(text)?;
        }
        Request::Uplink { task, pid, interface, address } => {
            let mesh = state.mesh.as_ref().expect("started");
            let task = TaskId(task).to_string();
            mesh.attach(&task, pid, &interface, address).await.map_err(text)?;
        }
        Request::Detach { task } => {
            state.networks.as_ref().expect("started").detach(TaskId(task)).await.map_err(text)?;
        }
        Request::Settle => {
            let settled = state.networks.as_ref().expect("started").settle().await;
            return Ok(json!(settled.map_err(text)?));
        }
        Request::Remove { run_dir } => {
            Networks::remove(run_dir.as_ref()).await.map_err(text)?;
            // It finds nothing the second time.
            Networks::remove(run_dir.as_ref()).await.map_err(text)?;
        }
        Request::Teardown => {
            state.networks.take().expect("started").teardown().await.map_err(text)?;
            state.mesh.take().expect("started").teardown().await.map_err(text)?;
        }
        Request::Rotate { step } => {
            let keyring = state.keyring.as_ref().expect("started");
            let done = match step {
                Step::Begin => keyring.begin_rotation(clock::now()),
                Step::Switch => keyring.switch(clock::now()),
                Step::End => keyring.end_rotation(),
            };
            done.map_err(text)?;
            return Ok(json!(keyring.pairs().public()));
        }
        other => return tokio::task::block_in_place(|| handle_socket(state, other)).map_err(text),
    }
    Ok(Value::Null)
}

fn mesh_table(version: u64, number: u16, peers: &BTreeMap<u16, Ipv4Addr>) -> MeshTable {
    MeshTable {
        version,
        self_number: number,
        pool: MeshTable::default_pool(),
        slice_prefix: MeshTable::default_slice_prefix(),
        peers: peers.iter().map(|(n, a)| Peer { number: *n, underlay: *a }).collect(),
        ipv6: BTreeMap::new(),
        daemons: BTreeMap::new(),
        ports: Vec::new(),
    }
}

fn table(network: Network) -> (NetworkId, Arc<NetworkTable>) {
    let service_id = ServiceId(network.id);
    let endpoints = network.endpoints.into_iter().map(|endpoint| {
        let entry = EndpointEntry {
            service_id,
            name: format!("web.{}", endpoint.task),
            hostname: None,
            addresses: endpoint.addresses,
            node_number: endpoint.node,
            serving: endpoint.serving,
        };
        (TaskId(endpoint.task), entry)
    });
    let service =
        ServiceEntry { name: "web".into(), virtual_ips: network.vips, ..ServiceEntry::default() };
    let table = NetworkTable {
        name: format!("network-{}", network.id),
        vni: network.vni,
        subnets: network.subnets,
        mtu: network.mtu,
        internal: false,
        encrypted: network.encrypted,
        endpoints: endpoints.collect(),
        services: BTreeMap::from([(service_id, service)]),
    };
    (NetworkId(network.id), Arc::new(table))
}

fn handle_socket(state: &mut State, request: Request) -> std::io::Result<Value> {
    let each = |count: usize, one: &dyn Fn() -> std::io::Result<String>| {
        let one = |_| one().unwrap_or_else(|error| format!("{:?}", error.kind()));
        json!((0..count).map(one).collect::<Vec<String>>())
    };
    match request {
        Request::Serve { name } => serve(&name, &state.datagrams)?,
        Request::Get { address, count } => {
            return Ok(each(count, &|| ask(&mut connect(address)?, "name")));
        }
        Request::GetUdp { address, count } => {
            return Ok(each(count, &|| ask_udp(&udp_to(address)?, "name")));
        }
        Request::Open { id, address, is_udp: true } => {
            state.sockets.insert(id, udp_to(address)?);
        }
        Request::Open { id, address, is_udp: false } => {
            state.streams.insert(id, connect(address)?);
        }
        Request::Begin { id, address } => {
            state.streams.insert(id, begin(address)?);
        }
        Request::Use { id, text } => {
            let answer = match state.streams.get_mut(&id) {
                Some(stream) => ask(stream, &text),
                None => ask_udp(&state.sockets[&id], &text),
            };
            return Ok(json!(answer.unwrap_or_else(|error| format!("{:?}", error.kind()))));
        }
        Request::Ping { address, count } => return Ok(json!(ping(address, count)?)),
        Request::Echoes => {
            let table = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
            let mut lines = table.lines().filter_map(|line| line.strip_prefix("Icmp: "));
            let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
            let mut pairs = names.split(' ').zip(values.split(' '));
            let value = pairs.find(|(name, _)| *name == "InEchos").expect("a counter").1;
            return Ok(json!(value.parse::<u64>().expect("a number")));
        }
        Request::Capture => state.capture = Some(Capture::start("eth0")?),
        Request::Captured { clear } => {
            let capture = state.capture.as_ref().expect("started");
            return Ok(json!(capture.counts(clear.as_bytes())?));
        }
        Request::Datagrams => return Ok(json!(*state.datagrams.lock().expect("counts"))),
        Request::HoldUdp { address } => {
            state.sockets.remove("held");
            if let Some(address) = address {
                state.sockets.insert("held".to_owned(), UdpSocket::bind(address)?);
            }
        }
        Request::BeginStorm { address } => state.storm = Some(Storm::begin(address)),
        Request::EndStorm => return Ok(json!(state.storm.take().expect("a storm").end())),
        Request::Send { to, bytes } => {
            UdpSocket::bind("0.0.0.0:0")?.send_to(&bytes, to)?;
        }
        other => panic!("not a request about sockets: {other:?}"),
    }
    Ok(Value::Null)
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// What is written to it waits for the answer.
fn begin(address: SocketAddrV4) -> std::io::Result<TcpStream> {
    let (inet, stream) = (sys::AddressFamily::Inet, sys::SockType::Stream);
    let socket = sys::socket(inet, stream, sys::SockFlag::SOCK_NONBLOCK, None)?;
    match sys::connect(socket.as_raw_fd(), &sys::SockaddrIn::from(address)) {
        Err(nix::Error::EINPROGRESS) => {}
        other => other?,
    }
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn udp_to(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// One line, one line in return.
fn ask(stream: &mut TcpStream, text: &str) -> std::io::Result<String> {
    writeln!(stream, "{text}")?;
    let mut line = String::new();
    let mut byte = [0];
    if text == "large" {
        let mut body = vec![0; LARGE];
        stream.read_exact(&mut body)?;
        return Ok(body.len().to_string());
    }
    loop {
        match stream.read(&mut byte)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            _ if byte == *b"\n" => return Ok(line),
            _ => line.push(char::from(byte[0])),
        }
    }
}

fn ask_udp(socket: &UdpSocket, text: &str) -> std::io::Result<String> {
    socket.send(text.as_bytes())?;
    let mut buffer = [0; 100];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Answers with the server's name and the client's address.
fn serve(name: &str, datagrams: &Arc<Mutex<usize>>) -> std::io::Result<()> {
    let listener = TcpListener::bind(("::", TCP_PORT))?;
    let socket = UdpSocket::bind(("::", UDP_PORT))?;
    let of_tcp = name.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, name) = (stream.expect("a connection"), of_tcp.clone());
            std::thread::spawn(move || serve_one(stream, &name));
        }
    });
    let (name, datagrams) = (name.to_owned(), Arc::clone(datagrams));
    std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            *datagrams.lock().expect("counts") += 1;
            // A forged sender may not exist.
            drop(socket.send_to(format!("{name} {}", from.ip().to_canonical()).as_bytes(), from));
        }
    });
    Ok(())
}

fn serve_one(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    let client = stream.peer_addr()?.ip().to_canonical();
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        match line.trim() {
            "large" => stream.write_all(&vec![b'x'; LARGE])?,
            _ => writeln!(stream, "{name} {client}")?,
        }
    }
}

/// How many of `count` echo requests were answered.
fn ping(address: Ipv4Addr, count: u16) -> std::io::Result<u16> {
    // Whoever may open raw sockets may also make plain ones for this.
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0")?;
    let mut answered = 0;
    for _ in 0..count {
        let icmp = Some(sys::SockProtocol::Icmp);
        let flags = sys::SockFlag::SOCK_CLOEXEC;
        let socket: OwnedFd =
            sys::socket(sys::AddressFamily::Inet, sys::SockType::Datagram, flags, icmp)?;
        let patience = nix::sys::time::TimeVal::new(3, 0);
        sys::setsockopt(&socket, sys::sockopt::ReceiveTimeout, &patience)?;
        let to = sys::SockaddrIn::from(std::net::SocketAddrV4::new(address, 0));
        sys::connect(socket.as_raw_fd(), &to)?;
        let request = [8, 0, 0, 0, 0, 0, 0, 1, b's', b'k', b'e', b'p'];
        if sys::send(socket.as_raw_fd(), &request, sys::MsgFlags::empty()).is_err() {
            continue;
        }
        let mut answer = [0; 64];
        answered +=
            u16::from(sys::recv(socket.as_raw_fd(), &mut answer, sys::MsgFlags::empty()).is_ok());
    }
    Ok(answered)
}
