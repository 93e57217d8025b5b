//! The images that this node's assignments name: fetched from their holders, kept, and given up.
//!
//! A task asks with [`Images::ensure`]; a copy that this node keeps for the swarm is fetched by itself.
//! Both share the work of one fetch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use skep_proto::peer_client::PeerClient;
use skep_proto::{BlobRequest, ImageAssignment, ImageReport};
use skep_runtime::TaskSet;
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::{ChannelPool, Peer};
use skep_worker_core::image::Digest;
use tokio::sync::mpsc;

use crate::images::{BlobSource, BlobStream, Error, Holder, ImageStore, Progress, SourceError};

/// First pause after a copy could not be fetched; doubled up to a minute.
const COPY_RETRY_MIN: Duration = Duration::from_millis(500);
const COPY_RETRY_MAX: Duration = Duration::from_secs(60);

/// Whether this node holds an image, as its leader shall know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageHolding {
    /// All blobs are here.
    Held,
    /// It cannot be had now, for this reason.
    Missing(String),
}

/// The images of this node; clones are the same.
#[derive(Debug, Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: ImageStore,
    pool: ChannelPool,
    tasks: TaskSet,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    assigned: BTreeMap<String, ImageAssignment>,
    held: std::collections::BTreeSet<String>,
    reports: Option<mpsc::Sender<(String, ImageHolding)>>,
}

const NOT_POISONED: &str = "nothing panics while it holds the image table";

impl Images {
    /// Serves the images of `store`, which holds complete ones already.
    pub async fn new(store: ImageStore, pool: ChannelPool, tasks: TaskSet) -> Result<Self, Error> {
        let held = store.list().await?.into_iter().map(|image| image.digest.to_string()).collect();
        let state = Mutex::new(State { held, ..State::default() });
        Ok(Self { inner: Arc::new(Inner { store, pool, tasks, state }) })
    }

    /// The store behind it.
    pub fn store(&self) -> &ImageStore {
        &self.inner.store
    }

    /// Digests of the images that are complete here.
    pub fn held(&self) -> Vec<String> {
        self.inner.state.lock().expect(NOT_POISONED).held.iter().cloned().collect()
    }

    /// Notes an image that was loaded on this node.
    pub fn note_loaded(&self, digest: &str) {
        self.inner.state.lock().expect(NOT_POISONED).held.insert(digest.to_owned());
    }

    pub(super) fn report_to(&self, reports: mpsc::Sender<(String, ImageHolding)>) {
        self.inner.state.lock().expect(NOT_POISONED).reports = Some(reports);
    }

    /// Takes over what the leader assigned, and begins to fetch what is missing.
    pub(super) fn assign(&self, is_whole: bool, images: Vec<ImageAssignment>, removed: &[String]) {
        let mut state = self.inner.state.lock().expect(NOT_POISONED);
        if is_whole {
            state.assigned.clear();
        }
        for image in images {
            let digest = image.digest.clone();
            let is_news = !image.holders.is_empty();
            let is_new = state.assigned.insert(digest.clone(), image).is_none();
            if is_news && state.held.contains(&digest) {
                // The leader does not know that it is here.
                let (images, digest) = (self.clone(), digest.clone());
                self.inner.tasks.spawn("report an image", async move {
                    images.report(&digest, ImageHolding::Held).await;
                });
                continue;
            }
            if is_new && !state.held.contains(&digest) {
                let images = self.clone();
                self.inner
                    .tasks
                    .spawn("fetch an image", async move { images.fetch_copy(digest).await });
            }
        }
        for digest in removed {
            state.assigned.remove(digest);
            if state.held.remove(digest) {
                let (images, digest) = (self.clone(), digest.clone());
                self.inner
                    .tasks
                    .spawn("give up an image", async move { images.give_up(&digest).await });
            }
        }
    }

    /// Makes an image complete on this node and returns its layers, lowest first.
    pub async fn ensure(&self, image: Digest) -> Result<Vec<std::path::PathBuf>, Error> {
        if !self.inner.store.has(image).await? {
            self.fetch(&image.to_string(), image).await?;
        }
        self.inner.store.layers(image).await
    }

    async fn fetch(&self, digest: &str, image: Digest) -> Result<(), Error> {
        let assignment = self.inner.state.lock().expect(NOT_POISONED).assigned.get(digest).cloned();
        let assignment = assignment.unwrap_or_default();
        let holders: Vec<Holder> = assignment
            .holders
            .iter()
            .filter_map(|holder| {
                let node_id = holder.node_id.parse().ok()?;
                Some(Holder { node_id, address: holder.addr.clone() })
            })
            .collect();
        let source = PeerSource { pool: self.inner.pool.clone(), grant: assignment.grant };
        self.inner.store.fetch(image, &holders, &source, &Progress::default()).await?;
        self.report(digest, ImageHolding::Held).await;
        Ok(())
    }

    /// Fetches a copy that was assigned, for as long as it is.
    async fn fetch_copy(&self, digest: String) {
        let Ok(image) = digest.parse::<Digest>() else {
            tracing::warn!(digest, "ignoring an image with an unreadable digest");
            return;
        };
        let mut pause = COPY_RETRY_MIN;
        loop {
            let is_wanted = {
                let state = self.inner.state.lock().expect(NOT_POISONED);
                state.assigned.contains_key(&digest) && !state.held.contains(&digest)
            };
            if !is_wanted {
                return;
            }
            match self.fetch(&digest, image).await {
                Ok(()) => return,
                Err(error) => {
                    let why = Chain(&error).to_string();
                    tracing::warn!(digest, error = why, "failed to fetch an image");
                    self.report(&digest, ImageHolding::Missing(why)).await;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(COPY_RETRY_MAX);
        }
    }

    async fn give_up(&self, digest: &str) {
        let Ok(image) = digest.parse::<Digest>() else { return };
        if let Err(error) = self.inner.store.remove(image).await {
            tracing::warn!(digest, error = %Chain(&error), "failed to delete an image");
        }
    }

    async fn report(&self, digest: &str, holding: ImageHolding) {
        let reports = {
            let mut state = self.inner.state.lock().expect(NOT_POISONED);
            if holding == ImageHolding::Held {
                state.held.insert(digest.to_owned());
            }
            state.reports.clone()
        };
        if let Some(reports) = reports {
            let _ = reports.send((digest.to_owned(), holding)).await; // The agent has ended.
        }
    }
}

pub(super) fn report(digest: &str, holding: &ImageHolding) -> ImageReport {
    let error = match holding {
        ImageHolding::Held => String::new(),
        ImageHolding::Missing(why) => why.clone(),
    };
    ImageReport { digest: digest.to_owned(), held: *holding == ImageHolding::Held, error }
}

/// Opens blobs on other nodes with the leader's grant.
#[derive(Debug)]
struct PeerSource {
    pool: ChannelPool,
    grant: bytes::Bytes,
}

impl BlobSource for PeerSource {
    fn open<'a>(
        &'a self,
        holder: &'a Holder,
        digest: Digest,
        offset: u64,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        async move {
            let channel = self.pool.fresh(&holder.address, Peer::Node(holder.node_id));
            let request =
                BlobRequest { digest: digest.to_string(), offset, grant: self.grant.clone() };
            let answer = PeerClient::new(channel).blob(request).await.map_err(said)?;
            let chunks = answer.into_inner().map_ok(|chunk| chunk.data).map_err(said);
            Ok(chunks.boxed() as BlobStream)
        }
        .boxed()
    }
}

/// What a node said, without the decoration of a gRPC status.
fn said(status: tonic::Status) -> SourceError {
    status.message().to_owned().into()
}
