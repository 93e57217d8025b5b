//! `skep secret` and `skep config`.

use serde_json::json;

use super::{Daemon, run};

const ID: &str = "asecret000000000000000000";

fn holding() -> Daemon {
    let daemon = Daemon::start();
    let version = |number: u64| json!({"CreatedAt": "2023-11-14T22:00:00Z", "Digest": format!("sha256:{number}")});
    let one = json!({
        "ID": ID, "Version": {"Index": 7},
        "CreatedAt": "2023-11-14T22:00:00Z", "UpdatedAt": "2023-11-14T22:14:00Z",
        "Spec": {"Name": "key", "Labels": {"team": "a"}},
        "Versions": {"1": version(1), "2": version(2)},
    });
    daemon.hold("secret", [one.clone()]);
    let mut page = one;
    page["Spec"]["Data"] = json!("aGVsbG8=");
    daemon.hold("config", [page]);
    daemon
}

#[tokio::test]
async fn they_are_created_from_files() {
    let daemon = holding();
    let file = daemon.directory().join("key.txt");
    std::fs::write(&file, "hidden").unwrap();
    let line = format!("secret create --label team=a key {}", file.display());
    assert_eq!(run(&daemon, &line).await, (0, "secret-id\n".into(), String::new()));
    let line = format!("config create --template-driver golang page {}", file.display());
    assert_eq!(run(&daemon, &line).await, (0, "config-id\n".into(), String::new()));
    assert_eq!(
        daemon.asked(),
        [
            json!({"secret": {"Name": "key", "Labels": {"team": "a"}, "Data": "aGlkZGVu"}}),
            json!({"config": {"Name": "page", "Data": "aGlkZGVu", "Templating": {"Name": "golang"}}}),
        ]
    );
    let (code, _, err) = run(&daemon, "secret create key /nonexistent").await;
    assert_eq!(code, 1);
    assert!(err.starts_with("error reading content from \"/nonexistent\""), "{err}");
    std::fs::write(&file, "").unwrap();
    let (_, _, err) = run(&daemon, &format!("secret create key {}", file.display())).await;
    assert_eq!(err, "secret has no content: it must have at least one byte\n");
}

#[tokio::test]
async fn lists_and_documents_show_versions_and_of_configs_the_content() {
    let daemon = holding();
    let (_, out, _) = run(&daemon, "secret ls --format '{{.Name}} {{.Version}} {{.Labels}}'").await;
    assert_eq!(out, "key 2 team=a\n");
    let (_, out, _) = run(&daemon, "config ls --quiet --filter name=k").await;
    assert_eq!(out, format!("{ID}\n"));
    let (_, out, _) = run(&daemon, "secret inspect --pretty key").await;
    assert!(out.contains("Versions:\t\t1, 2") && !out.contains("Data"), "{out}");
    let (_, out, _) = run(&daemon, "config inspect --pretty key").await;
    assert!(out.ends_with("Data:\nhello\n"), "{out}");
    assert_eq!(run(&daemon, "secret rm key").await, (0, "key\n".into(), String::new()));
    assert_eq!(daemon.asked(), [json!({"remove secret": ID})]);
}

#[tokio::test]
async fn an_update_brings_bytes_or_labels_and_says_who_follows() {
    let daemon = holding();
    let file = daemon.directory().join("key.txt");
    std::fs::write(&file, "new").unwrap();
    // Somebody was faster once.
    daemon.table.lock().unwrap().refusals.push_back(tonic::Status::aborted("out of sequence"));
    let line = format!("secret update --detach key {}", file.display());
    assert_eq!(run(&daemon, &line).await, (0, "key\n".into(), "updating web\n".into()));
    let line = "config update --detach --label-add b=c --label-rm team key";
    assert_eq!(run(&daemon, line).await.0, 0);
    assert_eq!(
        daemon.asked(),
        [
            json!({"update secret": {"Name": "key", "Labels": {"team": "a"}, "Data": "bmV3"}, "data": true}),
            json!({"update config": {"Name": "key", "Labels": {"b": "c"}}, "data": false}),
        ]
    );
    let (code, _, err) = run(&daemon, "secret update key").await;
    assert_eq!(
        (code, err.as_str()),
        (1, "nothing to update: give a file with the new content, or labels\n")
    );
}
