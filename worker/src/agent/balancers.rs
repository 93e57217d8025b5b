//! The effect side of the mesh table: one task applies the newest table, whatever came in between.
//!
//! Published ports and networks are one table with one version: what is acknowledged is in force in
//! both.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use skep_proto::PortCondition;
use skep_runtime::TaskSet;
use skep_runtime::telemetry::Chain;
use skep_worker_core::mesh::MeshTable;
use skep_worker_core::network::NetworkTables;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// How often a table in force is applied again: other programs flush chains.
const REPAIR_PERIOD: Duration = Duration::from_secs(10);

/// How often ports that other programs hold are tried again: the kernel tells nobody that a port is
/// free.
const CONDITION_PERIOD: Duration = Duration::from_secs(1);

/// How long between two looks at what was under way to withdrawn tasks: many times what an answer takes
/// within a swarm. It takes two, together less than the second after which a client sends its request again.
const SETTLE_PERIOD: Duration = Duration::from_millis(200);

/// The same after a look that failed.
const SETTLE_RETRY: Duration = Duration::from_secs(1);

/// What programs the kernel's balancers. [`crate::embedded`] has the one for real nodes.
#[tonic::async_trait]
pub trait Balancers: Send + fmt::Debug + 'static {
    /// Returns when the kernel's rules are those of the table, and its networks those of `networks`,
    /// with what stands in the way of single ports.
    async fn apply(
        &mut self,
        table: &MeshTable,
        networks: &Arc<NetworkTables>,
    ) -> Result<Vec<PortCondition>, Box<dyn std::error::Error + Send + Sync>>;

    /// Has the kernel forget requests that withdrawn tasks did not answer. Called [`SETTLE_PERIOD`] after a table came
    /// into force unless a call is due anyway, and again as long as it returns true or fails.
    async fn settle(&mut self) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        Ok(false)
    }

    /// Whether what stood in the way of a port has changed since. Asked each second as long as something
    /// does, so it must look at nothing else.
    async fn has_other_conditions(&mut self) -> bool {
        false
    }
}

/// A table version that is in force.
#[derive(Debug)]
pub(super) struct Applied {
    /// The session that it was for: what one leader told is nothing to another.
    pub(super) session: u64,
    pub(super) version: u64,
    pub(super) conditions: Vec<PortCondition>,
}

/// Hands tables to the applying task.
#[derive(Debug)]
pub(super) struct BalancerHandle {
    newest: watch::Sender<Newest>,
    in_force: watch::Receiver<u64>,
    /// Where nothing balances, tables are acknowledged, and not made: a thousand agents of one benchmark would make a
    /// million of them.
    has_balancers: bool,
}

/// What is to be applied, and the session that it is for.
#[derive(Debug, Clone, Default)]
struct Newest {
    /// Counts what was handed over since the start.
    number: u64,
    session: u64,
    /// Absent before the first welcome.
    version: Option<u64>,
    tables: Option<Arc<Tables>>,
}

/// What is programmed together.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) mesh: MeshTable,
    pub(super) networks: Arc<NetworkTables>,
}

impl BalancerHandle {
    pub(super) fn start(
        balancers: Option<Box<dyn Balancers>>,
        applied: mpsc::Sender<Applied>,
        tasks: &TaskSet,
    ) -> Self {
        let (newest, tables) = watch::channel(Newest::default());
        let (number, in_force) = watch::channel(0);
        let has_balancers = balancers.is_some();
        // Not cut off in the middle: a mesh that is just being started must be known to whoever
        // removes it after the node's stop. It ends with the handle.
        tasks.spawn_to_end("balancers", run(balancers, tables, number, applied));
        Self { newest, in_force, has_balancers }
    }

    /// Hands the tables of a version over; returns their number, for [`Self::in_force`].
    pub(super) fn apply(
        &self,
        session: u64,
        version: Option<u64>,
        tables: impl FnOnce() -> Option<Tables>,
    ) -> u64 {
        let tables = self.has_balancers.then(tables).flatten().map(Arc::new);
        let mut number = 0;
        self.newest.send_modify(|newest| {
            number = newest.number + 1;
            *newest = Newest { number, session, version, tables };
        });
        number
    }

    /// The number of the table that is in force, or of a later one.
    pub(super) fn in_force(&self) -> watch::Receiver<u64> {
        self.in_force.clone()
    }
}

/// Looks at what was under way to withdrawn tasks.
#[derive(Debug, Default)]
struct Settling {
    /// When the next look is due; `None` while none is needed.
    at: Option<Instant>,
    /// How the last one failed.
    failure: Option<String>,
}

impl Settling {
    async fn look(&mut self, balancers: &mut Option<Box<dyn Balancers>>) {
        let settled = match balancers {
            Some(balancers) => balancers.settle().await,
            None => Ok(false),
        };
        let (pause, failure) = match settled {
            Ok(is_unsettled) => (is_unsettled.then_some(SETTLE_PERIOD), None),
            Err(error) => (Some(SETTLE_RETRY), Some(Chain(error.as_ref()).to_string())),
        };
        if failure.is_some() && failure != self.failure {
            let error = failure.as_deref();
            tracing::warn!(
                error,
                "clients whose requests were lost may wait longer than they must"
            );
        }
        (self.at, self.failure) = (pause.map(|pause| Instant::now() + pause), failure);
    }
}

async fn run(
    mut balancers: Option<Box<dyn Balancers>>,
    mut tables: watch::Receiver<Newest>,
    in_force: watch::Sender<u64>,
    applied: mpsc::Sender<Applied>,
) {
    let mut last_error = None;
    let mut acknowledged: Option<(u64, u64, Vec<PortCondition>)> = None;
    let mut repair_at = Instant::now() + REPAIR_PERIOD;
    let mut settling = Settling::default();
    loop {
        let has_conditions = acknowledged.as_ref().is_some_and(|(.., found)| !found.is_empty());
        let look_at = Instant::now() + CONDITION_PERIOD;
        let wake_at = if has_conditions { look_at.min(repair_at) } else { repair_at };
        tokio::select! {
            changed = tables.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(settling.at.unwrap_or(repair_at)), if settling.at.is_some() => {
                settling.look(&mut balancers).await;
                continue;
            }
            () = tokio::time::sleep_until(wake_at) => {
                let is_news = match &mut balancers {
                    Some(balancers) if has_conditions => balancers.has_other_conditions().await,
                    _ => false,
                };
                if !is_news && wake_at < repair_at {
                    continue;
                }
            }
        }
        repair_at = Instant::now() + REPAIR_PERIOD;
        let Newest { number, session, version, tables } = tables.borrow_and_update().clone();
        let Some(version) = version else {
            in_force.send_replace(number); // Nothing is balanced yet.
            continue;
        };
        let result = match (&mut balancers, tables) {
            (Some(balancers), Some(tables)) => {
                balancers.apply(&tables.mesh, &tables.networks).await
            }
            _ => Ok(Vec::new()),
        };
        // Tables that follow each other closely do not put it off.
        settling.at.get_or_insert_with(|| Instant::now() + SETTLE_PERIOD);
        match result {
            Ok(conditions) => {
                last_error = None;
                in_force.send_replace(number);
                let news = (session, version, conditions.clone());
                if acknowledged.replace(news.clone()).as_ref() == Some(&news) {
                    continue; // It was in force already.
                }
                if applied.send(Applied { session, version, conditions }).await.is_err() {
                    return; // The agent has ended.
                }
            }
            Err(error) => {
                // Not acknowledged: the leader goes on without this node after its wait.
                let text = Chain(error.as_ref()).to_string();
                if last_error.as_ref() != Some(&text) {
                    tracing::error!(version, error = text, "failed to change the balancers");
                    last_error = Some(text);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures::FutureExt as _;

    use super::*;

    fn apply(handle: &BalancerHandle, session: u64, mesh: MeshTable, networks: Arc<NetworkTables>) {
        handle.apply(session, Some(mesh.version), || Some(Tables { mesh, networks }));
    }

    /// Balancers that take as long as the test wants.
    #[derive(Debug, Clone, Default)]
    struct Slow {
        begun: Arc<watch::Sender<bool>>,
        may_end: Arc<watch::Sender<bool>>,
        ended: Arc<watch::Sender<bool>>,
    }

    #[tonic::async_trait]
    impl Balancers for Slow {
        async fn apply(
            &mut self,
            _: &MeshTable,
            _: &Arc<NetworkTables>,
        ) -> Result<Vec<PortCondition>, Box<dyn std::error::Error + Send + Sync>> {
            self.begun.send_replace(true);
            self.may_end.subscribe().wait_for(|may| *may).await.unwrap();
            self.ended.send_replace(true);
            Ok(Vec::new())
        }
    }

    /// Refuses networks of version 1; notes which tables and networks came together.
    #[derive(Debug)]
    struct Puppet(Arc<Mutex<Vec<(u64, u64)>>>, mpsc::Sender<()>);

    #[tonic::async_trait]
    impl Balancers for Puppet {
        async fn apply(
            &mut self,
            table: &MeshTable,
            networks: &Arc<NetworkTables>,
        ) -> Result<Vec<PortCondition>, Box<dyn std::error::Error + Send + Sync>> {
            self.0.lock().unwrap().push((table.version, networks.version));
            self.1.send(()).await.unwrap();
            if networks.version == 1 { Err("a network failed".into()) } else { Ok(Vec::new()) }
        }
    }

    #[tokio::test]
    async fn a_stop_waits_for_the_table_that_is_being_applied() {
        let (tasks, slow) = (TaskSet::new(), Slow::default());
        let (applied, _reports) = mpsc::channel(1);
        let handle = BalancerHandle::start(Some(Box::new(slow.clone())), applied, &tasks);
        let table = serde_json::json!({"version": 1, "self_number": 1, "peers": [], "ports": []});
        apply(&handle, 1, serde_json::from_value(table).unwrap(), Arc::default());
        slow.begun.subscribe().wait_for(|begun| *begun).await.unwrap();
        drop(handle);
        let stop = tasks.shutdown();
        tokio::pin!(stop);
        assert_eq!(stop.as_mut().now_or_never(), None, "it has not ended");
        slow.may_end.send_replace(true);
        stop.await;
        assert!(*slow.ended.borrow());
    }

    #[tokio::test]
    async fn a_version_is_acknowledged_when_its_networks_are_in_force_too() {
        let tasks = TaskSet::new();
        let (calls, (called, mut waits)) = (Arc::default(), mpsc::channel(8));
        let (sender, mut applied) = mpsc::channel(8);
        let puppet = Box::new(Puppet(Arc::clone(&calls), called));
        let handle = BalancerHandle::start(Some(puppet), sender, &tasks);
        let put = |version| {
            let table = MeshTable {
                version,
                self_number: 1,
                pool: MeshTable::default_pool(),
                slice_prefix: MeshTable::default_slice_prefix(),
                peers: Vec::new(),
                ipv6: std::collections::BTreeMap::new(),
                daemons: std::collections::BTreeMap::new(),
                ports: Vec::new(),
            };
            let networks = NetworkTables { version, ..NetworkTables::default() };
            apply(&handle, 7, table, Arc::new(networks));
        };
        for version in [1, 2] {
            put(version);
            waits.recv().await.unwrap();
        }
        let first = applied.recv().await.unwrap();
        assert_eq!((first.session, first.version), (7, 2), "the first is in force in part only");
        assert_eq!(*calls.lock().unwrap(), [(1, 1), (2, 2)]);
        assert!(applied.try_recv().is_err());
    }

    /// Balancers with a port that another program holds until the test says otherwise.
    #[derive(Debug)]
    struct Hindered(Arc<watch::Sender<bool>>, Arc<Mutex<usize>>);

    #[tonic::async_trait]
    impl Balancers for Hindered {
        async fn apply(
            &mut self,
            _: &MeshTable,
            _: &Arc<NetworkTables>,
        ) -> Result<Vec<PortCondition>, Box<dyn std::error::Error + Send + Sync>> {
            *self.1.lock().unwrap() += 1;
            let is_held = *self.0.borrow();
            Ok(is_held.then(PortCondition::default).into_iter().collect())
        }

        async fn has_other_conditions(&mut self) -> bool {
            !*self.0.borrow()
        }
    }

    #[tokio::test]
    async fn a_port_that_becomes_free_is_taken_and_said_long_before_the_next_repair() {
        let tasks = TaskSet::new();
        let (held, n_applied) = (Arc::new(watch::Sender::new(true)), Arc::default());
        let (sender, mut applied) = mpsc::channel(8);
        let hindered = Box::new(Hindered(Arc::clone(&held), Arc::clone(&n_applied)));
        let handle = BalancerHandle::start(Some(hindered), sender, &tasks);
        let table = serde_json::json!({"version": 1, "self_number": 1, "peers": [], "ports": []});
        apply(&handle, 1, serde_json::from_value(table).unwrap(), Arc::default());
        assert_eq!(applied.recv().await.unwrap().conditions.len(), 1);
        held.send_replace(false);
        let freed = Instant::now();
        assert_eq!(applied.recv().await.unwrap().conditions, []);
        assert!(freed.elapsed() < REPAIR_PERIOD / 2, "{:?}", freed.elapsed());
        assert_eq!(*n_applied.lock().unwrap(), 2, "a port that is held is no reason to apply");
        drop(handle);
        tasks.shutdown().await;
    }

    /// Balancers that need two looks after each table; says when they were called, and by which of both.
    #[derive(Debug)]
    struct Unsettled {
        calls: mpsc::Sender<(&'static str, Instant)>,
        n_looks: u8,
        fails: bool,
    }

    #[tonic::async_trait]
    impl Balancers for Unsettled {
        async fn apply(
            &mut self,
            _: &MeshTable,
            _: &Arc<NetworkTables>,
        ) -> Result<Vec<PortCondition>, Box<dyn std::error::Error + Send + Sync>> {
            self.n_looks = 2;
            self.calls.try_send(("apply", Instant::now())).unwrap();
            Ok(Vec::new())
        }

        async fn settle(&mut self) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
            self.calls.try_send(("settle", Instant::now())).unwrap();
            if std::mem::take(&mut self.fails) {
                return Err("the kernel is busy".into());
            }
            self.n_looks -= 1;
            Ok(self.n_looks > 0)
        }
    }

    /// Milliseconds after which balancers are called until the first repair, where tables come at these.
    async fn called_at(tables: &[u64], fails: bool) -> Vec<(&'static str, u64)> {
        let (tasks, begun) = (TaskSet::new(), Instant::now());
        let (calls, mut called) = mpsc::channel(16);
        let (applied, _reports) = mpsc::channel(8);
        let balancers = Box::new(Unsettled { calls, n_looks: 0, fails });
        let handle = BalancerHandle::start(Some(balancers), applied, &tasks);
        for (version, at) in (1..).zip(tables) {
            tokio::time::sleep_until(begun + Duration::from_millis(*at)).await;
            let table =
                serde_json::json!({"version": version, "self_number": 1, "peers": [], "ports": []});
            apply(&handle, 1, serde_json::from_value(table).unwrap(), Arc::default());
        }
        tokio::time::sleep(REPAIR_PERIOD / 2).await;
        drop(handle);
        tasks.shutdown().await;
        let mut found = Vec::new();
        while let Some((what, at)) = called.recv().await {
            found.push((what, at.duration_since(begun).as_millis() as u64));
        }
        found
    }

    #[tokio::test(start_paused = true)]
    async fn looks_are_apart_as_long_as_they_are_needed_and_no_table_puts_them_off() {
        let one = [("apply", 0), ("settle", 200), ("settle", 400)];
        assert_eq!(called_at(&[0], false).await, one);
        let three = [
            ("apply", 0),
            ("apply", 150),
            ("settle", 200),
            ("apply", 390),
            ("settle", 400),
            ("settle", 600),
        ];
        assert_eq!(called_at(&[0, 150, 390], false).await, three);
        let failed = [("apply", 0), ("settle", 200), ("settle", 1200), ("settle", 1400)];
        assert_eq!(called_at(&[0], true).await, failed);
    }
}
