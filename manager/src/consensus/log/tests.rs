//! Tests of the log on a real disk.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use bytes::Bytes;
use openraft::storage::RaftLogStorageExt as _;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{EntryPayload, StorageError};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::*;
use crate::consensus::disk::RealDisk;
use crate::consensus::feed::Hub;
use crate::consensus::frame::{HEADER_LENGTH, parse_frame};
use crate::consensus::machine::{Machine, Obstacle};
use crate::consensus::snapshot::SnapshotStore;
use crate::consensus::types::{Payload, log_id};

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn key() -> DataKey {
    DataKey::new(1, [9; 32])
}

fn options(dir: &Path) -> LogOptions {
    LogOptions::new(7, dir.to_owned(), key(), Arc::new(RealDisk))
}

fn open(options: &LogOptions) -> Result<LogStore, Error> {
    disk::create_private_dir(&options.dir)?;
    LogStore::open(options, Arc::new(DirLock::take(&options.dir)?))
}

use crate::consensus::disk;
use crate::consensus::lost_tail::LostTail;

/// Drops a log as a crash does, but waits for its thread.
fn crash(log: LogStore) {
    let thread = log.take_thread().unwrap();
    drop(log);
    thread.join().unwrap();
}

fn entry(term: u64, index: u64, size: usize) -> Entry {
    let body = vec![u8::try_from(index % 251).unwrap(); size];
    Entry { log_id: log_id(term, index), payload: EntryPayload::Normal(Payload(body.into())) }
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        fs::read_dir(dir.join("log")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Offsets of all frames of a segment, and where the last one ends.
fn frames(path: &Path) -> (Vec<usize>, usize) {
    let bytes = fs::read(path).unwrap();
    let (mut offsets, mut at) = (Vec::new(), HEADER_LENGTH);
    while let Ok(frame) = parse_frame(&bytes[at..]) {
        offsets.push(at);
        at += frame.length;
    }
    (offsets, at)
}

async fn all(log: &LogStore) -> Vec<Entry> {
    log.reader.clone().try_get_log_entries(..).await.unwrap()
}

/// A log of five entries, each in a frame of its own, and not open any more.
fn five_entries(runtime: &Runtime, dir: &Path) {
    runtime.block_on(async {
        let mut log = open(&options(dir)).unwrap();
        for index in 1..=5 {
            log.blocking_append([entry(1, index, 100)]).await.unwrap();
        }
        crash(log);
    });
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let log = open(&options(dir.path())).unwrap();
        let snapshots = SnapshotStore::open(dir.path().to_owned(), key()).unwrap();
        let machine = Machine::new(Arc::new(Hub::new()), snapshots, Obstacle::default());
        Ok((dir, log, machine))
    }
}

#[test]
fn openrafts_own_suite_passes() {
    runtime().block_on(Suite::test_all(Builder)).unwrap();
}

/// Collects what is logged at WARN or above on this thread.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<String>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Visitor<'a>(&'a mut String);
        impl tracing::field::Visit for Visitor<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
                self.0.push_str(&format!("{field}={value:?} "));
            }
        }
        event.record(&mut Visitor(&mut self.0.lock().unwrap()));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_torn_tail_is_cut_with_a_warning_wherever_it_was_torn() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    five_entries(&runtime, dir.path());
    let path = segments(dir.path()).pop().unwrap();
    let (offsets, end) = frames(&path);
    let (last, good) = (*offsets.last().unwrap(), fs::read(&path).unwrap());
    for torn in [last + 1, last + 8, last + 30, end - 1] {
        for is_preallocated in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let log_dir = dir.path().join("log");
            disk::create_private_dir(&log_dir).unwrap();
            let mut bytes = good[..torn].to_vec();
            bytes.resize(if is_preallocated { good.len() } else { torn }, 0);
            let path = log_dir.join(path.file_name().unwrap());
            fs::write(&path, bytes).unwrap();

            let warnings = Warnings::default();
            let opened =
                tracing::subscriber::with_default(warnings.clone(), || open(&options(dir.path())));
            let text = warnings.0.lock().unwrap().clone();
            assert!(text.contains(&format!("file={} offset={last} ", path.display())), "{text}");
            let mut log = opened.unwrap();
            // No crash makes a file shorter than the space that was reserved for it.
            assert_eq!(LostTail::read(dir.path()).is_set(), !is_preallocated);
            runtime.block_on(async {
                assert_eq!(all(&log).await, (1..=4).map(|i| entry(1, i, 100)).collect::<Vec<_>>());
                log.blocking_append([entry(2, 5, 10)]).await.unwrap();
                crash(log);
                let log = open(&options(dir.path())).unwrap();
                assert_eq!(log.last(), Some(log_id(2, 5)));
                assert_eq!(all(&log).await.len(), 5);
                crash(log);
            });
        }
    }
}

#[track_caller]
fn refused(dir: &Path, options: &LogOptions, expect: &[&str]) {
    let error = open(options).expect_err("it is damaged");
    let text = error.to_string();
    let log_dir = dir.join("log");
    assert!(text.contains(log_dir.to_str().unwrap()), "names the file: {text}");
    for expect in expect {
        assert!(text.contains(expect), "{text:?} does not contain {expect:?}");
    }
}

#[test]
fn damage_is_refused_with_file_offset_and_remedy() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    five_entries(&runtime, dir.path());
    let path = segments(dir.path()).pop().unwrap();
    let good = fs::read(&path).unwrap();
    let (offsets, _) = frames(&path);
    let remedy = "restore this manager's data directory from a backup, or remove this manager";

    // Any byte of a frame that others follow: its length, checksum, key id, content or tag.
    for at in [0, 2, 4, 9, 20, 25, 60] {
        let mut bytes = good.clone();
        bytes[offsets[2] + at] ^= 0x10;
        fs::write(&path, bytes).unwrap();
        let place = format!("is damaged at offset {}: ", offsets[2]);
        refused(dir.path(), &options, &[&place, "a whole frame follows at offset", remedy]);
    }

    fs::write(&path, &good[..HEADER_LENGTH - 3]).unwrap();
    refused(dir.path(), &options, &["at offset 67: the header ends before 70 bytes", remedy]);
    let mut bytes = good.clone();
    bytes[0] ^= 1;
    fs::write(&path, &bytes).unwrap();
    refused(dir.path(), &options, &["at offset 0: the header does not begin as that of"]);
    let mut bytes = good.clone();
    bytes[30] ^= 1;
    fs::write(&path, &bytes).unwrap();
    refused(dir.path(), &options, &["offset 0", "the header does not authenticate", "own TLS key"]);
    let mut bytes = good.clone();
    bytes[8] = 9;
    fs::write(&path, &bytes).unwrap();
    refused(dir.path(), &options, &["format version 9 at offset 0, this program knows 1", "newer"]);

    // A frame that was moved or repeated has a good checksum, and is no torn write.
    let mut bytes = good[..offsets[4]].to_vec();
    bytes.extend_from_slice(&good[offsets[1]..offsets[2]]);
    fs::write(&path, &bytes).unwrap();
    refused(dir.path(), &options, &["frame 2 stands where frame 5 belongs"]);

    fs::write(&path, &good).unwrap();
    let foreign = |key| LogOptions { key, ..options.clone() };
    let other_id = foreign(DataKey::new(2, [9; 32]));
    refused(dir.path(), &other_id, &["offset 0", "its key id is 1, this node's is 2"]);
    let other_secret = foreign(DataKey::new(1, [8; 32]));
    refused(dir.path(), &other_secret, &["the header does not authenticate"]);
    let other_manager = LogOptions { raft_id: 8, ..options.clone() };
    refused(dir.path(), &other_manager, &["it is the log of manager 7, not of 8"]);
    crash(open(&options).unwrap());
}

#[test]
fn a_missing_or_shortened_segment_is_refused() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let small =
        LogOptions { segment_bytes_first: 4096, segment_bytes_max: 4096, ..options(dir.path()) };
    runtime.block_on(async {
        let mut log = open(&small).unwrap();
        for index in 1..=20 {
            log.blocking_append([entry(1, index, 1000)]).await.unwrap();
        }
        crash(log);
    });
    let paths = segments(dir.path());
    assert!(paths.len() > 4, "{paths:?}");

    let good = fs::read(&paths[1]).unwrap();
    let (offsets, _) = frames(&paths[1]);
    let last = *offsets.last().unwrap();
    fs::write(&paths[1], &good[..last]).unwrap();
    refused(dir.path(), &small, &[&format!("damaged at offset {last}"), "bytes where"]);
    fs::remove_file(&paths[1]).unwrap();
    refused(dir.path(), &small, &["00000002.segment", "this segment is missing"]);
    fs::write(&paths[1], &good).unwrap();
    let first = fs::read(&paths[0]).unwrap();
    fs::remove_file(&paths[0]).unwrap();
    refused(dir.path(), &small, &["of the entries behind 0 up to 20 only", "segments are missing"]);
    fs::write(&paths[0], first).unwrap();
    fs::write(dir.path().join("log/00000000000000000099.new"), b"half made").unwrap();
    let log = open(&small).unwrap();
    runtime.block_on(async { assert_eq!(all(&log).await.len(), 20) });
    crash(log);
}

#[test]
fn files_are_private_and_a_directory_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(&dir.path().join("raft"));
    let log = open(&options).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&options.dir), 0o700);
    assert_eq!(mode(&options.dir.join("log")), 0o700);
    for path in segments(&options.dir) {
        assert_eq!(mode(&path), 0o600);
    }
    let text = open(&options).unwrap_err().to_string();
    assert!(text.contains("is in use by another process"), "{text}");
    crash(log);
    crash(open(&options).unwrap());
}

#[test]
fn restarts_do_not_pile_up_files_and_reserve_a_small_first_segment() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..5 {
        crash(open(&options(dir.path())).unwrap());
    }
    let paths = segments(dir.path());
    assert_eq!(paths.len(), 1);
    assert_eq!(fs::metadata(&paths[0]).unwrap().len(), SEGMENT_BYTES_FIRST);
}

#[test]
fn the_cache_is_bounded_and_evicted_entries_are_read_back() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let bounded = LogOptions { cached_bytes_max: 16 << 10, ..options(dir.path()) };
    runtime.block_on(async {
        let mut log = open(&bounded).unwrap();
        for index in 1..=200 {
            log.blocking_append([entry(1, index, 1000)]).await.unwrap();
            assert!(log.index().cached_bytes() <= 16 << 10);
        }
        assert!(log.index().cached_bytes() > 8 << 10, "what is recent is at hand");
        let expect: Vec<_> = (1..=200).map(|index| entry(1, index, 1000)).collect();
        assert_eq!(all(&log).await, expect);
        let mut reader = log.get_log_reader().await;
        assert_eq!(reader.try_get_log_entries(10..=12).await.unwrap(), expect[9..12]);
        crash(log);
    });
}

#[test]
fn what_is_sent_at_once_is_bounded_but_never_nothing() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let mut log = open(&options(dir.path())).unwrap();
        let large = READ_BYTES_MAX / 2 + 1;
        let sizes = [large, large, 10, READ_BYTES_MAX + 1, 10];
        for (index, size) in (1..).zip(sizes) {
            log.blocking_append([entry(1, index, size)]).await.unwrap();
        }
        let mut reader = log.get_log_reader().await;
        for (start, expect) in [(1, 1), (2, 2), (3, 1), (4, 1), (5, 1), (6, 0)] {
            let found = reader.limited_get_log_entries(start, 10).await.unwrap();
            assert_eq!(found.len(), expect, "from {start}");
        }
        crash(log);
    });
}

/// A disk whose syncs wait for a word, and may be told to fail.
struct GatedDisk {
    entered: Mutex<mpsc::Sender<()>>,
    go: Mutex<mpsc::Receiver<()>>,
    is_gated: AtomicBool,
    is_broken: AtomicBool,
    n_syncs: AtomicUsize,
}

impl fmt::Debug for GatedDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GatedDisk")
    }
}

impl Disk for GatedDisk {
    fn write(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        RealDisk.write(file, offset, bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.n_syncs.fetch_add(1, Ordering::SeqCst);
        if self.is_gated.load(Ordering::SeqCst) {
            self.entered.lock().unwrap().send(()).unwrap();
            self.go.lock().unwrap().recv().unwrap();
        }
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk is gone"));
        }
        RealDisk.sync(file)
    }
}

struct Gate {
    disk: Arc<GatedDisk>,
    entered: mpsc::Receiver<()>,
    go: mpsc::Sender<()>,
}

fn gate() -> Gate {
    let ((entered_sender, entered), (go, go_receiver)) = (mpsc::channel(), mpsc::channel());
    let disk = GatedDisk {
        entered: Mutex::new(entered_sender),
        go: Mutex::new(go_receiver),
        is_gated: AtomicBool::new(false),
        is_broken: AtomicBool::new(false),
        n_syncs: AtomicUsize::new(0),
    };
    Gate { disk: Arc::new(disk), entered, go }
}

/// A process that was killed between a write and its sync leaves a frame that only the kernel has.
#[test]
fn a_frame_that_was_never_synced_is_made_durable_before_anything_counts_on_it() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let n_syncs_of_opening = |expected: usize| {
        let Gate { disk, .. } = gate();
        let gated = LogOptions { disk: disk.clone(), ..options(dir.path()) };
        let log = open(&gated).unwrap();
        assert_eq!(disk.n_syncs.load(Ordering::SeqCst), expected);
        (log, disk)
    };
    runtime.block_on(async {
        let (mut log, disk) = n_syncs_of_opening(0);
        log.blocking_append([entry(1, 1, 100)]).await.unwrap();
        disk.is_broken.store(true, Ordering::SeqCst);
        log.blocking_append([entry(1, 2, 100)]).await.unwrap_err();
        crash(log);

        let (log, _) = n_syncs_of_opening(1);
        assert_eq!(
            all(&log).await.len(),
            2,
            "it may be kept: nobody was told that it is not there"
        );
        crash(log);
        let (log, _) = n_syncs_of_opening(0);
        assert_eq!(all(&log).await.len(), 2);
        crash(log);
    });
}

type Flushed = oneshot::Receiver<io::Result<()>>;

/// Appends without waiting for the disk.
async fn append_later(log: &mut LogStore, entry: Entry) -> Flushed {
    use openraft::async_runtime::Oneshot as _;
    let (sender, receiver) = openraft::type_config::alias::OneshotOf::<TypeConfig>::channel();
    log.append([entry], IOFlushed::signal(sender)).await.unwrap();
    receiver
}

#[test]
fn nothing_is_acknowledged_before_the_sync_and_one_sync_covers_all_that_waited() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let Gate { disk, entered, go } = gate();
    let gated = LogOptions { disk: disk.clone(), ..options(dir.path()) };
    runtime.block_on(async {
        let mut log = open(&gated).unwrap();
        disk.is_gated.store(true, Ordering::SeqCst);
        let mut first = append_later(&mut log, entry(1, 1, 100)).await;
        entered.recv().unwrap();
        let mut waiting = Vec::new();
        for index in 2..=65 {
            waiting.push(append_later(&mut log, entry(1, index, 100)).await);
        }
        let mut voter = log.clone();
        let vote = tokio::task::spawn_blocking(move || {
            let mut log = voter.clone();
            let saved = runtime_of_this_thread().block_on(log.save_vote(&Vote::new(2, 1)));
            voter = log;
            drop(voter);
            saved
        });
        assert!(first.try_recv().is_err(), "the sync has not ended");
        assert_eq!(log.reader.clone().try_get_log_entries(1..=65).await.unwrap().len(), 65);
        assert_eq!(disk.n_syncs.load(Ordering::SeqCst), 1);

        go.send(()).unwrap();
        first.await.unwrap().unwrap();
        entered.recv().unwrap();
        for waiting in &mut waiting {
            assert!(waiting.try_recv().is_err(), "written, but not durable");
        }
        assert_eq!(log.reader.clone().read_vote().await.unwrap(), None);
        disk.is_gated.store(false, Ordering::SeqCst);
        go.send(()).unwrap();
        for waiting in waiting {
            waiting.await.unwrap().unwrap();
        }
        vote.await.unwrap().unwrap();
        assert_eq!(log.reader.clone().read_vote().await.unwrap(), Some(Vote::new(2, 1)));
        let n_syncs = disk.n_syncs.load(Ordering::SeqCst);
        assert!(n_syncs <= 3, "65 appends and a vote took {n_syncs} syncs");
        crash(log);
    });
}

fn runtime_of_this_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

#[test]
fn after_a_failed_sync_nothing_is_acknowledged_any_more() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let Gate { disk, .. } = gate();
    let breaking = LogOptions { disk: disk.clone(), ..options(dir.path()) };
    runtime.block_on(async {
        let mut log = open(&breaking).unwrap();
        log.blocking_append([entry(1, 1, 10)]).await.unwrap();
        disk.is_broken.store(true, Ordering::SeqCst);
        let text = log.blocking_append([entry(1, 2, 10)]).await.unwrap_err().to_string();
        assert!(text.contains("failed to sync") && text.contains("the disk is gone"), "{text}");
        disk.is_broken.store(false, Ordering::SeqCst);
        log.save_vote(&Vote::new(5, 1)).await.expect_err("a failed sync is never retried");
        assert_eq!(log.reader.clone().read_vote().await.unwrap(), None);
        crash(log);
        let log = open(&breaking).unwrap();
        assert!(!all(&log).await.is_empty(), "what was acknowledged is there");
        crash(log);
    });
}

#[test]
fn purging_deletes_whole_segments_and_keeps_vote_and_committed() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let small =
        LogOptions { segment_bytes_first: 4096, segment_bytes_max: 4096, ..options(dir.path()) };
    runtime.block_on(async {
        let mut log = open(&small).unwrap();
        log.save_vote(&Vote::new_committed(1, 7)).await.unwrap();
        for index in 1..=40 {
            log.blocking_append([entry(1, index, 1000)]).await.unwrap();
        }
        log.save_committed(Some(log_id(1, 39))).await.unwrap();
        let before = segments(dir.path()).len();
        log.purge(log_id(1, 35)).await.unwrap();
        log.blocking_append([entry(1, 41, 10)]).await.unwrap();
        let after = segments(dir.path()).len();
        assert!(before > 10 && after < 5, "{before} {after}");
        crash(log);

        let mut log = open(&small).unwrap();
        assert_eq!(all(&log).await.first().unwrap().log_id, log_id(1, 36));
        assert_eq!(log.read_committed().await.unwrap(), Some(log_id(1, 39)));
        assert_eq!(log.reader.clone().read_vote().await.unwrap(), Some(Vote::new_committed(1, 7)));
        // A snapshot from the leader may be ahead of the whole log.
        log.purge(log_id(3, 100)).await.unwrap();
        log.blocking_append([entry(3, 101, 10)]).await.unwrap();
        crash(log);
        let mut log = open(&small).unwrap();
        let state = log.get_log_state().await.unwrap();
        assert_eq!(state.last_purged_log_id, Some(log_id(3, 100)));
        assert_eq!(all(&log).await, [entry(3, 101, 10)]);
        crash(log);
    });
}

/// A step of the property test.
#[derive(Debug, Clone)]
enum Step {
    Append { n: u64, size: usize },
    Truncate { back: u64 },
    Purge { forward: u64 },
    Vote,
    Committed,
    Close,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1..8_u64, 0..1500_usize).prop_map(|(n, size)| Step::Append { n, size }),
        2 => (0..6_u64).prop_map(|back| Step::Truncate { back }),
        2 => (0..9_u64).prop_map(|forward| Step::Purge { forward }),
        1 => Just(Step::Vote),
        1 => Just(Step::Committed),
        1 => Just(Step::Close),
        2 => Just(Step::Crash),
    ];
    proptest::collection::vec(step, 1..60)
}

/// What the log must hold.
#[derive(Debug, Default)]
struct Model {
    entries: BTreeMap<u64, Entry>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    term: u64,
}

impl Model {
    fn last(&self) -> Option<LogId> {
        self.entries.values().next_back().map(|entry| entry.log_id).or(self.purged)
    }
}

async fn run_steps(options: &LogOptions, steps: Vec<Step>) {
    let mut log = open(options).unwrap();
    let mut model = Model { term: 1, ..Model::default() };
    for step in steps {
        match step {
            Step::Append { n, size } => {
                let next = model.last().map_or(0, |last| last.index + 1);
                let entries: Vec<_> =
                    (next..next + n).map(|i| entry(model.term, i, size)).collect();
                log.blocking_append(entries.clone()).await.unwrap();
                model.entries.extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
            }
            Step::Truncate { back } => {
                let committed = model.committed.max(model.purged).map_or(0, |c| c.index);
                let keep = model.last().map_or(0, |last| last.index.saturating_sub(back));
                let after = model.entries.get(&keep.max(committed)).map(|entry| entry.log_id);
                let Some(after) = after else { continue };
                log.truncate_after(Some(after)).await.unwrap();
                model.entries.split_off(&(after.index + 1));
                model.term += 1;
            }
            Step::Purge { forward } => {
                let upto = model.entries.values().nth(usize::try_from(forward).unwrap());
                let Some(upto) = upto.map(|entry| entry.log_id) else { continue };
                log.purge(upto).await.unwrap();
                model.entries = model.entries.split_off(&(upto.index + 1));
                model.purged = Some(upto);
                model.committed = model.committed.max(Some(upto));
                log.save_committed(model.committed).await.unwrap();
            }
            Step::Vote => {
                model.term += 1;
                model.vote = Some(Vote::new(model.term, 3));
                log.save_vote(&Vote::new(model.term, 3)).await.unwrap();
            }
            Step::Committed => {
                model.committed = model.last();
                log.save_committed(model.committed).await.unwrap();
            }
            Step::Close => {
                log.close().await.unwrap();
                crash(log);
                log = open(options).unwrap();
                assert_eq!(log.read_committed().await.unwrap(), model.committed);
            }
            Step::Crash => {
                crash(log);
                log = open(options).unwrap();
                let committed = log.read_committed().await.unwrap();
                assert!(committed <= model.committed, "committed is written lazily, never ahead");
                log.save_committed(model.committed).await.unwrap();
            }
        }
        assert_eq!(all(&log).await, model.entries.values().cloned().collect::<Vec<_>>());
        assert_eq!(log.last(), model.last());
        assert_eq!(log.index().purged, model.purged);
        assert_eq!(log.reader.clone().read_vote().await.unwrap(), model.vote);
    }
    crash(log);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_reopened_log_equals_the_model(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let options = LogOptions {
            cached_bytes_max: 4096,
            segment_bytes_first: 4096,
            segment_bytes_max: 16 << 10,
            ..options(dir.path())
        };
        runtime().block_on(run_steps(&options, steps));
    }

    #[test]
    fn a_log_cut_anywhere_keeps_every_whole_frame(sizes in proptest::collection::vec(0..300_usize, 1..12), cut in 0.0..1.0_f64) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = runtime();
        let options = options(dir.path());
        runtime.block_on(async {
            let mut log = open(&options).unwrap();
            for (index, size) in (1..).zip(&sizes) {
                log.blocking_append([entry(1, index, *size)]).await.unwrap();
            }
            crash(log);
        });
        let path = segments(dir.path()).pop().unwrap();
        let (offsets, end) = frames(&path);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a place in a small file")]
        let cut_at = offsets[1] + ((end - offsets[1]) as f64 * cut) as usize;
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..cut_at]).unwrap();
        let whole = offsets[1..].iter().chain([&end]).filter(|at| **at <= cut_at).count() - 1;
        runtime.block_on(async {
            let log = open(&options).unwrap();
            let expect: Vec<_> = (1..).zip(&sizes[..whole]).map(|(i, size)| entry(1, i, *size)).collect();
            assert_eq!(all(&log).await, expect);
            crash(log);
        });
    }
}

#[test]
fn nothing_readable_reaches_the_disk() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let mut log = open(&options(dir.path())).unwrap();
        let payload = EntryPayload::Normal(Payload(Bytes::from_static(b"top secret password")));
        log.blocking_append([Entry { log_id: log_id(1, 1), payload }]).await.unwrap();
        crash(log);
    });
    let bytes = fs::read(segments(dir.path()).pop().unwrap()).unwrap();
    assert!(!bytes.windows(6).any(|window| window == b"secret"));
}

/// A log of format version 1 as it was written once: it opens for ever. `UPDATE_GOLDEN=1` rewrites it,
/// which only a new format version justifies.
#[test]
fn a_segment_of_format_version_1_still_opens() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/consensus/log/golden/v1.segment");
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let members = openraft::Membership::new_with_defaults(vec![[7].into()], []);
    let membership = Entry { log_id: log_id(1, 3), payload: EntryPayload::Membership(members) };
    let blank = Entry { log_id: log_id(2, 4), payload: EntryPayload::Blank };
    let expect = [entry(1, 2, 5), membership, blank];
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        runtime.block_on(async {
            let mut log = open(&options(dir.path())).unwrap();
            log.blocking_append([entry(1, 1, 3), expect[0].clone(), entry(1, 3, 9)]).await.unwrap();
            log.save_vote(&Vote::new(1, 7)).await.unwrap();
            log.truncate_after(Some(log_id(1, 2))).await.unwrap();
            log.blocking_append(expect[1..].to_vec()).await.unwrap();
            log.save_committed(Some(log_id(1, 3))).await.unwrap();
            log.save_vote(&Vote::new_committed(2, 7)).await.unwrap();
            log.purge(log_id(1, 1)).await.unwrap();
            log.close().await.unwrap();
            crash(log);
        });
        let path = segments(dir.path()).pop().unwrap();
        fs::create_dir_all(golden.parent().unwrap()).unwrap();
        fs::write(&golden, &fs::read(&path).unwrap()[..frames(&path).1]).unwrap();
        fs::remove_file(path).unwrap();
    }
    disk::create_private_dir(&dir.path().join("log")).unwrap();
    fs::copy(&golden, dir.path().join("log/00000000000000000001.segment")).unwrap();
    runtime.block_on(async {
        let mut log = open(&options(dir.path())).unwrap();
        assert_eq!(all(&log).await, expect);
        assert_eq!(log.index().purged, Some(log_id(1, 1)));
        assert_eq!(log.read_committed().await.unwrap(), Some(log_id(1, 3)));
        assert_eq!(log.reader.clone().read_vote().await.unwrap(), Some(Vote::new_committed(2, 7)));
        crash(log);
    });
}
