//! What is left on a manager's disk.
//!
//! A manager whose disk is all but full takes no writes of users and does not lead where another one can: what is
//! left is for what must be written all the same. Where even that is gone, Raft ends here, and clients are shown
//! what was known by then; the daemon begins again when there is room.
//!
//! Driven by [`watch()`], which looks once a second.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use skep_common::Timestamp;
use skep_common::object::Node;
use skep_manager_core::State;
use skep_runtime::{TaskSet, clock};
use tokio::sync::watch;

use crate::consensus::Consensus;

/// Twice the largest segment of the log: one to go on with, one for a snapshot.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// Beyond it, before the disk counts as mended: what hovers about the bound does not flap.
const FREE_BYTES_MORE: u64 = 16 << 20;
/// Leadership is offered once in so many looks: the others may be full, too, without having said so, or away.
const TRANSFER_TICKS: u64 = 15;
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

/// Waits until there is room on the disk of a directory, of which `seen` was found a moment ago: it may have filled
/// up since.
pub async fn wait_for_room(dir: &Path, seen: Option<Full>) {
    let look = |before: Option<&Full>| judge(before, dir, free_bytes(dir)?, clock::now());
    wait_for_room_by(look, seen, PERIOD).await;
}

async fn wait_for_room_by(
    mut look: impl FnMut(Option<&Full>) -> Option<Full>,
    seen: Option<Full>,
    pause: Duration,
) {
    let mut found = look(seen.as_ref());
    while found.is_some() {
        tokio::time::sleep(pause).await;
        found = look(found.as_ref());
    }
}

/// The Raft ids of the managers whose nodes do not say that their disks are full.
fn with_room(state: &State) -> BTreeSet<u64> {
    let is_full =
        |node: &Node| node.description.as_ref().is_some_and(|said| said.disk_full.is_some());
    let nodes = state.nodes().values().filter(|node| !is_full(node));
    nodes.filter_map(|node| Some(node.manager_status.as_ref()?.raft_id)).collect()
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
            let may_transfer = n_ticks % TRANSFER_TICKS == 1;
            if may_transfer && consensus.leadership().borrow().is_self {
                // Where nobody else has room it goes on: leadership would only go round.
                let others = with_room(&consensus.state());
                consensus.transfer_leader_among(|raft_id| others.contains(&raft_id)).await;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use skep_common::object::NodeDescription;
    use skep_common::spec::{Availability, NodeRole};
    use skep_common::{NodeId, Object};
    use skep_manager_core::{Action, Command, Expect};

    /// A manager whose node says that, if anything.
    fn manager(raft_id: u64, description: Option<NodeDescription>) -> Action {
        let availability = Availability::Active;
        let node_id = NodeId(raft_id.into());
        let node = crate::join::new_node(node_id, NodeRole::Manager, availability, "10.0.0.1:1");
        let mut node = node.unwrap();
        let manager = skep_common::object::ManagerStatus { raft_id, ..Default::default() };
        (node.manager_status, node.description) = (Some(manager), description);
        Action::Put { object: Object::Node(Box::new(node)), expect: Expect::Absent }
    }

    #[test]
    fn the_lead_is_offered_to_managers_with_room_only() {
        let says = |disk_full: Option<&str>| {
            let disk_full = disk_full.map(str::to_owned);
            Some(NodeDescription { disk_full, ..NodeDescription::default() })
        };
        let full = || says(Some("the disk of this manager is full"));
        for (said, expect) in [
            ([full(), full(), full()], &[][..]),
            ([full(), says(None), full()], &[2]),
            ([full(), says(None), None], &[2, 3]),
        ] {
            let mut state = State::default();
            let managers = (1..).zip(said).map(|(raft_id, said)| manager(raft_id, said));
            state.apply(1, &Command::new(Timestamp::from_secs(1), managers.collect()));
            assert_eq!(with_room(&state).into_iter().collect::<Vec<u64>>(), expect);
        }
    }

    #[tokio::test]
    async fn a_disk_that_filled_up_a_moment_ago_is_waited_for() {
        let dir = Path::new("/raft");
        let mut frees = [0, FREE_BYTES_MIN + 1, FREE_BYTES_MIN + FREE_BYTES_MORE].into_iter();
        let look = |before: Option<&Full>| {
            let free = frees.next().expect("the last one is room enough");
            judge(before, dir, free, Timestamp::from_secs(1))
        };
        // The last regular look had found room.
        wait_for_room_by(look, None, Duration::ZERO).await;
        assert_eq!(frees.next(), None);
    }

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
