//! The process behind each machine of the lab: this test binary, executed again.
//!
//! It is in its network namespace from the start, reads one JSON request a line from stdin and
//! answers one line each. It ends when stdin does, that is, also when the test is killed; a
//! namespace made for it goes with it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::socket as sys;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use skep_worker::embedded::uplink::Uplink;
use skep_worker::net::nft::{Batch, Family, Hook, NftChannel};
use skep_worker::net::{MarkField, Mesh, Options};
use skep_worker_core::mesh::MeshTable;

use crate::associations;
use crate::ejection::Sent;
use crate::machine::{ANSWER, HELPER};
use crate::storm::Storm;

const PATIENCE: Duration = Duration::from_secs(3);
pub(crate) const LARGE: usize = 1 << 20;

/// What a helper can be asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Start {
        number: u16,
        underlay: Ipv4Addr,
        run_dir: String,
        pool: String,
        ipv6: bool,
        is_in_user_space: bool,
    },
    Apply(MeshTable),
    /// Has the kernel forget what withdrawn tasks did not answer.
    Settle,
    Attach {
        task_id: String,
        pid: u32,
        address: Ipv4Addr,
    },
    /// As the next daemon does with a container that it finds.
    Renew {
        task_id: String,
        pid: u32,
    },
    Detach {
        task_id: String,
    },
    Teardown,
    /// As the next daemon does that is told to leave before it has started a mesh.
    Remove {
        run_dir: String,
    },
    /// The same on a kernel without nftables, and of networks too.
    LeaveWithoutNftables {
        run_dir: String,
    },
    /// Serves HTTP on a port of all addresses, and answers datagrams on the same.
    Serve {
        name: String,
        port: u16,
    },
    /// Stops to accept on a port: clients are refused.
    Refuse {
        port: u16,
    },
    /// Accepts there again.
    Accept {
        name: String,
        port: u16,
    },
    /// So many requests, one each so many milliseconds, whatever becomes of those before. Returns when
    /// some were sent.
    StartStream {
        address: SocketAddr,
        count: u32,
        every_ms: u64,
    },
    /// What became of them.
    EndStream,
    /// Connections that are refused, one after the other, until its end.
    BeginStorm {
        address: SocketAddr,
    },
    /// What became of them.
    EndStorm,
    /// Holds a port as any other program would.
    Listen {
        port: u16,
    },
    /// The same of UDP.
    ListenUdp {
        port: u16,
    },
    /// One datagram each, from a socket of its own: the answers, or the kind of error.
    GetUdp {
        address: SocketAddr,
        count: usize,
    },
    /// A socket that sends from one port all the time.
    OpenUdp {
        id: String,
        address: SocketAddr,
        local: Option<SocketAddr>,
    },
    /// A datagram from it: the answer, or the kind of error.
    UseUdp {
        id: String,
    },
    /// One connection each: the answers, or the kind of error.
    Get {
        address: SocketAddrV4,
        count: usize,
    },
    /// The same to an address of either IP version.
    GetAny {
        address: SocketAddr,
        count: usize,
    },
    /// One connection from a given local port, kept open.
    Open {
        id: String,
        address: SocketAddrV4,
        local: Option<SocketAddrV4>,
    },
    /// A request on a connection that is open.
    Use {
        id: String,
        path: String,
    },
    Close {
        id: String,
    },
    /// Answers each INIT of SCTP with an INIT ACK.
    ServeAssociations {
        number: u32,
    },
    /// An INIT from each of so many ports: what the INIT ACKs say, or the kind of error.
    Associate {
        address: SocketAddrV4,
        count: usize,
    },
    Write {
        path: String,
        text: String,
    },
    /// Chains of the nftables, as `table chain`.
    Chains,
    /// Those of IPv6.
    ChainsOfIpv6,
    /// The generation of the nftables: how often anyone changed any rule.
    Generation,
    /// A chain such as iptables-nft makes, with the policy to drop what is forwarded.
    DropForwarded,
    /// The same of IPv6.
    DropForwardedIpv6,
    /// Says on its network that it is a router of IPv6.
    Advertise {
        interface: u32,
    },
    /// The length of a large answer.
    GetLarge {
        address: SocketAddr,
    },
    /// Deletes one rule, or one table.
    Damage {
        table: String,
        chain: Option<String>,
    },
}

#[derive(Default)]
struct State {
    mesh: Option<Mesh>,
    connections: BTreeMap<String, TcpStream>,
    listeners: Vec<TcpListener>,
    servers: BTreeMap<u16, TcpListener>,
    stream: Option<JoinHandle<Vec<Sent>>>,
    storm: Option<Storm>,
    sockets: BTreeMap<String, UdpSocket>,
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

/// The kernel answers this thread, and those that it starts, as one without nfnetlink.
fn leave_without_nftables(run_dir: &Path) -> Result<(), SeccompError> {
    let mut filter = ScmpFilterContext::new(ScmpAction::Allow)?;
    let refuse = ScmpAction::Errno(libc::EPROTONOSUPPORT);
    let of = |argument, value: i32| {
        ScmpArgCompare::new(argument, ScmpCompareOp::Equal, u64::from(value.cast_unsigned()))
    };
    let netfilter = [of(0, libc::AF_NETLINK), of(2, libc::NETLINK_NETFILTER)];
    filter.add_rule_conditional(refuse, ScmpSyscall::from_name("socket")?, &netfilter)?;
    filter.load()?;
    NftChannel::open().expect_err("there is no nftables");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("runtime").block_on(Uplink::remove(run_dir));
    Ok(())
}

async fn handle(state: &mut State, request: Request) -> Result<Value, String> {
    match request {
        Request::Start { number, underlay, run_dir, pool, ipv6, is_in_user_space } => {
            let mut options = Options::new(number, underlay, "eth0", run_dir);
            options.pool = pool.parse().expect("a pool");
            options.ipv6 = ipv6;
            options.is_in_user_space = is_in_user_space;
            // A field of marks is the node's own affair: another one on each.
            options.marks = MarkField::at(10 * (u32::from(number) - 1)).map_err(text)?;
            if let Some(mesh) = state.mesh.take() {
                mesh.shutdown().await.map_err(text)?;
            }
            state.mesh = Some(Mesh::start(options).await.map_err(text)?);
            Ok(Value::Null)
        }
        Request::Apply(table) => {
            let mesh = state.mesh.as_ref().expect("started");
            let applied = mesh.apply(&table).await.map_err(text)?;
            assert_eq!(applied.version, table.version);
            Ok(json!(applied.conditions.iter().map(ToString::to_string).collect::<Vec<_>>()))
        }
        Request::Settle => {
            Ok(json!(state.mesh.as_ref().expect("started").settle().await.map_err(text)?))
        }
        Request::Attach { task_id, pid, address } => {
            let mesh = state.mesh.as_ref().expect("started");
            mesh.attach(&task_id, pid, "eth0", address).await.map_err(text)?;
            Ok(Value::Null)
        }
        Request::Renew { task_id, pid } => {
            let mesh = state.mesh.as_ref().expect("started");
            mesh.renew(&task_id, pid).await.map_err(text)?;
            Ok(Value::Null)
        }
        Request::Detach { task_id } => {
            state.mesh.as_ref().expect("started").detach(&task_id).await.map_err(text)?;
            Ok(Value::Null)
        }
        Request::Teardown => {
            state.mesh.take().expect("started").teardown().await.map_err(text)?;
            Ok(Value::Null)
        }
        Request::Remove { run_dir } => {
            Mesh::remove(run_dir.as_ref()).await.map_err(text)?;
            Ok(Value::Null)
        }
        Request::LeaveWithoutNftables { run_dir } => {
            let leave = std::thread::spawn(move || leave_without_nftables(run_dir.as_ref()));
            leave.join().expect("no panic").map_err(text)?;
            Ok(Value::Null)
        }
        other => tokio::task::block_in_place(|| handle_datagrams(state, other)),
    }
}

fn handle_datagrams(state: &mut State, request: Request) -> Result<Value, String> {
    match request {
        Request::ListenUdp { port } => {
            let socket = UdpSocket::bind(("0.0.0.0", port)).map_err(text)?;
            state.sockets.insert(format!("listen-{port}"), socket);
            Ok(Value::Null)
        }
        Request::GetUdp { address, count } => {
            let one = |_| udp_to(address, None).and_then(|socket| ask_udp(&socket));
            Ok(json!((0..count).map(one).map(or_kind).collect::<Vec<String>>()))
        }
        Request::OpenUdp { id, address, local } => {
            state.sockets.insert(id, udp_to(address, local).map_err(text)?);
            Ok(Value::Null)
        }
        Request::UseUdp { id } => Ok(json!(or_kind(ask_udp(&state.sockets[&id])))),
        Request::GetAny { address, count } => {
            let one = |_| get(&connect_any(address)?, "/");
            Ok(json!((0..count).map(one).map(or_kind).collect::<Vec<String>>()))
        }
        Request::Advertise { interface } => {
            advertise(interface).map_err(text)?;
            Ok(Value::Null)
        }
        Request::GetLarge { address } => {
            let body = connect_any(address).and_then(|stream| get(&stream, "/large"));
            Ok(json!(body.map_err(text)?.len()))
        }
        Request::ServeAssociations { number } => {
            let socket = associations::socket().map_err(text)?;
            std::thread::spawn(move || associations::serve(&socket, number));
            Ok(Value::Null)
        }
        Request::Associate { address, count } => {
            let one = |_| or_kind(associations::ask(address));
            Ok(json!((0..count).map(one).collect::<Vec<String>>()))
        }
        other => handle_socket(state, other),
    }
}

fn handle_socket(state: &mut State, request: Request) -> Result<Value, String> {
    match request {
        Request::Serve { name, port } => {
            let socket = UdpSocket::bind(("::", port)).map_err(text)?;
            let of_datagrams = name.clone();
            std::thread::spawn(move || serve_datagrams(&socket, &of_datagrams));
            accept(state, name, port)
        }
        Request::Accept { name, port } => accept(state, name, port),
        Request::Refuse { port } => {
            let listener = state.servers.remove(&port).expect("a server");
            sys::shutdown(listener.as_raw_fd(), sys::Shutdown::Both).map_err(text)?;
            Ok(Value::Null)
        }
        Request::StartStream { address, count, every_ms } => {
            let (sender, is_flowing) = mpsc::channel();
            let every = Duration::from_millis(every_ms);
            let run = move || stream(address, count, every, &sender);
            state.stream = Some(std::thread::spawn(run));
            is_flowing.recv().expect("a stream");
            Ok(Value::Null)
        }
        Request::EndStream => {
            let stream = state.stream.take().expect("a stream");
            Ok(json!(stream.join().expect("what became of each")))
        }
        Request::BeginStorm { address } => {
            state.storm = Some(Storm::begin(address));
            Ok(Value::Null)
        }
        Request::EndStorm => Ok(json!(state.storm.take().expect("a storm").end())),
        Request::Listen { port } => {
            state.listeners.push(TcpListener::bind(("0.0.0.0", port)).map_err(text)?);
            Ok(Value::Null)
        }
        Request::Get { address, count } => {
            let one = |_| match connect(address, None).and_then(|s| get(&s, "/")) {
                Ok(body) => body,
                Err(error) => format!("{:?}", error.kind()),
            };
            Ok(json!((0..count).map(one).collect::<Vec<String>>()))
        }
        Request::Open { id, address, local } => {
            let stream = connect(address, local).map_err(text)?;
            state.connections.insert(id, stream);
            Ok(Value::Null)
        }
        Request::Use { id, path } => {
            let stream = state.connections.get(&id).expect("an open connection");
            Ok(json!(get(stream, &path).map_err(text)?))
        }
        Request::Close { id } => {
            let stream = state.connections.remove(&id).expect("an open connection");
            // With a reset, so that the same local port can be used at once again.
            let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            sys::setsockopt(&stream, sys::sockopt::Linger, &linger).map_err(text)?;
            Ok(Value::Null)
        }
        Request::Write { path, text: value } => {
            std::fs::write(path, value).map_err(text)?;
            Ok(Value::Null)
        }
        other => handle_rules(other),
    }
}

fn handle_rules(request: Request) -> Result<Value, String> {
    match request {
        Request::Chains => chains(Family::Ipv4),
        Request::ChainsOfIpv6 => chains(Family::Ipv6),
        Request::Generation => {
            Ok(json!(NftChannel::open().map_err(text)?.generation().map_err(text)?))
        }
        Request::DropForwarded => drop_forwarded(Family::Ipv4),
        Request::DropForwardedIpv6 => drop_forwarded(Family::Ipv6),
        Request::Damage { table, chain } => {
            let mut batch = Batch::new();
            match chain {
                Some(chain) => batch.flush_chain(&table, &chain),
                None => batch.delete_table(&table),
            }
            commit(&batch)
        }
        other => panic!("not a request about sockets or rules: {other:?}"),
    }
}

fn chains(family: Family) -> Result<Value, String> {
    let chains = NftChannel::open_of(family).map_err(text)?.chains().map_err(text)?;
    let names = chains.iter().map(|chain| format!("{} {}", chain.table, chain.name));
    Ok(json!(names.collect::<Vec<_>>()))
}

fn drop_forwarded(family: Family) -> Result<Value, String> {
    let mut batch = Batch::of(family);
    batch.add_table("filter");
    let hook = Hook { kind: "filter", number: 2, priority: 0, drops_by_default: true };
    batch.add_chain("filter", "FORWARD", Some(&hook));
    commit(&batch)
}

fn commit(batch: &Batch) -> Result<Value, String> {
    NftChannel::open().map_err(text)?.commit(batch, None).map_err(text)?;
    Ok(Value::Null)
}

fn connect(address: SocketAddrV4, local: Option<SocketAddrV4>) -> std::io::Result<TcpStream> {
    let stream = match local {
        None => TcpStream::connect_timeout(&SocketAddr::V4(address), PATIENCE)?,
        Some(local) => {
            let (inet, stream) = (sys::AddressFamily::Inet, sys::SockType::Stream);
            let none = sys::SockFlag::SOCK_CLOEXEC;
            let socket: OwnedFd = sys::socket(inet, stream, none, None)?;
            sys::setsockopt(&socket, sys::sockopt::ReuseAddr, &true)?;
            let patience = nix::sys::time::TimeVal::new(3, 0);
            sys::setsockopt(&socket, sys::sockopt::SendTimeout, &patience)?;
            sys::bind(socket.as_raw_fd(), &sys::SockaddrIn::from(local))?;
            sys::connect(socket.as_raw_fd(), &sys::SockaddrIn::from(address))?;
            TcpStream::from(socket)
        }
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A router advertisement (RFC 4861, section 4.2).
fn advertise(interface: u32) -> std::io::Result<()> {
    const ROUTER_ADVERTISEMENT: u8 = 134;
    const LIFETIME: [u8; 2] = 1800u16.to_be_bytes();
    let (family, raw) = (sys::AddressFamily::Inet6, sys::SockType::Raw);
    let icmp = Some(sys::SockProtocol::IcmpV6);
    let socket: OwnedFd = sys::socket(family, raw, sys::SockFlag::SOCK_CLOEXEC, icmp)?;
    sys::setsockopt(&socket, sys::sockopt::Ipv6MulticastHops, &255)?;
    let message =
        [ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0, LIFETIME[0], LIFETIME[1], 0, 0, 0, 0, 0, 0, 0, 0];
    let all_nodes = std::net::Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let to = std::net::SocketAddrV6::new(all_nodes, 0, 0, interface);
    sys::sendto(socket.as_raw_fd(), &message, &sys::SockaddrIn6::from(to), sys::MsgFlags::empty())?;
    Ok(())
}

fn connect_any(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn or_kind(answer: std::io::Result<String>) -> String {
    answer.unwrap_or_else(|error| format!("{:?}", error.kind()))
}

fn udp_to(address: SocketAddr, local: Option<SocketAddr>) -> std::io::Result<UdpSocket> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(local.unwrap_or_else(|| any.parse().expect("an address")))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn ask_udp(socket: &UdpSocket) -> std::io::Result<String> {
    socket.send(b"who")?;
    let mut buffer = [0; 100];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Answers with the server's name and the client's address.
fn serve_datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = [0; 2000];
    while let Ok((_, from)) = socket.recv_from(&mut buffer) {
        let answer = format!("{name} {}", from.ip().to_canonical());
        drop(socket.send_to(answer.as_bytes(), from));
    }
}

/// One HTTP request on a connection that stays open.
fn get(stream: &TcpStream, path: &str) -> std::io::Result<String> {
    let mut stream = stream;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: mesh\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = value.trim().parse().expect("a length");
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(String::from_utf8(body).expect("text"))
}

fn accept(state: &mut State, name: String, port: u16) -> Result<Value, String> {
    let listener = TcpListener::bind(("::", port)).map_err(text)?;
    state.servers.insert(port, listener.try_clone().map_err(text)?);
    std::thread::spawn(move || serve(&listener, &name));
    Ok(Value::Null)
}

fn stream(
    address: SocketAddr,
    count: u32,
    every: Duration,
    is_flowing: &mpsc::Sender<()>,
) -> Vec<Sent> {
    let started = skep_runtime::clock::monotonic();
    let ms = |since: std::time::Instant| u64::try_from(since.elapsed().as_millis()).expect("short");
    let requests = (0..count).map(|n| {
        std::thread::sleep((every * n).saturating_sub(started.elapsed()));
        if n == count / 5 {
            is_flowing.send(()).expect("someone waits");
        }
        std::thread::spawn(move || {
            let (at_ms, began) = (ms(started), skep_runtime::clock::monotonic());
            let answer = or_kind(connect_any(address).and_then(|stream| get(&stream, "/")));
            Sent { at_ms, took_ms: ms(began), answer }
        })
    });
    let requests: Vec<_> = requests.collect();
    requests.into_iter().map(|request| request.join().expect("an end")).collect()
}

/// Answers with the server's name and the client's address, or with a large body.
fn serve(listener: &TcpListener, name: &str) {
    // Until it is to refuse.
    for stream in listener.incoming().map_while(Result::ok) {
        let name = name.to_owned();
        std::thread::spawn(move || {
            if serve_one(&stream, &name).is_err() {
                drop(stream.shutdown(Shutdown::Both));
            }
        });
    }
}

fn serve_one(stream: &TcpStream, name: &str) -> std::io::Result<()> {
    let client = stream.peer_addr()?.ip().to_canonical();
    let mut reader = BufReader::new(stream);
    loop {
        let mut path = None;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            path = path.or_else(|| line.split(' ').nth(1).map(str::to_owned));
            if line == "\r\n" {
                break;
            }
        }
        let body = match path.as_deref() {
            Some("/large") => "x".repeat(LARGE),
            _ => format!("{name} {client}"),
        };
        let mut out = stream;
        write!(out, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    }
}
