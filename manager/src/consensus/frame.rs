//! Sealed files: a header, then frames.
//!
//! ```text
//! header  magic 8 | version 2 | key id 4 | number 8 | salt 32 | tag 16
//! frame   length 4 | crc32 4 | version 1 | key id 4 | counter 8 | sealed bytes | tag 16
//! ```
//!
//! A frame is what one write makes durable: after a crash the last one may be torn, none before it.
//! The checksum tells a torn frame from a forged one, which has a good checksum and a bad tag.

use std::path::Path;

use bytes::BufMut as _;

use super::disk::Error;
use super::seal::{DataKey, FileKey, HEADER_COUNTER, SALT_LENGTH, TAG_LENGTH, new_salt};

/// The version of headers and frames that this program writes, and the highest it reads.
const FORMAT_VERSION: u8 = 1;
const MAGIC_LENGTH: usize = 8;
const HEADER_PLAIN_LENGTH: usize = MAGIC_LENGTH + 2 + 4 + 8 + SALT_LENGTH;
/// Bytes of a header.
pub(crate) const HEADER_LENGTH: usize = HEADER_PLAIN_LENGTH + TAG_LENGTH;
/// Length and checksum.
const FRAME_HEAD_LENGTH: usize = 8;
/// Version, key id and counter: authenticated, not sealed.
const FRAME_CONTEXT_LENGTH: usize = 13;
const FRAME_LENGTH_MIN: usize = FRAME_CONTEXT_LENGTH + TAG_LENGTH;
/// Bytes that a frame takes besides its content.
pub(crate) const FRAME_OVERHEAD: usize = FRAME_HEAD_LENGTH + FRAME_LENGTH_MIN;
/// The counter of a file's first frame.
pub(crate) const FIRST_COUNTER: u64 = HEADER_COUNTER + 1;

/// What kind of file it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileKind {
    /// First bytes of the file.
    pub(crate) magic: &'static [u8; MAGIC_LENGTH],
    /// Enters the file's key, so that one kind never passes for another.
    pub(crate) purpose: &'static str,
}

/// Makes a header and the key of the file that it heads.
pub(crate) fn new_header(kind: FileKind, key: &DataKey, number: u64) -> (Vec<u8>, FileKey) {
    let salt = new_salt();
    let file_key = key.file_key(&salt, kind.purpose);
    let mut bytes = Vec::with_capacity(HEADER_LENGTH);
    bytes.put_slice(kind.magic);
    bytes.put_u16_le(FORMAT_VERSION.into());
    bytes.put_u32_le(key.id());
    bytes.put_u64_le(number);
    bytes.put_slice(&salt);
    let plain = bytes.clone();
    file_key.seal(HEADER_COUNTER, &plain, &mut bytes, HEADER_PLAIN_LENGTH);
    (bytes, file_key)
}

/// Checks a file's header; gives its number and its key.
pub(crate) fn read_header(
    kind: FileKind,
    key: &DataKey,
    path: &Path,
    file: &[u8],
) -> Result<(u64, FileKey), Error> {
    let Some(header) = file.get(..HEADER_LENGTH) else {
        let at = file.len() as u64;
        return Err(Error::damaged(
            path,
            at,
            format!("the header ends before {HEADER_LENGTH} bytes"),
        ));
    };
    let (plain, tag) = header.split_at(HEADER_PLAIN_LENGTH);
    if &plain[..MAGIC_LENGTH] != kind.magic {
        return Err(Error::damaged(path, 0, "the header does not begin as that of such a file"));
    }
    let found = u16::from_le_bytes([plain[8], plain[9]]);
    if found != u16::from(FORMAT_VERSION) {
        return Err(newer(path, 0, found));
    }
    let key_id = u32_at(plain, 10);
    if key_id != key.id() {
        return Err(foreign(path, 0, key_id, key));
    }
    let number = u64::from_le_bytes(plain[14..22].try_into().expect("eight bytes"));
    let salt: [u8; SALT_LENGTH] = plain[22..].try_into().expect("the salt ends the header");
    let file_key = key.file_key(&salt, kind.purpose);
    if file_key.open(HEADER_COUNTER, plain, tag).is_err() {
        let reason = "the header does not authenticate".to_owned();
        return Err(Error::ForeignKey { path: path.to_owned(), offset: 0, reason });
    }
    Ok((number, file_key))
}

/// Appends a frame that holds `content`.
pub(crate) fn put_frame(
    bytes: &mut Vec<u8>,
    file_key: &FileKey,
    key_id: u32,
    counter: u64,
    content: &[u8],
) {
    let start = bytes.len();
    let length = u32::try_from(FRAME_LENGTH_MIN + content.len()).expect("frames are below 4 GiB");
    bytes.reserve(FRAME_OVERHEAD + content.len());
    bytes.put_u32_le(length);
    bytes.put_u32_le(0); // The checksum, once there is something to sum.
    bytes.put_u8(FORMAT_VERSION);
    bytes.put_u32_le(key_id);
    bytes.put_u64_le(counter);
    let sealed_from = bytes.len();
    let context: [u8; FRAME_CONTEXT_LENGTH] =
        bytes[start + FRAME_HEAD_LENGTH..].try_into().expect("just written");
    bytes.extend_from_slice(content);
    file_key.seal(counter, &context, bytes, sealed_from);
    let sum = checksum(&bytes[start..start + 4], &bytes[start + FRAME_HEAD_LENGTH..]);
    bytes[start + 4..start + FRAME_HEAD_LENGTH].copy_from_slice(&sum.to_le_bytes());
}

/// A whole frame with a good checksum; its content is still sealed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawFrame<'a> {
    /// Bytes it takes in the file.
    pub(crate) length: usize,
    version: u8,
    key_id: u32,
    counter: u64,
    context: &'a [u8],
    sealed: &'a [u8],
}

/// Finds the frame that `bytes` begin with, or says why there is none.
/// Whether a frame that begins here runs past the end of the bytes.
pub(crate) fn is_incomplete(bytes: &[u8]) -> bool {
    let Some(head) = bytes.get(..FRAME_HEAD_LENGTH) else { return true };
    bytes.len() < FRAME_HEAD_LENGTH + u32_at(head, 0) as usize
}

pub(crate) fn parse_frame(bytes: &[u8]) -> Result<RawFrame<'_>, &'static str> {
    let Some(head) = bytes.get(..FRAME_HEAD_LENGTH) else { return Err("a frame is incomplete") };
    let length = u32_at(head, 0) as usize;
    if length < FRAME_LENGTH_MIN {
        return Err("a frame has an impossible length");
    }
    let Some(body) = bytes.get(FRAME_HEAD_LENGTH..FRAME_HEAD_LENGTH + length) else {
        return Err("a frame is incomplete");
    };
    if checksum(&head[..4], body) != u32_at(head, 4) {
        return Err("the checksum of a frame does not match");
    }
    let (context, sealed) = body.split_at(FRAME_CONTEXT_LENGTH);
    Ok(RawFrame {
        length: FRAME_HEAD_LENGTH + length,
        version: context[0],
        key_id: u32_at(context, 1),
        counter: u64::from_le_bytes(context[5..].try_into().expect("eight bytes")),
        context,
        sealed,
    })
}

impl RawFrame<'_> {
    /// Opens the frame, which must be the `counter`-th of its file.
    pub(crate) fn open(
        &self,
        file_key: &FileKey,
        key: &DataKey,
        counter: u64,
        path: &Path,
        offset: u64,
    ) -> Result<Vec<u8>, Error> {
        if self.version != FORMAT_VERSION {
            return Err(newer(path, offset, self.version.into()));
        }
        if self.key_id != key.id() {
            return Err(foreign(path, offset, self.key_id, key));
        }
        if self.counter != counter {
            let reason = format!("frame {} stands where frame {counter} belongs", self.counter);
            return Err(Error::damaged(path, offset, reason));
        }
        file_key
            .open(counter, self.context, self.sealed)
            .map_err(|_| Error::damaged(path, offset, "a frame does not authenticate"))
    }
}

/// Looks for a whole frame of this key anywhere in `bytes`; gives its offset there.
///
/// Version and key id are compared before the checksum is computed, so that this is one pass.
pub(crate) fn find_frame(bytes: &[u8], key: &DataKey) -> Option<usize> {
    let mut marker = vec![FORMAT_VERSION];
    marker.extend_from_slice(&key.id().to_le_bytes());
    let candidates = bytes.windows(marker.len()).enumerate().skip(FRAME_HEAD_LENGTH);
    candidates
        .filter(|(_, window)| *window == marker)
        .map(|(at, _)| at - FRAME_HEAD_LENGTH)
        .find(|at| parse_frame(&bytes[*at..]).is_ok())
}

fn checksum(length: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(length);
    hasher.update(body);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn newer(path: &Path, offset: u64, found: u16) -> Error {
    Error::NewerFormat { path: path.to_owned(), offset, found, known: FORMAT_VERSION.into() }
}

fn foreign(path: &Path, offset: u64, found: u32, key: &DataKey) -> Error {
    let reason = format!("its key id is {found}, this node's is {}", key.id());
    Error::ForeignKey { path: path.to_owned(), offset, reason }
}
