//! A swarm of managers in one process.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use skep_common::object::Config;
use skep_common::spec::{Base64, ConfigSpec};
use skep_common::{ConfigId, Kind, Meta, Object, Timestamp};
use skep_manager_core::{Action, Command, Expect, State};
use tempfile::TempDir;

use crate::consensus::{
    CallError, Compaction, Consensus, DataKey, Options, RaftRequest, RaftTransport, Timing,
};

/// No test waits longer for anything: the machine may be busy.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// Waits for `future`, but not for ever.
#[track_caller]
pub(super) fn within<F: Future>(what: &'static str, future: F) -> impl Future<Output = F::Output> {
    tokio::time::timeout(LIMIT, future)
        .map(move |result| result.unwrap_or_else(|_| panic!("waited too long for {what}")))
}

#[derive(Debug, Default)]
struct NetState {
    managers: BTreeMap<u64, Consensus>,
    /// Where those are that have moved.
    moved: BTreeMap<u64, String>,
    cut_off: BTreeSet<u64>,
    n_calls: BTreeMap<&'static str, usize>,
}

/// The network between the managers.
#[derive(Debug, Clone, Default)]
pub(super) struct Net(Arc<Mutex<NetState>>);

impl Net {
    /// Cuts a manager off from all others: messages vanish.
    pub(super) fn cut_off(&self, raft_id: u64) {
        self.0.lock().unwrap().cut_off.insert(raft_id);
    }

    /// Gives a manager another address than `addr-ID`.
    pub(super) fn move_to(&self, raft_id: u64, addr: &str) {
        self.0.lock().unwrap().moved.insert(raft_id, addr.to_owned());
    }

    /// Gives a manager the address of another one.
    pub(super) fn stand_in(&self, raft_id: u64, manager: &Consensus) {
        self.0.lock().unwrap().managers.insert(raft_id, manager.clone());
    }

    pub(super) fn heal(&self) {
        self.0.lock().unwrap().cut_off.clear();
    }

    pub(super) fn n_calls(&self, kind: &'static str) -> usize {
        self.0.lock().unwrap().n_calls.get(kind).copied().unwrap_or(0)
    }

    fn is_cut(&self, from: u64, to: u64) -> bool {
        let state = self.0.lock().unwrap();
        state.cut_off.contains(&from) || state.cut_off.contains(&to)
    }
}

#[derive(Clone)]
struct Transport {
    from: u64,
    net: Net,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transport of {}", self.from)
    }
}

impl RaftTransport for Transport {
    fn call(
        &self,
        target: u64,
        addr: &str,
        request: RaftRequest,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        let (this, addr) = (self.clone(), addr.to_owned());
        let called = addr.clone();
        let error = move |may_have_arrived| CallError {
            target,
            addr: called.clone(),
            reason: "test".to_owned(),
            may_have_arrived,
            is_removed: false,
        };
        async move {
            if this.net.is_cut(this.from, target) {
                tokio::time::sleep(deadline).await; // The request vanished.
                return Err(error(true));
            }
            let manager = {
                let mut state = this.net.0.lock().unwrap();
                *state.n_calls.entry(kind_of(&request)).or_default() += 1;
                let real = state.moved.get(&target).cloned();
                if real.unwrap_or_else(|| format!("addr-{target}")) != addr {
                    return Err(error(false));
                }
                state.managers.get(&target).cloned().ok_or_else(|| error(false))?
            };
            let answer = manager.handle(request).await;
            if this.net.is_cut(this.from, target) {
                tokio::time::sleep(deadline).await; // The answer vanished.
                return Err(error(true));
            }
            Ok(answer)
        }
        .boxed()
    }
}

fn kind_of(request: &RaftRequest) -> &'static str {
    match request {
        RaftRequest::Append(_) => "append",
        RaftRequest::Vote(_) => "vote",
        RaftRequest::PreVote(_) => "pre-vote",
        RaftRequest::TransferLeader(_) => "transfer",
        RaftRequest::Snapshot(_) => "snapshot",
        RaftRequest::Propose(_) => "propose",
        RaftRequest::ReadIndex(_) => "read index",
    }
}

/// Managers and their directories.
pub(super) struct Swarm {
    pub(super) net: Net,
    dirs: BTreeMap<u64, TempDir>,
    managers: BTreeMap<u64, Consensus>,
    pub(super) compaction: Compaction,
}

impl Swarm {
    pub(super) fn empty() -> Self {
        let (dirs, managers) = (BTreeMap::new(), BTreeMap::new());
        Self { net: Net::default(), dirs, managers, compaction: Compaction::default() }
    }

    /// A swarm of managers 1 to `n`.
    pub(super) async fn of(n: u64) -> Self {
        let mut swarm = Self::empty();
        swarm.found(n).await;
        swarm
    }

    pub(super) async fn found(&mut self, n: u64) {
        self.start(1).await;
        self.get(1).bootstrap("addr-1").await.unwrap();
        for raft_id in 2..=n {
            self.start(raft_id).await;
            self.get(1).add_manager(raft_id, &format!("addr-{raft_id}")).await.unwrap();
        }
    }

    pub(super) fn options(&mut self, raft_id: u64) -> Options {
        let dir = self.dirs.entry(raft_id).or_insert_with(|| tempfile::tempdir().unwrap());
        let transport = Transport { from: raft_id, net: self.net.clone() };
        let key = DataKey::new(1, [u8::try_from(raft_id).unwrap(); 32]);
        let mut options = Options::new(raft_id, dir.path(), key, Arc::new(transport));
        options.timing = Timing { patience: LIMIT, catch_up: LIMIT, ..Timing::default() };
        options.compaction = self.compaction;
        options
    }

    /// Starts a manager, with the data it has.
    pub(super) async fn start(&mut self, raft_id: u64) {
        let options = self.options(raft_id);
        let manager = Consensus::start(options).await.unwrap();
        self.insert(manager);
    }

    pub(super) fn insert(&mut self, manager: Consensus) {
        let raft_id = manager.raft_id();
        self.net.0.lock().unwrap().managers.insert(raft_id, manager.clone());
        self.managers.insert(raft_id, manager);
    }

    pub(super) fn get(&self, raft_id: u64) -> &Consensus {
        &self.managers[&raft_id]
    }

    pub(super) fn ids(&self) -> Vec<u64> {
        self.managers.keys().copied().collect()
    }

    /// Ends a manager as a crash does.
    pub(super) async fn kill(&mut self, raft_id: u64) {
        self.net.0.lock().unwrap().managers.remove(&raft_id);
        self.managers.remove(&raft_id).unwrap().kill().await;
    }

    /// Waits until a manager leads that is not `other_than`; gives its id.
    pub(super) async fn leader(&self, other_than: Option<u64>) -> u64 {
        let waits =
            self.managers.values().filter(|m| Some(m.raft_id()) != other_than).map(|manager| {
                async move {
                    let mut leadership = manager.leadership();
                    let led = leadership.wait_for(|leadership| leadership.is_self).await;
                    led.expect("it runs");
                    manager.raft_id()
                }
                .boxed()
            });
        within("a leader", futures::future::select_all(waits)).await.0
    }

    /// Waits until all managers have applied what the first of them reads now; compares digests.
    pub(super) async fn converge(&self) -> State {
        let any = self.managers.values().next().unwrap();
        let state = within("a read", any.read_state()).await.unwrap();
        for manager in self.managers.values() {
            within("convergence", wait_version(manager, state.version().index)).await;
        }
        // Membership entries and blanks raise versions apart from digests: compare at one version.
        let mut digests = BTreeMap::new();
        for manager in self.managers.values() {
            let state = manager.state();
            digests.entry(state.version()).or_insert_with(BTreeSet::new).insert(state.digest());
        }
        for (version, digests) in digests {
            assert_eq!(digests.len(), 1, "digests differ at {version}");
        }
        state
    }

    pub(super) async fn stop(self) {
        for manager in self.managers.values() {
            within("shutdown", manager.shutdown()).await;
        }
    }
}

pub(super) async fn wait_version(manager: &Consensus, index: u64) {
    let mut published = manager.inner.watch_state();
    let applied = published.wait_for(|published| published.state.version().index >= index);
    applied.await.expect("it runs");
}

/// A command that creates a config of that number, with some bytes of content.
pub(super) fn put_config(number: u64, size: usize) -> Command {
    let mut spec = ConfigSpec { name: format!("config-{number}"), ..ConfigSpec::default() };
    spec.data = Some(Base64(vec![b'x'; size]));
    let id = ConfigId(u128::from(number) + 1);
    let config = Config { id, meta: Meta::default(), spec, versions: Default::default() };
    let put = Action::Put { object: Object::Config(Box::new(config)), expect: Expect::Absent };
    Command::new(Timestamp::from_secs(1), vec![put])
}

pub(super) fn has_config(state: &State, number: u64) -> bool {
    state.id_by_name(Kind::Config, &format!("config-{number}")).is_some()
}
