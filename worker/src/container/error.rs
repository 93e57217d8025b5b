//! Why a container operation failed.

use std::error::Error as StdError;
use std::io;

/// Why a container operation failed; split by what the caller can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No container has this id on this node.
    #[error("container {0} not found")]
    NotFound(String),
    /// The id is taken; remove that container first.
    #[error("container {0} exists already")]
    Exists(String),
    /// Ids are file names: letters, digits, `_`, `-` and `.`.
    #[error("invalid container id {0:?}")]
    InvalidId(String),
    /// The container is not in the state that the operation needs.
    #[error("container {id} is {state}")]
    WrongState {
        /// The container.
        id: String,
        /// Its state, as an adjective.
        state: &'static str,
    },
    /// The container could not be made; nothing of it is left. The reason is for the user.
    #[error("failed to create container {id}: {reason}")]
    Create {
        /// The container.
        id: String,
        /// What its shim said.
        reason: String,
    },
    /// The container was made but its program did not start.
    #[error("failed to start container {id}: {reason}")]
    Start {
        /// The container.
        id: String,
        /// What its shim said.
        reason: String,
    },
    /// The command of an exec could not be run.
    #[error("failed to run a command in container {id}: {reason}")]
    Exec {
        /// The container.
        id: String,
        /// What the helper said.
        reason: String,
    },
    /// The shim died and took the exit status with it; nothing of the container runs any more.
    #[error("container {0} was lost: its shim ended without recording an exit")]
    Lost(String),
    /// A system call failed.
    #[error("failed to {action}")]
    Io {
        /// What was tried, with paths and ids.
        action: String,
        /// The cause.
        source: io::Error,
    },
}

impl Error {
    /// Why it failed, for a daemon that says of which container and what was tried itself.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Create { reason, .. }
            | Self::Start { reason, .. }
            | Self::Exec { reason, .. } => reason.clone(),
            Self::NotFound(_)
            | Self::Exists(_)
            | Self::InvalidId(_)
            | Self::WrongState { .. }
            | Self::Lost(_)
            | Self::Io { .. } => chain(self),
        }
    }
}

/// Adds what was tried to an I/O error.
pub(super) trait Context<T> {
    /// Names the action, without "failed to".
    fn during(self, action: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn during(self, action: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::Io { action: action(), source: error.into() })
    }
}

/// The message of an error with its causes, each said once.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// What libcontainer puts before an error that it hands from one of its processes to the next.
const WRAPPINGS: [&str; 3] = [
    "failed to create container: ",
    "exec process failed with error ",
    "error in executing process : ",
];

/// As [`chain`], for an error of libcontainer: what it wrapped.
pub(super) fn unwrapped(error: &dyn StdError) -> String {
    let text = chain(error);
    let strip = |text, wrapping| str::strip_prefix(text, wrapping).unwrap_or(text);
    WRAPPINGS.into_iter().fold(text.as_str(), strip).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_that_is_handed_on_does_not_repeat_its_sentence() {
        let said = |reason: &str| (String::from("c"), String::from(reason));
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let (id, reason) = said("no such file");
        let exec = Error::Exec { id, reason };
        let (id, reason) = said("unable to find user ghost");
        let create = Error::Create { id, reason };
        for (error, expect) in [
            (exec, "no such file"),
            (create, "unable to find user ghost"),
            (Error::NotFound("c".into()), "container c not found"),
            (
                Error::Io { action: "open /x".into(), source: missing() },
                "failed to open /x: entity not found",
            ),
        ] {
            assert_eq!(error.reason(), expect);
        }
    }

    #[test]
    fn an_error_of_the_runtime_is_told_without_its_way() {
        for (text, expect) in [
            (
                "failed to create container: exec process failed with error error in executing \
                 process : executable 'a' not found in $PATH",
                "executable 'a' not found in $PATH",
            ),
            ("failed to create container: EPERM", "EPERM"),
            ("no cgroups", "no cgroups"),
        ] {
            assert_eq!(unwrapped(&io::Error::other(text)), expect);
        }
    }
}
