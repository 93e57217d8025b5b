//! A node of a lab as a machine: its files, its daemon's process, and its containers' processes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::lab::{Lab, Node};
use crate::swarm::SETTLES_WITHIN;
use crate::wait::wait_until;

/// The version and the digest of a manager's store.
type Store = (u64, String);

impl Lab {
    /// A node's data directory, as this test sees it.
    pub fn data_dir(&self, node: &str) -> PathBuf {
        PathBuf::from(format!("/var/lib/skep-lab/{}/{node}/data", self.name()))
    }

    /// The first processes of all containers on a node by their ids, as the node numbers them.
    #[track_caller]
    pub fn containers(&self, node: &str) -> BTreeMap<String, i64> {
        // What has ended keeps its directory until its task is deleted.
        let script = "for file in /run/skep/containers/*/state.json; do \
                      test ! -f $file || { echo $file; cat $file; echo; }; done; \
                      echo /proc/[0-9]*";
        let output = self.node(node).exec(&["sh", "-c", script]).ok();
        let mut lines: Vec<&str> = output.stdout.lines().filter(|line| !line.is_empty()).collect();
        let processes: BTreeSet<&str> = lines.pop().unwrap_or_default().split(' ').collect();
        let mut found = BTreeMap::new();
        for [file, json] in lines.as_chunks().0 {
            let state: Value = serde_json::from_str(json).expect("state.json is JSON");
            let id = file.split('/').nth_back(1).expect("the file is in a directory");
            let pid = state["init"]["Pid"].as_i64().unwrap_or_default();
            if processes.contains(format!("/proc/{pid}").as_str()) {
                found.insert(id.to_owned(), pid);
            }
        }
        found
    }

    /// Waits until a node's daemon has ended; gives how, such as `exited with code 0`.
    #[track_caller]
    pub fn wait_for_daemon_end(&self, node: &str) -> String {
        wait_until(SETTLES_WITHIN, &format!("the daemon of {node} has ended"), || {
            let status = self.ask_init(node);
            let is_running = status["IsDaemonRunning"] == true;
            let exit = status["LastExit"].as_str().map(ToOwned::to_owned);
            (exit.filter(|_| !is_running), status.to_string())
        })
    }

    /// Asks the first process of a node how its daemon is.
    #[track_caller]
    fn ask_init(&self, node: &str) -> Value {
        let path = format!("/run/skep-lab/{}/{node}/control.sock", self.name());
        let mut stream = UnixStream::connect(&path).expect("a node's init listens");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a time limit");
        stream.write_all(b"\"Status\"\n").expect("an init reads");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("an init answers");
        serde_json::from_str(&line).expect("an init answers in JSON")
    }

    /// Waits until so many managers answer and have the same store; gives its version.
    #[track_caller]
    pub fn wait_until_alike(&self, via: &str, n_managers: usize) -> u64 {
        let what = format!("{n_managers} managers have the same store");
        wait_until(SETTLES_WITHIN, &what, || {
            let output = self.node(via).skep(&["debug", "digest", "--format", "json"]);
            let rows = match output.status.success() {
                true => output.json_lines(),
                false => Vec::new(),
            };
            let store = |row: &Value| -> Option<Store> {
                let digest = row["Digest"].as_str().filter(|digest| !digest.is_empty())?;
                Some((row["Version"].as_u64()?, digest.to_owned()))
            };
            let mut stores: Vec<Store> = rows.iter().filter_map(store).collect();
            let n_answers = stores.len();
            stores.dedup();
            let is_alike = n_answers == n_managers && rows.len() == n_managers;
            let version = stores.first().map(|(version, _)| *version);
            (version.filter(|_| is_alike && stores.len() == 1), output.to_string())
        })
    }

    /// The node that leads the managers.
    #[track_caller]
    pub fn wait_for_leader(&self, via: &str) -> String {
        wait_until(SETTLES_WITHIN, "a manager leads", || {
            let output = self.node(via).skep(&["node", "ls", "--format", "json"]);
            let rows = match output.status.success() {
                true => output.json_lines(),
                false => Vec::new(),
            };
            let leader = rows.iter().find(|row| row["ManagerStatus"] == "Leader");
            let name = leader.and_then(|row| Some(row["Hostname"].as_str()?.to_owned()));
            (name, output.to_string())
        })
    }
}

impl Node<'_> {
    /// Sends a signal, such as `TERM`, to the daemon.
    #[track_caller]
    pub fn signal_daemon(&self, signal: &str) {
        let list = self.exec(&["ps", "-e", "-o", "pid=,args="]).ok();
        let is_daemon = |line: &&str| line.contains(" daemon --hostname ");
        let line = list.stdout.lines().find(is_daemon).expect("the daemon runs");
        let pid = line.trim().split(' ').next().expect("a line begins with the pid");
        self.exec(&["kill", "-s", signal, pid]).ok();
    }
}
