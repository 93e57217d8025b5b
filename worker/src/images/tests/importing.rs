//! Images from root file-system archives.

use std::io::Cursor;

use super::{TestStore, read};
use crate::images::testing::{Tar, gzip, zstd};

fn root() -> Tar {
    Tar::new().owner(0, 0).dir("./", 0o755).mode("./whoami", 0o755, b"program")
}

#[tokio::test]
async fn equal_files_and_changes_give_an_equal_digest() {
    let changes =
        ["ENTRYPOINT [\"/whoami\"]".to_owned(), "EXPOSE 8080".to_owned(), "ENV A=1".to_owned()];
    let tar = root().build();
    for archive in [tar.clone(), gzip(&tar), zstd(&tar)] {
        let test = TestStore::new().await;
        let name = Some("whoami");
        let image = test.store.import(Cursor::new(archive), name, &changes).await.unwrap();
        assert_eq!(image.names, ["docker.io/library/whoami:latest"]);
        let golden = "sha256:1527a19903cbc783f69730a64186a57d0ae949145221102e72446c390655d7e5";
        if std::env::consts::ARCH == "x86_64" {
            assert_eq!(image.digest.to_string(), golden);
        }
        let config = test.store.config(image.digest).await.unwrap();
        assert_eq!(config.entrypoint, ["/whoami"]);
        assert_eq!(config.env, ["A=1"]);
        assert!(config.exposed_ports.contains("8080/tcp"));
        assert_eq!(config.created.as_deref(), Some("1970-01-01T00:00:00Z"));
        assert!(test.store.has(image.digest).await.unwrap());
    }
}

#[tokio::test]
async fn an_imported_image_can_be_unpacked() {
    let test = TestStore::new().await;
    let tar = Tar::new().file("a", b"1").build();
    let image = test.store.import(Cursor::new(tar), None, &[]).await.unwrap();
    assert_eq!(image.names, [""; 0]);
    assert_eq!(read(&test.store.layers(image.digest).await.unwrap(), 0, "a"), "1");
}

#[tokio::test]
async fn what_cannot_be_imported_says_why_and_leaves_nothing() {
    let tar = root().build();
    let cut = tar[..1028].to_vec();
    let padding = tar[..1200].to_vec();
    let open = root().without_end();
    let up = Tar::new().file("../x", b"").build();
    let no_changes: &[String] = &[];
    for (case, archive, name, changes, reason) in [
        (
            "cut in a file",
            cut,
            "a",
            no_changes,
            "root file-system archive is refused: the stream ends 4 bytes into entry \
             \"./whoami\", which begins at byte 512 and has 7 bytes; make the archive again",
        ),
        (
            "cut behind a file",
            padding,
            "a",
            no_changes,
            "refused: the stream ends at byte 1200 without the end mark of a tar archive; make",
        ),
        (
            "cut between files",
            open,
            "a",
            no_changes,
            "refused: the stream ends at byte 1536 without the end mark of a tar archive; make",
        ),
        ("outside", up, "a", no_changes, "entry \"../x\" at byte 0 leads outside of the layer"),
        ("no tar", vec![b'x'; 2000], "a", no_changes, "cannot be read past byte 512"),
        ("a bad name", tar.clone(), "A", no_changes, "repository \"library/A\" of the image name"),
        ("a bad change", tar, "a", &["RUN x".to_owned()][..], "\"RUN x\" is not a valid change"),
    ] {
        let test = TestStore::new().await;
        let before = test.files();
        let error = test.store.import(Cursor::new(archive), Some(name), changes).await;
        let text = error.expect_err(case).to_string();
        assert!(text.contains(reason), "{case}: {text}");
        assert_eq!(test.files(), before, "{case}: something was left behind");
    }
}
