//! Makes an image with one layer from a root file-system archive, as `docker import` does.
//!
//! The layer is stored uncompressed, and nothing in the image tells when or where it was made: the
//! same files and changes give the same digest on every machine, however they were compressed.

use std::collections::BTreeMap;
use std::io::Read;

use skep_worker_core::image::config::{ConfigFile, History, RootFs, RunConfig};
use skep_worker_core::image::manifest::{CONFIG, LAYER};
use skep_worker_core::image::{Descriptor, Manifest, Reference, change};

use super::Loaded;
use super::archive::ArchiveError;
use super::blobs::BlobWriter;
use super::error::{At, Error};
use super::store::Store;
use super::stream::{decoded, digest_of_bytes};
use super::tarball::{EndMark, scan};

/// The time in every imported image. The real one would make equal images differ.
const CREATED: &str = "1970-01-01T00:00:00Z";

pub(super) fn import(
    store: &Store,
    reader: impl Read,
    name: Option<&str>,
    changes: &[String],
) -> Result<Loaded, Error> {
    let name: Option<Reference> = name.map(str::parse).transpose()?;
    let mut run = RunConfig::default();
    for line in changes {
        change::apply(&mut run, line)?;
    }
    let staging = store.staging()?;
    let layer = write_layer(reader, BlobWriter::create(staging.path().join("layer"))?)?;
    let platform = &store.options.platform;
    let history = History {
        created: Some(CREATED.to_owned()),
        created_by: None,
        comment: Some("imported from a root file-system archive".to_owned()),
    };
    let config = ConfigFile {
        created: Some(CREATED.to_owned()),
        architecture: platform.architecture.clone(),
        variant: platform.variant.clone(),
        os: platform.os.clone(),
        config: run,
        rootfs: RootFs { kind: "layers".to_owned(), diff_ids: vec![layer.digest()] },
        history: vec![history],
    };
    let config = config.to_json();
    let descriptor = |media_type: &str, digest, size| Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        annotations: BTreeMap::new(),
        platform: None,
    };
    let manifest = Manifest::of(
        descriptor(CONFIG, digest_of_bytes(&config), config.len() as u64),
        vec![descriptor(LAYER, layer.digest(), layer.len())],
    );
    let manifest = manifest.to_json();
    let image = digest_of_bytes(&manifest);

    let mut pin = store.pin();
    pin.add([image, layer.digest(), digest_of_bytes(&config)]);
    layer.sync()?;
    store.blobs.publish(layer.path(), layer.digest())?;
    for (name, document) in [("config", config), ("manifest", manifest)] {
        let mut writer = BlobWriter::create(staging.path().join(name))?;
        writer.append(&document)?;
        writer.sync()?;
        store.blobs.publish(writer.path(), writer.digest())?;
    }
    store.note_image(image)?;
    let names = name.iter().map(|name| name.without_digest().to_string()).collect();
    Ok(Loaded { names, digest: image, pin })
}

/// Writes the uncompressed stream and checks on the way that it is a whole root file system.
fn write_layer(reader: impl Read, mut writer: BlobWriter) -> Result<BlobWriter, Error> {
    let unreadable = |problem| Error::Archive(ArchiveError::RootFs(problem));
    let (_, stream) = decoded(reader).map_err(|error| Error::Archive(ArchiveError::Read(error)))?;
    let mut tee = Tee { stream, writer: &mut writer, failed: None };
    let scanned = scan(&mut tee, EndMark::Required);
    // Behind the end mark is padding. It belongs to the stream, as everywhere else.
    let drained = std::io::copy(&mut tee, &mut std::io::sink());
    if let Some(error) = tee.failed {
        let path = writer.path().to_owned();
        return Err(error).at("write", &path);
    }
    scanned.map_err(unreadable)?;
    drained.map_err(|error| Error::Archive(ArchiveError::Read(error)))?;
    Ok(writer)
}

/// Writes what is read, and tells an error of the disk from one of the archive.
struct Tee<'a, R> {
    stream: R,
    writer: &'a mut BlobWriter,
    failed: Option<std::io::Error>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.failed.is_some() {
            return Err(std::io::Error::other("the copy cannot be written"));
        }
        let n = self.stream.read(buffer)?;
        if let Err(error) = std::io::Write::write_all(self.writer, &buffer[..n]) {
            self.failed = Some(error);
            return Err(std::io::Error::other("the copy cannot be written"));
        }
        Ok(n)
    }
}
