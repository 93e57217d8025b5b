//! Has the kernel forget flows that are no longer as the published ports say.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::Ipv4Net;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use skep_worker_core::mesh::{Endpoint, Flows, Objects, PortKey, Protocol, lost_backends};

use crate::net::Error;
use crate::net::conntrack::Conntrack;
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
    /// A datagram of before makes its entry only when it leaves.
    has_datagrams: bool,
    /// TCP backends that may still answer requests.
    lost: BTreeSet<(PortKey, Endpoint)>,
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
            before.clone_from(wanted);
        }
        let flows = Flows::of(wanted, self.pool);
        if flows == self.flows {
            return Ok(());
        }
        self.unsettled.has_datagrams = true;
        self.forget_datagrams(&flows, channel)?;
        // Not before: a table whose flows could not be forgotten is applied again.
        self.flows = flows;
        Ok(())
    }

    /// Judges what was under way when the ports changed last. To be called when answers must have come.
    pub(super) fn settle(&mut self, channel: &mut RouteChannel) -> Result<(), Error> {
        if self.unsettled.has_datagrams {
            let flows = self.flows.clone();
            self.forget_datagrams(&flows, channel)?;
            self.unsettled.has_datagrams = false;
        }
        if !self.unsettled.lost.is_empty() {
            forget_unanswered(&mut self.connections, &self.unsettled.lost)?;
            self.unsettled.lost.clear();
        }
        Ok(())
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

/// Has the kernel forget TCP connections to these backends that they have not answered: when their
/// clients send their requests again, they go to another one.
pub(super) fn forget_unanswered(
    connections: &mut Option<Conntrack>,
    backends: &BTreeSet<(PortKey, Endpoint)>,
) -> Result<(), Error> {
    let connections = opened(connections)?;
    for entry in connections.list_unanswered()? {
        let connection = &entry.connection;
        let key = PortKey { protocol: Protocol::Tcp, port: connection.destination_port };
        let backend =
            Endpoint { address: connection.answers_from, port: connection.answers_from_port };
        if connection.protocol == Protocol::Tcp.number() && backends.contains(&(key, backend)) {
            let is_forgotten = connections.delete_unanswered(&entry)?;
            tracing::debug!(?connection, is_forgotten, "a request was not answered");
        }
    }
    Ok(())
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
