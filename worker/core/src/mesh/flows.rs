//! Which flows the kernel must forget when published ports change.
//!
//! The kernel translates the first packet of a flow and gives all others the same way. A TCP
//! connection that its backend ends is opened anew by its client. UDP has no end: a client that keeps
//! sending from one port would go on sending to a task that is gone, so the flow must be judged anew.
//! So must a TCP connection whose first packet was lost: its client sends it again after a second, when
//! the task that it was for may have ended.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::Ipv4Net;

use super::twin::pool_contains;
use super::{Endpoint, Objects, PortKey, Protocol};
use crate::network::Connection;

/// What a node's flows of datagrams are judged by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flows {
    pool: Ipv4Net,
    published: BTreeSet<PortKey>,
    backends: BTreeSet<(PortKey, Endpoint)>,
}

impl Flows {
    /// The flows that the ports of `objects`, of both IP versions, allow: to tasks with addresses of
    /// `pool` or their twins.
    pub fn of(objects: [&Objects; 2], pool: Ipv4Net) -> Self {
        let (mut published, mut backends) = (BTreeSet::new(), BTreeSet::new());
        let ports = objects.into_iter().flat_map(|objects| &objects.ports);
        for (key, endpoints) in ports.filter(|(key, _)| key.protocol.is_endless()) {
            published.insert(*key);
            backends.extend(endpoints.iter().map(|endpoint| (*key, *endpoint)));
        }
        Self { pool, published, backends }
    }

    /// Whether the kernel of a node with the addresses `own` must forget a flow, so that its next
    /// packet is judged anew: the mesh sent it to what is no backend of its port now, or it began before
    /// its port was published and goes to the node itself ever since.
    pub fn is_stale(&self, flow: &Connection, own: &BTreeSet<IpAddr>) -> bool {
        let protocol = Protocol::from_number(flow.protocol).filter(|p| p.is_endless());
        let Some(protocol) = protocol else { return false };
        let key = PortKey { protocol, port: flow.destination_port };
        if flow.answers_from == flow.destination {
            return self.published.contains(&key) && own.contains(&flow.destination);
        }
        let endpoint = Endpoint { address: flow.answers_from, port: flow.answers_from_port };
        // What leads elsewhere is another program's translation.
        pool_contains(self.pool, flow.answers_from) && !self.backends.contains(&(key, endpoint))
    }
}

/// The TCP backends of `before` that `after` goes without, each with its port.
pub fn lost_backends(before: &Objects, after: &Objects) -> BTreeSet<(PortKey, Endpoint)> {
    let connected = before.ports.iter().filter(|(key, _)| key.protocol == Protocol::Tcp);
    let lost = connected.flat_map(|(key, endpoints)| {
        let kept = after.ports.get(key).map_or(&[][..], Vec::as_slice);
        // Most ports are as they were, which is cheap to see.
        let endpoints = if kept == endpoints { &[][..] } else { endpoints };
        let kept: BTreeSet<&Endpoint> =
            if endpoints.is_empty() { BTreeSet::new() } else { kept.iter().collect() };
        let lost = endpoints.iter().filter(move |endpoint| !kept.contains(endpoint));
        lost.map(|endpoint| (*key, *endpoint))
    });
    lost.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_lost_by_its_own_port_only() {
        let key = |protocol, port| PortKey { protocol, port };
        let (web, dns) = (key(Protocol::Tcp, 80), key(Protocol::Udp, 53));
        let endpoint = |last| Endpoint { address: IpAddr::from([10, 192, 4, last]), port: 80 };
        let objects = |ports: &[(PortKey, &[u8])]| {
            let ports = ports.iter().map(|(key, backends)| {
                (*key, backends.iter().map(|last| endpoint(*last)).collect())
            });
            Objects { ports: ports.collect(), ..Objects::default() }
        };
        let other = key(Protocol::Tcp, 81);
        let before = objects(&[(web, &[1, 2, 3]), (other, &[1]), (dns, &[1])]);
        for (name, after, expect) in [
            ("nothing changed", before.clone(), [].into()),
            ("one less", objects(&[(web, &[1, 3]), (other, &[1])]), [(web, endpoint(2))].into()),
            (
                "another one",
                objects(&[(web, &[1, 2, 3, 4]), (other, &[4])]),
                [(other, endpoint(1))].into(),
            ),
            (
                "a port is withdrawn",
                objects(&[(other, &[1])]),
                BTreeSet::from([1, 2, 3].map(|last| (web, endpoint(last)))),
            ),
        ] {
            assert_eq!(lost_backends(&before, &after), expect, "{name}");
        }
    }

    #[test]
    fn a_flow_is_forgotten_when_its_port_or_backend_is_not_what_it_was() {
        let udp = |port| PortKey { protocol: Protocol::Udp, port };
        let endpoint = |last| Endpoint { address: IpAddr::from([10, 192, 4, last]), port: 53 };
        let mut objects = Objects::default();
        objects.ports.insert(udp(5353), vec![endpoint(1), endpoint(2)]);
        objects.ports.insert(udp(5354), Vec::new());
        let tcp = PortKey { protocol: Protocol::Tcp, port: 80 };
        objects.ports.insert(tcp, vec![endpoint(1)]);
        let own = BTreeSet::from(["10.98.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()]);
        let address = "fd00:736b:6570:ffff::10.192.4.1".parse().unwrap();
        let mut twins = Objects::default();
        twins.ports.insert(udp(5353), vec![Endpoint { address, port: 53 }]);
        let flows = Flows::of([&objects, &twins], "10.192.0.0/10".parse().unwrap());
        for (protocol, to, port, from, from_port, expect, name) in [
            (17, "10.98.0.1", 5353, "10.192.4.1", 53, false, "a backend"),
            (17, "10.98.0.1", 5353, "10.192.4.3", 53, true, "a backend that is gone"),
            (17, "10.98.0.1", 5353, "10.192.4.1", 54, true, "another port of a task"),
            (17, "10.98.0.1", 5354, "10.192.4.1", 53, true, "no healthy task is left"),
            (17, "10.98.0.1", 5355, "10.192.4.1", 53, true, "the port is published no longer"),
            (17, "10.98.0.1", 5353, "10.98.0.1", 5353, true, "older than the port"),
            (17, "10.98.0.1", 5355, "10.98.0.1", 5355, false, "a program of the node"),
            (17, "10.98.0.9", 5353, "10.98.0.9", 5353, false, "a server elsewhere"),
            (
                17,
                "10.192.4.3",
                53,
                "10.192.4.3",
                53,
                false,
                "from another node, as translated there",
            ),
            (17, "10.98.0.1", 5353, "172.17.0.2", 53, false, "another program's translation"),
            (17, "2001:db8::1", 5353, "fd00:736b:6570:ffff::10.192.4.1", 53, false, "a twin"),
            (
                17,
                "2001:db8::1",
                5353,
                "fd00:736b:6570:ffff::10.192.4.2",
                53,
                true,
                "a twin that is gone",
            ),
            (17, "2001:db8::1", 5353, "2001:db8::1", 5353, true, "older than the port, of IPv6"),
            (17, "2001:db8::1", 5353, "fd00:736b:6570:fffe::10.192.4.2", 53, false, "no twin"),
            (6, "10.98.0.1", 80, "10.192.4.3", 53, false, "TCP drains"),
            (47, "10.98.0.1", 0, "10.192.4.3", 0, false, "a protocol without ports"),
        ] {
            let flow = Connection {
                protocol,
                destination: to.parse().unwrap(),
                destination_port: port,
                answers_from: from.parse().unwrap(),
                answers_from_port: from_port,
            };
            assert_eq!(flows.is_stale(&flow, &own), expect, "{name}");
        }
    }
}
