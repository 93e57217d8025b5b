//! Bad input: one clear sentence that says what, where and what to do; nothing lost or half applied.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use skep_cluster_tests::{BUSYBOX, Lab, LabOptions, SETTLES_WITHIN, is_root_or_skip, wait_until};

/// Checks that an error is one sentence with these words, and says nothing twice.
#[track_caller]
fn check_sentence(stderr: &str, words: &[&str]) {
    // What the command line itself refuses is followed by a hint at --help.
    let error = stderr.split("\n\nFor more information").next().unwrap().trim_end();
    assert_eq!(error.lines().count(), 1, "one line: {stderr}");
    for word in words {
        assert!(error.contains(word), "{word:?} in {error}");
    }
    let body = error.strip_prefix("Error response from daemon: ").unwrap_or(error);
    let is_double = |at: usize| body[..at] == body[at + 2..];
    assert!(!body.match_indices(": ").any(|(at, _)| is_double(at)), "said twice: {error}");
}

/// What a wrong request must leave as it is.
#[track_caller]
fn services(lab: &Lab) -> String {
    let format = "{{.ID}} {{.Version.Index}} {{json .Spec}}";
    let ids = lab.node("n1").skep(&["service", "ls", "--quiet"]).ok();
    let mut args = vec!["service", "inspect", "--format", format];
    args.extend(ids.stdout.lines());
    lab.node("n1").skep(&args).ok().stdout
}

#[test]
fn a_wrong_request_is_refused_in_one_sentence_and_changes_nothing() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 0, ..LabOptions::default() });
    let create = |flags: &[&str]| {
        let args = ["service", "create", "--detach", "--replicas", "0"];
        lab.node("n1").skep(&[&args[..], flags, &["none:latest"]].concat())
    };
    create(&["--name", "owner", "--publish", "9000:80"]).ok();
    create(&["--name", "other", "--publish", "9001:80"]).ok();
    let before = services(&lab);

    let in_use = ["port '9000' (tcp)", "already in use", "owner"];
    let cases: [(&[&str], &[&str]); 7] = [
        (&["--name", "third", "--publish", "9000:81"], &in_use),
        (&["--name", "owner"], &["owner", "already exists"]),
        (&["--name", "bad name!"], &["\"bad name!\"", "DNS"]),
        (&["--name", "x", "--constraint", "node.role"], &["\"node.role\"", "==", "!="]),
        (&["--name", "x", "--label", "=x"], &["\"=x\"", "NAME=VALUE"]),
        (&["--name", "x", "--limit-memory", "64X"], &["\"64X\"", "64M"]),
        (&["--name", "x", "--publish", "70000:80"], &["70000"]),
    ];
    for (flags, words) in cases {
        check_sentence(&create(flags).err(), words);
        assert_eq!(services(&lab), before, "{flags:?}");
    }
    let update = ["service", "update", "--detach", "--publish-add", "9000:81"];
    let both = [&update[..], &["--label-add", "a=b", "other"]].concat();
    check_sentence(&lab.node("n1").skep(&both).err(), &in_use);
    let missing = lab.node("n1").skep(&["service", "update", "--detach", "--force", "nobody"]);
    check_sentence(&missing.err(), &["nobody", "not found"]);
    let label = lab.node("n1").skep(&["node", "update", "--label-add", "=x", "n1"]);
    check_sentence(&label.err(), &["\"=x\"", "NAME=VALUE"]);
    assert_eq!(services(&lab), before);

    // An image that nobody has is no mistake yet: it is told, and its tasks say what they wait for.
    let args = ["service", "create", "--detach", "--name", "later", "nowhere:1.0"];
    let output = lab.node("n1").skep(&args).ok();
    check_sentence(&output.stderr, &["nowhere:1.0", "skep image load"]);
    // Nor is a constraint that no node meets, unless nodes have nothing of that name.
    let unplaced = |constraint| {
        let create = ["service", "create", "--detach", "--name", "unplaced", "--constraint"];
        lab.node("n1").skep(&[&create[..], &[constraint, BUSYBOX]].concat())
    };
    check_sentence(&unplaced("node.rool==manager").err(), &["node.rool", "node.role"]);
    lab.import_busybox("n1");
    unplaced("node.labels.zone==none").ok();
    lab.node("n1").wait_for_tasks("unplaced", "it names the constraint", |tasks| {
        tasks.iter().find(|task| task.error.contains("constraint")).cloned()
    });
    lab.node("n1").wait_for_tasks("later", "it waits for its image", |tasks| {
        tasks.iter().find(|task| task.error.contains("nowhere:1.0")).cloned()
    });
    lab.down();
}

#[test]
fn a_wrong_compose_file_is_refused_with_its_line_and_deploys_nothing() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 0, ..LabOptions::default() });
    let owner = ["service", "create", "--detach", "--name", "owner", "--replicas", "0"];
    lab.node("n1").skep(&[&owner[..], &["--publish", "9000:80", "none:latest"]].concat()).ok();
    let before = services(&lab);
    let web = "services:\n  good:\n    image: none:latest\n  web:\n    image: none:latest\n";
    let cases: [(&str, &[&str]); 6] = [
        (
            "    deploy:\n      replica: 3\n",
            &["stack.yml:7", "web", "'deploy.replica'", "'replicas'"],
        ),
        ("    deploy:\n      replicas: many\n", &["stack.yml:7", "web", "\"many\"", "number"]),
        ("    ports: [\"9000:80\"]\n", &["web", "'9000'", "owner"]),
        ("    ports: [\"http\"]\n", &["stack.yml:6", "web", "http"]),
        ("    deploy: {placement: {constraints: [\"node.role\"]}}\n", &["web", "node.role"]),
        ("  oops\n", &["stack.yml:", "YAML"]),
    ];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stack.yml");
    for (end, words) in cases {
        fs::write(&file, format!("{web}{end}")).unwrap();
        let path = file.to_str().unwrap();
        let error = lab.node("n1").skep(&["stack", "deploy", "--compose-file", path, "shop"]).err();
        check_sentence(&error, words);
        assert_eq!(services(&lab), before, "not even the good service, after {error}");
        let stacks = lab.node("n1").skep(&["stack", "ls", "--format", "json"]).ok();
        assert_eq!(stacks.text(), "", "after {error}");
    }
    let error = lab.node("n1").skep(&["stack", "deploy", "-c", "/nowhere.yml", "shop"]).err();
    check_sentence(&error, &["/nowhere.yml", "No such file"]);
    lab.down();
}

#[test]
fn a_daemon_with_wrong_settings_does_not_start() {
    if !is_root_or_skip() {
        return;
    }
    let lab =
        Lab::start(LabOptions { managers: 1, workers: 0, swarm: false, ..LabOptions::default() });
    let dir = tempfile::tempdir().unwrap();
    let daemon = |args: &[&str]| lab.node("n1").exec(&[&["skep", "daemon"], args].concat()).err();

    let twice = daemon(&["--data-dir", "/var/lib/skep", "--run-dir", "/run/skep"]);
    check_sentence(&twice, &["already", "/run/skep/skep.sock"]);
    let run_dir = dir.path().join("run");
    let same_data =
        daemon(&["--data-dir", "/var/lib/skep", "--run-dir", run_dir.to_str().unwrap()]);
    check_sentence(&same_data, &["/var/lib/skep", "another process"]);
    lab.node("n1").skep(&["info"]).ok();

    let file = dir.path().join("daemon.toml");
    let path = file.to_str().unwrap();
    // A parser's errors show the line with a mark below it.
    for (text, words) in [
        ("datadir = \"/x\"\n", ["line 1", "datadir", "data_dir"]),
        ("hostname = \"a\"\ndata_dir = 5\n", ["line 2", "data_dir", "integer `5`"]),
        ("hostname = \n", ["line 1", "hostname", "string"]),
    ] {
        fs::write(&file, text).unwrap();
        let error = daemon(&["--config", path]);
        for word in words.iter().chain(&[path]) {
            assert!(error.contains(word), "{word:?} in {error}");
        }
    }
    check_sentence(&daemon(&["--config", "/nowhere.toml"]), &["/nowhere.toml", "No such file"]);
    lab.down();
}

/// The last segment of a manager's Raft log, and the end of what was written to it.
fn last_segment(lab: &Lab, node: &str) -> (PathBuf, usize) {
    let dir = lab.data_dir(node).join("raft/log");
    let files = fs::read_dir(&dir).unwrap().flatten().map(|entry| entry.path());
    let segments = files.filter(|path| path.extension().is_some_and(|e| e == "segment"));
    let path = segments.max().expect("a manager has a log");
    let bytes = fs::read(&path).unwrap();
    // The rest of the file is allocated, and zero.
    let end = bytes.iter().rposition(|byte| *byte != 0).expect("something was written") + 1;
    (path, end)
}

fn flip_byte(path: &Path, at: usize) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let at = u64::try_from(at).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Writes to the store, so that the log has something to lose.
#[track_caller]
fn write_labels(lab: &Lab, name: &str, n_writes: usize) {
    for number in 0..n_writes {
        let label = format!("{name}={number}");
        lab.node("n1").skep(&["node", "update", "--label-add", &label, "n1"]).ok();
    }
}

#[test]
fn a_torn_raft_log_is_cut_and_a_damaged_one_refused() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 0, ..LabOptions::default() });
    let leader = lab.wait_for_leader("n1");
    // n1 stays: requests go there.
    let node = if leader == "n3" { "n2" } else { "n3" };
    write_labels(&lab, "a", 20);
    lab.wait_until_alike("n1", 3);

    lab.kill(&[node]);
    let (segment, end) = last_segment(&lab, node);
    let torn = u64::try_from(end).unwrap() - 10;
    OpenOptions::new().write(true).open(&segment).unwrap().set_len(torn).unwrap();
    write_labels(&lab, "b", 5);
    lab.start_nodes(&[node]);
    let name = segment.file_name().unwrap().to_str().unwrap();
    let log = lab.node(node).log();
    let is_told =
        |line: &&str| line.contains(" WARN ") && line.contains(name) && line.contains("offset=");
    let told: Vec<&str> = log.lines().filter(is_told).collect();
    assert_eq!(told.len(), 1, "one warning about {name} in\n{log}");
    let version = lab.wait_until_alike("n1", 3);
    // A file that is shorter than a crash leaves it: no vote before it has caught up.
    wait_until(SETTLES_WITHIN, "the manager takes part in elections again", || {
        let log = lab.node(node).log();
        let has_caught_up =
            log.contains("takes no part in elections") && log.contains("has caught up");
        (has_caught_up.then_some(()), log)
    });

    write_labels(&lab, "c", 20);
    assert!(lab.wait_until_alike("n1", 3) > version);
    lab.kill(&[node]);
    let (segment, end) = last_segment(&lab, node);
    let middle = end / 2;
    flip_byte(&segment, middle);
    lab.start_nodes(&[node]);
    let refused = lab.node(node).skep(&["service", "ls"]).err();
    let log = lab.node(node).log();
    let name = segment.file_name().unwrap().to_str().unwrap();
    let line = log.lines().find(|line| line.contains(name) && line.contains("damaged"));
    let line = line.unwrap_or_else(|| panic!("nothing about {name} in\n{log}"));
    let words = ["offset", "backup", "join again", "`skep swarm leave --force`"];
    for word in words {
        assert!(line.contains(word), "{word:?} in {line}");
    }
    check_sentence(&refused, &[&words[..], &[name, "damaged"]].concat());
    let state = ["info", "--format", "{{.Swarm.LocalNodeState}}: {{.Swarm.Error}}"];
    let state = lab.node(node).skep(&state).ok();
    assert_eq!(state.text(), refused.trim_end().replace("Error response from daemon", "error"));
    let offset = line.split("offset ").nth(1).and_then(|rest| rest.split(':').next()).unwrap();
    assert!(offset.parse::<usize>().unwrap() <= middle, "{line}");

    // Nothing was changed by the attempt: with its byte back, the manager is as before.
    flip_byte(&segment, middle);
    lab.kill_daemon(&[node]);
    lab.start_nodes(&[node]);
    lab.wait_until_alike("n1", 3);
    let labels =
        lab.node("n1").skep(&["node", "inspect", "--format", "{{json .Spec.Labels}}", "n1"]);
    let labels = labels.ok().json();
    let last = [&labels["a"], &labels["b"], &labels["c"]];
    assert_eq!(last, ["19", "4", "19"], "{labels}");
    lab.down();
}
