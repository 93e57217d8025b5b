//! The one thread that writes the log.
//!
//! It takes all that is queued, writes it as one frame, syncs once and then tells everyone who
//! waits: what arrives while a sync runs forms the next frame. There is no timer.
//!
//! # Invariants
//!
//! - Nobody is told that something is durable before the sync that made it so.
//! - The next frame is written only when the one before is durable: a crash tears the last only.
//! - After the first failure nothing is written any more. What a failed sync left on disk is
//!   unknown, and a frame's nonce is spent.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use openraft::storage::IOFlushed;
use skep_common::mistakes::{self, Mistake};
use skep_runtime::telemetry::Chain;
use tokio::sync::{mpsc, oneshot};

use crate::consensus::disk::{DirLock, Disk, Error};
use crate::consensus::frame::{FRAME_OVERHEAD, put_frame};
use crate::consensus::seal::DataKey;
use crate::consensus::types::{Entry, LogId, TypeConfig, Vote};

use super::index::Index;
use super::open::Opened;
use super::record::{Checkpoint, Meta, RecordWriter};
use super::segment::{self, EntryPlace, FramePlace, NewSegment, Segment};
use super::{LogOptions, dir_of};

/// A frame is closed once it holds this much: it bounds what one sync has to move, and what one read
/// of a single entry has to open.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// What the writer is asked to do.
pub(super) enum Job {
    Append {
        entries: Vec<Entry>,
        done: IOFlushed<TypeConfig>,
    },
    Vote {
        vote: Vote,
        done: oneshot::Sender<io::Result<()>>,
    },
    Truncate {
        after: Option<LogId>,
        done: oneshot::Sender<io::Result<()>>,
    },
    Purge {
        upto: LogId,
    },
    /// Writes what was left for later, and ends the thread.
    Close {
        done: oneshot::Sender<io::Result<()>>,
    },
}

/// A segment that nothing is appended to any more.
#[derive(Debug)]
pub(super) struct StoredSegment {
    pub(super) segment: Arc<Segment>,
    /// The highest index among its entries that were not truncated.
    pub(super) last_index: Option<u64>,
}

impl StoredSegment {
    pub(super) fn truncate(segments: &mut [Self], after: Option<LogId>) {
        for stored in segments {
            stored.last_index = stored.last_index.min(after.map(|log_id| log_id.index));
        }
    }
}

enum Done {
    Flushed(IOFlushed<TypeConfig>),
    Sender(oneshot::Sender<io::Result<()>>),
}

impl Done {
    fn tell(self, result: io::Result<()>) {
        match self {
            Self::Flushed(callback) => callback.io_completed(result),
            // Whoever asked may have stopped waiting.
            Self::Sender(sender) => drop(sender.send(result)),
        }
    }
}

/// What becomes one frame.
struct Batch {
    content: RecordWriter,
    /// The log once this is durable.
    meta: Meta,
    entries: Vec<(LogId, u32, u32)>,
    truncated: Vec<Option<LogId>>,
    has_purge: bool,
    done: Vec<Done>,
    is_last: bool,
}

/// The thread's state.
pub(super) struct Writer {
    dir: PathBuf,
    raft_id: u64,
    data_key: DataKey,
    disk: Arc<dyn Disk>,
    index: Arc<Mutex<Index>>,
    meta: Meta,
    stored: VecDeque<StoredSegment>,
    active: NewSegment,
    active_last_index: Option<u64>,
    is_active_empty: bool,
    next_capacity: u64,
    capacity_max: u64,
    failure: Option<(io::ErrorKind, String)>,
    _lock: Arc<DirLock>,
}

impl Writer {
    pub(super) fn new(
        options: &LogOptions,
        opened: Opened,
        lock: Arc<DirLock>,
    ) -> (Self, Arc<Mutex<Index>>) {
        let Opened { index, meta, stored, active } = opened;
        let index = Arc::new(Mutex::new(index));
        let writer = Self {
            dir: dir_of(options),
            raft_id: options.raft_id,
            data_key: options.key.clone(),
            disk: Arc::clone(&options.disk),
            index: Arc::clone(&index),
            meta,
            stored: stored.into(),
            active,
            active_last_index: None,
            is_active_empty: true,
            next_capacity: options.segment_bytes_first.saturating_mul(2),
            capacity_max: options.segment_bytes_max,
            failure: None,
            _lock: lock,
        };
        (writer, index)
    }

    /// Works until the queue is closed.
    pub(super) fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        self.delete_purged();
        while let Some(job) = jobs.blocking_recv() {
            if self.work(job, &mut jobs) {
                return;
            }
        }
    }

    /// Does the same as a task: for tests in virtual time, where no thread may wait.
    pub(super) async fn run_as_task(mut self, mut jobs: mpsc::Receiver<Job>) {
        self.delete_purged();
        while let Some(job) = jobs.recv().await {
            tokio::time::sleep(self.disk.delay()).await;
            if self.work(job, &mut jobs) {
                return;
            }
        }
    }

    /// Writes a job and what is queued behind it; true when it was the last.
    fn work(&mut self, job: Job, jobs: &mut mpsc::Receiver<Job>) -> bool {
        let mut batch = Batch {
            content: RecordWriter::default(),
            meta: self.meta.clone(),
            entries: Vec::new(),
            truncated: Vec::new(),
            has_purge: false,
            done: Vec::new(),
            is_last: false,
        };
        batch.add(job);
        while batch.content.bytes.len() < FRAME_BYTES_MAX && !batch.is_last {
            let Ok(job) = jobs.try_recv() else { break };
            batch.add(job);
        }
        let is_last = batch.is_last;
        self.commit(batch);
        is_last
    }

    fn commit(&mut self, mut batch: Batch) {
        let done = std::mem::take(&mut batch.done);
        let result = match &self.failure {
            None => self.write(batch),
            Some(_) => Ok(()),
        };
        if let Err(error) = result {
            let text = Chain(&error).to_string();
            tracing::error!(error = text, "failed to write the Raft log: this manager stops");
            let kind = match error {
                Error::Io { source, .. } => source.kind(),
                _ => io::ErrorKind::Other,
            };
            self.failure = Some((kind, text));
        }
        for done in done {
            done.tell(match &self.failure {
                None => Ok(()),
                Some((kind, text)) => Err(io::Error::new(*kind, text.clone())),
            });
        }
    }

    fn write(&mut self, mut batch: Batch) -> Result<(), Error> {
        self.add_committed(&mut batch);
        if batch.content.bytes.is_empty() {
            return Ok(());
        }
        let length = (FRAME_OVERHEAD + batch.content.bytes.len()) as u64;
        if !self.is_active_empty && self.active.offset + length > self.active.capacity {
            self.roll(length)?;
        }
        let NewSegment { segment, offset, counter, .. } = &mut self.active;
        let Segment { path, file, file_key, .. } = &**segment;
        let mut bytes = Vec::new();
        put_frame(&mut bytes, file_key, self.data_key.id(), *counter, &batch.content.bytes);
        self.disk.write(file, *offset, &bytes).map_err(Error::io("write", path))?;
        if !mistakes::is(Mistake::AcknowledgedEarly) {
            self.disk.sync(file).map_err(Error::io("sync", path))?;
        }

        let frame = Arc::new(FramePlace {
            segment: Arc::clone(segment),
            offset: *offset,
            length: bytes.len(),
            counter: *counter,
        });
        *offset += bytes.len() as u64;
        *counter += 1;
        self.is_active_empty = false;
        self.note_written(&batch, &frame);
        self.meta = batch.meta;
        if batch.has_purge {
            self.delete_purged();
        }
        Ok(())
    }

    /// The committed log id rides along with what is written anyway.
    fn add_committed(&mut self, batch: &mut Batch) {
        let committed = self.index.lock().expect(super::UNPOISONED).committed;
        let is_worth_it = batch.is_last || !batch.content.bytes.is_empty();
        // It must not point behind the entries that are durable with it.
        if let Some(log_id) = committed
            && is_worth_it
            && batch.meta.committed < committed
            && batch.meta.last.is_some_and(|last| log_id.index <= last.index)
        {
            batch.content.committed(&log_id);
            batch.meta.committed = committed;
        }
    }

    fn note_written(&mut self, batch: &Batch, frame: &Arc<FramePlace>) {
        for after in &batch.truncated {
            StoredSegment::truncate(self.stored.make_contiguous(), *after);
            let after = after.map(|log_id| log_id.index);
            self.active_last_index = self.active_last_index.min(after);
        }
        let mut index = self.index.lock().expect(super::UNPOISONED);
        for (log_id, at, length) in &batch.entries {
            let place = EntryPlace { frame: Arc::clone(frame), at: *at, length: *length };
            index.set_place(*log_id, place);
            self.active_last_index = self.active_last_index.max(Some(log_id.index));
        }
        index.evict();
    }

    /// Starts the next segment.
    fn roll(&mut self, frame_length: u64) -> Result<(), Error> {
        let Segment { number, path, file, .. } = &*self.active.segment;
        let previous_length = self.active.offset;
        let checkpoint =
            Checkpoint { raft_id: self.raft_id, previous_length, meta: self.meta.clone() };
        let capacity = self.next_capacity.min(self.capacity_max).max(frame_length + (4 << 10));
        let next = segment::create(
            &self.dir,
            number + 1,
            &self.data_key,
            &*self.disk,
            capacity,
            &checkpoint,
        )?;
        // The successor remembers the length: giving back the reserved rest need not be durable.
        self.disk.trim(file, previous_length).map_err(Error::io("trim", path))?;
        let full = std::mem::replace(&mut self.active, next);
        let last_index = self.active_last_index.take();
        self.stored.push_back(StoredSegment { segment: full.segment, last_index });
        self.is_active_empty = true;
        self.next_capacity = self.next_capacity.saturating_mul(2).min(self.capacity_max);
        self.delete_purged();
        Ok(())
    }

    /// Deletes the segments whose entries are all purged, oldest first and durably one by one, so
    /// that a crash never leaves a gap.
    fn delete_purged(&mut self) {
        let Some(purged) = self.meta.purged else { return };
        while let Some(oldest) = self.stored.front() {
            if oldest.last_index.is_some_and(|last| last > purged.index) {
                return;
            }
            let path = &oldest.segment.path;
            let removed = match self.disk.remove(path) {
                // It was, and only its directory could not be synced.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed.map_err(Error::io("remove", path)),
            };
            let synced = || self.disk.sync_dir(&self.dir).map_err(Error::io("sync", &self.dir));
            if let Err(error) = removed.and_then(|()| synced()) {
                let text = Chain(&error).to_string();
                tracing::warn!(error = text, "failed to delete a Raft log segment, will try again");
                return;
            }
            self.stored.pop_front();
        }
    }
}

impl Batch {
    fn add(&mut self, job: Job) {
        match job {
            Job::Append { entries, done } => {
                for entry in entries {
                    let (at, length) = self.content.entry(&entry);
                    self.entries.push((entry.log_id, at, length));
                    self.meta.last = Some(entry.log_id);
                }
                self.done.push(Done::Flushed(done));
            }
            Job::Vote { vote, done } => {
                self.content.vote(&vote);
                self.meta.vote = Some(vote);
                self.done.push(Done::Sender(done));
            }
            Job::Truncate { after, done } => {
                self.content.truncate(after.as_ref());
                self.meta.truncate(after);
                let keep_to = after.map(|log_id| log_id.index);
                self.entries.retain(|(log_id, ..)| Some(log_id.index) <= keep_to);
                self.truncated.push(after);
                self.done.push(Done::Sender(done));
            }
            Job::Purge { upto } => {
                self.content.purge(&upto);
                self.meta.purge(upto);
                self.has_purge = true;
            }
            Job::Close { done } => {
                self.done.push(Done::Sender(done));
                self.is_last = true;
            }
        }
    }
}
