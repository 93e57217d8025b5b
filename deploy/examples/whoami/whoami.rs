//! A small HTTP server that says which task answered: for examples, demonstrations and tests.
//!
//! One file and the standard library alone, so that `rustc` makes a static program of it:
//! see `make-whoami-image.sh`. It listens on port 8080, or on `PORT`, over IPv4 and IPv6.
//!
//! | request                                   | answer                                       |
//! |-------------------------------------------|----------------------------------------------|
//! | `GET /health`                             | 200, or 503 after `POST /health/fail`        |
//! | `POST /health/fail`, `POST /health/ok`    | switches the answer of `/health`             |
//! | `GET /bytes/N`                            | N bytes                                      |
//! | `GET /slow/MS`                            | the usual answer after MS milliseconds       |
//! | `GET /exit/CODE`                          | an answer; then the process exits with CODE  |
//! | `GET /alloc/MIB`                          | after allocating and touching MIB mebibytes  |
//! | any other `GET`                           | who answered, one `Name: value` per line     |
//! | a datagram (UDP)                          | the same in one datagram, which is its path  |
//!
//! `whoami healthcheck` asks `/health` on the loopback and exits with 0 or 1: a HEALTHCHECK for an
//! image without a shell.
//!
//! With `PROXY_PROTOCOL=v2` each connection must begin with a header of the PROXY protocol, version 2, as
//! ports that are published with `proxy-protocol=v2` send it: the client is who it names. A connection
//! without one is closed. `whoami healthcheck` sends the header of a proxy that asks for itself.
//!
//! # Signals
//!
//! The first process of a container ignores every signal that it has no handler for, and the
//! standard library has no way to install one. So `signal` of the C library is declared here. The
//! handler writes one byte into a socket pair, which a handler may do. A thread that waits for the
//! byte then waits until the running requests are answered and none came for a moment, which is longer
//! while connections are open, for at most five seconds, and exits with 0: a task is taken out of the
//! balancers before it gets the signal, so what still arrives was on its way, and is answered. SIGINT
//! does the same.

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::io::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const PORT_DEFAULT: u16 = 8080;
/// How long running requests may take after SIGTERM.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// How long all must be answered before the exit: connections that were on their way to this task
/// when it was taken out of the balancers still arrive, and are answered.
const DRAIN_QUIET: Duration = Duration::from_millis(200);
/// The same while clients keep connections open: the next request of each is answered with the word that
/// the connection ends, and one that was sent in the moment of the exit would have no answer.
const DRAIN_QUIET_KEPT: Duration = Duration::from_secs(2);
/// How long a connection may be idle: longer than the proxies in front of it keep theirs.
const IDLE_MAX: Duration = Duration::from_secs(120);
const HEALTHCHECK_MAX: Duration = Duration::from_secs(2);
/// Bytes of a request's line and headers, and of a body that is read and thrown away.
const HEAD_LEN_MAX: u64 = 64 << 10;
const BODY_LEN_MAX: u64 = 64 << 20;
const STACK_LEN: usize = 128 << 10;
const CHUNK_LEN: usize = 64 << 10;

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;

unsafe extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    fn write(descriptor: i32, bytes: *const u8, len: usize) -> isize;
}

/// What a header of the PROXY protocol begins with.
const PROXY_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2; the proxy speaks for itself, or for a client.
const PROXY_LOCAL: u8 = 0x20;
const PROXY_CLIENT: u8 = 0x21;

static HAS_PROXY: AtomicBool = AtomicBool::new(false);
static IS_HEALTHY: AtomicBool = AtomicBool::new(true);
static IS_DRAINING: AtomicBool = AtomicBool::new(false);
/// Where the signal handler writes.
static WAKE: AtomicI32 = AtomicI32::new(-1);
static WORK: Mutex<Work> = Mutex::new(Work { n_running: 0, n_connections: 0, changed_at: None });
static CHANGED: Condvar = Condvar::new();
/// What `/alloc` took; it is never given back.
static HOARD: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

fn main() {
    let port = match env::var("PORT") {
        Err(_) => PORT_DEFAULT,
        Ok(text) => text.parse().unwrap_or_else(|_| fail(&format!("PORT={text} is no port"))),
    };
    match env::var("PROXY_PROTOCOL").as_deref() {
        Err(_) | Ok("") => {}
        Ok("v2") => HAS_PROXY.store(true, Ordering::SeqCst),
        Ok(other) => fail(&format!("PROXY_PROTOCOL={other} is unknown; the only one is v2")),
    }
    match env::args().nth(1).as_deref() {
        None => serve(port),
        Some("healthcheck") => process::exit(healthcheck(port)),
        Some(other) => fail(&format!("unknown argument {other}; the only one is healthcheck")),
    }
}

fn fail(message: &str) -> ! {
    eprintln!("whoami: {message}");
    process::exit(2);
}

/// 0 if `/health` answers 200, else 1 and the reason on stderr.
fn healthcheck(port: u16) -> i32 {
    let ask = || -> io::Result<String> {
        let address = ([127, 0, 0, 1], port).into();
        let mut stream = TcpStream::connect_timeout(&address, HEALTHCHECK_MAX)?;
        stream.set_read_timeout(Some(HEALTHCHECK_MAX))?;
        stream.set_write_timeout(Some(HEALTHCHECK_MAX))?;
        if HAS_PROXY.load(Ordering::SeqCst) {
            stream.write_all(&[&PROXY_SIGNATURE[..], &[PROXY_LOCAL, 0, 0, 0]].concat())?;
        }
        stream
            .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut line = String::new();
        BufReader::new(stream).take(HEAD_LEN_MAX).read_line(&mut line)?;
        Ok(line)
    };
    match ask() {
        Ok(line) if line.starts_with("HTTP/1.1 200 ") => 0,
        Ok(line) => {
            eprintln!("whoami: unhealthy: {}", line.trim_end());
            1
        }
        Err(error) => {
            eprintln!("whoami: no answer on port {port}: {error}");
            1
        }
    }
}

fn serve(port: u16) {
    // The second is for machines without IPv6.
    let any = [(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()];
    let any: &[SocketAddr] = &any;
    let failed = |error: io::Error| format!("cannot listen on port {port}: {error}");
    let listener = TcpListener::bind(any).unwrap_or_else(|error| fail(&failed(error)));
    let socket = UdpSocket::bind(any).unwrap_or_else(|error| fail(&failed(error)));
    let answer = move || answer_datagrams(&socket);
    if let Err(error) = thread::Builder::new().stack_size(STACK_LEN).spawn(answer) {
        fail(&format!("cannot answer datagrams: {error}"));
    }
    handle_signals().unwrap_or_else(|error| fail(&format!("cannot handle signals: {error}")));
    println!("listening on port {port}");
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let (connected, first) = (Connected::begin(), Running::begin());
        let serve = move || {
            let _connected = connected;
            // A client that goes away in the middle is not worth a message.
            let _ = serve_connection(&stream, first);
        };
        let spawned = thread::Builder::new().stack_size(STACK_LEN).spawn(serve);
        if let Err(error) = spawned {
            eprintln!("whoami: connection refused: {error}");
        }
    }
}

fn answer_datagrams(socket: &UdpSocket) {
    let mut datagram = vec![0; CHUNK_LEN];
    loop {
        // An error is that of an earlier answer whose client has gone.
        if let Ok((len, client)) = socket.recv_from(&mut datagram) {
            let text = String::from_utf8_lossy(&datagram[..len]);
            let _ = socket.send_to(describe(&shown(client), &text).as_bytes(), client);
        }
    }
}

/// A client as it is named: one of IPv4 as such, also where it came to a socket of IPv6.
fn shown(client: SocketAddr) -> String {
    SocketAddr::new(client.ip().to_canonical(), client.port()).to_string()
}

extern "C" fn on_signal(_number: i32) {
    let byte = 1_u8;
    // SAFETY: write(2) may be called in a signal handler, and the byte lives while it runs.
    unsafe { write(WAKE.load(Ordering::SeqCst), &byte, 1) };
}

fn handle_signals() -> io::Result<()> {
    let (mut waiting, waking) = UnixStream::pair()?;
    WAKE.store(waking.as_raw_fd(), Ordering::SeqCst);
    for number in [SIGTERM, SIGINT] {
        // SAFETY: the handler has the type that signal(2) asks for and touches an atomic only.
        unsafe { signal(number, on_signal) };
    }
    let drain = move || {
        let _open = waking; // The handler writes to it for as long as the process lives.
        if waiting.read_exact(&mut [0]).is_ok() {
            drain_and_exit();
        }
    };
    thread::Builder::new().stack_size(STACK_LEN).spawn(drain).map(drop)
}

fn drain_and_exit() -> ! {
    IS_DRAINING.store(true, Ordering::SeqCst);
    let started = Instant::now();
    let mut work = WORK.lock().expect("no thread panics with the lock held");
    loop {
        let quiet = match work.n_connections {
            0 => DRAIN_QUIET,
            _ => DRAIN_QUIET_KEPT,
        };
        let quiet_since = work.changed_at.map_or(started, |at| at.max(started));
        let left = match work.n_running {
            0 => quiet.saturating_sub(quiet_since.elapsed()),
            _ => DRAIN_MAX,
        };
        let left = left.min(DRAIN_MAX.saturating_sub(started.elapsed()));
        if left.is_zero() {
            break;
        }
        (work, _) = CHANGED.wait_timeout(work, left).expect("no thread panics with the lock held");
    }
    println!("exiting with {} requests unanswered", work.n_running);
    process::exit(0);
}

/// What clients have with this process.
struct Work {
    /// Requests that were read and are not answered yet.
    n_running: usize,
    n_connections: usize,
    /// When a request or a connection last began or ended.
    changed_at: Option<Instant>,
}

impl Work {
    fn change(change: impl FnOnce(&mut Self)) {
        let mut work = WORK.lock().expect("no thread panics with the lock held");
        change(&mut work);
        work.changed_at = Some(Instant::now());
        CHANGED.notify_all();
    }
}

/// Counts a request as running from when it was read, or its connection accepted, until it was
/// answered.
struct Running;

impl Running {
    fn begin() -> Self {
        Work::change(|work| work.n_running += 1);
        Running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        Work::change(|work| work.n_running -= 1);
    }
}

/// Counts a connection until its end.
struct Connected;

impl Connected {
    fn begin() -> Self {
        Work::change(|work| work.n_connections += 1);
        Connected
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        Work::change(|work| work.n_connections -= 1);
    }
}

struct Request {
    method: String,
    /// Without the query.
    path: String,
    is_kept_alive: bool,
    body_len: u64,
    has_chunked_body: bool,
}

/// `first` counts a new connection as a request from when it was accepted.
fn serve_connection(stream: &TcpStream, first: Running) -> io::Result<()> {
    let mut first = Some(first);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE_MAX))?;
    let mut client = stream.peer_addr()?;
    let mut reader = BufReader::new(stream);
    if HAS_PROXY.load(Ordering::SeqCst) {
        client = read_proxy_header(&mut reader)?.unwrap_or(client);
    }
    let client = shown(client);
    while let Some(request) = read_request(&mut reader)? {
        let _running = first.take().unwrap_or_else(Running::begin);
        let mut out = stream;
        if request.has_chunked_body || request.body_len > BODY_LEN_MAX {
            let body = "a body must have a Content-Length of at most 64 MiB\n";
            return answer(&mut out, &request, "413 Content Too Large", body, false);
        }
        io::copy(&mut (&mut reader).take(request.body_len), &mut io::sink())?;
        let stays = request.is_kept_alive && !IS_DRAINING.load(Ordering::SeqCst);
        respond(&mut out, &request, &client, stays)?;
        if !stays {
            break;
        }
    }
    Ok(())
}

/// Reads a header of the PROXY protocol, version 2 (section 2.2 of its text), and returns the client that it
/// names; `None` where the proxy asks for itself.
fn read_proxy_header(reader: &mut impl Read) -> io::Result<Option<SocketAddr>> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "not a PROXY header");
    let mut start = [0; 16];
    reader.read_exact(&mut start)?;
    let mut rest = vec![0; usize::from(u16::from_be_bytes([start[14], start[15]]))];
    reader.read_exact(&mut rest)?;
    let number = |at: usize| rest.get(at..at + 2).map(|two| u16::from_be_bytes([two[0], two[1]]));
    match (start.starts_with(&PROXY_SIGNATURE), start[12], start[13]) {
        (true, PROXY_LOCAL, _) => Ok(None),
        (true, PROXY_CLIENT, 0x11) => {
            let address = rest.first_chunk::<4>().copied().ok_or_else(invalid)?;
            let port = number(8).ok_or_else(invalid)?;
            Ok(Some(SocketAddr::new(IpAddr::from(address), port)))
        }
        (true, PROXY_CLIENT, 0x21) => {
            let address = rest.first_chunk::<16>().copied().ok_or_else(invalid)?;
            let port = number(32).ok_or_else(invalid)?;
            Ok(Some(SocketAddr::new(IpAddr::from(address), port)))
        }
        _ => Err(invalid()),
    }
}

/// Reads the line and the headers of a request; `None` when the client has closed.
fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let mut head = reader.take(HEAD_LEN_MAX);
    let mut line = String::new();
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(target), Some(version)) = (words.next(), words.next(), words.next())
    else {
        return Err(invalid("not a request"));
    };
    let mut request = Request {
        method: method.to_owned(),
        path: target.split('?').next().unwrap_or(target).to_owned(),
        is_kept_alive: version == "HTTP/1.1",
        body_len: 0,
        has_chunked_body: false,
    };
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Err(invalid("the headers have no end"));
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(Some(request));
        }
        let (name, value) = line.split_once(':').ok_or_else(|| invalid("not a header"))?;
        let value = value.trim().to_ascii_lowercase();
        match name.to_ascii_lowercase().as_str() {
            "connection" if value == "close" => request.is_kept_alive = false,
            "connection" if value == "keep-alive" => request.is_kept_alive = true,
            "content-length" => {
                request.body_len = value.parse().map_err(|_| invalid("not a length"))?;
            }
            "transfer-encoding" => request.has_chunked_body = true,
            _ => {}
        }
    }
}

fn respond(out: &mut impl Write, request: &Request, client: &str, stays: bool) -> io::Result<()> {
    const OK: &str = "200 OK";
    let path = request.path.as_str();
    let rest = path.strip_prefix('/').unwrap_or(path);
    let (command, argument) = rest.split_once('/').unwrap_or((rest, ""));
    match (request.method.as_str(), command, argument) {
        ("POST", "health", "ok" | "fail") => {
            IS_HEALTHY.store(argument == "ok", Ordering::SeqCst);
            answer(out, request, OK, &format!("Health: {argument}\n"), stays)
        }
        ("GET" | "HEAD", "health", "") => match IS_HEALTHY.load(Ordering::SeqCst) {
            true => answer(out, request, OK, "Health: ok\n", stays),
            false => answer(out, request, "503 Service Unavailable", "Health: fail\n", stays),
        },
        ("GET" | "HEAD", "bytes" | "slow" | "exit" | "alloc", number) => {
            let Ok(number) = number.parse::<u64>() else {
                let body = format!("{path}: not of the form /{command}/NUMBER\n");
                return answer(out, request, "400 Bad Request", &body, stays);
            };
            match command {
                "bytes" => return bytes(out, request, number, stays),
                "slow" => thread::sleep(Duration::from_millis(number)),
                "exit" => {
                    let code = number.min(255) as i32; // Larger ones do not exist.
                    answer(out, request, OK, &format!("Exiting: {code}\n"), false)?;
                    process::exit(code);
                }
                _ => {
                    if !allocate(number) {
                        let body = format!("{number} MiB cannot be allocated\n");
                        return answer(out, request, "507 Insufficient Storage", &body, stays);
                    }
                }
            }
            answer(out, request, OK, &describe(client, path), stays)
        }
        ("GET" | "HEAD", ..) => answer(out, request, OK, &describe(client, path), stays),
        _ => {
            let body = format!("{} is not allowed here\n", request.method);
            answer(out, request, "405 Method Not Allowed", &body, stays)
        }
    }
}

fn describe(client: &str, path: &str) -> String {
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let variable = |name: &str| env::var(name).unwrap_or_default();
    format!(
        "Hostname: {}\nSlot: {}\nService: {}\nNode: {}\nClient: {client}\nPath: {path}\n",
        hostname.trim_end(),
        variable("TASK_SLOT"),
        variable("SERVICE_NAME"),
        variable("NODE_HOSTNAME"),
    )
}

fn head(status: &str, len: u64, stays: bool) -> String {
    let connection = if stays { "keep-alive" } else { "close" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n\
         Content-Length: {len}\r\nConnection: {connection}\r\n\r\n"
    )
}

/// Sends head and body in one piece.
fn answer(
    out: &mut impl Write,
    request: &Request,
    status: &str,
    body: &str,
    stays: bool,
) -> io::Result<()> {
    let mut message = head(status, body.len() as u64, stays);
    if request.method != "HEAD" {
        message.push_str(body);
    }
    out.write_all(message.as_bytes())
}

fn bytes(out: &mut impl Write, request: &Request, len: u64, stays: bool) -> io::Result<()> {
    out.write_all(head("200 OK", len, stays).as_bytes())?;
    let chunk = vec![b'x'; CHUNK_LEN];
    let mut left = if request.method == "HEAD" { 0 } else { len };
    while left > 0 {
        let n = left.min(CHUNK_LEN as u64);
        out.write_all(&chunk[..n as usize])?;
        left -= n;
    }
    Ok(())
}

/// Takes memory and writes to all of it, so that it counts against the container's limit.
fn allocate(mib: u64) -> bool {
    let len = mib.saturating_mul(1 << 20) as usize; // Too much stays too much.
    let mut block: Vec<u8> = Vec::new();
    if block.try_reserve_exact(len).is_err() {
        return false;
    }
    block.resize(len, 1);
    HOARD.lock().expect("no thread panics with the lock held").push(block);
    true
}
