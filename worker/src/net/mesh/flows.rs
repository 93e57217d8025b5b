//! Has the kernel forget flows that are no longer as the published ports say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::Ipv4Net;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use skep_worker_core::mesh::{Endpoint, Flows, Objects, PortKey, Protocol, lost_backends};
use skep_worker_core::network::Connection;

use crate::net::Error;
use crate::net::conntrack::{Conntrack, N_LOOKS, Unanswered};
use crate::net::rtnetlink::RouteChannel;

/// The kernel's flows, and what they were last brought to.
#[derive(Debug)]
pub(super) struct KernelFlows {
    pool: Ipv4Net,
    /// Opened when it is needed first.
    connections: Option<Conntrack>,
    flows: Flows,
    ports: [Objects; 2],
    /// What was under way when the ports changed, and is yet to be judged.
    unsettled: Unsettled,
}

#[derive(Debug, Default)]
struct Unsettled {
    /// How many looks at datagrams are left.
    n_datagram_looks: u8,
    lost: Lost,
}

/// TCP backends that get no connections any more, and may still answer requests of before.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// How many looks at each are left.
    backends: BTreeMap<(PortKey, Endpoint), u8>,
    unanswered: Unanswered,
}

impl Lost {
    pub(super) fn extend(&mut self, backends: BTreeSet<(PortKey, Endpoint)>) {
        self.backends.extend(backends.into_iter().map(|backend| (backend, N_LOOKS)));
    }

    /// Takes those off the list that get connections again.
    pub(super) fn forgive(&mut self, backends: &BTreeSet<(PortKey, Endpoint)>) {
        self.backends.retain(|backend, _| !backends.contains(backend));
        self.forget_where_over();
    }

    /// What a look after the last one finds was not found before, whatever name the kernel gives it.
    fn forget_where_over(&mut self) {
        if self.backends.is_empty() {
            self.unanswered = Unanswered::default();
        }
    }

    /// Has the kernel forget requests that they answered neither until the look before nor since: when their
    /// clients send them again, they go to other backends. Returns whether another look is needed.
    pub(super) fn look(&mut self, connections: &mut Option<Conntrack>) -> Result<bool, Error> {
        self.look_by(|unanswered, is_astray| {
            opened(connections)?.forget_unanswered(unanswered, is_astray)
        })
    }

    fn look_by(
        &mut self,
        forget: impl FnOnce(&mut Unanswered, &dyn Fn(&Connection) -> bool) -> Result<(), Error>,
    ) -> Result<bool, Error> {
        if self.backends.is_empty() {
            return Ok(false);
        }
        let is_astray = |connection: &Connection| {
            let key = PortKey { protocol: Protocol::Tcp, port: connection.destination_port };
            let backend =
                Endpoint { address: connection.answers_from, port: connection.answers_from_port };
            connection.protocol == Protocol::Tcp.number()
                && self.backends.contains_key(&(key, backend))
        };
        forget(&mut self.unanswered, &is_astray)?;
        self.backends.retain(|_, n_looks| {
            *n_looks -= 1;
            *n_looks > 0
        });
        self.forget_where_over();
        Ok(!self.backends.is_empty())
    }
}

impl KernelFlows {
    /// What the kernel has by the rules that were found there.
    pub(super) fn new(present: [&Objects; 2], pool: Ipv4Net) -> Self {
        let flows = Flows::of(present, pool);
        let ports = present.map(Objects::clone);
        Self { pool, connections: None, flows, ports, unsettled: Unsettled::default() }
    }

    /// Forgets flows of datagrams that the ports of `wanted` do not explain, if they differ from the last
    /// ones. To be called when the rules are changed.
    pub(super) fn converge(
        &mut self,
        wanted: [&Objects; 2],
        channel: &mut RouteChannel,
    ) -> Result<(), Error> {
        for (before, wanted) in self.ports.iter_mut().zip(wanted) {
            self.unsettled.lost.extend(lost_backends(before, wanted));
            self.unsettled.lost.forgive(&lost_backends(wanted, before));
            before.clone_from(wanted);
        }
        let flows = Flows::of(wanted, self.pool);
        if flows == self.flows {
            return Ok(());
        }
        self.unsettled.n_datagram_looks = N_LOOKS;
        self.forget_datagrams(&flows, channel)?;
        // Not before: a table whose flows could not be forgotten is applied again.
        self.flows = flows;
        Ok(())
    }

    /// Judges what was under way when the ports changed; returns whether it must be called again.
    pub(super) fn settle(&mut self, channel: &mut RouteChannel) -> Result<bool, Error> {
        let datagrams = self.settle_datagrams(channel);
        let lost = self.unsettled.lost.look(&mut self.connections);
        Ok(datagrams? | lost?)
    }

    fn settle_datagrams(&mut self, channel: &mut RouteChannel) -> Result<bool, Error> {
        if self.unsettled.n_datagram_looks > 0 {
            let flows = self.flows.clone();
            self.forget_datagrams(&flows, channel)?;
            self.unsettled.n_datagram_looks -= 1;
        }
        Ok(self.unsettled.n_datagram_looks > 0)
    }

    fn forget_datagrams(&mut self, flows: &Flows, channel: &mut RouteChannel) -> Result<(), Error> {
        let own = own_addresses(channel)?;
        let connections = opened(&mut self.connections)?;
        for entry in connections.list()? {
            if flows.is_stale(&entry.connection, &own) {
                tracing::debug!(flow = ?entry.connection, "forgetting a flow of the mesh");
                connections.delete(&entry)?;
            }
        }
        Ok(())
    }
}

fn opened(connections: &mut Option<Conntrack>) -> Result<&mut Conntrack, Error> {
    Ok(match connections {
        Some(connections) => connections,
        none => none.insert(Conntrack::open()?),
    })
}

/// The node's addresses, but for those of loopback: what comes in there is not published by rules.
fn own_addresses(channel: &mut RouteChannel) -> Result<BTreeSet<IpAddr>, Error> {
    let query = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let found = channel.dump("list the addresses of this node", query)?;
    let addresses = found.into_iter().filter_map(|message| {
        let RouteNetlinkMessage::NewAddress(message) = message else { return None };
        // Where the two differ, the other is that of the far end.
        let (mut local, mut address) = (None, None);
        for attribute in message.attributes {
            match attribute {
                AddressAttribute::Local(found) => local = Some(found),
                AddressAttribute::Address(found) => address = Some(found),
                _ => {}
            }
        }
        local.or(address)
    });
    Ok(addresses.filter(|address| !address.is_loopback()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(port: u16, last: u8) -> (PortKey, Endpoint) {
        let key = PortKey { protocol: Protocol::Tcp, port };
        (key, Endpoint { address: IpAddr::from([10, 192, 4, last]), port: 80 })
    }

    fn request(port: u16, last: u8, protocol: Protocol) -> Connection {
        Connection {
            protocol: protocol.number(),
            destination: IpAddr::from([10, 98, 0, 1]),
            destination_port: port,
            answers_from: IpAddr::from([10, 192, 4, last]),
            answers_from_port: 80,
        }
    }

    /// Of requests to these addresses those that a look takes for lost, and whether another look is needed.
    fn look(lost: &mut Lost) -> (Vec<u8>, bool) {
        let mut found = Vec::new();
        let is_left = lost.look_by(|_, is_astray| {
            found.extend((1..=3).filter(|last| is_astray(&request(80, *last, Protocol::Tcp))));
            Ok(())
        });
        (found, is_left.expect("nothing fails"))
    }

    #[test]
    fn each_lost_backend_is_looked_at_twice_whenever_it_was_lost() {
        let mut lost = Lost::default();
        assert_eq!(look(&mut lost), (vec![], false));
        lost.extend([backend(80, 1)].into());
        assert_eq!(look(&mut lost), (vec![1], true));
        lost.extend([backend(80, 2)].into());
        assert_eq!(look(&mut lost), (vec![1, 2], true));
        assert_eq!(look(&mut lost), (vec![2], false));
        assert_eq!(look(&mut lost), (vec![], false));
    }

    #[test]
    fn what_gets_connections_again_is_lost_no_more() {
        let mut lost = Lost::default();
        lost.extend([backend(80, 1), backend(80, 2)].into());
        lost.forgive(&[backend(80, 1), backend(81, 2)].into());
        assert_eq!(look(&mut lost), (vec![2], true));
    }

    #[test]
    fn a_look_that_fails_is_one_that_is_left() {
        let mut lost = Lost::default();
        lost.extend([backend(80, 1)].into());
        for _ in 0..3 {
            let refused = Error::file("list", "/", std::io::Error::other("full"));
            assert!(lost.look_by(|_, _| Err(refused)).is_err());
        }
        assert_eq!(look(&mut lost), (vec![1], true));
        assert_eq!(look(&mut lost), (vec![1], false));
    }

    #[test]
    fn only_tcp_of_the_same_port_is_lost_with_a_backend() {
        let mut lost = Lost::default();
        lost.extend([backend(80, 1)].into());
        let is_left = lost.look_by(|_, is_astray| {
            assert!(is_astray(&request(80, 1, Protocol::Tcp)));
            assert!(!is_astray(&request(80, 1, Protocol::Udp)));
            assert!(!is_astray(&request(81, 1, Protocol::Tcp)));
            Ok(())
        });
        assert!(is_left.expect("nothing fails"));
    }
}
