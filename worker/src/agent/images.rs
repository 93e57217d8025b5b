//! The images that this node's assignments name: fetched from their holders, kept, and given up.
//!
//! A task asks with [`Images::ensure`]; a copy that this node keeps for the swarm is fetched by itself.
//! Both share the work of one fetch.
//!
//! # Invariants
//!
//! - What no assignment names, no task of this node needs and nobody has just loaded is deleted, with
//!   the next assignments that say so or when its last task is erased; also what an earlier session or
//!   an earlier daemon left.
//! - Until the first assignments of this daemon nothing is deleted: nobody has said yet what to keep.
//! - An image that was loaded here is kept until an assignment has named it: the leader whose word it is
//!   may not know it yet.

#[cfg(test)]
pub(super) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use skep_common::Task;
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
    /// Whether a leader has said what is assigned.
    is_told: bool,
    held: BTreeSet<String>,
    /// Images of tasks whose containers are not erased.
    in_use: BTreeSet<Digest>,
    /// Loaded here, and not named by an assignment since.
    loaded: BTreeSet<String>,
    /// Images with a task that fetches them for as long as they are assigned.
    fetching: BTreeSet<String>,
    reports: Option<mpsc::Sender<(String, ImageHolding)>>,
}

impl State {
    fn keeps(&self, digest: &str) -> bool {
        self.assigned.contains_key(digest)
            || self.loaded.contains(digest)
            || digest.parse().is_ok_and(|digest| self.in_use.contains(&digest))
    }

    /// What must stay; all else counts as not held from now on.
    fn kept(&mut self) -> BTreeSet<Digest> {
        let mut held = std::mem::take(&mut self.held);
        held.retain(|digest| self.keeps(digest));
        self.held = held;
        let named = self.assigned.keys().chain(&self.loaded).filter_map(|text| text.parse().ok());
        named.chain(self.in_use.iter().copied()).collect()
    }
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

    /// Notes an image that was loaded on this node. Its pin must live until then.
    pub fn note_loaded(&self, digest: &str) {
        let mut state = self.inner.state.lock().expect(NOT_POISONED);
        state.held.insert(digest.to_owned());
        if !state.assigned.contains_key(digest) {
            state.loaded.insert(digest.to_owned());
        }
    }

    /// Notes the images of all tasks whose containers are not erased.
    pub(super) fn note_in_use(&self, in_use: BTreeSet<Digest>) {
        let mut state = self.inner.state.lock().expect(NOT_POISONED);
        state.in_use = in_use;
        if state.is_told && state.held.iter().any(|digest| !state.keeps(digest)) {
            self.collect();
        }
    }

    /// Deletes what is not to be kept when it comes to it.
    fn collect(&self) {
        let images = self.clone();
        self.inner.tasks.spawn("delete images", async move {
            let inner = images.inner.clone();
            let keep = move || inner.state.lock().expect(NOT_POISONED).kept();
            if let Err(error) = images.inner.store.retain(keep).await {
                tracing::warn!(error = %Chain(&error), "failed to delete images that are not needed");
            }
        });
    }

    pub(super) fn report_to(&self, reports: mpsc::Sender<(String, ImageHolding)>) {
        self.inner.state.lock().expect(NOT_POISONED).reports = Some(reports);
    }

    /// Takes over what the leader assigned, begins to fetch what is missing, and deletes what is not to be
    /// kept any more. The images of tasks that came with it are noted as in use already.
    pub(super) fn assign(&self, is_whole: bool, images: Vec<ImageAssignment>, removed: &[String]) {
        let mut state = self.inner.state.lock().expect(NOT_POISONED);
        if is_whole {
            state.assigned.clear();
            state.is_told = true;
        }
        for image in images {
            let digest = image.digest.clone();
            let is_news = !image.holders.is_empty();
            state.loaded.remove(&digest);
            state.assigned.insert(digest.clone(), image);
            if is_news && state.held.contains(&digest) {
                // The leader does not know that it is here.
                let (images, digest) = (self.clone(), digest.clone());
                self.inner.tasks.spawn("report an image", async move {
                    images.report(&digest, ImageHolding::Held).await;
                });
                continue;
            }
            if !state.held.contains(&digest) && state.fetching.insert(digest.clone()) {
                let images = self.clone();
                self.inner
                    .tasks
                    .spawn("fetch an image", async move { images.fetch_copy(digest).await });
            }
        }
        for digest in removed {
            state.assigned.remove(digest);
        }
        if is_whole || !removed.is_empty() {
            self.collect();
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
        if self.take_in(digest) {
            self.report(digest, ImageHolding::Held).await;
        }
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
            {
                let mut state = self.inner.state.lock().expect(NOT_POISONED);
                if !state.assigned.contains_key(&digest) || state.held.contains(&digest) {
                    state.fetching.remove(&digest);
                    return;
                }
            }
            if let Err(error) = self.fetch(&digest, image).await {
                let why = Chain(&error).to_string();
                tracing::warn!(digest, error = why, "failed to fetch an image");
                self.report(&digest, ImageHolding::Missing(why)).await;
            } else {
                continue; // Another look: it may have been given up meanwhile.
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(COPY_RETRY_MAX);
        }
    }

    /// Counts an image that was fetched as held, unless it was given up meanwhile.
    fn take_in(&self, digest: &str) -> bool {
        let mut state = self.inner.state.lock().expect(NOT_POISONED);
        let is_kept = state.keeps(digest);
        if is_kept {
            state.held.insert(digest.to_owned());
        } else {
            self.collect();
        }
        is_kept
    }

    async fn report(&self, digest: &str, holding: ImageHolding) {
        let reports = self.inner.state.lock().expect(NOT_POISONED).reports.clone();
        if let Some(reports) = reports {
            let _ = reports.send((digest.to_owned(), holding)).await; // The agent has ended.
        }
    }
}

/// The image that a task is pinned to.
pub(super) fn image_of(task: &Task) -> Option<Digest> {
    let container = task.spec.container_spec.as_ref()?;
    container.image.rsplit_once('@')?.1.parse().ok()
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
