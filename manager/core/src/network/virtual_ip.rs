//! The addresses that stand for all serving tasks of a service, one per network and family.

use ipnet::IpNet;
use skep_common::Service;
use skep_common::object::{Subnet, VirtualIp};

use super::{addresses, targets};
use crate::store::State;

/// The virtual addresses that `service` is to have: those that it has are kept as far as its spec
/// allows. Where a network has no free address it goes without for now: tasks answer to its names.
pub fn virtual_ips(state: &State, service: &Service) -> Vec<VirtualIp> {
    if service.pending_delete || service.spec.is_dnsrr() {
        return Vec::new();
    }
    let networks = targets(&service.spec).filter_map(|network_id| state.network(network_id));
    let mut virtual_ips = Vec::new();
    for network in networks {
        for subnet in &network.subnets {
            let is_kept = |vip: &&VirtualIp| is_of(subnet, network.id, vip);
            let kept = service.endpoint.virtual_ips.iter().find(is_kept).copied();
            let fresh = || {
                let found = addresses::for_service(state, network.id, subnet, service.id)?;
                let addr = IpNet::new(found, subnet.subnet.prefix_len()).ok()?;
                Some(VirtualIp { network_id: network.id, addr })
            };
            virtual_ips.extend(kept.or_else(fresh));
        }
    }
    virtual_ips
}

fn is_of(subnet: &Subnet, network_id: skep_common::NetworkId, vip: &VirtualIp) -> bool {
    vip.network_id == network_id && subnet.subnet.contains(&vip.addr.addr())
}

/// Whether a network lacked an address for a service.
pub(crate) fn is_incomplete(state: &State, service: &Service) -> bool {
    if service.pending_delete || service.spec.is_dnsrr() {
        return false;
    }
    let networks = targets(&service.spec).filter_map(|network_id| state.network(network_id));
    let n_wanted: usize = networks.map(|network| network.subnets.len()).sum();
    service.endpoint.virtual_ips.len() < n_wanted
}
