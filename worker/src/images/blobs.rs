//! The directory of blobs, each named by the SHA-256 digest of its content.
//!
//! # Invariants
//!
//! - A file in `blobs/sha256` is whole, was hashed as it was written, and reached the disk before
//!   it got its name: a crash leaves a blob absent or right, never wrong.
//! - A blob costs one fdatasync, in the blocking thread that wrote it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use skep_worker_core::image::Digest;

use super::error::{At, Error};
use super::stream::{BUFFER_LEN, Pacer, digest_of};

/// Largest manifest, index or configuration that is read: registries have the same limit.
pub(super) const DOCUMENT_LEN_MAX: u64 = 4 << 20;

#[derive(Debug)]
pub(super) struct Blobs {
    dir: PathBuf,
}

impl Blobs {
    pub(super) fn open(dir: PathBuf) -> Result<Self, Error> {
        fs::create_dir_all(&dir).at("create directory", &dir)?;
        Ok(Self { dir })
    }

    pub(super) fn path(&self, digest: Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    /// The length of a blob that is here.
    pub(super) fn len(&self, digest: Digest) -> Result<Option<u64>, Error> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).at("look for blob", &path),
        }
    }

    pub(super) fn has(&self, digest: Digest) -> Result<bool, Error> {
        Ok(self.len(digest)?.is_some())
    }

    pub(super) fn open_file(&self, digest: Digest) -> Result<(File, u64), Error> {
        let path = self.path(digest);
        match File::open(&path) {
            Ok(file) => {
                let len = file.metadata().at("look for blob", &path)?.len();
                Ok((file, len))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NotFound(digest)),
            Err(error) => Err(error).at("open blob", &path),
        }
    }

    /// Reads a manifest or a configuration.
    pub(super) fn read_document(&self, digest: Digest) -> Result<Vec<u8>, Error> {
        let (file, len) = self.open_file(digest)?;
        let path = self.path(digest);
        if len > DOCUMENT_LEN_MAX {
            let error = io::Error::new(io::ErrorKind::FileTooLarge, "too large for a document");
            return Err(error).at("read blob", &path);
        }
        let mut bytes = Vec::new();
        (&file).take(DOCUMENT_LEN_MAX).read_to_end(&mut bytes).at("read blob", &path)?;
        Ok(bytes)
    }

    /// Gives a synced file its name. Its digest must have been computed from what is in it.
    pub(super) fn publish(&self, staged: &Path, digest: Digest) -> Result<(), Error> {
        let path = self.path(digest);
        fs::rename(staged, &path).at("store blob", &path)
    }

    /// Makes the names of the blobs that were published since the last call survive a power cut.
    pub(super) fn sync_names(&self) -> Result<(), Error> {
        File::open(&self.dir).and_then(|dir| dir.sync_all()).at("sync directory", &self.dir)
    }

    pub(super) fn list(&self) -> Result<Vec<Digest>, Error> {
        list_digests(&self.dir)
    }

    pub(super) fn delete(&self, digest: Digest) -> Result<(), Error> {
        delete_file(&self.path(digest))
    }
}

/// The digests that files in `dir` are named by, in order.
pub(super) fn list_digests(dir: &Path) -> Result<Vec<Digest>, Error> {
    let mut digests = Vec::new();
    for entry in fs::read_dir(dir).at("list directory", dir)? {
        let name = entry.at("list directory", dir)?.file_name();
        digests.extend(name.to_str().and_then(Digest::from_hex));
    }
    digests.sort_unstable();
    Ok(digests)
}

/// Deletes a file that may be gone already.
pub(super) fn delete_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).at("delete", path),
        _ => Ok(()),
    }
}

/// A blob that is being written: a file without its name yet, and the hash of what is in it.
pub(super) struct BlobWriter {
    file: File,
    path: PathBuf,
    hasher: Sha256,
    len: u64,
    pacer: Pacer,
}

impl BlobWriter {
    pub(super) fn create(path: PathBuf) -> Result<Self, Error> {
        let file = File::create_new(&path).at("create", &path)?;
        Ok(Self { file, path, hasher: Sha256::new(), len: 0, pacer: Pacer::default() })
    }

    /// Goes on with what an earlier writer left at `path`, or begins anew.
    pub(super) fn resume(path: PathBuf) -> Result<Self, Error> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .at("open", &path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; BUFFER_LEN];
        let mut len = 0;
        loop {
            match file.read(&mut buffer).at("read", &path)? {
                0 => break,
                n => {
                    hasher.update(&buffer[..n]);
                    len += n as u64;
                }
            }
        }
        Ok(Self { file, path, hasher, len, pacer: Pacer::from(len) })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The digest of what is in it so far.
    pub(super) fn digest(&self) -> Digest {
        digest_of(self.hasher.clone())
    }

    /// Forgets all that was written.
    pub(super) fn restart(&mut self) -> Result<(), Error> {
        self.file.set_len(0).at("truncate", &self.path)?;
        self.file.seek(SeekFrom::Start(0)).at("truncate", &self.path)?;
        self.hasher = Sha256::new();
        self.len = 0;
        self.pacer = Pacer::default();
        Ok(())
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.write_all(bytes).at("write", &self.path)
    }

    /// Waits until the content is on the disk. Only then may the blob get its name.
    pub(super) fn sync(&self) -> Result<(), Error> {
        self.file.sync_data().at("sync", &self.path)
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.len += n as u64;
        self.pacer.advance(&self.file, self.len);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
