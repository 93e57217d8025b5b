//! IPv6 beside the addresses of the pool: each has a twin, which follows from it, so that nothing more is
//! allocated, stored or told.
//!
//! The twin of 10.192.4.1 is `fd00:736b:6570:ffff::10.192.4.1`, and the slice of a node is a prefix
//! there as it is here. The prefix is beside those of overlay networks, which go by their numbers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// The prefix of all twins, without the address in the last 32 bits.
const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x736b, 0x6570, 0xffff, 0, 0, 0, 0);
const PREFIX_LENGTH: u8 = 96;

/// The IPv6 address that belongs to an address of the pool.
pub fn twin(address: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(PREFIX) | u128::from(u32::from(address)))
}

/// The address of the pool that an IPv6 address belongs to.
pub fn of_twin(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let low = u32::try_from(u128::from(address) ^ u128::from(PREFIX)).ok()?;
    Some(Ipv4Addr::from(low))
}

/// The IPv6 prefix that belongs to a part of the pool.
pub fn twin_net(net: Ipv4Net) -> Ipv6Net {
    Ipv6Net::new_assert(twin(net.addr()), PREFIX_LENGTH + net.prefix_len())
}

/// Whether the pool, or what is beside it in IPv6, has the address.
pub(super) fn pool_contains(pool: Ipv4Net, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => pool.contains(&address),
        IpAddr::V6(address) => of_twin(address).is_some_and(|address| pool.contains(&address)),
    }
}
