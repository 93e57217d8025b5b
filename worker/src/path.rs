//! What a node answers to a manager that has it probe the way to another node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use skep_proto::check_path_request::Step;
use skep_proto::{CheckPathRequest, PassageReport, PathReport, ProbeCount, SecureReport};
use skep_runtime::clock;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tonic::{Status, Streaming};

use crate::embedded::uplink::Uplink;
use crate::net::Options;
use crate::net::path::{Ends, Path, SecurePorts, Seen};
use crate::net::secure::{Activity, PeerSession};
use crate::net::thread::KernelThread;

/// A manager that says nothing for so long is gone; the other node's part may take a while.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// How long WireGuard may take to ask for a session again, whose last question was lost
/// (`REKEY_TIMEOUT`, five seconds, and some jitter).
const SESSION_DEADLINE: Duration = Duration::from_secs(6);
const SESSION_LOOK_PERIOD: Duration = Duration::from_millis(50);

/// How long another node's daemon may take to accept, as for a client's connection.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(2);

type Reports = mpsc::Sender<Result<PathReport, Status>>;

/// Checks from this node; one at a time. Clones share that.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    uplink: Uplink,
    checking: Arc<Mutex<()>>,
}

impl Paths {
    pub(crate) fn new(uplink: Uplink) -> Self {
        Self { uplink, checking: Arc::default() }
    }

    /// Does each step that is asked for, and answers it.
    pub(crate) async fn run(
        &self,
        mut requests: Streaming<CheckPathRequest>,
        reports: &Reports,
    ) -> Result<(), Status> {
        let first = next(&mut requests, Step::Observe).await?;
        if !first.peer_daemon.is_empty() {
            let passage = Some(passage_to(&first.peer_daemon).await);
            return answer(reports, PathReport { passage, ..PathReport::default() }).await;
        }
        let Ok(_checking) = self.checking.try_lock() else {
            let busy = "another check is under way on this node: ask again when it is done";
            return Err(Status::resource_exhausted(busy));
        };
        let mut ends = self.ends(&first)?;
        let peer = ends.peer_number;
        let before = self.session_with(peer, false).await?;
        ends.secure = before.map(|session| ports(&session));
        let observe = move || Path::observe(ends).map(|path| (Some(path), ()));
        let (thread, ()) = KernelThread::start("skep-path", observe).await.map_err(internal)?;
        answer(reports, PathReport::default()).await?;
        next(&mut requests, Step::Send).await?;
        let send = |path: &mut Option<Path>| path.as_mut().map(Path::send);
        thread.run(send).await.map_err(internal)?;
        self.session_with(peer, true).await?;
        answer(reports, PathReport::default()).await?;
        next(&mut requests, Step::Report).await?;
        let secure = match before {
            Some(before) => Some(self.secure_report(peer, &before).await?),
            None => None,
        };
        let seen = thread.run(|path| path.take().map(Path::report)).await.map_err(internal)?;
        let seen = seen.transpose().map_err(internal)?.unwrap_or_default();
        let mut report = report(&seen);
        let secure = secure.unwrap_or_default();
        report.secure = Some(SecureReport {
            arrived: seen.secure_arrived,
            obstacles: seen.secure_obstacles,
            outgoing_obstacles: seen.secure_outgoing_obstacles,
            ..secure
        });
        answer(reports, report).await
    }

    async fn session_with(
        &self,
        number: u16,
        is_greeted: bool,
    ) -> Result<Option<PeerSession>, Status> {
        self.uplink.session_with(number, is_greeted).await.map_err(internal)
    }

    /// What there is with the other node when it was heard of, or has not been for too long.
    async fn secure_report(
        &self,
        number: u16,
        before: &PeerSession,
    ) -> Result<SecureReport, Status> {
        let deadline = clock::monotonic() + SESSION_DEADLINE;
        loop {
            let now = self.session_with(number, false).await?;
            let after = now.map_or(before.activity, |session| session.activity);
            let is_well = has_heard(&before.activity, &after) && after.last_handshake.is_some();
            if is_well || before.peer_port.is_none() || clock::monotonic() >= deadline {
                return Ok(secure_report(before, &after));
            }
            tokio::time::sleep(SESSION_LOOK_PERIOD).await;
        }
    }

    fn ends(&self, request: &CheckPathRequest) -> Result<Ends, Status> {
        let number = |number: u32| {
            let number = u16::try_from(number);
            number.map_err(|_| Status::invalid_argument("a node's number is a small one"))
        };
        let peer_underlay = request.peer_underlay.parse().map_err(|_| {
            let address = &request.peer_underlay;
            Status::invalid_argument(format!("{address:?} is no IPv4 address of a node"))
        })?;
        let number_of_self = number(request.self_number)?;
        let underlay = self.uplink.underlay();
        let options = Options::new(number_of_self, underlay, "", "");
        Ok(Ends {
            underlay,
            interface: self.uplink.interface().to_owned(),
            number: number_of_self,
            peer_underlay,
            peer_number: number(request.peer_number)?,
            vni: options.vni,
            vxlan_port: options.vxlan_port,
            token: request.token,
            secure: None,
        })
    }
}

/// Whether the daemon of another node accepts connections from this one.
async fn passage_to(daemon: &str) -> PassageReport {
    let start = clock::monotonic();
    let connected = tokio::time::timeout(ACCEPT_DEADLINE, TcpStream::connect(daemon)).await;
    let failure = match connected {
        Ok(Ok(_)) => String::new(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it does not accept within {} s", ACCEPT_DEADLINE.as_secs()),
    };
    let taken = clock::monotonic().saturating_duration_since(start);
    let connect_nanos = u64::try_from(taken.as_nanos()).unwrap_or(u64::MAX);
    PassageReport { failure, connect_nanos }
}

fn ports(session: &PeerSession) -> SecurePorts {
    SecurePorts { own: session.own_port, peer: session.peer_port }
}

/// Whether something came meanwhile; counters begin anew where an interface does.
fn has_heard(before: &Activity, after: &Activity) -> bool {
    after.received != before.received && after.received > 0
}

fn secure_report(before: &PeerSession, after: &Activity) -> SecureReport {
    let age = |age: Duration| i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
    SecureReport {
        is_shared: true,
        own_port: before.own_port.into(),
        peer_port: before.peer_port.map(Into::into),
        handshake_age_millis: after.last_handshake.map(age),
        sent: after.sent,
        received: after.received,
        has_heard: has_heard(&before.activity, after),
        ..SecureReport::default()
    }
}

async fn next(
    requests: &mut Streaming<CheckPathRequest>,
    step: Step,
) -> Result<CheckPathRequest, Status> {
    let request = tokio::time::timeout(REQUEST_DEADLINE, requests.message()).await;
    let request = request.map_err(|_| Status::deadline_exceeded("the manager asks no more"))??;
    let request = request.ok_or_else(|| Status::cancelled("the manager asks no more"))?;
    if request.step() != step {
        return Err(Status::invalid_argument(format!("the next step of a check is {step:?}")));
    }
    Ok(request)
}

async fn answer(reports: &Reports, report: PathReport) -> Result<(), Status> {
    let sent = reports.send(Ok(report)).await;
    sent.map_err(|_| Status::cancelled("the manager is gone"))
}

fn internal(error: crate::net::Error) -> Status {
    Status::internal(skep_runtime::telemetry::Chain(&error).to_string())
}

fn report(seen: &Seen) -> PathReport {
    let counts = |of: &BTreeMap<u16, u32>| -> Vec<ProbeCount> {
        let counts = of.iter();
        counts.map(|(size, count)| ProbeCount { size: (*size).into(), count: *count }).collect()
    };
    let mean = seen.round_trips.checked_div(seen.echoes).unwrap_or_default();
    PathReport {
        full_size: seen.full_size,
        sent: counts(&seen.sent),
        arrived: counts(&seen.arrived),
        passed: counts(&seen.passed),
        echoes: seen.echoes,
        round_trip_nanos: u64::try_from(mean.as_nanos()).unwrap_or(u64::MAX),
        obstacles: seen.obstacles.clone(),
        outgoing_obstacles: seen.outgoing_obstacles.clone(),
        encryption: match crate::net::secure::implementation() {
            Ok(name) => format!("of encrypted networks alone: {name}"),
            Err(reason) => format!("none: {reason}"),
        },
        secure: None,
        passage: None,
    }
}
