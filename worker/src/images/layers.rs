//! The directory of unpacked layers, each named by the digest of its uncompressed stream.
//!
//! # What survives a power cut
//!
//! Unpacking writes thousands of files. To sync each, or the whole file system, would hold up the
//! Raft log on the same disk, so nothing is synced while a task waits. Instead every layer has a
//! record with the id of the boot it was unpacked in. After a reboot a layer is believed
//! only if its record says that it was synced since ([`Layers::settle`], called when there is
//! time); any other is thrown away and unpacked again from its blob. A crash of the daemon alone loses no layer.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use skep_worker_core::image::Digest;
use tempfile::TempDir;

use super::blobs::{Blobs, delete_file, list_digests};
use super::error::{At, Error};
use super::tarball::LayerError;
use super::unpack::{OPAQUE_XATTR, unpack};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What the record of a layer says that reached the disk.
const SYNCED: &str = "synced";

#[derive(Debug)]
pub(super) struct Layers {
    dir: PathBuf,
    records: PathBuf,
    tmp: PathBuf,
    boot_id: String,
}

impl Layers {
    /// Opens the directory and clears away what a crash or a power cut left behind.
    pub(super) fn open(root: &Path, tmp: PathBuf) -> Result<Self, Error> {
        let boot_id = fs::read_to_string(BOOT_ID).at("read", Path::new(BOOT_ID))?;
        Self::open_in_boot(root, tmp, boot_id.trim().to_owned())
    }

    fn open_in_boot(root: &Path, tmp: PathBuf, boot_id: String) -> Result<Self, Error> {
        let layers = Self { dir: root.join("layers"), records: root.join("records"), tmp, boot_id };
        for dir in [&layers.dir, &layers.records] {
            fs::create_dir_all(dir).at("create directory", dir)?;
        }
        for diff_id in layers.list()? {
            if !layers.has(diff_id) {
                layers.delete(diff_id)?;
            }
        }
        for diff_id in list_digests(&layers.records)? {
            if !layers.path(diff_id).exists() {
                delete_file(&layers.record_path(diff_id))?;
            }
        }
        Ok(layers)
    }

    pub(super) fn path(&self, diff_id: Digest) -> PathBuf {
        self.dir.join(diff_id.hex())
    }

    fn record_path(&self, diff_id: Digest) -> PathBuf {
        self.records.join(diff_id.hex())
    }

    fn record(&self, diff_id: Digest) -> Option<String> {
        fs::read_to_string(self.record_path(diff_id)).ok()
    }

    pub(super) fn list(&self) -> Result<Vec<Digest>, Error> {
        list_digests(&self.dir)
    }

    /// Whether the layer is here, whole, and not older than a power cut that may have hurt it.
    pub(super) fn has(&self, diff_id: Digest) -> bool {
        self.record(diff_id).is_some_and(|record| record == SYNCED || record == self.boot_id)
            && self.path(diff_id).is_dir()
    }

    /// Unpacks a layer unless it is here. The caller holds the lock of `diff_id`.
    pub(super) fn ensure(
        &self,
        blobs: &Blobs,
        blob: Digest,
        diff_id: Digest,
    ) -> Result<Result<(), LayerError>, Error> {
        if self.has(diff_id) {
            return Ok(Ok(()));
        }
        let (file, _) = blobs.open_file(blob)?;
        let staging = tempfile::tempdir_in(&self.tmp).at("create directory in", &self.tmp)?;
        if let Err(problem) = unpack(file, staging.path(), diff_id) {
            return Ok(Err(problem));
        }
        self.delete(diff_id)?;
        let path = self.path(diff_id);
        fs::rename(staging.path(), &path).at("store layer", &path)?;
        let _ = staging.keep(); // It has moved: there is nothing left to delete.
        self.write_record(diff_id, &self.boot_id)?;
        Ok(Ok(()))
    }

    /// Whether the layer hides all layers below it. Overlayfs ignores that mark on a root.
    pub(super) fn is_opaque(&self, diff_id: Digest) -> Result<bool, Error> {
        let path = self.path(diff_id);
        match xattr::get(&path, OPAQUE_XATTR) {
            Ok(value) => Ok(value.as_deref() == Some(b"y")),
            // Without privilege such a mark can be neither set nor read.
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(false),
            Err(error) => Err(error).at("read the attributes of layer", &path),
        }
    }

    /// Takes a layer away: out of sight in one step, then file by file.
    fn delete(&self, diff_id: Digest) -> Result<(), Error> {
        match self.evict(diff_id)? {
            Some(trash) => trash.close().at("delete layer", &self.path(diff_id)),
            None => Ok(()),
        }
    }

    /// Takes a layer out of sight. Its files go when the returned directory is closed.
    pub(super) fn evict(&self, diff_id: Digest) -> Result<Option<TempDir>, Error> {
        delete_file(&self.record_path(diff_id))?;
        let path = self.path(diff_id);
        if !path.exists() {
            return Ok(None);
        }
        let trash = tempfile::tempdir_in(&self.tmp).at("create directory in", &self.tmp)?;
        fs::rename(&path, trash.path().join("layer")).at("delete layer", &path)?;
        Ok(Some(trash))
    }

    /// Syncs the file system once and notes that all layers unpacked until now are on the disk.
    pub(super) fn settle(&self) -> Result<(), Error> {
        let is_unsettled =
            |diff_id: &Digest| self.record(*diff_id).is_some_and(|record| record == self.boot_id);
        let unsettled: Vec<Digest> = self.list()?.into_iter().filter(is_unsettled).collect();
        if unsettled.is_empty() {
            return Ok(());
        }
        let dir = fs::File::open(&self.dir).at("open", &self.dir)?;
        nix::unistd::syncfs(&dir).at("sync the file system of", &self.dir)?;
        for diff_id in unsettled {
            self.write_record(diff_id, SYNCED)?;
        }
        Ok(())
    }

    /// A record that a power cut loses or empties is one that is not believed: no sync needed.
    fn write_record(&self, diff_id: Digest, text: &str) -> Result<(), Error> {
        let path = self.record_path(diff_id);
        let mut file = tempfile::NamedTempFile::new_in(&self.tmp).at("create in", &self.tmp)?;
        file.write_all(text.as_bytes()).at("write", &path)?;
        file.persist(&path).map_err(|error| error.error).at("write", &path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::stream::digest_of_bytes;
    use crate::images::testing::{Tar, TestDir};

    fn store(dir: &Path, boot_id: &str) -> (Blobs, Layers) {
        let tmp = dir.join("tmp");
        fs::create_dir_all(&tmp).unwrap();
        let layers = Layers::open_in_boot(dir, tmp, boot_id.to_owned()).unwrap();
        (Blobs::open(dir.join("blobs")).unwrap(), layers)
    }

    #[test]
    fn only_a_synced_layer_is_believed_after_a_reboot() {
        let dir = TestDir::new();
        let tar = Tar::new().file("a", b"1").build();
        let digest = digest_of_bytes(&tar);
        let (blobs, layers) = store(dir.path(), "first boot");
        fs::write(blobs.path(digest), &tar).unwrap();
        layers.ensure(&blobs, digest, digest).unwrap().unwrap();

        let (_, layers) = store(dir.path(), "first boot");
        assert!(layers.has(digest), "a restart of the daemon keeps the layer");
        let (_, layers) = store(dir.path(), "second boot");
        assert!(!layers.has(digest) && !layers.path(digest).exists(), "a reboot does not");

        layers.ensure(&blobs, digest, digest).unwrap().unwrap();
        layers.settle().unwrap();
        let (_, layers) = store(dir.path(), "third boot");
        assert!(layers.has(digest), "what was synced stays");
        assert_eq!(fs::read(layers.path(digest).join("a")).unwrap(), b"1");
    }

    #[test]
    fn a_layer_without_a_record_is_thrown_away_and_unpacked_again() {
        let dir = TestDir::new();
        let tar = Tar::new().file("a", b"1").build();
        let digest = digest_of_bytes(&tar);
        let (blobs, layers) = store(dir.path(), "boot");
        fs::write(blobs.path(digest), &tar).unwrap();
        fs::create_dir_all(layers.path(digest).join("half")).unwrap();
        assert!(!layers.has(digest));
        layers.ensure(&blobs, digest, digest).unwrap().unwrap();
        assert!(layers.has(digest) && !layers.path(digest).join("half").exists());

        fs::remove_file(layers.record_path(digest)).unwrap();
        let (_, layers) = store(dir.path(), "boot");
        assert!(!layers.path(digest).exists());
    }
}
