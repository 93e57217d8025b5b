//! Images without a registry: loaded on one node, run on all, whole or not at all.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use skep_cluster_tests::{
    BUSYBOX, Lab, LabOptions, SETTLES_WITHIN, busybox_root, docker_archive, is_root_or_skip, pack,
    wait_until,
};

const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];
/// Nodes that an image is copied to as soon as it was loaded, its own included.
const N_COPIES: usize = 3;

fn blobs_dir(lab: &Lab, node: &str) -> PathBuf {
    lab.data_dir(node).join("images/blobs/sha256")
}

/// The blobs that a node has, by their digests.
fn blobs(lab: &Lab, node: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(blobs_dir(lab, node)).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// Waits until the image of `loaded_on` was copied; gives those that have all of it.
#[track_caller]
fn wait_for_copies(lab: &Lab, loaded_on: &str) -> Vec<&'static str> {
    let all = blobs(lab, loaded_on);
    assert!(all.len() >= 3, "manifest, configuration and layer: {all:?}");
    wait_until(SETTLES_WITHIN, "the image is copied", || {
        let holders: Vec<_> = NODES.into_iter().filter(|node| blobs(lab, node) == all).collect();
        ((holders.len() == N_COPIES).then(|| holders.clone()), format!("{holders:?}"))
    })
}

/// Creates a service with a task on each of `n_tasks` nodes at most.
#[track_caller]
fn create_spread(lab: &Lab, name: &str, n_tasks: usize, flags: &[&str]) {
    let n_tasks = n_tasks.to_string();
    let mut args = vec!["service", "create", "--detach", "--name", name, "--replicas", &n_tasks];
    args.extend(["--replicas-max-per-node", "1"]);
    args.extend(flags);
    args.extend([BUSYBOX, "sleep", "600"]);
    lab.node("n1").skep(&args).ok();
}

/// Waits until a service has so many running tasks; gives their nodes.
#[track_caller]
fn wait_for_running(lab: &Lab, service: &str, n_tasks: usize) -> BTreeSet<String> {
    lab.node("n1").wait_for_tasks(service, &format!("{n_tasks} tasks run"), |tasks| {
        let running = tasks.iter().filter(|task| task.is_running());
        let nodes: Vec<String> = running.map(|task| task.node.clone()).collect();
        (nodes.len() == n_tasks).then(|| nodes.into_iter().collect())
    })
}

#[test]
fn an_image_loaded_on_one_node_runs_everywhere_also_without_that_node() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions::default());
    lab.import_busybox("n5");
    let holders = wait_for_copies(&lab, "n5");
    assert!(holders.contains(&"n5"), "{holders:?}");
    create_spread(&lab, "first", 1, &["--constraint", "node.hostname==n5"]);
    wait_for_running(&lab, "first", 1);

    lab.kill(&["n5"]);
    lab.wait_for_node("n1", "n5", "Down");
    create_spread(&lab, "later", 2, &[]);
    wait_for_running(&lab, "later", 2);
    lab.node("n1").skep(&["service", "scale", "--detach", "later=4"]).ok();
    let nodes = wait_for_running(&lab, "later", 4);
    assert_eq!(nodes, ["n1", "n2", "n3", "n4"].map(str::to_owned).into(), "who never had it too");

    lab.start_nodes(&["n5"]);
    lab.node("n1").skep(&["service", "scale", "--detach", "later=5"]).ok();
    wait_for_running(&lab, "later", 5);
    lab.down();
}

/// The largest blob on a node: the layer.
fn layer(lab: &Lab, node: &str) -> PathBuf {
    let files = fs::read_dir(blobs_dir(lab, node)).unwrap().flatten();
    files.max_by_key(|file| file.metadata().unwrap().len()).unwrap().path()
}

/// Changes one byte in the middle of a file; doing it again restores it.
#[track_caller]
fn flip_byte(file: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
}

#[test]
fn damage_on_a_holder_is_told_with_its_digest_and_another_holder_is_used() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions::default());
    lab.import_busybox("n1");
    let holders = wait_for_copies(&lab, "n1");
    let mut others = NODES.into_iter().filter(|node| !holders.contains(node));
    let node = others.next().unwrap();
    let layer_of = |node: &str| layer(&lab, node);
    let digest = layer_of("n1").file_name().unwrap().to_str().unwrap().to_owned();
    holders.iter().for_each(|holder| flip_byte(&layer_of(holder)));

    create_spread(&lab, "web", 1, &["--constraint", &format!("node.hostname=={node}")]);
    let task = lab.node("n1").wait_for_tasks("web", "its error names the digest", |tasks| {
        tasks.iter().find(|task| task.error.contains(&digest)).cloned()
    });
    assert!(task.error.contains("wrong bytes"), "{task:?}");
    assert!(!blobs(&lab, node).contains(&digest), "wrong bytes get no name");

    // One good holder among bad ones is enough.
    flip_byte(&layer_of(holders[1]));
    wait_for_running(&lab, "web", 1);
    assert!(blobs(&lab, node).contains(&digest));
    let log = lab.node(node).log();
    let is_told = |line: &str| line.contains(" WARN ") && line.contains(&digest);
    assert!(log.lines().any(is_told), "the log of {node} names the digest:\n{log}");

    // Now two of four are bad; whichever is asked first, the task runs.
    let last = others.next().unwrap();
    create_spread(&lab, "more", 1, &["--constraint", &format!("node.hostname=={last}")]);
    wait_for_running(&lab, "more", 1);
    lab.down();
}

/// A file of a layer; whiteouts are files too.
fn put(root: &Path, name: &str, text: &str) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Everything below a node's image store, but what is being written.
fn store_files(lab: &Lab) -> String {
    let script = "cd /var/lib/skep/images && find . -type f -o -type l | sort";
    lab.node("n1").exec(&["sh", "-c", script]).ok().stdout
}

#[test]
fn a_saved_image_of_two_layers_runs_and_a_damaged_one_leaves_nothing() {
    const IMAGE: &str = "example.com/layers:1.0";
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 0, ..LabOptions::default() });
    let dir = tempfile::tempdir().unwrap();
    let lower = busybox_root(dir.path());
    put(&lower, "etc/gone", "lower");
    put(&lower, "etc/changed", "lower");
    put(&lower, "hidden/a", "lower");
    put(&lower, "kept/a", "lower");
    let upper = dir.path().join("upper");
    put(&upper, "etc/.wh.gone", "");
    put(&upper, "etc/changed", "upper");
    put(&upper, "hidden/.wh..wh..opq", "");
    put(&upper, "hidden/b", "upper");
    put(&upper, "kept/b", "upper");
    let archive = docker_archive(dir.path(), IMAGE, &[lower, upper]);
    let load = |archive: &Path| {
        lab.node("n1").skep(&["image", "load", "--input", archive.to_str().unwrap()])
    };

    let empty = store_files(&lab);
    let bytes = fs::read(&archive).unwrap();
    let broken = dir.path().join("broken.tar");
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 1;
    let cases: [(&[u8], &[&str]); 4] = [
        (&flipped, &["damaged", "layer.tar", "copy or save the archive again"]),
        (&bytes[..bytes.len() / 2], &["cut off", "copy or save the archive again"]),
        (&bytes[..700], &["cut off", "copy or save the archive again"]),
        (b"this is no archive", &["archive"]),
    ];
    for (content, words) in cases {
        fs::write(&broken, content).unwrap();
        let error = load(&broken).err();
        assert_eq!(error.trim_end().lines().count(), 1, "one sentence: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
        assert_eq!(store_files(&lab), empty, "after {error}");
        let list = lab.node("n1").skep(&["image", "ls", "--quiet"]).ok();
        assert_eq!(list.text(), "", "after {error}");
    }
    let root_only = pack(&dir.path().join("upper"), &dir.path().join("root.tar"));
    let error = load(&root_only).err();
    assert!(error.contains("skep image import"), "{error}");

    let output = load(&archive).ok();
    assert!(output.stdout.contains(IMAGE), "{output}");
    let script = "cd /etc; cat changed; echo; test ! -e gone && echo no gone; ls /hidden /kept";
    let args = ["service", "create", "--detach", "--name", "web", "--restart-condition", "none"];
    lab.node("n1").skep(&[&args[..], &[IMAGE, "sh", "-c", script]].concat()).ok();
    lab.node("n1").wait_for_tasks("web", "its task is complete", |tasks| {
        tasks.iter().find(|task| task.state() == "Complete").cloned()
    });
    let logs = lab.node("n1").skep(&["service", "logs", "--raw", "web"]).ok();
    assert_eq!(logs.stdout, "upper\nno gone\n/hidden:\nb\n\n/kept:\na\nb\n");
    lab.down();
}
