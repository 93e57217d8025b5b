//! A node that runs a Docker Engine as well: its firewall drops what is forwarded, its rules come and go,
//! and both publish ports.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::path::Path;

use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, Output, Running, SETTLES_WITHIN, WHOAMI, has_docker_or_skip,
    is_root_or_skip, wait_until, whoami_archive,
};

/// Published by the swarm.
const OURS: u16 = 8080;
/// Published by Docker on n1.
const DOCKERS: u16 = 9090;

#[test]
fn both_publish_ports_on_one_node() {
    if !is_root_or_skip() || !has_docker_or_skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.skep(&["network", "create", "front"]).ok();
    let mut engine = Engine::start(&lab, dir.path());
    engine.run_whoami();
    let flags = ["--replicas", "3", "--replicas-max-per-node", "1", "--network", "front"];
    n1.create_whoami("web", &[&flags[..], &["--publish", "8080:8080"]].concat());
    lab.wait_until_settled("n1", "web", 3);
    for node in ["n1", "n2", "n3"] {
        lab.wait_for_turns("client", &lab.url(node, OURS), "Slot", &[("1", 1), ("2", 1), ("3", 1)]);
    }
    step("Docker first");
    all_are_answered(&lab, &engine);
    step("Docker starts again");
    engine.restart();
    all_are_answered(&lab, &engine);
    step("the daemon starts again");
    lab.kill_daemon(&["n1"]);
    lab.start_nodes(&["n1"]);
    lab.wait_until_settled("n1", "web", 3);
    all_are_answered(&lab, &engine);
    step("a service that comes later");
    n1.create_whoami("late", &["--publish", "8081:8080"]);
    lab.wait_until_settled("n1", "late", 1);
    for node in ["n1", "n2", "n3"] {
        lab.wait_for_turns("client", &lab.url(node, 8081), "Slot", &[("1", 1)]);
        let report = lab.load("client", &requests(&lab, node, 8081, 3)).finish();
        report.assert_none_failed();
    }
    lab.down();
}

fn step(name: &str) {
    eprintln!("-- {name}");
}

/// A Docker Engine on n1.
struct Engine<'a> {
    lab: &'a Lab,
    dir: &'a Path,
    socket: String,
    daemon: Running,
}

impl<'a> Engine<'a> {
    fn start(lab: &'a Lab, dir: &'a Path) -> Self {
        let socket = format!("unix://{}", dir.join("docker.sock").display());
        let daemon = Self::start_daemon(lab, dir, &socket);
        let engine = Self { lab, dir, socket, daemon };
        engine.wait();
        engine
    }

    fn start_daemon(lab: &Lab, dir: &Path, socket: &str) -> Running {
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let (data, exec, pid) = (at("data"), at("exec"), at("pid"));
        let places = ["--data-root", &data, "--exec-root", &exec, "--pidfile", &pid];
        let rest = ["--host", socket, "--storage-driver", "vfs", "--live-restore"];
        lab.start_command("n1", &[&["dockerd"], &places[..], &rest].concat())
    }

    fn docker(&self, args: &[&str]) -> Output {
        let words = [&["docker", "--host", &self.socket][..], args].concat();
        self.lab.node("n1").exec(&words)
    }

    /// On a machine where Docker is the one that lets packets be forwarded, it drops all but its own.
    fn wait(&self) {
        wait_until(SETTLES_WITHIN, "the Docker Engine answers", || {
            let output = self.docker(&["info"]);
            (output.status.success().then_some(()), output.to_string())
        });
        self.lab.node("n1").exec(&["iptables", "--policy", "FORWARD", "DROP"]).ok();
    }

    /// A container that publishes a port and outlives the engine's daemon.
    fn run_whoami(&self) {
        let archive = whoami_archive(self.dir);
        self.docker(&["import", "--change", "ENTRYPOINT [\"/whoami\"]", &archive, WHOAMI]).ok();
        let publish = format!("{DOCKERS}:8080");
        let names = ["--name", "beside", "--hostname", "beside"];
        self.docker(&[&["run", "--detach", "--publish", &publish], &names[..], &[WHOAMI]].concat())
            .ok();
    }

    fn restart(&mut self) {
        let pid = std::fs::read_to_string(self.dir.join("pid")).unwrap();
        self.lab.node("n1").exec(&["kill", pid.trim()]).ok();
        wait_until(SETTLES_WITHIN, "the Docker Engine ends", || {
            let is_there = self.dir.join("pid").exists();
            ((!is_there).then_some(()), String::new())
        });
        self.daemon = Self::start_daemon(self.lab, self.dir, &self.socket);
        self.wait();
    }

    /// The process of the container, as n1 numbers it.
    fn container_pid(&self) -> String {
        let output = self.docker(&["inspect", "--format", "{{.State.Pid}}", "beside"]).ok();
        output.stdout.trim().to_owned()
    }
}

fn requests(lab: &Lab, node: &str, port: u16, n_requests: u64) -> LoadOptions {
    let url = format!("http://{}:{port}/", lab.node(node).address());
    LoadOptions { requests: Some(n_requests), ..LoadOptions::to([url]) }
}

/// Clients of both, from outside and from within each other's containers.
fn all_are_answered(lab: &Lab, engine: &Engine<'_>) {
    let each = [("n1", 4), ("n2", 4), ("n3", 4)].into();
    for node in ["n1", "n2", "n3"] {
        let report = lab.load("client", &requests(lab, node, OURS, 12)).finish();
        report.assert_none_failed();
        assert_eq!(report.count_by("Node"), each, "through {node}");
    }
    let report = lab.load("client", &requests(lab, "n1", DOCKERS, 3)).finish();
    report.assert_none_failed();
    assert_eq!(report.count_by("Hostname"), [("beside", 3)].into());
    let on_n1 = lab.node("n1").address();
    for web in lab.whoamis_of("web") {
        let report = web.requests(&[format!("http://{on_n1}:{DOCKERS}/")], 1);
        assert_eq!(report.count_by("Hostname"), [("beside", 1)].into(), "from {}", web.node);
    }
    let pid = engine.container_pid();
    for node in ["n1", "n2", "n3"] {
        let url = format!("http://{}:{OURS}/", lab.node(node).address());
        let command = ["nsenter", "--target", &pid, "--net", "--", "curl", "-sS", "-m", "5", &url];
        let answer = lab.node("n1").exec(&command).ok();
        assert!(answer.stdout.contains("Service: web"), "through {node}: {answer}");
    }
}
