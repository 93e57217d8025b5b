//! Fetches from fake nodes that are honest, slow, broken or lying.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use skep_common::NodeId;
use skep_worker_core::image::Digest;

use super::{TestStore, read};
use crate::images::stream::digest_of_bytes;
use crate::images::testing::{Tar, TestDir, TestImage, gzip};
use crate::images::{
    BlobSource, BlobStream, Error, Holder, ImageStore, Options, Progress, SourceError, Transfer,
};

/// Bytes of one chunk, so that every layer here has several.
const CHUNK_LEN: usize = 700;

/// What a fake node does when it is asked for a layer. Manifest and configuration it always gives,
/// unless it refuses everything.
#[derive(Debug, Clone, Copy)]
enum Conduct {
    Honest,
    Refuses,
    /// Changes one bit of the last byte.
    Flips,
    /// Sends this many chunks and an error.
    Breaks(usize),
    /// Sends this many chunks and then nothing, for ever.
    Hangs(usize),
    /// Sends this many chunks and says that this is all.
    Ends(usize),
    /// Sends a chunk more than there is.
    Exceeds,
    /// Sends one flipped chunk and an error: only the whole shows that it lied.
    LiesAndBreaks,
}

/// The nodes of a cluster, and who was asked for what from which offset.
struct Nodes {
    blobs: BTreeMap<Digest, Vec<u8>>,
    layers: Vec<Digest>,
    conduct: Vec<Conduct>,
    asked: Mutex<Vec<(u128, Digest, u64)>>,
}

impl Nodes {
    fn new(images: &[&TestImage], conduct: &[Conduct]) -> Self {
        let layers = images.iter().flat_map(|image| &image.layers);
        Self {
            blobs: images.iter().flat_map(|image| image.blobs()).collect(),
            layers: layers.map(|layer| digest_of_bytes(layer)).collect(),
            conduct: conduct.to_vec(),
            asked: Mutex::default(),
        }
    }

    fn holders(&self) -> Vec<Holder> {
        (0..self.conduct.len() as u128)
            .map(|n| Holder { node_id: NodeId(n), address: format!("10.0.0.{n}:2377") })
            .collect()
    }

    /// Node and offset of every question for a blob, in order.
    fn asked_for(&self, digest: Digest) -> Vec<(u128, u64)> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(_, d, _)| *d == digest).map(|(node, _, at)| (*node, *at)).collect()
    }

    fn answer(&self, node: u128, digest: Digest, offset: u64) -> Result<BlobStream, SourceError> {
        let conduct = self.conduct[usize::try_from(node).unwrap()];
        if matches!(conduct, Conduct::Refuses) {
            return Err("connection refused".into());
        }
        let Some(blob) = self.blobs.get(&digest) else { return Err("not found".into()) };
        let is_layer = self.layers.contains(&digest);
        let conduct = if is_layer { conduct } else { Conduct::Honest };
        let mut rest = blob[usize::try_from(offset).unwrap()..].to_vec();
        match conduct {
            Conduct::Flips => *rest.last_mut().unwrap() ^= 1,
            Conduct::LiesAndBreaks => rest[0] ^= 1,
            Conduct::Exceeds => rest.push(0),
            _ => {}
        }
        let chunks: Vec<Result<Bytes, SourceError>> =
            rest.chunks(CHUNK_LEN).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        let chunks = futures::stream::iter(chunks);
        let broken = || futures::stream::iter([Err("connection reset".into())]);
        Ok(match conduct {
            Conduct::Breaks(n) => chunks.take(n).chain(broken()).boxed(),
            Conduct::LiesAndBreaks => chunks.take(1).chain(broken()).boxed(),
            Conduct::Hangs(n) => chunks.take(n).chain(futures::stream::pending()).boxed(),
            Conduct::Ends(n) => chunks.take(n).boxed(),
            _ => chunks.boxed(),
        })
    }
}

impl BlobSource for Nodes {
    fn open<'a>(
        &'a self,
        holder: &'a Holder,
        digest: Digest,
        offset: u64,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        let node = holder.node_id.0;
        self.asked.lock().unwrap().push((node, digest, offset));
        Box::pin(async move { self.answer(node, digest, offset) })
    }
}

/// A layer of a few chunks whose compressed form is not much shorter.
fn tar(name: &str) -> Vec<u8> {
    let mut state = 1u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(5000)
    .collect();
    Tar::new().file(name, name.as_bytes()).file("noise", &noise).build()
}

fn image() -> TestImage {
    TestImage::new(&[tar("one")])
}

async fn patient_for(stall: Duration) -> TestStore {
    let dir = TestDir::new();
    let options = Options { stall_timeout: stall, ..Options::default() };
    let store = ImageStore::open_with(dir.path(), options).await.unwrap();
    TestStore { dir, store }
}

async fn fetch(test: &TestStore, nodes: &Nodes, image: &TestImage) -> Result<Transfer, Error> {
    let progress = Progress::default();
    test.store.fetch(image.digest(), &nodes.holders(), nodes, &progress).await?;
    Ok(progress.get())
}

#[tokio::test]
async fn an_image_is_fetched_verified_and_unpacked() {
    let image = TestImage::compressed(&[tar("one"), tar("two"), tar("one"), tar("three")], gzip);
    let test = TestStore::new().await;
    let nodes = Nodes::new(&[&image], &[Conduct::Honest, Conduct::Honest]);
    let transfer = fetch(&test, &nodes, &image).await.unwrap();
    assert!(test.store.has(image.digest()).await.unwrap());
    assert_eq!(test.store.list().await.unwrap()[0].digest, image.digest());
    let size = test.store.config(image.digest()).await.unwrap().size_bytes;
    assert_eq!(transfer, Transfer { done_bytes: size, total_bytes: size });
    assert_eq!(super::names(&test.dir.join("layers")).len(), 3, "unpacked on the way");
    let layers = test.store.layers(image.digest()).await.unwrap();
    assert_eq!([read(&layers, 0, "two"), read(&layers, 1, "one")], ["two", "one"]);
    assert_eq!(super::names(&test.dir.join("partial")), [""; 0]);

    let asked = nodes.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 5, "each blob once: {asked:?}");
    let of_first = asked.iter().filter(|(node, ..)| *node == 0).count();
    assert!((2..=3).contains(&of_first), "the load is spread: {asked:?}");

    let again = fetch(&test, &nodes, &image).await.unwrap();
    assert_eq!(again, transfer);
    assert_eq!(nodes.asked.lock().unwrap().len(), 5, "nothing is fetched twice");
}

#[tokio::test]
async fn layers_that_another_image_brought_are_not_fetched() {
    let first = TestImage::new(&[tar("base"), tar("one")]);
    let second = TestImage::new(&[tar("base"), tar("two")]);
    let test = TestStore::new().await;
    test.put(&first).await;
    let nodes = Nodes::new(&[&second], &[Conduct::Honest]);
    fetch(&test, &nodes, &second).await.unwrap();
    assert_eq!(nodes.asked_for(digest_of_bytes(&second.layers[0])), []);
    assert_eq!(nodes.asked_for(digest_of_bytes(&second.layers[1])), [(0, 0)]);
}

#[tokio::test]
async fn a_bad_holder_is_skipped_and_another_one_used() {
    let image = image();
    let layer = digest_of_bytes(&image.layers[0]);
    // The layer is part 1, so node 1 is asked for it first, then node 0.
    for (conduct, expect) in [
        (Conduct::Refuses, vec![(1, 0), (0, 0)]),
        (Conduct::Flips, vec![(1, 0), (0, 0)]),
        (Conduct::Exceeds, vec![(1, 0), (0, 0)]),
        (Conduct::Breaks(2), vec![(1, 0), (0, 1400)]),
        (Conduct::Hangs(3), vec![(1, 0), (0, 2100)]),
        (Conduct::Ends(1), vec![(1, 0), (0, 700)]),
        // Node 0 goes on with a lie, the whole is wrong, so it is asked for all of it.
        (Conduct::LiesAndBreaks, vec![(1, 0), (0, 700), (0, 0)]),
    ] {
        let test = patient_for(Duration::from_millis(50)).await;
        let nodes = Nodes::new(&[&image], &[Conduct::Honest, conduct]);
        let transfer = fetch(&test, &nodes, &image).await;
        let transfer = transfer.unwrap_or_else(|error| panic!("{conduct:?}: {error}"));
        assert_eq!(nodes.asked_for(layer), expect, "{conduct:?}");
        assert_eq!(transfer.done_bytes, transfer.total_bytes, "{conduct:?}");
        let layers = test.store.layers(image.digest()).await.unwrap();
        assert_eq!(read(&layers, 0, "one"), "one", "{conduct:?}");
    }
}

#[tokio::test]
async fn when_nobody_is_left_the_error_names_the_blob_and_every_holder() {
    let image = image();
    let layer = digest_of_bytes(&image.layers[0]);
    let mut flipped = image.layers[0].clone();
    *flipped.last_mut().unwrap() ^= 1;
    let wrong = digest_of_bytes(&flipped);
    let len = flipped.len();
    let conduct =
        [Conduct::Refuses, Conduct::Flips, Conduct::Exceeds, Conduct::Hangs(0), Conduct::Breaks(1)];
    let test = patient_for(Duration::from_millis(50)).await;
    let nodes = Nodes::new(&[&image], &conduct);
    let error = fetch(&test, &nodes, &image).await.unwrap_err().to_string();
    let node = |n: u128| format!("node {} at 10.0.0.{n}:2377", NodeId(n));
    let expect = format!(
        "blob {layer} could not be fetched from any of its holders: \
         {} sent wrong bytes, with digest {wrong}; \
         {} sent more than {len} bytes; \
         {} sent nothing for 50ms; \
         {} broke off after 700 bytes: connection reset; \
         {} did not give it: connection refused",
        node(1),
        node(2),
        node(3),
        node(4),
        node(0),
    );
    assert_eq!(error, expect);
    assert!(!test.store.has(image.digest()).await.unwrap());
    assert_eq!(test.store.missing(image.digest()).await.unwrap(), [layer]);

    // What the last one gave is kept: an honest holder that comes back is asked for the rest.
    let nodes = Nodes::new(&[&image], &[Conduct::Honest]);
    fetch(&test, &nodes, &image).await.unwrap();
    assert_eq!(nodes.asked_for(layer), [(0, 700)]);
}

#[tokio::test]
async fn a_single_holder_that_flips_a_byte_is_named_with_both_digests() {
    let image = image();
    let layer = digest_of_bytes(&image.layers[0]);
    let test = TestStore::new().await;
    let nodes = Nodes::new(&[&image], &[Conduct::Flips]);
    let error = fetch(&test, &nodes, &image).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("blob {layer} could not be fetched")), "{error}");
    assert!(error.contains("10.0.0.0:2377 sent wrong bytes, with digest sha256:"), "{error}");
    assert_eq!(nodes.asked_for(layer), [(0, 0)]);
}

#[tokio::test]
async fn without_holders_the_error_says_so() {
    let image = image();
    let nodes = Nodes::new(&[&image], &[]);
    let error = fetch(&TestStore::new().await, &nodes, &image).await.unwrap_err().to_string();
    assert_eq!(error, format!("blob {} has no living holder", image.digest()));
}

#[tokio::test]
async fn an_image_whose_layer_is_not_what_its_configuration_promises_is_refused() {
    let tar = tar("one");
    let other = digest_of_bytes(b"other");
    let image = TestImage::with_diff_ids(vec![tar.clone()], vec![other]);
    let test = TestStore::new().await;
    let nodes = Nodes::new(&[&image], &[Conduct::Honest]);
    let error = fetch(&test, &nodes, &image).await.unwrap_err().to_string();
    let layer = digest_of_bytes(&tar);
    let expect = format!(
        "layer {layer} of image {} cannot be unpacked: its content has digest {layer}, but the \
         image's configuration names {other}",
        image.digest()
    );
    assert_eq!(error, expect);
    assert_eq!(super::names(&test.dir.join("layers")), [""; 0]);
    assert_eq!(super::names(&test.dir.join("tmp")), [""; 0]);

    let count = TestImage::with_diff_ids(vec![tar], vec![]);
    let nodes = Nodes::new(&[&count], &[Conduct::Honest]);
    let error = fetch(&test, &nodes, &count).await.unwrap_err().to_string();
    assert!(error.ends_with("has 1 layers, but its configuration names 0"), "{error}");
}

#[tokio::test]
async fn fetches_at_the_same_time_share_the_work() {
    let image = TestImage::new(&[tar("one"), tar("two")]);
    let test = TestStore::new().await;
    let nodes = Nodes::new(&[&image], &[Conduct::Honest]);
    let fetches = (0..5).map(|_| fetch(&test, &nodes, &image));
    for transfer in futures::future::join_all(fetches).await {
        let transfer = transfer.unwrap();
        assert_eq!(transfer.done_bytes, transfer.total_bytes);
    }
    assert_eq!(nodes.asked.lock().unwrap().len(), 4, "manifest, configuration and two layers");
}

#[tokio::test]
async fn a_dropped_fetch_is_gone_on_with() {
    let image = image();
    let layer = digest_of_bytes(&image.layers[0]);
    let test = TestStore::new().await;
    let nodes = Nodes::new(&[&image], &[Conduct::Hangs(4)]);
    let holders = nodes.holders();
    let progress = Progress::default();
    let mut watch = progress.subscribe();
    let before = (image.manifest.len() + image.config.len()) as u64;
    let reached = watch.wait_for(|transfer| transfer.done_bytes == before + 2800);
    tokio::select! {
        result = test.store.fetch(image.digest(), &holders, &nodes, &progress) => {
            panic!("the holder hangs, but: {result:?}")
        }
        reached = reached => assert!(reached.is_ok()),
    }
    let nodes = Nodes::new(&[&image], &[Conduct::Honest]);
    let transfer = fetch(&test, &nodes, &image).await.unwrap();
    assert_eq!(nodes.asked_for(layer), [(0, 2800)]);
    assert_eq!(transfer.done_bytes, transfer.total_bytes);
}

#[tokio::test]
async fn the_collector_leaves_a_fetch_in_flight_alone() {
    let image = image();
    let test = TestStore::new().await;
    let nodes = Nodes::new(&[&image], &[Conduct::Hangs(4)]);
    let holders = nodes.holders();
    let progress = Progress::default();
    let mut watch = progress.subscribe();
    let layer = digest_of_bytes(&image.layers[0]);
    let half = (image.manifest.len() + image.config.len()) as u64 + 2800;
    let collect = async {
        assert!(watch.wait_for(|transfer| transfer.done_bytes == half).await.is_ok());
        // The last byte of the configuration is counted before the blob has its name.
        while test.store.missing(image.digest()).await.unwrap() != [layer] {}
        test.keep([]).await;
    };
    tokio::select! {
        result = test.store.fetch(image.digest(), &holders, &nodes, &progress) => {
            panic!("the holder hangs, but: {result:?}")
        }
        () = collect => {}
    }
    assert_eq!(test.store.missing(image.digest()).await.unwrap(), [layer]);
    assert_eq!(super::names(&test.dir.join("partial")), [layer.hex()]);
}

#[test]
fn a_fetch_may_run_on_any_thread() {
    fn is_send<T: Send>(_: T) {}
    let check = |store: &ImageStore, nodes: &Nodes, progress: &Progress| {
        is_send(store.fetch(Digest::from_bytes([0; 32]), &[], nodes, progress));
    };
    let _ = check;
}
