//! Who is where: `service endpoints` and `network inspect --verbose`.

use serde_json::{Value, json};

use super::{Daemon, run};

const N1: &str = "b1aaaaaaaaaaaaaaaaaaaaaaa";
const N2: &str = "b2bbbbbbbbbbbbbbbbbbbbbbb";
const WEB: &str = "asv0000000000000000000000";
const FRONT: &str = "bnet000000000000000000000";
const INGRESS: &str = "bnet111111111111111111111";

fn object(id: &str, fields: Value) -> Value {
    let mut object = json!({
        "ID": id, "Version": {"Index": 3},
        "CreatedAt": "2023-11-14T22:00:00Z", "UpdatedAt": "2023-11-14T22:00:00Z",
    });
    object.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    object
}

fn node(hostname: &str, id: &str, state: &str, address: &str) -> Value {
    let fields = json!({
        "Number": 1, "Spec": {"Role": "worker", "Availability": "active"},
        "Description": {"Hostname": hostname}, "Status": {"State": state, "Addr": address},
    });
    object(id, fields)
}

/// Slot `n` has the id `an…` and the addresses `….n`.
fn task(slot: u64, node_id: &str, state: &str, desired: &str, unhealthy: bool) -> Value {
    let fields = json!({
        "ServiceID": WEB, "Slot": slot, "NodeID": node_id, "ServiceName": "web",
        "Spec": {"ContainerSpec": {"Image": "web:1"}}, "SpecVersion": {"Index": 1},
        "DesiredState": desired, "Status": {"State": state, "Unhealthy": unhealthy},
        "NetworksAttachments": [
            {"Ingress": false, "NetworkID": FRONT, "Address": format!("10.0.0.{slot}"), "Prefix": 24, "IPv6": format!("fd00::{slot}/64")},
            {"Ingress": true, "Address": format!("10.192.8.{slot}"), "Prefix": 21},
        ],
    });
    object(&format!("a{slot}aaaaaaaaaaaaaaaaaaaaaaa"), fields)
}

fn cluster() -> Daemon {
    let daemon = Daemon::start();
    daemon
        .hold("node", [node("n1", N1, "ready", "192.0.2.1"), node("n2", N2, "down", "192.0.2.2")]);
    daemon.hold(
        "network",
        [
            object(FRONT, json!({"Spec": {"Name": "front"}, "VNI": 20480, "Subnets": []})),
            object(INGRESS, json!({"Spec": {"Name": "ingress", "Ingress": true}})),
        ],
    );
    let service = json!({
        "SpecVersion": {"Index": 1},
        "Spec": {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "web:1"}, "Networks": [{"Target": FRONT}]}},
        "Endpoint": {
            "Ports": [{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"}],
            "VirtualIPs": [{"NetworkID": FRONT, "Addr": "10.0.0.200/24"}],
        },
    });
    daemon.hold("service", [object(WEB, service)]);
    let mut pending = task(6, N1, "pending", "running", false);
    pending.as_object_mut().unwrap().remove("NodeID");
    pending.as_object_mut().unwrap().remove("NetworksAttachments");
    daemon.hold(
        "task",
        [
            task(5, N1, "starting", "running", false),
            task(1, N1, "running", "running", false),
            task(2, N1, "running", "running", true),
            task(3, N2, "running", "running", false),
            task(4, N1, "running", "shutdown", false),
            pending,
            task(7, N1, "failed", "shutdown", false),
        ],
    );
    daemon
}

#[tokio::test]
async fn endpoints_of_a_service_say_why_they_get_no_connections() {
    let daemon = cluster();
    let (code, out, err) = run(&daemon, "service endpoints web").await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "\
Virtual IPs: front=10.0.0.200
Published ports: *:8080->80/tcp

ID             NAME      NODE      STATE                 INGRESS      NETWORKS                        IN BALANCER
a1aaaaaaaaaa   web.1     n1        Running               10.192.8.1   front=10.0.0.1, front=fd00::1   yes
a2aaaaaaaaaa   web.2     n1        Running (unhealthy)   10.192.8.2   front=10.0.0.2, front=fd00::2   no: unhealthy
a3aaaaaaaaaa   web.3     n2        Running               10.192.8.3   front=10.0.0.3, front=fd00::3   no: node down
a4aaaaaaaaaa   web.4     n1        Running               10.192.8.4   front=10.0.0.4, front=fd00::4   no: draining
a5aaaaaaaaaa   web.5     n1        Starting              10.192.8.5   front=10.0.0.5, front=fd00::5   no: starting
a6aaaaaaaaaa   web.6               Pending                                                            no: pending
"
    );
    let (_, out, _) = run(
        &daemon,
        "service endpoints --no-trunc --format '{{.ID}} {{.Ports}} {{.VirtualIPs}} {{.InBalancer}}' web",
    )
    .await;
    let first = out.lines().next().unwrap();
    assert_eq!(first, "a1aaaaaaaaaaaaaaaaaaaaaaa *:8080->80/tcp front=10.0.0.200 yes");
    let (_, out, _) = run(&daemon, "service endpoints -q web").await;
    assert_eq!(out.lines().count(), 6, "a task that has ended is no endpoint: {out}");
    let (code, _, err) = run(&daemon, "service endpoints gone").await;
    assert_eq!((code, err.as_str()), (1, "Error response from daemon: service gone not found\n"));
}

#[tokio::test]
async fn a_verbose_network_says_who_is_where() {
    let daemon = cluster();
    let inspect = async |network: &str| -> Value {
        let line = format!("network inspect --verbose --format json {network}");
        let (code, out, err) = run(&daemon, &line).await;
        assert_eq!((code, err.as_str()), (0, ""));
        serde_json::from_str::<Value>(&out).unwrap()[0].clone()
    };
    let front = inspect("front").await;
    let peers = json!([{"Name": "n1", "IP": "192.0.2.1"}, {"Name": "n2", "IP": "192.0.2.2"}]);
    assert_eq!(front["Peers"], peers);
    let web = &front["Services"]["web"];
    assert_eq!(web["VIP"], "10.0.0.200");
    assert_eq!(web["Ports"], json!(["Target: 80, Publish: 8080"]));
    assert_eq!(
        web["Tasks"][2],
        json!({
            "Name": "web.3.a3aaaaaaaaaaaaaaaaaaaaaaa", "EndpointID": "a3aaaaaaaaaaaaaaaaaaaaaaa",
            "EndpointIP": "10.0.0.3", "State": "running", "Withheld": "node down",
            "Info": {"Host IP": "192.0.2.2"},
        })
    );
    let ingress = inspect("ingress").await;
    assert_eq!(ingress["Peers"], peers);
    assert_eq!(ingress["Services"]["web"]["VIP"], "", "the ingress network has no virtual address");
    assert_eq!(ingress["Services"]["web"]["Tasks"][0]["EndpointIP"], "10.192.8.1");
    assert_eq!(ingress["Containers"]["a1aaaaaaaaaaaaaaaaaaaaaaa"]["IPv4Address"], "10.192.8.1/21");
}

#[tokio::test]
async fn a_stopped_task_says_whom_nobody_waited_for() {
    let daemon = cluster();
    let mut stopped = task(8, N1, "shutdown", "shutdown", false);
    stopped["Status"]["Unacknowledged"] = json!(["n2", "n3"]);
    let mut failed = task(9, N1, "failed", "shutdown", false);
    failed["Status"]["Unacknowledged"] = json!(["n2"]);
    failed["Status"]["Err"] = json!("task: non-zero exit (1)");
    daemon.hold("task", [stopped, failed]);
    let line = "service ps --no-trunc --format '{{.Name}} {{.Error}}' web";
    let (_, out, _) = run(&daemon, line).await;
    let said: Vec<&str> = out.lines().filter(|line| line.contains('"')).collect();
    let expect = [
        "web.8 \"stopped without the acknowledgement of n2, n3\"",
        "web.9 \"task: non-zero exit (1); stopped without the acknowledgement of n2\"",
    ];
    assert_eq!(said, expect);
}

#[tokio::test]
async fn a_check_that_fails_is_a_failure() {
    let daemon = cluster();
    let (code, out, err) = run(&daemon, "network check n1 n2").await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "\
CHECK     FROM      TO        RESULT    DETAIL    WHAT TO DO
vxlan     n1        n2        ok        as seen
"
    );
    assert_eq!(daemon.asked()[0], json!({"check": [N1, N2]}));
    daemon.table.lock().unwrap().fault = "a wrong MTU".into();
    let line = "network check --format '{{.Check}} {{.Result}} {{.WhatToDo}}' n1 n2";
    let (code, out, err) = run(&daemon, line).await;
    assert_eq!((code, out.as_str()), (1, "vxlan ok \nmtu failed raise it\n"));
    assert_eq!(err, "1 of 2 checks failed between n1 and n2\n");
}
