//! What networks add to the store: who has which address and which identifier, and who is on what.
//!
//! Every address of a network has one owner. Addresses of different networks may be equal: each
//! network is a world of its own. Uplinks have the node slices' addresses, which are unique as well.

use std::net::IpAddr;
use std::sync::Arc;

use skep_common::object::NetworkAttachment;
use skep_common::{Kind, Meta, Network, NetworkId, Object, Service, ServiceId, Task, TaskId};

use super::State;
use crate::command::Refusal;
use crate::network::{reserved_addresses, targets};

/// Who has an address of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressOwner {
    /// Nobody gets it: a gateway, or an auxiliary address.
    Network,
    /// A service, as its virtual address.
    Service(ServiceId),
    /// A task that has not ended.
    Task(TaskId),
}

impl State {
    /// The network with this name; those on their way out have none.
    pub fn network_by_name(&self, name: &str) -> Option<&Arc<Network>> {
        self.network(NetworkId(self.id_by_name(Kind::Network, name)?))
    }

    /// The network that has an identifier.
    pub fn vni_owner(&self, vni: u32) -> Option<NetworkId> {
        self.vnis.get(&vni).copied()
    }

    /// Who has an address of a network.
    pub fn network_address_owner(
        &self,
        network_id: NetworkId,
        address: IpAddr,
    ) -> Option<AddressOwner> {
        self.network_addresses.get(&(network_id, address)).copied()
    }

    /// The addresses of a network that are taken, in order, from `first` to `last`.
    pub fn network_addresses(
        &self,
        network_id: NetworkId,
        first: IpAddr,
        last: IpAddr,
    ) -> impl Iterator<Item = (IpAddr, AddressOwner)> {
        let range = self.network_addresses.range((network_id, first)..=(network_id, last));
        range.map(|((_, address), owner)| (*address, *owner))
    }

    /// Whether a task that has not ended is on a network.
    pub fn has_tasks_on(&self, network_id: NetworkId) -> bool {
        let (first, last) = (IpAddr::from([0; 4]), IpAddr::from([u8::MAX; 16]));
        self.network_addresses(network_id, first, last)
            .any(|(_, owner)| matches!(owner, AddressOwner::Task(_)))
    }

    /// A service that is on a network and not on its way out.
    pub fn user_of_network(&self, network_id: NetworkId) -> Option<&Arc<Service>> {
        let mut staying = self.services.values().filter(|service| !service.pending_delete);
        staying.find(|service| targets(&service.spec).any(|target| target == network_id))
    }

    pub(super) fn put_network(&mut self, mut network: Network, meta: Meta) -> Result<(), Refusal> {
        let id = network.id;
        let old = self.networks.get(&id).cloned();
        if let Some(old) = &old {
            self.release_network(old);
        }
        if !network.pending_delete {
            self.rename(Kind::Network, id.0, None, &network.spec.name)?;
        }
        if network.vni != 0 && self.vnis.insert(network.vni, id).is_some() {
            return Err(Refusal::VniInUse { vni: network.vni });
        }
        for address in reserved_addresses(&network) {
            self.claim(id, address, AddressOwner::Network)?;
        }
        network.meta = meta;
        self.networks.insert(id, Arc::new(network));
        Ok(())
    }

    pub(super) fn delete_network(&mut self, network_id: NetworkId) -> Option<()> {
        let network = self.networks.remove(&network_id)?;
        self.release_network(&network);
        Some(())
    }

    fn release_network(&mut self, network: &Network) {
        let name = (Kind::Network, network.spec.name.as_str().into());
        if self.names.get(&name) == Some(&network.id.0) {
            self.names.remove(&name);
        }
        self.vnis.remove(&network.vni);
        for address in reserved_addresses(network) {
            self.release(network.id, address, AddressOwner::Network);
        }
    }

    pub(super) fn move_virtual_ips(
        &mut self,
        old: Option<&Service>,
        new: &Service,
    ) -> Result<(), Refusal> {
        if let Some(old) = old {
            self.release_virtual_ips(old);
        }
        for vip in &new.endpoint.virtual_ips {
            self.claim(vip.network_id, vip.addr.addr(), AddressOwner::Service(new.id))?;
        }
        Ok(())
    }

    pub(super) fn release_virtual_ips(&mut self, service: &Service) {
        for vip in &service.endpoint.virtual_ips {
            self.release(vip.network_id, vip.addr.addr(), AddressOwner::Service(service.id));
        }
    }

    pub(super) fn claim_attachments(
        &mut self,
        task_id: TaskId,
        attachments: &[NetworkAttachment],
    ) -> Result<(), Refusal> {
        for attachment in attachments {
            let Some(network_id) = attachment.network_id else {
                let address = attachment.address;
                if self.addresses.insert(address, task_id).is_some_and(|owner| owner != task_id) {
                    return Err(Refusal::AddressInUse { address: address.into() });
                }
                continue;
            };
            for address in overlay_addresses(attachment) {
                self.claim(network_id, address, AddressOwner::Task(task_id))?;
            }
        }
        Ok(())
    }

    pub(super) fn release_addresses(&mut self, task: &Task) {
        for attachment in &task.networks_attachments {
            let Some(network_id) = attachment.network_id else {
                if self.addresses.get(&attachment.address) == Some(&task.id) {
                    self.addresses.remove(&attachment.address);
                }
                continue;
            };
            for address in overlay_addresses(attachment) {
                self.release(network_id, address, AddressOwner::Task(task.id));
            }
        }
    }

    fn claim(
        &mut self,
        network_id: NetworkId,
        address: IpAddr,
        owner: AddressOwner,
    ) -> Result<(), Refusal> {
        match self.network_addresses.insert((network_id, address), owner) {
            Some(other) if other != owner => Err(Refusal::AddressInUse { address }),
            _ => Ok(()),
        }
    }

    fn release(&mut self, network_id: NetworkId, address: IpAddr, owner: AddressOwner) {
        if self.network_address_owner(network_id, address) == Some(owner) {
            self.network_addresses.remove(&(network_id, address));
        }
    }

    /// Refuses a service on a network that is not there, and the removal of a network that is in use.
    pub(super) fn check_networks(&self, object: &Object) -> Result<(), Refusal> {
        match object {
            Object::Service(service) if !service.pending_delete => {
                let old = self.services.get(&service.id).filter(|old| !old.pending_delete);
                let is_old = |target: &NetworkId| {
                    old.is_some_and(|old| targets(&old.spec).any(|known| known == *target))
                };
                let is_there = |target: &NetworkId| {
                    self.networks.get(target).is_some_and(|network| !network.pending_delete)
                };
                let mut new = targets(&service.spec).filter(|target| !is_old(target));
                match new.find(|target| !is_there(target)) {
                    Some(network_id) => Err(Refusal::NetworkNotFound { network_id }),
                    None => Ok(()),
                }
            }
            Object::Network(network) if network.pending_delete => self.refuse_used(network.id),
            // Its spec was read by the names of another moment; tasks of services wait instead.
            Object::Task(task) if task.standalone.is_some() => {
                let mut ids = task.networks_attachments.iter().filter_map(|one| one.network_id);
                let is_there = |id: &NetworkId| {
                    self.networks.get(id).is_some_and(|network| !network.pending_delete)
                };
                match ids.find(|id| !is_there(id)) {
                    Some(network_id) => Err(Refusal::NetworkNotFound { network_id }),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    pub(super) fn refuse_used(&self, network_id: NetworkId) -> Result<(), Refusal> {
        let Some(network) = self.networks.get(&network_id) else { return Ok(()) };
        match self.user_of_network(network_id) {
            Some(service) => Err(Refusal::NetworkInUse {
                name: network.spec.name.clone(),
                service: service.spec.name.clone(),
            }),
            None => Ok(()),
        }
    }
}

fn overlay_addresses(attachment: &NetworkAttachment) -> impl Iterator<Item = IpAddr> {
    let v6 = attachment.ipv6.map(|net| IpAddr::V6(net.addr()));
    std::iter::once(IpAddr::V4(attachment.address)).chain(v6)
}
