//! Where a relayed connection goes on: to the rules, or to the next healthy task.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use skep_common::spec::ProxyProtocol;
use skep_runtime::clock;
use skep_worker_core::mesh::{Relay, Target, Turns, proxy_header};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::passage::{Carrier, Passages};

/// How long a task may take to accept where the rules choose it: three of the kernel's attempts (after 1,
/// 3 and 7 s).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);

/// How long one task may take to accept where others may be asked instead: two of the kernel's attempts.
const CONNECT_TIMEOUT_EACH: Duration = Duration::from_secs(2);

/// How long clients may wait to be accepted who came before the rules took their port.
const HANDOVER: Duration = Duration::from_secs(5);

/// The tasks of a port that the daemon balances to, and whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Balance {
    state: Mutex<State>,
    /// Whether clients that wait for a task must look at the tasks again.
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Nothing where the rules balanced from the start.
    tasks: Option<Tasks>,
    /// When the rules took the port.
    by_rules_since: Option<Instant>,
}

#[derive(Debug, Default)]
struct Tasks {
    turns: Turns,
    proxy_protocol: Option<ProxyProtocol>,
}

/// Whom a client is given to.
pub(super) enum Next {
    /// Whomever the rules choose.
    ByRules,
    Task(Target, Option<ProxyProtocol>),
    Nobody,
}

impl Balance {
    /// From now on connections go to these tasks. Those that are established go on.
    pub(super) fn set(&self, relay: &Relay) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.by_rules_since = None;
        let tasks = state.tasks.get_or_insert_default();
        tasks.turns.set(&relay.backends);
        tasks.proxy_protocol = relay.proxy_protocol;
        self.changed.send_replace(());
    }

    /// Whom the rules give the port's connections to by now, which took it before: also who came before them
    /// goes to no other task.
    pub(super) fn follow_rules(&self, relay: &Relay) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tasks) = &mut state.tasks {
            tasks.turns.set(&relay.backends);
        }
        self.changed.send_replace(());
    }

    /// From now on no task is given a connection, also of clients that are between two tasks.
    pub(super) fn withdraw(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tasks) = &mut state.tasks {
            tasks.turns.set(&[]);
        }
        self.changed.send_replace(());
    }

    /// From now on the rules take connections; whoever came before them still goes to the tasks.
    pub(super) fn leave_to_rules(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.by_rules_since.get_or_insert_with(clock::monotonic);
    }

    /// Returns when the task is no more among those that clients are given to.
    async fn withdrawn(&self, target: &Target) {
        let mut changed = self.changed.subscribe();
        while self.names(target) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Clients that wait for a task to accept.
    #[cfg(test)]
    pub(super) fn n_waiting(&self) -> usize {
        self.changed.receiver_count()
    }

    fn names(&self, target: &Target) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.tasks.as_ref().is_some_and(|tasks| tasks.turns.names(target))
    }

    pub(super) fn next(&self, failed: &BTreeSet<Target>, server: IpAddr) -> Next {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_past = |since: Instant| clock::monotonic() - since > HANDOVER;
        if state.by_rules_since.is_some_and(|since| server.is_loopback() || is_past(since)) {
            return Next::ByRules;
        }
        let Some(tasks) = &mut state.tasks else { return Next::ByRules };
        match tasks.turns.take(failed) {
            Some(target) => Next::Task(target, tasks.proxy_protocol),
            None => Next::Nobody,
        }
    }
}

/// A connection to a task.
#[derive(Debug)]
pub(super) enum Backend {
    /// Of the node's own kernel.
    Stream(TcpStream),
    /// Through the daemon of the task's node.
    Carrier(Box<dyn Carrier>),
}

/// Where the connections of a port go on.
#[derive(Debug, Clone)]
pub(super) struct Upstream {
    /// The same port of the node's underlay address, where the rules take them.
    pub(super) rules: SocketAddrV4,
    pub(super) balance: Arc<Balance>,
    /// Absent where nothing is carried through other nodes' daemons.
    pub(super) passages: Option<Arc<dyn Passages>>,
}

impl Upstream {
    /// The connection that a client's goes on in; `None` where nobody takes it. A client whose task is gone
    /// is given another one, as long as there is one: nothing of what it sends has been read.
    pub(super) async fn connect(&self, client: &TcpStream) -> Option<Backend> {
        let ends = client.peer_addr().and_then(|peer| Ok((peer, client.local_addr()?)));
        let ends =
            ends.inspect_err(|error| tracing::debug!(%error, "a client went away at once")).ok()?;
        let mut failed = BTreeSet::new();
        loop {
            let (target, proxy_protocol) = match self.balance.next(&failed, ends.1.ip()) {
                Next::ByRules => return self.connect_by_rules(ends.1).await,
                Next::Task(target, proxy_protocol) => (target, proxy_protocol),
                Next::Nobody => return None,
            };
            let connect = self.connect_to(&target, proxy_protocol, ends);
            let connected = tokio::select! {
                // First: a table is in effect when nobody comes to whom it withdrew.
                biased;
                () = self.balance.withdrawn(&target) => continue,
                connected = within(CONNECT_TIMEOUT_EACH, connect) => connected,
            };
            match connected {
                Ok(backend) => return Some(backend),
                Err(error) => {
                    tracing::debug!(backend = %target.address, %error, "a task did not accept a client");
                }
            }
            failed.insert(target);
        }
    }

    /// For a client that the rules do not see, which is one of loopback.
    async fn connect_by_rules(&self, server: SocketAddr) -> Option<Backend> {
        if !server.ip().is_loopback() {
            // The rules are not there: what they should have taken would come here again and again.
            tracing::debug!(target = %self.rules, "a client came past the rules");
            return None;
        }
        let target = self.rules;
        let connected = within(CONNECT_TIMEOUT, TcpStream::connect(target)).await;
        let refused = |error: &io::Error| {
            tracing::debug!(%target, %error, "failed to connect for a loopback client");
        };
        connected.inspect_err(refused).ok().map(Backend::Stream)
    }

    async fn connect_to(
        &self,
        target: &Target,
        proxy_protocol: Option<ProxyProtocol>,
        (client, server): (SocketAddr, SocketAddr),
    ) -> io::Result<Backend> {
        let header = proxy_protocol.map(|version| match version {
            ProxyProtocol::V2 => proxy_header(client, server),
        });
        let header = header.unwrap_or_default();
        match (&target.passage, &self.passages) {
            (None, _) => {
                let mut stream = TcpStream::connect(target.address).await?;
                stream.write_all(&header).await?;
                Ok(Backend::Stream(stream))
            }
            (Some(passage), Some(passages)) => {
                let mut carrier = passages.open(passage).await?;
                carrier.write_all(&header).await?;
                Ok(Backend::Carrier(carrier))
            }
            (Some(_), None) => Err(io::ErrorKind::NetworkUnreachable.into()),
        }
    }
}

async fn within<T>(time: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let result = tokio::time::timeout(time, work).await;
    result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
