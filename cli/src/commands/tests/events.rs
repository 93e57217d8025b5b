//! `skep events` against a daemon whose streams break.

use serde_json::json;

use super::daemon::Daemon;
use super::run;

fn event(version: u64, action: &str) -> skep_proto::Event {
    skep_proto::Event {
        version,
        time_nanos: 1_500_000_000_000_000_000,
        kind: "service".into(),
        action: action.into(),
        id: "abc".into(),
        ..skep_proto::Event::default()
    }
}

#[tokio::test]
async fn a_stream_that_breaks_goes_on_without_a_gap_and_without_doubles() {
    let daemon = Daemon::start();
    daemon.table.lock().unwrap().events = [
        vec![event(3, "create"), event(4, "a")],
        vec![event(4, "a"), event(4, "b"), event(7, "remove")],
    ]
    .into();
    let line = "events -f --since 1500000000 --filter type=service --format {{.Action}}";
    let (code, out, err) = run(&daemon, line).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, "create\na\nb\nremove\n");
    let asked = |behind: u64| {
        let (since, filters) = (1_500_000_000_000_000_000_i64, ["type=service"]);
        json!({"since": since, "until": 0, "follow": true, "behind": behind, "filters": filters})
    };
    assert_eq!(daemon.asked(), [asked(0), asked(3)]);
}

#[tokio::test]
async fn without_follow_it_ends_and_tells_of_what_is_not_kept() {
    let daemon = Daemon::start();
    let gap = skep_proto::Event { gap: true, version: 2, ..skep_proto::Event::default() };
    daemon.table.lock().unwrap().events = [vec![gap, event(3, "create")]].into();
    let (code, out, err) = run(&daemon, "events").await;
    assert_eq!((code, out.as_str()), (0, "2017-07-14T02:40:00.000000000Z service create abc\n"));
    assert_eq!(err, "Events before these are not kept any more on this manager.\n");
    assert_eq!(daemon.asked()[0]["since"], 1);

    // A break is an error where nobody follows.
    daemon.table.lock().unwrap().events = [vec![event(3, "create")], vec![]].into();
    let (code, _, err) = run(&daemon, "events").await;
    assert_eq!((code, err.contains("this manager is stopping")), (1, true), "{err}");
}
