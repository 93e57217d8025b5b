//! Loads image archives: what `docker save`, `podman save`, buildx and skopeo write.
//!
//! ```text
//! stream ─► contents: every entry hashed into a staging directory
//!             ├─ index.json      ─► layout: manifests as they are     (OCI, Docker from 25 on)
//!             └─ manifest.json   ─► docker: manifests composed here   (older Docker)
//!           ─► every layer checked against its diff id ─► blobs get their names, manifests last
//! ```
//!
//! # Invariants
//!
//! - Nothing becomes visible before the whole archive was read and proven. After an error the
//!   store is as it was.
//! - An old archive becomes an OCI image whose digest depends on its configuration and layers
//!   alone, so that loading it on two nodes gives one image.
//! - Every error is one sentence with the entry, its offset in the uncompressed archive and what to
//!   do, for someone who copied a file with a damaged stick.
//!
//! Sources: OCI Image Layout Specification 1.1; moby `image/tarexport/save.go`; containerd
//! annotations `io.containerd.image.name`.

mod contents;
mod docker;
mod layout;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};

use skep_worker_core::image::config::{self, ConfigFile};
use skep_worker_core::image::{Digest, Manifest, Reference, manifest, reference};

use super::Loaded;
use super::blobs::BlobWriter;
use super::error::{At, Error};
use super::store::Store;
use super::stream::{Compression, Hashing, decoded, digest_of_bytes};
use super::tarball::{EndMark, LayerError, scan};
use contents::{Contents, Staged};

/// Why an archive was refused. Nothing of it is in the store.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names every field")]
pub enum ArchiveError {
    /// The source of the bytes failed before anything was known about them.
    #[error("failed to read the archive")]
    Read(#[source] io::Error),
    /// Damage between entries, or within a compressed archive.
    #[error(
        "image archive is damaged: it cannot be read past byte {offset} ({detail}), after entry \
         \"{entry}\"; copy or save the archive again"
    )]
    Damaged { entry: String, offset: u64, detail: String },
    /// The end is missing.
    #[error(
        "image archive is cut off: entry \"{entry}\" at byte {offset} has {expected} bytes, but \
         the archive ends after {found} of them; copy or save the archive again"
    )]
    CutOff { entry: String, offset: u64, expected: u64, found: u64 },
    /// The end is missing, and with it a whole entry.
    #[error(
        "image archive is cut off: it ends at byte {offset}, after entry \"{entry}\", without an \
         end mark and without {missing}; copy or save the archive again"
    )]
    NoEnd { entry: String, offset: u64, missing: String },
    /// The content of an entry is not what its name or its descriptor promises.
    #[error(
        "image archive is damaged: entry \"{entry}\" at byte {offset} must have digest \
         {expected}, but has {found}; copy or save the archive again"
    )]
    Digest { entry: String, offset: u64, expected: Digest, found: Digest },
    /// The length of an entry is not what its descriptor promises.
    #[error(
        "image archive is damaged: entry \"{entry}\" at byte {offset} must have {expected} \
         bytes, but has {found}; copy or save the archive again"
    )]
    Size { entry: String, offset: u64, expected: u64, found: u64 },
    /// The archive was saved or packed incompletely.
    #[error(
        "image archive is incomplete: \"{by}\" names entry \"{entry}\", which is not in the \
         archive; save the image again"
    )]
    Missing { by: String, entry: String },
    /// The configuration and the layers do not belong together.
    #[error(
        "image archive is damaged: layer \"{entry}\" at byte {offset} must have content with \
         digest {expected}, but has {found}; copy or save the archive again"
    )]
    DiffId { entry: String, offset: u64, expected: Digest, found: Digest },
    /// The configuration and the layers do not belong together.
    #[error(
        "image archive is inconsistent: \"{entry}\" names {layers} layers, but the image's \
         configuration {diff_ids}; save the image again"
    )]
    LayerCount { entry: String, layers: usize, diff_ids: usize },
    /// The image was made wrongly, perhaps on purpose.
    #[error(
        "image archive is refused: layer \"{entry}\" at byte {offset} cannot be unpacked: \
         {problem}; build the image again"
    )]
    Layer { entry: String, offset: u64, problem: Box<LayerError> },
    /// A document does not have the form that it must have.
    #[error(
        "image archive is damaged: entry \"{entry}\" at byte {offset} is not valid: {detail}; copy or save the archive again"
    )]
    Document { entry: String, offset: u64, detail: String },
    /// A tag in the archive that no registry would accept.
    #[error("image archive is refused: entry \"{entry}\" has an image name that is not valid")]
    Name { entry: String, source: reference::ParseReferenceError },
    /// An archive for other machines.
    #[error(
        "image archive has no image for {machine}: \"{entry}\" lists {found}; save the image \
         with --platform {machine}"
    )]
    Platform { entry: String, machine: String, found: String },
    /// Most likely a root file system.
    #[error(
        "this is no image archive: none of its {entries} entries is index.json or manifest.json; \
         a root file-system archive is read by \"skep image import\""
    )]
    NoImage { entries: usize },
    /// What was given to `import` is damaged.
    #[error("root file-system archive is refused: {0}; make the archive again")]
    RootFs(LayerError),
}

/// An image of the archive whose parts were all found there.
struct Planned {
    names: BTreeSet<Reference>,
    manifest: Manifest,
    /// The manifest's bytes as they will be stored.
    bytes: Vec<u8>,
    /// Which entry says that the image exists.
    by: String,
}

pub(super) fn load(store: &Store, reader: impl Read) -> Result<Vec<Loaded>, Error> {
    let staging = store.staging()?;
    let contents = Contents::stage(reader, staging.path())?;
    let planned = if contents.has("index.json") {
        layout::plan(&contents, &store.options.platform)?
    } else if contents.has("manifest.json") {
        docker::plan(&contents)?
    } else {
        return Err(contents.no_image().into());
    };

    let mut checked = BTreeMap::new();
    for image in &planned {
        check(image, &contents, &mut checked)?;
    }
    let mut loaded = Vec::with_capacity(planned.len());
    let mut manifests = Vec::with_capacity(planned.len());
    for (n, image) in planned.iter().enumerate() {
        let mut pin = store.pin();
        let digest = digest_of_bytes(&image.bytes);
        pin.add([digest]);
        pin.add(image.manifest.blobs().iter().map(|blob| blob.digest));
        pin.add(diff_ids(image, &contents)?);
        let mut writer = BlobWriter::create(staging.path().join(format!("manifest-{n}")))?;
        writer.append(&image.bytes)?;
        writer.sync()?;
        manifests.push(writer);
        let names = image.names.iter().map(ToString::to_string).collect();
        loaded.push(Loaded { names, digest, pin });
    }
    publish(store, &planned, &contents)?;
    for manifest in manifests {
        store.blobs.publish(manifest.path(), manifest.digest())?;
        store.note_image(manifest.digest())?;
    }
    Ok(loaded)
}

/// Proves every layer of an image. `checked` remembers layers that several images share.
fn check(
    image: &Planned,
    contents: &Contents,
    checked: &mut BTreeMap<Digest, Digest>,
) -> Result<(), Error> {
    let diff_ids = diff_ids(image, contents)?;
    let layers = &image.manifest.layers;
    if layers.len() != diff_ids.len() {
        let (layers, diff_ids) = (layers.len(), diff_ids.len());
        return Err(ArchiveError::LayerCount { entry: image.by.clone(), layers, diff_ids }.into());
    }
    for (layer, expected) in layers.iter().zip(diff_ids) {
        let staged = contents.expect_blob(layer, &image.by)?;
        let found = match checked.get(&layer.digest) {
            Some(found) => *found,
            None => check_layer(staged, expected)?,
        };
        checked.insert(layer.digest, found);
        if found != expected {
            let (entry, offset) = (staged.entry.clone(), staged.offset);
            return Err(ArchiveError::DiffId { entry, offset, expected, found }.into());
        }
    }
    Ok(())
}

/// Reads a layer through and gives the digest of its uncompressed stream.
///
/// A stream that cannot be unpacked but is the right one was made so; any other one is damaged,
/// whatever else is wrong with it.
fn check_layer(staged: &Staged, expected: Digest) -> Result<Digest, Error> {
    let refused = |problem| ArchiveError::Layer {
        entry: staged.entry.clone(),
        offset: staged.offset,
        problem: Box::new(problem),
    };
    let broken = |error: io::Error| staged.invalid(&error);
    let file = File::open(&staged.path).at("open", &staged.path)?;
    let (compression, stream) = decoded(file).map_err(broken)?;
    if compression == Compression::None {
        if staged.digest == expected {
            scan(stream, EndMark::Optional).map_err(refused)?;
        }
        return Ok(staged.digest);
    }
    let mut stream = Hashing::new(stream);
    let scanned = scan(&mut stream, EndMark::Optional);
    let found = stream.finish().map_err(broken)?;
    if found == expected {
        scanned.map_err(refused)?;
    }
    Ok(found)
}

fn diff_ids(image: &Planned, contents: &Contents) -> Result<Vec<Digest>, Error> {
    let staged = contents.expect_blob(&image.manifest.config, &image.by)?;
    let bytes = contents.read(staged)?;
    let file = ConfigFile::parse(&bytes).map_err(|error| {
        let config::Error::Json(detail) = error;
        staged.invalid(&detail)
    })?;
    Ok(file.rootfs.diff_ids)
}

/// Syncs the blobs of all images and gives them their names.
fn publish(store: &Store, planned: &[Planned], contents: &Contents) -> Result<(), Error> {
    let mut published = BTreeSet::new();
    for image in planned {
        for blob in image.manifest.blobs() {
            if !published.insert(blob.digest) || store.blobs.has(blob.digest)? {
                continue;
            }
            let staged = contents.expect_blob(blob, &image.by)?;
            let file = File::open(&staged.path).at("open", &staged.path)?;
            file.sync_data().at("sync", &staged.path)?;
            store.blobs.publish(&staged.path, blob.digest)?;
        }
    }
    Ok(())
}

/// Text of an error and of what caused it: the reasons of a document are only in its cause.
fn manifest_detail(error: &manifest::Error) -> String {
    match error {
        manifest::Error::Json(cause) => cause.to_string(),
        other => other.to_string(),
    }
}
