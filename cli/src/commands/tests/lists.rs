//! Commands that show something.

use serde_json::{Value, json};
use skep_proto::LogRecord;

use super::{Daemon, run};

fn meta(mut object: Value, created_at: &str) -> Value {
    object["Version"] = json!({"Index": 3});
    object["CreatedAt"] = created_at.into();
    object["UpdatedAt"] = created_at.into();
    object
}

fn node(hostname: &str, id: &str, manager: Option<bool>) -> Value {
    let manager = manager.map(|leader| {
        json!({"RaftID": 1, "Addr": "10.0.0.1:2377", "Leader": leader, "Reachability": "reachable"})
    });
    let object = json!({
        "ID": id, "Number": 1,
        "Spec": {"Role": if manager.is_some() { "manager" } else { "worker" }, "Availability": "active", "Labels": {"disk": "ssd"}},
        "Description": {
            "Hostname": hostname, "Platform": {"Architecture": "x86_64", "OS": "linux"},
            "Resources": {"NanoCPUs": 2_000_000_000_i64, "MemoryBytes": 2_097_152_000_i64},
            "Engine": {"EngineVersion": "0.1.0"},
        },
        "Status": {"State": if hostname == "n10" { "down" } else { "ready" }, "Addr": "10.0.0.1"},
        "ManagerStatus": manager,
        "TLSStatus": "Ready",
    });
    let mut object = meta(object, "2023-11-14T22:00:00Z");
    if hostname == "n2" {
        object["Description"]["Ingress"] = json!({"Balancer": "user-space", "Reason": "no VXLAN"});
    }
    object
}

fn task(
    id: &str,
    slot: u64,
    node_id: &str,
    state: &str,
    desired: &str,
    created_at: &str,
    error: &str,
) -> Value {
    let object = json!({
        "ID": id, "ServiceID": "asv0000000000000000000000", "Slot": slot, "NodeID": node_id, "ServiceName": "web",
        "Spec": {"ContainerSpec": {"Image": "docker.io/library/web:1@sha256:ab", "Labels": {"com.docker.stack.namespace": "shop"}}},
        "SpecVersion": {"Index": 1}, "DesiredState": desired,
        "Status": {"Timestamp": created_at, "State": state, "Err": error},
    });
    meta(object, created_at)
}

const N1: &str = "b1aaaaaaaaaaaaaaaaaaaaaaa";
const N2: &str = "b2bbbbbbbbbbbbbbbbbbbbbbb";
const N10: &str = "b3ccccccccccccccccccccccc";

fn cluster() -> Daemon {
    let daemon = Daemon::start();
    daemon.hold(
        "node",
        [node("n10", N10, None), node("n2", N2, Some(false)), node("n1", N1, Some(true))],
    );
    let service = json!({
        "ID": "asv0000000000000000000000", "SpecVersion": {"Index": 1},
        "Spec": {
            "Name": "web", "Labels": {"com.docker.stack.namespace": "shop"},
            "TaskTemplate": {"ContainerSpec": {"Image": "docker.io/library/web:1@sha256:ab"}},
            "Mode": {"Replicated": {"Replicas": 2}},
        },
        "Endpoint": {"Ports": [{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"}]},
    });
    daemon.hold("service", [meta(service, "2023-11-14T22:00:00Z")]);
    daemon.hold(
        "task",
        [
            task(
                "a2aaaaaaaaaaaaaaaaaaaaaaa",
                2,
                N2,
                "running",
                "running",
                "2023-11-14T22:14:57Z",
                "",
            ),
            task(
                "a1aaaaaaaaaaaaaaaaaaaaaaa",
                1,
                N1,
                "failed",
                "shutdown",
                "2023-11-14T22:10:00Z",
                "task: non-zero exit (137): out of memory",
            ),
            task(
                "a1bbbbbbbbbbbbbbbbbbbbbbb",
                1,
                N1,
                "starting",
                "running",
                "2023-11-14T22:14:00Z",
                "",
            ),
        ],
    );
    daemon
}

#[tokio::test]
async fn what_keeps_a_service_from_being_reached_is_said_beside_the_lists() {
    let daemon = Daemon::start();
    let message = "port 80/tcp on n1 is held by nginx (pid 8): stop it or publish another port";
    let service = json!({
        "ID": "asv0000000000000000000000", "SpecVersion": {"Index": 1},
        "Spec": {
            "Name": "web", "Labels": {"com.docker.stack.namespace": "shop"},
            "TaskTemplate": {"ContainerSpec": {"Image": "web:1"}},
        },
        "Conditions": [
            {"NodeID": N1, "Protocol": "tcp", "PublishedPort": 80, "Message": message},
        ],
    });
    daemon.hold("service", [meta(service, "2023-11-14T22:00:00Z")]);
    for command in ["service ls", "service ps web", "stack services shop"] {
        let (code, out, err) = run(&daemon, command).await;
        assert_eq!((code, err), (0, format!("WARNING: web: {message}\n")), "{command}: {out}");
        assert!(!out.contains("held"), "{command}: a list is data: {out}");
        let (code, _, err) = run(&daemon, &format!("{command} -q")).await;
        assert_eq!((code, err.as_str()), (0, ""), "{command}");
    }
    let (_, out, _) = run(&daemon, "service ls --format '{{.Conditions}}'").await;
    assert_eq!(out, format!("{message}\n"));
    let (_, out, _) = run(&daemon, "service inspect --pretty web").await;
    assert!(out.contains(&format!("Conditions:\n {message}\n")), "{out}");
}

#[track_caller]
fn check((code, out, err): (u8, String, String), expect: &str) {
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(out, expect);
}

#[tokio::test]
async fn nodes() {
    let daemon = cluster();
    check(
        run(&daemon, "node ls").await,
        "\
ID                            HOSTNAME   STATUS    AVAILABILITY   MANAGER STATUS   ENGINE VERSION
b1aaaaaaaaaaaaaaaaaaaaaaa *   n1         Ready     Active         Leader           0.1.0
b2bbbbbbbbbbbbbbbbbbbbbbb     n2         Ready     Active         Reachable        0.1.0
b3ccccccccccccccccccccccc     n10        Down      Active                          0.1.0
",
    );
    check(
        run(&daemon, "node ls --filter role=worker --format json").await,
        "{\"Availability\":\"Active\",\"EngineVersion\":\"0.1.0\",\"Hostname\":\"n10\",\"ID\":\"b3ccccccccccccccccccccccc\",\"ManagerStatus\":\"\",\"Self\":false,\"Status\":\"Down\",\"TLSStatus\":\"Ready\"}\n",
    );
    check(
        run(&daemon, "node ls -q --filter node.label=disk=ssd --filter name=n1").await,
        &format!("{N1}\n{N10}\n"),
    );
    check(
        run(&daemon, r"node ls --format 'table {{.Hostname}}\t{{.ManagerStatus}}'").await,
        "HOSTNAME   MANAGER STATUS\nn1         Leader\nn2         Reachable\nn10\n",
    );
    check(run(&daemon, "node inspect self --format '{{.Description.Hostname}}'").await, "n1\n");
    check(
        run(&daemon, "node inspect --pretty n1").await,
        "ID:\t\t\tb1aaaaaaaaaaaaaaaaaaaaaaa\nLabels:\n - disk=ssd\nHostname:              \tn1\nJoined at:             \t2023-11-14T22:00:00Z\nStatus:\n State:\t\t\tReady\n Availability:         \tActive\n Address:\t\t10.0.0.1\nManager Status:\n Address:\t\t10.0.0.1:2377\n Raft Status:\t\tReachable\n Leader:\t\tYes\nPlatform:\n Operating System:\tlinux\n Architecture:\t\tx86_64\nResources:\n CPUs:\t\t\t2\n Memory:\t\t1.953GiB\nEngine Version:\t\t0.1.0\n\n",
    );
    let (_, out, _) = run(&daemon, "node inspect --pretty n2").await;
    let ingress = "Ingress:\n Balancer:\t\tuser-space\n Reason:\t\tno VXLAN\n";
    assert!(out.contains(ingress), "{out}");
    check(
        run(&daemon, "node inspect n2 --format '{{.Description.Ingress.Balancer}}'").await,
        "user-space\n",
    );
    check(run(&daemon, "node ps -q").await, "a1bbbbbbbbbb\na1aaaaaaaaaa\n");
    check(
        run(&daemon, "node update --availability drain --label-add a=b --label-rm disk n2").await,
        "n2\n",
    );
    assert_eq!(
        daemon.asked()[0]["spec"],
        json!({"Role": "manager", "Availability": "drain", "Labels": {"a": "b"}})
    );
    check(
        run(&daemon, "node promote n2 n10").await,
        "Node n2 is already a manager.\nNode n10 promoted to a manager in the swarm.\n",
    );
    check(run(&daemon, "node rm --force n10").await, "n10\n");
    let (code, out, err) = run(&daemon, "node rm n2 gone").await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        err,
        "Error response from daemon: node n2 is not down and can't be removed\nError response from daemon: node gone not found\n"
    );
}

#[tokio::test]
async fn services_and_tasks() {
    let daemon = cluster();
    check(
        run(&daemon, "service ls").await,
        "\
ID             NAME      MODE         REPLICAS   IMAGE     PORTS
asv000000000   web       replicated   1/2        web:1     *:8080->80/tcp
",
    );
    check(
        run(&daemon, "service ls --format json").await,
        "{\"Conditions\":\"\",\"ID\":\"asv000000000\",\"Image\":\"web:1\",\"Mode\":\"replicated\",\"Name\":\"web\",\"Ports\":\"*:8080->80/tcp\",\"Replicas\":\"1/2\"}\n",
    );
    check(run(&daemon, "service ls -q --filter name=x").await, "");
    check(
        run(&daemon, "service ps web").await,
        "\
ID             NAME        IMAGE     NODE      DESIRED STATE   CURRENT STATE                 ERROR                              PORTS
a1bbbbbbbbbb   web.1       web:1     n1        Running         Starting about a minute ago
a1aaaaaaaaaa    \\_ web.1   web:1     n1        Shutdown        Failed 5 minutes ago          \"task: non-zero exit (137): ou…\"
a2aaaaaaaaaa   web.2       web:1     n2        Running         Running 3 seconds ago
",
    );
    check(run(&daemon, "service ps web --no-trunc --filter desired-state=shutdown --format '{{.ID}} {{.Image}} {{.Error}}'").await,
        "a1aaaaaaaaaaaaaaaaaaaaaaa docker.io/library/web:1@sha256:ab \"task: non-zero exit (137): out of memory\"\n");
    check(
        run(&daemon, "service ps web --filter node=n2 --format json").await,
        "{\"CurrentState\":\"Running 3 seconds ago\",\"DesiredState\":\"Running\",\"Error\":\"\",\"ID\":\"a2aaaaaaaaaa\",\"Image\":\"web:1\",\"Name\":\"web.2\",\"Node\":\"n2\",\"Ports\":\"\",\"Slot\":2}\n",
    );
    let (code, out, err) = run(&daemon, "service ps -q gone web").await;
    assert_eq!(
        (code, out.as_str(), err.as_str()),
        (1, "a1bbbbbbbbbb\na1aaaaaaaaaa\na2aaaaaaaaaa\n", "no such service: gone\n")
    );
    check(
        run(&daemon, "service inspect web --format '{{.Spec.Name}} {{json .Spec.Mode}}'").await,
        "web {\"Replicated\":{\"Replicas\":2}}\n",
    );
    check(
        run(&daemon, "service inspect --pretty web").await,
        "\nID:\t\tasv0000000000000000000000\nName:\t\tweb\nLabels:\n com.docker.stack.namespace=shop\nService Mode:\tReplicated\n Replicas:\t2\nPlacement:\nContainerSpec:\n Image:\t\tdocker.io/library/web:1@sha256:ab\nEndpoint Mode:\tvip\nPorts:\n PublishedPort = 8080\n  Protocol = tcp\n  TargetPort = 80\n  PublishMode = ingress\n\n",
    );
    let (code, out, err) = run(&daemon, "service inspect gone").await;
    assert_eq!(
        (code, out.as_str(), err.as_str()),
        (1, "[]\n", "Error response from daemon: service gone not found\n")
    );
    let (_, _, err) = run(&daemon, "service ls --filter colour=red").await;
    assert_eq!(err, "invalid filter 'colour': use one of id, name, label, mode\n");
}

#[tokio::test]
async fn stacks() {
    let daemon = cluster();
    check(run(&daemon, "stack ls").await, "NAME      SERVICES\nshop      1\n");
    check(
        run(&daemon, "stack services shop --format '{{.Name}} {{.Replicas}}'").await,
        "web 1/2\n",
    );
    check(run(&daemon, "stack ps shop -q").await, "a1bbbbbbbbbb\na1aaaaaaaaaa\na2aaaaaaaaaa\n");
    let (code, _, err) = run(&daemon, "stack ps gone").await;
    assert_eq!((code, err.as_str()), (1, "nothing found in stack: gone\n"));
    let (code, out, err) = run(&daemon, "stack rm gone shop").await;
    assert_eq!(
        (code, out.as_str(), err.as_str()),
        (0, "Removing service shop_web\n", "Nothing found in stack: gone\n")
    );
}

fn record(task_id: &str, node_id: &str, stderr: bool, line: &str, error: &str) -> LogRecord {
    LogRecord {
        task_id: task_id.into(),
        node_id: node_id.into(),
        service_id: "asv0000000000000000000000".into(),
        time_nanos: 1_700_000_000_000_000_001,
        stderr,
        line: line.to_owned().into(),
        error: error.into(),
        behind: None,
    }
}

#[tokio::test]
async fn logs() {
    let daemon = cluster();
    daemon.table.lock().unwrap().logs = vec![
        record("a2aaaaaaaaaaaaaaaaaaaaaaa", N2, false, "hello\n", ""),
        record("a1bbbbbbbbbbbbbbbbbbbbbbb", N1, true, "oops", ""),
    ];
    let (code, out, err) = run(&daemon, "service logs --tail 5 --since 1m web").await;
    assert_eq!(
        (code, out.as_str(), err.as_str()),
        (0, "web.2.a2aaaaaaaaaa@n2    | hello\n", "web.1.a1bbbbbbbbbb@n1    | oops\n")
    );
    assert_eq!(
        daemon.asked()[0],
        json!({"tail": 5, "since": 1_700_000_040_000_000_000_i64, "follow": false})
    );
    let (_, out, err) = run(&daemon, "service logs --raw -t web").await;
    assert_eq!(
        (out.as_str(), err.as_str()),
        ("2023-11-14T22:13:20.000000001Z hello\n", "2023-11-14T22:13:20.000000001Z oops")
    );
    let (_, out, _) = run(&daemon, "service logs --no-task-ids --no-resolve web").await;
    assert_eq!(out, format!("asv0000000000000000000000.2@{N2}    | hello\n"));
    let (code, _, err) = run(&daemon, "service logs gone").await;
    assert_eq!((code, err.as_str()), (1, "no such task or service: gone\n"));

    daemon.table.lock().unwrap().logs =
        vec![record("a2aaaaaaaaaaaaaaaaaaaaaaa", N2, false, "", "node n2 is down")];
    let (code, out, err) = run(&daemon, "service logs a2aa").await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.starts_with("web.2.a2aaaaaaaaaa@n2: node n2 is down\n"), "{err}");
}

#[tokio::test]
async fn images() {
    let daemon = cluster();
    daemon.hold("image", [meta(json!({
        "ID": "cmg0000000000000000000000", "Name": "docker.io/library/web:1", "Digest": "sha256:0123456789abcdef",
        "Size": 7_340_032, "Created": "2023-11-14T21:15:00Z", "Holders": [N1],
    }), "2023-11-14T22:00:00Z")]);
    check(
        run(&daemon, "image ls").await,
        "\
REPOSITORY   TAG       IMAGE ID       CREATED             SIZE
web          1         0123456789ab   About an hour ago   7.34MB
",
    );
    let archive: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let path = daemon.directory().join("web.tar");
    std::fs::write(&path, &archive).unwrap();
    check(
        run(&daemon, &format!("image load -i {}", path.display())).await,
        "Loaded image: web:1\n",
    );
    assert!(daemon.table.lock().unwrap().archive == archive, "every byte in order");
    check(
        run(&daemon, &format!("image import -c 'CMD /web' {} web:2", path.display())).await,
        "sha256:abc\n",
    );
    assert_eq!(
        daemon.asked()[1],
        json!({"import": true, "name": "web:2", "changes": ["CMD /web"]})
    );
    let (code, _, err) = run(&daemon, "image load -i /nonexistent.tar").await;
    assert_eq!(
        (code, err.as_str()),
        (1, "failed to open /nonexistent.tar: No such file or directory (os error 2)\n")
    );
}

#[tokio::test]
async fn what_is_not_named_of_the_swarms_settings_stays() {
    let daemon = Daemon::start();
    daemon.hold(
        "cluster",
        [json!({
            "ID": "0000000000000000000000001", "Version": {"Index": 7},
            "Spec": {"Name": "default", "Orchestration": {"TaskHistoryRetentionLimit": 2}},
        })],
    );
    let (code, _, err) = run(&daemon, "swarm update").await;
    assert_eq!(code, 1);
    assert!(err.contains("nothing to update"), "{err}");
    let raced = tonic::Status::aborted("update out of sequence");
    daemon.table.lock().unwrap().refusals.push_back(raced);
    check(
        run(&daemon, "swarm update --cert-expiry 48h --dispatcher-heartbeat 5s --max-snapshots 2 --snapshot-interval 500 --placement-strategy binpack").await,
        "Swarm updated.\n",
    );
    let spec = "{\"Name\":\"default\",\"Orchestration\":{\"TaskHistoryRetentionLimit\":2,\"Strategy\":\"binpack\"},\"CAConfig\":{\"NodeCertExpiry\":172800000000000},\"Raft\":{\"SnapshotInterval\":500,\"KeepOldSnapshots\":2},\"Dispatcher\":{\"HeartbeatPeriod\":5000000000}}";
    let asked = json!({"version": 7, "spec": spec});
    assert_eq!(daemon.asked(), [asked.clone(), asked], "it is asked again after a race");
}

#[tokio::test]
async fn the_root_is_shown_and_changed() {
    let daemon = Daemon::start();
    let spec = json!({"Name": "default"});
    daemon.hold(
        "cluster",
        [json!({"ID": "c", "Version": {"Index": 7}, "Spec": spec, "RootCaCert": "PEM\n"})],
    );
    check(run(&daemon, "swarm ca").await, "PEM\n");
    check(run(&daemon, "swarm ca --rotate --detach").await, "");
    check(run(&daemon, "swarm ca --rotate --cert-expiry 2h").await, "PEM\n");
    for (name, text) in [("cert", "the cert"), ("key", "the key")] {
        std::fs::write(daemon.directory().join(name), text).unwrap();
    }
    let path = |name: &str| daemon.directory().join(name).display().to_string();
    let line = format!("swarm ca --rotate -d --ca-cert {} --ca-key {}", path("cert"), path("key"));
    check(run(&daemon, &line).await, "");
    let asked = daemon.asked();
    assert_eq!(asked[0], json!({"rotate": "", "key": ""}));
    assert!(asked[1]["spec"].to_string().contains("7200000000000"), "{}", asked[1]);
    assert_eq!(asked[3], json!({"rotate": "the cert", "key": "the key"}));
    let (code, _, err) = run(&daemon, "swarm ca --rotate --ca-cert /no --ca-key /no").await;
    assert_eq!(code, 1);
    assert!(err.contains("failed to read /no"), "{err}");
}

#[tokio::test]
async fn the_unlock_key_is_shown_when_managers_start_locked_from_now_on() {
    let daemon = Daemon::start();
    let lock = |is_locked: bool| {
        json!({"Version": {"Index": 7}, "ID": "c", "Spec": {
            "Name": "default", "EncryptionConfig": {"AutoLockManagers": is_locked},
        }})
    };
    daemon.hold("cluster", [lock(false)]);
    let (code, out, _) = run(&daemon, "swarm update --autolock").await;
    assert_eq!(code, 0);
    assert!(out.starts_with("Swarm updated.\n\nTo unlock") && out.contains("SWMKEY-1-k"), "{out}");
    assert!(daemon.asked()[0]["spec"].to_string().contains("AutoLockManagers\\\":true"));
    check(run(&daemon, "swarm update --autolock=false").await, "Swarm updated.\n");
    check(run(&daemon, "swarm unlock-key -q").await, "SWMKEY-1-k\n");
    check(run(&daemon, "swarm unlock-key -q --rotate").await, "SWMKEY-1-k\n");
    assert_eq!(daemon.asked()[2]["rotate"], true);
    daemon.table.lock().unwrap().objects.clear();
    daemon.hold("cluster", [lock(true)]);
    check(run(&daemon, "swarm update --autolock").await, "Swarm updated.\n");
    let (_, out, _) = run(&daemon, "swarm unlock-key --rotate").await;
    assert!(out.starts_with("Successfully rotated manager unlock key.\n\nTo unlock"), "{out}");
}

#[tokio::test]
async fn the_swarm_and_this_machine() {
    let daemon = cluster();
    check(
        run(&daemon, "swarm init --advertise-addr 10.0.0.1 --task-history-limit 2 --default-addr-pool 172.16.0.0/14 --default-addr-pool 172.20.0.0/16 --default-addr-pool-mask-length 24").await,
        "Swarm initialized: current node (node1) is now a manager.\n\nTo add a worker to this swarm, run the following command:\n\n    skep swarm join --token SWMTKN-1-w 10.0.0.1:2377\n\nTo add a manager to this swarm, run 'skep swarm join-token manager' and follow the instructions.\n",
    );
    assert_eq!(
        daemon.asked()[0],
        json!({
            "advertise": "10.0.0.1", "listen": "0.0.0.0:2377", "availability": "active", "pool": "",
            "pools": ["172.16.0.0/14", "172.20.0.0/16"], "subnet_size": 24,
            "spec": "{\"Name\":\"default\",\"Orchestration\":{\"TaskHistoryRetentionLimit\":2}}",
        })
    );
    check(
        run(&daemon, "swarm join --token SWMTKN-1-w 10.0.0.1:2377").await,
        "This node joined a swarm as a worker.\n",
    );
    check(run(&daemon, "swarm join-token -q manager").await, "SWMTKN-1-manager\n");
    check(
        run(&daemon, "swarm join-token --rotate worker").await,
        "Successfully rotated worker join token.\n\nTo add a worker to this swarm, run the following command:\n\n    skep swarm join --token SWMTKN-1-worker 10.0.0.1:2377\n\n",
    );
    let (code, _, err) = run(&daemon, "swarm leave").await;
    assert_eq!(
        (code, err.as_str()),
        (1, "Error response from daemon: You are attempting to leave the swarm on a manager.\n")
    );
    check(run(&daemon, "swarm leave --force").await, "Node left the swarm.\n");
    check(
        run(&daemon, "debug digest").await,
        "NODE ID   HOSTNAME   VERSION   DIGEST    ERROR\nid-n1     n1         7         aa\nid-n2     n2         7         aa\n",
    );
    check(
        run(&daemon, "info --format '{{.Swarm.NodeID}} {{.Swarm.ControlAvailable}}'").await,
        "node1 true\n",
    );
    let (code, out, err) = run(&daemon, "info").await;
    assert_eq!((code, err.as_str()), (0, "WARNING: no IPv6\n"));
    assert!(out.contains("Swarm: active\n NodeID: node1\n Is Manager: true\n"), "{out}");
    daemon.table.lock().unwrap().fault = "node.json is damaged".into();
    let (_, out, _) = run(&daemon, "info").await;
    assert!(out.contains("Swarm: error\n Error: node.json is damaged\n"), "{out}");
    check(
        run(&daemon, "info --format '{{.Swarm.LocalNodeState}}: {{.Swarm.Error}}'").await,
        "error: node.json is damaged\n",
    );
    let (_, out, _) = run(&daemon, "version").await;
    assert!(out.ends_with("\nServer:\n Version: 9.9.9\n"), "{out}");
    let (_, out, _) = run(&daemon, "completion fish").await;
    assert!(out.contains("complete -c skep"), "{out}");
}

#[tokio::test]
async fn global_services_are_counted_and_named_by_nodes() {
    let daemon = Daemon::start();
    daemon.hold("node", [node("n1", N1, Some(true)), node("n2", N2, None)]);
    let service = json!({
        "ID": "asv0000000000000000000000", "SpecVersion": {"Index": 1},
        "Spec": {
            "Name": "agent", "TaskTemplate": {"ContainerSpec": {"Image": "agent:1"}},
            "Mode": {"Global": {}},
        },
    });
    daemon.hold("service", [meta(service, "2023-11-14T22:00:00Z")]);
    let on = |id: &str, node: &str, state: &str, desired: &str| {
        let mut task = task(id, 0, node, state, desired, "2023-11-14T22:14:57Z", "");
        task["PresetNodeID"] = json!(node);
        task["ServiceName"] = json!("agent");
        task
    };
    daemon.hold(
        "task",
        [
            on("a1aaaaaaaaaaaaaaaaaaaaaaa", N1, "running", "running"),
            on("a2aaaaaaaaaaaaaaaaaaaaaaa", N2, "preparing", "running"),
            on("a3aaaaaaaaaaaaaaaaaaaaaaa", N10, "running", "shutdown"),
        ],
    );
    let (_, out, _) = run(&daemon, "service ls --format '{{.Mode}}:{{.Replicas}}'").await;
    assert_eq!(out, "global:1/2\n");
    let (_, out, _) = run(&daemon, "service ps --format '{{.Name}}' agent").await;
    let mut names: Vec<&str> = out.lines().collect();
    names.sort_unstable();
    let mut expect = [N1, N2, N10].map(|node| format!("agent.{node}"));
    expect.sort_unstable();
    assert_eq!(names, expect);
}

#[tokio::test]
async fn an_object_of_any_kind_is_inspected_by_what_names_it() {
    let daemon = cluster();
    let missing = "Error: No such object: nothing\n";
    let no_node = "Error: No such node: web\n";
    for (command, code, ids, err) in [
        ("inspect web", 0, vec!["asv0000000000000000000000"], ""),
        ("inspect a1bbbbbbbbbbbbbbbbbbbbbbb n1", 0, vec!["a1bbbbbbbbbbbbbbbbbbbbbbb", N1], ""),
        ("inspect nothing n2", 1, vec![N2], missing),
        ("inspect --type node web", 1, vec![], no_node),
    ] {
        let (exit, out, told) = run(&daemon, command).await;
        let documents: Vec<Value> = serde_json::from_str(&out).unwrap();
        let found: Vec<&str> =
            documents.iter().map(|document| document["ID"].as_str().unwrap()).collect();
        assert_eq!((exit, found, told.as_str()), (code, ids, err), "{command}");
    }
    let (_, out, _) = run(&daemon, "inspect --format {{.Spec.Name}} web").await;
    assert_eq!(out, "web\n");
}
