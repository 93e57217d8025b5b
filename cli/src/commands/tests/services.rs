//! Commands that change services and stacks, and wait for them.

use serde_json::{Value, json};

use super::{Daemon, run};

const SERVICE_ID: &str = "asv0000000000000000000000";

/// A service of that version with a short monitor time.
fn service(version: u64, replicas: u64) -> Value {
    json!({
        "ID": SERVICE_ID,
        "Version": {"Index": version}, "CreatedAt": "2023-11-14T22:00:00Z", "UpdatedAt": "2023-11-14T22:00:00Z",
        "Spec": {
            "Name": "web",
            "TaskTemplate": {"ContainerSpec": {"Image": "docker.io/library/web:1@sha256:ab"}},
            "Mode": {"Replicated": {"Replicas": replicas}},
            "UpdateConfig": {"Parallelism": 1, "Monitor": 10_000_000},
        },
        "SpecVersion": {"Index": version},
    })
}

fn with_status(mut service: Value, state: &str, message: &str) -> Value {
    service["UpdateStatus"] = json!({"State": state, "Message": message});
    service
}

fn task(slot: u64, spec_version: u64, state: &str) -> Value {
    json!({
        "ID": format!("atsk{slot}00000000000000000000"),
        "Version": {"Index": 9}, "CreatedAt": "2023-11-14T22:00:00Z", "UpdatedAt": "2023-11-14T22:00:00Z",
        "Spec": {"ContainerSpec": {"Image": format!("web:{spec_version}")}},
        "SpecVersion": {"Index": spec_version}, "ServiceID": SERVICE_ID, "Slot": slot,
        "Status": {"Timestamp": "2023-11-14T22:00:00Z", "State": state},
        "DesiredState": "running", "ServiceName": "web",
    })
}

#[tokio::test]
async fn create_waits_until_every_task_runs() {
    let daemon = Daemon::start();
    daemon.play("service", [service(1, 2)]);
    daemon.play("task", [task(1, 1, "new"), task(2, 1, "new"), task(1, 1, "preparing")]);
    daemon.play("task", [task(1, 1, "running"), task(2, 1, "running")]);
    let (code, out, err) = run(&daemon, "service create --name web --replicas 2 web:1 serve").await;
    assert_eq!((code, out.as_str()), (0, &*format!("{SERVICE_ID}\n")), "{err}");
    let expect = "\
overall progress: 0 out of 2 tasks
1/2: new
2/2: new
1/2: preparing
overall progress: 1 out of 2 tasks
1/2: running
overall progress: 2 out of 2 tasks
2/2: running
verify: Waiting 1 seconds to verify that tasks are stable...
";
    assert_eq!(err, format!("{expect}verify: Service {SERVICE_ID} converged\n"));
    assert_eq!(
        daemon.asked()[0]["create"]["TaskTemplate"]["ContainerSpec"]["Args"],
        json!(["serve"])
    );
}

#[tokio::test]
async fn a_detached_or_quiet_command_says_no_more_than_the_id() {
    for flags in ["--detach", "-d=true", "--quiet"] {
        let daemon = Daemon::start();
        daemon.play("service", [service(1, 1)]);
        daemon.play("task", [task(1, 1, "running")]);
        let (code, out, err) = run(&daemon, &format!("service create {flags} web:1")).await;
        assert_eq!(
            (code, out.as_str(), err.as_str()),
            (0, &*format!("{SERVICE_ID}\n"), ""),
            "{flags}"
        );
    }
}

#[tokio::test]
async fn an_update_that_ends_badly_is_a_failure() {
    for (states, code, expect) in [
        (
            vec![("updating", ""), ("completed", "update completed")],
            0,
            "verify: Service asv0000000000000000000000 converged",
        ),
        (
            vec![("updating", ""), ("paused", "update paused due to failure of task x")],
            1,
            "service update paused: update paused due to failure of task x",
        ),
        (
            vec![("rollback_started", ""), ("rollback_paused", "it broke")],
            1,
            "service rollback paused: it broke",
        ),
        (
            vec![("rollback_started", ""), ("rollback_completed", "rollback completed")],
            0,
            "rollback: rollback completed",
        ),
    ] {
        let daemon = Daemon::start();
        // The state of an earlier update is no news. The daemon itself makes version 6.
        daemon.hold("service", [with_status(service(5, 1), "completed", "long ago")]);
        daemon.hold("task", [task(1, 5, "running")]);
        for (n, (state, message)) in states.into_iter().enumerate() {
            daemon.play("service", [with_status(service(7 + n as u64, 1), state, message)]);
        }
        let (got, out, err) = run(&daemon, "service update --image web:2 web").await;
        assert_eq!((got, out.as_str()), (code, "web\n"), "{err}");
        assert!(err.contains(expect), "{expect}: {err}");
        assert!(err.starts_with("watch out\n"), "{err}");
        let asked = &daemon.asked()[0];
        assert_eq!(asked["version"], 5);
        assert_eq!(asked["spec"]["TaskTemplate"]["ContainerSpec"]["Image"], "web:2");
        assert_eq!(asked["spec"]["UpdateConfig"]["Monitor"], 10_000_000);
    }
}

#[tokio::test]
async fn a_service_that_goes_away_ends_the_wait() {
    let daemon = Daemon::start();
    daemon.hold("service", [service(5, 1)]);
    daemon.play("service", [json!({"ID": SERVICE_ID, "removed": true})]);
    let (code, _, err) = run(&daemon, "service update --force web").await;
    assert_eq!(code, 1);
    assert!(err.ends_with("the service was removed\n"), "{err}");
    assert_eq!(daemon.asked()[0]["spec"]["TaskTemplate"]["ForceUpdate"], 1);
}

#[tokio::test]
async fn an_update_that_changes_nothing_ends_too() {
    let daemon = Daemon::start();
    daemon.hold("service", [service(5, 1)]);
    daemon.hold("task", [task(1, 5, "running")]);
    let (code, _, err) = run(&daemon, "service update --replicas 1 web").await;
    assert_eq!(code, 0, "{err}");
    assert!(err.ends_with(&format!("verify: Service {SERVICE_ID} converged\n")), "{err}");

    let daemon = Daemon::start();
    daemon.hold("service", [with_status(service(5, 1), "paused", "it failed")]);
    let (code, _, err) = run(&daemon, "service scale web=1").await;
    assert_eq!(
        (code, err.as_str()),
        (
            1,
            "watch out\noverall progress: 0 out of 1 tasks\nweb: service update paused: it failed\n"
        )
    );
}

#[tokio::test]
async fn a_service_without_a_name_gets_one() {
    let daemon = Daemon::start();
    let (code, _, err) = run(&daemon, "service create -d web:1").await;
    assert_eq!((code, err.as_str()), (0, ""));
    let name = daemon.asked()[0]["create"]["Name"].as_str().unwrap().to_owned();
    assert!(name.split_once('_').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty()), "{name}");
}

#[tokio::test]
async fn a_lost_race_is_run_again_and_other_refusals_are_not() {
    let daemon = Daemon::start();
    daemon.hold("service", [service(5, 1)]);
    daemon
        .table
        .lock()
        .unwrap()
        .refusals
        .push_back(tonic::Status::aborted("update out of sequence"));
    let (code, out, err) = run(&daemon, "service update -d --replicas 3 web").await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "web\n", "watch out\n"));
    assert_eq!(daemon.asked()[0]["spec"]["Mode"]["Replicated"]["Replicas"], 3);

    let refusal = tonic::Status::invalid_argument("port 80 is taken");
    daemon.table.lock().unwrap().refusals.push_back(refusal);
    let (code, out, err) = run(&daemon, "service update -d --replicas 4 web").await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(err, "Error response from daemon: port 80 is taken\n");

    let (code, _, err) = run(&daemon, "service update --rollback --image x web").await;
    assert_eq!((code, err.as_str()), (1, "other flags may not be combined with --rollback\n"));
    let (code, out, _) = run(&daemon, "service update -d --rollback web").await;
    assert_eq!((code, out.as_str()), (0, "web\n"));
    assert_eq!(daemon.asked().last().unwrap()["spec"], Value::Null);
}

#[tokio::test]
async fn scale_and_rm_go_on_after_a_failure() {
    let daemon = Daemon::start();
    daemon.hold("service", [service(5, 1)]);
    let (code, out, err) = run(&daemon, "service scale -d gone=2 web=7").await;
    assert_eq!((code, out.as_str()), (1, "web scaled to 7\n"));
    assert_eq!(err, "watch out\ngone: Error response from daemon: service gone not found\n");
    assert_eq!(daemon.asked()[0]["spec"]["Mode"]["Replicated"]["Replicas"], 7);

    let (code, out, err) = run(&daemon, "service rm gone web").await;
    assert_eq!((code, out.as_str()), (1, "web\n"));
    assert_eq!(err, "Error response from daemon: service gone not found\n");
    assert_eq!(daemon.asked().last().unwrap()["remove"], SERVICE_ID);
}

#[tokio::test]
async fn a_stack_is_deployed_whole_or_not_at_all() {
    let daemon = Daemon::start();
    let file = daemon.directory().join("stack.yml");
    let line = format!("stack deploy --prune -c {} shop", file.display());
    std::fs::write(&file, "services:\n  web:\n    imgae: web:1\n    ports: [\"80/icmp\"]\n")
        .unwrap();
    let (code, out, err) = run(&daemon, &line).await;
    assert_eq!((code, out.as_str()), (1, ""));
    let path = file.display();
    let expect = [
        format!("{path}:2: service web has no image; add 'image: NAME'"),
        format!("{path}:3: service web: key 'imgae' is unknown; did you mean 'image'?"),
        format!(
            "{path}:4: service web: key 'ports': \"80/icmp\": protocol \"icmp\" is none of tcp, udp and sctp"
        ),
    ];
    assert_eq!(err, expect.join("\n") + "\n");
    assert_eq!(daemon.asked(), Vec::<Value>::new());

    std::fs::write(&file, "services:\n  web:\n    image: web:1\n    volumes: [a:/a]\n").unwrap();
    let mut web = service(5, 1);
    web["Spec"]["Name"] = "shop_web".into();
    web["Spec"]["Labels"] = json!({"com.docker.stack.namespace": "shop"});
    daemon.hold("service", [web]);
    let (code, out, err) = run(&daemon, &line).await;
    assert_eq!(code, 0, "{err}");
    let id = SERVICE_ID;
    assert_eq!(
        out,
        format!(
            "Removing service shop_old\nCreating service shop_new\nUpdating service shop_web (id: {id})\nUnchanged service shop_db\n"
        )
    );
    assert_eq!(
        err,
        format!(
            "{path}:4: service web: key 'volumes' is not supported yet and is ignored\nimage web:1 is on one node only\nSince --detach=false was not specified, tasks will be created in the background.\n"
        )
    );
    let asked = &daemon.asked()[0];
    assert_eq!(asked["prune"], true);
    assert_eq!(asked["deploy"]["Services"][0]["Name"], "shop_web");
}

#[tokio::test]
async fn a_history_says_what_changed_and_is_gone_back_to() {
    let daemon = Daemon::start();
    let mut current = service(9, 3);
    current["Revision"] = 3.into();
    current["Spec"]["TaskTemplate"]["ContainerSpec"]["Env"] = json!(["A=B"]);
    let revision = |number: u64, replicas: u64, image: &str, replaced_at: &str| {
        let mut spec = service(number, replicas)["Spec"].clone();
        spec["TaskTemplate"]["ContainerSpec"]["Image"] = image.into();
        json!({
            "ServiceID": SERVICE_ID, "Number": number, "Spec": spec,
            "Version": {"Index": 1}, "CreatedAt": replaced_at, "UpdatedAt": replaced_at,
            "SpecVersion": {"Index": number}, "ReplacedAt": replaced_at,
        })
    };
    daemon.hold("service", [current]);
    daemon.hold(
        "revision",
        [
            revision(2, 3, "docker.io/library/web:1@sha256:ab", "2023-11-14T22:14:00Z"),
            revision(1, 2, "docker.io/library/web:0@sha256:aa", "2023-11-14T20:14:00Z"),
        ],
    );
    let format = "{{.Revision}} | {{.Replaced}} | {{.Image}} | {{.Changed}}";
    let line = format!("service history --format '{format}' web");
    let (code, out, err) = run(&daemon, &line).await;
    let expect = "\
3 | current | web:1 | Env
2 | about a minute ago | web:1 | Replicas, Image
1 | 2 hours ago | web:0 | 
";
    assert_eq!((code, out.as_str()), (0, expect), "{err}");
    let (_, out, _) = run(&daemon, "service history web").await;
    assert!(out.starts_with("REVISION   REPLACED "), "{out}");
    let (_, out, _) = run(&daemon, "service history -q web").await;
    assert_eq!(out, "3\n2\n1\n");
    run(&daemon, "service rollback -d --to 1 web").await;
    assert_eq!(daemon.asked().last().unwrap()["rollback_to"], 1);
}
