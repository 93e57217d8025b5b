//! What an image is, as data: its name, its digest, its documents and the changes of an import.
//!
//! Everything here is pure text and bytes. The store that keeps blobs on disk, hashes them and
//! unpacks layers is `skep_worker::images`; it and the CLI drive this module.
//!
//! # Reading order
//!
//! [`Digest`] names content, [`Reference`] names an image as a user writes it, [`manifest`] and
//! [`config`] are the two JSON documents of an image, and [`change`] edits the second one as
//! `docker import --change` does.
//!
//! # Invariants
//!
//! - Equal documents serialize to equal bytes: fields have a fixed order and maps are sorted, so
//!   an image that this program composes has the same digest on every machine.
//! - Only SHA-256 digests exist. Another algorithm is refused where it is read.
//!
//! # Sources
//!
//! OCI Image Format Specification 1.1 (descriptor, manifest, index, config); the grammar of
//! `distribution/reference`; moby `builder/dockerfile` for `--change`.

pub mod change;
pub mod config;
mod digest;
pub mod manifest;
pub mod reference;
mod words;

pub use config::{Healthcheck, ImageConfig};
pub use digest::{Digest, ParseDigestError};
pub use manifest::{Descriptor, Manifest, Platform};
pub use reference::Reference;
