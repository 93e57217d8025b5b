//! Where secrets and configs are in a container.
//!
//! All are files of one tmpfs. What is below /run/secrets is shown there as one directory; everything else
//! is mounted file by file, so that what the image has beside it stays.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use skep_common::spec::Base64;

use super::input::MountInput;

/// Where relative targets of secrets are.
pub const SECRETS: &str = "/run/secrets";
/// The directory of the tmpfs that is shown as [`SECRETS`].
const DIRECTORY: &str = "secrets";

/// A secret or a config of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PayloadFile {
    /// Absolute path in the container.
    pub target: PathBuf,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
    /// Its bytes; never printed.
    pub data: Base64,
}

/// Where each file is on the tmpfs, relative to its root.
pub fn layout(files: &[PayloadFile]) -> impl Iterator<Item = (PathBuf, &PayloadFile)> {
    files.iter().enumerate().map(|(number, file)| match file.target.strip_prefix(SECRETS) {
        Ok(below) => (Path::new(DIRECTORY).join(below), file),
        Err(_) => (PathBuf::from(number.to_string()), file),
    })
}

/// The mounts that show the files, of a tmpfs at `base`.
pub fn mounts(files: &[PayloadFile], base: &Path) -> Vec<MountInput> {
    let bind = |source: &Path, target: &Path, more: &[&str]| {
        let options = ["bind", "ro", "nosuid", "nodev"].iter().chain(more);
        MountInput {
            target: target.to_owned(),
            kind: "bind".to_owned(),
            source: base.join(source),
            options: options.map(|option| (*option).to_owned()).collect(),
        }
    };
    let mut mounts = Vec::new();
    if files.iter().any(|file| file.target.starts_with(SECRETS)) {
        mounts.push(bind(Path::new(DIRECTORY), Path::new(SECRETS), &["noexec"]));
    }
    let others = layout(files).filter(|(_, file)| !file.target.starts_with(SECRETS));
    mounts.extend(others.map(|(path, file)| bind(&path, &file.target, &[])));
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_one_directory_and_the_rest_single_files() {
        let file = |target: &str| PayloadFile {
            target: target.into(),
            uid: 0,
            gid: 0,
            mode: 0o444,
            data: Base64(b"x".to_vec()),
        };
        let files = [file("/run/secrets/a"), file("/etc/b"), file("/run/secrets/c/d")];
        let paths: Vec<PathBuf> = layout(&files).map(|(path, _)| path).collect();
        assert_eq!(paths, ["secrets/a", "1", "secrets/c/d"].map(PathBuf::from));
        let mounted = mounts(&files, Path::new("/base"));
        let words: Vec<String> = mounted
            .iter()
            .map(|mount| {
                let (source, target) = (mount.source.display(), mount.target.display());
                format!("{source} {target} {}", mount.options.join(","))
            })
            .collect();
        assert_eq!(
            words,
            [
                "/base/secrets /run/secrets bind,ro,nosuid,nodev,noexec",
                "/base/1 /etc/b bind,ro,nosuid,nodev",
            ]
        );
        assert_eq!(
            mounts(&files[1..2], Path::new("/base")).len(),
            1,
            "no empty directory is shown"
        );
        assert_eq!(mounts(&[], Path::new("/base")), []);
    }
}
