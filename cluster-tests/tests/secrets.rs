//! Secrets and configs of a real swarm: who has them, how they change, and where they never are.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::fs;
use std::process::Command;

use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, TaskRow, is_root_or_skip, wait_until};

/// What must be in no file and in no output.
const FIRST: &str = "first-c0ffee";
const SECOND: &str = "second-decade";

const STACK: &str = r#"
services:
  web:
    image: IMAGE
    environment:
      SERVICE_NAME: "{{.Service.Name}}"
    secrets:
      - source: key
        target: deep/key
        uid: "7"
        mode: 0400
    configs:
      - source: page
        target: /etc/page
    deploy:
      labels: {team: bees}
      update_config: {monitor: 1s}
secrets:
  key:
    file: key.txt
configs:
  page:
    content: "{{.Service.Name}} of {{index .Service.Labels \"team\"}}: {{secret \"deep/key\"}}"
    template_driver: golang
"#;

/// Gives the client a file with this text.
#[track_caller]
fn skep_with(lab: &Lab, args: &[&str], text: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let args: Vec<&str> = args
        .iter()
        .map(|word| if *word == "FILE" { file.path().to_str().unwrap() } else { word })
        .collect();
    lab.node("n1").skep(&args).ok().stdout
}

/// A file in the only container of a service.
#[track_caller]
fn read(lab: &Lab, service: &str, path: &str) -> String {
    let whoamis = lab.whoamis_of(service);
    assert_eq!(whoamis.len(), 1, "{whoamis:#?}");
    fs::read_to_string(format!("/proc/{}/root{path}", whoamis[0].pid)).unwrap()
}

/// Waits until the only container of a service finds this in a file.
#[track_caller]
fn wait_for_text(lab: &Lab, service: &str, path: &str, expect: &str) {
    wait_until(SETTLES_WITHIN, &format!("{service} finds {expect:?} in {path}"), || {
        let whoamis = lab.whoamis_of(service);
        let texts =
            whoamis.iter().map(|one| fs::read_to_string(format!("/proc/{}/root{path}", one.pid)));
        let texts: Vec<_> = texts.map(|text| text.unwrap_or_default()).collect();
        ((texts == [expect]).then_some(()), format!("{texts:?}"))
    });
}

/// What the daemon of a node has in memory.
#[track_caller]
fn held(lab: &Lab, node: &str) -> String {
    let output = lab.node(node).skep(&["info", "--format", "{{json .Swarm.Payloads}}"]).ok();
    output.stdout.trim().to_owned()
}

#[track_caller]
fn wait_until_held(lab: &Lab, node: &str, expect: &str) {
    wait_until(SETTLES_WITHIN, &format!("{node} has {expect}"), || {
        let found = held(lab, node);
        ((found == expect).then_some(()), found)
    });
}

/// Files of the lab's nodes that have one of these texts, or its beginning as base64.
fn files_with(lab: &Lab, texts: &[&str]) -> String {
    let mut command = Command::new("grep");
    command.args(["-r", "-l", "-a", "--exclude-dir=rootfs", "--exclude-dir=merged"]);
    for text in texts {
        command.args(["-e", text]);
    }
    command
        .arg(format!("/var/lib/skep-lab/{}", lab.name()))
        .arg(format!("/run/skep-lab/{}", lab.name()));
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

#[test]
fn secrets_reach_those_who_use_them_change_under_them_and_leave_no_trace() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    let n1 = lab.node("n1");

    skep_with(&lab, &["secret", "create", "--label", "team=bees", "key", "FILE"], FIRST);
    skep_with(
        &lab,
        &["config", "create", "--template-driver", "golang", "page", "FILE"],
        "on {{.Node.Hostname}}",
    );
    n1.create_whoami(
        "api",
        &[
            "--constraint",
            "node.hostname==n2",
            "--update-monitor",
            "1s",
            "--rollback-monitor",
            "1s",
            "--secret",
            "source=key,target=token,mode=0400",
            "--config",
            "source=page,target=/etc/page",
        ],
    );
    lab.wait_until_settled("n1", "api", 1);
    assert_eq!(read(&lab, "api", "/run/secrets/token"), FIRST);
    assert_eq!(read(&lab, "api", "/etc/page"), "on n2");

    // Only the node of the task has it, in memory alone; nothing that can be asked gives it away.
    assert_eq!(held(&lab, "n2"), r#"["config page@1","secret key@1"]"#);
    assert_eq!((held(&lab, "n1"), held(&lab, "n3")), ("[]".into(), "[]".into()));
    let shown = n1.skep(&["secret", "inspect", "key"]).ok().stdout;
    assert!(
        shown.contains("Versions")
            && !shown.contains("Data")
            && !shown.contains("sha256")
            && !shown.contains(FIRST),
        "{shown}"
    );
    let page = n1.skep(&["config", "inspect", "--pretty", "page"]).ok().stdout;
    assert!(page.contains("on {{.Node.Hostname}}"), "{page}");
    // "first-c0f" in base64, at each of the three places that it may begin at.
    let texts = [FIRST, "Zmlyc3QtYzBm", "ZpcnN0LWMwZm", "maXJzdC1jMGZ"];
    assert_eq!(files_with(&lab, &texts), "");

    rotation(&lab);
    restarts(&lab);

    let refused = n1.skep(&["secret", "rm", "key"]).err();
    assert!(refused.contains("secret 'key' is in use by the following service: api"), "{refused}");
    n1.skep(&["service", "update", "--detach=false", "--secret-rm", "key", "api"]).ok();
    wait_until_held(&lab, "n2", r#"["config page@1"]"#);
    assert!(
        !fs::exists(format!("/proc/{}/root/run/secrets/token", lab.whoamis_of("api")[0].pid))
            .unwrap()
    );
    n1.skep(&["secret", "rm", "key"]).ok();
    let back = n1.skep(&["service", "rollback", "--detach", "api"]).err();
    assert!(back.contains("secret not found: key (version 2)"), "{back}");
    n1.skep(&["service", "rm", "api"]).ok();
    wait_until_held(&lab, "n2", "[]");
    n1.skep(&["config", "rm", "page"]).ok();

    stacks(&lab);
    lab.down();
}

/// A new version rolls its users; they may go back, and what nobody needs is erased.
fn rotation(lab: &Lab) {
    let n1 = lab.node("n1");
    let before = lab.wait_until_settled("n1", "api", 1);
    skep_with(lab, &["secret", "update", "key", "FILE"], SECOND);
    let after = lab.wait_until_settled("n1", "api", 1);
    assert_ne!(ids(&before), ids(&after), "the update is over when the command is");
    assert_eq!(read(lab, "api", "/run/secrets/token"), SECOND);
    wait_until_held(lab, "n2", r#"["config page@1","secret key@2"]"#);
    let same = skep_with(lab, &["secret", "update", "key", "FILE"], SECOND);
    assert_eq!(same, "key\n");
    assert_eq!(ids(&lab.wait_until_settled("n1", "api", 1)), ids(&after), "nothing has changed");

    n1.skep(&["service", "rollback", "--detach=false", "api"]).ok();
    assert_eq!(read(lab, "api", "/run/secrets/token"), FIRST);
    n1.skep(&["service", "rollback", "--detach=false", "api"]).ok();
    assert_eq!(read(lab, "api", "/run/secrets/token"), SECOND);
    let listed = n1.skep(&["secret", "ls", "--format", "{{.Name}} {{.Version}}"]).ok().stdout;
    assert_eq!(listed, "key 2\n");
}

/// A daemon that starts again is given them again; the container keeps its own meanwhile. A task that was
/// to be made without managers waits for them.
fn restarts(lab: &Lab) {
    let before = lab.wait_until_settled("n1", "api", 1);
    lab.kill_daemon(&["n1", "n2"]);
    lab.start_nodes(&["n2"]);
    wait_until_held(lab, "n2", "[]");
    assert_eq!(read(lab, "api", "/run/secrets/token"), SECOND);
    lab.start_nodes(&["n1"]);
    wait_until_held(lab, "n2", r#"["config page@1","secret key@2"]"#);
    assert_eq!(ids(&lab.wait_until_settled("n1", "api", 1)), ids(&before), "it runs on");
}

fn ids(tasks: &[TaskRow]) -> Vec<&str> {
    tasks.iter().map(|task| task.id.as_str()).collect()
}

/// A stack has secrets and configs of its own, from its file.
fn stacks(lab: &Lab) {
    let n1 = lab.node("n1");
    let deploy = |key: &str| {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stack.yml");
        let text = STACK.replace("IMAGE", skep_cluster_tests::WHOAMI);
        fs::write(dir.path().join("key.txt"), key).unwrap();
        fs::write(&file, text).unwrap();
        n1.skep(&["stack", "deploy", "--detach=false", "-c", file.to_str().unwrap(), "shop"])
            .ok()
            .stdout
    };
    let first = deploy(FIRST);
    assert!(
        first.contains("Creating secret shop_key") && first.contains("Creating config shop_page"),
        "{first}"
    );
    wait_for_text(lab, "shop_web", "/etc/page", &format!("shop_web of bees: {FIRST}"));
    assert_eq!(read(lab, "shop_web", "/run/secrets/deep/key"), FIRST);
    let unchanged = deploy(FIRST);
    assert!(
        unchanged.contains("Unchanged service") && !unchanged.contains("Updating"),
        "{unchanged}"
    );
    let changed = deploy(SECOND);
    assert!(
        changed.contains("Updating secret shop_key") && changed.contains("Updating service"),
        "{changed}"
    );
    wait_for_text(lab, "shop_web", "/etc/page", &format!("shop_web of bees: {SECOND}"));
    let removed = n1.skep(&["stack", "rm", "--detach=false", "shop"]).ok().stdout;
    assert!(
        removed.contains("Removing secret shop_key")
            && removed.contains("Removing config shop_page"),
        "{removed}"
    );
    assert_eq!(n1.skep(&["secret", "ls", "--quiet"]).ok().stdout, "");
    assert_eq!(n1.skep(&["config", "ls", "--quiet"]).ok().stdout, "");
    for node in ["n1", "n2", "n3"] {
        wait_until_held(lab, node, "[]");
    }
}
