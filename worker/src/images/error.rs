//! Why the image store could not do what it was asked.

use std::io;
use std::path::{Path, PathBuf};

use skep_worker_core::image::{Digest, change, config, manifest, reference};

use super::archive::ArchiveError;
use super::fetch::FetchError;
use super::tarball::LayerError;

/// Why a request to the image store failed. The store is then as it was before.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names every field")]
pub enum Error {
    /// Remedy: fetch, load or import the image first.
    #[error("blob {0} is not in this node's image store")]
    NotFound(Digest),
    /// Remedy: fetch the image again; only what is missing is transferred.
    #[error("image {image} is not complete on this node: blob {blob} is missing")]
    Incomplete { image: Digest, blob: Digest },
    /// The digest names something that is no image, or one of a kind that is not supported.
    #[error("blob {digest} cannot be used as an image manifest")]
    Manifest { digest: Digest, source: manifest::Error },
    /// The image was made wrongly.
    #[error("blob {digest} cannot be used as an image configuration")]
    Config { digest: Digest, source: config::Error },
    /// The image was made wrongly: nothing would prove its layers.
    #[error("image {image} has {layers} layers, but its configuration names {diff_ids}")]
    LayerCount { image: Digest, layers: usize, diff_ids: usize },
    /// The layer's blob is what its digest says, but it cannot become a directory.
    #[error("layer {layer} of image {image} cannot be unpacked: {problem}")]
    Unpack { image: Digest, layer: Digest, problem: Box<LayerError> },
    /// What was given to load or import is damaged or no image.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// No holder gave what was asked.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// An instruction of `--change` is not valid.
    #[error(transparent)]
    Change(#[from] change::Error),
    /// The name for an imported image is not valid.
    #[error(transparent)]
    Name(#[from] reference::ParseReferenceError),
    /// Remedy: stop the other daemon, or give each its own data directory.
    #[error("image store {0} is used by another process")]
    InUse(PathBuf),
    /// The disk refused.
    #[error("failed to {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

/// Adds to an I/O error what was done to which file.
pub(super) trait At<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|error| Error::Io { action, path: path.to_owned(), source: error.into() })
    }
}
