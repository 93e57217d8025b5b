//! The synchronous inside of the store: what is on the disk, and what of it belongs together.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use skep_worker_core::image::config::ConfigFile;
use skep_worker_core::image::{Descriptor, Digest, ImageConfig, Manifest};
use tempfile::TempDir;

use super::blobs::{Blobs, delete_file, list_digests};
use super::error::{At, Error};
use super::layers::Layers;
use super::pins::{Locks, Pin, Pins};
use super::{BlobRef, Options, Stored};

#[derive(Debug)]
pub(super) struct Store {
    pub(super) options: Options,
    pub(super) blobs: Blobs,
    pub(super) layers: Layers,
    pub(super) locks: Locks,
    pins: Arc<Pins>,
    /// One empty file per image that was made complete here, named by its manifest.
    images: PathBuf,
    partial: PathBuf,
    tmp: PathBuf,
    /// Held as long as the store is open.
    _lock: File,
}

impl Store {
    /// Opens a store and clears away what a crash left behind.
    pub(super) fn open(dir: &Path, options: Options) -> Result<Self, Error> {
        fs::create_dir_all(dir).at("create directory", dir)?;
        // Layers hold set-user-id programs of strangers, which no user of the host may reach.
        let private = fs::Permissions::from_mode(0o700);
        fs::set_permissions(dir, private).at("set the mode of", dir)?;
        let lock_path = dir.join("lock");
        let lock = File::create(&lock_path).at("create", &lock_path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse(dir.to_owned())),
            Err(TryLockError::Error(error)) => return Err(error).at("lock", &lock_path),
        }
        let [images, partial, tmp] = ["images", "partial", "tmp"].map(|name| dir.join(name));
        if tmp.exists() {
            fs::remove_dir_all(&tmp).at("delete leftovers in", &tmp)?;
        }
        for dir in [&images, &partial, &tmp] {
            fs::create_dir_all(dir).at("create directory", dir)?;
        }
        let blobs = Blobs::open(dir.join("blobs").join("sha256"))?;
        let layers = Layers::open(dir, tmp.clone())?;
        let (locks, pins) = (Locks::default(), Arc::default());
        let store = Self { options, blobs, layers, locks, pins, images, partial, tmp, _lock: lock };
        for image in list_digests(&store.images)? {
            if !store.blobs.has(image)? {
                delete_file(&store.images.join(image.hex()))?;
            }
        }
        Ok(store)
    }

    pub(super) fn staging(&self) -> Result<TempDir, Error> {
        tempfile::tempdir_in(&self.tmp).at("create directory in", &self.tmp)
    }

    pub(super) fn partial_path(&self, digest: Digest) -> PathBuf {
        self.partial.join(digest.hex())
    }

    pub(super) fn pin(&self) -> Pin {
        Pin::new(&self.pins)
    }

    pub(super) fn manifest(&self, image: Digest) -> Result<Manifest, Error> {
        let bytes = self.blobs.read_document(image)?;
        Manifest::parse(&bytes).map_err(|source| Error::Manifest { digest: image, source })
    }

    /// The configuration, once it is checked that it has one digest per layer.
    pub(super) fn config_file(
        &self,
        image: Digest,
        manifest: &Manifest,
    ) -> Result<ConfigFile, Error> {
        let digest = manifest.config.digest;
        let bytes = self.blobs.read_document(digest).map_err(|error| match error {
            Error::NotFound(blob) => Error::Incomplete { image, blob },
            other => other,
        })?;
        let file = ConfigFile::parse(&bytes).map_err(|source| Error::Config { digest, source })?;
        let (layers, diff_ids) = (manifest.layers.len(), file.rootfs.diff_ids.len());
        if layers != diff_ids {
            return Err(Error::LayerCount { image, layers, diff_ids });
        }
        Ok(file)
    }

    pub(super) fn config(&self, image: Digest) -> Result<ImageConfig, Error> {
        let manifest = self.manifest(image)?;
        let file = self.config_file(image, &manifest)?;
        let size = self.blobs_of(image)?.iter().map(|blob| blob.size).sum();
        Ok(ImageConfig::new(file, size))
    }

    pub(super) fn blobs_of(&self, image: Digest) -> Result<Vec<BlobRef>, Error> {
        let size = self.blobs.len(image)?.ok_or(Error::NotFound(image))?;
        let manifest = self.manifest(image)?;
        let rest = manifest.blobs().into_iter().map(|blob| {
            let Descriptor { digest, size, .. } = blob;
            BlobRef { digest: *digest, size: *size }
        });
        Ok(std::iter::once(BlobRef { digest: image, size }).chain(rest).collect())
    }

    pub(super) fn missing(&self, image: Digest) -> Result<Vec<Digest>, Error> {
        if !self.blobs.has(image)? {
            return Ok(vec![image]);
        }
        let mut missing = Vec::new();
        for blob in self.blobs_of(image)? {
            if self.blobs.len(blob.digest)? != Some(blob.size) {
                missing.push(blob.digest);
            }
        }
        Ok(missing)
    }

    pub(super) fn list(&self) -> Result<Vec<Stored>, Error> {
        let mut images = Vec::new();
        for digest in list_digests(&self.images)? {
            match self.stored(digest) {
                Ok(stored) => images.extend(stored),
                // It is being deleted.
                Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(images)
    }

    /// An image where it is complete.
    fn stored(&self, digest: Digest) -> Result<Option<Stored>, Error> {
        let Ok(manifest) = self.manifest(digest) else { return Ok(None) };
        if !self.missing(digest)?.is_empty() {
            return Ok(None);
        }
        let size = self.blobs_of(digest)?.iter().map(|blob| blob.size).sum();
        Ok(Some(Stored { digest, config: manifest.config.digest, size }))
    }

    /// Notes that an image is complete, after its blobs got their names.
    pub(super) fn note_image(&self, image: Digest) -> Result<(), Error> {
        let path = self.images.join(image.hex());
        File::create(&path).at("create", &path)?;
        self.blobs.sync_names()
    }

    /// Everything an image consists of, as far as that is known here: blobs and unpacked layers.
    ///
    /// An error of the disk ends the collection: what cannot be read must not count as unneeded.
    fn closure(&self, image: Digest) -> Result<BTreeSet<Digest>, Error> {
        let mut closure = BTreeSet::from([image]);
        let manifest = match self.manifest(image) {
            Ok(manifest) => manifest,
            Err(Error::NotFound(_) | Error::Manifest { .. }) => return Ok(closure),
            Err(error) => return Err(error),
        };
        closure.extend(manifest.blobs().iter().map(|blob| blob.digest));
        match self.config_file(image, &manifest) {
            Ok(file) => closure.extend(file.rootfs.diff_ids),
            Err(error @ Error::Io { .. }) => return Err(error),
            // An image that cannot be unpacked has no unpacked layers.
            Err(_) => {}
        }
        Ok(closure)
    }

    fn closure_of(
        &self,
        images: impl IntoIterator<Item = Digest>,
    ) -> Result<BTreeSet<Digest>, Error> {
        let mut all = BTreeSet::new();
        for image in images {
            all.extend(self.closure(image)?);
        }
        Ok(all)
    }

    /// Deletes everything that no image of `keep` and no pin needs.
    pub(super) fn retain(&self, keep: impl FnOnce() -> BTreeSet<Digest>) -> Result<(), Error> {
        let pins = self.pins.freeze();
        let mut needed = self.closure_of(keep())?;
        needed.extend(pins.digests());
        let mut doomed: BTreeSet<Digest> = self.blobs.list()?.into_iter().collect();
        doomed.extend(list_digests(&self.partial)?);
        doomed.extend(list_digests(&self.images)?);
        doomed.extend(self.layers.list()?);
        let trash = self.sweep(&doomed, &needed)?;
        drop(pins);
        self.empty(trash)
    }

    /// Takes everything out of sight that is doomed and not needed; whole layers are left to
    /// [`Self::empty`], which takes its time.
    ///
    /// The note of an image goes first and its manifest next: a crash leaves blobs without an
    /// image, which the next collection takes, and no image without blobs.
    fn sweep(
        &self,
        doomed: &BTreeSet<Digest>,
        needed: &BTreeSet<Digest>,
    ) -> Result<Vec<TempDir>, Error> {
        let doomed: Vec<Digest> = doomed.difference(needed).copied().collect();
        let noted: BTreeSet<Digest> = list_digests(&self.images)?.into_iter().collect();
        for image in doomed.iter().filter(|digest| noted.contains(digest)) {
            delete_file(&self.images.join(image.hex()))?;
            self.blobs.delete(*image)?;
        }
        let mut trash = Vec::new();
        for digest in &doomed {
            self.blobs.delete(*digest)?;
            delete_file(&self.partial_path(*digest))?;
            trash.extend(self.layers.evict(*digest)?);
        }
        Ok(trash)
    }

    fn empty(&self, trash: Vec<TempDir>) -> Result<(), Error> {
        trash.into_iter().try_for_each(|dir| dir.close().at("delete a layer in", &self.tmp))
    }
}
