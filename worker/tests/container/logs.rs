//! Output, from the container to a reader.

use skep_worker::container::{LogOptions, Stream};

use crate::Test;
use crate::environment::{Environment, block_on, collect, config, shell};

pub(crate) const TESTS: &[Test] = &[
    ("a_hundred_thousand_lines_arrive_exactly", || block_on(many_lines)),
    ("long_unfinished_and_odd_lines_arrive", || block_on(odd_lines)),
    ("a_log_is_read_from_a_position_a_tail_and_a_time", || block_on(parts)),
    ("followers_see_every_line_and_the_end", || block_on(follow)),
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

    let mut reader = env.runtime.logs("parts", LogOptions::default()).await.unwrap();
    for _ in 0..900 {
        reader.next().await.unwrap().unwrap();
    }
    let position = Some(reader.position());
    assert!(read(LogOptions { position, ..Default::default() }).await == all[900..]);
    assert_eq!(all.iter().filter(|record| record.stream == Stream::Stderr).count(), 1);

    let file = std::fs::read_to_string(env.runtime.log_path("parts")).unwrap();
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
