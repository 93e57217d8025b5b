//! `service logs`: this manager asks the nodes that have the tasks, and passes their lines on.
//!
//! There is no broker: each node answers for its own tasks. When following, tasks that appear later
//! are joined as the store shows them.

use std::collections::BTreeSet;

use skep_common::limits::QUEUE_LENGTH;
use skep_common::{Kind, NodeId, ServiceId, Task, TaskId};
use skep_manager_core::State;
use skep_proto::peer_client::PeerClient;
use skep_proto::{LogRecord, ServiceLogsRequest, TaskLogsRequest};
use skep_runtime::transport::Peer;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::error::Error;
use super::{ControlService, parse_id};

type Records = mpsc::Sender<Result<LogRecord, Status>>;

pub(super) fn start(
    control: &ControlService,
    request: ServiceLogsRequest,
) -> Result<ReceiverStream<Result<LogRecord, Status>>, Error> {
    let services: BTreeSet<ServiceId> = request
        .service_ids
        .iter()
        .map(|id| parse_id(Kind::Service, id).map(ServiceId))
        .collect::<Result<_, _>>()?;
    let task_ids: BTreeSet<TaskId> = request
        .task_ids
        .iter()
        .map(|id| parse_id(Kind::Task, id).map(TaskId))
        .collect::<Result<_, _>>()?;
    let (records, stream) = mpsc::channel(QUEUE_LENGTH);
    let (control, tasks) = (control.clone(), control.inner.tasks.clone());
    tasks.spawn("service logs", async move {
        let wants =
            |task: &Task| services.contains(&task.service_id) || task_ids.contains(&task.id);
        run(&control, &request, wants, &records).await;
    });
    Ok(ReceiverStream::new(stream))
}

async fn run(
    control: &ControlService,
    request: &ServiceLogsRequest,
    wants: impl Fn(&Task) -> bool,
    records: &Records,
) {
    let mut feed = control.inner.consensus.subscribe();
    let mut state = match control.read().await {
        Ok(state) => state,
        Err(error) => {
            let _ = records.send(Err(error.into())).await; // The client is gone when this fails.
            return;
        }
    };
    // The readers end with this set: when the client goes, or this function returns.
    let readers = control.inner.tasks.child();
    let mut joined: BTreeSet<TaskId> = BTreeSet::new();
    let mut handles = Vec::new();
    loop {
        for task in state.tasks().values().filter(|task| wants(task) && task.node_id.is_some()) {
            // A task that is only assigned has no log yet; its next state brings us here again.
            if task.status.state < skep_common::TaskState::Starting || !joined.insert(task.id) {
                continue;
            }
            handles.push(read_task(control, &state, task, request, records, &readers));
        }
        if !request.follow {
            futures::future::join_all(handles).await;
            return;
        }
        tokio::select! {
            commit = feed.next() => match commit {
                Some(commit) => state = commit.state,
                None => break,
            },
            () = records.closed() => break,
        }
    }
    readers.cancel();
}

fn read_task(
    control: &ControlService,
    state: &State,
    task: &Task,
    request: &ServiceLogsRequest,
    records: &Records,
    readers: &skep_runtime::TaskSet,
) -> tokio::task::JoinHandle<()> {
    let node_id = task.node_id.unwrap_or(NodeId(0));
    let addr = state.node(node_id).map(|node| node.address()).unwrap_or_default();
    let channel = control.inner.pool.fresh(&addr, Peer::Node(node_id));
    let ask = TaskLogsRequest {
        task_id: task.id.to_string(),
        follow: request.follow,
        tail: request.tail,
        since_nanos: request.since_nanos,
    };
    let (task_id, service_id) = (task.id, task.service_id);
    let records = records.clone();
    readers.spawn("task logs", async move {
        let label = |mut record: LogRecord| {
            record.task_id = task_id.to_string();
            record.node_id = node_id.to_string();
            record.service_id = service_id.to_string();
            record
        };
        let mut client = PeerClient::new(channel);
        let failure = match client.task_logs(ask).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.next().await {
                        Some(Ok(record)) => {
                            if records.send(Ok(label(record))).await.is_err() {
                                return;
                            }
                        }
                        Some(Err(status)) => break status,
                        None => return,
                    }
                }
            }
            Err(status) => status,
        };
        let error = format!("no logs of task {task_id} from node {node_id}: {}", failure.message());
        let _ = records.send(Ok(label(LogRecord { error, ..LogRecord::default() }))).await;
    })
}
