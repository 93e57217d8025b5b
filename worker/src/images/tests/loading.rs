//! Archives of every tool, whole and damaged.

use skep_worker_core::image::{Digest, Manifest};

use super::{TestStore, read};
use crate::images::stream::digest_of_bytes;
use crate::images::testing::{Tar, TestImage, archive_of, blob_file, gzip, zstd};

const DOCKER_NAME: &str = "io.containerd.image.name";
const OCI_NAME: &str = "org.opencontainers.image.ref.name";

fn two_layers() -> TestImage {
    let base = Tar::new().dir("etc/", 0o755).file("etc/a", b"base").build();
    let top = Tar::new().file("app", b"program").build();
    TestImage::new(&[base, top])
}

/// The same bytes on every machine, for digests that stand in this file.
fn golden() -> TestImage {
    TestImage::new(&[Tar::new().owner(0, 0).file("app", b"program").build()])
}

#[tokio::test]
async fn an_old_archive_becomes_an_image_with_a_stable_digest() {
    let test = TestStore::new().await;
    let archive = archive_of(&golden().docker_files(&["whoami:latest", "r.example:5000/w:2"]));
    let loaded = test.load(archive).await.unwrap();
    assert_eq!(loaded.len(), 1);
    assert_eq!(loaded[0].names, ["docker.io/library/whoami:latest", "r.example:5000/w:2"]);
    let expect = "sha256:a8ec9269acf0b92c81799f6696673c09e78d32f4587e1d0c1502db99f4882be9";
    assert_eq!(loaded[0].digest.to_string(), expect);

    // Another order of the entries, no name, and compressed: the content decides.
    let mut files = golden().docker_files(&[]);
    files.reverse();
    let again = test.load(gzip(&archive_of(&files))).await.unwrap();
    assert_eq!(again[0].digest.to_string(), expect);
    assert_eq!(again[0].names, [""; 0]);
}

#[tokio::test]
async fn every_form_of_archive_gives_the_image() {
    let image = two_layers();
    let old = image.docker_files(&["app:1"]);
    let layout = image.layout_files(&[(DOCKER_NAME, "docker.io/library/app:1"), (OCI_NAME, "1")]);
    let podman = image.layout_files(&[(OCI_NAME, "docker.io/library/app:1")]);
    for (form, archive) in [
        ("old", archive_of(&old)),
        ("old, gzip", gzip(&archive_of(&old))),
        ("layout", archive_of(&layout)),
        ("layout, zstd", zstd(&archive_of(&layout))),
        ("layout with the name where podman puts it", archive_of(&podman)),
    ] {
        let test = TestStore::new().await;
        let loaded = test.load(archive).await.unwrap_or_else(|error| panic!("{form}: {error}"));
        assert_eq!(loaded[0].names, ["docker.io/library/app:1"], "{form}");
        let digest = loaded[0].digest;
        assert!(test.store.has(digest).await.unwrap(), "{form}");
        let config = test.store.config(digest).await.unwrap();
        assert_eq!((config.cmd, config.env), (vec!["/app".to_owned()], vec!["A=1".to_owned()]));
        let layers = test.store.layers(digest).await.unwrap();
        assert_eq!(layers.len(), 2, "{form}");
        assert_eq!(read(&layers, 0, "etc/a"), "base", "{form}");
        assert_eq!(read(&layers, 1, "app"), "program", "{form}");
        let blobs = test.store.blobs_of(digest).await.unwrap();
        assert_eq!(blobs.len(), 4, "{form}");
        assert_eq!(blobs.iter().map(|blob| blob.size).sum::<u64>(), config.size_bytes, "{form}");
        let listed = test.store.list().await.unwrap();
        let found: Vec<(Digest, u64)> = listed.iter().map(|i| (i.digest, i.size)).collect();
        assert_eq!(found, [(digest, config.size_bytes)], "{form}");
    }
}

#[tokio::test]
async fn a_layout_keeps_its_manifest_and_compressed_layers() {
    for compress in [gzip as fn(&[u8]) -> Vec<u8>, zstd] {
        let tar = Tar::new().file("a", b"1").build();
        let image = TestImage::compressed(&[tar], compress);
        let test = TestStore::new().await;
        let loaded = test.put(&image).await;
        assert_eq!(loaded.digest, image.digest());
        let manifest = test.store.manifest(loaded.digest).await.unwrap();
        assert_eq!(manifest, Manifest::parse(&image.manifest).unwrap());
        let layers = test.store.layers(loaded.digest).await.unwrap();
        assert_eq!(read(&layers, 0, "a"), "1");
    }
}

#[tokio::test]
async fn an_archive_may_hold_several_images_and_link_their_layers() {
    // As Docker 1.10 to 24 wrote it: the second image's layer is a link to the first one's.
    let (one, two) = (two_layers(), two_layers());
    let config: Vec<u8> =
        String::from_utf8(two.config.clone()).unwrap().replace("/app", "/b").into();
    let second = serde_json::json!({
        "Config": format!("{}.json", digest_of_bytes(&config).hex()),
        "RepoTags": ["b:1"], "Layers": ["x/layer.tar", "y/layer.tar"],
    });
    let mut files = one.docker_files(&["a:1"]);
    let (_, manifest) = files.pop().unwrap();
    let mut manifest: Vec<serde_json::Value> = serde_json::from_slice(&manifest).unwrap();
    manifest.push(second);
    files.push((format!("{}.json", digest_of_bytes(&config).hex()), config));
    files.push(("manifest.json".to_owned(), serde_json::to_vec(&manifest).unwrap()));
    let archive = files
        .iter()
        .fold(Tar::new(), |tar, (name, content)| tar.file(name, content))
        .symlink("x/layer.tar", "../layer0/layer.tar")
        .hard_link("y/layer.tar", "layer1/layer.tar")
        .build();

    let test = TestStore::new().await;
    let loaded = test.load(archive).await.unwrap();
    let names: Vec<&str> = loaded.iter().flat_map(|l| &l.names).map(String::as_str).collect();
    assert_eq!(names, ["docker.io/library/a:1", "docker.io/library/b:1"]);
    assert_eq!(test.store.config(loaded[1].digest).await.unwrap().cmd, ["/b"]);
    let layers = test.store.layers(loaded[1].digest).await.unwrap();
    assert_eq!(read(&layers, 1, "app"), "program");
}

#[tokio::test]
async fn names_of_both_indexes_are_joined() {
    let image = two_layers();
    let mut files = image.layout_files(&[(DOCKER_NAME, "docker.io/library/a:1")]);
    let manifest = serde_json::json!([{
        "Config": format!("blobs/sha256/{}", digest_of_bytes(&image.config).hex()),
        "RepoTags": ["a:1", "b:1"], "Layers": [],
    }]);
    files.push(("manifest.json".to_owned(), serde_json::to_vec(&manifest).unwrap()));
    let loaded = TestStore::new().await.load(archive_of(&files)).await.unwrap();
    assert_eq!(loaded[0].names, ["docker.io/library/a:1", "docker.io/library/b:1"]);
    assert_eq!(loaded[0].digest, image.digest());
}

/// An index that points to an index, of which each entry is for another machine.
fn for_platforms(image: &TestImage, platforms: &[&str]) -> Vec<u8> {
    let entry = |architecture: &&str| {
        serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": image.digest(), "size": image.manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
        })
    };
    let inner = serde_json::json!({
        "schemaVersion": 2, "manifests": platforms.iter().map(entry).collect::<Vec<_>>(),
    });
    let inner = serde_json::to_vec(&inner).unwrap();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": digest_of_bytes(&inner), "size": inner.len(),
    }]});
    let mut files: Vec<_> = image.blobs().into_iter().map(blob_file).collect();
    files.push(blob_file((digest_of_bytes(&inner), inner)));
    files.push(("index.json".to_owned(), serde_json::to_vec(&index).unwrap()));
    archive_of(&files)
}

#[tokio::test]
async fn of_several_platforms_the_one_of_the_machine_is_loaded() {
    let here = skep_worker_core::image::Platform::linux(std::env::consts::ARCH).architecture;
    let image = two_layers();
    let test = TestStore::new().await;
    let loaded = test.load(for_platforms(&image, &["mips", &here])).await.unwrap();
    assert_eq!(loaded[0].digest, image.digest());

    let test = TestStore::new().await;
    let error = test.load(for_platforms(&image, &["mips", "alpha"])).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(&format!("image archive has no image for linux/{here}: ")), "{text}");
    assert!(
        text.contains("lists linux/alpha, linux/mips; save the image with --platform"),
        "{text}"
    );
}

#[track_caller]
fn check_sentence(case: &str, text: &str, parts: &[&str]) {
    let mut rest = text;
    for part in parts {
        match rest.split_once(part) {
            Some((_, tail)) => rest = tail,
            None => panic!("{case}: {part:?} is not in its place in: {text}"),
        }
    }
}

/// Loads `archive`, wants an error whose text has `parts` in this order, and an untouched store.
async fn refuse(case: &str, archive: Vec<u8>, parts: &[&str]) {
    let test = TestStore::new().await;
    let before = test.files();
    let error = test.load(archive).await.expect_err(case);
    check_sentence(case, &error.to_string(), parts);
    assert_eq!(test.files(), before, "{case}: something was left behind");
}

fn without(files: &[(String, Vec<u8>)], name: &str) -> Vec<(String, Vec<u8>)> {
    let rest: Vec<_> = files.iter().filter(|(file, _)| file != name).cloned().collect();
    assert_eq!(rest.len() + 1, files.len(), "{name} was there");
    rest
}

fn flip(bytes: &mut [u8], at: usize) {
    bytes[at] ^= 1;
}

/// Where the content of a file begins in an archive of `files`.
fn content_of(files: &[(String, Vec<u8>)], name: &str) -> usize {
    let before = files.iter().take_while(|(file, _)| file != name);
    before.map(|(_, content)| 512 + content.len().next_multiple_of(512)).sum::<usize>() + 512
}

#[tokio::test]
async fn a_flipped_byte_is_found_and_named() {
    let image = two_layers();
    let layer = digest_of_bytes(&image.layers[1]);
    let name = format!("blobs/sha256/{}", layer.hex());
    let files = image.layout_files(&[]);
    let at = content_of(&files, &name);
    let mut archive = archive_of(&files);
    flip(&mut archive, at + 515);
    let entry = format!("image archive is damaged: entry \"{name}\" at byte {} ", at - 512);
    let must = format!("must have digest {layer}, but has sha256:");
    refuse("layout, layer", archive, &[&entry, &must, "; copy or save the archive again"]).await;

    let files = image.docker_files(&["a:1"]);
    let at = content_of(&files, "layer1/layer.tar");
    let mut archive = archive_of(&files);
    flip(&mut archive, at + 515);
    let entry = format!("layer \"layer1/layer.tar\" at byte {} must have content with ", at - 512);
    let must = format!("digest {layer}, but has sha256:");
    refuse("old, layer", archive, &[&entry, &must, "; copy or save the archive again"]).await;

    let config = digest_of_bytes(&image.config);
    let at = content_of(&files, &format!("{}.json", config.hex()));
    let mut archive = archive_of(&files);
    flip(&mut archive, at + 30);
    let must = format!("at byte {} must have digest {config}, but has sha256:", at - 512);
    refuse("old, configuration", archive, &[".json\" ", &must]).await;

    let mut archive = archive_of(&files);
    flip(&mut archive, content_of(&files, "layer1/layer.tar") - 512);
    let parts =
        ["image archive is damaged: it cannot be read past byte ", "(", "checksum", "copy or"];
    refuse("a header", archive, &parts).await;

    let mut archive = gzip(&archive_of(&files));
    let middle = archive.len() / 2;
    archive[middle..middle + 8].fill(0xff);
    refuse("gzip", archive, &["image archive is", "copy or save the archive again"]).await;
}

#[tokio::test]
async fn a_truncated_archive_says_where_it_ends() {
    let files = two_layers().docker_files(&["a:1"]);
    let archive = archive_of(&files);
    let at = content_of(&files, "layer1/layer.tar");
    let len = files.iter().find(|(name, _)| name == "layer1/layer.tar").unwrap().1.len();

    let in_entry = format!(
        "image archive is cut off: entry \"layer1/layer.tar\" at byte {} has {len} bytes, but the \
         archive ends after 100 of them; copy or save the archive again",
        at - 512
    );
    refuse("in an entry", archive[..at + 100].to_vec(), &[&in_entry]).await;

    let between = format!(
        "image archive is cut off: it ends at byte {}, after entry \"layer1/VERSION\", without an \
         end mark and without index.json or manifest.json; copy or save the archive again",
        at - 512
    );
    refuse("between entries", archive[..at - 512].to_vec(), &[&between]).await;

    let mut first = files.clone();
    first.rotate_right(1); // The manifest comes first, so only the layer is missing.
    let at = content_of(&first, "layer1/layer.tar") - 512; // Before its header.
    let missing = "without entry \"layer1/layer.tar\", which \"manifest.json\" names; copy or save";
    refuse("manifest first", archive_of(&first)[..at].to_vec(), &["is cut off", missing]).await;

    let header = content_of(&files, "layer1/layer.tar") - 512;
    let in_header = archive[..header + 100].to_vec();
    let rest = format!("it ends at byte {}, after entry \"layer1/VERSION\"", header + 100);
    let parts = ["is cut off: ", &rest, "without an end mark and without what follows; copy or"];
    refuse("in a header", in_header, &parts).await;
    let half = gzip(&archive)[..300].to_vec();
    refuse("gzip", half, &["image archive is cut off: ", "copy or save the archive again"]).await;
    refuse("nothing", Vec::new(), &["this is no image archive: none of its 0 entries"]).await;
}

#[tokio::test]
async fn what_does_not_fit_together_is_refused() {
    let image = two_layers();
    let files = image.docker_files(&["a:1"]);
    let missing = "image archive is incomplete: \"manifest.json\" names entry \"layer0/layer.tar\", \
                   which is not in the archive; save the image again";
    refuse("old, missing layer", archive_of(&without(&files, "layer0/layer.tar")), &[missing])
        .await;

    let layout = image.layout_files(&[]);
    let name = format!("blobs/sha256/{}", digest_of_bytes(&image.layers[0]).hex());
    let missing = format!("is incomplete: \"index.json\" names entry \"{name}\", which is not in");
    refuse("layout, missing layer", archive_of(&without(&layout, &name)), &[&missing]).await;

    let tar = Tar::new().file("a", b"1").build();
    let other = digest_of_bytes(b"something else");
    for (form, layer) in [("plain", tar.clone()), ("gzip", gzip(&tar)), ("zstd", zstd(&tar))] {
        let wrong = TestImage::with_diff_ids(vec![layer.clone()], vec![other]);
        let found = digest_of_bytes(&tar);
        let must = format!("must have content with digest {other}, but has {found}; copy or save");
        let entry = format!("layer \"blobs/sha256/{}\" at byte ", digest_of_bytes(&layer).hex());
        refuse(form, archive_of(&wrong.layout_files(&[])), &["is damaged: ", &entry, &must]).await;
    }

    let short = TestImage::with_diff_ids(vec![tar.clone()], vec![]);
    let count = "image archive is inconsistent: \"index.json\" names 1 layers, but the image's \
                 configuration 0; save the image again";
    refuse("a diff id too few", archive_of(&short.layout_files(&[])), &[count]).await;

    let files = [("etc/passwd".to_owned(), b"root".to_vec())];
    let hint = "none of its 1 entries is index.json or manifest.json; a root file-system archive \
                is read by \"skep image import\"";
    refuse("a root file system", archive_of(&files), &["this is no image archive: ", hint]).await;

    let files = [("manifest.json".to_owned(), b"[{]".to_vec())];
    let json = "entry \"manifest.json\" at byte 0 is not valid: ";
    refuse("no JSON", archive_of(&files), &[json, "line 1", "; copy or save"]).await;
    let files = two_layers().docker_files(&["Bad Name"]);
    let name = "entry \"manifest.json\" has an image name that is not valid";
    refuse("a bad name", archive_of(&files), &[name]).await;
}

#[tokio::test]
async fn a_layer_that_leads_outside_is_refused() {
    for (case, tar, reason) in [
        ("..", Tar::new().file("a", b"").file("../x", b"").build(), "\"../x\" at byte 512 leads"),
        ("absolute", Tar::new().file("/etc/x", b"").build(), "\"/etc/x\" at byte 0 leads"),
        ("whiteout", Tar::new().file("a/.wh...", b"").build(), "\"a/.wh...\" at byte 0 leads"),
        ("hard link", Tar::new().hard_link("x", "../y").build(), "\"x\" at byte 0 leads"),
    ] {
        let image = TestImage::new(&[tar]);
        let name = digest_of_bytes(&image.layers[0]).hex();
        let layer = format!("image archive is refused: layer \"blobs/sha256/{name}\" at byte ");
        let reason = format!("cannot be unpacked: entry {reason} outside of the layer; build the");
        refuse(case, archive_of(&image.layout_files(&[])), &[&layer, &reason]).await;
    }
}
