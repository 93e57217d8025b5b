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
    assert_eq!(kinds.len(), 9, "a kind has no document: {kinds:?}");
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
