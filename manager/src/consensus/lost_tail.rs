//! A manager whose log lost its end in a way that no crash explains.
//!
//! A crash tears the frame that was being written: nobody was told that it is durable, so it is cut
//! and nothing is missing. The file of a segment never gets shorter by it, since its space is
//! reserved durably before the first frame. Where the file is shorter all the same (a person, a
//! restored file system or a disk cut it), entries may be gone that this manager had acknowledged,
//! and others counted on them.
//!
//! # Invariants
//!
//! - Such a manager neither votes nor stands for election until it has applied what the leader had
//!   committed when they met: only then is there nothing left that it alone could have forgotten.
//! - That outlives restarts: the condition is a file in the data directory, made before the log is
//!   continued.
//! - The only member of a swarm goes on at once: nobody else has the entries.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::disk::{self, Error};

/// Its presence is the condition; its text is for people.
const FILE: &str = "lost-tail";
const TEXT: &str = "The end of this manager's Raft log was lost. It takes no part in elections until it has \
caught up with the leader, and then removes this file.\n";

/// Writes the condition down.
pub(super) fn mark(dir: &Path) -> Result<(), Error> {
    let path = dir.join(FILE);
    fs::write(&path, TEXT).map_err(Error::io("write", &path))?;
    let synced = fs::File::open(&path).and_then(|file| file.sync_all());
    synced.map_err(Error::io("sync", &path))?;
    disk::sync_dir(dir)
}

/// Whether a manager is in the condition.
#[derive(Debug)]
pub(super) struct LostTail {
    path: PathBuf,
    is_set: AtomicBool,
}

impl LostTail {
    /// The condition as the data directory has it.
    pub(super) fn read(dir: &Path) -> Self {
        let path = dir.join(FILE);
        Self { is_set: AtomicBool::new(path.exists()), path }
    }

    pub(super) fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the condition. A file that cannot be removed only costs another round after a restart.
    pub(super) fn clear(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(file = %self.path.display(), %error, "failed to remove the note of a lost log tail");
        }
        self.is_set.store(false, Ordering::Release);
    }
}
