//! Archives of `docker save` before version 25, and `manifest.json` in the ones since.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;

use serde::Deserialize;
use skep_worker_core::image::manifest::{CONFIG, LAYER};
use skep_worker_core::image::{Descriptor, Digest, Manifest, Reference};

use super::contents::{Contents, Staged};
use super::{ArchiveError, Planned};
use crate::images::error::{At, Error};
use crate::images::stream::decoded;

const MANIFEST: &str = "manifest.json";

/// One image of `manifest.json`; the other fields repeat what the configuration says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// Composes a manifest for every image of `manifest.json`.
pub(super) fn plan(contents: &Contents) -> Result<Vec<Planned>, Error> {
    let mut planned: Vec<Planned> = Vec::new();
    for saved in read(contents)? {
        let config = config_of(contents, &saved)?;
        let mut layers = Vec::new();
        for entry in saved.layers.iter().flatten() {
            let staged = contents.expect(entry, MANIFEST)?;
            let file = File::open(&staged.path).at("open", &staged.path)?;
            let (compression, _) = decoded(file).map_err(|error| staged.invalid(&error))?;
            layers.push(describe(staged, &format!("{LAYER}{}", compression.suffix())));
        }
        let manifest = Manifest::of(describe(config, CONFIG), layers);
        let (names, bytes) = (names_of(&saved)?, manifest.to_json());
        match planned.iter_mut().find(|known| known.bytes == bytes) {
            Some(known) => known.names.extend(names),
            None => planned.push(Planned { names, manifest, bytes, by: MANIFEST.to_owned() }),
        }
    }
    if planned.is_empty() {
        return Err(contents.expect(MANIFEST, MANIFEST)?.invalid(&"it names no image").into());
    }
    Ok(planned)
}

/// The names that `manifest.json` gives to images, by the digest of their configuration.
pub(super) fn names_by_config(
    contents: &Contents,
) -> Result<BTreeMap<Digest, BTreeSet<Reference>>, Error> {
    let mut names: BTreeMap<Digest, BTreeSet<Reference>> = BTreeMap::new();
    if !contents.has(MANIFEST) {
        return Ok(names);
    }
    for saved in read(contents)? {
        let config = config_of(contents, &saved)?;
        names.entry(config.digest).or_default().extend(names_of(&saved)?);
    }
    Ok(names)
}

fn read(contents: &Contents) -> Result<Vec<Saved>, Error> {
    let staged = contents.expect(MANIFEST, MANIFEST)?;
    let bytes = contents.read(staged)?;
    Ok(serde_json::from_slice(&bytes).map_err(|error| staged.invalid(&error))?)
}

/// The configuration, whose name is its digest wherever Docker wrote the archive.
fn config_of<'a>(contents: &'a Contents, saved: &Saved) -> Result<&'a Staged, Error> {
    let staged = contents.expect(&saved.config, MANIFEST)?;
    let name = saved.config.rsplit('/').next().unwrap_or(&saved.config);
    if let Some(expected) = Digest::from_hex(name.strip_suffix(".json").unwrap_or(name)) {
        staged.expect_digest(expected)?;
    }
    Ok(staged)
}

fn names_of(saved: &Saved) -> Result<BTreeSet<Reference>, Error> {
    let mut names = BTreeSet::new();
    for tag in saved.repo_tags.iter().flatten() {
        let name: Reference = tag
            .parse()
            .map_err(|source| ArchiveError::Name { entry: MANIFEST.to_owned(), source })?;
        names.insert(name.without_digest());
    }
    Ok(names)
}

fn describe(staged: &Staged, media_type: &str) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: staged.digest,
        size: staged.len,
        annotations: BTreeMap::new(),
        platform: None,
    }
}
