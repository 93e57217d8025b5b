//! Where a command writes, and the clock it reads: data to `out`, everything else to `err`.

use std::fmt;
use std::io::{self, IsTerminal as _, Write};

use skep_common::Timestamp;

/// A command's outputs.
pub(crate) struct Ui {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    /// Whether progress may move the cursor.
    pub(crate) is_terminal: bool,
    /// The wall clock.
    pub(crate) now: fn() -> Timestamp,
}

impl fmt::Debug for Ui {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ui").field("is_terminal", &self.is_terminal).finish_non_exhaustive()
    }
}

impl Ui {
    /// Standard output and standard error.
    pub(crate) fn standard() -> Self {
        Self {
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
            is_terminal: io::stderr().is_terminal(),
            now: skep_runtime::clock::now,
        }
    }

    /// Outputs of a test.
    #[cfg(test)]
    pub(crate) fn new(
        out: Box<dyn Write + Send>,
        err: Box<dyn Write + Send>,
        now: fn() -> Timestamp,
    ) -> Self {
        Self { out, err, is_terminal: false, now }
    }

    /// Writes data as it is.
    pub(crate) fn data(&mut self, data: impl AsRef<[u8]>) -> io::Result<()> {
        self.out.write_all(data.as_ref())?;
        self.out.flush()
    }

    /// Writes a line of data.
    pub(crate) fn line(&mut self, line: impl fmt::Display) -> io::Result<()> {
        self.data(format!("{line}\n"))
    }

    /// Writes a line for people.
    pub(crate) fn note(&mut self, line: impl fmt::Display) -> io::Result<()> {
        self.message(format!("{line}\n"))
    }

    /// Writes for people, as it is.
    pub(crate) fn message(&mut self, text: impl AsRef<[u8]>) -> io::Result<()> {
        self.err.write_all(text.as_ref())?;
        self.err.flush()
    }
}
