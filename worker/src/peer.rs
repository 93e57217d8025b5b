//! What a node answers to other nodes: blobs of its images, output of its tasks, connections to them, what of
//! their packets arrives.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use skep_common::TaskId;
use skep_common::limits::QUEUE_LENGTH;
use skep_proto::peer_server::Peer;
use skep_proto::{
    BlobChunk, BlobRequest, CheckPathRequest, LogRecord, PathReport, Piece, TaskLogsRequest,
};
use skep_runtime::access::Caller;
use skep_runtime::identity::verify_grant;
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::Tls;
use skep_runtime::{TaskSet, clock};
use skep_worker_core::image::Digest;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::embedded::uplink::Uplink;
use crate::images::ImageStore;
use crate::passage::Entrance;
use crate::path::Paths;

/// Reads the output of tasks. [`crate::embedded::Embedded`] has the one for real containers.
#[tonic::async_trait]
pub trait TaskLogs: Send + Sync + std::fmt::Debug + 'static {
    /// Sends records until the log ends (or, following, until the container has ended or nobody
    /// listens).
    async fn read(
        &self,
        task_id: TaskId,
        request: &TaskLogsRequest,
        records: mpsc::Sender<Result<LogRecord, Status>>,
    ) -> Result<(), Status>;
}

/// The service behind `skep.v1.Peer`.
#[derive(Debug, Clone)]
pub struct PeerService {
    images: ImageStore,
    logs: Arc<dyn TaskLogs>,
    tls: Tls,
    tasks: TaskSet,
    /// Where the tunnel ends here; without it no way is probed.
    paths: Option<Paths>,
    /// Where other nodes' connections come in; without it none do.
    entrance: Option<Entrance>,
}

impl PeerService {
    /// Serves the images and logs of this node.
    pub fn new(images: ImageStore, logs: Arc<dyn TaskLogs>, tls: Tls, tasks: TaskSet) -> Self {
        Self { images, logs, tls, tasks, paths: None, entrance: None }
    }

    /// Also probes the way from this node to others.
    #[must_use]
    pub fn with_uplink(self, uplink: Uplink) -> Self {
        Self { paths: Some(Paths::new(uplink)), ..self }
    }

    /// Also takes other nodes' connections to tasks of this one.
    #[must_use]
    pub fn with_entrance(self, entrance: Entrance) -> Self {
        Self { entrance: Some(entrance), ..self }
    }

    /// The output of one of this node's tasks.
    pub fn read_logs(
        &self,
        request: TaskLogsRequest,
    ) -> Result<ReceiverStream<Result<LogRecord, Status>>, Status> {
        let task_id = request.task_id.parse::<TaskId>();
        let task_id = task_id.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let (records, stream) = mpsc::channel(QUEUE_LENGTH);
        let logs = Arc::clone(&self.logs);
        let stopping = self.tasks.token();
        self.tasks.spawn_to_end("send logs", async move {
            let failures = records.clone();
            let status = tokio::select! {
                read = logs.read(task_id, &request, records) => read.err(),
                // An end without an error would be that of the log.
                () = stopping.cancelled() => Some(Status::unavailable("the daemon is stopping")),
            };
            if let Some(status) = status {
                let _ = failures.try_send(Err(status)); // Its connection breaks, or has broken.
            }
        });
        Ok(ReceiverStream::new(stream))
    }

    /// The blob's file, where the grant names an image that has it.
    async fn granted(&self, request: &Request<BlobRequest>) -> Result<crate::images::Blob, Status> {
        let caller = Caller::node_id(request)?;
        let request = request.get_ref();
        let root = self.tls.credentials().root_pem;
        let image = verify_grant(&root, &request.grant, caller, clock::now());
        let image = image.map_err(|error| Status::permission_denied(error.to_string()))?;
        let unreadable = |what: &str| Status::invalid_argument(format!("{what:?} is not a digest"));
        let image: Digest = image.parse().map_err(|_| unreadable(&image))?;
        let digest: Digest = request.digest.parse().map_err(|_| unreadable(&request.digest))?;
        let blobs = self.images.blobs_of(image).await.map_err(|error| not_here(&error))?;
        if !blobs.iter().any(|blob| blob.digest == digest) {
            return Err(Status::permission_denied(format!("the grant is not for {digest}")));
        }
        self.images.open_blob(digest).await.map_err(|error| not_here(&error))
    }
}

fn not_here(error: &crate::images::Error) -> Status {
    Status::not_found(Chain(error).to_string())
}

#[tonic::async_trait]
impl Peer for PeerService {
    type BlobStream = futures::stream::BoxStream<'static, Result<BlobChunk, Status>>;
    type TaskLogsStream = ReceiverStream<Result<LogRecord, Status>>;
    type ConnectStream = futures::stream::BoxStream<'static, Result<Piece, Status>>;
    type CheckPathStream = ReceiverStream<Result<PathReport, Status>>;

    async fn check_path(
        &self,
        request: Request<Streaming<CheckPathRequest>>,
    ) -> Result<Response<Self::CheckPathStream>, Status> {
        let paths = self.paths.clone();
        let paths = paths.ok_or_else(|| Status::unimplemented("this node has no tunnel"))?;
        let (reports, stream) = mpsc::channel(QUEUE_LENGTH);
        self.tasks.spawn("check path", async move {
            if let Err(status) = paths.run(request.into_inner(), &reports).await {
                let _ = reports.try_send(Err(status)); // The manager has gone.
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn connect(
        &self,
        request: Request<Streaming<Piece>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let caller = Caller::node_id(&request)?;
        let entrance = self.entrance.as_ref();
        let entrance = entrance.ok_or_else(|| Status::unimplemented("this node has no mesh"))?;
        let answer = entrance.connect(caller, request.into_inner(), &self.tasks).await?;
        Ok(Response::new(answer.map(Ok).boxed()))
    }

    async fn blob(
        &self,
        request: Request<BlobRequest>,
    ) -> Result<Response<Self::BlobStream>, Status> {
        let blob = self.granted(&request).await?;
        let size = blob.size;
        let chunks = blob.stream(request.get_ref().offset).await;
        let chunks = chunks.map_err(|error| Status::internal(error.to_string()))?;
        let chunk = move |data: std::io::Result<Bytes>| match data {
            Ok(data) => Ok(BlobChunk { data, size }),
            Err(error) => Err(Status::internal(format!("failed to read the blob: {error}"))),
        };
        Ok(Response::new(chunks.map(chunk).boxed()))
    }

    async fn task_logs(
        &self,
        request: Request<TaskLogsRequest>,
    ) -> Result<Response<Self::TaskLogsStream>, Status> {
        Ok(Response::new(self.read_logs(request.into_inner())?))
    }
}
