//! Address arithmetic: which addresses of the pool belong to which node.
//!
//! Node `n` owns the slice `pool + n * 2^(32 - slice_prefix)`. The last usable address of a slice
//! is the node's own: its bridge has it, and its end of the tunnel has it too. Slice 0 is never
//! handed out.
//!
//! Differs from the first proof of the mesh, where tunnel addresses were taken from slice 0: a /22
//! slice has 1022 addresses for up to 4094 nodes, so the tunnel shares the bridge's address.

use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::Error;

/// The highest node number: it must fit the 12-bit field of packet marks, and 4095 stays free.
pub const NODE_NUMBER_MAX: u16 = 4094;

/// The longest slice that still holds a node address and a task address.
const SLICE_PREFIX_MAX: u8 = 30;

/// The address pool of a cluster, cut into one slice for each node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slices {
    pool: Ipv4Net,
    slice_prefix: u8,
}

impl Slices {
    /// Cuts `pool` into slices of `slice_prefix` bits; refuses a pool without room for one node.
    pub fn new(pool: Ipv4Net, slice_prefix: u8) -> Result<Self, Error> {
        let pool = pool.trunc();
        if slice_prefix <= pool.prefix_len() || slice_prefix > SLICE_PREFIX_MAX {
            return Err(Error::SlicePrefix { pool, slice_prefix });
        }
        Ok(Self { pool, slice_prefix })
    }

    /// The whole pool.
    pub fn pool(&self) -> Ipv4Net {
        self.pool
    }

    /// The prefix length of every slice.
    pub fn slice_prefix(&self) -> u8 {
        self.slice_prefix
    }

    /// The highest node number that has a slice in this pool.
    pub fn number_max(&self) -> u16 {
        let bits = u32::from(self.slice_prefix - self.pool.prefix_len());
        let slices = 1u64 << bits;
        u16::try_from(slices - 1).unwrap_or(NODE_NUMBER_MAX).min(NODE_NUMBER_MAX)
    }

    /// Refuses a node number that has no slice.
    pub fn check_number(&self, number: u16) -> Result<(), Error> {
        if number == 0 || number > self.number_max() {
            return Err(Error::NumberOutOfRange {
                number,
                pool: self.pool,
                max: self.number_max(),
            });
        }
        Ok(())
    }

    /// The slice of node `number`, which [`Slices::check_number`] accepts.
    pub fn slice(&self, number: u16) -> Ipv4Net {
        debug_assert!(self.check_number(number).is_ok(), "node number {number} has no slice");
        let size = 1u32 << (32 - u32::from(self.slice_prefix));
        let base = u32::from(self.pool.network()).wrapping_add(u32::from(number) * size);
        Ipv4Net::new_assert(Ipv4Addr::from(base), self.slice_prefix)
    }

    /// The node whose slice has `address`, if there is one.
    pub fn number_of(&self, address: Ipv4Addr) -> Option<u16> {
        let offset = u32::from(address).checked_sub(u32::from(self.pool.network()))?;
        let number = u16::try_from(offset >> (32 - u32::from(self.slice_prefix))).ok()?;
        self.check_number(number).is_ok().then_some(number)
    }

    /// The address of node `number`'s bridge, the default gateway of its tasks: the last usable
    /// address of its slice.
    pub fn bridge_address(&self, number: u16) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.slice(number).broadcast()) - 1)
    }

    /// The address of node `number`'s end of the tunnel, which is its bridge's address.
    pub fn tunnel_address(&self, number: u16) -> Ipv4Addr {
        self.bridge_address(number)
    }

    /// The addresses that tasks on node `number` may have, in ascending order.
    pub fn task_addresses(&self, number: u16) -> impl Iterator<Item = Ipv4Addr> + use<> {
        let first = u32::from(self.slice(number).network()) + 1;
        (first..u32::from(self.bridge_address(number))).map(Ipv4Addr::from)
    }

    /// Whether a task on node `number` may have `address`.
    pub fn is_task_address(&self, number: u16, address: Ipv4Addr) -> bool {
        let slice = self.slice(number);
        slice.contains(&address)
            && address != slice.network()
            && address != slice.broadcast()
            && address != self.bridge_address(number)
    }
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of node `number`'s end of the tunnel: locally administered, unicast, and the
    /// same on every node, so that no node has to be asked for it.
    pub fn tunnel(number: u16) -> Self {
        Self::derived(0, number)
    }

    /// The address of node `number`'s bridge. A bridge without a fixed address takes one of its
    /// ports', and containers would talk to a stale one whenever a port leaves.
    pub fn bridge(number: u16) -> Self {
        Self::derived(1, number)
    }

    /// The address of a task's interface on an overlay network: what Docker derives from the IPv4
    /// address, so that every node knows it without asking.
    pub fn of_endpoint(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0x42, a, b, c, d])
    }

    fn derived(device: u8, number: u16) -> Self {
        let [high, low] = number.to_be_bytes();
        Self([0x02, b's', b'k', device, high, low])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The name of the node's end of a task's uplink: a prefix and a 48-bit hash of the task id, since
/// the kernel allows 15 characters and a task id has 25.
pub fn interface_name(task_id: &str) -> String {
    // FNV-1a: names need to differ, not to resist an attacker, who cannot choose a task id.
    let hash = task_id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("sk-{:012x}", (hash ^ (hash >> 48)) & 0xffff_ffff_ffff)
}
