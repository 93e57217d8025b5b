//! Answers the questions of this node's containers for names; what is answered is decided in
//! `skep_worker_core::dns`.
//!
//! # Invariants
//!
//! - No question is answered or passed on before this daemon knows all networks of its container: until then
//!   it waits, as it waited in the socket while no daemon ran.
//! - Each question has a task of its own, so that a slow resolver keeps nobody else waiting.
//! - A question reads a directory that is ready. Who takes over tables makes the next one of them, of the
//!   networks that changed alone, while questions are answered from the last.
//!
//! Questions that nobody here can answer are asked from the node, also where a service names its resolvers.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use skep_common::TaskId;
use skep_runtime::TaskSet;
use skep_worker_core::dns::{
    Answer, Directory, Received, Request, Scope, Transport, answer, answers, cut, is_failure,
    with_id,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::config::host_resolvers;
use crate::executor::Error;
use crate::net::names::NameSockets;

/// The port that resolvers are asked on.
const PORT: u16 = 53;
/// How many resolvers are asked, one after the other, and how long each may take. As moby's.
const RESOLVERS_MAX: usize = 3;
const RESOLVER_TIMEOUT: Duration = Duration::from_secs(4);
/// Questions that others are asked at once, by all containers: each has a port of the node meanwhile.
const FORWARDED_MAX: usize = 256;
/// Questions of one container that are worked on at once; others wait in its socket.
const QUESTIONS_MAX: usize = 1024;
/// Streams of one container, and how long one may say nothing (RFC 7766, section 6.2.3).
const STREAMS_MAX: usize = 128;
const STREAM_IDLE: Duration = Duration::from_secs(30);
/// Between two attempts where the machine is short of something, such as descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest message.
const MESSAGE_BYTES: usize = u16::MAX as usize;

/// Answers for all containers of the node.
#[derive(Debug)]
pub(super) struct Names {
    view: Arc<View>,
    servers: Mutex<BTreeMap<TaskId, Server>>,
}

/// What is known of all networks.
#[derive(Debug)]
struct View {
    directory: watch::Receiver<Arc<Directory>>,
    forwarded: Semaphore,
}

/// Ends with its handle, and all that it was answering.
#[derive(Debug)]
struct Server(TaskSet);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Names {
    pub(super) fn new(directory: watch::Receiver<Arc<Directory>>) -> Self {
        let view = Arc::new(View { directory, forwarded: Semaphore::new(FORWARDED_MAX) });
        Self { view, servers: Mutex::default() }
    }

    /// Answers what comes to the sockets of a container until [`Names::stop`].
    pub(super) fn serve(
        &self,
        task_id: TaskId,
        scope: Scope,
        sockets: NameSockets,
    ) -> Result<(), Error> {
        let udp = UdpSocket::from_std(sockets.udp).map_err(|error| Error::of(&error))?;
        let tcp = TcpListener::from_std(sockets.tcp).map_err(|error| Error::of(&error))?;
        let resolver = Arc::new(Resolver { view: Arc::clone(&self.view), scope });
        let server = TaskSet::new();
        server.spawn("names", async move {
            tokio::join!(serve_datagrams(&resolver, Arc::new(udp)), serve_streams(&resolver, &tcp));
        });
        self.servers().insert(task_id, Server(server));
        Ok(())
    }

    /// Answers no more; fine if it never did.
    pub(super) fn stop(&self, task_id: TaskId) {
        self.servers().remove(&task_id);
    }

    fn servers(&self) -> std::sync::MutexGuard<'_, BTreeMap<TaskId, Server>> {
        self.servers.lock().expect("nothing panics while it holds the table")
    }
}

impl View {
    /// The directory, once it has all networks of a scope; `None` where the node ends first.
    async fn directory_for(&self, scope: &Scope) -> Option<Arc<Directory>> {
        let mut directory = self.directory.clone();
        let known = directory.wait_for(|directory| directory.knows(scope)).await.ok()?;
        Some(Arc::clone(&known))
    }
}

/// Answers for one container.
#[derive(Debug)]
struct Resolver {
    view: Arc<View>,
    scope: Scope,
}

impl Resolver {
    /// The reply to a message; `None` where it is none that a reply belongs to.
    async fn reply(&self, message: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let request = match Request::read(message, transport) {
            Received::Question(request) => request,
            Received::Wrong(reply) => return Some(reply),
            Received::Nothing => return None,
        };
        let directory = self.view.directory_for(&self.scope).await?;
        let answer = answer(request.question(), &self.scope, &directory, rand::random());
        if answer != Answer::Forward {
            return request.reply(&answer);
        }
        let _permit = self.view.forwarded.acquire().await.ok()?;
        let resolvers = match &self.scope.nameservers[..] {
            [] => host_resolvers(),
            named => named.to_vec(),
        };
        let resolvers: Vec<_> =
            resolvers.into_iter().map(|address| SocketAddr::new(address, PORT)).collect();
        let reply = ask_in_turn(&resolvers, message, transport).await;
        Some(reply.map_or_else(|| request.failure(), |reply| cut(reply, request.limit())))
    }
}

async fn serve_datagrams(resolver: &Arc<Resolver>, socket: Arc<UdpSocket>) {
    let permits = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let mut questions = JoinSet::new();
    let mut buffer = vec![0; MESSAGE_BYTES];
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        while questions.try_join_next().is_some() {}
        let (n_bytes, sender) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::warn!(%error, "failed to take a container's question");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let message = buffer[..n_bytes].to_vec();
        let (resolver, socket) = (Arc::clone(resolver), Arc::clone(&socket));
        questions.spawn(async move {
            if let Some(reply) = resolver.reply(&message, Transport::Udp).await {
                // One who does not wait any more asks again, if at all.
                let _ = socket.send_to(&reply, sender).await;
            }
            drop(permit);
        });
    }
}

async fn serve_streams(resolver: &Arc<Resolver>, listener: &TcpListener) {
    let permits = Arc::new(Semaphore::new(STREAMS_MAX));
    let mut streams = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        while streams.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "failed to take a container's stream of questions");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let resolver = Arc::clone(resolver);
        streams.spawn(async move {
            // What ends a stream is its client's matter, who asks again on another one.
            let _ = serve_stream(&resolver, stream).await;
            drop(permit);
        });
    }
}

async fn serve_stream(resolver: &Resolver, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let message = timeout(STREAM_IDLE, read_message(&mut stream)).await??;
        if let Some(reply) = resolver.reply(&message, Transport::Tcp).await {
            timeout(STREAM_IDLE, write_message(&mut stream, &reply)).await??;
        }
    }
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut whole = length.to_be_bytes().to_vec();
    whole.extend_from_slice(message);
    stream.write_all(&whole).await
}

/// What the first resolver says that answers; `None` where none does in time.
async fn ask_in_turn(
    resolvers: &[SocketAddr],
    message: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    let mut failure = None;
    for address in resolvers.iter().copied().take(RESOLVERS_MAX) {
        let reply = match transport {
            Transport::Udp => timeout(RESOLVER_TIMEOUT, ask_by_datagram(address, message)).await,
            Transport::Tcp => timeout(RESOLVER_TIMEOUT, ask_by_stream(address, message)).await,
        };
        match reply {
            Ok(Ok(reply)) if !is_failure(&reply) => return Some(reply),
            Ok(Ok(reply)) => failure = failure.or(Some(reply)),
            Ok(Err(_)) | Err(_) => {}
        }
    }
    failure
}

async fn ask_by_datagram(resolver: SocketAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let any = match resolver {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    // A port and an id of its own each: nobody can guess both.
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(resolver).await?;
    let asked = with_id(message.to_vec(), rand::random());
    socket.send(&asked).await?;
    let mut buffer = vec![0; MESSAGE_BYTES];
    loop {
        let n_bytes = socket.recv(&mut buffer).await?;
        if answers(&buffer[..n_bytes], &asked) {
            return Ok(with_id(buffer[..n_bytes].to_vec(), id_of(message)));
        }
    }
}

async fn ask_by_stream(resolver: SocketAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    let asked = with_id(message.to_vec(), rand::random());
    write_message(&mut stream, &asked).await?;
    let reply = read_message(&mut stream).await?;
    if !answers(&reply, &asked) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(with_id(reply, id_of(message)))
}

fn id_of(message: &[u8]) -> u16 {
    message.first_chunk().map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener as StdListener, UdpSocket as StdSocket};

    use skep_common::{NetworkId, ServiceId};
    use skep_worker_core::network::{NetworkTable, NetworkTables, ServiceEntry};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A question for the IPv4 addresses of `name`.
    fn question(id: u16, name: &str) -> Vec<u8> {
        let mut message = id.to_be_bytes().to_vec();
        message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in name.split('.') {
            message.push(label.len().try_into().unwrap());
            message.extend(label.as_bytes());
        }
        message.extend([0, 0, 1, 0, 1]);
        message
    }

    fn tables(service: &str, address: Ipv4Addr) -> NetworkTables {
        let mut table = NetworkTable { name: "front".into(), ..NetworkTable::default() };
        table.subnets = vec!["10.0.1.0/24".parse().unwrap()];
        let entry = ServiceEntry {
            name: service.into(),
            virtual_ips: vec![address.into()],
            ..ServiceEntry::default()
        };
        table.services.insert(ServiceId(1), entry);
        let networks = [(NetworkId(1), Arc::new(table))].into();
        NetworkTables { networks, ..NetworkTables::default() }
    }

    fn directory(service: &str, address: Ipv4Addr) -> Arc<Directory> {
        Arc::new(Directory::default().follow(&tables(service, address)))
    }

    /// A resolver that answers each question by `reply`; gives its address.
    async fn resolver(reply: impl Fn(Vec<u8>) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        TaskSet::new().spawn("resolver", async move {
            let mut buffer = [0; 512];
            while let Ok((n_bytes, sender)) = socket.recv_from(&mut buffer).await {
                for reply in reply(buffer[..n_bytes].to_vec()) {
                    socket.send_to(&reply, sender).await.unwrap();
                }
            }
        });
        address
    }

    fn with_code(mut message: Vec<u8>, code: u8) -> Vec<u8> {
        message[2] |= 0x80;
        message[3] = code;
        message
    }

    #[tokio::test]
    async fn a_question_waits_until_the_networks_of_its_container_are_known() {
        let (publish, published) = watch::channel(Arc::default());
        let names = Names::new(published);
        let udp = StdSocket::bind("127.0.0.1:0").unwrap();
        let tcp = StdListener::bind("127.0.0.1:0").unwrap();
        udp.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let (at, stream_at) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
        let scope = Scope { networks: vec![NetworkId(1)], ..Scope::default() };
        names.serve(TaskId(1), scope, NameSockets { udp, tcp }).unwrap();

        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(&question(7, "web"), at).await.unwrap();
        let mut stream = TcpStream::connect(stream_at).await.unwrap();
        write_message(&mut stream, &question(8, "web")).await.unwrap();
        // What it would not wait for: a message that needs no directory is answered meanwhile.
        let mut wrong = question(9, "web");
        wrong[2] |= 0x28; // An operation that no resolver has.
        client.send_to(&wrong, at).await.unwrap();
        let mut buffer = [0; 512];
        let n_bytes = timeout(PATIENCE, client.recv(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(id_of(&buffer[..n_bytes]), 9);

        publish.send_replace(directory("web", Ipv4Addr::new(10, 0, 1, 2)));
        let n_bytes = timeout(PATIENCE, client.recv(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(id_of(&buffer[..n_bytes]), 7);
        assert_eq!(buffer[n_bytes - 4..n_bytes], [10, 0, 1, 2]);
        let reply = timeout(PATIENCE, read_message(&mut stream)).await.unwrap().unwrap();
        assert_eq!((id_of(&reply), &reply[reply.len() - 4..]), (8, &[10, 0, 1, 2][..]));

        publish.send_replace(directory("web", Ipv4Addr::new(10, 0, 1, 3)));
        client.send_to(&question(10, "web"), at).await.unwrap();
        let n_bytes = timeout(PATIENCE, client.recv(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(buffer[n_bytes - 4..n_bytes], [10, 0, 1, 3], "the newest tables count");
    }

    #[tokio::test]
    async fn a_question_is_answered_while_the_next_directory_is_made() {
        let (publish, published) = watch::channel(directory("web", Ipv4Addr::new(10, 0, 1, 2)));
        let names = Names::new(published);
        let scope = Scope { networks: vec![NetworkId(1)], ..Scope::default() };
        let resolver = Resolver { view: Arc::clone(&names.view), scope };
        let ask = || async {
            let message = question(7, "web");
            let reply = resolver.reply(&message, Transport::Udp).await;
            reply.unwrap().last().copied()
        };
        // One who takes over a change of this network and of another, and is not done with it.
        let mut changed = tables("web", Ipv4Addr::new(10, 0, 1, 3));
        changed.networks.insert(NetworkId(2), Arc::default());
        let next = publish.borrow().follow(&changed);
        assert_eq!(ask().await, Some(2), "it neither waits nor makes it");
        publish.send_replace(Arc::new(next));
        assert_eq!(ask().await, Some(3));
    }

    #[tokio::test]
    async fn resolvers_are_asked_in_turn_until_one_answers() {
        let failing = resolver(|asked| vec![with_code(asked, 2)]).await;
        // Before its answer it says what answers another question.
        let good = resolver(|asked| {
            let other = with_id(with_code(asked.clone(), 0), id_of(&asked).wrapping_add(1));
            vec![other, with_code(asked, 3)]
        })
        .await;
        let message = question(7, "example.org");
        let ask = |resolvers: Vec<SocketAddr>| {
            let message = message.clone();
            async move { ask_in_turn(&resolvers, &message, Transport::Udp).await }
        };
        let reply = ask(vec![failing, good]).await.unwrap();
        assert_eq!((id_of(&reply), reply[3]), (7, 3), "that there is no such name is an answer");
        let reply = ask(vec![failing]).await.unwrap();
        assert_eq!((id_of(&reply), reply[3]), (7, 2), "a failure is passed on where all fail");
        assert_eq!(ask(Vec::new()).await, None);
    }
}
