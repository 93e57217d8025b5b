//! Readers that decompress, hash and count, and the pacing of big writes.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::rc::Rc;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sha2::{Digest as _, Sha256};
use skep_worker_core::image::Digest;

/// Size of the buffers between files, decompressors and hashes.
pub(super) const BUFFER_LEN: usize = 256 << 10;

/// How a stream is compressed, told by its first bytes: media types are often wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn of(magic: &[u8]) -> Self {
        match magic {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// What the media type of a layer ends in.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        }
    }
}

/// The uncompressed stream of `reader`, and how it was compressed.
pub(super) fn decoded<'a>(
    mut reader: impl Read + 'a,
) -> io::Result<(Compression, Box<dyn Read + 'a>)> {
    let mut magic = Vec::with_capacity(4);
    reader.by_ref().take(4).read_to_end(&mut magic)?;
    let compression = Compression::of(&magic);
    let whole = io::Cursor::new(magic).chain(reader);
    let whole = BufReader::with_capacity(BUFFER_LEN, whole);
    Ok((
        compression,
        match compression {
            Compression::None => Box::new(whole),
            // Parallel compressors write several members one after the other.
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
            Compression::Zstd => Box::new(zstd::Decoder::with_buffer(whole)?),
        },
    ))
}

/// Hashes what passes through.
pub(super) struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256::new() }
    }

    /// Reads the rest, which a tar reader leaves, and gives the digest of the whole.
    pub(super) fn finish(mut self) -> io::Result<Digest> {
        let mut buffer = vec![0; BUFFER_LEN];
        while self.read(&mut buffer)? > 0 {}
        Ok(digest_of(self.hasher))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

/// The digest that a finished computation stands for.
pub(super) fn digest_of(hasher: Sha256) -> Digest {
    Digest::from_bytes(hasher.finalize().into())
}

/// The digest of bytes in memory.
pub(super) fn digest_of_bytes(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// How far a stream was read and whether its end was met.
#[derive(Debug, Clone, Default)]
pub(super) struct Position(Rc<Cell<(u64, bool)>>);

impl Position {
    pub(super) fn offset(&self) -> u64 {
        self.0.get().0
    }

    /// Whether a read found no more bytes. A tar archive with an end mark is not read so far.
    pub(super) fn is_at_end(&self) -> bool {
        self.0.get().1
    }
}

/// Counts what passes through into a [`Position`].
pub(super) struct Counting<R> {
    inner: R,
    position: Position,
}

impl<R: Read> Counting<R> {
    pub(super) fn new(inner: R) -> (Self, Position) {
        let position = Position::default();
        (Self { inner, position: position.clone() }, position)
    }

    pub(super) fn into_inner(self) -> R {
        self.inner
    }
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = self.inner.read(buffer);
        let (offset, is_at_end) = self.position.0.get();
        let is_cut = match &result {
            Ok(n) => *n == 0 && !buffer.is_empty(),
            // A decompressor says so when its input ends too early.
            Err(error) => error.kind() == io::ErrorKind::UnexpectedEof,
        };
        let n = result.as_ref().map_or(0, |n| *n as u64);
        self.position.0.set((offset + n, is_at_end || is_cut));
        result
    }
}

/// Has the kernel write a growing file back in steps, so that no large heap of dirty pages is left
/// for one fsync: that one would hold up the Raft log, which syncs on the same disk.
#[derive(Debug, Default)]
pub(super) struct Pacer {
    started: u64,
}

impl Pacer {
    /// Small enough that a flush of the log waits for little, large enough for whole extents.
    const STEP: u64 = 8 << 20;

    /// Begins behind what is in the file already.
    pub(super) fn from(len: u64) -> Self {
        Self { started: len }
    }

    /// To be called after each write with the file's length so far.
    ///
    /// Dropping a range from the cache starts its write-back and returns; what is not yet written
    /// stays in the cache. Nothing depends on the advice, so an error is no error.
    pub(super) fn advance(&mut self, file: &File, len: u64) {
        if len - self.started < Self::STEP {
            return;
        }
        let to_offset = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let (start, step) = (to_offset(self.started), to_offset(len - self.started));
        let _ = posix_fadvise(file, start, step, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        self.started = len;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn compression_is_told_by_the_first_bytes() {
        let text = b"some text".to_vec();
        let members = [gzip(b"some "), gzip(b"text")].concat();
        for (bytes, expect) in [
            (text.clone(), Compression::None),
            (gzip(&text), Compression::Gzip),
            (members, Compression::Gzip),
            (zstd::encode_all(text.as_slice(), 3).unwrap(), Compression::Zstd),
        ] {
            let (compression, mut reader) = decoded(bytes.as_slice()).unwrap();
            let mut out = Vec::new();
            reader.read_to_end(&mut out).unwrap();
            assert_eq!((compression, out), (expect, text.clone()));
        }
        let (compression, mut reader) = decoded(&b"ab"[..]).unwrap();
        let mut out = Vec::new();
        reader.read_to_end(&mut out).unwrap();
        assert_eq!((compression, out.as_slice()), (Compression::None, &b"ab"[..]));
    }

    #[test]
    fn the_rest_of_a_stream_is_hashed_too() {
        let mut hashing = Hashing::new(&b"hello world"[..]);
        hashing.read_exact(&mut [0; 5]).unwrap();
        assert_eq!(hashing.finish().unwrap(), digest_of_bytes(b"hello world"));
    }
}
