//! Debian's etcd on the managers' nodes of a lab, for comparison.

use std::path::PathBuf;

use skep_cluster_tests::{Lab, Running, SETTLES_WITHIN, wait_until};

use super::program;
use super::usage::named;

/// Where clients connect, on each node.
const CLIENT_PORT: u16 = 2479;
const PEER_PORT: u16 = 2480;
/// Below the directory that the daemon of the node has too: the same disk.
const DATA_DIR: &str = "/var/lib/skep/etcd";

/// A cluster of etcd, a member on each of some nodes; it ends with the lab.
pub(crate) struct Etcd {
    addresses: Vec<String>,
    /// Where each of its members says that clients connect.
    urls: Vec<String>,
    _members: Vec<Running>,
}

impl Etcd {
    /// Whether the machine has it; says how to get it where not.
    pub(crate) fn is_installed_or_say() -> bool {
        let is_installed = program("etcd").is_some();
        if !is_installed {
            println!("not measured: etcd is not installed (apt-get install etcd-server)");
        }
        is_installed
    }

    /// Starts its members, and waits until they have a leader.
    pub(crate) fn start(lab: &Lab, nodes: &[&str]) -> Self {
        let url = |node: &str, port: u16| format!("http://{}:{port}", lab.node(node).address());
        let cluster: Vec<String> =
            nodes.iter().map(|node| format!("{node}={}", url(node, PEER_PORT))).collect();
        let cluster = cluster.join(",");
        let program = program("etcd").expect("whoever starts it has asked").display().to_string();
        let member = |node: &&str| {
            let (clients, peers) = (url(node, CLIENT_PORT), url(node, PEER_PORT));
            let flags = [
                ("--name", *node),
                ("--data-dir", DATA_DIR),
                ("--listen-client-urls", &clients),
                ("--advertise-client-urls", &clients),
                ("--listen-peer-urls", &peers),
                ("--initial-advertise-peer-urls", &peers),
                ("--initial-cluster", &cluster),
                ("--log-level", "error"),
            ];
            let flags = flags.iter().flat_map(|(name, value)| [*name, *value]);
            let command: Vec<&str> = std::iter::once(&*program).chain(flags).collect();
            lab.start_command(node, &command)
        };
        let members: Vec<Running> = nodes.iter().map(member).collect();
        for (node, member) in nodes.iter().zip(&members) {
            let health = format!("{}/health", url(node, CLIENT_PORT));
            wait_until(SETTLES_WITHIN, &format!("etcd on {node} is healthy"), || {
                let output = lab.client().exec(&["curl", "--silent", "--max-time", "2", &health]);
                let is_healthy = output.stdout.contains(r#""health":"true""#);
                (is_healthy.then_some(()), format!("{output}\n{}", member.lines().join("\n")))
            });
        }
        let address = |node: &&str| format!("{}:{CLIENT_PORT}", lab.node(node).address());
        Self {
            addresses: nodes.iter().map(address).collect(),
            urls: nodes.iter().map(|node| url(node, CLIENT_PORT)).collect(),
            _members: members,
        }
    }

    /// Where clients connect.
    pub(crate) fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Its processes, by their directories in `/proc`.
    pub(crate) fn processes(&self) -> Vec<PathBuf> {
        self.urls.iter().flat_map(|url| named("etcd", url)).collect()
    }
}
