//! `service logs`: this manager asks the nodes that have the tasks, and passes their lines on.
//!
//! There is no broker: each node answers for its own tasks. When following, tasks that appear later
//! are joined as the store shows them.

use std::collections::BTreeSet;
use std::time::Duration;

use skep_common::limits::QUEUE_LENGTH;
use skep_common::object::NodeState;
use skep_common::{Kind, Node, NodeId, ServiceId, Task, TaskId};
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

/// First pause before a broken stream is asked for again; a daemon restarts within a second or two.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);

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
    // Who asks looked up what it asks about, and was told then where that may be old.
    let mut state = match control.read_for_looking().await {
        Ok((state, _)) => state,
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
            handles.push(read_task(control, task, request, records, &readers));
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

/// One task's log, as it is passed on.
struct TaskLog {
    control: ControlService,
    task_id: TaskId,
    service_id: ServiceId,
    node_id: NodeId,
    ask: TaskLogsRequest,
    records: Records,
}

fn read_task(
    control: &ControlService,
    task: &Task,
    request: &ServiceLogsRequest,
    records: &Records,
    readers: &skep_runtime::TaskSet,
) -> tokio::task::JoinHandle<()> {
    let ask = TaskLogsRequest {
        task_id: task.id.to_string(),
        follow: request.follow,
        tail: request.tail,
        since_nanos: request.since_nanos,
        from: None,
    };
    let log = TaskLog {
        control: control.clone(),
        task_id: task.id,
        service_id: task.service_id,
        node_id: task.node_id.unwrap_or(NodeId(0)),
        ask,
        records: records.clone(),
    };
    readers.spawn("task logs", log.pass_on())
}

impl TaskLog {
    /// Passes the log on to its end. A follower outlasts a restart of the node's daemon, and the end of a
    /// container that the node follows by another one of the same task: what its stream had not brought is
    /// asked for again, from that place on.
    async fn pass_on(mut self) {
        let mut pause = RETRY_MIN;
        let mut had_end = false;
        loop {
            let from = self.ask.from;
            // Known before the log is read to its end: what is over by then writes no more.
            let is_over = is_over(&self.control.inner.consensus.state(), self.task_id);
            match self.read().await {
                Ok(()) if !self.ask.follow || is_over => return,
                Ok(()) => had_end = true,
                Err(status) if self.ask.follow && self.may_answer(&status) => {}
                // It was read to its end before its node forgot it.
                Err(status) if had_end && status.code() == tonic::Code::NotFound => return,
                Err(status) => return self.say(&status).await,
            }
            if self.ask.from != from {
                pause = RETRY_MIN;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.records.closed() => return,
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Says why there is no more of the log.
    async fn say(&self, status: &Status) {
        let (task_id, node_id, why) = (self.task_id, self.node_id, status.message());
        let error = format!("no logs of task {task_id} from node {node_id}: {why}");
        let record = self.labelled(LogRecord { error, ..LogRecord::default() });
        let _ = self.records.send(Ok(record)).await; // The client is gone when this fails.
    }

    /// Passes on what one stream brings. Fine if it ended, or nobody listens.
    async fn read(&mut self) -> Result<(), Status> {
        let state = self.control.inner.consensus.state();
        let address = state.node(self.node_id).map(|node| node.address()).unwrap_or_default();
        let channel = self.control.inner.pool.fresh(&address, Peer::Node(self.node_id));
        let mut stream = PeerClient::new(channel).task_logs(self.ask.clone()).await?.into_inner();
        while let Some(record) = stream.next().await {
            let mut record = record?;
            let behind = record.behind.take();
            if self.records.send(Ok(self.labelled(record))).await.is_err() {
                return Ok(());
            }
            self.ask.from = behind.or(self.ask.from);
        }
        Ok(())
    }

    fn labelled(&self, record: LogRecord) -> LogRecord {
        LogRecord {
            task_id: self.task_id.to_string(),
            node_id: self.node_id.to_string(),
            service_id: self.service_id.to_string(),
            ..record
        }
    }

    /// Whether the node may answer again: its stream broke, and managers have not given it up.
    fn may_answer(&self, status: &Status) -> bool {
        let state = self.control.inner.consensus.state();
        let is_up = |node: &Node| node.status.state != NodeState::Down;
        is_of_connection(status)
            && state.task(self.task_id).is_some()
            && state.node(self.node_id).is_some_and(|node| is_up(node))
    }
}

/// Whether a stream broke, rather than that its node refused.
fn is_of_connection(status: &Status) -> bool {
    use tonic::Code;
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled | Code::Aborted
    )
}

/// Whether a task starts no container any more.
fn is_over(state: &State, task_id: TaskId) -> bool {
    state.task(task_id).is_none_or(|task| task.status.state.is_terminal())
}
