//! The entries of an archive, each copied into a staging file and hashed on the way.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use skep_worker_core::image::{Descriptor, Digest};
use tar::EntryType;

use super::ArchiveError;
use crate::images::blobs::{BlobWriter, DOCUMENT_LEN_MAX};
use crate::images::error::{At, Error};
use crate::images::stream::{BUFFER_LEN, Counting, Position, decoded};

const BLOBS: &str = "blobs/sha256/";
/// A link to a link to a link is still plausible; more is a loop.
const LINKS_MAX: usize = 8;

/// One regular file of the archive.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) entry: String,
    /// Where its header is in the uncompressed archive.
    pub(super) offset: u64,
    pub(super) path: PathBuf,
    pub(super) digest: Digest,
    pub(super) len: u64,
}

impl Staged {
    pub(super) fn invalid(&self, detail: &dyn std::fmt::Display) -> ArchiveError {
        let (entry, detail) = (self.entry.clone(), detail.to_string());
        ArchiveError::Document { entry, offset: self.offset, detail }
    }

    pub(super) fn expect_digest(&self, expected: Digest) -> Result<(), ArchiveError> {
        if self.digest == expected {
            return Ok(());
        }
        let entry = self.entry.clone();
        Err(ArchiveError::Digest { entry, offset: self.offset, expected, found: self.digest })
    }
}

/// All regular files of an archive by their names, and the links between them.
#[derive(Debug)]
pub(super) struct Contents {
    files: BTreeMap<String, Staged>,
    /// Old Docker wrote a layer once and links to it from the other images of the archive.
    links: BTreeMap<String, String>,
    by_digest: BTreeMap<Digest, String>,
    end: End,
}

#[derive(Debug)]
struct End {
    offset: u64,
    has_mark: bool,
    last_entry: String,
}

impl Contents {
    /// Copies every regular file of the archive into the directory `staging`.
    pub(super) fn stage(reader: impl Read, staging: &Path) -> Result<Self, Error> {
        let (_, stream) = decoded(reader).map_err(ArchiveError::Read)?;
        let (stream, position) = Counting::new(stream);
        let mut archive = tar::Archive::new(stream);
        let mut contents = Self {
            files: BTreeMap::new(),
            links: BTreeMap::new(),
            by_digest: BTreeMap::new(),
            end: End { offset: 0, has_mark: false, last_entry: String::new() },
        };
        let mut last_entry = String::new();
        let damaged = |entry: &str, error: &io::Error| -> Error {
            let (entry, offset) = (entry.to_owned(), position.offset());
            if position.is_at_end() {
                let missing = "what follows".to_owned();
                return ArchiveError::NoEnd { entry, offset, missing }.into();
            }
            ArchiveError::Damaged { entry, offset, detail: error.to_string() }.into()
        };
        let entries = archive.entries().map_err(|error| damaged("", &error))?;
        for (nth, entry) in entries.enumerate() {
            let mut entry = entry.map_err(|error| damaged(&last_entry, &error))?;
            last_entry = clean(&entry.path_bytes());
            match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                    let path = staging.join(nth.to_string());
                    let staged = stage(&mut entry, &last_entry, path, &position)?;
                    contents.add(staged)?;
                }
                EntryType::Link | EntryType::Symlink => {
                    contents.add_link(&last_entry, &entry);
                }
                // Directories; an archive has nothing else, and nothing else is asked for.
                _ => {}
            }
        }
        let (offset, has_mark) = (position.offset(), !position.is_at_end());
        contents.end = End { offset, has_mark, last_entry };
        Ok(contents)
    }

    fn add(&mut self, staged: Staged) -> Result<(), Error> {
        if let Some(hex) = staged.entry.strip_prefix(BLOBS)
            && let Some(expected) = Digest::from_hex(hex)
        {
            staged.expect_digest(expected)?;
        }
        self.by_digest.insert(staged.digest, staged.entry.clone());
        self.files.insert(staged.entry.clone(), staged);
        Ok(())
    }

    fn add_link<R: Read>(&mut self, name: &str, entry: &tar::Entry<'_, R>) {
        let target = entry.link_name_bytes().unwrap_or_default();
        let target = String::from_utf8_lossy(&target).into_owned();
        let target = match entry.header().entry_type() {
            EntryType::Symlink => match name.rsplit_once('/') {
                Some((dir, _)) => format!("{dir}/{target}"),
                None => target,
            },
            _ => target,
        };
        self.links.insert(name.to_owned(), clean(target.as_bytes()));
    }

    pub(super) fn has(&self, entry: &str) -> bool {
        self.find(entry).is_some()
    }

    fn find(&self, entry: &str) -> Option<&Staged> {
        let mut name = clean(entry.as_bytes());
        for _ in 0..LINKS_MAX {
            if let Some(staged) = self.files.get(&name) {
                return Some(staged);
            }
            name.clone_from(self.links.get(&name)?);
        }
        None
    }

    /// The file that `by` names.
    pub(super) fn expect(&self, entry: &str, by: &str) -> Result<&Staged, ArchiveError> {
        self.find(entry).ok_or_else(|| {
            if self.end.has_mark {
                return ArchiveError::Missing { by: by.to_owned(), entry: entry.to_owned() };
            }
            self.no_end(format!("entry \"{entry}\", which \"{by}\" names"))
        })
    }

    /// The blob that a descriptor in `by` points to, under whatever name the archive has it.
    pub(super) fn expect_blob(&self, blob: &Descriptor, by: &str) -> Result<&Staged, ArchiveError> {
        let staged = match self.by_digest.get(&blob.digest) {
            Some(entry) => self.expect(entry, by)?,
            None => self.expect(&format!("{BLOBS}{}", blob.digest.hex()), by)?,
        };
        staged.expect_digest(blob.digest)?;
        if staged.len != blob.size {
            return Err(ArchiveError::Size {
                entry: staged.entry.clone(),
                offset: staged.offset,
                expected: blob.size,
                found: staged.len,
            });
        }
        Ok(staged)
    }

    /// Reads a document into memory.
    pub(super) fn read(&self, staged: &Staged) -> Result<Vec<u8>, Error> {
        if staged.len > DOCUMENT_LEN_MAX {
            let detail = format!("{} bytes are too many for a document", staged.len);
            return Err(staged.invalid(&detail).into());
        }
        std::fs::read(&staged.path).at("read", &staged.path)
    }

    pub(super) fn no_image(&self) -> ArchiveError {
        if self.end.has_mark || self.files.is_empty() {
            return ArchiveError::NoImage { entries: self.files.len() };
        }
        self.no_end("index.json or manifest.json".to_owned())
    }

    fn no_end(&self, missing: String) -> ArchiveError {
        let End { offset, last_entry, .. } = &self.end;
        ArchiveError::NoEnd { entry: last_entry.clone(), offset: *offset, missing }
    }
}

/// A name without `.` and with `..` taken back, so that names and link targets compare.
fn clean(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn stage<R: Read>(
    entry: &mut tar::Entry<'_, R>,
    name: &str,
    path: PathBuf,
    position: &Position,
) -> Result<Staged, Error> {
    let (offset, expected) = (entry.raw_header_position(), entry.size());
    let mut writer = BlobWriter::create(path)?;
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        match entry.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => writer.append(&buffer[..n])?,
            Err(_) if position.is_at_end() => break,
            Err(error) => {
                let (entry, detail) = (name.to_owned(), error.to_string());
                let offset = position.offset();
                return Err(ArchiveError::Damaged { entry, offset, detail }.into());
            }
        }
    }
    writer.flush().at("write", writer.path())?;
    let (digest, found) = (writer.digest(), writer.len());
    if found < expected {
        let entry = name.to_owned();
        return Err(ArchiveError::CutOff { entry, offset, expected, found }.into());
    }
    let path = writer.path().to_owned();
    Ok(Staged { entry: name.to_owned(), offset, path, digest, len: found })
}
