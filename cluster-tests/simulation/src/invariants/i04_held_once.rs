//! 4. No address, virtual address, network identifier or published port is held twice: not in the store,
//!    and not by two containers that run.

use std::collections::BTreeMap;
use std::net::IpAddr;

use skep_common::spec::PublishMode;
use skep_common::{NetworkId, Task, TaskId, TaskState};
use skep_manager_core::State;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

pub(super) struct HeldOnce;

type Place = (Option<NetworkId>, IpAddr);

fn addresses(task: &Task) -> impl Iterator<Item = Place> {
    task.networks_attachments.iter().flat_map(|one| {
        let v6 = one.ipv6.map(|net| IpAddr::V6(net.addr()));
        std::iter::once(IpAddr::V4(one.address)).chain(v6).map(|address| (one.network_id, address))
    })
}

fn check_store(state: &State) -> Result<(), String> {
    let mut holders: BTreeMap<Place, TaskId> = BTreeMap::new();
    let mut balanced: BTreeMap<Place, &String> = BTreeMap::new();
    let mut ports = BTreeMap::new();
    let mut vnis = BTreeMap::new();
    for task in state.tasks().values().filter(|task| !task.status.state.is_terminal()) {
        for place in addresses(task) {
            if let Some(other) = holders.insert(place, task.id) {
                return Err(format!("{other} and {} have the address {place:?}", task.id));
            }
        }
    }
    for service in state.services().values() {
        for vip in &service.endpoint.virtual_ips {
            let place = (Some(vip.network_id), vip.addr.addr());
            let other = holders.get(&place).map(ToString::to_string);
            let other = other.or_else(|| balanced.insert(place, &service.spec.name).cloned());
            if let Some(other) = other {
                return Err(format!(
                    "{other} and {} have the address {place:?}",
                    service.spec.name
                ));
            }
        }
        for port in &service.endpoint.ports {
            let is_ingress = port.publish_mode.unwrap_or_default() == PublishMode::Ingress;
            let Some(number) = port.published_port.filter(|_| is_ingress) else { continue };
            let key = (port.protocol.unwrap_or_default(), number);
            let other = ports.insert(key, &service.spec.name);
            ensure!(other.is_none(), "{other:?} and {} publish port {number}", service.spec.name);
        }
    }
    for network in state.networks().values() {
        let other = vnis.insert(network.vni, &network.spec.name);
        ensure!(
            other.is_none(),
            "{other:?} and {} have identifier {}",
            network.spec.name,
            network.vni
        );
    }
    Ok(())
}

/// Containers that run and whose tasks managers have not given up.
pub(super) fn check_containers(world: &World) -> Result<(), String> {
    let mut holders: BTreeMap<Place, TaskId> = BTreeMap::new();
    for machine in &world.machines {
        for task_id in &machine.agent.running {
            let is_given_up = |task: &Task| task.status.state == TaskState::Orphaned;
            let known = world.ledger.task(*task_id).filter(|task| !is_given_up(task));
            for place in known.iter().flat_map(|task| addresses(task)) {
                if let Some(other) = holders.insert(place, *task_id) {
                    return Err(format!(
                        "containers {other} and {task_id} run with the address {place:?}"
                    ));
                }
            }
        }
    }
    Ok(())
}

impl Invariant for HeldOnce {
    fn name(&self) -> &'static str {
        "4: no address, identifier or published port is held twice"
    }

    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Committed { after, .. } => check_store(after),
            Seen::Started => check_containers(world),
            _ => Ok(()),
        }
    }
}
