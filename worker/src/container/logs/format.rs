//! Docker's json-file format: one object a line, with the members `log`, `stream` and `time`.
//!
//! A line of output keeps its newline. What is longer than [`MAX_LINE_BYTES`] is split, and all
//! parts but the last lack the newline; so does an unfinished line at the end of the output.
//! Source: moby `daemon/logger/copier.go` and `daemon/logger/jsonfilelog`.

use std::io::Write;

use serde::Deserialize;
use skep_common::Timestamp;

/// Longest piece of a line. Docker's value.
pub const MAX_LINE_BYTES: usize = 16 * 1024;

/// Where a line of output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// The name in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// One record of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// When it was written.
    pub time: Timestamp,
    /// Where it came from.
    pub stream: Stream,
    /// The output, without the newline that ends it.
    pub line: String,
    /// Whether the line goes on in the next record of this stream.
    pub is_partial: bool,
}

/// Cuts one stream into records and encodes them.
#[derive(Debug)]
pub struct Encoder {
    stream: Stream,
    line: Vec<u8>,
    /// Time of the first part of the line at hand; later parts carry it too.
    partial_since: Option<Timestamp>,
}

impl Encoder {
    /// An encoder at the start of a line.
    pub fn new(stream: Stream) -> Self {
        Self { stream, line: Vec::new(), partial_since: None }
    }

    /// Takes output that was read at `now` and appends whole records to `out`.
    pub fn push(&mut self, mut bytes: &[u8], now: Timestamp, out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            let room = MAX_LINE_BYTES - self.line.len();
            match bytes.iter().take(room + 1).position(|byte| *byte == b'\n') {
                Some(end) => {
                    self.line.extend_from_slice(&bytes[..end]);
                    bytes = &bytes[end + 1..];
                    self.emit(true, now, out);
                    self.partial_since = None;
                }
                None => {
                    let taken = room.min(bytes.len());
                    self.line.extend_from_slice(&bytes[..taken]);
                    bytes = &bytes[taken..];
                    if self.line.len() == MAX_LINE_BYTES && !bytes.is_empty() {
                        self.emit(false, now, out);
                        self.partial_since.get_or_insert(now);
                    }
                }
            }
        }
    }

    /// Appends the unfinished line at the end of the output, if there is one.
    pub fn finish(&mut self, now: Timestamp, out: &mut Vec<u8>) {
        if !self.line.is_empty() {
            self.emit(false, now, out);
        }
    }

    fn emit(&mut self, is_whole: bool, now: Timestamp, out: &mut Vec<u8>) {
        let time = self.partial_since.unwrap_or(now);
        out.extend_from_slice(b"{\"log\":\"");
        escape(&self.line, out);
        let newline = if is_whole { "\\n" } else { "" };
        let stream = self.stream.as_str();
        writeln!(out, "{newline}\",\"stream\":\"{stream}\",\"time\":\"{time}\"}}")
            .expect("a vector takes all that is written to it");
        self.line.clear();
    }
}

/// Appends `bytes` as the inside of a JSON string; what is not UTF-8 becomes U+FFFD.
fn escape(bytes: &[u8], out: &mut Vec<u8>) {
    for chunk in bytes.utf8_chunks() {
        for &byte in chunk.valid().as_bytes() {
            match byte {
                b'"' => out.extend_from_slice(b"\\\""),
                b'\\' => out.extend_from_slice(b"\\\\"),
                b'\n' => out.extend_from_slice(b"\\n"),
                b'\r' => out.extend_from_slice(b"\\r"),
                b'\t' => out.extend_from_slice(b"\\t"),
                0..0x20 => {
                    const HEX: &[u8; 16] = b"0123456789abcdef";
                    let digits = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 0xf)]];
                    out.extend_from_slice(b"\\u00");
                    out.extend_from_slice(&digits);
                }
                _ => out.push(byte),
            }
        }
        if !chunk.invalid().is_empty() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
}

/// Reads one line of a log file; `None` where it is no record.
pub fn decode(line: &[u8]) -> Option<LogRecord> {
    #[derive(Deserialize)]
    struct Record {
        #[serde(default)]
        log: String,
        stream: Stream,
        time: Timestamp,
    }
    let record: Record = serde_json::from_slice(line).ok()?;
    let mut line = record.log;
    let is_partial = line.pop_if_newline();
    Some(LogRecord { time: record.time, stream: record.stream, line, is_partial })
}

/// Takes the newline off and tells whether there was none.
trait PopNewline {
    fn pop_if_newline(&mut self) -> bool;
}

impl PopNewline for String {
    fn pop_if_newline(&mut self) -> bool {
        if self.ends_with('\n') {
            self.pop();
            return false;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_700_000_000_120_000_000);

    /// Encodes `chunks` one after the other and gives the file's text.
    fn encode(chunks: &[&[u8]]) -> String {
        let mut encoder = Encoder::new(Stream::Stdout);
        let mut out = Vec::new();
        for chunk in chunks {
            encoder.push(chunk, NOW, &mut out);
        }
        encoder.finish(NOW, &mut out);
        String::from_utf8(out).unwrap()
    }

    fn lines(text: &str) -> Vec<(String, bool)> {
        let records = text.lines().map(|line| decode(line.as_bytes()).expect("a record"));
        records.map(|record| (record.line, record.is_partial)).collect()
    }

    #[test]
    fn a_record_is_written_as_docker_writes_it() {
        let expect = "{\"log\":\"hello \\\"you\\\"\\n\",\"stream\":\"stdout\",\
            \"time\":\"2023-11-14T22:13:20.12Z\"}\n";
        assert_eq!(encode(&[b"hello \"you\"\n"]), expect);
    }

    #[test]
    fn chunks_do_not_show_in_the_records() {
        let expect = vec![("ab".into(), false), (String::new(), false), ("cd".into(), true)];
        assert_eq!(lines(&encode(&[b"a", b"b\n\n", b"c", b"d"])), expect);
        assert_eq!(lines(&encode(&[b"ab\n\ncd"])), expect);
    }

    #[test]
    fn a_long_line_is_split_at_16_kib() {
        for length in [MAX_LINE_BYTES - 1, MAX_LINE_BYTES] {
            let mut line = vec![b'x'; length];
            line.push(b'\n');
            assert_eq!(lines(&encode(&[&line])), [("x".repeat(length), false)], "{length}");
        }
        let mut line = vec![b'x'; 2 * MAX_LINE_BYTES + 5];
        line.push(b'\n');
        let long = "x".repeat(MAX_LINE_BYTES);
        let expect = [(long.clone(), true), (long, true), ("xxxxx".into(), false)];
        assert_eq!(lines(&encode(&[&line])), expect);
        assert_eq!(lines(&encode(&line.chunks(1000).collect::<Vec<_>>())), expect);
    }

    #[test]
    fn every_byte_survives_as_far_as_json_allows() {
        let all: Vec<u8> = (0..=255).filter(|byte| *byte != b'\n').collect();
        let got = lines(&encode(&[&all, b"\n"]));
        assert_eq!(got, [(String::from_utf8_lossy(&all).into_owned(), false)]);
    }

    #[test]
    fn a_torn_line_is_no_record() {
        assert_eq!(decode(b"{\"log\":\"x"), None);
        assert_eq!(decode(b""), None);
    }
}
