//! Backends that refuse or do not answer: sees them, tries them, and has the rules go without them.
//!
//! The rules note which backends are asked and which answer (`layout`). [`watch`] has these notes read
//! as long as a port has backends to choose from, connects to whom the core suspects, and tells what came
//! of it; the thread of the mesh decides ([`Ejections`]) and changes its rules itself. Two looks after that have the
//! kernel forget requests that were not answered. No packet and no connection passes here.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use skep_runtime::telemetry::Chain;
use skep_runtime::{TaskSet, clock};
use skep_worker_core::mesh::{
    Change, Ejections, Endpoint, MeshTable, Objects, Outcome, PATIENCE, PortKey, Reason, Times,
};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::flows::Lost;
use super::kernel::Kernel;
use super::layout::{self, ANSWERED, ASKED, NOTED};
use super::options::TABLE;
use crate::net::Error;
use crate::net::conntrack::Conntrack;
use crate::net::nft::{Family, NftChannel};
use crate::net::thread::KernelThread;

/// How long a backend may take to accept the node's own attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(100);

/// How long between two readings of the notes while connections are made.
const BUSY_PAUSE: Duration = PATIENCE;

/// How long while there are none; a first failure is noticed that much later.
const QUIET_PAUSE: Duration = Duration::from_millis(100);

/// How long between two looks at requests that a backend that was left out did not answer: it has as long for
/// them as for the node's own attempt.
const LOOK_PERIOD: Duration = ATTEMPT_TIMEOUT;

/// The same after a look that failed.
const LOOK_RETRY: Duration = Duration::from_secs(1);

/// How long after the notes could not be read.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);

/// What there is to do after a reading of the notes.
#[derive(Debug)]
pub(super) struct Sample {
    /// Backends to connect to.
    to_try: Vec<Endpoint>,
    /// When to read again; `None` where that depends on another table.
    pause: Option<Duration>,
}

/// What is left out, and what it is decided by.
#[derive(Debug)]
pub(super) struct Ejector {
    ejections: Ejections,
    /// What the rules go without.
    left_out: BTreeSet<(PortKey, Endpoint)>,
    lost: Lost,
    /// When to look at requests to those that were left out, where another look is needed.
    look_at: Option<Instant>,
    /// How the last look failed.
    look_failure: Option<String>,
    channels: [NftChannel; 2],
    /// Opened when it is needed first.
    connections: Option<Conntrack>,
    started: Instant,
}

impl Ejector {
    /// Opens the kernel's notes in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self, Error> {
        let channels = [NftChannel::open_of(Family::Ipv4)?, NftChannel::open_of(Family::Ipv6)?];
        Ok(Self {
            ejections: Ejections::default(),
            left_out: BTreeSet::new(),
            lost: Lost::default(),
            look_at: None,
            look_failure: None,
            channels,
            connections: None,
            started: clock::monotonic(),
        })
    }

    pub(super) fn learn(&mut self, table: &MeshTable, served: [&Objects; 2]) {
        self.ejections.learn(table, served);
    }

    /// What the rules are to go without.
    pub(super) fn left_out(&self) -> BTreeSet<(PortKey, Endpoint)> {
        self.ejections.left_out()
    }

    /// Whether the rules go without something else.
    pub(super) fn is_due(&self) -> bool {
        self.ejections.left_out() != self.left_out
    }

    fn now(&self) -> Duration {
        clock::monotonic().duration_since(self.started)
    }

    pub(super) fn sample(&mut self) -> Result<Sample, Error> {
        if self.look_at.is_some_and(|at| at <= clock::monotonic()) {
            self.look();
        }
        let until_look = self.look_at.map(|at| at.saturating_duration_since(clock::monotonic()));
        if self.ejections.is_idle() {
            return Ok(Sample { to_try: Vec::new(), pause: until_look });
        }
        let asked = self.read(ASKED)?;
        // Nobody can have answered who was not asked.
        let answered = if asked.is_empty() { Times::new() } else { self.read(ANSWERED)? };
        let to_try = self.ejections.observe(&asked, &answered, self.now());
        let pause = if asked.is_empty() { QUIET_PAUSE } else { BUSY_PAUSE };
        Ok(Sample { to_try, pause: Some(until_look.map_or(pause, |until| until.min(pause))) })
    }

    fn read(&mut self, set: &str) -> Result<Times, Error> {
        let mut times = Times::new();
        for number in 0..self.channels.len() {
            let records = self.channels[number].ages(TABLE, set)?;
            let now = self.now();
            times.extend(records.into_iter().filter_map(|record| {
                let age = NOTED.saturating_sub(record.expires_in);
                Some((layout::read_endpoint(&record.key)?, now.saturating_sub(age)))
            }));
        }
        Ok(times)
    }

    pub(super) fn conclude(&mut self, endpoint: &Endpoint, outcome: Outcome) {
        self.ejections.conclude(endpoint, outcome, self.now());
    }

    /// To be called when the rules go without what [`Self::left_out`] said, and [`Self::sample`] after that.
    pub(super) fn settle(&mut self) {
        let left_out = self.ejections.left_out();
        for change in self.ejections.changes(&self.left_out, &left_out) {
            let task = match &change {
                Change::LeftOut(_, backend, _) | Change::TakenBack(_, backend) => {
                    self.ejections.task_id(backend)
                }
                Change::NoneAnswers(_) => "",
            };
            report(&change, task);
        }
        let before = std::mem::replace(&mut self.left_out, left_out);
        let added: BTreeSet<_> = self.left_out.difference(&before).copied().collect();
        let taken_back = before.difference(&self.left_out).copied().collect();
        self.lost.forgive(&taken_back);
        if !added.is_empty() {
            self.lost.extend(added);
            // Not before it is due: two looks in a row would be one.
            self.look_at.get_or_insert_with(clock::monotonic);
        }
    }

    /// Looks at requests that were not answered. A failure does not keep it from looking for backends that fail.
    fn look(&mut self) {
        let (pause, failure) = match self.lost.look(&mut self.connections) {
            Ok(is_unsettled) => (is_unsettled.then_some(LOOK_PERIOD), None),
            Err(error) => (Some(LOOK_RETRY), Some(Chain(&error).to_string())),
        };
        if failure.is_some() && failure != self.look_failure {
            let error = failure.as_deref();
            tracing::warn!(
                error,
                "clients of tasks that do not answer may wait longer than they must"
            );
        }
        self.look_failure = failure;
        self.look_at = pause.map(|pause| clock::monotonic() + pause);
    }
}

/// Says what changed of a port, and of that task.
pub(super) fn report(change: &Change, task: &str) {
    match change {
        Change::LeftOut(port, backend, reason) => {
            let reason = match reason {
                Reason::Refused => "refuses connections",
                Reason::Silent => "does not answer",
            };
            tracing::warn!(
                %port, task, %backend, reason,
                "a task gets no connections from this node until it accepts them again"
            );
        }
        Change::TakenBack(port, backend) => {
            tracing::info!(%port, task, %backend, "a task accepts connections again");
        }
        Change::NoneAnswers(port) => {
            tracing::warn!(
                %port,
                "no task of the port accepts connections, so all of them get some; look at its service"
            );
        }
    }
}

/// Has the notes read and suspects tried until `tasks` ends. `table_changed` says that there is another
/// table.
pub(super) fn start(
    tasks: &TaskSet,
    kernel: Arc<KernelThread<Kernel>>,
    table_changed: Arc<Notify>,
) {
    tasks.spawn("mesh-ejection", async move {
        // It ends where the thread of the mesh does.
        if let Err(error) = watch(&kernel, &table_changed).await {
            tracing::debug!(%error, "failing tasks are not looked for any more");
        }
    });
}

async fn watch(kernel: &KernelThread<Kernel>, table_changed: &Notify) -> Result<(), Error> {
    let mut attempts = FuturesUnordered::new();
    let mut pause = None;
    loop {
        let timer = async {
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = timer => {}
            () = table_changed.notified() => {}
            Some((endpoint, outcome)) = attempts.next() => {
                let concluded = kernel.run(move |kernel| kernel.conclude(&endpoint, outcome));
                warn_of(concluded.await?);
            }
        }
        let sample = match kernel.run(Kernel::sample).await? {
            Ok(sample) => sample,
            Err(error) => {
                warn_of(Err(error));
                Sample { to_try: Vec::new(), pause: Some(FAILURE_PAUSE) }
            }
        };
        pause = sample.pause;
        attempts.extend(sample.to_try.into_iter().map(attempt));
    }
}

fn warn_of(result: Result<(), Error>) {
    if let Err(error) = result {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "failed to look for tasks that do not answer");
    }
}

/// Connects to a backend by the way that its connections take.
async fn attempt(endpoint: Endpoint) -> (Endpoint, Outcome) {
    let address = SocketAddr::new(endpoint.address, endpoint.port);
    let connected = tokio::time::timeout(ATTEMPT_TIMEOUT, TcpStream::connect(address)).await;
    let outcome = match connected {
        Ok(Ok(_)) => Outcome::Accepted,
        Ok(Err(error)) => reason_of(&error).map_or_else(
            || {
                tracing::debug!(%address, %error, "failed to try a task");
                Outcome::Unknown
            },
            Outcome::Failed,
        ),
        Err(_) => Outcome::Failed(Reason::Silent),
    };
    (endpoint, outcome)
}

/// What an attempt to connect that failed says of a backend; `None` where it says something of this node alone.
pub(super) fn reason_of(error: &io::Error) -> Option<Reason> {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Some(Reason::Refused),
        io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::TimedOut => Some(Reason::Silent),
        _ => None,
    }
}
