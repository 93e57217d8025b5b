//! What the laboratory itself promises, with a stand-in for the daemon.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use skep_cluster_tests::{
    Lab, LabOptions, LabTraces, LoadOptions, Record, is_root_or_skip, skep_binary, wait_until,
};

/// For what takes milliseconds, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(20);

fn options(managers: u8, workers: u8) -> LabOptions {
    let daemon = Some(PathBuf::from(env!("CARGO_BIN_EXE_skep-stand-in")));
    LabOptions { managers, workers, swarm: false, daemon, ..LabOptions::default() }
}

fn url(address: Ipv4Addr) -> String {
    format!("http://{address}:8080/")
}

/// One request from a member, with a short time limit.
#[track_caller]
fn request(lab: &Lab, from: &str, to: Ipv4Addr) -> Record {
    let mut load = LoadOptions::to([url(to)]);
    load.requests = Some(1);
    load.timeout = Duration::from_millis(500);
    lab.load(from, &load).finish().records.remove(0)
}

#[test]
fn a_node_is_a_machine_of_its_own() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(1, 1));
    assert_eq!(lab.states(), ["n1 up", "n2 up"]);
    let rows = lab.command(&["ls", "--format", "json"]).ok().json_lines();
    assert_eq!(rows[0]["Address"], lab.node("n1").address().to_string());
    assert_eq!((&rows[0]["Role"], &rows[1]["Role"]), (&"manager".into(), &"worker".into()));

    for name in ["n1", "n2"] {
        let node = lab.node(name);
        assert_eq!(node.exec(&["hostname"]).ok().text(), name);
        let ls = |dir: &str| node.exec(&["ls", dir]).ok().stdout;
        assert_eq!(ls("/run/skep"), "container.pid\nskep.sock\n");
        let others = [ls("/run/skep-lab"), ls("/var/lib/skep-lab")];
        assert_eq!(others, ["", ""], "no other node's files");
        assert_eq!(node.exec(&["cat", "/var/lib/skep/starts"]).ok().text(), "start");
        let init = node.exec(&["cat", "/proc/1/cmdline"]).ok();
        assert!(init.text().replace('\0', " ").contains("lab init"), "{init}");
        let env = node.exec(&["sh", "-c", "echo $SKEP_HOST"]).ok();
        assert_eq!(env.text(), "unix:///run/skep/skep.sock");
        assert!(node.log().contains(&format!("{name} starts")));
    }
    let failing = lab.node("n1").exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(failing.status.code(), Some(7));
    assert_eq!((failing.stdout.as_str(), failing.stderr.as_str()), ("out\n", "err\n"));
    let killed = lab.node("n1").exec(&["sh", "-c", "kill -TERM $$"]);
    assert_eq!(killed.status.code(), Some(128 + 15));
    assert!(lab.node("n1").exec(&["no-such-program"]).err().contains("no-such-program"));
    assert!(lab.node("n3").exec(&["true"]).err().contains("has no node n3; it has n1, n2"));
}

#[test]
fn a_command_on_a_node_ends_with_the_one_that_runs_it() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(1, 0));
    for (signal, expect) in [("TERM", Some(128 + 15)), ("INT", Some(128 + 2)), ("KILL", None)] {
        // A shell's background job ignores SIGINT, and so would all that it starts.
        let mut exec = Command::new("env");
        exec.arg("--default-signal=INT").arg(skep_binary());
        exec.args(["lab", "--name", lab.name(), "exec", "n1", "--", "sh", "-c"]);
        exec.arg("echo on; exec sleep 987");
        let mut exec = exec.stdout(Stdio::piped()).spawn().unwrap();
        let mut word = [0; 3];
        exec.stdout.take().unwrap().read_exact(&mut word).expect("the command runs");
        let pid = exec.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        assert_eq!(exec.wait().unwrap().code(), expect, "{signal}");
        wait_until(SOON, "the command has ended", || {
            let list = lab.node("n1").exec(&["ps", "ax"]).ok().stdout;
            ((!list.contains("sleep 987")).then_some(()), list)
        });
    }
}

#[test]
fn members_and_the_host_reach_each_other_under_their_own_addresses() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(1, 1));
    let n1 = lab.node("n1").address();
    for from in ["n2", "client"] {
        let answer = request(&lab, from, n1);
        let expect = format!("n1 {}", lab.node(from).address());
        assert_eq!(answer.body.as_deref(), Some(expect.as_str()), "{answer:?}");
    }
    let mut stream = TcpStream::connect((n1, 8080)).expect("the host reaches its lab");
    stream.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with(&format!("n1 {}", lab.node("host").address())), "{answer}");
}

#[test]
fn power_loss_ends_all_of_a_node_at_once_and_its_data_stays() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(1, 2));
    let traces = ["n2", "n3"].map(|name| lab.node(name).traces());
    // A frozen container (`docker pause`) does not die by itself with cgroup v1.
    freeze(&format!("skep-lab/{}/n2/task", lab.name()));
    let mut exec = Command::new(skep_binary());
    exec.args(["lab", "--name", lab.name(), "exec", "n2", "--", "sh", "-c", "echo on; sleep 600"]);
    let mut exec = exec.stdout(Stdio::piped()).spawn().unwrap();
    let mut word = [0; 3];
    exec.stdout.take().unwrap().read_exact(&mut word).expect("the command runs");

    lab.kill(&["n2", "n3"]);
    traces.iter().for_each(|traces| traces.assert_nothing_left());
    assert_eq!(exec.wait().unwrap().code(), Some(128 + 9), "what ran on the node ended with it");
    assert_eq!(lab.states(), ["n1 up", "n2 down", "n3 down"]);
    assert!(lab.node("n2").exec(&["true"]).err().contains("is down"));
    let n2 = lab.node("n2").address();
    assert!(!request(&lab, "client", n2).is_ok());
    assert!(request(&lab, "client", lab.node("n1").address()).is_ok());
    lab.kill(&["n2"]);

    lab.start_nodes(&["n2", "n3"]);
    assert_eq!(lab.states(), ["n1 up", "n2 up", "n3 up"]);
    let starts = lab.node("n2").exec(&["cat", "/var/lib/skep/starts"]).ok();
    assert_eq!(starts.text(), "start\nstart", "the data is that of before");
    assert!(request(&lab, "client", n2).is_ok(), "the address too, at once");
}

/// Freezes a cgroup of either version, and checks that it is.
fn freeze(cgroup: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let v1 = root.join("freezer").join(cgroup).join("freezer.state");
    let (file, word, state) = match v1.exists() {
        true => (v1.clone(), "FROZEN", v1),
        false => {
            let dir = root.join(cgroup);
            (dir.join("cgroup.freeze"), "1", dir.join("cgroup.events"))
        }
    };
    fs::write(&file, word).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    wait_until(SOON, "the container is frozen", || {
        let text = fs::read_to_string(&state).unwrap_or_default();
        let is_frozen = text.trim() == "FROZEN" || text.contains("frozen 1");
        (is_frozen.then_some(()), text)
    });
}

#[test]
fn a_container_survives_its_daemon() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(1, 0));
    let node = lab.node("n1");
    let container = node.exec(&["cat", "/run/skep/container.pid"]).ok();
    let is_running = || node.exec(&["kill", "-0", container.text()]).status.success();
    lab.kill_daemon(&["n1"]);
    assert_eq!(lab.states(), ["n1 daemon-down"]);
    assert!(is_running());
    assert!(!request(&lab, "client", node.address()).is_ok());

    lab.start_nodes(&["n1"]);
    assert_eq!(lab.states(), ["n1 up"]);
    assert!(is_running());
    assert_eq!(node.exec(&["cat", "/run/skep/container.pid"]).ok().text(), container.text());
    assert_eq!(node.exec(&["cat", "/var/lib/skep/starts"]).ok().text(), "start\nstart");
    lab.start_nodes(&["n1"]);
    let starts = node.exec(&["cat", "/var/lib/skep/starts"]).ok();
    assert_eq!(starts.text(), "start\nstart", "starting what runs changes nothing");
}

#[test]
fn a_cut_cable_stays_cut_until_it_is_healed() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(2, 0));
    let n2 = lab.node("n2").address();
    let is_reached = || [request(&lab, "client", n2), request(&lab, "n1", n2)].map(|r| r.is_ok());
    assert_eq!(is_reached(), [true, true]);
    let mut held = lab.hold("client", &url(n2));
    assert!(held.request("/").is_ok());

    lab.cut(&["n2"]);
    assert_eq!(lab.states(), ["n1 up", "n2 cut"]);
    assert_eq!(is_reached(), [false, false]);
    assert!(request(&lab, "n2", n2).is_ok(), "to itself a node needs no cable");
    lab.heal(&["n2"]);
    assert_eq!(is_reached(), [true, true]);
    assert!(held.request("/").is_ok(), "an idle connection does not notice");

    lab.cut(&["n2"]);
    lab.kill(&["n2"]);
    lab.start_nodes(&["n2"]);
    assert_eq!(lab.states(), ["n1 up", "n2 cut"]);
    assert_eq!(is_reached(), [false, false]);
    lab.heal(&["n2"]);
    assert_eq!(is_reached(), [true, true]);
    assert!(!held.request("/").is_ok(), "the server of that connection lost its power");
}

#[test]
fn down_leaves_nothing_whatever_was_broken_before() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(1, 1));
    let (traces, other) = (lab.traces(), bare_up("other", std::process::id()));
    assert_ne!(traces.host_link, other.host_link);
    assert!(!traces.left().is_empty(), "the check sees a lab that runs");
    for file in ["lab.json", "n1/init.json", "n2/init.json"] {
        fs::remove_file(format!("/run/skep-lab/{}/{file}", lab.name())).unwrap();
    }
    lab.down();
    traces.assert_nothing_left();
    let rows = skep(&["lab", "--name", &other.name, "ls", "--format", "{{.Name}} {{.State}}"]);
    assert_eq!(rows, Ok("n1 up\n".to_owned()), "another lab is not touched");
    skep(&["lab", "--name", &other.name, "down"]).unwrap();
    other.assert_nothing_left();
}

/// Runs `skep`: its standard output, or standard error when it fails.
fn skep(args: &[&str]) -> Result<String, String> {
    let output = Command::new(skep_binary()).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// Starts a lab beside the two that [`Lab`] allows; it ends with the process given.
fn bare_up(suffix: &str, until_exit_of: u32) -> LabTraces {
    let name = format!("t{}-{suffix}", std::process::id());
    let until = until_exit_of.to_string();
    let daemon = ["--daemon", env!("CARGO_BIN_EXE_skep-stand-in")];
    let up = ["up", "--no-swarm", "--managers", "1", "--workers", "0", "--until-exit-of", &until];
    skep(&[&["lab", "--name", &name], &up[..], &daemon].concat()).unwrap();
    let record = fs::read_to_string(format!("/run/skep-lab/{name}/lab.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    LabTraces { name, host_link: record["HostLink"].as_str().unwrap().to_owned() }
}

#[test]
fn a_lab_ends_with_the_process_it_was_started_for() {
    if !is_root_or_skip() {
        return;
    }
    let mut process = Command::new("sleep").arg("600").spawn().unwrap();
    let traces = bare_up("until", process.id());
    assert!(!traces.left().is_empty());
    process.kill().unwrap();
    process.wait().unwrap();
    wait_until(SOON, "the watchdog removed the lab", || {
        let left = traces.left();
        (left.is_empty().then_some(()), left.join("\n"))
    });
}

#[test]
fn an_up_that_is_killed_halfway_leaves_nothing() {
    if !is_root_or_skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // It never listens, so that `up` waits for it.
    let program = script(dir.path(), "exec sleep 600");
    let name = format!("t{}-killed", std::process::id());
    let mut up = Command::new(skep_binary());
    up.args(["lab", "--name", &name, "up", "--no-swarm", "--managers", "2", "--workers", "0"]);
    let mut up = up.arg("--daemon").arg(program).spawn().unwrap();
    let traces = LabTraces { name: name.clone(), host_link: String::new() };
    wait_until(SOON, "both nodes boot", || {
        let left = traces.left();
        let n_daemons = left.iter().filter(|line| line.contains("sleep 600")).count();
        ((n_daemons == 2).then_some(()), left.join("\n"))
    });
    up.kill().unwrap();
    up.wait().unwrap();
    wait_until(SOON, "the watchdog removed the lab", || {
        let left = traces.left();
        (left.is_empty().then_some(()), left.join("\n"))
    });
}

#[test]
fn a_daemon_that_dies_is_shown_with_the_end_of_its_log() {
    if !is_root_or_skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = script(dir.path(), "echo cannot read the moon >&2; exit 3");
    let options = LabOptions { daemon: Some(program), ..options(1, 1) };
    let Err(output) = Lab::try_start(&options) else { panic!("it must not start") };
    let words = ["did not start", "daemon of n1 exited with code 3", "| cannot read the moon"];
    for word in words {
        assert!(output.stderr.contains(word), "{word:?} in {output}");
    }
    let name = output.command.split(' ').skip_while(|word| *word != "--name").nth(1).unwrap();
    let host_link = String::new();
    LabTraces { name: name.to_owned(), host_link }.assert_nothing_left();
}

fn script(dir: &Path, body: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join("daemon");
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn mistakes_are_answered_with_one_clear_sentence() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(1, 0));
    let again = lab.command(&["up", "--no-swarm"]).err();
    assert!(again.contains("is there already"), "{again}");
    assert_eq!(lab.states(), ["n1 up"], "a second up changes nothing");
    let subnet = lab.node("n1").address().octets();
    let taken = format!("{}.{}.{}.0/24", subnet[0], subnet[1], subnet[2]);
    let name = format!("t{}-wrong", std::process::id());
    let overlap =
        skep(&["lab", "--name", &name, "up", "--no-swarm", "--subnet", &taken]).unwrap_err();
    assert!(overlap.contains("overlaps"), "{overlap}");
    let unknown = skep(&["lab", "--name", &name, "ls"]).unwrap_err();
    assert!(unknown.contains(&format!("there is no lab {name}")), "{unknown}");
    let bad_name = skep(&["lab", "--name", "../x", "down"]).unwrap_err();
    assert!(bad_name.contains("no name for a lab"), "{bad_name}");
}

/// Answers each connection as the word in its request's path says.
fn serve_oddly(listener: TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut request = [0; 1024];
        let length = stream.read(&mut request).unwrap();
        let request = String::from_utf8_lossy(&request[..length]).into_owned();
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        match path.as_str() {
            "/good" => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").unwrap(),
            "/error" => stream.write_all(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n").unwrap(),
            "/short" => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi").unwrap()
            }
            "/close" => stream.shutdown(Shutdown::Both).unwrap(),
            // Answers nothing until the client has gone.
            "/silent" => assert!(stream.read(&mut [0; 1]).is_ok_and(|length| length == 0)),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn the_load_client_counts_every_kind_of_failure_and_tries_nothing_twice() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let server = listener.local_addr().unwrap();
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    std::thread::spawn(move || serve_oddly(listener));
    let url = |server: SocketAddr, path: &str| format!("http://{server}/{path}");
    let paths = ["good", "error", "short", "close", "silent"];
    let mut command = Command::new(skep_binary());
    command.args(["lab", "http", "--record", "--requests", "12", "--timeout-ms", "300"]);
    command.args(paths.map(|path| url(server, path))).arg(url(nobody, "good"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<serde_json::Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let (summary, records) = lines.split_last().unwrap();
    let outcomes: Vec<&str> = records.iter().map(|r| r["Outcome"].as_str().unwrap()).collect();
    let expect = ["Ok", "Status", "Closed", "Closed", "Timeout", "Connect"];
    assert_eq!(outcomes, [expect, expect].concat());
    assert_eq!(records[0]["Body"], "hi");
    let failures: BTreeMap<String, u64> =
        serde_json::from_value(summary["Failures"].clone()).unwrap();
    let expect = [("Closed", 4), ("Connect", 2), ("Status", 2), ("Timeout", 2)];
    assert_eq!(failures, expect.map(|(kind, n)| (kind.to_owned(), n)).into());
    assert_eq!((&summary["Requests"], &summary["Ok"]), (&12.into(), &2.into()));
}

#[test]
fn a_load_runs_until_it_is_stopped_and_keeps_its_connections() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(options(1, 1));
    let urls = ["n1", "n2"].map(|name| url(lab.node(name).address()));
    let options = LoadOptions { clients: 4, keep_alive: true, ..LoadOptions::to(urls) };
    let load = lab.load("client", &options);
    load.wait_for_more(100, SOON);
    let report = load.stop();
    report.assert_none_failed();
    assert!(report.summary.requests >= 100);
    assert_eq!(report.summary.servers.len(), 2, "{:?}", report.summary);

    let load = lab.load("client", &options);
    load.wait_for_more(10, SOON);
    lab.kill(&["n2"]);
    load.wait_for_more(10, SOON);
    let report = load.stop();
    assert!(report.summary.failed >= 2, "each client of n2 lost its connection: {report:?}");
    let n2 = format!("{}:8080", lab.node("n2").address());
    assert!(report.records.iter().filter(|r| !r.is_ok()).all(|r| r.server == n2));
}
