//! Docker Engines as one swarm, for comparison: dockerd and containerd in the namespaces of a lab's nodes.
//!
//! # Invariants
//!
//! - What the engines write is in the node's own directories, or in a file system that only the node sees:
//!   nothing outlives the lab, however it ends.
//! - The lab's own daemons do not run meanwhile.

use std::collections::BTreeMap;

use skep_cluster_tests::{
    BUSYBOX, Lab, LabOptions, Output, Running, SETTLES_WITHIN, busybox_root, pack, wait_until,
};

use super::figures::{Samples, Unit};
use super::is_installed;

/// What Debian's package `docker.io` and the client bring.
const PROGRAMS: [&str; 4] = ["dockerd", "containerd", "containerd-shim-runc-v2", "docker"];
const HOST: &str = "unix:///run/docker.sock";
/// Gives the node a `/run` and an `/etc/docker` of its own, and writes the configurations. The shims' sockets
/// are in /run/containerd whatever the configuration says. Plugins that are left out would only warn, but
/// for `opt`, which makes a directory on the host.
const PREPARE: &str = r#"
set -eu
mkdir -p /run/skep/own/skep /run/skep/own/lock /var/lib/skep/docker
mount --bind /run/skep /run/skep/own/skep
mount --rbind /run/skep/own /run
test ! -d /etc/docker || mount -t tmpfs tmpfs /etc/docker
echo '{}' > /var/lib/skep/docker/daemon.json
cat > /var/lib/skep/docker/containerd.toml << END
version = 2
root = "/var/lib/skep/docker/containerd"
state = "/run/containerd/state"
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "/run/containerd/containerd.sock"
END
"#;
/// Names of a node's processes, cut to 15 characters by the kernel, and their memory.
const MEMORY: &str = "for dir in /proc/[0-9]*; do \
                      echo $(cat $dir/comm) $(grep ^Pss: $dir/smaps_rollup); done 2>/dev/null";

/// A swarm of Docker Engines; it goes when it is dropped.
pub(crate) struct Engines {
    /// Before the lab, which ends what these leave.
    processes: Vec<Running>,
    lab: Lab,
    nodes: Vec<String>,
}

/// What engines take of memory, in proportional set size.
pub(crate) struct Memory {
    /// dockerd and containerd together, of each node.
    pub(crate) engines: Samples,
    /// Each containerd-shim.
    pub(crate) shims: Samples,
}

impl Engines {
    /// The first program that is missing for engines to run.
    pub(crate) fn missing() -> Option<&'static str> {
        PROGRAMS.into_iter().find(|program| !is_installed(program))
    }

    /// Starts an engine on each of as many nodes, imports busybox into each, and joins them into a swarm.
    pub(crate) fn start(managers: u8, workers: u8) -> Self {
        let options = LabOptions { managers, workers, swarm: false, ..LabOptions::default() };
        let lab = Lab::start(options);
        let nodes: Vec<String> =
            (1..=managers + workers).map(|number| format!("n{number}")).collect();
        let names: Vec<&str> = nodes.iter().map(String::as_str).collect();
        lab.kill_daemon(&names);
        let mut engines = Self { processes: Vec::new(), lab, nodes };
        engines.start_all();
        engines.import_busybox();
        engines.form_swarm(managers.into());
        engines
    }

    fn start_all(&mut self) {
        for node in &self.nodes {
            self.lab.node(node).exec(&["sh", "-c", PREPARE]).ok();
            let config = "/var/lib/skep/docker/containerd.toml";
            let command = ["containerd", "--log-level", "warn", "--config", config];
            let containerd = self.lab.start_command(node, &command);
            let cgroup = format!("/skep-lab/{}/{node}/docker", self.lab.name());
            let dockerd = self.lab.start_command(node, &dockerd(&cgroup));
            self.processes.extend([containerd, dockerd]);
        }
        for (number, node) in self.nodes.iter().enumerate() {
            wait_until(SETTLES_WITHIN, &format!("the engine of {node} answers"), || {
                let output = self.docker(node, &["version"]);
                let is_up = output.status.success().then_some(());
                let lines = self.processes[2 * number..2 * number + 2].iter().map(Running::lines);
                let log: Vec<String> = lines.flatten().collect();
                (is_up, format!("{output}\n{}", log.join("\n")))
            });
        }
    }

    fn import_busybox(&self) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let archive = pack(&busybox_root(dir.path()), &dir.path().join("busybox.tar"));
        let archive = archive.to_str().expect("temporary directories have plain names");
        for node in &self.nodes {
            self.docker(node, &["image", "import", archive, BUSYBOX]).ok();
        }
    }

    fn form_swarm(&self, n_managers: usize) {
        let address = |node: &str| self.lab.node(node).address().to_string();
        let first = address("n1");
        self.client(&["swarm", "init", "--advertise-addr", &first]).ok();
        for (number, node) in self.nodes.iter().enumerate().skip(1) {
            let role = if number < n_managers { "manager" } else { "worker" };
            let token = self.client(&["swarm", "join-token", "--quiet", role]).ok();
            let join = ["swarm", "join", "--token", token.text(), "--advertise-addr"];
            self.docker(node, &[&join[..], &[&address(node), &first]].concat()).ok();
        }
        wait_until(SETTLES_WITHIN, "all engines are ready", || {
            let output = self.client(&["node", "ls", "--format", "{{.Status}}"]);
            let n_ready = output.stdout.lines().filter(|status| *status == "Ready").count();
            ((n_ready == self.nodes.len()).then_some(()), output.to_string())
        });
    }

    /// Runs the client on the first node.
    pub(crate) fn client(&self, args: &[&str]) -> Output {
        self.docker("n1", args)
    }

    fn docker(&self, node: &str, args: &[&str]) -> Output {
        self.lab.node(node).exec(&[&["docker", "--host", HOST], args].concat())
    }

    /// What engines and shims take at the moment.
    pub(crate) fn memory(&self) -> Memory {
        let new = || Samples::new(Unit::Mebibytes);
        let mut memory = Memory { engines: new(), shims: new() };
        for node in &self.nodes {
            let mut of_node: BTreeMap<String, f64> = BTreeMap::new();
            let output = self.lab.node(node).exec(&["sh", "-c", MEMORY]);
            for line in output.stdout.lines() {
                let words: Vec<&str> = line.split(' ').collect();
                let [program, "Pss:", size, "kB"] = words[..] else { continue };
                let mebibytes = size.parse::<f64>().expect("a number of kilobytes") / 1024.0;
                match program {
                    "containerd-shim" => memory.shims.add(mebibytes),
                    _ => *of_node.entry(program.to_owned()).or_default() += mebibytes,
                }
            }
            memory.engines.add(of_node["dockerd"] + of_node["containerd"]);
        }
        memory
    }

    /// How many containers there are on all nodes; one that ended counts until its engine has removed it.
    pub(crate) fn n_containers(&self) -> usize {
        let count = |node: &String| {
            let output = self.docker(node, &["container", "ls", "--all", "--quiet"]).ok();
            output.stdout.lines().count()
        };
        self.nodes.iter().map(count).sum()
    }

    /// Ends all of it; dropping does the same quietly.
    pub(crate) fn down(self) {
        drop(self.processes);
        self.lab.down();
    }
}

fn dockerd(cgroup: &str) -> [&str; 19] {
    [
        "dockerd",
        "--log-level",
        "warn",
        "--config-file",
        "/var/lib/skep/docker/daemon.json",
        "--containerd",
        "/run/containerd/containerd.sock",
        "--data-root",
        "/var/lib/skep/docker/data",
        "--exec-root",
        "/run/docker",
        "--pidfile",
        "/run/docker.pid",
        "--host",
        HOST,
        "--storage-driver",
        "overlay2",
        "--cgroup-parent",
        cgroup,
    ]
}
