//! What is left on a manager's disk.
//!
//! A manager whose disk is all but full takes no writes of users and does not lead where another one can: what is
//! left is for what must be written all the same. Where even that is gone, Raft ends here, and clients are shown
//! what was known by then; the daemon begins again when there is room.
//!
//! Driven by [`watch`], which looks once a second.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use skep_common::Timestamp;
use skep_runtime::{TaskSet, clock};
use tokio::sync::watch;

use crate::consensus::Consensus;

/// Twice the largest segment of the log: one to go on with, one for a snapshot.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// Beyond it, before the disk counts as mended: what hovers about the bound does not flap.
const FREE_BYTES_MORE: u64 = 16 << 20;
/// The lead is offered once in so many looks: the others may be full or away, too.
const HAND_OVER_TICKS: u64 = 15;
/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);

/// A disk without room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Full {
    /// A directory on it.
    pub dir: PathBuf,
    /// Bytes that were free when it was found so.
    pub free: u64,
    /// When that was.
    pub since: Timestamp,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        write!(
            f,
            "the disk of this manager is full: {} MiB were free at {} where {} is, and {} MiB are needed; make room there, it goes on by itself then",
            mib(self.free),
            self.since,
            self.dir.display(),
            mib(FREE_BYTES_MIN + FREE_BYTES_MORE),
        )
    }
}

/// Whether a disk with so many free bytes is full, when it was or was not before.
fn judge(before: Option<&Full>, dir: &Path, free: u64, now: Timestamp) -> Option<Full> {
    match before {
        None if free < FREE_BYTES_MIN => Some(Full { dir: dir.to_owned(), free, since: now }),
        None => None,
        Some(_) if free >= FREE_BYTES_MIN + FREE_BYTES_MORE => None,
        Some(before) => Some(before.clone()),
    }
}

/// What an unprivileged program could still write. `None` where the file system does not say.
fn free_bytes(dir: &Path) -> Option<u64> {
    let status = statvfs(dir).ok()?;
    Some(status.blocks_available() * status.fragment_size())
}

/// Watches the disk of a directory for as long as the task set lives.
pub(crate) fn watch(
    dir: PathBuf,
    consensus: Consensus,
    tasks: &TaskSet,
) -> watch::Receiver<Option<Full>> {
    let look = move |before: Option<&Full>| judge(before, &dir, free_bytes(&dir)?, clock::now());
    let (sender, receiver) = watch::channel(look(None));
    tasks.spawn("disk space", async move {
        let mut ticks = tokio::time::interval(PERIOD);
        let mut n_ticks = 0_u64;
        loop {
            ticks.tick().await;
            let before = sender.borrow().clone();
            let now = look(before.as_ref());
            match (&before, &now) {
                (None, Some(full)) => tracing::error!(why = %full, "this manager takes no writes"),
                (Some(_), None) => tracing::info!("there is room on this manager's disk again"),
                _ => {}
            }
            let is_full = now.is_some();
            if before != now {
                sender.send_replace(now);
            }
            n_ticks = if is_full { n_ticks + 1 } else { 0 };
            let may_hand_over = n_ticks % HAND_OVER_TICKS == 1;
            if may_hand_over && consensus.leadership().borrow().is_self {
                // One that is alone goes on: there is nobody else.
                consensus.transfer_leader().await;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_full_below_the_bound_and_mended_well_above_it() {
        let at = |seconds| Timestamp::from_secs(seconds);
        let dir = Path::new("/var/lib/skep/raft");
        assert_eq!(judge(None, dir, FREE_BYTES_MIN, at(1)), None);
        let full = judge(None, dir, FREE_BYTES_MIN - 1, at(1)).unwrap();
        assert_eq!((full.free, full.since), (FREE_BYTES_MIN - 1, at(1)));
        assert_eq!(judge(Some(&full), dir, FREE_BYTES_MIN + 1, at(2)), Some(full.clone()));
        assert_eq!(judge(Some(&full), dir, 0, at(2)), Some(full.clone()));
        assert_eq!(judge(Some(&full), dir, FREE_BYTES_MIN + FREE_BYTES_MORE, at(3)), None);
        let text = full.to_string();
        for words in ["63 MiB were free", "/var/lib/skep/raft", "80 MiB are needed"] {
            assert!(text.contains(words), "{words:?} in {text}");
        }
    }
}
