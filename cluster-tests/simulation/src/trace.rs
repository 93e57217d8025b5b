//! What happened, as one number: equal runs have equal traces, bit for bit.

use std::fmt::{self, Write as _};

use sha2::{Digest as _, Sha256};
use skep_common::Timestamp;

/// The hash of every line so far.
pub(crate) struct Trace {
    hash: Sha256,
    line: String,
    is_printed: bool,
}

impl Trace {
    pub(crate) fn new(is_printed: bool) -> Self {
        Self { hash: Sha256::new(), line: String::new(), is_printed }
    }

    pub(crate) fn note(&mut self, now: Timestamp, what: fmt::Arguments<'_>) {
        self.line.clear();
        let written = writeln!(self.line, "{} {what}", now.0);
        debug_assert!(written.is_ok(), "a string takes what it is given");
        self.hash.update(self.line.as_bytes());
        if self.is_printed {
            let millis = (now.0 - crate::queue::START.0) / 1_000_000;
            eprintln!("{millis:>7} ms  {what}");
        }
    }

    pub(crate) fn digest(&self) -> String {
        let bytes = self.hash.clone().finalize();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
