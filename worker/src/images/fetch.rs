//! Fetches an image from the nodes that hold it.
//!
//! ```text
//! manifest ─► config ───────────────┐ diff ids
//!         └─► layer blobs, several ─┴─► each unpacked as soon as it is whole ─► image noted
//! ```
//!
//! # Invariants
//!
//! - A blob gets its name only after its digest was computed from the bytes that were written.
//! - A holder that lies, fails or stalls costs time, not the fetch: the next one is asked, and the
//!   suspect is asked last from then on. A blob fails only when every holder has failed it.
//! - What one holder gave before it failed is kept, and the next goes on from there. If the whole
//!   turns out wrong, nobody knows whose part it was: the same holder is asked once more for all
//!   of it, so that blame falls on the one who sent the wrong bytes.
//! - One blob is fetched once, however many tasks or images ask for it at the same time. Dropping
//!   the future stops a fetch at any time; the next one finds what it left.
//!
//! The network is behind [`BlobSource`]; the disk is only touched on blocking threads.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use skep_common::NodeId;
use skep_worker_core::image::{Digest, Manifest};
use tokio::sync::{OwnedMutexGuard, mpsc, watch};
use tokio::time::timeout;

use super::blobs::{BlobWriter, DOCUMENT_LEN_MAX};
use super::blocking;
use super::error::Error;
use super::pins::Pin;
use super::store::Store;

/// Chunks between the network and the disk: enough to keep both busy, little memory.
const CHUNKS_MAX: usize = 16;

/// A node that is said to hold an image, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The node.
    pub node_id: NodeId,
    /// Where [`BlobSource`] finds it.
    pub address: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} at {}", self.node_id, self.address)
    }
}

/// Why a source could not give a blob; its text becomes part of the fetch's error.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// The bytes of a blob from an offset on. It ends where the blob ends.
pub type BlobStream = BoxStream<'static, Result<Bytes, SourceError>>;

/// Opens blobs on other nodes. The store checks everything that comes out of it.
pub trait BlobSource: Send + Sync {
    /// Asks `holder` for the bytes of `digest` from `offset` on.
    fn open<'a>(
        &'a self,
        holder: &'a Holder,
        digest: Digest,
        offset: u64,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>>;
}

/// How much of an image is here. Both are 0 until its manifest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transfer {
    /// Bytes that are here, whether fetched now or before.
    pub done_bytes: u64,
    /// Bytes of the manifest, the configuration and all layers.
    pub total_bytes: u64,
}

/// Lets others watch a fetch. Clones show the same fetch.
#[derive(Debug, Clone)]
pub struct Progress(Arc<watch::Sender<Transfer>>);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Transfer::default())))
    }
}

impl Progress {
    /// How far the fetch is now.
    pub fn get(&self) -> Transfer {
        *self.0.borrow()
    }

    /// Tells every change, or the last of several.
    pub fn subscribe(&self) -> watch::Receiver<Transfer> {
        self.0.subscribe()
    }

    fn add(&self, bytes: u64) {
        self.0.send_modify(|transfer| transfer.done_bytes += bytes);
    }

    fn take_back(&self, bytes: u64) {
        self.0.send_modify(|transfer| {
            transfer.done_bytes = transfer.done_bytes.saturating_sub(bytes);
        });
    }
}

/// Why a blob could be had from nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchError {
    /// The blob that is missing.
    pub digest: Digest,
    /// Every holder that was asked, in the order of asking, and what was wrong.
    pub failures: Vec<(Holder, Fault)>,
}

impl std::error::Error for FetchError {}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.failures.is_empty() {
            return write!(f, "blob {} has no living holder", self.digest);
        }
        write!(f, "blob {} could not be fetched from any of its holders", self.digest)?;
        let mut separator = ": ";
        for (holder, fault) in &self.failures {
            write!(f, "{separator}{holder} {fault}")?;
            separator = "; ";
        }
        Ok(())
    }
}

/// What was wrong with a holder.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text says what each field is")]
pub enum Fault {
    /// It was not reached, or it refused.
    Refused(String),
    /// The connection broke after this many bytes.
    Broke(u64, String),
    /// Nothing came for this long.
    Stalled(Duration),
    /// It said that this is all, but the blob is longer.
    TooShort { found: u64, expected: u64 },
    /// It sent more than the blob has, or more than any manifest may have.
    TooLong(u64),
    /// It sent other content.
    WrongBytes(Digest),
}

impl Fault {
    /// Whether the bytes that came before the fault are worthless.
    fn is_lie(&self) -> bool {
        matches!(self, Self::TooLong(_) | Self::WrongBytes(_))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(reason) => write!(f, "did not give it: {reason}"),
            Self::Broke(at, reason) => write!(f, "broke off after {at} bytes: {reason}"),
            Self::Stalled(limit) => write!(f, "sent nothing for {limit:?}"),
            Self::TooShort { found, expected } => {
                write!(f, "ended after {found} of {expected} bytes")
            }
            Self::TooLong(expected) => write!(f, "sent more than {expected} bytes"),
            Self::WrongBytes(found) => write!(f, "sent wrong bytes, with digest {found}"),
        }
    }
}

/// One fetch of one image.
struct Fetch<'a> {
    store: &'a Arc<Store>,
    image: Digest,
    holders: &'a [Holder],
    source: &'a dyn BlobSource,
    progress: &'a Progress,
    /// Holders with a fault in this fetch, by index. They are asked last.
    suspects: Mutex<BTreeSet<usize>>,
    pin: Mutex<Pin>,
    diff_ids: watch::Sender<Option<Vec<Digest>>>,
}

/// Makes `image` complete on this node: all blobs here, all layers unpacked.
pub(super) async fn fetch(
    store: &Arc<Store>,
    image: Digest,
    holders: &[Holder],
    source: &dyn BlobSource,
    progress: &Progress,
) -> Result<(), Error> {
    let mut pin = store.pin();
    pin.add([image]);
    progress.0.send_replace(Transfer::default());
    let (suspects, pin) = (Mutex::default(), Mutex::new(pin));
    let diff_ids = watch::Sender::new(None);
    let fetch = Fetch { store, image, holders, source, progress, suspects, pin, diff_ids };
    fetch.blob(0, image, None).await?;
    let manifest = Arc::new(blocking(store, move |store| store.manifest(image)).await?);
    fetch.pin(manifest.blobs().iter().map(|blob| blob.digest));
    let parts: u64 = manifest.blobs().iter().map(|blob| blob.size).sum();
    progress.0.send_modify(|transfer| transfer.total_bytes = transfer.done_bytes + parts);

    // The configuration is part 0, so it is always among those in work: the layers wait for it.
    let parts = std::iter::once(None).chain(unique_layers(&manifest).into_iter().map(Some));
    let parts = parts.enumerate().map(|(nth, layer)| fetch.part(nth, layer, &manifest));
    // Collected first: a closure that borrows across the stream would not be `Send` in general.
    let parts: Vec<BoxFuture<'_, Result<(), Error>>> =
        parts.map(|part| Box::pin(part) as BoxFuture<'_, _>).collect();
    let parallel = store.options.parallel.max(1);
    futures::stream::iter(parts).buffer_unordered(parallel).try_collect::<()>().await?;
    blocking(store, move |store| store.note_image(image)).await
}

/// The positions of the layers, each blob once.
fn unique_layers(manifest: &Manifest) -> Vec<usize> {
    let mut seen = BTreeSet::from([manifest.config.digest]);
    let layers = manifest.layers.iter().enumerate();
    layers.filter(|(_, layer)| seen.insert(layer.digest)).map(|(nth, _)| nth).collect()
}

impl Fetch<'_> {
    fn pin(&self, digests: impl IntoIterator<Item = Digest>) {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).add(digests);
    }

    /// Fetches the configuration, or one layer and unpacks it.
    async fn part(
        &self,
        nth: usize,
        layer: Option<usize>,
        manifest: &Arc<Manifest>,
    ) -> Result<(), Error> {
        let image = self.image;
        let Some(layer) = layer else {
            self.blob(nth, manifest.config.digest, Some(manifest.config.size)).await?;
            let manifest = Arc::clone(manifest);
            let read = move |store: &Store| store.config_file(image, &manifest);
            let diff_ids = blocking(self.store, read).await?.rootfs.diff_ids;
            self.pin(diff_ids.iter().copied());
            self.diff_ids.send_replace(Some(diff_ids));
            return Ok(());
        };
        let blob = &manifest.layers[layer];
        self.blob(nth, blob.digest, Some(blob.size)).await?;
        let mut diff_ids = self.diff_ids.subscribe();
        // The sender lives as long as `self`. If the configuration fails, this future is dropped.
        let diff_id = match diff_ids.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(diff_ids)) => diff_ids[layer],
            _ => return Ok(()),
        };
        unpack_layer(self.store, image, blob.digest, diff_id).await
    }

    /// Makes one blob be here. A manifest's `size` is not known before.
    async fn blob(&self, nth: usize, digest: Digest, size: Option<u64>) -> Result<(), Error> {
        let guard = Arc::new(self.store.locks.lock(digest).await);
        let len = blocking(self.store, move |store| store.blobs.len(digest)).await?;
        if let Some(len) = len.filter(|len| size.is_none_or(|size| *len == size)) {
            self.progress.add(len);
            return Ok(());
        }
        let path = self.store.partial_path(digest);
        let mut writer = blocking(self.store, move |_| BlobWriter::resume(path)).await?;
        self.progress.add(writer.len());
        let mut failures = Vec::new();
        for nth_holder in self.order(nth) {
            let holder = &self.holders[nth_holder];
            let had = writer.len();
            let (mut left, mut fault) = self.ask(holder, digest, size, writer, &guard).await?;
            if had > 0 && fault.as_ref().is_some_and(Fault::is_lie) {
                (left, fault) = self.ask(holder, digest, size, left, &guard).await?;
            }
            writer = left;
            let Some(fault) = fault else {
                return self.publish(writer, digest, guard).await;
            };
            // Silence and refusals are the network's; wrong bytes are a disk that somebody must look at.
            if fault.is_lie() {
                tracing::warn!(image = %self.image, blob = %digest, %holder, %fault, "holder skipped");
            } else {
                tracing::debug!(image = %self.image, blob = %digest, %holder, %fault, "holder skipped");
            }
            self.suspects.lock().unwrap_or_else(PoisonError::into_inner).insert(nth_holder);
            failures.push((holder.clone(), fault));
        }
        self.progress.take_back(writer.len());
        Err(FetchError { digest, failures }.into())
    }

    /// The holders in the order of asking: each part begins with another one, suspects come last.
    fn order(&self, nth: usize) -> Vec<usize> {
        let n = self.holders.len();
        let suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        let mut order: Vec<usize> = (0..n).map(|holder| (holder + nth) % n).collect();
        order.sort_by_key(|holder| suspects.contains(holder)); // Stable.
        order
    }

    /// Asks one holder for the rest of a blob. After a lie the writer comes back empty.
    async fn ask(
        &self,
        holder: &Holder,
        digest: Digest,
        size: Option<u64>,
        writer: BlobWriter,
        guard: &Arc<OwnedMutexGuard<()>>,
    ) -> Result<(BlobWriter, Option<Fault>), Error> {
        let limit = size.unwrap_or(DOCUMENT_LEN_MAX);
        let (mut writer, mut fault) = if writer.len() < limit || size.is_none() {
            self.receive(holder, digest, limit, writer, guard).await?
        } else {
            let fault = (writer.len() > limit).then_some(Fault::TooLong(limit));
            (writer, fault)
        };
        if fault.is_none() {
            let found = writer.digest();
            fault = match size {
                Some(expected) if writer.len() < expected => {
                    Some(Fault::TooShort { found: writer.len(), expected })
                }
                _ if found != digest => Some(Fault::WrongBytes(found)),
                _ => None,
            };
        }
        if fault.as_ref().is_some_and(Fault::is_lie) {
            self.progress.take_back(writer.len());
            let guard = Arc::clone(guard);
            writer = blocking(self.store, move |_| {
                let _guard = guard;
                writer.restart().map(|()| writer)
            })
            .await?;
        }
        Ok((writer, fault))
    }

    /// Pumps what a holder sends into the writer, which hashes and writes on a thread of its own.
    ///
    /// The thread holds the blob's lock too: if this future is dropped, nobody else touches the
    /// file before the thread has put it down.
    async fn receive(
        &self,
        holder: &Holder,
        digest: Digest,
        limit: u64,
        mut writer: BlobWriter,
        guard: &Arc<OwnedMutexGuard<()>>,
    ) -> Result<(BlobWriter, Option<Fault>), Error> {
        let len = writer.len();
        let stall = self.store.options.stall_timeout;
        let mut stream = match timeout(stall, self.source.open(holder, digest, len)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Ok((writer, Some(Fault::Refused(error.to_string())))),
            Err(_) => return Ok((writer, Some(Fault::Stalled(stall)))),
        };
        let (chunks, mut queue) = mpsc::channel::<Bytes>(CHUNKS_MAX);
        let guard = Arc::clone(guard);
        let writing = blocking(self.store, move |_| {
            let _guard = guard;
            while let Some(chunk) = queue.blocking_recv() {
                writer.append(&chunk)?;
            }
            Ok::<BlobWriter, Error>(writer)
        });
        let pumping = self.pump(&mut stream, chunks, len, limit);
        let (written, fault) = futures::join!(writing, pumping);
        Ok((written?, fault))
    }

    /// Hands on what comes, until it ends, breaks, stalls or is more than `limit` bytes.
    async fn pump(
        &self,
        stream: &mut BlobStream,
        chunks: mpsc::Sender<Bytes>,
        mut len: u64,
        limit: u64,
    ) -> Option<Fault> {
        let stall = self.store.options.stall_timeout;
        loop {
            let chunk = match timeout(stall, stream.next()).await {
                Err(_) => return Some(Fault::Stalled(stall)),
                Ok(None) => return None,
                Ok(Some(Err(error))) => return Some(Fault::Broke(len, error.to_string())),
                Ok(Some(Ok(chunk))) => chunk,
            };
            let n = chunk.len() as u64;
            if len + n > limit {
                return Some(Fault::TooLong(limit));
            }
            if chunks.send(chunk).await.is_err() {
                return None; // The writer has an error of its own, which is returned.
            }
            len += n;
            self.progress.add(n);
        }
    }

    async fn publish(
        &self,
        writer: BlobWriter,
        digest: Digest,
        guard: Arc<OwnedMutexGuard<()>>,
    ) -> Result<(), Error> {
        blocking(self.store, move |store| {
            let _guard = guard;
            writer.sync()?;
            store.blobs.publish(writer.path(), digest)
        })
        .await
    }
}

/// Unpacks a layer unless it is here, or waits for the one who is at it.
pub(super) async fn unpack_layer(
    store: &Arc<Store>,
    image: Digest,
    layer: Digest,
    diff_id: Digest,
) -> Result<(), Error> {
    let guard = store.locks.lock(diff_id).await;
    blocking(store, move |store| {
        let _guard = guard;
        let unpacked = store.layers.ensure(&store.blobs, layer, diff_id)?;
        unpacked.map_err(|problem| Error::Unpack { image, layer, problem: Box::new(problem) })
    })
    .await
}
