//! What a reader of the tree relies on: sizes, edges between packages, module docs, no loose ends.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::fs;
use std::path::{Path, PathBuf};

/// Longest file without a word of excuse in [`LONG_FILES`].
const LINES_MAX: usize = 800;
/// Longer files, each with its reason.
const LONG_FILES: [(&str, &str); 0] = [];

/// Packages and what must never be among their dependencies: cores decide without I/O.
const FORBIDDEN: [(&str, &[&str]); 4] = [
    ("common/Cargo.toml", &["tokio", "tonic", "openraft", "rustls", "skep-runtime", "skep-proto"]),
    (
        "manager/core/Cargo.toml",
        &["tokio", "tonic", "openraft", "rustls", "skep-runtime", "skep-proto"],
    ),
    (
        "worker/core/Cargo.toml",
        &["tokio", "tonic", "openraft", "rustls", "skep-runtime", "skep-proto"],
    ),
    ("worker/Cargo.toml", &["skep-manager", "skep-manager-core", "openraft"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the package lies in the project")
        .to_owned()
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

fn files() -> Vec<(String, String)> {
    let root = root();
    let mut found = Vec::new();
    sources(&root, &mut found);
    assert!(found.len() > 100, "the sources were not found below {}", root.display());
    let named = found.into_iter().map(|path| {
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        (name, fs::read_to_string(&path).unwrap())
    });
    named.collect()
}

#[test]
fn no_file_is_too_long_to_read() {
    for (name, text) in files() {
        let is_excused = LONG_FILES.iter().any(|(long, _)| *long == name);
        let n_lines = text.lines().count();
        assert!(
            n_lines <= LINES_MAX || is_excused,
            "{name} has {n_lines} lines, the limit is {LINES_MAX}"
        );
    }
}

#[test]
fn every_module_says_what_it_is() {
    for (name, text) in files() {
        let first = text
            .lines()
            .find(|line| !line.is_empty() && !line.starts_with("#!["))
            .unwrap_or_default();
        assert!(first.starts_with("//!"), "{name} begins without a `//!` line");
    }
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here, so that this file is no finding itself.
    let marks = [
        "TO".to_owned() + "DO",
        "FIX".to_owned() + "ME",
        "#[ig".to_owned() + "nore",
        "todo".to_owned() + "!(",
    ];
    for (name, text) in files() {
        for mark in &marks {
            assert!(!text.contains(mark.as_str()), "{name} contains {mark}");
        }
    }
}

#[test]
fn cores_know_no_io_and_the_worker_knows_no_manager() {
    for (manifest, forbidden) in FORBIDDEN {
        let text = fs::read_to_string(root().join(manifest)).unwrap();
        let dependencies = text.split("[dev-dependencies]").next().unwrap();
        for name in forbidden {
            let is_used = dependencies.lines().any(|line| {
                line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['.', ' ', '=']))
            });
            assert!(!is_used, "{manifest} depends on {name}");
        }
    }
}
