//! Grants each task the address of its uplink, from the slice of its node. Addresses on networks are
//! granted by [`network`].
//!
//! The ingress pool is cut into one /22 a node, by node number: node `n` has the 1024 addresses from
//! `pool + 1024 n` on. The first is the slice's name, the last two are its broadcast address and
//! the node's own. Addresses are granted next-fit, so that one is used again as late as possible and
//! nobody meets the successor of the task that it knew. An address is free once its task has ended.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use skep_common::NodeId;
use skep_common::object::{NetworkAttachment, Node};

use crate::by_id::ById;
use crate::network;
use crate::store::State;

/// Prefix length of a node's slice. Fixed: addresses in use are derived from it.
pub const SLICE_PREFIX: u8 = 22;
/// Addresses of a slice that tasks can have.
pub(crate) const SLICE_TASKS_MAX: u32 = (1 << (32 - SLICE_PREFIX)) - 3;
/// The mesh numbers its nodes up to this one: what is above has no slice, however large the pool is.
const NODE_NUMBER_MAX: u16 = 4094;
/// The pool where a swarm names none.
pub const DEFAULT_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 192, 0, 0), 10);

/// Where the searches for free addresses go on.
#[derive(Debug, Default)]
pub(crate) struct Cursors {
    /// Of each node's slice: the last address granted, counted from 1.
    slices: ById<NodeId, u32>,
    /// Of each network.
    pub(crate) networks: network::Cursors,
}

/// The slice of node number `number`; `None` where the mesh or the pool ends before it.
pub fn slice(pool: Ipv4Net, number: u16) -> Option<Ipv4Net> {
    let base = u32::from(pool.network()).checked_add(u32::from(number) << (32 - SLICE_PREFIX))?;
    let base = Ipv4Addr::from(base);
    let is_inside = (1..=NODE_NUMBER_MAX).contains(&number)
        && pool.prefix_len() < SLICE_PREFIX
        && pool.contains(&base);
    is_inside.then(|| Ipv4Net::new_assert(base, SLICE_PREFIX))
}

/// The pool of this swarm.
pub(crate) fn pool(state: &State) -> Ipv4Net {
    state.cluster().map_or(DEFAULT_POOL, |cluster| cluster.ingress_pool)
}

/// The next address of a node that is free; `None` when all are taken.
pub(crate) fn grant(
    state: &State,
    cursors: &mut Cursors,
    node: &Node,
    is_free: impl Fn(Ipv4Addr) -> bool,
) -> Option<NetworkAttachment> {
    let base = u32::from(slice(pool(state), node.number)?.network());
    let cursor = cursors.slices.entry(node.id).or_insert_with(|| highest(state, node.id, base));
    let candidates = (0..SLICE_TASKS_MAX).map(|step| (*cursor + step) % SLICE_TASKS_MAX + 1);
    let offset = candidates.into_iter().find(|offset| is_free(Ipv4Addr::from(base + offset)))?;
    *cursor = offset;
    let address = Ipv4Addr::from(base + offset);
    Some(NetworkAttachment::uplink(address, SLICE_PREFIX))
}

/// A leader without memory goes on after the address of the task that was made last.
fn highest(state: &State, node_id: NodeId, base: u32) -> u32 {
    let tasks = state.tasks_of_node(node_id).filter(|task| task.ingress_address().is_some());
    let last = tasks.max_by_key(|task| (task.meta.created_at, task.ingress_address()));
    let address = last.and_then(|task| task.ingress_address()).map_or(base, u32::from);
    address.saturating_sub(base).min(SLICE_TASKS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_follows_the_node_number() {
        for (pool, number, expect) in [
            ("10.192.0.0/10", 1, Some("10.192.4.0/22")),
            ("10.192.0.0/10", 4094, Some("10.255.248.0/22")),
            ("10.192.0.0/10", 4095, None),
            ("10.0.0.0/8", 4094, Some("10.63.248.0/22")),
            ("10.0.0.0/8", 4095, None),
            ("10.192.0.0/10", 0, None),
            ("10.250.0.0/16", 63, Some("10.250.252.0/22")),
            ("10.250.0.0/16", 64, None),
            ("10.250.0.0/22", 1, None),
            ("255.255.0.0/16", 64, None),
        ] {
            let slice = slice(pool.parse().unwrap(), number).map(|net| net.to_string());
            assert_eq!(slice.as_deref(), expect, "{pool} {number}");
        }
    }
}
