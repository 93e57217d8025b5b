//! Layers as directories: what the kernel's overlay makes of them, and what is refused.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use tar::EntryType;

use super::{TestStore, read};
use crate::images::stream::digest_of_bytes;
use crate::images::testing::{Tar, TestDir, TestImage, gzip, is_root};
use crate::images::unpack::unpack;

/// What `find` sees in an overlay of `layers`, mounted in a mount namespace that ends with it.
fn merged(dir: &TestDir, layers: &[PathBuf]) -> String {
    let [upper, work, target] = ["upper", "work", "merged"].map(|name| dir.join(name));
    for path in [&upper, &work, &target] {
        fs::create_dir_all(path).unwrap();
    }
    let lower: Vec<String> = layers.iter().rev().map(|path| path.display().to_string()).collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.join(":"),
        upper.display(),
        work.display()
    );
    let script = r#"mount -t overlay overlay -o "$0" "$1"; cd "$1"; find . -mindepth 1 \
        \( -type f -printf '%P=' -exec cat {} \; -printf '\n' \) \
        -o \( -type l -printf '%P -> %l\n' \) -o -printf '%P/ %m\n' > ../found; sort ../found"#;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-e", "-c", script, &options])
        .arg(&target)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{options}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn overlayfs_shows_the_image() {
    if !is_root("overlayfs_shows_the_image") {
        return;
    }
    let base = Tar::new()
        .dir("etc/", 0o755)
        .file("etc/a", b"a0")
        .file("etc/b", b"b0")
        .dir("hidden/", 0o755)
        .file("hidden/old", b"old")
        .dir("replaced/", 0o755)
        .file("replaced/old", b"old")
        .dir("late/", 0o755)
        .file("late/old", b"old")
        .dir("gone/", 0o755)
        .file("gone/x", b"x")
        .file("same", b"0")
        .symlink("link", "etc/a")
        .build();
    let top = Tar::new()
        .file("etc/.wh.a", b"")
        .file("etc/c", b"c1")
        .file("hidden/.wh..wh..opq", b"")
        .file("hidden/new", b"new")
        // A whiteout and a directory of the same name, in both orders: the lower one is hidden.
        .file(".wh.replaced", b"")
        .dir("replaced/", 0o700)
        .file("replaced/new", b"new")
        .dir("late/", 0o755)
        .file("late/new", b"new")
        .file(".wh.late", b"")
        .file(".wh.gone", b"")
        // The layer has the file itself: its whiteout is about the lower one.
        .file("same", b"1")
        .file(".wh.same", b"")
        .file(".wh..wh.plnk", b"")
        .build();
    let test = TestStore::new().await;
    let image = test.put(&TestImage::new(&[base, top])).await;
    let layers = test.store.layers(image.digest).await.unwrap();
    let expect = "etc/ 755\netc/b=b0\netc/c=c1\nhidden/ 755\nhidden/new=new\nlate/ 755\n\
                  late/new=new\nlink -> etc/a\nreplaced/ 700\nreplaced/new=new\nsame=1\n";
    assert_eq!(merged(&test.dir, &layers), expect);
}

#[tokio::test]
async fn an_opaque_root_and_a_layer_that_occurs_twice_can_be_mounted() {
    if !is_root("an_opaque_root_and_a_layer_that_occurs_twice_can_be_mounted") {
        return;
    }
    let tar = |name: &str, content: &[u8]| Tar::new().file(name, content).build();
    let opaque = Tar::new().file(".wh..wh..opq", b"").file("fresh", b"1").build();
    let test = TestStore::new().await;
    let image = TestImage::new(&[tar("below", b"0"), opaque, tar("top", b"2")]);
    let image = test.put(&image).await;
    let layers = test.store.layers(image.digest).await.unwrap();
    assert_eq!(merged(&test.dir, &layers), "fresh=1\ntop=2\n");

    let test = TestStore::new().await;
    let twice = TestImage::new(&[tar("a", b"1"), tar("a", b"2"), tar("a", b"1"), tar("b", b"3")]);
    let image = test.put(&twice).await;
    let layers = test.store.layers(image.digest).await.unwrap();
    assert_eq!(layers.len(), 3);
    assert_eq!(merged(&test.dir, &layers), "a=1\nb=3\n");
}

#[tokio::test]
async fn owners_modes_times_attributes_links_and_devices_are_kept() {
    if !is_root("owners_modes_times_attributes_links_and_devices_are_kept") {
        return;
    }
    // A capability of version 2: net_bind_service, permitted and effective.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let tar = Tar::new()
        .owner(1000, 2000)
        .dir("d/", 0o1777)
        .mode("d/su", 0o4755, b"x")
        .hard_link("d/twin", "d/su")
        .symlink("d/dangling", "/nowhere")
        .pax("SCHILY.xattr.security.capability", &capability)
        .mode("d/cap", 0o755, b"x")
        .pax("SCHILY.xattr.trusted.overlay.redirect", b"/etc")
        .file("d/evil", b"x")
        .pax("mtime", b"1600000000.25")
        .file("d/time", b"x")
        .device(EntryType::Char, "null", 1, 3)
        .device(EntryType::Block, "loop", 7, 9)
        .device(EntryType::Fifo, "fifo", 0, 0)
        .build();
    let test = TestStore::new().await;
    let image = test.put(&TestImage::new(&[tar])).await;
    let root = test.store.layers(image.digest).await.unwrap().remove(0);
    let meta = |path: &str| fs::symlink_metadata(root.join(path)).unwrap();
    let owner = |path: &str| (meta(path).uid(), meta(path).gid());

    for path in ["d", "d/su", "d/dangling", "d/cap", "null", "fifo"] {
        assert_eq!(owner(path), (1000, 2000), "{path}");
    }
    assert_eq!(meta("d").mode() & 0o7777, 0o1777);
    assert_eq!(meta("d").mtime(), 1_700_000_000, "set after the files in it were made");
    assert_eq!(meta("d/su").mode() & 0o7777, 0o4755);
    assert_eq!(meta("d/su").ino(), meta("d/twin").ino());
    assert_eq!(fs::read_link(root.join("d/dangling")).unwrap(), Path::new("/nowhere"));
    assert_eq!((meta("d/time").mtime(), meta("d/time").mtime_nsec()), (1_600_000_000, 250_000_000));
    let xattr = |path: &str, name: &str| xattr::get(root.join(path), name).unwrap();
    assert_eq!(xattr("d/cap", "security.capability").as_deref(), Some(&capability[..]));
    assert_eq!(xattr("d/evil", "trusted.overlay.redirect"), None);
    assert!(meta("null").file_type().is_char_device());
    assert_eq!(meta("null").rdev(), nix::sys::stat::makedev(1, 3));
    assert_eq!(meta("null").mode() & 0o7777, 0o640);
    assert!(meta("loop").file_type().is_block_device());
    assert_eq!(meta("loop").rdev(), nix::sys::stat::makedev(7, 9));
    assert!(meta("fifo").file_type().is_fifo());
}

#[tokio::test]
async fn a_later_entry_replaces_an_earlier_one() {
    let tar = Tar::new()
        .dir("was-dir/", 0o755)
        .file("was-dir/x", b"x")
        .file("was-dir", b"now a file")
        .file("was-file", b"x")
        .dir("was-file/", 0o755)
        .file("was-file/y", b"y")
        .file("implied/parent/z", b"z")
        .file("twice", b"first")
        .file("twice", b"second")
        .build();
    let test = TestStore::new().await;
    let image = test.put(&TestImage::compressed(&[tar], gzip)).await;
    let layers = test.store.layers(image.digest).await.unwrap();
    assert_eq!(read(&layers, 0, "was-dir"), "now a file");
    assert_eq!(read(&layers, 0, "was-file/y"), "y");
    assert_eq!(read(&layers, 0, "implied/parent/z"), "z");
    assert_eq!(read(&layers, 0, "twice"), "second");
}

#[test]
fn nothing_is_written_outside_of_the_directory() {
    let up = "leads outside of the layer";
    for (case, tar, reason) in [
        ("up", Tar::new().file("../x", b"x"), up),
        ("absolute", Tar::new().file("/x", b"x"), up),
        ("up by whiteout", Tar::new().file("a/.wh...", b""), up),
        ("up by hard link", Tar::new().hard_link("a", "../outside"), up),
        (
            "through a link",
            Tar::new().symlink("a", "..").file("a/x", b"x"),
            "leads through \"a\", which is no directory",
        ),
        (
            "through a link to the root",
            Tar::new().symlink("a", "/").dir("a/b/", 0o755),
            "leads through \"a\", which is no directory",
        ),
        (
            "whiteout through a link",
            Tar::new().symlink("a", "..").file("a/.wh.outside", b""),
            "leads through \"a\", which is no directory",
        ),
        (
            "opaque through a link",
            Tar::new().symlink("a", "..").file("a/.wh..wh..opq", b""),
            "leads through \"a\", which is no directory",
        ),
        (
            "hard link through a link",
            Tar::new().symlink("a", "..").hard_link("b", "a/outside"),
            "is a hard link to \"a/outside\", which is not in the layer",
        ),
        (
            "hard link to nothing",
            Tar::new().hard_link("b", "nothing"),
            "is a hard link to \"nothing\", which is not in the layer",
        ),
        (
            "an unknown type",
            Tar::new().entry(EntryType::new(b'Z'), "z", 0o644, "", b""),
            "has type 'Z', which no file has",
        ),
    ] {
        let dir = TestDir::new();
        let layer = dir.join("layer");
        fs::create_dir(&layer).unwrap();
        fs::write(dir.join("outside"), b"untouched").unwrap();
        let tar = tar.build();
        let error = unpack(tar.as_slice(), &layer, digest_of_bytes(&tar)).unwrap_err().to_string();
        assert!(error.contains(reason), "{case}: {error}");
        assert_eq!(super::names(dir.path()), ["layer", "outside"], "{case}");
        assert_eq!(fs::read(dir.join("outside")).unwrap(), b"untouched", "{case}");
        assert!(xattr::list(dir.path()).unwrap().next().is_none(), "{case}");
    }
}

#[test]
fn a_stream_that_is_cut_or_not_the_promised_one_is_refused() {
    let tar = Tar::new().file("a", &[7; 1000]).build();
    let check = |blob: &[u8], diff_id, reason: &str| {
        let dir = TestDir::new();
        let error = unpack(blob, dir.path(), diff_id).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let digest = digest_of_bytes(&tar);
    let other = digest_of_bytes(b"other");
    check(
        &tar,
        other,
        &format!("has digest {digest}, but the image's configuration names {other}"),
    );
    check(
        &tar[..700],
        digest,
        "the stream ends 188 bytes into entry \"a\", which begins at byte 0",
    );
    let packed = gzip(&tar);
    check(&packed[..packed.len() - 9], digest, "the stream");
    let mut flipped = packed.clone();
    let at = packed.len() - 6; // In the checksum that ends the member.
    flipped[at] ^= 1;
    check(&flipped, digest, "the stream cannot be read past byte");
}
