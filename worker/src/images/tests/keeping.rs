//! What stays, what goes, and what a crash may leave behind.

use std::fs;

use futures::TryStreamExt;

use super::{TestStore, names};
use crate::images::stream::digest_of_bytes;
use crate::images::testing::{Tar, TestDir, TestImage};
use crate::images::{Error, ImageStore};

fn tar(name: &str) -> Vec<u8> {
    Tar::new().file(name, name.as_bytes()).build()
}

/// Two images with a common layer.
fn pair() -> [TestImage; 2] {
    ["one", "two"].map(|name| TestImage::new(&[tar("base"), tar(name)]))
}

#[tokio::test]
async fn removing_an_image_leaves_what_others_need() {
    let test = TestStore::new().await;
    let [one, two] = pair();
    for image in [&one, &two] {
        let loaded = test.put(image).await;
        test.store.layers(loaded.digest).await.unwrap();
    }
    assert_eq!(names(&test.dir.join("blobs/sha256")).len(), 7);
    assert_eq!(names(&test.dir.join("layers")).len(), 3);

    test.keep([two.digest()]).await;
    assert!(!test.store.has(one.digest()).await.unwrap());
    assert_eq!(test.store.missing(one.digest()).await.unwrap(), [one.digest()]);
    assert!(test.store.has(two.digest()).await.unwrap());
    assert_eq!(test.store.layers(two.digest()).await.unwrap().len(), 2);
    assert_eq!(names(&test.dir.join("layers")).len(), 2);

    test.keep([]).await;
    assert_eq!(test.files(), [""; 0]);
}

#[tokio::test]
async fn the_collector_keeps_what_it_is_told_and_what_is_pinned() {
    let test = TestStore::new().await;
    let [one, two] = pair();
    let first = test.put(&one).await;
    let second = test.put(&two).await;
    let stray = test.dir.join("partial").join(digest_of_bytes(b"stray").hex());
    fs::write(&stray, b"half").unwrap();
    let before = names(&test.dir.join("blobs/sha256"));

    test.keep([]).await;
    assert_eq!(names(&test.dir.join("blobs/sha256")), before, "both are pinned");
    assert!(!stray.exists());

    drop(first);
    test.keep([]).await;
    assert!(!test.store.has(one.digest()).await.unwrap());
    assert!(test.store.has(two.digest()).await.unwrap());

    drop(second);
    test.keep([two.digest()]).await;
    assert!(test.store.has(two.digest()).await.unwrap());
    test.keep([one.digest()]).await;
    assert_eq!(test.files(), [""; 0]);
}

#[tokio::test]
async fn no_other_user_can_enter_the_store() {
    use std::os::unix::fs::PermissionsExt;
    let dir = TestDir::new();
    let path = dir.join("store");
    ImageStore::open(&path).await.unwrap();
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn what_is_missing_is_listed_and_named() {
    let test = TestStore::new().await;
    let [image, _] = pair();
    let digest = test.put(&image).await.digest;
    let layer = digest_of_bytes(&image.layers[1]);
    fs::remove_file(test.dir.join("blobs/sha256").join(layer.hex())).unwrap();
    assert_eq!(test.store.missing(digest).await.unwrap(), [layer]);
    assert!(!test.store.has(digest).await.unwrap());
    assert_eq!(test.store.list().await.unwrap(), []);
    let error = test.store.layers(digest).await.unwrap_err().to_string();
    let expect = format!("image {digest} is not complete on this node: blob {layer} is missing");
    assert_eq!(error, expect);
}

#[tokio::test]
async fn a_blob_is_served_from_any_offset() {
    let test = TestStore::new().await;
    let [image, _] = pair();
    test.put(&image).await;
    let content = &image.layers[0];
    for offset in [0, 700, content.len()] {
        let blob = test.store.open_blob(digest_of_bytes(content)).await.unwrap();
        assert_eq!(blob.size, content.len() as u64);
        let stream = blob.stream(offset as u64).await.unwrap();
        let chunks: Vec<bytes::Bytes> = stream.try_collect().await.unwrap();
        assert_eq!(chunks.concat(), content[offset..]);
    }
    let absent = digest_of_bytes(b"absent");
    assert!(matches!(test.store.open_blob(absent).await, Err(Error::NotFound(d)) if d == absent));
}

#[tokio::test]
async fn opening_clears_what_a_crash_left_and_nothing_else() {
    let dir = TestDir::new();
    let [image, _] = pair();
    let store = ImageStore::open(dir.path()).await.unwrap();
    let test = super::TestStore { dir, store };
    let digest = test.put(&image).await.digest;
    test.store.layers(digest).await.unwrap();
    let whole = test.files();

    let in_use = ImageStore::open(test.dir.path()).await.unwrap_err();
    assert!(in_use.to_string().ends_with("is used by another process"), "{in_use}");
    let TestStore { dir, store } = test;
    drop(store);

    let ghost = digest_of_bytes(b"ghost").hex();
    fs::create_dir_all(dir.join("tmp/load-1/deep")).unwrap();
    fs::write(dir.join("tmp/load-1/deep/file"), b"half").unwrap();
    fs::create_dir_all(dir.join("layers").join(&ghost)).unwrap();
    fs::write(dir.join("images").join(&ghost), b"").unwrap();
    let partial = dir.join("partial").join(&ghost);
    fs::write(&partial, b"half").unwrap();

    let store = ImageStore::open(dir.path()).await.unwrap();
    let test = TestStore { dir, store };
    assert!(partial.exists(), "a download goes on after a restart");
    fs::remove_file(partial).unwrap();
    assert_eq!(test.files(), whole);
    assert!(test.store.has(digest).await.unwrap());
    assert_eq!(test.store.layers(digest).await.unwrap().len(), 2);
}
