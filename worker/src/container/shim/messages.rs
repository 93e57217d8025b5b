//! Keeps what libcontainer logs while it makes a container.
//!
//! Inside the container its errors reach the shim without their causes ("failed to prepare
//! rootfs"); the causes are only logged, by the process that is becoming the container's. They go to
//! the shim's message file, and the first one, which is the deepest, explains the failure.

use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::super::dirs::RunDir;
use super::super::error::{Context, Error};

/// The errors of one creation.
pub(super) struct Messages {
    path: PathBuf,
    /// Bytes that were in the file before.
    begin: usize,
}

impl Messages {
    /// Collects errors from now on, in this process and those it forks.
    pub(super) fn collect(run: &RunDir) -> Result<Self, Error> {
        let path = run.shim_messages();
        let context = || format!("open {}", path.display());
        let file = OpenOptions::new().create(true).append(true).open(&path).during(context)?;
        let begin = file.metadata().during(context)?.len();
        // Fails where a collector exists already: there is one creation in a shim's life.
        let _ = tracing::subscriber::set_global_default(Collector { file });
        Ok(Self { path, begin: usize::try_from(begin).unwrap_or(usize::MAX) })
    }

    /// `reason`, with the first error that was logged where it says more.
    pub(super) fn explain(&self, reason: &str) -> String {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let first = text.get(self.begin..).and_then(|text| text.lines().next());
        match first {
            Some(first) if !reason.contains(first) => format!("{reason}: {first}"),
            _ => reason.to_owned(),
        }
    }
}

/// Writes errors to a file, one a line. It keeps no state, so that a fork cannot confuse it.
struct Collector {
    file: File,
}

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.is_event()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // Spans are not enabled; an id must not be zero.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = format!("{}{}\n", line.message, line.fields).replace('\u{1b}', "");
        // One write, so that lines of two processes do not mix. Nothing is told if it fails.
        let _ = (&self.file).write_all(text.as_bytes());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The parts of one event.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let target = if field.name() == "message" { &mut self.message } else { &mut self.fields };
        let result = match field.name() {
            "message" => write!(target, "{value:?}"),
            name => write!(target, " {name}={value:?}"),
        };
        result.expect("a string takes all that is written to it");
    }
}
