//! Measures acknowledged writes per second: one and three managers in one process, their logs on one
//! disk. `cargo run -p skep-manager --example consensus_bench -- [SECONDS]`

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{BoxFuture, join_all};
use skep_common::object::Config;
use skep_common::spec::{Base64, ConfigSpec};
use skep_common::{ConfigId, Meta, Object};
use skep_manager::consensus::{CallError, Consensus, DataKey, Options, RaftRequest, RaftTransport};
use skep_manager_core::{Action, Command, Expect};
use skep_runtime::clock;

/// Hands requests over within the process.
#[derive(Debug, Clone, Default)]
struct Local(Arc<Mutex<BTreeMap<u64, Consensus>>>);

impl RaftTransport for Local {
    fn call(
        &self,
        target: u64,
        addr: &str,
        request: RaftRequest,
        _deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        let manager = self.0.lock().expect("nothing panics with it").get(&target).cloned();
        let addr = addr.to_owned();
        async move {
            match manager {
                Some(manager) => Ok(manager.handle(request).await),
                None => {
                    let reason = "not started".to_owned();
                    Err(CallError {
                        target,
                        addr,
                        reason,
                        may_have_arrived: false,
                        is_removed: false,
                    })
                }
            }
        }
        .boxed()
    }
}

/// One object of about 256 bytes, always the same one: the store does not grow.
fn write() -> Command {
    let mut spec = ConfigSpec { name: "bench".to_owned(), ..ConfigSpec::default() };
    spec.data = Some(Base64(vec![b'x'; 75])); // A hundred characters.
    let config =
        Config { id: ConfigId(1), meta: Meta::default(), spec, versions: Default::default() };
    let object = Object::Config(Box::new(config));
    Command::new(clock::now(), vec![Action::Put { object, expect: Expect::Present }])
}

async fn measure(n_managers: u64, time: Duration) -> anyhow::Result<()> {
    let network = Local::default();
    let mut dirs = Vec::new();
    for raft_id in 1..=n_managers {
        let dir = tempfile::tempdir()?;
        let key = DataKey::new(1, [7; 32]);
        let options = Options::new(raft_id, dir.path(), key, Arc::new(network.clone()));
        dirs.push(dir);
        let manager = Consensus::start(options).await?;
        network.0.lock().expect("nothing panics with it").insert(raft_id, manager);
    }
    let managers = network.0.lock().expect("nothing panics with it").clone();
    let leader = managers.get(&1).context("there is a first manager")?;
    leader.bootstrap("1").await?;
    for raft_id in 2..=n_managers {
        leader.add_manager(raft_id, &raft_id.to_string()).await?;
    }
    leader.leadership().wait_for(|leadership| leadership.is_self).await?;
    let mut create = write();
    if let [Action::Put { expect, .. }] = create.actions.as_mut_slice() {
        *expect = Expect::Absent;
    }
    leader.propose(&create).await?;

    for n_writers in [1, 64, 256] {
        let (start, n_written) = (clock::monotonic(), AtomicU64::new(0));
        let writers = (0..n_writers).map(|_| async {
            let command = write();
            while clock::monotonic().duration_since(start) < time {
                leader.propose(&command).await?;
                n_written.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        });
        join_all(writers).await.into_iter().collect::<anyhow::Result<()>>()?;
        let rate = n_written.into_inner() as f64 / start.elapsed().as_secs_f64();
        println!("{n_managers} managers, {n_writers} writers: {rate:.0} writes/s");
    }
    for manager in managers.values() {
        manager.shutdown().await;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let seconds = std::env::args().nth(1).map_or(Ok(3), |text| text.parse())?;
    for n_managers in [1, 3] {
        measure(n_managers, Duration::from_secs(seconds)).await?;
    }
    Ok(())
}
