//! Connections to published ports that go through the daemon.
//!
//! Clients that connect to 127.0.0.1 or ::1 on the node itself: the kernel does not let packets with a
//! loopback address leave the loopback interface, so the rules cannot serve them. A listener per port
//! connects to the same port of the node's underlay address instead: the rules take that connection like
//! any other, so it takes its turn in the same round-robin. Datagrams go the same way (`datagrams`).
//!
//! Clients of ports that the kernel does not balance: the same listener, which is on all of the node's addresses,
//! gives each connection to the next healthy task (`upstream`).

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use skep_runtime::TaskSet;
use skep_worker_core::mesh::PortKey;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::balance::Balance;
use super::carry;
use super::datagrams;
use super::hold::Listeners;
use super::passage::Passages;
use super::places::Places;
use super::ports::ListenerChanges;
use super::tally::Tally;
use super::upstream::{Backend, Found, SEARCH_MAX, Upstream};

/// Connections of one port through the daemon, each two file descriptors; more wait in the backlog.
const CONNECTIONS_MAX: usize = 8192;

/// Those of one task: half of a port's, so that one that does not read leaves room for its neighbours' clients.
const CONNECTIONS_OF_TASK_MAX: usize = CONNECTIONS_MAX / 2;

/// A client that vanished without a word is noticed after about two minutes: its place is another's.
const PROBE_AFTER_SECONDS: u32 = 60;
const PROBE_EVERY_SECONDS: u32 = 15;
const PROBES: u32 = 4;

/// How long to wait before accepting again when no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The listeners of a node.
#[derive(Debug)]
pub(super) struct Relays {
    underlay: Ipv4Addr,
    tasks: TaskSet,
    passages: Option<Arc<dyn Passages>>,
    tally: Tally,
    sessions: Arc<Semaphore>,
    served: BTreeMap<PortKey, Served>,
}

#[derive(Debug)]
struct Served {
    token: CancellationToken,
    /// Whom its connections go to; of no use to datagrams.
    balance: Arc<Balance>,
}

impl Relays {
    /// Listeners of a node with that address. What is beyond the tunnel goes by the passages.
    pub(super) fn new(
        underlay: Ipv4Addr,
        passages: Option<Arc<dyn Passages>>,
        tally: Tally,
    ) -> Self {
        Self {
            underlay,
            tasks: TaskSet::new(),
            passages,
            tally,
            sessions: Arc::new(Semaphore::new(datagrams::SESSIONS_MAX)),
            served: BTreeMap::new(),
        }
    }

    /// Takes over changes. Connections that are established go on.
    pub(super) fn follow(&mut self, changes: ListenerChanges) {
        for key in changes.withdraw {
            if let Some(served) = self.served.remove(&key) {
                served.token.cancel();
                served.balance.withdraw();
            }
        }
        // Whom its first client goes to must be known when a port is served.
        let mut balance = changes.balance;
        for (key, listeners) in changes.serve {
            let first = Arc::new(Balance::new(key));
            if let Some(relay) = balance.remove(&key) {
                first.set(&relay);
            }
            let served = self.serve(key, listeners, first);
            if let Some(earlier) = self.served.insert(key, served) {
                earlier.token.cancel();
            }
        }
        for (key, relay) in &balance {
            if let Some(served) = self.served.get(key) {
                served.balance.set(relay);
            }
        }
        for (key, relay) in &changes.in_rules {
            if let Some(served) = self.served.get(key) {
                served.balance.follow_rules(relay);
            }
        }
        for served in changes.by_rules.iter().filter_map(|key| self.served.get(key)) {
            served.balance.leave_to_rules();
        }
    }

    fn serve(&self, key: PortKey, listeners: Listeners, balance: Arc<Balance>) -> Served {
        let token = CancellationToken::new();
        let rules = SocketAddrV4::new(self.underlay, key.port);
        match listeners {
            Listeners::None => {}
            Listeners::Streams(listeners) => {
                let upstream = Upstream {
                    rules,
                    balance: balance.clone(),
                    passages: self.passages.clone(),
                    trials: self.tasks.clone(),
                    tally: self.tally.clone(),
                    places: Places::new(CONNECTIONS_OF_TASK_MAX),
                    refusals: Arc::default(),
                    search_max: SEARCH_MAX,
                };
                self.accept_on(key, listeners, &upstream, &token);
            }
            Listeners::Datagrams(sockets) => self.relay_from(key, sockets, rules, &token),
        }
        Served { token, balance }
    }

    fn accept_on(
        &self,
        key: PortKey,
        listeners: Vec<std::net::TcpListener>,
        upstream: &Upstream,
        token: &CancellationToken,
    ) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let listeners = listeners.into_iter().map(TcpListener::from_std);
        for listener in listeners.filter_map(|listener| served_or_told(key, listener)) {
            let accept = accept(listener, upstream.clone(), permits.clone(), self.tasks.clone());
            let token = token.clone();
            self.tasks.spawn("mesh-accept", async move {
                token.run_until_cancelled(accept).await;
            });
        }
    }

    fn relay_from(
        &self,
        key: PortKey,
        sockets: Vec<std::net::UdpSocket>,
        target: SocketAddrV4,
        token: &CancellationToken,
    ) {
        let sockets = sockets.into_iter().map(UdpSocket::from_std);
        for socket in sockets.filter_map(|socket| served_or_told(key, socket)) {
            let relay = datagrams::relay(socket, target, self.sessions.clone());
            let token = token.clone();
            self.tasks.spawn("mesh-loopback-datagrams", async move {
                token.run_until_cancelled(relay).await;
            });
        }
    }

    /// Serves no port any more; returns the tasks that did, to be shut down.
    pub(super) fn end(&mut self) -> TaskSet {
        self.served.clear();
        std::mem::take(&mut self.tasks)
    }
}

fn served_or_told<T>(key: PortKey, socket: io::Result<T>) -> Option<T> {
    let told = |error: &io::Error| {
        tracing::warn!(port = %key, %error, "port is not served by this daemon");
    };
    socket.inspect_err(told).ok()
}

impl Drop for Relays {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

async fn accept(
    listener: TcpListener,
    upstream: Upstream,
    permits: Arc<Semaphore>,
    tasks: TaskSet,
) {
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let upstream = upstream.clone();
                tasks.spawn("mesh-connection", async move {
                    forward(client, &upstream).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::debug!(?upstream, %error, "failed to accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Carries what both ends send until both have ended; an end of one side alone is passed on.
async fn forward(client: TcpStream, upstream: &Upstream) {
    let Some(found) = upstream.connect(&client).await else { return refuse(&client) };
    let Found { backend, counters, place: _place } = found;
    prepare(&client);
    match backend {
        Backend::Stream(backend) => {
            prepare(&backend);
            let copied = carry::between(&client, &backend, counters.as_deref()).await;
            if is_broken(copied, &client) {
                refuse(&backend);
            }
        }
        // Dropped before its end, it breaks at the other one as well.
        Backend::Carrier(mut backend) => {
            let copied = carry::through(&client, &mut *backend, counters.as_deref()).await;
            is_broken(copied, &client);
        }
    }
}

/// What broke on one side must not look complete on the other.
fn is_broken(copied: io::Result<()>, client: &TcpStream) -> bool {
    let told = |error: &io::Error| {
        tracing::debug!(%error, "a relayed connection broke");
        refuse(client);
    };
    copied.inspect_err(told).is_err()
}

/// Sets one end of a relayed connection up.
pub(crate) fn prepare(stream: &TcpStream) {
    // Both ends are one machine or one network: nothing is gained by waiting to fill packets.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "failed to send small packets at once");
    }
    if let Err(error) = probe(stream) {
        tracing::debug!(%error, "failed to have a silent peer probed");
    }
}

fn probe(stream: &TcpStream) -> nix::Result<()> {
    setsockopt(stream, sockopt::TcpKeepIdle, &PROBE_AFTER_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &PROBE_EVERY_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepCount, &PROBES)?;
    setsockopt(stream, sockopt::KeepAlive, &true)
}

/// Closes with a reset, as the rules do for clients from elsewhere.
pub(crate) fn refuse(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "failed to reset a relayed connection");
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use skep_common::spec::ProxyProtocol;
    use skep_worker_core::accounting::{Counts, Key};
    use skep_worker_core::mesh::{Protocol, Reason, Relay, Target, proxy_header};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpSocket;

    use super::super::balance::Next;
    use super::*;

    const WAITS_MAX: Duration = Duration::from_secs(20);

    async fn backend() -> (TcpListener, SocketAddrV4) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("not IPv4") };
        (listener, address)
    }

    /// Relays of a port that is served on an address of its own.
    fn serve(
        proxy_protocol: Option<ProxyProtocol>,
        backends: &[SocketAddrV4],
    ) -> (Relays, PortKey, SocketAddr) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let key = PortKey { protocol: Protocol::Tcp, port: address.port() };
        let mut relays = Relays::new(Ipv4Addr::LOCALHOST, None, Tally::default());
        relays.follow(ListenerChanges {
            serve: vec![(key, Listeners::Streams(vec![listener]))],
            balance: [(key, relay(proxy_protocol, backends))].into(),
            ..ListenerChanges::default()
        });
        (relays, key, address)
    }

    /// With so many places for each task.
    fn upstream(rules: SocketAddrV4, balance: &Arc<Balance>, places: usize) -> Upstream {
        Upstream {
            rules,
            balance: balance.clone(),
            passages: None,
            trials: TaskSet::new(),
            tally: Tally::default(),
            places: Places::new(places),
            refusals: Arc::default(),
            search_max: SEARCH_MAX,
        }
    }

    fn relay(proxy_protocol: Option<ProxyProtocol>, backends: &[SocketAddrV4]) -> Relay {
        let target = |address: &SocketAddrV4| Target {
            address: *address,
            task_id: address.port().to_string(),
            passage: None,
        };
        Relay { proxy_protocol, backends: backends.iter().map(target).collect() }
    }

    fn balance(relays: &mut Relays, key: PortKey, backends: &[SocketAddrV4]) {
        let balance = [(key, relay(None, backends))].into();
        relays.follow(ListenerChanges { balance, ..ListenerChanges::default() });
    }

    #[tokio::test]
    async fn a_task_that_refuses_is_passed_over_and_the_header_comes_first() {
        let (gone, refusing) = backend().await;
        drop(gone);
        let (task, address) = backend().await;
        let (relays, key, port) = serve(Some(ProxyProtocol::V2), &[refusing, address]);
        relays.tally.start();
        for _ in 0..2 {
            let mut client = TcpStream::connect(port).await.unwrap();
            let own = client.local_addr().unwrap();
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let (mut task, _) = task.accept().await.unwrap();
            let mut seen = Vec::new();
            task.read_to_end(&mut seen).await.unwrap();
            assert_eq!(seen, [&proxy_header(own, port)[..], b"question"].concat());
            // The task answers after the client's end, which is passed on alone.
            task.write_all(b"answer").await.unwrap();
            drop(task);
            let mut seen = Vec::new();
            client.read_to_end(&mut seen).await.unwrap();
            assert_eq!(seen, b"answer");
        }
        let counts = relays.tally.counts();
        let of = |endpoint| counts[&Key { endpoint, published: key.port, protocol: key.protocol }];
        let (connections, received_bytes, sent_bytes) = (2, 2 * 8, 2 * 6);
        assert_eq!(of(address), Counts { connections, failures: 0, received_bytes, sent_bytes });
        let refusals = Counts { connections: 1, failures: 1, ..Counts::default() };
        assert_eq!(of(refusing), refusals, "it is left out then");
        relays.tally.forget(&counts.into_keys().collect::<Vec<_>>());
        assert!(relays.tally.counts().is_empty());
    }

    /// The task's end of a client's connection that the relay knows of.
    async fn established(client: &mut TcpStream, listener: &TcpListener) -> TcpStream {
        client.write_all(b"?").await.unwrap();
        let (mut task, _) = listener.accept().await.unwrap();
        task.read_exact(&mut [0]).await.unwrap();
        task
    }

    #[tokio::test]
    async fn what_is_established_goes_on_when_its_task_is_withdrawn() {
        let (first, first_address) = backend().await;
        let (second, second_address) = backend().await;
        let (mut relays, key, port) = serve(None, &[first_address]);
        let mut client = TcpStream::connect(port).await.unwrap();
        let mut task = established(&mut client, &first).await;
        balance(&mut relays, key, &[second_address]);
        let mut other = TcpStream::connect(port).await.unwrap();
        let _second = established(&mut other, &second).await;
        balance(&mut relays, key, &[]);
        let mut refused = TcpStream::connect(port).await.unwrap();
        let error = refused.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "there is no task");

        relays.follow(ListenerChanges { withdraw: vec![key], ..ListenerChanges::default() });
        let closed = async {
            while TcpStream::connect(port).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WAITS_MAX, closed).await.expect("its listener is closed");
        task.write_all(b"still here").await.unwrap();
        drop(task);
        let mut seen = Vec::new();
        client.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"still here");
    }

    /// A listener whose queue is full, so that it answers nobody; and what fills it.
    async fn silent() -> (TcpListener, SocketAddrV4, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(0).unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("not IPv4") };
        let mut queued = Vec::new();
        loop {
            let connect = TcpStream::connect(address);
            match tokio::time::timeout(Duration::from_millis(100), connect).await {
                Ok(connected) => queued.push(connected.unwrap()),
                Err(_) => return (listener, address, queued),
            }
        }
    }

    #[tokio::test]
    async fn who_waits_for_a_task_that_a_table_withdraws_is_given_another_one() {
        let (_silent, silent_address, _queued) = silent().await;
        let (task, address) = backend().await;
        let (mut relays, key, port) = serve(None, &[silent_address]);
        let mut client = TcpStream::connect(port).await.unwrap();
        client.write_all(b"question").await.unwrap();
        let is_asked = async {
            while relays.served[&key].balance.n_waiting() == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WAITS_MAX, is_asked).await.expect("the silent one is asked");
        balance(&mut relays, key, &[address]);
        let accepted = tokio::time::timeout(Duration::from_millis(200), task.accept()).await;
        let (mut task, _) = accepted.expect("at once").unwrap();
        let mut seen = [0; 8];
        task.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"question");
    }

    #[tokio::test]
    async fn a_silent_task_is_left_out_within_300_ms_until_it_accepts() {
        let (silent, silent_address, queued) = silent().await;
        let (task, address) = backend().await;
        let (_relays, _, port) = serve(None, &[silent_address, address]);
        let mut served = Vec::new();
        for n in 0..5 {
            let mut client = TcpStream::connect(port).await.unwrap();
            // Whoever waits for the silent one is sent on; nobody waits for it afterwards.
            let patience = Duration::from_millis(if n < 2 { 300 } else { 100 });
            let accepted = tokio::time::timeout(patience, established(&mut client, &task)).await;
            served.push(accepted.unwrap_or_else(|_| panic!("client {n} waited too long")));
        }
        // What filled its queue, and the node's own attempts, end without a byte.
        drop(queued);
        let is_reached = async {
            loop {
                let (mut own, _) = silent.accept().await.unwrap();
                if own.read(&mut [0]).await.is_ok_and(|n| n == 1) {
                    return;
                }
            }
        };
        let clients = async {
            loop {
                let mut client = TcpStream::connect(port).await.unwrap();
                client.write_all(b"?").await.unwrap();
                let accepted = tokio::time::timeout(Duration::from_millis(20), task.accept());
                served.extend(accepted.await.into_iter().map(|accepted| accepted.unwrap().0));
                served.push(client);
            }
        };
        let is_back = async {
            tokio::select! {
                () = is_reached => {}
                never = clients => never,
            }
        };
        tokio::time::timeout(WAITS_MAX, is_back).await.expect("it is taken back");
    }

    #[tokio::test]
    async fn whom_a_trusted_task_failed_waits_for_one_that_is_left_out() {
        let addresses = [1, 2].map(|port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        let relay = relay(None, &addresses);
        let [left_out, trusted] = &relay.backends[..] else { panic!("not two") };
        let balance = Balance::new(PortKey { protocol: Protocol::Tcp, port: 80 });
        balance.set(&relay);
        balance.leave_out(left_out, Reason::Silent);
        let failed = [trusted.clone()].into();
        let next = balance.next(&failed, Ipv4Addr::LOCALHOST.into());
        assert!(matches!(next, Next::Task(target, _) if target == *left_out));
        let given_up = balance.given_up(left_out, &failed);
        let given_up = tokio::time::timeout(Duration::ZERO, given_up).await;
        assert!(given_up.is_err(), "it would be given again at once, and for ever");
    }

    #[tokio::test]
    async fn a_client_that_nobody_accepts_is_reset_in_time() {
        let mut all = Vec::new();
        for _ in 0..6 {
            all.push(silent().await);
        }
        let addresses: Vec<SocketAddrV4> = all.iter().map(|(_, address, _)| *address).collect();
        let (relays, key, port) = serve(None, &addresses);
        let upstream = upstream(addresses[0], &relays.served[&key].balance, 1);
        let upstream = Upstream { search_max: Duration::from_millis(500), ..upstream };
        let client = TcpStream::connect(port).await.unwrap();
        let found = tokio::time::timeout(Duration::from_secs(1), upstream.connect(&client)).await;
        assert!(found.expect("in time").is_none(), "who finds nobody is reset");
    }

    #[tokio::test]
    async fn a_port_passes_to_the_rules_and_back_under_its_listener() {
        let (task, address) = backend().await;
        let (mut relays, key, port) = serve(None, &[address]);
        let _first = TcpStream::connect(port).await.unwrap();
        task.accept().await.unwrap();
        relays.follow(ListenerChanges { by_rules: vec![key], ..ListenerChanges::default() });
        // Of two clients the rules serve that of loopback, and who came past them is still given to a task.
        let upstream = upstream(address, &relays.served[&key].balance, 1);
        let other: std::net::IpAddr = [192, 0, 2, 1].into();
        let nobody = std::collections::BTreeSet::new();
        let next = upstream.balance.next(&nobody, other);
        assert!(matches!(next, Next::Task(..)), "it came before the rules");
        let next = upstream.balance.next(&nobody, Ipv4Addr::LOCALHOST.into());
        assert!(matches!(next, Next::ByRules), "loopback");
        let in_rules = [(key, relay(None, &[]))].into();
        relays.follow(ListenerChanges { in_rules, ..ListenerChanges::default() });
        let next = upstream.balance.next(&nobody, other);
        assert!(matches!(next, Next::Nobody), "a later table withdrew the task");
        let next = upstream.balance.next(&nobody, Ipv4Addr::LOCALHOST.into());
        assert!(matches!(next, Next::ByRules), "loopback goes by the rules all the same");
        balance(&mut relays, key, &[address]);
        let _second = TcpStream::connect(port).await.unwrap();
        task.accept().await.unwrap();
    }

    /// A port of these tasks, each with one place.
    fn narrow(tasks: &[SocketAddrV4]) -> Upstream {
        let balance = Arc::new(Balance::new(PortKey { protocol: Protocol::Tcp, port: 80 }));
        balance.set(&relay(None, tasks));
        upstream(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1), &balance, 1)
    }

    /// A client that is relayed.
    async fn relayed(upstream: &Upstream, tasks: &TaskSet) -> TcpStream {
        let entry = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(entry.local_addr().unwrap()).await.unwrap();
        let (accepted, upstream) = (entry.accept().await.unwrap().0, upstream.clone());
        tasks.spawn("test connection", async move { forward(accepted, &upstream).await });
        client
    }

    #[tokio::test]
    async fn a_client_that_resets_while_its_task_does_not_read_frees_its_place() {
        let (task, address) = backend().await;
        let (upstream, tasks) = (narrow(&[address]), TaskSet::new());
        let mut client = relayed(&upstream, &tasks).await;
        let (_task, _) = task.accept().await.unwrap();
        let (much, pause) = (vec![0; 64 << 10], Duration::from_millis(200));
        while let Ok(written) = tokio::time::timeout(pause, client.write_all(&much)).await {
            written.unwrap();
        }
        assert!(upstream.places.take(&address).is_none(), "the client has it");
        client.set_zero_linger().unwrap();
        drop(client);
        let freed = async {
            while upstream.places.take(&address).is_none() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WAITS_MAX, freed).await.expect("the connection has ended");
    }

    #[tokio::test]
    async fn clients_of_a_full_task_are_given_another_one_and_reset_where_all_are_full() {
        let (first, first_address) = backend().await;
        let (second, second_address) = backend().await;
        let (upstream, tasks) = (narrow(&[first_address, second_address]), TaskSet::new());
        let _of_first = (relayed(&upstream, &tasks).await, first.accept().await.unwrap());
        let of_second = (relayed(&upstream, &tasks).await, second.accept().await.unwrap());
        let error = relayed(&upstream, &tasks).await.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "each has its one");
        drop(of_second);
        let freed = async {
            while upstream.places.take(&second_address).is_none() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WAITS_MAX, freed).await.expect("the connection has ended");
        // The first one has the next turn, and no place.
        let mut client = relayed(&upstream, &tasks).await;
        established(&mut client, &second).await;
    }

    #[tokio::test]
    async fn what_a_task_sent_before_it_broke_arrives() {
        let (task, address) = backend().await;
        let (_relays, _, port) = serve(None, &[address]);
        let mut client = TcpStream::connect(port).await.unwrap();
        let (mut task, _) = task.accept().await.unwrap();
        task.write_all(b"too much").await.unwrap();
        task.set_zero_linger().unwrap();
        let mut seen = [0; 8];
        client.read_exact(&mut seen).await.unwrap();
        drop(task);
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!((&seen, error.kind()), (b"too much", io::ErrorKind::ConnectionReset));
    }
}
