//! Where a relayed connection goes on: to the rules, or to the next healthy task.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use skep_common::spec::ProxyProtocol;
use skep_runtime::{TaskSet, clock};
use skep_worker_core::mesh::{PATIENCE, Target, proxy_header};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::balance::{Balance, Next};
use super::ejection::reason_of;
use super::passage::{Carrier, Passages};
use super::places::{Place, Places};
use super::tally::{Counters, Tally};
use crate::throttle::Throttle;

/// How long a client of a port waits, whatever number of tasks is silent.
pub(super) const SEARCH_MAX: Duration = Duration::from_secs(8);

/// How long one task may take to accept, also the last one of a port: two of the kernel's attempts.
const CONNECT_TIMEOUT_EACH: Duration = Duration::from_secs(2);

/// How long a task may take to accept the node's own attempt, and where it goes through another daemon, which
/// may have to be reached first.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(100);
const PASSAGE_ATTEMPT_TIMEOUT: Duration = Duration::from_millis(200);

/// How long after an attempt a task that is left out is tried again, and one that accepted is not.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(500);

/// A connection to a task.
#[derive(Debug)]
pub(super) enum Backend {
    /// Of the node's own kernel.
    Stream(TcpStream),
    /// Through the daemon of the task's node.
    Carrier(Box<dyn Carrier>),
}

/// What a client was given.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) backend: Backend,
    /// Where what it carries is counted; nowhere where the rules count it, or nobody asks.
    pub(super) counters: Option<Arc<Counters>>,
    /// Its place at a task that the daemon has chosen and reaches itself.
    pub(super) place: Option<Place<SocketAddrV4>>,
}

/// Where the connections of a port go on.
#[derive(Debug, Clone)]
pub(super) struct Upstream {
    /// The same port of the node's underlay address, where the rules take them.
    pub(super) rules: SocketAddrV4,
    pub(super) balance: Arc<Balance>,
    /// Absent where nothing is carried through other nodes' daemons.
    pub(super) passages: Option<Arc<dyn Passages>>,
    /// Where tasks that do not accept are tried.
    pub(super) trials: TaskSet,
    /// Where its connections are counted.
    pub(super) tally: Tally,
    /// Of the tasks that this daemon reaches itself; other nodes count the connections of theirs.
    pub(super) places: Places<SocketAddrV4>,
    pub(super) refusals: Arc<Throttle>,
    /// How long a client waits until a task has accepted.
    pub(super) search_max: Duration,
}

impl Upstream {
    /// The connection that a client's goes on in; `None` where nobody takes it. A client whose task is gone
    /// is given another one, as long as there is one: nothing of what it sends has been read.
    pub(super) async fn connect(&self, client: &TcpStream) -> Option<Found> {
        let ends = client.peer_addr().and_then(|peer| Ok((peer, client.local_addr()?)));
        let ends =
            ends.inspect_err(|error| tracing::debug!(%error, "a client went away at once")).ok()?;
        match tokio::time::timeout(self.search_max, self.search(ends)).await {
            Ok(backend) => {
                if backend.is_some() {
                    self.balance.note_served();
                }
                backend
            }
            Err(_) => {
                self.balance.note_unserved(self.search_max);
                None
            }
        }
    }

    async fn search(&self, ends: (SocketAddr, SocketAddr)) -> Option<Found> {
        let mut failed = BTreeSet::new();
        loop {
            let (target, proxy_protocol) = match self.balance.next(&failed, ends.1.ip()) {
                Next::ByRules => {
                    let connected = self.connect_by_rules(ends.1).await;
                    return connected.map(|backend| Found { backend, counters: None, place: None });
                }
                Next::Task(target, proxy_protocol) => (target, proxy_protocol),
                Next::Nobody => return None,
            };
            let Ok(place) = self.place(&target) else {
                failed.insert(target);
                continue;
            };
            let connect = self.connect_to(&target, proxy_protocol, ends);
            let connected = tokio::select! {
                // First: a table is in effect when nobody comes to whom it withdrew.
                biased;
                () = self.balance.given_up(&target, &failed) => continue,
                connected = within(CONNECT_TIMEOUT_EACH, connect) => connected,
                never = self.suspect(&target) => match never {},
            };
            let counters = self.tally.of(self.balance.port(), &target);
            if let Some(counters) = &counters {
                counters.count_connection(connected.is_ok());
            }
            match connected {
                Ok(backend) => return Some(Found { backend, counters, place }),
                Err(error) => {
                    tracing::debug!(backend = %target.address, %error, "a task did not accept a client");
                    if let Some(reason) = reason_of(&error) {
                        self.balance.leave_out(&target, reason);
                        self.try_itself(&target);
                    }
                }
            }
            failed.insert(target);
        }
    }

    /// The place of one more connection at a task, where this node counts them.
    fn place(&self, target: &Target) -> Result<Option<Place<SocketAddrV4>>, Full> {
        if target.passage.is_some() {
            return Ok(None);
        }
        let place = self.places.take(&target.address).ok_or(Full);
        if place.is_err()
            && let Some(withheld) = self.refusals.pass(clock::monotonic())
        {
            let (port, limit) = (self.rules.port(), self.places.limit());
            tracing::warn!(
                task.id = target.task_id, backend = %target.address, port, limit, withheld,
                "a task is given no more connections, since it has as many through this daemon as it may; a client is reset where no other task is left"
            );
        }
        place.map(Some)
    }

    /// Has a task tried that keeps a client waiting.
    async fn suspect(&self, target: &Target) -> Infallible {
        tokio::time::sleep(PATIENCE).await;
        self.try_itself(target);
        std::future::pending().await
    }

    /// Tries a task until it accepts, where there is a choice.
    fn try_itself(&self, target: &Target) {
        if self.balance.begins_trial(target) {
            let (upstream, target) = (self.clone(), target.clone());
            self.trials.spawn("mesh-trial", async move { upstream.trial(&target).await });
        }
    }

    async fn trial(&self, target: &Target) {
        let time = if target.passage.is_some() { PASSAGE_ATTEMPT_TIMEOUT } else { ATTEMPT_TIMEOUT };
        loop {
            let opened = within(time, self.open(target)).await;
            let is_accepted = opened.is_ok();
            match opened.map_err(|error| reason_of(&error)) {
                Ok(_) => self.balance.take_back(target),
                Err(Some(reason)) => self.balance.leave_out(target, reason),
                Err(None) => {} // The node could not try.
            }
            // Whoever accepted is not suspected for a while.
            if !is_accepted && self.balance.ends_trial(target) {
                return;
            }
            tokio::time::sleep(ATTEMPT_PAUSE).await;
            if self.balance.ends_trial(target) {
                return;
            }
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
        let connected = TcpStream::connect(target).await;
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
        let mut backend = self.open(target).await?;
        match &mut backend {
            Backend::Stream(stream) => stream.write_all(&header).await?,
            Backend::Carrier(carrier) => carrier.write_all(&header).await?,
        }
        Ok(backend)
    }

    async fn open(&self, target: &Target) -> io::Result<Backend> {
        match (&target.passage, &self.passages) {
            (None, _) => TcpStream::connect(target.address).await.map(Backend::Stream),
            (Some(passage), Some(passages)) => passages.open(passage).await.map(Backend::Carrier),
            (Some(_), None) => Err(io::ErrorKind::NetworkUnreachable.into()),
        }
    }
}

/// The task has no place left.
struct Full;

async fn within<T>(time: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let result = tokio::time::timeout(time, work).await;
    result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
