//! One inotify instance for all readers.
//!
//! No task drives it: every reader that waits also waits for the instance, and whoever is first
//! hands the events to all.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::sys;

/// A growing file, a file that appears in a directory, and the end of either.
const EVENTS: AddWatchFlags = AddWatchFlags::IN_MODIFY
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF);

/// Watches of one inode, shared by all readers of it.
#[derive(Debug)]
struct Shared {
    n_users: usize,
    notify: Arc<Notify>,
}

/// The daemon's inotify instance.
#[derive(Debug)]
pub(in super::super) struct Watcher {
    instance: Inotify,
    /// Another descriptor of the instance, with the runtime.
    readiness: AsyncFd<OwnedFd>,
    watches: Mutex<BTreeMap<WatchDescriptor, Shared>>,
}

impl Watcher {
    /// Opens the instance, within a tokio runtime.
    pub(in super::super) fn new() -> io::Result<Self> {
        let instance = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let readiness = sys::watch_readable(instance.as_fd().try_clone_to_owned()?)?;
        Ok(Self { instance, readiness, watches: Mutex::new(BTreeMap::new()) })
    }

    /// Watches a file or directory until the watch is dropped.
    pub(super) fn watch(self: &Arc<Self>, path: &Path) -> io::Result<Watch> {
        let mut watches = self.lock();
        // Under the lock: a watch of the same inode must not be removed in between.
        let descriptor = self.instance.add_watch(path, EVENTS)?;
        let shared = watches
            .entry(descriptor)
            .or_insert_with(|| Shared { n_users: 0, notify: Arc::default() });
        shared.n_users += 1;
        let notify = shared.notify.clone();
        drop(watches);
        Ok(Watch { watcher: self.clone(), descriptor, notify })
    }

    /// Waits for events and hands them out. Returns when there were any. Cancel-safe.
    pub(super) async fn dispatch(&self) -> io::Result<()> {
        let mut guard = self.readiness.readable().await?;
        let events = guard.try_io(|_| Ok(self.instance.read_events()?));
        let events = match events {
            Ok(events) => events?,
            // Another reader was first.
            Err(_would_block) => return Ok(()),
        };
        let watches = self.lock();
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                // Events were lost: everyone looks again.
                watches.values().for_each(|shared| shared.notify.notify_waiters());
            } else if let Some(shared) = watches.get(&event.wd) {
                shared.notify.notify_waiters();
            }
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<WatchDescriptor, Shared>> {
        self.watches.lock().expect("no holder of this lock panics")
    }
}

/// One reader's interest in one file or directory.
#[derive(Debug)]
pub(super) struct Watch {
    watcher: Arc<Watcher>,
    descriptor: WatchDescriptor,
    notify: Arc<Notify>,
}

impl Watch {
    /// Completes at the next event. Enable it before looking at the file, and no event is missed.
    pub(super) fn notified(&self) -> Notified<'_> {
        self.notify.notified()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watches = self.watcher.lock();
        let Some(shared) = watches.get_mut(&self.descriptor) else { return };
        shared.n_users -= 1;
        if shared.n_users == 0 {
            watches.remove(&self.descriptor);
            // EINVAL: the kernel removed it when the file went away.
            let _ = self.watcher.instance.rm_watch(self.descriptor);
        }
    }
}
