//! The image store of a node: blobs, unpacked layers, and the ways images come in.
//!
//! The agent asks it to [`fetch`](ImageStore::fetch) what a task needs and mounts what
//! [`layers`](ImageStore::layers) gives; the control API feeds `image load` and `image import` into
//! it; other nodes are served with [`open_blob`](ImageStore::open_blob). Names are not its
//! business: they are objects of the cluster, and it knows images by their manifests' digests.
//!
//! ```text
//! DIR/blobs/sha256/HEX   every blob, whole and proven     DIR/images/HEX   images made complete here
//! DIR/layers/HEX         unpacked, by diff id             DIR/records/HEX  see `layers`
//! DIR/partial/HEX        downloads to go on with          DIR/tmp          emptied at every start
//! ```
//!
//! # Reading order
//!
//! [`ImageStore`]; `store` (what belongs together, the collector); `blobs` and `layers` (what is on
//! the disk); `archive` and `import` (images from files); `fetch` (images from other nodes); `tarball`
//! and `unpack` (what a layer may contain, and how it becomes a directory).
//!
//! # Invariants
//!
//! - A name in `blobs` or `layers` appears by one rename of something whole. A crash at any moment
//!   leaves nothing that has to be repaired, only leftovers that the next start deletes.
//! - Whatever came from outside was hashed before it got its name: blobs against their digests,
//!   layers also against the diff ids of the image's configuration.
//! - An image is published blobs first, manifest last: a manifest that is here after a load or an
//!   import has all its parts. [`ImageStore::has`] looks all the same, because a fetch begins
//!   with the manifest.
//! - The Raft log is on the same disk. One blob costs one fdatasync, after its pages were written
//!   back in steps; unpacking costs none. No call blocks an async thread with disk work.

mod archive;
mod blobs;
mod error;
mod fetch;
mod import;
mod layers;
mod pins;
mod store;
mod stream;
mod tarball;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod unpack;

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use skep_worker_core::image::{Digest, ImageConfig, Manifest, Platform};
use tokio::io::AsyncSeekExt;
use tokio_util::io::ReaderStream;

pub use archive::ArchiveError;
pub use error::Error;
pub use fetch::{
    BlobSource, BlobStream, Fault, FetchError, Holder, Progress, SourceError, Transfer,
};
pub use pins::Pin;
pub use tarball::LayerError;

use error::At;
use store::Store;

/// How a store behaves. The defaults are for production.
#[derive(Debug, Clone)]
pub struct Options {
    /// Blobs of one image that are fetched and unpacked at the same time.
    pub parallel: usize,
    /// How long a holder may send nothing before another one is asked.
    pub stall_timeout: Duration,
    /// Which image of an archive for several platforms is meant, and what an import is made for.
    pub platform: Platform,
}

impl Default for Options {
    /// Four streams fill a gigabit link from ordinary disks; ten seconds outlast a leader election
    /// and a retransmission, and not a user's patience.
    fn default() -> Self {
        Self {
            parallel: 4,
            stall_timeout: Duration::from_secs(10),
            platform: Platform::linux(std::env::consts::ARCH),
        }
    }
}

/// A blob and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobRef {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// An image that is complete on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Digest of the manifest: what a service is pinned to.
    pub digest: Digest,
    /// Digest of the configuration: what Docker calls the image's id.
    pub config: Digest,
    /// Bytes of all its blobs.
    pub size: u64,
}

/// An image that was loaded or imported.
#[derive(Debug)]
pub struct Loaded {
    /// Full names, such as `docker.io/library/whoami:latest`, sorted; none if the archive had none.
    pub names: Vec<String>,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Keeps the image from being collected until its name is an object of the cluster.
    pub pin: Pin,
}

/// A blob that is open for reading.
#[derive(Debug)]
pub struct Blob {
    /// At its beginning.
    pub file: tokio::fs::File,
    /// Its length in bytes.
    pub size: u64,
}

impl Blob {
    /// Bytes of one message when a blob is sent.
    const CHUNK_LEN: usize = 256 << 10;

    /// Its bytes from `offset` on, as [`BlobSource::open`] of another node asks for them.
    pub async fn stream(
        mut self,
        offset: u64,
    ) -> io::Result<impl Stream<Item = io::Result<Bytes>> + Send + 'static> {
        self.file.seek(io::SeekFrom::Start(offset)).await?;
        Ok(ReaderStream::with_capacity(self.file, Self::CHUNK_LEN))
    }
}

/// The image store of a node. Clones are the same store.
#[derive(Debug, Clone)]
pub struct ImageStore {
    store: Arc<Store>,
}

impl ImageStore {
    /// Opens or creates the store in `dir`, and deletes what a crash left half done.
    ///
    /// Fails with [`Error::InUse`] while another process has it open.
    pub async fn open(dir: impl Into<PathBuf>) -> Result<Self, Error> {
        Self::open_with(dir, Options::default()).await
    }

    /// As [`Self::open`], with other options.
    pub async fn open_with(dir: impl Into<PathBuf>, options: Options) -> Result<Self, Error> {
        let dir: PathBuf = dir.into();
        let store = on_blocking_thread(move || Store::open(&dir, options)).await?;
        Ok(Self { store: Arc::new(store) })
    }

    /// Loads every image of an archive of `docker save` or of an OCI layout, compressed or not.
    ///
    /// All or nothing: after an error, which says what is wrong with which entry, the store is as
    /// it was. Layers are proven here and unpacked by the first [`Self::layers`].
    pub async fn load(&self, archive: impl Read + Send + 'static) -> Result<Vec<Loaded>, Error> {
        self.blocking(move |store| archive::load(store, archive)).await
    }

    /// Makes an image with one layer from a root file-system archive, compressed or not.
    ///
    /// `changes` are instructions of a Dockerfile, as `docker import --change` takes them. Equal
    /// files and changes give an equal digest.
    pub async fn import(
        &self,
        archive: impl Read + Send + 'static,
        name: Option<&str>,
        changes: &[String],
    ) -> Result<Loaded, Error> {
        let (name, changes) = (name.map(str::to_owned), changes.to_vec());
        self.blocking(move |store| import::import(store, archive, name.as_deref(), &changes)).await
    }

    /// Makes an image complete on this node: fetches what is missing from `holders`, in their
    /// order of preference, proves it and unpacks it.
    ///
    /// Cancel-safe: a dropped fetch leaves partial downloads that the next one goes on with.
    /// Fetches of the same image at the same time share the work.
    pub async fn fetch(
        &self,
        image: Digest,
        holders: &[Holder],
        source: &dyn BlobSource,
        progress: &Progress,
    ) -> Result<(), Error> {
        fetch::fetch(&self.store, image, holders, source, progress).await
    }

    /// The images that are complete on this node, ordered by digest.
    pub async fn list(&self) -> Result<Vec<Stored>, Error> {
        self.blocking(Store::list).await
    }

    /// The manifest of an image.
    pub async fn manifest(&self, image: Digest) -> Result<Manifest, Error> {
        self.blocking(move |store| store.manifest(image)).await
    }

    /// What an image tells about itself.
    pub async fn config(&self, image: Digest) -> Result<ImageConfig, Error> {
        self.blocking(move |store| store.config(image)).await
    }

    /// The blobs of an image, each once: the manifest, the configuration, the layers.
    pub async fn blobs_of(&self, image: Digest) -> Result<Vec<BlobRef>, Error> {
        self.blocking(move |store| store.blobs_of(image)).await
    }

    /// Whether every blob of an image is here.
    pub async fn has(&self, image: Digest) -> Result<bool, Error> {
        Ok(self.missing(image).await?.is_empty())
    }

    /// The blobs of an image that are not here; the manifest alone when that is not.
    pub async fn missing(&self, image: Digest) -> Result<Vec<Digest>, Error> {
        self.blocking(move |store| store.missing(image)).await
    }

    /// The unpacked layers of an image, lowest first, to be mounted as overlay lower directories.
    ///
    /// Unpacks those that are not. A layer that occurs twice is listed where it is highest, since
    /// overlayfs refuses a directory twice and the higher one hides all of the lower. Layers below
    /// one with an opaque root are left out. An image may have no layer at all.
    pub async fn layers(&self, image: Digest) -> Result<Vec<PathBuf>, Error> {
        let pairs = self
            .blocking(move |store| {
                let manifest = store.manifest(image)?;
                let diff_ids = store.config_file(image, &manifest)?.rootfs.diff_ids;
                let layers = manifest.layers.iter().map(|layer| layer.digest);
                Ok::<_, Error>(layers.zip(diff_ids).collect::<Vec<_>>())
            })
            .await?;
        for (layer, diff_id) in &pairs {
            fetch::unpack_layer(&self.store, image, *layer, *diff_id).await.map_err(|error| {
                match error {
                    Error::NotFound(blob) => Error::Incomplete { image, blob },
                    other => other,
                }
            })?;
        }
        self.blocking(move |store| visible_layers(store, pairs.iter().map(|(_, id)| *id))).await
    }

    /// Opens a blob for another node.
    pub async fn open_blob(&self, digest: Digest) -> Result<Blob, Error> {
        let (file, size) = self.blocking(move |store| store.blobs.open_file(digest)).await?;
        Ok(Blob { file: tokio::fs::File::from_std(file), size })
    }

    /// Deletes every blob, partial download and unpacked layer that no image of `keep` needs.
    ///
    /// `keep` gives the images of all containers and assignments of this node, and those that this
    /// node holds for the cluster. What is being fetched, or has a living [`Pin`], is kept too: `keep`
    /// is called when no pin can go any more, so whoever lets go of one has it named there before.
    pub async fn retain(
        &self,
        keep: impl FnOnce() -> BTreeSet<Digest> + Send + 'static,
    ) -> Result<(), Error> {
        self.blocking(move |store| store.retain(keep)).await
    }

    /// Syncs unpacked layers, so that a reboot does not have to unpack them again.
    ///
    /// It syncs the whole file system: to be called on a clean stop, or when nothing is in a hurry.
    pub async fn settle(&self) -> Result<(), Error> {
        self.blocking(|store| store.layers.settle()).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        blocking(&self.store, work).await
    }
}

/// The directories to mount for the layers `diff_ids`, lowest first.
fn visible_layers(
    store: &Store,
    diff_ids: impl DoubleEndedIterator<Item = Digest>,
) -> Result<Vec<PathBuf>, Error> {
    let mut seen = BTreeSet::new();
    let mut paths = Vec::new();
    for diff_id in diff_ids.rev() {
        if !seen.insert(diff_id) {
            continue;
        }
        paths.push(store.layers.path(diff_id));
        if store.layers.is_opaque(diff_id)? {
            break;
        }
    }
    paths.reverse();
    Ok(paths)
}

/// Does disk work on a thread that may block.
async fn blocking<T: Send + 'static>(
    store: &Arc<Store>,
    work: impl FnOnce(&Store) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let store = Arc::clone(store);
    on_blocking_thread(move || work(&store)).await
}

async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(io::Error::other(error)).at("run disk work in", Path::new("runtime")),
        },
    }
}
