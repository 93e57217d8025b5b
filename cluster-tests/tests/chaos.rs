//! Clients write and read through all managers while daemons, machines and cables of the swarm fail.
//!
//! What the clients were told is judged afterwards: one manager alone, to which all happens one after the
//! other, must have been able to say the same.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use skep_cluster_tests::{
    Clients, History, Lab, LabOptions, SETTLES_WITHIN, is_long, is_root_or_skip, wait_until,
};
use skep_runtime::clock::monotonic;
use tonic::Code;

const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];
const N_CLIENTS: usize = 8;
/// More of them, since each waits for an election most of the time.
const N_WRITERS: usize = 32;
/// For how long daemons are killed, one every second.
const MINUTE: Duration = Duration::from_secs(60);
/// A machine that is busy with other tests may need more for what is to be seen.
const PATIENCE: Duration = Duration::from_secs(240);
const SECOND: Duration = Duration::from_secs(1);
const N_KILLS_MIN: usize = 40;
const N_LEADER_KILLS_MIN: usize = 10;
const N_WRITES_MIN: usize = 500;
/// Writes that others acknowledge while a manager is away.
const N_WRITES_MEANWHILE: usize = 50;

#[test]
fn nothing_acknowledged_is_lost_while_a_daemon_dies_every_second() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { no_containers: true, ..LabOptions::default() });
    let seed: u64 = rand::random();
    let mut rng = StdRng::seed_from_u64(seed);
    // New keys all the time, so that many services are made.
    let clients = Clients::start(&lab, &MANAGERS, N_WRITERS, SECOND / 4);
    let (mut n_kills, mut n_leader_kills) = (0, 0);
    let mut longest = Duration::ZERO;
    let started = monotonic();
    for turn in 0.. {
        std::thread::sleep((SECOND * turn).saturating_sub(started.elapsed()));
        let elapsed = started.elapsed();
        let is_enough = n_kills >= N_KILLS_MIN
            && n_leader_kills >= N_LEADER_KILLS_MIN
            && clients.n_acknowledged() >= N_WRITES_MIN;
        if elapsed >= MINUTE && is_enough || elapsed >= PATIENCE {
            break;
        }
        let leader = lab.leader_now(&MANAGERS);
        // Every fourth is the leader, and it may be among the others.
        let victim = match &leader {
            Some(leader) if turn % 4 == 0 => leader.as_str(),
            _ => NODES.choose(&mut rng).copied().unwrap(),
        };
        n_kills += 1;
        n_leader_kills += usize::from(leader.as_deref() == Some(victim));
        let killed_at = monotonic();
        lab.kill_daemon(&[victim]);
        lab.start_nodes(&[victim]);
        longest = longest.max(killed_at.elapsed());
    }
    let elapsed = started.elapsed();
    let history = clients.stop();
    eprintln!(
        "-- seed {seed}: {n_kills} daemons killed in {elapsed:?}, {n_leader_kills} of them the leader's, {} acknowledged writes, {} \
         services; back after {longest:?} at the latest",
        history.n_acknowledged(),
        history.acknowledged().len(),
    );
    judge(&lab, &history);
    assert!(n_kills >= N_KILLS_MIN, "{n_kills} kills");
    assert!(n_leader_kills >= N_LEADER_KILLS_MIN, "{n_leader_kills} kills of leaders");
    assert!(history.n_acknowledged() >= N_WRITES_MIN, "{} writes", history.n_acknowledged());
    lab.down();
}

#[test]
fn clients_cannot_tell_managers_that_fail_from_one_that_does_not() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { workers: 0, ..LabOptions::default() });
    a_manager_that_is_cut_off_confirms_no_version(&lab);
    let seed: u64 = rand::random();
    let mut rng = StdRng::seed_from_u64(seed);
    let duration = if is_long() { 2 * MINUTE } else { MINUTE / 3 };
    let clients = Clients::start(&lab, &MANAGERS, N_CLIENTS, SECOND);
    let (mut n_kills, mut n_cuts) = (0, 0);
    let started = monotonic();
    for round in 0.. {
        if started.elapsed() >= duration {
            break;
        }
        go_on(&clients, &format!("before round {round}"));
        let victim = match lab.leader_now(&MANAGERS) {
            Some(leader) if rng.random_bool(0.6) => leader,
            _ => (*MANAGERS.choose(&mut rng).unwrap()).to_owned(),
        };
        if round % 2 == 0 {
            n_cuts += 1;
            lab.cut(&[&victim]);
            go_on(&clients, &format!("while {victim} is cut off"));
            lab.heal(&[&victim]);
        } else {
            n_kills += 1;
            lab.kill(&[&victim]);
            go_on(&clients, &format!("while {victim} is down"));
            lab.start_nodes(&[&victim]);
        }
    }
    let history = clients.stop();
    eprintln!("-- seed {seed}: {n_cuts} managers were cut off, {n_kills} lost their power");
    judge(&lab, &history);
    lab.down();
}

/// Also where an update changes nothing, so that there is nothing to write.
fn a_manager_that_is_cut_off_confirms_no_version(lab: &Lab) {
    let spec = |label: &str| {
        json!({
            "Name": "confirmed",
            "Labels": {"label": label},
            "TaskTemplate": {"ContainerSpec": {"Image": "none"}},
            "Mode": {"Replicated": {"Replicas": 0}},
        })
        .to_string()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let leader = lab.wait_for_leader("n1");
    let others: Vec<&str> = MANAGERS.into_iter().filter(|name| *name != leader).collect();
    let mut behind = lab.direct(others[0]);
    let mut ahead = lab.direct(others[1]);
    let (id, version) = runtime.block_on(ahead.create(spec("one"))).unwrap();
    lab.wait_until_alike("n1", MANAGERS.len());
    let confirmed = runtime.block_on(behind.update(&id, version, spec("one"))).unwrap();
    assert_eq!(confirmed, version, "nothing changes");
    lab.cut(&[others[0]]);
    let next = runtime.block_on(ahead.update(&id, version, spec("two"))).unwrap();
    assert!(next > version);
    let answer = runtime.block_on(behind.update(&id, version, spec("one")));
    assert!(answer.is_err(), "{answer:?}, and the version is {next}");
    lab.heal(&[others[0]]);
    wait_until(SETTLES_WITHIN, "it is refused", || {
        let answer = runtime.block_on(behind.update(&id, version, spec("one"))).unwrap_err();
        let seen = format!("{answer:?}");
        (answer.code().filter(|code| *code == Code::Aborted), seen)
    });
}

/// Waits for more acknowledged writes.
#[track_caller]
fn go_on(clients: &Clients, when: &str) {
    let target = clients.n_acknowledged() + N_WRITES_MEANWHILE;
    wait_until(SETTLES_WITHIN, &format!("writes are acknowledged {when}"), || {
        let n = clients.n_acknowledged();
        ((n >= target).then_some(()), format!("{n} of {target}"))
    });
}

/// What was acknowledged is there, on all managers alike, and the answers fit together.
#[track_caller]
fn judge(lab: &Lab, history: &History) {
    eprintln!("-- {}", history.summary());
    lab.wait_until_alike("n1", MANAGERS.len());
    let list = lab.node("n1").skep(&["service", "ls", "--format", "{{.Name}}"]).ok();
    let stored: BTreeSet<&str> = list.stdout.lines().collect();
    let acknowledged = history.acknowledged();
    let lost: Vec<_> = acknowledged.difference(&stored).collect();
    assert!(lost.is_empty(), "acknowledged, and not there: {lost:?}");
    history.assert_linearizable();
}
