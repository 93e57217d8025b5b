//! Which networks are refused, with which words, and which subnets the others get.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use skep_common::object::Subnet;
use skep_common::spec::{ENCRYPTED_OPTION, IpamConfig, MTU_OPTION, NetworkSpec};

use super::Error;
use crate::allocator;
use crate::store::State;

/// The pool of subnets where a swarm names none. The mesh's uplinks have the quarter beside it.
pub const DEFAULT_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 9);
/// Prefix length of a subnet of the pool: 4093 addresses. A /24 runs out (moby#43052).
pub const DEFAULT_SUBNET_SIZE: u8 = 20;
/// IPv6 subnets that nobody chose are /64s of it, by the low 16 bits of the network's identifier.
const IPV6_POOL: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x736b, 0x6570, 0, 0, 0, 0, 0), 48);
/// Longer prefixes leave no address for a task beside the gateway.
const IPV4_PREFIX_MAX: u8 = 30;
const IPV6_PREFIX_MAX: u8 = 126;
/// The least MTU that IPv4 promises, and the greatest that an interface can have.
const MTU: std::ops::RangeInclusive<u32> = 576..=65535;
/// The least MTU of IPv6.
const IPV6_MTU_MIN: u32 = 1280;
/// Names are parts of the DNS names of services.
const NAME_LENGTH_MAX: usize = 128;

fn refuse<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid(text.into()))
}

/// Refuses a spec that cannot be made as asked, but for its subnets.
pub(super) fn check(spec: &NetworkSpec) -> Result<(), Error> {
    check_name(&spec.name)?;
    if spec.ingress.unwrap_or_default() {
        return refuse("Ingress network (ingress) is already present");
    }
    let driver = spec.driver.as_deref().unwrap_or_default();
    if !["", "overlay"].contains(&driver) {
        return refuse(format!(
            "network driver {driver:?} is not supported: networks of a swarm have the driver overlay"
        ));
    }
    let ipam = spec.ipam.as_ref().and_then(|ipam| ipam.driver.as_deref()).unwrap_or_default();
    if !["", "default"].contains(&ipam) {
        return refuse(format!("IPAM driver {ipam:?} is not supported: use default"));
    }
    for key in ["ConfigFrom", "ConfigOnly"] {
        let value = spec.extra.get(key);
        if value.is_some_and(|value| *value != serde_json::Value::Bool(false) && !value.is_null()) {
            return refuse(format!("{key} is not supported: give the settings themselves"));
        }
    }
    check_options(spec)
}

fn check_name(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return refuse("meta: name must be provided");
    }
    if name.len() > NAME_LENGTH_MAX {
        return refuse(format!("the network's name must be {NAME_LENGTH_MAX} characters or fewer"));
    }
    let is_inner = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(is_inner) {
        return refuse(format!(
            "invalid network name {name:?}: only [a-zA-Z0-9][a-zA-Z0-9_.-]* are allowed"
        ));
    }
    Ok(())
}

fn check_options(spec: &NetworkSpec) -> Result<(), Error> {
    for (key, value) in spec.options.iter().flatten() {
        match key.as_str() {
            MTU_OPTION => {
                let mtu = value.parse().ok().filter(|mtu| MTU.contains(mtu));
                let Some(mtu) = mtu else {
                    let (least, most) = (MTU.start(), MTU.end());
                    return refuse(format!(
                        "option {MTU_OPTION}={value:?} is not a number from {least} to {most}"
                    ));
                };
                if spec.enable_ipv6.unwrap_or_default() && mtu < IPV6_MTU_MIN {
                    return refuse(format!(
                        "option {MTU_OPTION}={mtu} is too little for IPv6: give {IPV6_MTU_MIN} or more"
                    ));
                }
            }
            ENCRYPTED_OPTION => {
                // Docker takes any value for yes; these say the opposite of what they would do.
                if value.parse() == Ok(false) {
                    return refuse(format!(
                        "option {ENCRYPTED_OPTION}={value:?} would encrypt, as any value does: leave the \
                         option out"
                    ));
                }
            }
            other => {
                return refuse(format!(
                    "network option {other:?} is not known: there are {MTU_OPTION} and {ENCRYPTED_OPTION}"
                ));
            }
        }
    }
    Ok(())
}

/// The MTU that a valid spec asks for; 0 is what the tunnel leaves.
pub(crate) fn mtu(spec: &NetworkSpec) -> u32 {
    let option = spec.options.as_ref().and_then(|options| options.get(MTU_OPTION));
    option.and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// Whether a spec asks for encryption.
pub(crate) fn is_encrypted(spec: &NetworkSpec) -> bool {
    spec.options.as_ref().is_some_and(|options| options.contains_key(ENCRYPTED_OPTION))
}

/// The subnets of a new network: those that were asked for, and chosen ones for the rest.
pub(super) fn subnets(state: &State, spec: &NetworkSpec, vni: u32) -> Result<Vec<Subnet>, Error> {
    let (mut v4, mut v6) = (None, None);
    for config in spec.ipam.iter().flat_map(|ipam| ipam.config.iter().flatten()) {
        let Some(subnet) = asked(spec, config)? else { continue };
        let (place, family) = match subnet.subnet {
            IpNet::V4(_) => (&mut v4, "IPv4"),
            IpNet::V6(_) => (&mut v6, "IPv6"),
        };
        if let Some(Subnet { subnet: first, .. }) = place.replace(subnet) {
            return refuse(format!(
                "network {} has two {family} subnets, {first} and another: give one",
                spec.name
            ));
        }
    }
    let ingress = IpNet::V4(allocator::pool(state));
    if let Some(Subnet { subnet, .. }) = v4.as_ref().filter(|v4| overlap(&v4.subnet, &ingress)) {
        return refuse(format!(
            "subnet {subnet} overlaps the ingress pool {ingress}, which uplinks have their addresses of: \
             give another"
        ));
    }
    let v4 = v4.map_or_else(|| free_subnet(state).map(|net| whole(IpNet::V4(net))), Ok)?;
    let mut subnets = vec![v4];
    if spec.enable_ipv6.unwrap_or_default() {
        subnets.push(v6.unwrap_or_else(|| whole(IpNet::V6(ipv6_subnet(vni)))));
    } else if let Some(Subnet { subnet, .. }) = v6 {
        return refuse(format!(
            "network {} has the IPv6 subnet {subnet}, but IPv6 is not enabled: enable it, or leave the \
             subnet out",
            spec.name
        ));
    }
    Ok(subnets)
}

/// A subnet whose gateway is its first address.
fn whole(subnet: IpNet) -> Subnet {
    let gateway = match subnet {
        IpNet::V4(net) => IpAddr::V4(Ipv4Addr::from_bits(net.network().to_bits() + 1)),
        IpNet::V6(net) => IpAddr::V6(Ipv6Addr::from_bits(net.network().to_bits() + 1)),
    };
    Subnet { subnet, gateway, ip_range: None }
}

/// The subnet of one entry; `None` where it asks for nothing.
fn asked(spec: &NetworkSpec, config: &IpamConfig) -> Result<Option<Subnet>, Error> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let (range, gateway) = (given(&config.ip_range), given(&config.gateway));
    let auxiliary = config.auxiliary_addresses.iter().flatten();
    let Some(text) = given(&config.subnet) else {
        let mut others = range.into_iter().chain(gateway);
        let orphan = others.next().or_else(|| auxiliary.map(|(_, ip)| ip.clone()).next());
        return match orphan {
            Some(orphan) => refuse(format!(
                "network {}: {orphan} has no subnet: give its subnet too",
                spec.name
            )),
            None => Ok(None),
        };
    };
    let net = parse_subnet(&text)?;
    let mut subnet = whole(net);
    if let Some(text) = gateway {
        subnet.gateway = inside(net, "gateway", &text)?;
    }
    if let Some(text) = range {
        let range = text.parse::<IpNet>().ok().filter(|range| net.contains(range));
        subnet.ip_range = Some(range.map(|range| range.trunc()).ok_or_else(|| {
            Error::Invalid(format!("IP range {text:?} is not a range of subnet {net} in CIDR form"))
        })?);
    }
    for (name, text) in auxiliary {
        inside(net, &format!("auxiliary address {name}"), text)?;
    }
    Ok(Some(subnet))
}

fn parse_subnet(text: &str) -> Result<IpNet, Error> {
    let Ok(net) = text.parse::<IpNet>() else {
        return refuse(format!(
            "invalid subnet {text:?}: write it in CIDR form, as in 10.20.0.0/16"
        ));
    };
    if net.trunc() != net {
        return refuse(format!("invalid subnet {net}: it should be {}", net.trunc()));
    }
    let most = match net {
        IpNet::V4(_) => IPV4_PREFIX_MAX,
        IpNet::V6(_) => IPV6_PREFIX_MAX,
    };
    if net.prefix_len() > most {
        return refuse(format!("subnet {net} is too small: give a prefix of {most} bits or less"));
    }
    let is_unicast = match net {
        IpNet::V4(net) => {
            let forbidden = ["0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"];
            let forbidden = forbidden.map(|net| net.parse::<Ipv4Net>().expect("a constant"));
            !forbidden.iter().any(|other| net.contains(other) || other.contains(&net))
        }
        IpNet::V6(net) => {
            let forbidden = ["::/8", "fe80::/10", "ff00::/8"];
            let forbidden = forbidden.map(|net| net.parse::<Ipv6Net>().expect("a constant"));
            !forbidden.iter().any(|other| net.contains(other) || other.contains(&net))
        }
    };
    match is_unicast {
        true => Ok(net),
        false => refuse(format!("subnet {net} has addresses that containers cannot have")),
    }
}

/// An address that a container of this subnet could have.
fn inside(net: IpNet, what: &str, text: &str) -> Result<IpAddr, Error> {
    let is_usable = |address: &IpAddr| {
        let is_end =
            net.network() == *address || (net.broadcast() == *address && address.is_ipv4());
        net.contains(address) && !is_end
    };
    let address = text.parse().ok().filter(is_usable);
    address.ok_or_else(|| Error::Invalid(format!("{what} {text:?} is no address of subnet {net}")))
}

fn overlap(left: &IpNet, right: &IpNet) -> bool {
    left.contains(right) || right.contains(left)
}

fn ipv6_subnet(vni: u32) -> Ipv6Net {
    let base = IPV6_POOL.network().to_bits() | u128::from(vni & 0xffff) << 64;
    Ipv6Net::new_assert(Ipv6Addr::from_bits(base), 64)
}

/// The pools of this swarm, and the prefix length of their subnets.
pub fn pools(state: &State) -> (Vec<Ipv4Net>, u8) {
    let cluster = state.cluster();
    let pools = cluster.map(|cluster| cluster.default_addr_pool.clone()).unwrap_or_default();
    let size = cluster.map_or(0, |cluster| cluster.subnet_size);
    let pools = if pools.is_empty() { vec![DEFAULT_POOL] } else { pools };
    (pools, if size == 0 { DEFAULT_SUBNET_SIZE } else { size })
}

/// Reads the pools of a new swarm and the prefix length of their subnets; none and 0 are the defaults.
pub fn parse_pools(
    texts: &[String],
    size: u32,
    ingress: Ipv4Net,
) -> Result<(Vec<Ipv4Net>, u8), Error> {
    let mut pools: Vec<Ipv4Net> = Vec::new();
    for text in texts {
        let IpNet::V4(pool) = parse_subnet(text)? else {
            return refuse(format!("default address pool {text} is not IPv4"));
        };
        let other = pools.iter().find(|other| other.contains(&pool) || pool.contains(*other));
        if let Some(other) = other {
            return refuse(format!("default address pools {other} and {pool} overlap"));
        }
        pools.push(pool);
    }
    let default = [DEFAULT_POOL];
    let all = if pools.is_empty() { &default[..] } else { &pools[..] };
    // Networks would find no subnet, and pools stay as they are.
    if let Some(pool) = all.iter().find(|pool| ingress.contains(*pool)) {
        return refuse(format!(
            "default address pool {pool} is within the ingress pool {ingress}: give another"
        ));
    }
    let least = all.iter().map(|pool| pool.prefix_len()).max().unwrap_or_default();
    let fitting = u8::try_from(size).ok();
    match fitting.filter(|size| *size == 0 || (least..=IPV4_PREFIX_MAX).contains(size)) {
        Some(size) => Ok((pools, size)),
        None => refuse(format!(
            "default address pool mask length {size} is not a number from {least} to {IPV4_PREFIX_MAX}"
        )),
    }
}

/// The first subnet of the pools that overlaps neither a network nor the ingress pool.
fn free_subnet(state: &State) -> Result<Ipv4Net, Error> {
    let (pools, size) = pools(state);
    let of_networks = state.networks().values().flat_map(|network| &network.subnets);
    let of_networks = of_networks.filter_map(|subnet| match subnet.subnet {
        IpNet::V4(net) => Some(net),
        IpNet::V6(_) => None,
    });
    let taken: Vec<Ipv4Net> = of_networks.chain([allocator::pool(state)]).collect();
    let found = pools.iter().find_map(|pool| first_free(*pool, size, &taken));
    found.ok_or_else(|| {
        let pools: Vec<String> = pools.iter().map(ToString::to_string).collect();
        Error::Exhausted(format!(
            "no free subnet of {size} bits in the pool {}: remove networks that nobody uses, or give a subnet",
            pools.join(", ")
        ))
    })
}

/// Goes from one taken subnet to the next, so that its cost depends on how many there are.
fn first_free(pool: Ipv4Net, size: u8, taken: &[Ipv4Net]) -> Option<Ipv4Net> {
    let step = 1_u64 << 32_u8.checked_sub(size.max(pool.prefix_len()))?;
    let size = size.max(pool.prefix_len());
    let mut base = u64::from(pool.network().to_bits());
    loop {
        let first = Ipv4Addr::from_bits(u32::try_from(base).ok()?);
        let candidate = Ipv4Net::new(first, size).ok().filter(|net| pool.contains(net))?;
        let blocks = |net: &&Ipv4Net| net.contains(&candidate) || candidate.contains(*net);
        let Some(block) = taken.iter().find(blocks) else { return Some(candidate) };
        let behind = u64::from(block.broadcast().to_bits()) + 1;
        base = behind.next_multiple_of(step).max(base + step);
    }
}
