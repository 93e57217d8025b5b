//! What the host itself has of IPv6.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use nix::ifaddrs::getifaddrs;
use skep_worker_core::mesh::of_twin;

use super::mesh::links::has_room_for_ipv6;
use super::rtnetlink::RouteChannel;
use super::sysctl;

/// The addresses by which others know this host, where it has IPv6 and its mesh carries it over the
/// `underlay` interface; `None` where not.
pub fn ipv6_addresses(underlay: &str) -> Option<BTreeSet<Ipv6Addr>> {
    if !sysctl::host_has_ipv6() {
        return None;
    }
    let link = RouteChannel::open().and_then(|mut channel| channel.link(underlay));
    let link = link.unwrap_or_else(|error| {
        tracing::warn!(%error, interface = underlay, "published ports have no IPv6 here");
        None
    });
    if !link.is_some_and(|link| has_room_for_ipv6(link.mtu)) {
        return None;
    }
    let interfaces = getifaddrs().inspect_err(|error| {
        tracing::warn!(%error, "the addresses of this host cannot be listed; clients on it may not reach their own published ports by IPv6");
    });
    let addresses = interfaces.into_iter().flatten().filter_map(|interface| interface.address);
    let addresses = addresses.filter_map(|address| Some(address.as_sockaddr_in6()?.ip()));
    Some(addresses.filter(is_known_elsewhere).collect())
}

/// Neither an address of this host or link alone, nor one that the mesh gave.
fn is_known_elsewhere(address: &Ipv6Addr) -> bool {
    !address.is_loopback() && !address.is_unicast_link_local() && of_twin(*address).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_whose_mesh_has_no_room_for_ipv6_has_none() {
        assert!(has_room_for_ipv6(1330) && !has_room_for_ipv6(1329));
        assert_eq!(ipv6_addresses("no-such-thing"), None);
        assert_eq!(ipv6_addresses("lo").is_some(), sysctl::host_has_ipv6());
    }

    #[test]
    fn addresses_that_others_may_see_are_named() {
        for (address, expect) in [
            ("::1", false),
            ("fe80::1", false),
            ("fd00:736b:6570:ffff::10.192.4.1", false),
            ("fd00:98::1", true),
            ("2001:db8::1", true),
        ] {
            assert_eq!(is_known_elsewhere(&address.parse().unwrap()), expect, "{address}");
        }
    }
}
