//! Output, from the container to a reader.

use skep_common::spec::LogRotation;
use skep_worker::container::{ContainerConfig, LogOptions, Stream};

use crate::Test;
use crate::environment::{Environment, block_on, collect, config, shell};

pub(crate) const TESTS: &[Test] = &[
    ("a_hundred_thousand_lines_arrive_exactly", || block_on(many_lines)),
    ("long_unfinished_and_odd_lines_arrive", || block_on(odd_lines)),
    ("a_log_is_read_from_a_tail_and_a_time", || block_on(parts)),
    ("followers_see_every_line_and_the_end", || block_on(follow)),
    ("a_rotated_log_is_one_log", || block_on(rotated)),
    ("followers_lose_no_line_of_a_log_that_is_rotated", || block_on(follow_rotated)),
    ("a_container_that_follows_another_one_goes_on_with_its_log", || block_on(followed)),
];

async fn many_lines(env: Environment) {
    let script = "seq 1 100000 & seq 200001 300000 >&2; wait";
    let outcome = env.sh("lines", script).await;
    let expect = |from: u32, to: u32| (from..=to).map(|n| format!("{n}\n")).collect::<String>();
    assert!(outcome.good() == expect(1, 100_000), "standard output differs");
    assert!(outcome.stderr() == expect(200_001, 300_000), "standard error differs");
    let is_ordered = outcome.records.is_sorted_by_key(|record| record.time);
    assert!(is_ordered, "times go back");
}

async fn odd_lines(env: Environment) {
    let script = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo; printf 'a\"\\\\b\\tc\\001\\n'; \
        printf 'no end'";
    let outcome = env.sh("odd", script).await;
    let records: Vec<(usize, bool)> =
        outcome.records.iter().map(|record| (record.line.len(), record.is_partial)).collect();
    let expect = [(16384, true), (16384, true), (7232, false), (0, false), (7, false), (6, true)];
    assert_eq!(records, expect);
    assert_eq!(outcome.records[4].line, "a\"\\b\tc\u{1}");
}

async fn parts(env: Environment) {
    env.start(&config("parts", shell("seq 1 1000; echo half >&2; seq 1001 2000"))).await;
    env.runtime.wait("parts").await.unwrap();
    let all = env.records("parts").await;
    assert_eq!(all.len(), 2001);
    let read = async |options| collect(env.runtime.logs("parts", options).await.unwrap()).await;

    for n_records in [0, 1, 7, 2001, 5000] {
        let tail = read(LogOptions { tail: Some(n_records), ..Default::default() }).await;
        assert!(tail == all[2001_usize.saturating_sub(n_records)..], "tail {n_records}");
    }
    let since = all[1500].time;
    let late = read(LogOptions { since: Some(since), ..Default::default() }).await;
    let first = all.iter().position(|record| record.time >= since).unwrap();
    assert!(late == all[first..], "since {since}");

    assert_eq!(all.iter().filter(|record| record.stream == Stream::Stderr).count(), 1);

    let file = std::fs::read_to_string(env.data_dir("parts").join("log")).unwrap();
    let first: serde_json::Value = serde_json::from_str(file.lines().next().unwrap()).unwrap();
    assert_eq!((first["log"].as_str(), first["stream"].as_str()), (Some("1\n"), Some("stdout")));
    env.runtime.remove("parts").await.unwrap();
    assert!(env.runtime.logs("parts", LogOptions::default()).await.is_err());
}

async fn follow(env: Environment) {
    // The container speaks only when told to, so that the reader waits in between.
    let script = "echo up; trap 'n=$((n+1)); echo $n; [ $n = 50 ] && exit 0' USR1; \
        while :; do sleep 1000 & wait $!; kill $!; done";
    env.start(&config("follow", shell(script))).await;
    let options = LogOptions { follow: true, ..Default::default() };
    let mut first = env.runtime.logs("follow", options).await.unwrap();
    let second = env.runtime.logs("follow", options).await.unwrap();
    let driver = async {
        assert_eq!(first.next().await.unwrap().unwrap().line, "up");
        for number in 1..=50 {
            env.runtime.signal("follow", 10).await.unwrap();
            assert_eq!(first.next().await.unwrap().unwrap().line, number.to_string());
        }
        assert_eq!(first.next().await.unwrap(), None, "the end of the container ends it");
    };
    let ((), others) = tokio::join!(driver, collect(second));
    assert_eq!(others.len(), 51);
    // Following what has ended gives it all, and ends.
    env.runtime.wait("follow").await.unwrap();
    let again = collect(env.runtime.logs("follow", options).await.unwrap()).await;
    assert!(again == others);
    env.runtime.remove("follow").await.unwrap();
}

/// A container whose log has that many files of about ten lines each.
fn bounded(id: &str, script: &str, files_max: u32) -> ContainerConfig {
    let log = LogRotation { file_bytes_max: 700, files_max };
    ContainerConfig { log, ..config(id, shell(script)) }
}

async fn rotated(env: Environment) {
    env.start(&bounded("c", "seq 1 1000", 4)).await;
    env.runtime.wait("c").await.unwrap();
    let files = std::fs::read_dir(env.data_dir("c")).unwrap().filter_map(|entry| {
        let entry = entry.unwrap();
        let is_log = entry.file_name().to_string_lossy().starts_with("log");
        is_log.then(|| entry.metadata().unwrap().len())
    });
    let sizes: Vec<u64> = files.collect();
    assert_eq!(sizes.len(), 4, "{sizes:?}");
    assert!(sizes.iter().all(|size| *size <= 700), "{sizes:?}");

    let all = env.records("c").await;
    assert!(all.len() > 20, "three files are full");
    let mut last = all.iter().rev().zip((1..=1000).rev());
    assert!(last.all(|(record, n)| record.line == n.to_string()), "the last ones: {all:?}");
    let read = async |options| collect(env.runtime.logs("c", options).await.unwrap()).await;
    for n_records in 0..=all.len() + 1 {
        let tail = read(LogOptions { tail: Some(n_records), ..Default::default() }).await;
        assert!(tail == all[all.len().saturating_sub(n_records)..], "tail {n_records}");
    }
    let mut reader = env.runtime.logs("c", LogOptions::default()).await.unwrap();
    for nth in 0..all.len() {
        let from = Some(reader.position());
        assert!(read(LogOptions { from, ..Default::default() }).await == all[nth..], "from {nth}");
        reader.next().await.unwrap().unwrap();
    }
    let since = all[15].time;
    let first = all.iter().position(|record| record.time >= since).unwrap();
    let late = read(LogOptions { since: Some(since), ..Default::default() }).await;
    assert!(late == all[first..], "since {since}");
    env.runtime.remove("c").await.unwrap();
}

async fn follow_rotated(env: Environment) {
    // The container speaks only when told to, so that no follower falls behind.
    let script = "echo up; trap 'n=$((n+1)); echo $n; [ $n = 100 ] && exit 0' USR1; \
        while :; do sleep 1000 & wait $!; kill $!; done";
    env.start(&bounded("c", script, 3)).await;
    let options = LogOptions { follow: true, ..Default::default() };
    let mut reader = env.runtime.logs("c", options).await.unwrap();
    assert_eq!(reader.next().await.unwrap().unwrap().line, "up");
    for number in 1..=60 {
        env.runtime.signal("c", 10).await.unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap().line, number.to_string());
    }
    // The next daemon finds the log in the middle of its files.
    let next = env.reopen();
    assert_eq!(next.adopt().await.unwrap().len(), 1);
    let tail = LogOptions { tail: Some(12), ..options };
    let mut again = next.logs("c", tail).await.unwrap();
    for number in 49..=60 {
        assert_eq!(again.next().await.unwrap().unwrap().line, number.to_string());
    }
    for number in 61..=100 {
        next.signal("c", 10).await.unwrap();
        assert_eq!(again.next().await.unwrap().unwrap().line, number.to_string());
        assert_eq!(reader.next().await.unwrap().unwrap().line, number.to_string());
    }
    assert_eq!(again.next().await.unwrap(), None, "the end of the container ends it");
    assert_eq!(reader.next().await.unwrap(), None);
    next.remove("c").await.unwrap();
}

async fn followed(env: Environment) {
    env.start(&config("again", shell("echo one; touch /left"))).await;
    env.runtime.wait("again").await.unwrap();
    env.runtime.clear("again").await.unwrap();
    assert!(!env.run_dir("again").exists() && !env.cgroup("again").exists());
    let wrong = ContainerConfig { layers: vec!["/nowhere".into()], ..config("again", shell("")) };
    env.runtime.create(&wrong).await.unwrap_err();
    env.start(&config("again", shell("ls /left; echo two"))).await;
    let outcome = env.outcome("again").await;
    assert_eq!(outcome.stdout(), "one\ntwo\n", "with a file system of its own");
}
