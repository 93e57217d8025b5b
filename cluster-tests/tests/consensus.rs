//! Nothing acknowledged is lost: managers that die, rejoin by snapshot, and lead in turn.
//!
//! `skep debug write` is the load: each of its lanes counts in a label of a service of its own, by
//! updates that name the version that the lane's last acknowledgement gave. A lost write would
//! make the next one out of sequence, and leave a count behind the acknowledged one.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeMap;
use std::time::Duration;

use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, is_root_or_skip, wait_until};

const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
/// Two snapshots' worth, so that the log that a dead manager would need is gone.
const N_WRITES_BEHIND: u64 = 20_000;
const N_ROUNDS: usize = 10;
/// Acknowledged writes of each round before the leader dies.
const N_WRITES_A_ROUND: usize = 500;
/// Twenty thousand writes of a debug build, on a machine that is busy with other tests.
const WRITES_WITHIN: Duration = Duration::from_secs(150);

fn start() -> Lab {
    Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() })
}

/// Any manager but `node`.
fn other_than(node: &str) -> &'static str {
    MANAGERS.into_iter().find(|name| *name != node).unwrap()
}

/// The services of `skep debug write --name PREFIX`, and the counts that the store has.
#[track_caller]
fn counts(lab: &Lab, via: &str, prefix: &str) -> BTreeMap<String, u64> {
    let list = lab.node(via).skep(&["service", "ls", "--format", "{{.Name}}"]).ok();
    let names: Vec<&str> = list.stdout.lines().filter(|name| name.starts_with(prefix)).collect();
    let format = "{{.Spec.Name}} {{index .Spec.Labels \"count\"}}";
    let args = [&["service", "inspect", "--format", format][..], &names].concat();
    let output = lab.node(via).skep(&args).ok();
    output.stdout.lines().map(parse_line).collect()
}

/// A line `SERVICE COUNT`.
#[track_caller]
fn parse_line(line: &str) -> (String, u64) {
    let (name, count) = line.split_once(' ').unwrap_or_else(|| panic!("not a count: {line:?}"));
    (name.to_owned(), count.parse().unwrap_or_else(|error| panic!("{error}: {line:?}")))
}

#[test]
fn a_manager_that_missed_twenty_thousand_writes_rejoins_by_snapshot() {
    if !is_root_or_skip() {
        return;
    }
    let lab = start();
    let leader = lab.wait_for_leader("n1");
    let (behind, via) = if leader == "n3" { ("n2", "n1") } else { ("n3", "n1") };
    let before = lab.wait_until_alike(via, 3);
    lab.kill(&[behind]);

    let n_writes = N_WRITES_BEHIND.to_string();
    let args = ["debug", "write", "--count", &n_writes, "--concurrency", "64", "--name", "bulk"];
    let (status, printed) = lab.start_skep(via, &args).finish(WRITES_WITHIN);
    assert!(status.success(), "{printed}");
    assert_eq!(printed.split_whitespace().next(), Some(&*n_writes), "all are acknowledged");
    assert_eq!(counts(&lab, via, "bulk").values().sum::<u64>(), N_WRITES_BEHIND);

    lab.start_nodes(&[behind]);
    let version = lab.wait_until_alike(via, 3);
    assert!(version >= before + N_WRITES_BEHIND, "{before} before, {version} after");
    let dir = lab.data_dir(behind).join("raft");
    let entries = std::fs::read_dir(&dir).unwrap().flatten();
    let names: Vec<String> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
    assert!(names.iter().any(|name| name.contains("snap")), "it came by snapshot: {names:?}");

    // Also from its own disk, and as one of a majority of two.
    lab.kill(&[behind]);
    lab.start_nodes(&[behind]);
    lab.wait_until_alike(via, 3);
    let leader = lab.wait_for_leader(via);
    lab.kill(&[if leader == behind { via } else { &leader }]);
    assert_eq!(counts(&lab, behind, "bulk").values().sum::<u64>(), N_WRITES_BEHIND);
    lab.down();
}

#[test]
fn no_acknowledged_write_is_lost_though_the_leader_dies_ten_times() {
    if !is_root_or_skip() {
        return;
    }
    let lab = start();
    let mut leader = lab.wait_for_leader("n1");
    for round in 1..=N_ROUNDS {
        let via = other_than(&leader);
        let prefix = format!("round{round}");
        let args = ["debug", "write", "--count", "1000000", "--concurrency", "16", "--print"];
        let load = lab.start_skep(via, &[&args[..], &["--name", &prefix]].concat());
        let wait_for = |n_lines: usize, what: &str| {
            wait_until(SETTLES_WITHIN, what, || {
                let n_seen = load.lines().len();
                ((n_seen >= n_lines).then_some(n_seen), format!("{n_seen} of {n_lines}"))
            })
        };
        wait_for(N_WRITES_A_ROUND, "writes are acknowledged");
        lab.kill(&[&leader]);
        // What was on its way when the leader died is acknowledged, refused or tried again by now.
        let n_seen = load.lines().len();
        wait_for(n_seen + N_WRITES_A_ROUND, "writes go on with the next leader");
        let lines = load.lines();
        // It may say on standard error that it waits for a leader.
        let acknowledgements = lines.iter().filter(|line| line.starts_with(&prefix));
        let acknowledged: BTreeMap<String, u64> =
            acknowledgements.map(|line| parse_line(line)).collect();
        drop(load);

        let stored = counts(&lab, via, &prefix);
        for (service, count) in &acknowledged {
            let found = stored.get(service).copied().unwrap_or_default();
            assert!(found >= *count, "round {round}: {service} has {found}, {count} were promised");
        }
        lab.start_nodes(&[&leader]);
        lab.wait_until_alike(via, 3);
        leader = lab.wait_for_leader(via);
    }
    lab.down();
}
