//! The OCI image manifest and index, as far as skep acts on them.
//!
//! A document that came from outside is kept byte for byte in its blob, so nothing that is left
//! out here is lost. [`Manifest::of`] composes one for an image that had none.
//!
//! Source: OCI Image Format Specification 1.1, `descriptor.md`, `manifest.md`, `image-index.md`;
//! Docker's "Image Manifest Version 2, Schema 2" names other media types for the same fields.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// Media type of an OCI image manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image configuration.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a layer that is not compressed; `+gzip` and `+zstd` are added to it.
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const LAYER_PREFIXES: [&str; 2] =
    ["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."];
/// Marks an index entry that describes another image instead of being one.
const ATTESTATION: &str = "vnd.docker.reference.type";

/// A pointer to a blob: its digest, its length and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is. Docker leaves it out in places; then it is empty.
    #[serde(default)]
    pub media_type: String,
    /// Names the blob and proves it.
    pub digest: Digest,
    /// Length of the blob in bytes.
    pub size: u64,
    /// Names and remarks, such as `io.containerd.image.name`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// In an index: the machines that the image runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// The kind of machine an image runs on, in Go's words (`linux`, `amd64`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Operating system.
    pub os: String,
    /// Processor architecture.
    pub architecture: String,
    /// Revision of the architecture, such as `v8` of `arm64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on the architecture that Rust calls `arch` (`std::env::consts::ARCH`).
    pub fn linux(arch: &str) -> Self {
        let architecture = match arch {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            same => same, // riscv64, s390x, arm.
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Whether an image for `self` runs on a machine of platform `machine`.
    pub fn is_for(&self, machine: &Self) -> bool {
        self.os == machine.os && self.architecture == machine.architecture
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// The document that makes blobs an image: its configuration and its layers, lowest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Its own media type; Docker leaves it out in places.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The image's configuration.
    pub config: Descriptor,
    /// The file system, lowest layer first.
    pub layers: Vec<Descriptor>,
}

/// A list of manifests: one per platform, or one per image of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Images or further indexes.
    pub manifests: Vec<Descriptor>,
}

/// What a descriptor of an index may point to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several images.
    Index(Index),
}

/// Why a document is no image.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names every field")]
pub enum Error {
    /// The bytes are not the JSON that the specification asks for.
    #[error("not valid JSON of an image manifest or index")]
    Json(#[from] serde_json::Error),
    /// Version 1 was dropped by Docker in 2019.
    #[error("manifest schema version {0} is not supported, only 2 is")]
    SchemaVersion(u32),
    /// An OCI artifact, such as a chart or a signature.
    #[error("this is no container image: its config has media type \"{0}\"")]
    Artifact(String),
    /// The layer needs something that skep has not.
    #[error("layer {digest} has media type \"{media_type}\", which is no layer of a file system")]
    Layer { digest: Digest, media_type: String },
}

impl Manifest {
    /// Composes the manifest of an image from its configuration and its layers, lowest first.
    pub fn of(config: Descriptor, layers: Vec<Descriptor>) -> Self {
        Self { schema_version: 2, media_type: Some(MANIFEST.to_owned()), config, layers }
    }

    /// Reads a manifest and checks that it is one of a container image.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let manifest: Self = serde_json::from_slice(bytes)?;
        if manifest.schema_version != 2 {
            return Err(Error::SchemaVersion(manifest.schema_version));
        }
        if ![CONFIG, DOCKER_CONFIG, ""].contains(&manifest.config.media_type.as_str()) {
            return Err(Error::Artifact(manifest.config.media_type));
        }
        let is_layer = |layer: &&Descriptor| {
            LAYER_PREFIXES.iter().any(|prefix| layer.media_type.starts_with(prefix))
        };
        match manifest.layers.iter().find(|layer| !is_layer(layer)) {
            None => Ok(manifest),
            Some(layer) => {
                Err(Error::Layer { digest: layer.digest, media_type: layer.media_type.clone() })
            }
        }
    }

    /// The bytes that are stored and hashed.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest has only string keys")
    }

    /// The configuration, then the layers, each blob once.
    pub fn blobs(&self) -> Vec<&Descriptor> {
        let mut blobs: Vec<&Descriptor> = Vec::with_capacity(1 + self.layers.len());
        for blob in std::iter::once(&self.config).chain(&self.layers) {
            if !blobs.iter().any(|known| known.digest == blob.digest) {
                blobs.push(blob);
            }
        }
        blobs
    }
}

impl Document {
    /// Reads a manifest or an index; a document with `manifests` is an index.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Probe {
            manifests: Option<serde::de::IgnoredAny>,
        }
        let probe: Probe = serde_json::from_slice(bytes)?;
        if probe.manifests.is_none() {
            return Manifest::parse(bytes).map(Self::Manifest);
        }
        let index: Index = serde_json::from_slice(bytes)?;
        if index.schema_version != 2 {
            return Err(Error::SchemaVersion(index.schema_version));
        }
        Ok(Self::Index(index))
    }
}

impl Index {
    /// The entries that are images, without attestations.
    pub fn images(&self) -> impl Iterator<Item = &Descriptor> {
        self.manifests.iter().filter(|entry| {
            let is_known = |platform: &Platform| platform.os != "unknown";
            !entry.annotations.contains_key(ATTESTATION)
                && entry.platform.as_ref().is_none_or(is_known)
        })
    }

    /// The entry to use on `machine`: the first made for it, else the first that names no platform.
    pub fn choose(&self, machine: &Platform) -> Option<&Descriptor> {
        let fits = |entry: &&Descriptor| {
            entry.platform.as_ref().is_some_and(|platform| platform.is_for(machine))
        };
        self.images().find(fits).or_else(|| self.images().find(|entry| entry.platform.is_none()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(media_type: &str, byte: u8) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest: Digest::from_bytes([byte; 32]),
            size: u64::from(byte),
            annotations: BTreeMap::new(),
            platform: None,
        }
    }

    #[test]
    fn a_composed_manifest_has_fixed_bytes() {
        let manifest = Manifest::of(descriptor(CONFIG, 1), vec![descriptor(LAYER, 2)]);
        let expect = format!(
            "{{\"schemaVersion\":2,\"mediaType\":\"{MANIFEST}\",\
             \"config\":{{\"mediaType\":\"{CONFIG}\",\"digest\":\"sha256:{}\",\"size\":1}},\
             \"layers\":[{{\"mediaType\":\"{LAYER}\",\"digest\":\"sha256:{}\",\"size\":2}}]}}",
            "01".repeat(32),
            "02".repeat(32),
        );
        assert_eq!(String::from_utf8(manifest.to_json()).unwrap(), expect);
        assert_eq!(Manifest::parse(expect.as_bytes()).unwrap(), manifest);
    }

    #[test]
    fn a_blob_that_is_named_twice_counts_once() {
        let layer = descriptor(LAYER, 2);
        let manifest = Manifest::of(descriptor(CONFIG, 1), vec![layer.clone(), layer]);
        assert_eq!(manifest.blobs().len(), 2);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let config = descriptor(CONFIG, 1);
        let json = |manifest: Manifest| manifest.to_json();
        for (bytes, reason) in [
            (b"{".to_vec(), "not valid JSON"),
            (b"[]".to_vec(), "not valid JSON"),
            (
                json(Manifest { schema_version: 1, ..Manifest::of(config.clone(), vec![]) }),
                "schema version 1 is not supported",
            ),
            (
                json(Manifest::of(
                    descriptor("application/vnd.cncf.helm.config.v1+json", 1),
                    vec![],
                )),
                "no container image",
            ),
            (
                json(Manifest::of(config, vec![descriptor("application/vnd.in-toto+json", 3)])),
                "which is no layer of a file system",
            ),
        ] {
            let error = Document::parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn an_index_gives_the_image_of_the_machine() {
        let entry = |byte, architecture: &str, os: &str| Descriptor {
            platform: Some(Platform {
                os: os.to_owned(),
                architecture: architecture.to_owned(),
                variant: None,
            }),
            ..descriptor(MANIFEST, byte)
        };
        let manifests = vec![
            entry(1, "unknown", "unknown"),
            entry(2, "arm64", "linux"),
            entry(3, "amd64", "linux"),
        ];
        let index = Index { schema_version: 2, manifests };
        let chosen = |arch| index.choose(&Platform::linux(arch)).map(|entry| entry.size);
        assert_eq!(chosen("x86_64"), Some(3));
        assert_eq!(chosen("aarch64"), Some(2));
        assert_eq!(chosen("riscv64"), None);
    }
}
