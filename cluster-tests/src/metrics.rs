//! What daemons count, as collectors of metrics read it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::{Lab, skep_binary};

/// A program in that directory that runs the daemon and has it serve metrics.
pub fn daemon_with_metrics(dir: &Path) -> PathBuf {
    let path = dir.join("skep");
    let program = skep_binary();
    let text =
        format!("#!/bin/sh\nexec {} \"$@\" --metrics-addr 0.0.0.0:9323\n", program.display());
    fs::write(&path, text).expect("the directory can be written to");
    let permissions = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&path, permissions).expect("the program is the test's own");
    path
}

impl Lab {
    /// The values of a metric on a node, by the text of their labels.
    #[track_caller]
    pub fn metric(&self, node: &str, name: &str) -> BTreeMap<String, u64> {
        let url = "http://127.0.0.1:9323/metrics";
        let page = self.node(node).exec(&["curl", "-sS", "--max-time", "10", url]).ok().stdout;
        let values = page.lines().filter_map(|line| {
            let (labels, value) = line.strip_prefix(name)?.strip_prefix('{')?.split_once("} ")?;
            Some((labels.to_owned(), value.parse().expect("counts are whole numbers")))
        });
        values.collect()
    }
}
