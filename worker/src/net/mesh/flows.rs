//! Has the kernel forget flows of datagrams that are no longer as the published ports say.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::Ipv4Net;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use skep_worker_core::mesh::{Flows, Objects};

use crate::net::Error;
use crate::net::conntrack::Conntrack;
use crate::net::rtnetlink::RouteChannel;

/// The kernel's flows, and what they were last brought to.
#[derive(Debug)]
pub(super) struct KernelFlows {
    pool: Ipv4Net,
    /// Opened when it is needed first: most swarms publish TCP alone.
    connections: Option<Conntrack>,
    flows: Flows,
    /// Whether a packet may have been under way by the rules of before when the last were forgotten.
    is_due: bool,
}

impl KernelFlows {
    /// What the kernel has by the rules that were found there.
    pub(super) fn new(present: [&Objects; 2], pool: Ipv4Net) -> Self {
        let flows = Flows::of(present, pool);
        Self { pool, connections: None, flows, is_due: false }
    }

    /// Forgets what the ports of `wanted` do not explain, if they differ from the last ones; and once
    /// more the next time, since such a packet makes its entry only when it leaves. To be called when the
    /// rules are changed.
    pub(super) fn converge(
        &mut self,
        wanted: [&Objects; 2],
        channel: &mut RouteChannel,
    ) -> Result<(), Error> {
        let flows = Flows::of(wanted, self.pool);
        let is_changed = flows != self.flows;
        if !is_changed && !self.is_due {
            return Ok(());
        }
        let own = own_addresses(channel)?;
        let connections = match &mut self.connections {
            Some(connections) => connections,
            none => none.insert(Conntrack::open()?),
        };
        for entry in connections.list()? {
            if flows.is_stale(&entry.connection, &own) {
                tracing::debug!(flow = ?entry.connection, "forgetting a flow of the mesh");
                connections.delete(&entry)?;
            }
        }
        (self.flows, self.is_due) = (flows, is_changed);
        Ok(())
    }
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
