//! What the tests of this module share: tar archives as words, directories, and image archives.

use std::io::Write;
use std::path::{Path, PathBuf};

use tar::EntryType;

use super::stream::digest_of_bytes;
use skep_worker_core::image::Digest;

/// A directory that goes with the test.
pub(super) struct TestDir(tempfile::TempDir);

impl TestDir {
    pub(super) fn new() -> Self {
        let prefix = format!("skep-images-{}-", std::process::id());
        Self(tempfile::Builder::new().prefix(&prefix).tempdir().unwrap())
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

/// Whether the process may set owners and make devices; says so when a test has to be skipped.
pub(super) fn is_root(test: &str) -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{test} needs root, and CI has it");
        println!("skipped: {test} needs root");
    }
    is_root
}

/// Writes a tar archive entry by entry, also such as no tool would write.
pub(super) struct Tar {
    bytes: Vec<u8>,
    uid: u64,
    gid: u64,
}

impl Tar {
    pub(super) fn new() -> Self {
        // Owned by whoever runs the tests, so that they need no privilege where it is not tested.
        let uid = u64::from(nix::unistd::geteuid().as_raw());
        let gid = u64::from(nix::unistd::getegid().as_raw());
        Self { bytes: Vec::new(), uid, gid }
    }

    pub(super) fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub(super) fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, 0o644, "", content)
    }

    pub(super) fn mode(self, name: &str, mode: u32, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, mode, "", content)
    }

    pub(super) fn dir(self, name: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, name, mode, "", b"")
    }

    pub(super) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, 0o777, target, b"")
    }

    pub(super) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, 0o644, target, b"")
    }

    /// A record of extended attributes for the next entry.
    pub(super) fn pax(mut self, key: &str, value: &[u8]) -> Self {
        let body_len = |digits: usize| digits + key.len() + value.len() + 3;
        let digits = (1..4).find(|n| body_len(*n).to_string().len() == *n).unwrap();
        let mut record = format!("{} {key}=", body_len(digits)).into_bytes();
        record.extend_from_slice(value);
        record.push(b'\n');
        self = self.entry(EntryType::XHeader, "pax", 0o644, "", &record);
        self
    }

    pub(super) fn device(mut self, kind: EntryType, name: &str, major: u32, minor: u32) -> Self {
        let mut header = self.header(kind, name, 0o640, "", 0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self
    }

    pub(super) fn entry(
        mut self,
        kind: EntryType,
        name: &str,
        mode: u32,
        target: &str,
        content: &[u8],
    ) -> Self {
        let mut header = self.header(kind, name, mode, target, content.len());
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(content);
        let padding = content.len().next_multiple_of(512) - content.len();
        self.bytes.resize(self.bytes.len() + padding, 0);
        self
    }

    fn header(
        &self,
        kind: EntryType,
        name: &str,
        mode: u32,
        target: &str,
        len: usize,
    ) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(self.uid);
        header.set_gid(self.gid);
        header.set_mtime(1_700_000_000);
        header.set_size(len as u64);
        // Written as they are: the setters of the crate refuse `..` and absolute paths.
        let fields = header.as_ustar_mut().unwrap();
        fields.name[..name.len()].copy_from_slice(name.as_bytes());
        fields.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header
    }

    /// The archive without the blocks that end one.
    pub(super) fn without_end(self) -> Vec<u8> {
        self.bytes
    }

    pub(super) fn build(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn zstd(bytes: &[u8]) -> Vec<u8> {
    ::zstd::encode_all(bytes, 1).unwrap()
}

/// The bytes of an image, from which the archives of every tool are made.
pub(super) struct TestImage {
    pub(super) config: Vec<u8>,
    /// The blobs as they are stored, perhaps compressed.
    pub(super) layers: Vec<Vec<u8>>,
    pub(super) manifest: Vec<u8>,
}

impl TestImage {
    /// An image of uncompressed layers.
    pub(super) fn new(layers: &[Vec<u8>]) -> Self {
        Self::compressed(layers, |tar| tar.to_vec())
    }

    pub(super) fn compressed(tars: &[Vec<u8>], compress: fn(&[u8]) -> Vec<u8>) -> Self {
        let diff_ids = tars.iter().map(|tar| digest_of_bytes(tar)).collect();
        let layers = tars.iter().map(|tar| compress(tar)).collect();
        Self::with_diff_ids(layers, diff_ids)
    }

    pub(super) fn with_diff_ids(layers: Vec<Vec<u8>>, diff_ids: Vec<Digest>) -> Self {
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Cmd": ["/app"], "Env": ["A=1"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let kind = |blob: &[u8]| match blob {
            [0x1f, 0x8b, ..] => "+gzip",
            [0x28, 0xb5, ..] => "+zstd",
            _ => "",
        };
        let descriptor = |media_type: String, blob: &[u8]| {
            serde_json::json!({
                "mediaType": media_type, "digest": digest_of_bytes(blob), "size": blob.len(),
            })
        };
        let layer = |blob: &Vec<u8>| {
            descriptor(format!("application/vnd.oci.image.layer.v1.tar{}", kind(blob)), blob)
        };
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json".to_owned(), &config),
            "layers": layers.iter().map(layer).collect::<Vec<_>>(),
        });
        Self { config, layers, manifest: serde_json::to_vec(&manifest).unwrap() }
    }

    pub(super) fn digest(&self) -> Digest {
        digest_of_bytes(&self.manifest)
    }

    /// All blobs with their digests.
    pub(super) fn blobs(&self) -> Vec<(Digest, Vec<u8>)> {
        let all = [&self.manifest, &self.config].into_iter().chain(&self.layers);
        all.map(|blob| (digest_of_bytes(blob), blob.clone())).collect()
    }

    /// The files of an archive of Docker before 25.
    pub(super) fn docker_files(&self, tags: &[&str]) -> Vec<(String, Vec<u8>)> {
        let config = format!("{}.json", digest_of_bytes(&self.config).hex());
        let layer = |nth: usize| format!("layer{nth}/layer.tar");
        let layers: Vec<String> = (0..self.layers.len()).map(layer).collect();
        let manifest = serde_json::json!([{"Config": config, "RepoTags": tags, "Layers": layers}]);
        let mut files = vec![(config, self.config.clone())];
        for (nth, blob) in self.layers.iter().enumerate() {
            files.push((format!("layer{nth}/VERSION"), b"1.0".to_vec()));
            files.push((layer(nth), blob.clone()));
        }
        files.push(("manifest.json".to_owned(), serde_json::to_vec(&manifest).unwrap()));
        files
    }

    /// The files of an OCI layout, with the names that Docker's or podman's annotation gives.
    pub(super) fn layout_files(&self, annotations: &[(&str, &str)]) -> Vec<(String, Vec<u8>)> {
        let annotations: serde_json::Map<_, _> =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": self.digest(), "size": self.manifest.len(), "annotations": annotations,
        }]});
        let mut files: Vec<_> = self.blobs().into_iter().map(blob_file).collect();
        files.push(("index.json".to_owned(), serde_json::to_vec(&index).unwrap()));
        files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
        files
    }
}

pub(super) fn blob_file((digest, blob): (Digest, Vec<u8>)) -> (String, Vec<u8>) {
    (format!("blobs/sha256/{}", digest.hex()), blob)
}

/// An archive with these files.
pub(super) fn archive_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    files.iter().fold(Tar::new(), |tar, (name, content)| tar.file(name, content)).build()
}
