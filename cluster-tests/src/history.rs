//! Clients that use the control API of all managers at once, and write down what they asked and were told.
//!
//! Keys are services without tasks; a key's value is a label. A write names the version that the client was
//! told with the value before, which is what makes it an [`Update`](Call::Update) of that value. Each question
//! goes to a manager by chance, is asked once, and what comes of it is judged by [`linear`](crate::linear).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use skep_runtime::clock::monotonic;
use tonic::Code;

use crate::direct::{Direct, NoAnswer};
use crate::lab::Lab;
use crate::linear::{Answer, Call, Operation, Value, Violation, check};

/// The label that has a key's value.
const LABEL: &str = "value";
/// Keys that are in use at a time.
const N_KEYS: u64 = 4;
/// Of a hundred questions, so many are about a key of an earlier time: what was acknowledged stays so.
const N_OLD_OF_100: u32 = 5;
/// Before the next question, where a daemon is not there.
const PAUSE: Duration = Duration::from_millis(10);

/// Clients that ask until they are stopped.
#[derive(Debug)]
pub struct Clients {
    is_over: Arc<AtomicBool>,
    n_acknowledged: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<Vec<Record>>>,
}

impl Clients {
    /// Starts so many clients of the managers; other keys are used after each `keys_last`.
    pub fn start(lab: &Lab, managers: &[&str], n_clients: usize, keys_last: Duration) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let n_acknowledged = Arc::new(AtomicUsize::new(0));
        let started = monotonic();
        let start = |number| {
            let client = Client {
                number,
                rng: StdRng::seed_from_u64(number as u64),
                started,
                keys_last,
                n_acknowledged: Arc::clone(&n_acknowledged),
                managers: managers.iter().map(|node| lab.direct(node)).collect(),
                known: BTreeMap::new(),
                n_values: 0,
                records: Vec::new(),
            };
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || client.run(&is_over))
        };
        let threads = (0..n_clients).map(start).collect();
        Self { is_over, n_acknowledged, threads }
    }

    /// How many writes were acknowledged so far.
    pub fn n_acknowledged(&self) -> usize {
        self.n_acknowledged.load(Ordering::Relaxed)
    }

    /// Has every client end with the question that it has asked; gives what they were told.
    #[track_caller]
    pub fn stop(mut self) -> History {
        self.is_over.store(true, Ordering::Relaxed);
        let mut keys: BTreeMap<String, Vec<Record>> = BTreeMap::new();
        for thread in self.threads.drain(..) {
            let records = thread.join().expect("a client does not panic");
            records.into_iter().for_each(|r| keys.entry(r.key.clone()).or_default().push(r));
        }
        History { keys }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// One operation on one key.
#[derive(Debug)]
struct Record {
    key: String,
    operation: Operation,
    /// What was told of the key's version: that of the value which it has by this operation.
    version: Option<u64>,
    /// Why the outcome is unknown.
    code: Option<Code>,
}

/// What all clients were told.
#[derive(Debug)]
pub struct History {
    keys: BTreeMap<String, Vec<Record>>,
}

impl History {
    /// The services that were acknowledged.
    pub fn acknowledged(&self) -> BTreeSet<&str> {
        let is_created = |record: &Record| {
            matches!(
                record.operation,
                Operation { call: Call::Create(_), answer: Answer::Done, .. }
            )
        };
        let keys = self.keys.iter().filter(|(_, records)| records.iter().any(is_created));
        keys.map(|(key, _)| key.as_str()).collect()
    }

    /// Panics with the key and the operations, where one manager alone would not have answered so.
    #[track_caller]
    pub fn assert_linearizable(&self) {
        for (key, records) in &self.keys {
            if let Err(reason) = check_versions(records) {
                panic!("{key}: {reason}");
            }
            let operations: Vec<Operation> = records.iter().map(|r| r.operation).collect();
            let result: Result<(), Violation> = check(&operations);
            if let Err(violation) = result {
                panic!("{key}: {violation}");
            }
        }
    }

    /// What it consists of, in words.
    pub fn summary(&self) -> String {
        let records = || self.keys.values().flatten();
        let count = |is: fn(&Operation) -> bool| records().filter(|r| is(&r.operation)).count();
        let is_write = |o: &Operation| o.call != Call::Read && o.answer == Answer::Done;
        let mut unknown: BTreeMap<String, usize> = BTreeMap::new();
        for code in records().filter_map(|record| record.code) {
            *unknown.entry(format!("{code:?}")).or_default() += 1;
        }
        format!(
            "{} operations on {} keys: {} acknowledged writes, {} refused ones, {} reads, unknown outcomes {unknown:?}",
            records().count(),
            self.keys.len(),
            count(is_write),
            count(|o| o.answer == Answer::Refused),
            count(|o| o.call == Call::Read && o.answer != Answer::Unknown),
        )
    }

    /// How many writes were acknowledged.
    pub fn n_acknowledged(&self) -> usize {
        let is_write = |o: &Operation| o.call != Call::Read && o.answer == Answer::Done;
        self.keys.values().flatten().filter(|record| is_write(&record.operation)).count()
    }
}

/// A version has one value, and a value has one version.
fn check_versions(records: &[Record]) -> Result<(), String> {
    let mut values: BTreeMap<u64, Value> = BTreeMap::new();
    let mut versions: BTreeMap<Value, u64> = BTreeMap::new();
    for record in records {
        let value = match (record.operation.call, record.operation.answer) {
            (Call::Create(value), Answer::Done) => value,
            (Call::Update { new, .. }, Answer::Done) => new,
            (Call::Read, Answer::Found(value)) => value,
            _ => continue,
        };
        let Some(version) = record.version else { continue };
        let (one, other) =
            (*values.entry(version).or_insert(value), *versions.entry(value).or_insert(version));
        if (one, other) != (value, version) {
            return Err(format!(
                "version {version} has the values {one} and {value}, or value {value} the versions {other} and \
                 {version}: {record:?}"
            ));
        }
    }
    Ok(())
}

/// What a client was told of a key last.
#[derive(Debug, Clone)]
struct Known {
    id: String,
    version: u64,
    value: Value,
}

struct Client {
    number: usize,
    rng: StdRng,
    started: Instant,
    keys_last: Duration,
    n_acknowledged: Arc<AtomicUsize>,
    managers: Vec<Direct>,
    known: BTreeMap<String, Known>,
    n_values: u64,
    records: Vec<Record>,
}

impl Client {
    fn run(mut self, is_over: &AtomicBool) -> Vec<Record> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a thread can have a runtime").block_on(async {
            while !is_over.load(Ordering::Relaxed) {
                let key = self.choose_key();
                if !self.ask(&key).await {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        });
        self.records
    }

    fn choose_key(&mut self) -> String {
        let now = self.started.elapsed().as_millis() / self.keys_last.as_millis();
        let newest = u64::try_from(now).expect("tests end") * N_KEYS;
        let first = if self.rng.random_range(0..100) < N_OLD_OF_100 {
            self.rng.random_range(0..=newest)
        } else {
            newest
        };
        format!("key-{}", first + self.rng.random_range(0..N_KEYS))
    }

    /// Does something with a key by way of some manager; tells whether that was there.
    async fn ask(&mut self, key: &str) -> bool {
        let manager = self.rng.random_range(0..self.managers.len());
        let of_100 = self.rng.random_range(0..100);
        self.n_values += 1;
        let value = (self.number as u64) << 32 | self.n_values;
        match (self.known.get(key).cloned(), of_100) {
            (None, ..50) => self.create(manager, key, value).await,
            (Some(known), 50..) => {
                let new = if of_100 < 55 { known.value } else { value };
                self.update(manager, key, known, new).await
            }
            _ => self.read(manager, key).await,
        }
    }

    async fn create(&mut self, manager: usize, key: &str, value: Value) -> bool {
        let called_at = self.now();
        let answer = self.managers[manager].create(spec(key, value)).await;
        let version = answer.as_ref().ok().map(|(_, version)| *version);
        if let Ok((id, version)) = &answer {
            self.known.insert(key.into(), Known { id: id.clone(), version: *version, value });
        }
        let refusals = [(Code::AlreadyExists, Answer::Refused)];
        self.note(
            key,
            called_at,
            Call::Create(value),
            answer.map(|_| Answer::Done),
            &refusals,
            version,
        )
    }

    async fn update(&mut self, manager: usize, key: &str, known: Known, new: Value) -> bool {
        let called_at = self.now();
        let Known { id, version, value: old } = known;
        let answer = self.managers[manager].update(&id, version, spec(key, new)).await;
        let written = answer.as_ref().ok().copied();
        match written {
            Some(version) => {
                self.known.insert(key.into(), Known { id, version, value: new });
            }
            // Refused, or perhaps written: the next question reads.
            None => drop(self.known.remove(key)),
        }
        let refusals = [(Code::Aborted, Answer::Refused), (Code::NotFound, Answer::Missing)];
        let call = Call::Update { old, new };
        self.note(key, called_at, call, answer.map(|_| Answer::Done), &refusals, written)
    }

    async fn read(&mut self, manager: usize, key: &str) -> bool {
        let called_at = self.now();
        let answer = self.managers[manager].service(key).await;
        let mut version = None;
        let answer = answer.map(|service| {
            let label = service.spec.labels.as_ref().and_then(|labels| labels.get(LABEL));
            let value = label.and_then(|label| label.parse().ok()).expect("keys have values");
            version = Some(service.meta.version.index);
            let (id, version) = (service.id.to_string(), service.meta.version.index);
            self.known.insert(key.into(), Known { id, version, value });
            Answer::Found(value)
        });
        let refusals = [(Code::NotFound, Answer::Missing)];
        self.note(key, called_at, Call::Read, answer, &refusals, version)
    }

    /// Writes down what came of a question; tells whether there was a daemon to ask.
    fn note(
        &mut self,
        key: &str,
        called_at: u64,
        call: Call,
        answer: Result<Answer, NoAnswer>,
        refusals: &[(Code, Answer)],
        version: Option<u64>,
    ) -> bool {
        let answered_at = self.now();
        let (answer, code) = match answer {
            Ok(answer) => (answer, None),
            Err(NoAnswer::NotConnected) => return false,
            Err(NoAnswer::Status(status)) => {
                match refusals.iter().find(|(code, _)| *code == status.code()) {
                    Some((_, refusal)) => (*refusal, None),
                    None => (Answer::Unknown, Some(status.code())),
                }
            }
        };
        if answer == Answer::Done {
            self.n_acknowledged.fetch_add(1, Ordering::Relaxed);
        }
        let operation = Operation { client: self.number, called_at, answered_at, call, answer };
        self.records.push(Record { key: key.to_owned(), operation, version, code });
        code.is_none()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).expect("tests end")
    }
}

/// The spec of a service without tasks.
fn spec(name: &str, value: Value) -> String {
    let spec = json!({
        "Name": name,
        "Labels": {LABEL: value.to_string()},
        "TaskTemplate": {"ContainerSpec": {"Image": "none"}},
        "Mode": {"Replicated": {"Replicas": 0}},
    });
    spec.to_string()
}
