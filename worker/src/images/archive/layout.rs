//! Archives with an OCI image layout: their manifests are taken as they are.

use std::collections::{BTreeMap, BTreeSet};

use skep_worker_core::image::manifest::{Document, Index};
use skep_worker_core::image::{Descriptor, Digest, Manifest, Platform, Reference};

use super::contents::Contents;
use super::{ArchiveError, Planned, docker, manifest_detail};
use crate::images::error::Error;

/// Where containerd, Docker and buildx write the full name.
const NAME: &str = "io.containerd.image.name";
/// Where the specification has a tag, and podman and skopeo a full name.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const INDEX: &str = "index.json";
/// An index within an index within an index is still plausible; more is a loop.
const INDEX_DEPTH_MAX: usize = 4;

/// The images that `index.json` names, one per manifest, with the names of `manifest.json` added.
pub(super) fn plan(contents: &Contents, machine: &Platform) -> Result<Vec<Planned>, Error> {
    let staged = contents.expect(INDEX, INDEX)?;
    let bytes = contents.read(staged)?;
    let index = match Document::parse(&bytes) {
        Ok(Document::Index(index)) => index,
        Ok(Document::Manifest(_)) => {
            return Err(staged.invalid(&"it is a manifest instead of an index").into());
        }
        Err(error) => return Err(staged.invalid(&manifest_detail(&error)).into()),
    };
    let by_config = docker::names_by_config(contents)?;
    let mut planned: BTreeMap<Digest, Planned> = BTreeMap::new();
    let mut order = Vec::new();
    for entry in entries_for(&index, machine) {
        let (digest, manifest, bytes) = resolve(contents, entry, machine)?;
        let names = names_of(entry)?;
        let image = planned.entry(digest).or_insert_with(|| {
            order.push(digest);
            let names = by_config.get(&manifest.config.digest).cloned().unwrap_or_default();
            Planned { names, manifest, bytes, by: INDEX.to_owned() }
        });
        image.names.extend(names);
    }
    if order.is_empty() {
        return Err(staged.invalid(&"it names no image").into());
    }
    Ok(order.iter().filter_map(|digest| planned.remove(digest)).collect())
}

/// Images for other machines are left out if there is one for this machine.
fn entries_for<'a>(index: &'a Index, machine: &'a Platform) -> Vec<&'a Descriptor> {
    let fits = |entry: &&Descriptor| {
        entry.platform.as_ref().is_none_or(|platform| platform.is_for(machine))
    };
    let fitting: Vec<&Descriptor> = index.images().filter(fits).collect();
    if fitting.is_empty() { index.images().collect() } else { fitting }
}

/// Follows an entry to the one manifest that it means on this machine.
fn resolve(
    contents: &Contents,
    entry: &Descriptor,
    machine: &Platform,
) -> Result<(Digest, Manifest, Vec<u8>), Error> {
    let mut entry = entry.clone();
    let mut by = INDEX.to_owned();
    for _ in 0..INDEX_DEPTH_MAX {
        let staged = contents.expect_blob(&entry, &by)?;
        let bytes = contents.read(staged)?;
        let document =
            Document::parse(&bytes).map_err(|error| staged.invalid(&manifest_detail(&error)))?;
        let index = match document {
            Document::Manifest(manifest) => return Ok((staged.digest, manifest, bytes)),
            Document::Index(index) => index,
        };
        by.clone_from(&staged.entry);
        entry = index.choose(machine).cloned().ok_or_else(|| ArchiveError::Platform {
            entry: staged.entry.clone(),
            machine: machine.to_string(),
            found: platforms(&index),
        })?;
    }
    Err(contents.expect(INDEX, INDEX)?.invalid(&"its indexes are nested too deeply").into())
}

fn platforms(index: &Index) -> String {
    let platforms: BTreeSet<String> = index
        .images()
        .filter_map(|entry| entry.platform.as_ref())
        .map(ToString::to_string)
        .collect();
    if platforms.is_empty() {
        return "no image at all".to_owned();
    }
    Vec::from_iter(platforms).join(", ")
}

fn names_of(entry: &Descriptor) -> Result<Option<Reference>, Error> {
    let full = entry.annotations.get(NAME).map(String::as_str);
    // A bare tag is no name: the specification lets the tool that reads the layout know the rest.
    let is_name = |name: &&String| name.contains(['/', ':']);
    let name = full.or(entry.annotations.get(REF_NAME).filter(is_name).map(String::as_str));
    let parsed = name.map(|name| name.parse::<Reference>()).transpose();
    let parsed = parsed.map_err(|source| ArchiveError::Name { entry: INDEX.to_owned(), source })?;
    Ok(parsed.map(|name| name.without_digest()))
}
