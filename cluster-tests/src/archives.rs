//! Images for tests: busybox as a root file system, and archives as `docker save` writes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::command::run;
use crate::lab::Lab;

/// The image that [`Lab::import_busybox`] stores.
pub const BUSYBOX: &str = "busybox:latest";
/// The static program that test images are made of; Debian's package `busybox-static` has it.
const PROGRAM: &str = "/bin/busybox";
/// Commands that tests run in containers.
const APPLETS: [&str; 12] =
    ["cat", "dd", "echo", "false", "grep", "ls", "seq", "sh", "sleep", "sync", "test", "true"];

impl Lab {
    /// Stores a busybox as an image, through a node.
    #[track_caller]
    pub fn import_busybox(&self, via: &str) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let archive = pack(&busybox_root(dir.path()), &dir.path().join("busybox.tar"));
        self.node(via).skep(&["image", "import", text(&archive), BUSYBOX]).ok();
    }
}

/// Makes a root file system with busybox below `dir`; gives its path.
#[track_caller]
pub fn busybox_root(dir: &Path) -> PathBuf {
    let root = dir.join("busybox");
    let bin = root.join("bin");
    fs::create_dir_all(&bin).expect("make /bin");
    fs::copy(PROGRAM, bin.join("busybox")).expect("copy /bin/busybox");
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).expect("link an applet");
    }
    root
}

/// Packs a directory's content as a tar archive.
#[track_caller]
pub fn pack(dir: &Path, archive: &Path) -> PathBuf {
    let mut command = Command::new("tar");
    command.args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--sort=name"]);
    command.arg("--file").arg(archive).arg("--directory").arg(dir).arg(".");
    run(command).ok();
    archive.to_owned()
}

/// Writes an archive as `docker save` does; the first of `layers`, each a directory, is the lowest.
#[track_caller]
pub fn docker_archive(dir: &Path, image: &str, layers: &[PathBuf]) -> PathBuf {
    let tree = dir.join("save");
    fs::create_dir_all(&tree).expect("make a directory");
    let mut names = Vec::new();
    let mut diff_ids = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let name = format!("{number:064}/layer.tar");
        fs::create_dir_all(tree.join(format!("{number:064}"))).expect("make a directory");
        let archive = pack(layer, &tree.join(&name));
        diff_ids.push(format!("sha256:{}", sha256(&archive)));
        names.push(name);
    }
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let draft = dir.join("config.json");
    fs::write(&draft, config.to_string()).expect("write the configuration");
    let config_name = format!("{}.json", sha256(&draft));
    fs::copy(&draft, tree.join(&config_name)).expect("copy the configuration");
    let manifest = json!([{"Config": config_name, "RepoTags": [image], "Layers": names}]);
    fs::write(tree.join("manifest.json"), manifest.to_string()).expect("write the manifest");
    // Without a leading `./`, as docker writes names.
    let archive = dir.join("image.tar");
    let mut command = Command::new("tar");
    command.arg("--create").arg("--file").arg(&archive).arg("--directory").arg(&tree);
    let entries = fs::read_dir(&tree).expect("list the archive's content").flatten();
    command.args(entries.map(|entry| entry.file_name()));
    run(command).ok();
    archive
}

/// The digest of a file, in hexadecimal digits.
#[track_caller]
pub fn sha256(file: &Path) -> String {
    let mut command = Command::new("sha256sum");
    command.arg(file);
    let output = run(command).ok();
    output.text().split(' ').next().unwrap_or_default().to_owned()
}

/// A path that is plain text, for a command line.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}
