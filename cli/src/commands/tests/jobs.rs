//! Jobs: what waiting for one shows, and how lists count their tasks.

use serde_json::{Value, json};

use super::{Daemon, run};

const SERVICE_ID: &str = "asv0000000000000000000000";

/// A job of its second iteration.
fn job(mode: &Value) -> Value {
    json!({
        "ID": SERVICE_ID,
        "Version": {"Index": 2}, "CreatedAt": "2023-11-14T22:00:00Z", "UpdatedAt": "2023-11-14T22:00:00Z",
        "Spec": {
            "Name": "job", "TaskTemplate": {"ContainerSpec": {"Image": "job:1"}}, "Mode": mode,
        },
        "SpecVersion": {"Index": 2},
        "JobStatus": {"JobIteration": {"Index": 2}, "LastExecution": "2023-11-14T22:00:00Z"},
    })
}

fn replicated(total: u64, concurrent: u64) -> Value {
    job(&json!({"ReplicatedJob": {"TotalCompletions": total, "MaxConcurrent": concurrent}}))
}

fn task(slot: u64, attempt: u64, iteration: u64, state: &str, desired: &str) -> Value {
    let err = if state == "failed" { "task: non-zero exit (3)" } else { "" };
    json!({
        "ID": format!("atsk{slot}{iteration}{attempt}000000000000000000"),
        "Version": {"Index": 9}, "CreatedAt": format!("2023-11-14T22:00:0{attempt}Z"),
        "UpdatedAt": "2023-11-14T22:00:00Z",
        "Spec": {"ContainerSpec": {"Image": "job:1"}},
        "SpecVersion": {"Index": iteration}, "JobIteration": {"Index": iteration},
        "ServiceID": SERVICE_ID, "Slot": slot,
        "Status": {"Timestamp": "2023-11-14T22:00:00Z", "State": state, "Err": err},
        "DesiredState": desired, "ServiceName": "job",
    })
}

#[tokio::test]
async fn a_job_is_waited_for_until_all_of_it_is_done() {
    let daemon = Daemon::start();
    daemon.play("service", [replicated(2, 1)]);
    daemon
        .play("task", [task(0, 1, 1, "complete", "remove"), task(0, 1, 2, "running", "complete")]);
    daemon.play("task", [task(0, 1, 2, "failed", "shutdown"), task(0, 2, 2, "ready", "ready")]);
    daemon.play("task", [task(0, 2, 2, "complete", "complete")]);
    daemon.play("task", [task(1, 1, 2, "complete", "complete")]);
    let line =
        "service create --name job --mode replicated-job --replicas 2 --max-concurrent 1 job:1";
    let (code, out, err) = run(&daemon, line).await;
    assert_eq!((code, out.as_str()), (0, &*format!("{SERVICE_ID}\n")), "{err}");
    let expect = "\
job progress: 0 out of 2 complete
active tasks: 0 out of 1 tasks
active tasks: 1 out of 1 tasks
1/2: running
active tasks: 0 out of 1 tasks
1/2: task: non-zero exit (3)
1/2: ready
job progress: 1 out of 2 complete
1/2: complete
job progress: 2 out of 2 complete
active tasks: 0 out of 0 tasks
2/2: complete
job complete
";
    assert_eq!(err, expect);
}

#[tokio::test]
async fn a_job_that_failed_for_good_is_a_failure() {
    let daemon = Daemon::start();
    daemon.play("service", [replicated(2, 2)]);
    daemon.play("task", [task(0, 1, 2, "complete", "complete")]);
    daemon.play("task", [task(1, 1, 2, "failed", "shutdown")]);
    let (code, _, err) = run(&daemon, "service create --mode replicated-job job:1").await;
    let expect = "1 of 2 tasks of the job failed for good: job.1: task: non-zero exit (3)";
    assert_eq!((code, err.contains(expect)), (1, true), "{err}");
}

#[tokio::test]
async fn a_list_counts_what_runs_and_what_has_completed() {
    let preset = |node: &str, mut task: Value| {
        task["PresetNodeID"] = node.into();
        task
    };
    let tasks = [
        task(0, 1, 2, "complete", "complete"),
        task(1, 1, 2, "running", "complete"),
        task(2, 1, 2, "preparing", "complete"),
        task(4, 1, 1, "running", "remove"),
    ];
    let nodes = ["b1aaaaaaaaaaaaaaaaaaaaaaa", "b2bbbbbbbbbbbbbbbbbbbbbbb"];
    let of_nodes = [
        preset(nodes[0], task(0, 1, 2, "complete", "complete")),
        preset(nodes[1], task(0, 2, 2, "running", "complete")),
    ];
    for (service, tasks, expect) in [
        (replicated(6, 2), tasks.to_vec(), "replicated job 1/2 (1/6 completed)\n"),
        (job(&json!({"GlobalJob": {}})), of_nodes.to_vec(), "global job 1/1 (1/2 completed)\n"),
    ] {
        let daemon = Daemon::start();
        daemon.hold("service", [service]);
        daemon.hold("task", tasks);
        let line = "service ls --format '{{.Mode}} {{.Replicas}}'";
        let (code, out, err) = run(&daemon, line).await;
        assert_eq!((code, out.as_str()), (0, expect), "{err}");
    }
}

#[tokio::test]
async fn a_job_is_scaled_by_what_shall_complete() {
    let daemon = Daemon::start();
    daemon.hold("service", [replicated(2, 2)]);
    let (code, out, err) = run(&daemon, "service scale -d job=5").await;
    assert_eq!((code, out.as_str()), (0, "job scaled to 5\n"), "{err}");
    let expect = json!({"ReplicatedJob": {"TotalCompletions": 5, "MaxConcurrent": 2}});
    assert!(daemon.asked().iter().any(|asked| asked.to_string().contains(&expect.to_string())));

    let daemon = Daemon::start();
    daemon.hold("service", [job(&json!({"GlobalJob": {}}))]);
    let (code, _, err) = run(&daemon, "service scale -d job=5").await;
    let expect = "job: scale can only be used with replicated or replicated-job mode";
    assert_eq!((code, err.contains(expect)), (1, true), "{err}");
}
