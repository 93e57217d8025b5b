//! A JSON document of each kind of object reads and writes back as it was: Docker's fields under
//! Docker's names, absent ones absent, unknown ones kept.

use serde_json::Value;
use skep_common::Object;

#[test]
fn a_document_of_each_kind_comes_back_as_it_went_in() {
    let text = include_str!("golden/objects.json");
    let documents: Vec<Value> = serde_json::from_str(text).unwrap();
    let mut kinds = std::collections::BTreeSet::new();
    for document in documents {
        let object: Object = serde_json::from_value(document.clone()).unwrap();
        kinds.insert(object.kind());
        assert_eq!(serde_json::to_value(&object).unwrap(), document);
    }
    assert_eq!(kinds.len(), 10, "a kind has no document: {kinds:?}");
}

#[test]
fn absent_differs_from_zero_and_empty() {
    let absent = r#"{"Name":"a","TaskTemplate":{}}"#;
    let given = r#"{"EndpointSpec":{"Ports":[]},"Labels":{},"Mode":{"Replicated":{"Replicas":0}},"Name":"a","TaskTemplate":{"ContainerSpec":{"Env":[],"StopGracePeriod":0},"ForceUpdate":0,"RestartPolicy":{"MaxAttempts":0}},"UpdateConfig":{"Parallelism":0}}"#;
    for text in [absent, given] {
        let spec: skep_common::spec::ServiceSpec = serde_json::from_str(text).unwrap();
        let back: Value = serde_json::to_value(&spec).unwrap();
        assert_eq!(back, serde_json::from_str::<Value>(text).unwrap());
    }
}

#[track_caller]
fn check<T: serde::Serialize + serde::de::DeserializeOwned>(document: &Value) {
    let value: T = serde_json::from_value(document.clone()).expect("it is read");
    assert_eq!(serde_json::to_value(&value).expect("it is written"), *document);
}

/// Each with Docker's field names; those of ours beside them.
#[test]
fn the_fields_of_the_whole_control_plane_come_back_as_they_went_in() {
    use skep_common::spec::{ConfigSpec, SecretSpec, ServiceSpec, SwarmSpec};
    let id = "5555555555555555555555555";
    for mode in [
        serde_json::json!({"Global": {}}),
        serde_json::json!({"ReplicatedJob": {"MaxConcurrent": 2, "TotalCompletions": 6}}),
        serde_json::json!({"GlobalJob": {}}),
    ] {
        check::<ServiceSpec>(&serde_json::json!({"Name": "a", "Mode": mode, "TaskTemplate": {}}));
    }
    check::<ServiceSpec>(&serde_json::json!({
        "Name": "a",
        "UpdateConfig": {"ProgressDeadline": 60_000_000_000_u64},
        "TaskTemplate": {
            "Placement": {
                "Preferences": [{"Spread": {"SpreadDescriptor": "node.labels.zone"}}],
                "Strategy": "binpack",
            },
            "Resources": {"Reservations": {"GenericResources": [
                {"NamedResourceSpec": {"Kind": "GPU", "Value": "UUID1"}},
                {"DiscreteResourceSpec": {"Kind": "SSD", "Value": 3}},
            ]}},
            "ContainerSpec": {
                "Secrets": [{
                    "File": {"Name": "s", "UID": "0", "GID": "0", "Mode": 292},
                    "SecretID": id, "SecretName": "s", "Version": 2, "Pinned": true,
                }],
                "Configs": [{"Runtime": {}, "ConfigID": id, "ConfigName": "c"}],
            },
        },
    }));
    check::<SwarmSpec>(&serde_json::json!({
        "Name": "default",
        "Orchestration": {"TaskHistoryRetentionLimit": 5, "Strategy": "spread"},
        "Raft": {"SnapshotInterval": 10_000, "KeepOldSnapshots": 0, "ElectionTick": 10},
        "Dispatcher": {"HeartbeatPeriod": 5_000_000_000_u64},
        "TaskDefaults": {"LogDriver": {"Name": "json-file"}},
        "EncryptionConfig": {"AutoLockManagers": true},
        "CAConfig": {"ForceRotate": 1, "SigningCACert": "PEM", "SigningCAKey": "PEM"},
    }));
    let driver = serde_json::json!({"Name": "golang"});
    check::<SecretSpec>(
        &serde_json::json!({"Name": "s", "Data": "aGk=", "Driver": driver, "Templating": driver}),
    );
    check::<ConfigSpec>(&serde_json::json!({"Name": "c", "Data": "", "Templating": driver}));
}

#[test]
fn the_objects_of_the_whole_control_plane_come_back_as_they_went_in() {
    use skep_common::object::{Cluster, Config, NodeDescription, Revision, Secret, Service, Task};
    let id = "5555555555555555555555555";
    let meta = |rest: Value| {
        let mut whole = serde_json::json!({
            "ID": id, "Version": {"Index": 7}, "CreatedAt": "2026-01-02T03:04:05Z",
            "UpdatedAt": "2026-01-02T03:04:06Z",
        });
        whole.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        whole
    };
    let versions = serde_json::json!({
        "1": {"CreatedAt": "2026-01-02T03:04:05Z", "Data": "aGk=", "Digest": "sha256:00"},
        "2": {"CreatedAt": "2026-01-02T03:04:05Z", "Digest": "sha256:00"},
    });
    check::<Secret>(&meta(serde_json::json!({"Spec": {"Name": "s"}, "Versions": versions})));
    check::<Config>(&meta(serde_json::json!({"Spec": {"Name": "c"}, "Versions": versions})));
    check::<NodeDescription>(&serde_json::json!({
        "Hostname": "n", "Platform": {"Architecture": "", "OS": ""}, "Resources": {},
        "Engine": {"EngineVersion": ""},
        "TLSInfo": {"TrustRoot": "PEM", "CertIssuerSubject": "MA==", "CertIssuerPublicKey": "MA=="},
    }));
    check::<Cluster>(&meta(serde_json::json!({
        "Spec": {"Name": "default"}, "JoinTokens": {"Worker": "w", "Manager": "m"},
        "RootCaCert": "PEM", "RootCaKey": "PEM", "IngressPool": "10.192.0.0/10",
        "RootRotation": {
            "CaCert": "PEM", "CaKey": "PEM", "CrossSignedCert": "PEM",
            "StartedAt": "2026-01-02T03:04:05Z",
        },
        "UnlockKey": "aGk=", "UnlockKeyVersion": 2,
        "BlacklistedCertificates": {id: "2026-01-02T03:04:05Z"},
    })));
    check::<Service>(&meta(serde_json::json!({
        "Spec": {"Name": "a", "TaskTemplate": {}}, "SpecVersion": {"Index": 6},
        "Endpoint": {"Ports": []}, "Revision": 3,
        "JobStatus": {"JobIteration": {"Index": 6}, "LastExecution": "2026-01-02T03:04:05Z"},
    })));
    check::<Task>(&meta(serde_json::json!({
        "Spec": {}, "SpecVersion": {"Index": 6}, "ServiceID": id, "Slot": 0, "ServiceName": "a",
        "DesiredState": "complete", "JobIteration": {"Index": 6}, "PresetNodeID": id,
        "GenericResources": [{"NamedResourceSpec": {"Kind": "GPU", "Value": "UUID1"}}],
        "ServiceLabels": {"a": "b"},
        "Status": {
            "Timestamp": "2026-01-02T03:04:05Z", "State": "running", "NAttempts": 1,
            "Attempts": [{
                "ContainerID": "x-1", "ExitCode": 1, "StartedAt": "2026-01-02T03:04:05Z",
                "EndedAt": "2026-01-02T03:04:05Z", "Err": "exit 1",
            }],
        },
    })));
    let mut revision = meta(serde_json::json!({
        "ServiceID": id, "Number": 1, "Spec": {"Name": "a", "TaskTemplate": {}},
        "SpecVersion": {"Index": 6}, "ReplacedAt": "2026-01-02T03:04:05Z",
    }));
    revision.as_object_mut().unwrap().remove("ID");
    check::<Revision>(&revision);
}

#[test]
fn a_mode_is_one_of_four_and_jobs_have_dockers_defaults() {
    use skep_common::spec::{ModeKind, ServiceSpec};
    let job = |total, concurrent| Some(ModeKind::ReplicatedJob { total, concurrent });
    for (mode, expect) in [
        ("null", Some(ModeKind::Replicated(1))),
        (r#"{"Replicated":{"Replicas":3}}"#, Some(ModeKind::Replicated(3))),
        (r#"{"Replicated":null,"Global":{}}"#, Some(ModeKind::Global)),
        (r#"{"ReplicatedJob":{}}"#, job(1, 1)),
        (r#"{"ReplicatedJob":{"MaxConcurrent":3}}"#, job(3, 3)),
        (r#"{"ReplicatedJob":{"MaxConcurrent":2,"TotalCompletions":6}}"#, job(6, 2)),
        (r#"{"GlobalJob":{}}"#, Some(ModeKind::GlobalJob)),
        (r#"{"Global":{},"GlobalJob":{}}"#, None),
        ("{}", None),
    ] {
        let text = format!(r#"{{"Name":"a","TaskTemplate":{{}},"Mode":{mode}}}"#);
        let spec: ServiceSpec = serde_json::from_str(&text).unwrap();
        assert_eq!(spec.mode_kind(), expect, "{mode}");
    }
}

#[test]
fn bytes_of_secrets_are_not_printed() {
    use skep_common::spec::{Base64, SecretSpec};
    let spec = SecretSpec { data: Some(Base64(b"hunter2".to_vec())), ..SecretSpec::default() };
    let text = format!("{spec:?}");
    assert!(text.contains("7 bytes") && !text.contains("hunter2"), "{text}");
    let error = serde_json::from_str::<SecretSpec>(r#"{"Data":"hunter2!"}"#).unwrap_err();
    assert!(!error.to_string().contains("hunter2"), "{error}");
}

#[test]
fn a_task_of_a_node_is_named_by_it() {
    use skep_common::object::{Slot, Task};
    let text = r#"{"ID":"5555555555555555555555555","Version":{"Index":7},
        "CreatedAt":"2026-01-02T03:04:05Z","UpdatedAt":"2026-01-02T03:04:05Z","Spec":{},
        "SpecVersion":{"Index":6},"ServiceID":"5555555555555555555555555","Slot":2,
        "ServiceName":"web","DesiredState":"running","Status":{}}"#;
    let mut task: Task = serde_json::from_str(text).unwrap();
    assert_eq!((task.slot_key(), task.name().as_str()), (Slot::Replica(2), "web.2"));
    task.preset_node = Some(skep_common::NodeId(7));
    assert_eq!(task.slot_key(), Slot::Node(skep_common::NodeId(7)));
    assert_eq!(task.name(), "web.0000000000000000000000007");
    assert!(Slot::FIRST < task.slot_key() && task.slot_key() < Slot::LAST);
}
