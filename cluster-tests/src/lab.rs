//! A laboratory for one test.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::command::{Output, run, skep};
use crate::leaks::{LabTraces, NodeTraces};
use crate::load::{HeldConnection, Load, LoadOptions, Report};
use crate::wait::wait_until;

/// At most this many labs at a time: five daemons each share the machine.
const N_SLOTS: u32 = 2;
/// Other tests' labs come before.
const SLOT_TIMEOUT: Duration = Duration::from_secs(1800);
/// Lines of each daemon's log that a failing test prints.
const N_LOG_LINES: usize = 40;

/// What kind of lab a test wants.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// How many nodes are managers; they come first.
    pub managers: u8,
    /// How many nodes are workers.
    pub workers: u8,
    /// Whether the daemons are joined into a swarm.
    pub swarm: bool,
    /// The program that nodes run instead of `skep`.
    pub daemon: Option<PathBuf>,
    /// Numbers of nodes that balance published ports in user space.
    pub user_space: Vec<u8>,
    /// Whether tasks count as running without containers.
    pub no_containers: bool,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            managers: 3,
            workers: 2,
            swarm: true,
            daemon: None,
            user_space: Vec::new(),
            no_containers: false,
        }
    }
}

/// A running lab; dropping it removes it.
#[derive(Debug)]
pub struct Lab {
    name: String,
    record: Value,
    _slot: Flock<File>,
}

impl Lab {
    /// Starts a lab of its own for this test; panics with the reason when it does not come up.
    #[track_caller]
    pub fn start(options: LabOptions) -> Self {
        match Self::try_start(&options) {
            Ok(lab) => lab,
            Err(output) => panic!("the lab did not start: {output}"),
        }
    }

    /// Starts a lab, or gives what `skep lab up` said.
    pub fn try_start(options: &LabOptions) -> Result<Self, Output> {
        static N_LABS: AtomicU32 = AtomicU32::new(0);
        let pid = std::process::id();
        let name = format!("t{pid}-{}", N_LABS.fetch_add(1, Ordering::Relaxed));
        let slot = take_slot();
        let mut command = skep(["lab", "--name", &name, "up"]);
        command.args(["--managers", &options.managers.to_string()]);
        command.args(["--workers", &options.workers.to_string()]);
        command.args(["--until-exit-of", &pid.to_string()]);
        if !options.swarm {
            command.arg("--no-swarm");
        }
        if options.no_containers {
            command.arg("--no-containers");
        }
        for number in &options.user_space {
            command.args(["--user-space", &number.to_string()]);
        }
        if let Some(program) = &options.daemon {
            command.arg("--daemon").arg(program);
        }
        let output = run(command);
        if !output.status.success() {
            return Err(output);
        }
        let record = fs::read(format!("/run/skep-lab/{name}/lab.json"));
        let record = record.expect("a lab that is up is recorded");
        let record = serde_json::from_slice(&record).expect("lab.json is JSON");
        Ok(Self { name, record, _slot: slot })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `skep lab --name NAME …` on the host.
    #[track_caller]
    pub fn command(&self, args: &[&str]) -> Output {
        run(skep(["lab", "--name", &self.name].iter().chain(args)))
    }

    #[track_caller]
    fn command_on(&self, command: &str, nodes: &[&str]) {
        self.command(&[&[command], nodes].concat()).ok();
    }

    /// A node: `n1`, `n2`, …, or the outside `client`.
    pub fn node<'a>(&'a self, name: &'a str) -> Node<'a> {
        Node { lab: self, name }
    }

    /// The outside client, which is no node of the swarm.
    pub fn client(&self) -> Node<'_> {
        self.node("client")
    }

    /// Runs something on a thread of its own in the outside client's network.
    pub fn in_network_of_client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let record = format!("/run/skep-lab/{}/client/init.json", self.name);
        let record = fs::read(record).expect("the lab's client has a record");
        let record: Value = serde_json::from_slice(&record).expect("a record is JSON");
        let namespace = File::open(format!("/proc/{}/ns/net", record["Pid"]));
        let namespace = namespace.expect("the lab's client runs");
        let run = move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).expect("tests of labs run as root");
            work()
        };
        let done = std::thread::scope(|scope| scope.spawn(run).join());
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Ends nodes as if their power went, in the same instant.
    #[track_caller]
    pub fn kill(&self, nodes: &[&str]) {
        self.command_on("kill", nodes);
    }

    /// Ends the daemons of nodes; their containers run on.
    #[track_caller]
    pub fn kill_daemon(&self, nodes: &[&str]) {
        self.command_on("kill", &[&["--daemon-only"], nodes].concat());
    }

    /// Starts nodes, or their daemons, again.
    #[track_caller]
    pub fn start_nodes(&self, nodes: &[&str]) {
        self.command_on("start", nodes);
    }

    /// Pulls the network cables of nodes.
    #[track_caller]
    pub fn cut(&self, nodes: &[&str]) {
        self.command_on("cut", nodes);
    }

    /// Plugs the network cables of nodes in again.
    #[track_caller]
    pub fn heal(&self, nodes: &[&str]) {
        self.command_on("heal", nodes);
    }

    /// The states that `skep lab ls` shows, such as `n1 up`.
    #[track_caller]
    pub fn states(&self) -> Vec<String> {
        let word = |row: &Value, key: &str| row[key].as_str().unwrap_or("?").to_owned();
        let rows = self.command(&["ls", "--format", "json"]).ok().json_lines();
        rows.iter().map(|row| format!("{} {}", word(row, "Name"), word(row, "State"))).collect()
    }

    /// Starts sending requests from a member; see [`Load`].
    #[track_caller]
    pub fn load(&self, from: &str, options: &LoadOptions) -> Load {
        Load::start(self, from, options)
    }

    /// Where a node answers at a port.
    pub fn url(&self, node: &str, port: u16) -> String {
        format!("http://{}:{port}/", self.node(node).address())
    }

    /// Sends so many requests from a member, one after the other.
    #[track_caller]
    pub fn send(&self, from: &str, url: &str, n_requests: u64) -> Report {
        let requests = Some(n_requests);
        self.load(from, &LoadOptions { requests, ..LoadOptions::to([url.to_owned()]) }).finish()
    }

    /// Opens one connection from a member and keeps it.
    #[track_caller]
    pub fn hold(&self, from: &str, url: &str) -> HeldConnection {
        HeldConnection::open(self, from, url)
    }

    /// What the lab is known by, to look for what it left.
    pub fn traces(&self) -> LabTraces {
        let host_link = self.record["HostLink"].as_str().expect("a name").to_owned();
        LabTraces { name: self.name.clone(), host_link }
    }

    /// Removes the lab and fails if that says so; dropping it does the same quietly.
    #[track_caller]
    pub fn down(self) {
        self.command(&["down"]).ok();
    }

    fn address_of(&self, member: &str) -> Ipv4Addr {
        let subnet = self.record["Subnet"].as_str().and_then(|text| text.parse().ok());
        let subnet: Ipv4Addr = subnet.expect("lab.json has the subnet");
        let [a, b, c, _] = subnet.octets();
        let number = match member {
            "client" => Some(250),
            "host" => Some(254),
            node => node.strip_prefix('n').and_then(|number| number.parse().ok()),
        };
        Ipv4Addr::new(a, b, c, number.expect("a member's name"))
    }

    fn node_names(&self) -> Vec<String> {
        let nodes = self.record["Nodes"].as_array().into_iter().flatten();
        nodes.filter_map(|node| Some(node["Name"].as_str()?.to_owned())).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in self.node_names() {
                let log = format!("/var/lib/skep-lab/{}/{node}/daemon.log", self.name);
                let text = fs::read(&log).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let lines: Vec<&str> = text.lines().collect();
                let end = lines.len().saturating_sub(N_LOG_LINES);
                eprintln!("--- the end of {log}\n{}", lines[end..].join("\n"));
            }
        }
        if Path::new("/run/skep-lab").join(&self.name).exists() {
            let output = run(skep(["lab", "--name", &self.name, "down"]));
            if !output.status.success() {
                // A panic here would hide the test's own; the watchdog tries again.
                eprintln!("{output}");
            }
        }
    }
}

/// A member of a lab.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    lab: &'a Lab,
    name: &'a str,
}

impl Node<'_> {
    /// Runs the client on it.
    #[track_caller]
    pub fn skep(&self, args: &[&str]) -> Output {
        self.exec(&[&["skep"], args].concat())
    }

    /// Runs a command on it.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Output {
        self.lab.command(&[&["exec", self.name, "--"], command].concat())
    }

    /// Its address on the lab's network.
    pub fn address(&self) -> Ipv4Addr {
        self.lab.address_of(self.name)
    }

    /// What its daemon logged.
    #[track_caller]
    pub fn log(&self) -> String {
        self.lab.command(&["logs", self.name]).ok().stdout
    }

    /// What it is known by, to look for what it left once it is killed.
    #[track_caller]
    pub fn traces(&self) -> NodeTraces {
        NodeTraces::take(&self.lab.name, self.name)
    }
}

/// Waits for one of the machine's slots for labs; it is free again when the file is closed.
fn take_slot() -> Flock<File> {
    let dir = Path::new("/run/skep-lab");
    wait_until(SLOT_TIMEOUT, "a slot for a lab is free", || {
        let try_slot = |number| {
            fs::create_dir_all(dir).ok()?;
            // The last lab's removal may have taken the directory away; then try again.
            let file = File::create(dir.join(format!(".slot-{number}"))).ok()?;
            Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()
        };
        ((0..N_SLOTS).find_map(try_slot), "all slots are taken by other labs".to_owned())
    })
}
