//! The mesh of a node that balances in user space: a bridge for the uplinks of its tasks, and listeners.
//!
//! The daemon relays every published port of TCP, with the health, the turns and the withdrawal of the same table.
//! Tasks of the node are reached by the bridge, those of other nodes through their daemons, so that neither VXLAN
//! nor nftables is needed anywhere. No packet is forwarded, and none is masqueraded: what tasks send to the outside
//! has no answer.

use std::fs::File;

use skep_worker_core::mesh::{MeshTable, PortKey, Protocol, Slices, user_space_relays};

use super::kernel::{Balancing, lock, open_routes6, open_rules, unlock};
use super::links;
use super::options::Options;
use super::ports::{Condition, Follow, ListenerChanges, Ports};
use super::routes::Routes;
use crate::net::Error;
use crate::net::rtnetlink::RouteChannel;

/// The state of the mesh on a node that balances in user space.
#[derive(Debug)]
pub(super) struct UserSpace {
    options: Options,
    channel: RouteChannel,
    slices: Slices,
    ports: Ports,
    lock: File,
}

impl UserSpace {
    /// Makes the bridge, and removes what an earlier daemon had the kernel balance by.
    pub(super) fn start(options: Options) -> Result<Self, Error> {
        let slices = options.slices()?;
        let lock = lock(&options)?;
        let mut channel = RouteChannel::open()?;
        links::check_pool(&mut channel, slices.pool())?;
        forget_rules(&options, &slices, &mut channel)?;
        links::ensure_bridge(&mut channel, &options, &slices)?;
        Ok(Self { options, channel, slices, ports: Ports::new(true), lock })
    }
}

impl Balancing for UserSpace {
    fn apply(&mut self, table: &MeshTable, follow: Follow<'_>) -> Result<Vec<Condition>, Error> {
        self.options.check_table(table)?;
        let version = table.version;
        table.validate().map_err(|source| Error::Table { version, source })?;
        // Its failure must not keep tasks in turn that the table withdraws: it is told last.
        let bridge = links::ensure_bridge(&mut self.channel, &self.options, &self.slices);
        let mut changes =
            ListenerChanges { balance: user_space_relays(table), ..ListenerChanges::default() };
        let carried = table.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
        let refused = self.ports.take(carried, &mut changes);
        let mut conditions: Vec<Condition> =
            refused.into_iter().map(|refused| refused.condition).collect();
        for condition in &conditions {
            changes.balance.remove(&condition.port());
        }
        let others = table.ports.iter().filter(|port| port.protocol != Protocol::Tcp);
        conditions.extend(others.map(|port| Condition::NotCarried {
            service_id: port.service_id.clone(),
            port: PortKey { protocol: port.protocol, port: port.published },
        }));
        self.ports.note(&conditions);
        changes.withdraw = self.ports.keep(table);
        follow(changes);
        bridge?;
        Ok(conditions)
    }

    fn has_other_conditions(&self) -> bool {
        self.ports.has_other_conditions()
    }

    fn release(&mut self) -> Result<(), Error> {
        self.ports.release();
        unlock(&self.lock, &self.options)
    }

    fn teardown(&mut self) -> Result<(), Error> {
        links::remove(&mut self.channel).and(self.release())
    }
}

/// Rules of an earlier daemon would go on to take connections, and nothing would keep them up to date.
fn forget_rules(
    options: &Options,
    slices: &Slices,
    channel: &mut RouteChannel,
) -> Result<(), Error> {
    match open_rules(options, slices).and_then(|mut rules| rules.observe().map(|_| rules)) {
        Ok(mut rules) => rules.remove()?,
        Err(error) => tracing::debug!(%error, "there are no rules to remove on this kernel"),
    }
    Routes::open(options)?.remove_rules()?;
    open_routes6(options)?.map_or(Ok(()), |mut routes| routes.remove_rules())?;
    links::remove_tunnel(channel)
}
