//! Where programs of a benchmark run: on a node of a lab, or in the network of a container there.

use std::fs;
use std::net::Ipv4Addr;

use skep_cluster_tests::{Lab, Output, Running, Whoami};

/// A node, or the network of one of its containers. What runs there ends with the node.
#[derive(Debug, Clone)]
pub(crate) struct Place<'a> {
    lab: &'a Lab,
    node: String,
    /// What enters the container's network, in front of each command.
    enter: Vec<String>,
}

impl<'a> Place<'a> {
    /// A node itself.
    pub(crate) fn on(lab: &'a Lab, node: &str) -> Self {
        Self { lab, node: node.to_owned(), enter: Vec::new() }
    }

    /// The network of the only container of a service.
    #[track_caller]
    pub(crate) fn of_service(lab: &'a Lab, service: &str) -> Self {
        let containers = lab.whoamis_of(service);
        let [container] = &containers[..] else {
            panic!("one task of {service} was asked for: {containers:#?}")
        };
        let pid = pid_on_node(container);
        let enter = vec!["nsenter".to_owned(), format!("--net=/proc/{pid}/ns/net")];
        Self { lab, node: container.node.clone(), enter }
    }

    /// Runs a command to its end.
    #[track_caller]
    pub(crate) fn exec(&self, command: &[&str]) -> Output {
        self.lab.node(&self.node).exec(&self.words(command))
    }

    /// Starts a command that goes on.
    #[track_caller]
    pub(crate) fn start(&self, command: &[&str]) -> Running {
        self.lab.start_command(&self.node, &self.words(command))
    }

    /// The IPv4 address of the first interface.
    #[track_caller]
    pub(crate) fn address(&self) -> Ipv4Addr {
        let show = ["ip", "-4", "-oneline", "address", "show", "dev", "eth0", "scope", "global"];
        let output = self.exec(&show).ok();
        let mut words = output.stdout.split_whitespace();
        let address = words.find(|word| *word == "inet").and_then(|_| words.next());
        let address = address.and_then(|cidr| cidr.split('/').next()?.parse().ok());
        address.unwrap_or_else(|| panic!("there is no address: {output}"))
    }

    /// Has connections that were closed be forgotten after a second. New connections leave an entry
    /// each; with the kernel's two minutes, the table of connections would fill.
    #[track_caller]
    pub(crate) fn forget_connections_soon(&self) {
        let setting = "net.netfilter.nf_conntrack_tcp_timeout_time_wait=1";
        self.exec(&["sysctl", "-qw", setting]).ok();
    }

    fn words<'b>(&'b self, command: &[&'b str]) -> Vec<&'b str> {
        self.enter.iter().map(String::as_str).chain(command.iter().copied()).collect()
    }
}

/// The number that the node itself gives to a container's first process: the host counts otherwise.
#[track_caller]
fn pid_on_node(container: &Whoami) -> u32 {
    let status = fs::read_to_string(format!("/proc/{}/status", container.pid));
    let status = status.unwrap_or_else(|error| panic!("{container:?} has ended: {error}"));
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let of_node = numbers.and_then(|numbers| numbers.split_whitespace().nth(1)?.parse().ok());
    of_node.unwrap_or_else(|| panic!("{container:?} has no number on its node: {status}"))
}
