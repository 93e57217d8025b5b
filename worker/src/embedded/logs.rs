//! The output of this node's tasks, for the managers that ask.

use skep_common::{TaskId, Timestamp};
use skep_proto::{LogRecord, TaskLogsRequest};
use skep_runtime::telemetry::Chain;
use tokio::sync::mpsc;
use tonic::Status;

use super::Embedded;
use crate::container::{LogOptions, LogPosition, Stream};
use crate::peer::TaskLogs;

#[tonic::async_trait]
impl TaskLogs for Embedded {
    async fn read(
        &self,
        task_id: TaskId,
        request: &TaskLogsRequest,
        records: mpsc::Sender<Result<LogRecord, Status>>,
    ) -> Result<(), Status> {
        let from = request.from.map(|from| LogPosition { file: from.file, byte: from.byte });
        let options = LogOptions {
            from,
            tail: usize::try_from(request.tail).ok(),
            since: (request.since_nanos > 0).then_some(Timestamp(request.since_nanos)),
            follow: request.follow,
        };
        let unreadable =
            |error: crate::container::Error| Status::not_found(Chain(&error).to_string());
        let mut reader =
            self.inner.containers.logs(&task_id.to_string(), options).await.map_err(unreadable)?;
        loop {
            let next = tokio::select! {
                next = reader.next() => next,
                () = records.closed() => return Ok(()),
            };
            let Some(record) = next.map_err(unreadable)? else { return Ok(()) };
            let LogPosition { file, byte } = reader.position();
            let behind = skep_proto::LogPosition { file, byte };
            let mut line = record.line.into_bytes();
            if !record.is_partial {
                line.push(b'\n');
            }
            let record = LogRecord {
                time_nanos: record.time.0,
                stderr: record.stream == Stream::Stderr,
                line: line.into(),
                behind: Some(behind),
                ..LogRecord::default()
            };
            if records.send(Ok(record)).await.is_err() {
                return Ok(()); // Nobody listens any more.
            }
        }
    }
}
