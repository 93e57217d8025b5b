//! What the entries of a layer's tar stream mean, and what a layer may not contain.
//!
//! [`place`] is the one rule that says where an entry goes. [`scan`] checks a whole stream by it
//! without writing; `unpack` does the same and writes.
//!
//! Source: OCI Image Format Specification 1.1, `layer.md`.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use skep_worker_core::image::Digest;
use tar::EntryType;

use super::stream::{BUFFER_LEN, Counting, Position};

/// Begins the name of a whiteout.
const WHITEOUT: &[u8] = b".wh.";
/// Begins the names that AUFS kept for itself; Docker skips them too.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Hides what lower layers have in its directory.
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";

/// Why a layer's stream cannot become a directory. `offset` counts in the uncompressed stream.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names every field")]
pub enum LayerError {
    /// The layer is malicious or was made by hand.
    #[error("entry {entry:?} at byte {offset} leads outside of the layer")]
    Escape { entry: OsString, offset: u64 },
    /// The layer is malicious or was made by hand.
    #[error("entry {entry:?} at byte {offset} leads through {through:?}, which is no directory")]
    Through { entry: OsString, offset: u64, through: PathBuf },
    /// The layer was made wrongly.
    #[error(
        "entry {entry:?} at byte {offset} is a hard link to {target:?}, which is not in the layer"
    )]
    HardLink { entry: OsString, offset: u64, target: OsString },
    /// Nothing else can be in a file system.
    #[error("entry {entry:?} at byte {offset} has type {kind:?}, which no file has")]
    Kind { entry: OsString, offset: u64, kind: char },
    /// A number that does not fit, such as a user id of 40 bits.
    #[error("entry {entry:?} at byte {offset} has a header that is not valid: {detail}")]
    Header { entry: OsString, offset: u64, detail: String },
    /// Part of the stream is missing.
    #[error(
        "the stream ends {found} bytes into entry {entry:?}, which begins at byte {offset} and \
         has {expected} bytes"
    )]
    CutOff { entry: OsString, offset: u64, expected: u64, found: u64 },
    /// Part of the stream is missing.
    #[error("the stream ends at byte {offset} without the end mark of a tar archive")]
    NoEndMark { offset: u64 },
    /// The bytes are no tar archive, or their compression is damaged.
    #[error("the stream cannot be read past byte {offset}: {detail}")]
    Damaged { offset: u64, detail: String },
    /// The content is not what the image's configuration promises.
    #[error("its content has digest {found}, but the image's configuration names {expected}")]
    DiffId { expected: Digest, found: Digest },
    /// The disk refused.
    #[error("entry {entry:?} at byte {offset} cannot be written: failed to {action}: {source}")]
    Write { entry: OsString, offset: u64, action: &'static str, source: io::Error },
}

/// Where an entry goes, relative to the layer's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// The root directory itself.
    Root,
    /// A file of any type.
    Node(PathBuf),
    /// Hides this path of lower layers.
    Whiteout(PathBuf),
    /// Hides what lower layers have in this directory.
    Opaque(PathBuf),
    /// A leftover of AUFS.
    Skip,
}

/// Says where an entry goes; `None` if that is outside of the layer.
pub(super) fn place(entry: &[u8]) -> Option<Place> {
    let path = inside(entry)?;
    let Some(name) = path.file_name().map(OsStr::as_bytes) else {
        return Some(Place::Root);
    };
    let parent = path.parent().unwrap_or(Path::new(""));
    if name == WHITEOUT_OPAQUE {
        return Some(Place::Opaque(parent.to_owned()));
    }
    if name.starts_with(WHITEOUT_META) {
        return Some(Place::Skip);
    }
    match name.strip_prefix(WHITEOUT) {
        None => Some(Place::Node(path)),
        // A whiteout of the directory itself or of the one above it.
        Some(b"" | b"." | b"..") => None,
        Some(hidden) => Some(Place::Whiteout(parent.join(OsStr::from_bytes(hidden)))),
    }
}

/// The path without `.`, if it is relative and never goes up.
pub(super) fn inside(path: &[u8]) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(path)).components() {
        match component {
            Component::CurDir => {}
            Component::Normal(name) => clean.push(name),
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(clean)
}

/// Where an error happened.
#[derive(Debug, Clone)]
pub(super) struct Spot {
    pub(super) entry: OsString,
    pub(super) offset: u64,
}

impl Spot {
    pub(super) fn of<R: Read>(entry: &tar::Entry<'_, R>) -> Self {
        let name = entry.path_bytes().into_owned();
        Self { entry: OsString::from_vec(name), offset: entry.raw_header_position() }
    }

    pub(super) fn escape(self) -> LayerError {
        LayerError::Escape { entry: self.entry, offset: self.offset }
    }

    pub(super) fn cut_off(self, expected: u64, found: u64) -> LayerError {
        LayerError::CutOff { entry: self.entry, offset: self.offset, expected, found }
    }
}

/// Explains an error of the tar reader by how far the stream was read.
pub(super) fn damaged(position: &Position, error: &io::Error) -> LayerError {
    if position.is_at_end() {
        return LayerError::NoEndMark { offset: position.offset() };
    }
    LayerError::Damaged { offset: position.offset(), detail: error.to_string() }
}

/// Checks that a stream would unpack: every entry is whole and inside of the layer.
///
/// Not checked here, but where it is unpacked: whether a path leads through a symbolic link.
pub(super) fn scan(reader: impl Read, end_mark: EndMark) -> Result<(), LayerError> {
    let (reader, position) = Counting::new(reader);
    let mut archive = tar::Archive::new(reader);
    let mut buffer = vec![0; BUFFER_LEN];
    for entry in archive.entries().map_err(|error| damaged(&position, &error))? {
        let mut entry = entry.map_err(|error| damaged(&position, &error))?;
        let spot = Spot::of(&entry);
        check(&entry, &spot)?;
        let expected = entry.size();
        let mut found = 0;
        loop {
            match entry.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => found += n as u64,
                Err(_) if position.is_at_end() => return Err(spot.cut_off(expected, found)),
                Err(error) => return Err(damaged(&position, &error)),
            }
        }
        if found < expected {
            return Err(spot.cut_off(expected, found));
        }
    }
    if end_mark == EndMark::Required && position.is_at_end() {
        return Err(LayerError::NoEndMark { offset: position.offset() });
    }
    Ok(())
}

/// Whether a stream without the two empty blocks that end a tar archive is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndMark {
    /// Nothing else would show that the stream was cut between two entries.
    Required,
    /// A digest proves the stream.
    Optional,
}

fn check<R: Read>(entry: &tar::Entry<'_, R>, spot: &Spot) -> Result<(), LayerError> {
    if place(&entry.path_bytes()).is_none() {
        return Err(spot.clone().escape());
    }
    match entry.header().entry_type() {
        EntryType::Link => match entry.link_name_bytes() {
            Some(target) if inside(&target).is_some() => Ok(()),
            _ => Err(spot.clone().escape()),
        },
        EntryType::Regular
        | EntryType::Continuous
        | EntryType::GNUSparse
        | EntryType::Symlink
        | EntryType::Char
        | EntryType::Block
        | EntryType::Directory
        | EntryType::Fifo
        | EntryType::XGlobalHeader => Ok(()),
        other => Err(unknown_kind(spot, other)),
    }
}

pub(super) fn unknown_kind(spot: &Spot, kind: EntryType) -> LayerError {
    let kind = char::from(kind.as_byte());
    LayerError::Kind { entry: spot.entry.clone(), offset: spot.offset, kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_has_its_place() {
        let node = |path: &str| Some(Place::Node(path.into()));
        for (entry, expect) in [
            ("", Some(Place::Root)),
            ("./", Some(Place::Root)),
            ("etc/", node("etc")),
            ("./etc//passwd", node("etc/passwd")),
            ("a/./b", node("a/b")),
            ("...", node("...")),
            (".whale", node(".whale")),
            ("/etc/passwd", None),
            ("../etc", None),
            ("a/../../b", None),
            ("a/../b", None),
            (".wh.a", Some(Place::Whiteout("a".into()))),
            ("d/.wh.a b", Some(Place::Whiteout("d/a b".into()))),
            ("d/.wh..", None),
            ("d/.wh...", None),
            (".wh.", None),
            ("d/.wh..wh..opq", Some(Place::Opaque("d".into()))),
            (".wh..wh..opq", Some(Place::Opaque("".into()))),
            (".wh..wh.plnk", Some(Place::Skip)),
            (".wh..wh.aufs", Some(Place::Skip)),
        ] {
            assert_eq!(place(entry.as_bytes()), expect, "{entry:?}");
        }
    }
}
