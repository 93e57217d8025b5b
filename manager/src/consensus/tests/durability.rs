//! What is acknowledged survives.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures::future::join_all;
use skep_common::Timestamp;
use skep_manager_core::command::FORMAT_LEVEL;
use skep_manager_core::{Action, Command, Expect, Outcome};
use skep_runtime::TaskSet;

use super::harness::{Swarm, has_config, put_config, within};
use crate::consensus::disk::{Disk, RealDisk};
use crate::consensus::{Consensus, RaftRequest, StartError, StopReason, Unapplicable};

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_made_after_as_many_entries_as_the_swarm_says() {
    let mut swarm = Swarm::of(1).await;
    let manager = swarm.get(1).clone();
    let cluster = serde_json::json!({
        "ID": "0000000000000000000000001", "Version": {"Index": 0}, "Spec": {"Name": "default"},
        "JoinTokens": {"Worker": "", "Manager": ""}, "RootCaCert": "", "RootCaKey": "",
        "IngressPool": "10.192.0.0/10", "CreatedAt": "2023-11-14T22:00:00Z", "UpdatedAt": "2023-11-14T22:00:00Z",
    });
    let mut cluster: skep_common::object::Cluster = serde_json::from_value(cluster).unwrap();
    for (n_entries, at) in [(20, 100), (50, 1000)] {
        let raft = cluster.spec.raft.get_or_insert_default();
        (raft.snapshot_interval, raft.keep_old_snapshots) = (Some(n_entries), Some(3));
        let object = skep_common::Object::Cluster(Box::new(cluster.clone()));
        let stored = manager.state().cluster().map(|cluster| cluster.meta.version);
        let expect = stored.map_or(Expect::Absent, Expect::Version);
        let command = Command::new(Timestamp(1), vec![Action::Put { object, expect }]);
        within("a write", manager.propose(&command)).await.unwrap();
        let before = manager.status().await.snapshot.unwrap_or(0);
        for number in at..at + n_entries {
            within("a write", manager.propose(&put_config(number, 10))).await.unwrap();
        }
        let mut made = manager.inner.metrics.clone();
        let is_made = |metrics: &openraft::RaftMetrics<_>| {
            metrics.snapshot.is_some_and(|log_id| log_id.index >= before + n_entries)
        };
        within("a snapshot", made.wait_for(is_made)).await.unwrap();
    }
    let dir = swarm.options(1).dir;
    let kept = std::fs::read_dir(dir).unwrap();
    let is_old = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("snapshot.old-");
    let n_kept = kept.map(|entry| entry.unwrap().file_name()).filter(is_old).count();
    assert!(n_kept >= 1, "the first one is kept beside the second");
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_when_leaders_are_killed_again_and_again() {
    let mut swarm = Swarm::of(3).await;
    let next = Arc::new(AtomicU64::new(1));
    let acknowledged = Arc::new(Mutex::new(BTreeSet::new()));
    for round in 0..5 {
        let leader = swarm.leader(None).await;
        let tasks = TaskSet::new();
        let (enough, mut wait) = tokio::sync::watch::channel(0_u64);
        let enough = Arc::new(enough);
        for raft_id in swarm.ids() {
            for _ in 0..4 {
                let manager = swarm.get(raft_id).clone();
                let (next, enough) = (Arc::clone(&next), Arc::clone(&enough));
                let acknowledged = Arc::clone(&acknowledged);
                tasks.spawn("writer", async move {
                    loop {
                        let number = next.fetch_add(1, Ordering::SeqCst);
                        match manager.propose(&put_config(number, 50)).await {
                            Ok(Outcome::Applied(_)) => {
                                acknowledged.lock().unwrap().insert(number);
                                enough.send_modify(|n| *n += 1);
                            }
                            Ok(refused) => panic!("{refused:?}"),
                            Err(error) if error.may_still_commit() => {}
                            Err(_) => return, // Its manager was killed.
                        }
                    }
                });
            }
        }
        within("writes", wait.wait_for(|n| *n >= 50)).await.unwrap();
        swarm.kill(leader).await;
        let before = *wait.borrow();
        within("writes after the kill", wait.wait_for(|n| *n >= before + 20)).await.unwrap();
        tasks.shutdown().await;
        swarm.start(leader).await;
        let state = swarm.converge().await;
        for number in acknowledged.lock().unwrap().iter() {
            assert!(has_config(&state, *number), "round {round}: {number} was acknowledged");
        }
    }
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_managers_killed_at_once_come_back_with_everything() {
    let mut swarm = Swarm::of(3).await;
    for number in 1..=20 {
        swarm.get(1).propose(&put_config(number, 10)).await.unwrap();
    }
    let ids = swarm.ids();
    for raft_id in &ids {
        swarm.kill(*raft_id).await;
    }
    for raft_id in &ids {
        swarm.start(*raft_id).await;
    }
    let state = swarm.converge().await;
    assert!((1..=20).all(|number| has_config(&state, number)));
    swarm.stop().await;
}

/// Cuts the last bytes that a manager wrote off its newest segment, as no crash does.
fn cut_log(swarm: &mut Swarm, raft_id: u64) {
    let dir = swarm.options(raft_id).dir.join("log");
    let newest = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let bytes = std::fs::read(&newest).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    let file = File::options().write(true).open(&newest).unwrap();
    file.set_len(u64::try_from(end - 20).unwrap()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_lost_its_logs_end_votes_only_when_it_has_caught_up() {
    let mut swarm = Swarm::of(3).await;
    let leader = swarm.leader(None).await;
    for number in 1..=20 {
        swarm.get(leader).propose(&put_config(number, 10)).await.unwrap();
    }
    let victim = swarm.ids().into_iter().find(|id| *id != leader).unwrap();
    swarm.kill(victim).await;
    cut_log(&mut swarm, victim);
    swarm.net.cut_off(victim);
    for _ in 0..2 {
        swarm.start(victim).await; // The second time, nothing is missing at the end of the file.
        let manager = swarm.get(victim);
        assert!(manager.inner.lost_tail.is_set());
        for ask in [RaftRequest::Vote, RaftRequest::PreVote, RaftRequest::TransferLeader] {
            let answer = manager.handle(ask(bytes::Bytes::new())).await;
            let text = String::from_utf8_lossy(&answer).into_owned();
            assert!(text.contains("does not vote before it has caught up"), "{text}");
        }
        swarm.kill(victim).await;
    }
    swarm.net.heal();
    swarm.start(victim).await;
    let caught_up = async {
        while swarm.get(victim).inner.lost_tail.is_set() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    within("the victim to catch up", caught_up).await;
    swarm.kill(leader).await;
    // Both others are needed for a majority: the victim votes again, or leads.
    swarm.leader(None).await;
    let state = swarm.converge().await;
    assert!((1..=20).all(|number| has_config(&state, number)));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_manager_goes_on_with_what_is_left_of_its_log() {
    let mut swarm = Swarm::of(1).await;
    swarm.leader(None).await;
    for number in 1..=20 {
        swarm.get(1).propose(&put_config(number, 10)).await.unwrap();
    }
    swarm.kill(1).await;
    cut_log(&mut swarm, 1);
    swarm.start(1).await;
    swarm.leader(None).await;
    assert!(!swarm.get(1).inner.lost_tail.is_set());
    let state = swarm.converge().await;
    assert!((1..=19).all(|number| has_config(&state, number)));
    swarm.stop().await;
}

/// Counts syncs; fails when told to.
#[derive(Debug, Default)]
struct WatchedDisk {
    n_syncs: AtomicUsize,
    is_broken: AtomicBool,
}

impl Disk for WatchedDisk {
    fn write(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        RealDisk.write(file, offset, bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.n_syncs.fetch_add(1, Ordering::SeqCst);
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk is gone"));
        }
        RealDisk.sync(file)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_writers_share_syncs() {
    let mut swarm = Swarm::empty();
    let disk = Arc::new(WatchedDisk::default());
    let mut options = swarm.options(1);
    options.disk = Arc::clone(&disk) as Arc<dyn Disk>;
    swarm.insert(Consensus::start(options).await.unwrap());
    let manager = swarm.get(1);
    manager.bootstrap("addr-1").await.unwrap();
    swarm.leader(None).await;
    let before = disk.n_syncs.load(Ordering::SeqCst);
    let writers = (0..64_u64).map(|writer| async move {
        for round in 0..10 {
            let number = writer * 10 + round;
            assert!(matches!(
                manager.propose(&put_config(number, 100)).await,
                Ok(Outcome::Applied(_))
            ));
        }
    });
    within("640 writes", join_all(writers)).await;
    let n_syncs = disk.n_syncs.load(Ordering::SeqCst) - before;
    assert!(n_syncs < 320, "640 writes took {n_syncs} syncs");
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_whose_disk_fails_acknowledges_nothing_and_says_so() {
    let mut swarm = Swarm::empty();
    let disk = Arc::new(WatchedDisk::default());
    let mut options = swarm.options(1);
    options.disk = Arc::clone(&disk) as Arc<dyn Disk>;
    swarm.insert(Consensus::start(options).await.unwrap());
    let manager = swarm.get(1).clone();
    manager.bootstrap("addr-1").await.unwrap();
    swarm.leader(None).await;
    manager.propose(&put_config(1, 10)).await.unwrap();
    disk.is_broken.store(true, Ordering::SeqCst);
    let error = within("an answer", manager.propose(&put_config(2, 10))).await.unwrap_err();
    assert!(error.may_still_commit(), "it is in the file, if not durable: {error}");
    assert!(!has_config(&manager.state(), 2));
    let reason = within("the end", manager.stopped()).await;
    assert!(
        matches!(&reason, StopReason::Storage(text) if text.contains("the disk is gone")),
        "{reason}"
    );
    swarm.kill(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_of_an_unknown_level_stops_the_manager_before_it_is_applied() {
    let mut swarm = Swarm::of(1).await;
    swarm.leader(None).await;
    let manager = swarm.get(1).clone();
    manager.propose(&put_config(1, 10)).await.unwrap();
    let mut newer = put_config(2, 10);
    newer.level = FORMAT_LEVEL + 1;
    let error = within("an answer", manager.propose(&newer)).await.unwrap_err();
    assert!(error.may_still_commit(), "{error}");
    let level = FORMAT_LEVEL + 1;
    let is_expected = |found: &Unapplicable| matches!(found, Unapplicable::UnknownLevel { level: found, .. } if *found == level);
    let reason = within("the end", manager.stopped()).await;
    assert!(matches!(&reason, StopReason::Unapplicable(found) if is_expected(found)), "{reason}");
    assert!(!has_config(&manager.state(), 2) && has_config(&manager.state(), 1));
    manager.shutdown().await;
    swarm.kill(1).await;

    // It is committed: a start meets it again, at once or when the manager leads again.
    let reason = match Consensus::start(swarm.options(1)).await {
        Ok(manager) => {
            let reason = within("the end", manager.stopped()).await;
            manager.kill().await;
            reason.to_string() + &format!("{reason:?}")
        }
        Err(StartError::Unapplicable(found)) => format!("{found} {found:?}"),
        Err(error) => panic!("{error}"),
    };
    assert!(reason.contains("UnknownLevel"), "{reason}");
}
