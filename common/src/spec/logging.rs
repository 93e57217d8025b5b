//! `LogDriver`: how much of the output of a service's containers is kept.
//!
//! Whichever of the two drivers is named, output is kept in files of Docker's json-file format, and the
//! files are bounded. Source: moby `daemon/logger/jsonfilelog`, `daemon/logger/local`.
//! Differs from Docker: an option that is not given is that of `local` with both drivers, since an
//! unbounded file of `json-file` fills the disk; a size has units of 1024 with both.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::compose::units::parse_bytes;

/// The log driver of a service's containers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LogDriver {
    /// Its name; absent or empty is the default one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its options.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<BTreeMap<String, String>>,
}

/// The driver that is meant where none is named.
const DEFAULT_DRIVER: &str = "json-file";
/// Drivers whose files skep writes.
const DRIVERS: [&str; 2] = [DEFAULT_DRIVER, "local"];
/// Options that say how much is kept.
const MAX_SIZE: &str = "max-size";
const MAX_FILE: &str = "max-file";
/// Options of these drivers that are kept and do nothing yet.
const LATER: [&str; 8] =
    ["compress", "env", "env-regex", "labels", "labels-regex", "max-buffer-size", "mode", "tag"];

/// Most files of one container. A reader opens all of them.
pub const LOG_FILES_MAX: u32 = 100;

/// Why the options of a log driver cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogDriverError {
    /// Not a size, or none at all.
    #[error("log option max-size={0:?} is no size above zero: write it as 500k, 10m or 1g")]
    Size(String),
    /// Not a number of files.
    #[error("log option max-file={0:?} is no number of files: give one from 1 to {LOG_FILES_MAX}")]
    Files(String),
    /// The driver has no such option.
    #[error("unknown log opt '{option}' for {driver} log driver")]
    Unknown {
        /// The option.
        option: String,
        /// The driver.
        driver: String,
    },
}

/// How much of one container's output is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRotation {
    /// Bytes of a file. A record that is longer has a file of its own.
    pub file_bytes_max: u64,
    /// Files, the one that is being written included.
    pub files_max: u32,
}

impl Default for LogRotation {
    /// Docker's values for the driver `local`.
    fn default() -> Self {
        Self { file_bytes_max: 20 << 20, files_max: 5 }
    }
}

impl LogDriver {
    fn driver(&self) -> &str {
        self.name.as_deref().filter(|name| !name.is_empty()).unwrap_or(DEFAULT_DRIVER)
    }

    fn options(&self) -> impl Iterator<Item = (&str, &str)> {
        self.options.iter().flatten().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// How much is kept. With a driver that skep does not have, as much as without options.
    pub fn rotation(&self) -> Result<LogRotation, LogDriverError> {
        let mut rotation = LogRotation::default();
        if !DRIVERS.contains(&self.driver()) {
            return Ok(rotation);
        }
        for (option, value) in self.options() {
            match option {
                MAX_SIZE => {
                    let bytes = parse_bytes(value).ok().and_then(|bytes| u64::try_from(bytes).ok());
                    let bytes = bytes.filter(|bytes| *bytes > 0);
                    rotation.file_bytes_max =
                        bytes.ok_or_else(|| LogDriverError::Size(value.into()))?;
                }
                MAX_FILE => {
                    let files = value.parse().ok().filter(|n| (1..=LOG_FILES_MAX).contains(n));
                    rotation.files_max =
                        files.ok_or_else(|| LogDriverError::Files(value.into()))?;
                }
                _ if LATER.contains(&option) => {}
                _ => {
                    let (option, driver) = (option.into(), self.driver().into());
                    return Err(LogDriverError::Unknown { option, driver });
                }
            }
        }
        Ok(rotation)
    }

    /// What it says that has no effect yet, for people.
    pub fn warnings(&self) -> Vec<String> {
        let driver = self.driver();
        if !DRIVERS.contains(&driver) {
            let instead = "output is kept in files on each node, as with json-file";
            return vec![format!("log driver {driver} is not supported yet: {instead}")];
        }
        let later = self.options().filter(|(option, _)| LATER.contains(option));
        later
            .map(|(option, _)| format!("log option {option} is kept but has no effect yet"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `DRIVER OPTION=VALUE…`, `-` for no driver; gives `BYTES FILES` and the warnings, or why not.
    fn said(words: &str) -> String {
        let mut words = words.split(' ');
        let name = words.next().filter(|name| *name != "-").map(str::to_owned);
        let options = words.filter_map(|word| word.split_once('='));
        let options = options.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let driver = LogDriver { name, options: Some(options) };
        match driver.rotation() {
            Ok(LogRotation { file_bytes_max, files_max }) => {
                let told = [vec![format!("{file_bytes_max} {files_max}")], driver.warnings()];
                told.concat().join("; ")
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn options_bound_what_is_kept() {
        for (words, expect) in [
            ("-", "20971520 5"),
            ("json-file", "20971520 5"),
            ("local max-size=10m", "10485760 5"),
            ("- max-size=1k max-file=1", "1024 1"),
            ("json-file max-size=65536 max-file=100", "65536 100"),
            (
                "json-file max-size=10x",
                "log option max-size=\"10x\" is no size above zero: write it as 500k, 10m or 1g",
            ),
            (
                "json-file max-size=0",
                "log option max-size=\"0\" is no size above zero: write it as 500k, 10m or 1g",
            ),
            (
                "json-file max-size=-1",
                "log option max-size=\"-1\" is no size above zero: write it as 500k, 10m or 1g",
            ),
            (
                "local max-file=0",
                "log option max-file=\"0\" is no number of files: give one from 1 to 100",
            ),
            (
                "local max-file=101",
                "log option max-file=\"101\" is no number of files: give one from 1 to 100",
            ),
            ("local max-sise=1m", "unknown log opt 'max-sise' for local log driver"),
            (
                "json-file tag=x max-size=1m",
                "1048576 5; log option tag is kept but has no effect yet",
            ),
            (
                "syslog syslog-address=udp://1.2.3.4 max-size=x",
                "20971520 5; log driver syslog is not supported yet: output is kept in files on each \
                 node, as with json-file",
            ),
        ] {
            assert_eq!(said(words), expect, "{words}");
        }
    }
}
