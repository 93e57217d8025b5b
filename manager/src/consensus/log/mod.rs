//! The Raft log: append-only segments, sealed, written by one thread.
//!
//! openraft drives it through [`RaftLogStorage`] and reads it through [`RaftLogReader`].
//!
//! ```text
//! append ─► index (memory) ─► queue ─► writer: one frame, one fdatasync ─► callbacks
//!              ▲                                   │
//! readers ─────┴── places of what was evicted ◄────┘
//! ```
//!
//! # Reading order
//!
//! `record` (what is written), `segment` (where), `writer`, `open`, `index`, then this file.
//!
//! # Invariants
//!
//! - An entry is acknowledged, and a vote returned, only when it is durable.
//! - A segment starts with a checkpoint of all before it, so that deleting the oldest loses nothing.
//! - Each opening starts a new segment with a key of its own: no nonce is used twice, whatever was
//!   cut.
//! - Memory is bounded: entries beyond `cached_bytes_max` are read back from disk.

mod index;
mod open;
mod record;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use tokio::sync::{mpsc, oneshot};

use super::disk::{DirLock, Disk, Error};
use super::runtime::{Threads, aside};
use super::seal::DataKey;
use super::types::{Entry, LogId, TypeConfig, Vote};
use index::{Found, Index};
use segment::FramePlace;
use writer::{Job, Writer};

/// Jobs that wait for the writer; openraft itself holds more back.
const QUEUE_LENGTH: usize = 1024;
/// Bytes of entries sent to a peer at once: a few milliseconds of a network, far below the largest
/// message. One entry that is larger goes alone.
const READ_BYTES_MAX: usize = 4 << 20;
/// Entries kept in memory: what peers that keep up still need.
const CACHED_BYTES_MAX: usize = 4 << 20;
/// The first segment after a start is small: labs and edge sites write little.
const SEGMENT_BYTES_FIRST: u64 = 1 << 20;
/// Each further one is twice as large, up to this.
const SEGMENT_BYTES_MAX: u64 = 32 << 20;

const UNPOISONED: &str = "nothing panics while it holds the index";

/// Where and how the log is kept.
#[derive(Debug, Clone)]
pub(crate) struct LogOptions {
    pub(crate) raft_id: u64,
    /// The manager's data directory.
    pub(crate) dir: PathBuf,
    pub(crate) key: DataKey,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) threads: Threads,
    pub(crate) cached_bytes_max: usize,
    pub(crate) segment_bytes_first: u64,
    pub(crate) segment_bytes_max: u64,
}

impl LogOptions {
    pub(crate) fn new(raft_id: u64, dir: PathBuf, key: DataKey, disk: Arc<dyn Disk>) -> Self {
        Self {
            raft_id,
            dir,
            key,
            disk,
            threads: Threads::Own,
            cached_bytes_max: CACHED_BYTES_MAX,
            segment_bytes_first: SEGMENT_BYTES_FIRST,
            segment_bytes_max: SEGMENT_BYTES_MAX,
        }
    }
}

fn dir_of(options: &LogOptions) -> PathBuf {
    options.dir.join("log")
}

/// The log of this manager. Clones are handles on the same one; its thread ends with the last.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    reader: LogReader,
    jobs: mpsc::Sender<Job>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// Reads the log; does not keep its thread alive.
#[derive(Debug, Clone)]
pub(crate) struct LogReader {
    index: Arc<Mutex<Index>>,
}

impl LogStore {
    /// Opens the log, or starts an empty one. Blocks.
    pub(crate) fn open(options: &LogOptions, lock: Arc<DirLock>) -> Result<Self, Error> {
        let (writer, index) = Writer::new(options, open::open(options)?, lock);
        let (jobs, queue) = mpsc::channel(QUEUE_LENGTH);
        let thread = match &options.threads {
            Threads::Own => {
                let thread = std::thread::Builder::new().name("skep-raft-log".to_owned());
                let thread = thread.spawn(move || writer.run(queue));
                Some(thread.map_err(Error::io("start the writer of", &dir_of(options)))?)
            }
            Threads::OfCaller(tasks) => {
                tasks.spawn_to_end("raft log", writer.run_as_task(queue));
                None
            }
        };
        let thread = Arc::new(Mutex::new(thread));
        Ok(Self { reader: LogReader { index }, jobs, thread })
    }

    /// Writes what was left for later and ends the thread. Later calls fail.
    pub(crate) async fn close(&self) -> io::Result<()> {
        self.ask(|done| Job::Close { done }).await
    }

    /// The thread, for whoever has to wait until it has ended.
    pub(crate) fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.thread.lock().expect(UNPOISONED).take()
    }

    /// The last entry.
    #[cfg(test)]
    pub(crate) fn last(&self) -> Option<LogId> {
        self.index().last()
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.reader.index.lock().expect(UNPOISONED)
    }

    async fn send(&self, job: Job) -> io::Result<()> {
        self.jobs.send(job).await.map_err(|_| stopped())
    }

    async fn ask(
        &self,
        job: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Job,
    ) -> io::Result<()> {
        let (done, result) = oneshot::channel();
        self.send(job(done)).await?;
        result.await.map_err(|_| stopped())?
    }
}

fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the writer of the Raft log has stopped")
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let index = self.index();
        Ok(LogState { last_purged_log_id: index.purged, last_log_id: index.last() })
    }

    async fn get_log_reader(&mut self) -> LogReader {
        self.reader.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = *vote;
        self.ask(|done| Job::Vote { vote, done }).await?;
        self.index().vote = Some(vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.index().committed = committed; // The writer takes it along with its next frame.
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.index().committed)
    }

    async fn append<I>(&mut self, entries: I, done: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        {
            let mut index = self.index();
            for entry in &entries {
                if !index.push(entry.clone()) {
                    let text = format!("entry {} does not follow the log", entry.log_id.index);
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
                }
            }
        }
        self.send(Job::Append { entries, done }).await
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.index().truncate(last_log_id);
        self.ask(|done| Job::Truncate { after: last_log_id, done }).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.index().purge(upto);
        self.send(Job::Purge { upto }).await
    }
}

impl LogReader {
    async fn read(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<Entry>, io::Error> {
        let found = self.index.lock().expect(UNPOISONED).find(range, bytes_max);
        let is_at_hand = found.iter().all(|found| matches!(found, Found::Cached(_)));
        if is_at_hand {
            return read_found(found).map_err(io::Error::other);
        }
        aside(move || read_found(found)).await?.map_err(io::Error::other)
    }
}

/// Reads what is on disk, each frame once.
fn read_found(found: Vec<Found>) -> Result<Vec<Entry>, Error> {
    let mut opened: Option<(Arc<FramePlace>, bytes::Bytes)> = None;
    let mut entries = Vec::with_capacity(found.len());
    for found in found {
        let place = match found {
            Found::Cached(entry) => {
                entries.push(entry);
                continue;
            }
            Found::OnDisk(place) => place,
        };
        let content = match &opened {
            Some((frame, content)) if Arc::ptr_eq(frame, &place.frame) => content.clone(),
            _ => place.frame.read()?,
        };
        entries.push(place.entry(&content)?);
        opened = Some((place.frame, content));
    }
    Ok(entries)
}

fn bounds(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

impl RaftLogReader<TypeConfig> for LogReader {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read(bounds(&range), usize::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.index.lock().expect(UNPOISONED).vote)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read(start..end, READ_BYTES_MAX).await
    }
}
