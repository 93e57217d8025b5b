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

/// How long after a table came into force what was under way to withdrawn tasks is judged: many times what
/// an answer takes within a swarm, and less than the second after which a client sends its request again.
const SETTLE_AFTER: Duration = Duration::from_millis(200);

/// The same for the first of tables that follow each other.
const SETTLE_WITHIN: Duration = Duration::from_millis(700);

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

    /// Has the kernel forget requests that withdrawn tasks did not answer. Called a moment after each table.
    async fn settle(&mut self) {}

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
}

/// What is to be applied, and the session that it is for.
#[derive(Debug, Clone, Default)]
struct Newest {
    /// Counts what was handed over since the start.
    number: u64,
    session: u64,
    table: Option<MeshTable>,
    networks: Arc<NetworkTables>,
}

impl BalancerHandle {
    pub(super) fn start(
        balancers: Option<Box<dyn Balancers>>,
        applied: mpsc::Sender<Applied>,
        tasks: &TaskSet,
    ) -> Self {
        let (newest, tables) = watch::channel(Newest::default());
        let (number, in_force) = watch::channel(0);
        // Not cut off in the middle: a mesh that is just being started must be known to whoever
        // removes it after the node's stop. It ends with the handle.
        tasks.spawn_to_end("balancers", run(balancers, tables, number, applied));
        Self { newest, in_force }
    }

    /// Hands a table over; returns its number, for [`Self::in_force`].
    pub(super) fn apply(
        &self,
        session: u64,
        table: Option<MeshTable>,
        networks: Arc<NetworkTables>,
    ) -> u64 {
        let mut number = 0;
        self.newest.send_modify(|newest| {
            number = newest.number + 1;
            *newest = Newest { number, session, table, networks };
        });
        number
    }

    /// The number of the table that is in force, or of a later one.
    pub(super) fn in_force(&self) -> watch::Receiver<u64> {
        self.in_force.clone()
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
    let (mut settle_at, mut unsettled_since): (Option<Instant>, Option<Instant>) = (None, None);
    loop {
        let has_conditions = acknowledged.as_ref().is_some_and(|(.., found)| !found.is_empty());
        let look_at = Instant::now() + CONDITION_PERIOD;
        let wake_at = if has_conditions { look_at.min(repair_at) } else { repair_at };
        tokio::select! {
            changed = tables.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(settle_at.unwrap_or(repair_at)), if settle_at.is_some() => {
                (settle_at, unsettled_since) = (None, None);
                if let Some(balancers) = &mut balancers {
                    balancers.settle().await;
                }
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
        let Newest { number, session, table, networks } = tables.borrow_and_update().clone();
        let Some(table) = table else {
            in_force.send_replace(number); // Nothing is balanced yet.
            continue;
        };
        let result = match &mut balancers {
            Some(balancers) => balancers.apply(&table, &networks).await,
            None => Ok(Vec::new()),
        };
        // Each table has its time until then, so that tables that follow each other closely put it off, but
        // not beyond the moment in which clients send again.
        let (now, first) = (Instant::now(), *unsettled_since.get_or_insert_with(Instant::now));
        settle_at = Some((now + SETTLE_AFTER).min(first + SETTLE_WITHIN));
        match result {
            Ok(conditions) => {
                last_error = None;
                in_force.send_replace(number);
                let news = (session, table.version, conditions.clone());
                if acknowledged.replace(news.clone()).as_ref() == Some(&news) {
                    continue; // It was in force already.
                }
                if applied
                    .send(Applied { session, version: table.version, conditions })
                    .await
                    .is_err()
                {
                    return; // The agent has ended.
                }
            }
            Err(error) => {
                // Not acknowledged: the leader goes on without this node after its wait.
                let text = Chain(error.as_ref()).to_string();
                if last_error.as_ref() != Some(&text) {
                    tracing::error!(
                        version = table.version,
                        error = text,
                        "failed to change the balancers"
                    );
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
        handle.apply(1, serde_json::from_value(table).ok(), Arc::default());
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
            handle.apply(7, Some(table), Arc::new(networks));
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
        handle.apply(1, serde_json::from_value(table).ok(), Arc::default());
        assert_eq!(applied.recv().await.unwrap().conditions.len(), 1);
        held.send_replace(false);
        let freed = Instant::now();
        assert_eq!(applied.recv().await.unwrap().conditions, []);
        assert!(freed.elapsed() < REPAIR_PERIOD / 2, "{:?}", freed.elapsed());
        assert_eq!(*n_applied.lock().unwrap(), 2, "a port that is held is no reason to apply");
        drop(handle);
        tasks.shutdown().await;
    }
}
