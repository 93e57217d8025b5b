//! Log output and error chains.

use std::error::Error;
use std::fmt;

use tracing_subscriber::EnvFilter;

/// Writes logs to standard error; `SKEP_LOG` has the filter (default `info`, of openraft errors
/// alone, and nothing of boringtun).
pub fn init() {
    let filter = EnvFilter::try_from_env("SKEP_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,openraft=error,boringtun=off"));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second call (tests in one process) keeps the first subscriber.
    let _ = subscriber.with_ansi(false).try_init();
}

/// Shows an error and its causes in one line.
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
