//! `image load` and `image import`: from the client's stream into the store, then to the swarm.

use std::io;

use bytes::Bytes;
use skep_proto::dispatcher_client::DispatcherClient;
use skep_proto::load_image_request::Part;
use skep_proto::{
    LoadImageHeader, LoadImageRequest, LoadImageResponse, LoadedImage, RegisterImageRequest,
};
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::Peer;
use skep_worker::images::Loaded;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tonic::{Request, Status, Streaming};

use super::machine::{Machine, Membership};

/// Chunks between the client and the disk.
const CHUNKS_MAX: usize = 16;

pub(super) async fn load(
    machine: &Machine,
    mut stream: Streaming<LoadImageRequest>,
) -> Result<LoadImageResponse, Status> {
    let header = match stream.next().await {
        Some(Ok(LoadImageRequest { part: Some(Part::Header(header)) })) => header,
        _ => return Err(Status::invalid_argument("an image upload begins with a header")),
    };
    let (chunks, received) = mpsc::channel(CHUNKS_MAX);
    let reader = Reader { received, current: Bytes::new() };
    let receive = async move {
        while let Some(message) = stream.next().await {
            let chunk = match message {
                Ok(LoadImageRequest { part: Some(Part::Data(data)) }) => Ok(data),
                Ok(_) => Err(io::Error::other("a second header")),
                Err(status) => Err(io::Error::other(status.message().to_owned())),
            };
            let is_end = chunk.is_err();
            if chunks.send(chunk).await.is_err() || is_end {
                return; // The store has read what it needs, or has failed and says why.
            }
        }
    };
    let (stored, ()) = tokio::join!(store(machine, header, reader), receive);
    let loaded = stored?;
    let mut images = Vec::new();
    for image in &loaded {
        register(machine, image).await?;
        images.push(LoadedImage { names: image.names.clone(), digest: image.digest.to_string() });
    }
    Ok(LoadImageResponse { images })
}

async fn store(
    machine: &Machine,
    header: LoadImageHeader,
    reader: Reader,
) -> Result<Vec<Loaded>, Status> {
    let store = &machine.inner.image_store;
    let result = if header.import {
        let name = Some(header.name.as_str()).filter(|name| !name.is_empty());
        store.import(reader, name, &header.changes).await.map(|image| vec![image])
    } else {
        store.load(reader).await
    };
    result.map_err(|error| Status::invalid_argument(Chain(&error).to_string()))
}

/// Tells the swarm that this node has the image, under its names. Outside of a swarm there is nobody to
/// tell, and no service to run it.
async fn register(machine: &Machine, image: &Loaded) -> Result<(), Status> {
    let node = match machine.membership() {
        Membership::Member(node) => node,
        Membership::Outside => {
            return Err(Status::failed_precondition(
                "the image was loaded, but this node is in no swarm that could use it: skep swarm init, then load it again",
            ));
        }
        Membership::Locked(_) => {
            let why = super::unlock::locked();
            let why = format!("the image was loaded, but this node is locked: {}", why.message());
            return Err(Status::failed_precondition(why));
        }
        Membership::Failed(obstacle) => {
            let why = &obstacle.sentence;
            return Err(Status::failed_precondition(format!("the image was loaded, but {why}")));
        }
    };
    let internal = |error: skep_worker::images::Error| Status::internal(Chain(&error).to_string());
    let digest = image.digest.to_string();
    let config = node.images.store().config(image.digest).await.map_err(internal)?;
    node.images.note_loaded(&digest);
    let request = RegisterImageRequest {
        names: image.names.clone(),
        digest,
        size: config.size_bytes,
        created: config.created.unwrap_or_default(),
    };
    let mut last = Status::unavailable("no manager is known");
    for manager in node.managers.all() {
        let mut request = Request::new(request.clone());
        request.set_timeout(skep_common::limits::RPC_DEADLINE);
        let channel = node.pool.channel(&manager, Peer::Manager);
        match DispatcherClient::new(channel).register_image(request).await {
            Ok(_) => return Ok(()),
            Err(status) => last = status,
        }
    }
    Err(Status::unavailable(format!(
        "the image was loaded, but no manager took note of it ({}): load it again when one answers",
        last.message()
    )))
}

/// The client's bytes, for the store's blocking reader.
struct Reader {
    received: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl io::Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.received.blocking_recv() {
                Some(chunk) => self.current = chunk?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.current.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}
