//! Where a relayed connection goes on: to the rules, or to the next healthy task.

use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use skep_common::spec::ProxyProtocol;
use skep_worker_core::mesh::{Relay, Turns, proxy_header};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

/// How long a task may take to accept where the rules choose it: three of the kernel's attempts (after 1,
/// 3 and 7 s).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);

/// How long one task may take to accept where others may be asked instead: two of the kernel's attempts.
const CONNECT_TIMEOUT_EACH: Duration = Duration::from_secs(2);

/// Where the connections of a listener go on.
#[derive(Debug, Clone)]
pub(super) enum Upstream {
    /// To the same port of the node's underlay address, where the rules take them.
    Rules(SocketAddrV4),
    /// To the tasks in turn.
    Tasks(Arc<Balance>),
}

/// The tasks of a port that the daemon balances to, and whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Balance {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    turns: Turns,
    proxy_protocol: Option<ProxyProtocol>,
}

impl Balance {
    /// From now on connections go to these tasks. Those that are established go on.
    pub(super) fn set(&self, relay: &Relay) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.turns.set(&relay.backends);
        state.proxy_protocol = relay.proxy_protocol;
    }

    fn take(
        &self,
        failed: &BTreeSet<SocketAddrV4>,
    ) -> Option<(SocketAddrV4, Option<ProxyProtocol>)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let backend = state.turns.take(failed)?;
        Some((backend, state.proxy_protocol))
    }

    /// Connects to the next task that accepts. A client whose task is gone is given another one, as long as
    /// there is one: nothing of what it sends has been read.
    async fn connect(&self, client: &TcpStream) -> Option<TcpStream> {
        let ends = client.peer_addr().and_then(|peer| Ok((peer, client.local_addr()?)));
        let ends =
            ends.inspect_err(|error| tracing::debug!(%error, "a client went away at once")).ok()?;
        let mut failed = BTreeSet::new();
        while let Some((backend, proxy_protocol)) = self.take(&failed) {
            let connect = connect_with_header(backend, proxy_protocol, ends);
            match within(CONNECT_TIMEOUT_EACH, connect).await {
                Ok(stream) => return Some(stream),
                Err(error) => tracing::debug!(%backend, %error, "a task did not accept a client"),
            }
            failed.insert(backend);
        }
        None
    }
}

impl Upstream {
    /// The connection that a client's goes on in; `None` where nobody takes it.
    pub(super) async fn connect(&self, client: &TcpStream) -> Option<TcpStream> {
        match self {
            Self::Tasks(balance) => balance.connect(client).await,
            Self::Rules(target) => {
                let connected = within(CONNECT_TIMEOUT, TcpStream::connect(target)).await;
                let refused = |error: &io::Error| {
                    tracing::debug!(%target, %error, "failed to connect for a loopback client");
                };
                connected.inspect_err(refused).ok()
            }
        }
    }
}

async fn within<T>(time: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let result = tokio::time::timeout(time, work).await;
    result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn connect_with_header(
    backend: SocketAddrV4,
    proxy_protocol: Option<ProxyProtocol>,
    (client, server): (SocketAddr, SocketAddr),
) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(backend).await?;
    match proxy_protocol {
        None => {}
        Some(ProxyProtocol::V2) => stream.write_all(&proxy_header(client, server)).await?,
    }
    Ok(stream)
}
