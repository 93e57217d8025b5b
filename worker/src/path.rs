//! What a node answers to a manager that has it probe the way to another node.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use skep_proto::check_path_request::Step;
use skep_proto::{CheckPathRequest, PathReport, ProbeCount};
use tokio::sync::{Mutex, mpsc};
use tonic::{Status, Streaming};

use crate::net::Options;
use crate::net::path::{Ends, Path, Seen};
use crate::net::thread::KernelThread;

/// A manager that says nothing for so long is gone; the other node's part may take a while.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

type Reports = mpsc::Sender<Result<PathReport, Status>>;

/// Checks from this node; one at a time. Clones share that.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    underlay: Ipv4Addr,
    checking: Arc<Mutex<()>>,
}

impl Paths {
    pub(crate) fn new(underlay: Ipv4Addr) -> Self {
        Self { underlay, checking: Arc::default() }
    }

    /// Does each step that is asked for, and answers it.
    pub(crate) async fn run(
        &self,
        mut requests: Streaming<CheckPathRequest>,
        reports: &Reports,
    ) -> Result<(), Status> {
        let Ok(_checking) = self.checking.try_lock() else {
            let busy = "another check is under way on this node: ask again when it is done";
            return Err(Status::resource_exhausted(busy));
        };
        let ends = self.ends(&next(&mut requests, Step::Observe).await?)?;
        let observe = move || Path::observe(ends).map(|path| (Some(path), ()));
        let (thread, ()) = KernelThread::start("skep-path", observe).await.map_err(internal)?;
        answer(reports, PathReport::default()).await?;
        next(&mut requests, Step::Send).await?;
        let send = |path: &mut Option<Path>| path.as_mut().map(Path::send);
        thread.run(send).await.map_err(internal)?;
        answer(reports, PathReport::default()).await?;
        next(&mut requests, Step::Report).await?;
        let seen = thread.run(|path| path.take().map(Path::report)).await.map_err(internal)?;
        let seen = seen.transpose().map_err(internal)?.unwrap_or_default();
        answer(reports, report(&seen)).await
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
        let options = Options::new(number_of_self, self.underlay, "", "");
        Ok(Ends {
            underlay: self.underlay,
            number: number_of_self,
            peer_underlay,
            peer_number: number(request.peer_number)?,
            vni: options.vni,
            vxlan_port: options.vxlan_port,
            token: request.token,
        })
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
    }
}
