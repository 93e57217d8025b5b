//! Why tasks wait, and what a change would do: `service explain`, `--plan` and `node what-if`.

use serde_json::{Value, json};
use skep_proto::{ExplainResponse, ExplainedFilter, ExplainedTask, PlanResponse, PlannedTask};

use super::{Daemon, run};

const WEB: &str = "asv0000000000000000000000";

fn object(id: &str, fields: Value) -> Value {
    let mut object = json!({
        "ID": id, "Version": {"Index": 3},
        "CreatedAt": "2023-11-14T22:00:00Z", "UpdatedAt": "2023-11-14T22:00:00Z",
    });
    object.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    object
}

fn task_id(slot: u64) -> String {
    format!("a{slot}aaaaaaaaaaaaaaaaaaaaaaa")
}

fn waiting(slot: u64, nearest: &str) -> ExplainedTask {
    let filter = |name: &str, n_nodes, nearest: &str| ExplainedFilter {
        name: name.into(),
        n_nodes,
        nearest: nearest.into(),
    };
    ExplainedTask {
        task_id: task_id(slot),
        name: format!("web.{slot}"),
        state: "pending".into(),
        reason: format!("no suitable node (…): {nearest}"),
        filters: vec![filter("ready", 2, "n2 is down"), filter("resource", 1, nearest)],
    }
}

fn swarm() -> Daemon {
    let daemon = Daemon::start();
    let service = json!({
        "SpecVersion": {"Index": 1}, "Endpoint": {},
        "Spec": {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "web:1"}}},
    });
    daemon.hold("service", [object(WEB, service)]);
    let task = json!({
        "ServiceID": WEB, "Slot": 1, "ServiceName": "web", "Spec": {}, "SpecVersion": {"Index": 1},
        "DesiredState": "running", "Status": {"State": "pending"},
    });
    daemon.hold("task", [object(&task_id(1), task)]);
    daemon
}

#[tokio::test]
async fn tasks_that_wait_say_why_once_for_those_with_one_reason() {
    let daemon = swarm();
    let own = ExplainedTask {
        reason: "no image named web:1 in this swarm".into(),
        filters: Vec::new(),
        ..waiting(9, "")
    };
    let miss = "n1 lacks 200 MiB of memory";
    let mut tasks: Vec<ExplainedTask> = (1..=5).map(|slot| waiting(slot, miss)).collect();
    tasks.push(own);
    daemon.table.lock().unwrap().explained = ExplainResponse {
        tasks,
        notes: vec!["update paused due to failure of task x".into()],
        service_name: "web".into(),
        stale: String::new(),
    };
    let (code, out, err) = run(&daemon, "service explain web").await;
    let expect = "\
ID             NAME      STATE     REASON
a1aaaaaaaaaa   web.1     Pending   no suitable node (…): n1 lacks 200 MiB of memory
a2aaaaaaaaaa   web.2     Pending   no suitable node (…): n1 lacks 200 MiB of memory
a3aaaaaaaaaa   web.3     Pending   no suitable node (…): n1 lacks 200 MiB of memory
a4aaaaaaaaaa   web.4     Pending   no suitable node (…): n1 lacks 200 MiB of memory
a5aaaaaaaaaa   web.5     Pending   no suitable node (…): n1 lacks 200 MiB of memory
a9aaaaaaaaaa   web.9     Pending   no image named web:1 in this swarm

web.1, web.2, web.3 and 2 more:
FILTER     NODES     NEAREST
ready      2         n2 is down
resource   1         n1 lacks 200 MiB of memory
";
    assert_eq!((code, out.as_str()), (0, expect), "{err}");
    assert_eq!(err, "web: update paused due to failure of task x\n");
    assert_eq!(daemon.asked(), [json!({"explain": [WEB, ""]})]);
    let (_, out, _) = run(&daemon, "service explain --format json web").await;
    let first: Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
    assert_eq!(first["Filters"][1], json!({"Filter": "resource", "Nodes": 1, "Nearest": miss}));
}

#[tokio::test]
async fn a_task_may_be_named_instead_and_a_service_may_have_none_that_waits() {
    let daemon = swarm();
    daemon.table.lock().unwrap().explained.service_name = "web".into();
    let (code, out, err) = run(&daemon, "service explain web").await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "", "No task of web waits.\n"));
    let (code, ..) = run(&daemon, &format!("service explain {}", task_id(1))).await;
    assert_eq!((code, daemon.asked().pop()), (0, Some(json!({"explain": ["", task_id(1)]}))));
    let (code, _, err) = run(&daemon, "service explain nothing").await;
    assert_eq!((code, err.as_str()), (1, "no such service or task: nothing\n"));
}

fn planned(name: &str, from: &str, to: &str, reason: &str) -> PlannedTask {
    PlannedTask {
        name: name.into(),
        task_id: String::new(),
        from_node: from.into(),
        to_node: to.into(),
        reason: reason.into(),
    }
}

#[tokio::test]
async fn a_plan_is_a_table_and_an_exit_code() {
    let daemon = swarm();
    daemon.table.lock().unwrap().planned = PlanResponse {
        created: vec![planned("web.10", "", "n1", "")],
        moved: vec![
            planned("web.2", "n1", "n1", ""),
            planned("web.3", "n1", "n2", ""),
            planned("other.1", "", "n2", ""),
        ],
        stopped: vec![planned("web.4", "n2", "", "")],
        warnings: vec!["the swarm is not at rest".into()],
        steps: vec!["web: 2 tasks are replaced".into()],
        ..PlanResponse::default()
    };
    let (code, out, err) = run(&daemon, "service update --plan --force web").await;
    let table = "\
ACTION    NAME      FROM      TO        REASON
place     other.1             n2        
replace   web.2     n1        n1        
move      web.3     n1        n2        
stop      web.4     n2                  
create    web.10              n1        
";
    let trimmed = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.trim_end().to_owned()).collect()
    };
    assert_eq!((code, trimmed(&out)), (0, trimmed(table)), "{err}");
    assert_eq!(err, "the swarm is not at rest\nweb: 2 tasks are replaced\n");
    assert_eq!(daemon.asked(), [json!({"plan": "web", "id": WEB, "version": 3})]);
    {
        let mut table = daemon.table.lock().unwrap();
        table.planned = PlanResponse::default();
        table.planned.unplaced.push(planned("web.1", "", "", "no suitable node"));
    }
    let (code, out, err) = run(&daemon, "service create --plan=json --name web i").await;
    let row = json!({"Action": "no place", "Name": "web.1", "From": "", "To": "",
                     "Reason": "no suitable node", "Task": ""});
    assert_eq!((code, serde_json::from_str::<Value>(&out).unwrap(), err.as_str()), (2, row, ""));
    assert_eq!(daemon.asked().pop(), Some(json!({"plan": "web", "id": "", "version": 0})));
    let file = daemon.directory().join("stack.yml");
    std::fs::write(&file, "services: {a: {image: i}}\n").unwrap();
    let line = format!("stack deploy --plan --prune -c {} s", file.display());
    assert_eq!(run(&daemon, &line).await.0, 2);
    assert_eq!(daemon.asked().pop(), Some(json!({"plan": "s", "prune": true})));
}

#[tokio::test]
async fn a_plan_of_an_update_is_of_the_service_as_it_is() {
    let daemon = swarm();
    let outdated = tonic::Status::aborted("update out of sequence");
    daemon.table.lock().unwrap().refusals.push_back(outdated);
    let (code, out, err) = run(&daemon, "service update --plan --force web").await;
    let nothing = "No task would be created, moved or stopped.\n";
    assert_eq!((code, out.as_str(), err.as_str()), (0, "", nothing));
    let refused = tonic::Status::resource_exhausted("too large to plan");
    daemon.table.lock().unwrap().refusals.push_back(refused);
    let (code, _, err) = run(&daemon, "service update --plan --force web").await;
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("too large to plan"), "{err}");
}

#[tokio::test]
async fn what_would_be_lost_comes_first() {
    let daemon = swarm();
    let node = |name: &str, id: &str| {
        object(
            id,
            json!({"Number": 1, "Spec": {"Role": "worker", "Availability": "active"},
                          "Description": {"Hostname": name}, "Status": {"State": "ready"}}),
        )
    };
    let ids = ["b1aaaaaaaaaaaaaaaaaaaaaaa", "b2bbbbbbbbbbbbbbbbbbbbbbb"];
    daemon.hold("node", [node("n1", ids[0]), node("n2", ids[1])]);
    daemon.table.lock().unwrap().planned = PlanResponse {
        moved: vec![planned("web.1", "n1", "n3", "")],
        losses: vec!["image web:1: it would have no living holder".into()],
        ..PlanResponse::default()
    };
    for line in [
        "node what-if --down n1 n2",
        "node what-if --down n1 --down n2",
        "node what-if --down n1,n2",
    ] {
        let (code, out, _) = run(&daemon, line).await;
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!((code, lines.len()), (2, 3), "{line}: {out}");
        assert!(lines[1].starts_with("lose") && lines[1].ends_with("no living holder"), "{out}");
        assert_eq!(daemon.asked().pop(), Some(json!({"down": ids})), "{line}");
    }
}
