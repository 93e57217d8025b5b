//! The store as its users see it, with real directories, archives and overlay mounts.

mod fetching;
mod importing;
mod keeping;
mod loading;
mod unpacking;

use std::io::Cursor;
use std::path::{Path, PathBuf};

use skep_worker_core::image::Digest;

use super::testing::{TestDir, TestImage, archive_of};
use super::{Error, ImageStore, Loaded};

/// A store in a directory of its own.
struct TestStore {
    dir: TestDir,
    store: ImageStore,
}

impl TestStore {
    async fn new() -> Self {
        let dir = TestDir::new();
        let store = ImageStore::open(dir.path()).await.unwrap();
        Self { dir, store }
    }

    async fn load(&self, archive: Vec<u8>) -> Result<Vec<Loaded>, Error> {
        self.store.load(Cursor::new(archive)).await
    }

    /// Loads an image without a name.
    async fn put(&self, image: &TestImage) -> Loaded {
        let mut loaded = self.load(archive_of(&image.layout_files(&[]))).await.unwrap();
        assert_eq!(loaded.len(), 1);
        loaded.remove(0)
    }

    /// Collects what these images do not need.
    async fn keep<const N: usize>(&self, images: [Digest; N]) {
        self.store.retain(move || images.into()).await.unwrap();
    }

    /// Every file and directory below these parts of the store, without what is in the layers.
    fn files(&self) -> Vec<String> {
        let parts = ["blobs/sha256", "images", "layers", "partial", "records", "tmp"];
        let mut files: Vec<String> = Vec::new();
        for part in parts {
            files.extend(names(&self.dir.join(part)).iter().map(|name| format!("{part}/{name}")));
        }
        files
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn read(layers: &[PathBuf], nth: usize, file: &str) -> String {
    std::fs::read_to_string(layers[nth].join(file)).unwrap()
}
