//! Reads containers' logs: from a position, the last records, since a moment, and on as they grow.
//!
//! [`LogReader`] reads one log; [`mod@format`] is the file's format; `watch` tells readers that a file
//! grew, by one inotify instance for the whole daemon.

pub mod format;
mod reader;
mod watch;

pub use format::{LogRecord, Stream};
pub use reader::{LogOptions, LogPosition, LogReader};
pub(super) use watch::Watcher;
