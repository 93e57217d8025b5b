//! The networks that a service asks for, and its tasks' places on them.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv6Net};
use skep_common::object::NetworkAttachment;
use skep_common::spec::{
    self, NetworkAttachmentConfig, Predefined, ServiceSpec, TaskSpec, is_without_uplink,
};
use skep_common::{Network, NetworkId, Service, Task};

use super::addresses::{self, Cursors};
use super::{Error, predefined};
use crate::store::State;

/// The overlay networks that a stored spec names. Other names instead of ids are of a time when networks had no
/// effect, and have none: the next update of the service resolves them.
pub fn targets(spec: &ServiceSpec) -> impl Iterator<Item = NetworkId> {
    spec.networks().iter().filter_map(|config| config.target.parse().ok())
}

/// Writes the ids of networks where a client wrote names, and refuses what a service cannot be on.
pub fn resolve(state: &State, spec: &mut ServiceSpec) -> Result<(), Error> {
    if spec.networks().is_empty() {
        return Ok(());
    }
    let mut configs = spec.networks().to_vec();
    spec.networks = None; // Tasks are made of the template: it is to have them.
    let (mut found, mut found_predefined): (Vec<&Arc<Network>>, Vec<_>) = Default::default();
    for config in &mut configs {
        if let Some(one) = Predefined::find(&config.target) {
            predefined::normalize(config, one);
            if found_predefined.contains(&one) {
                return Err(named_twice(one.name()));
            }
            found_predefined.push(one);
            continue;
        }
        let network = find(state, &config.target)?;
        config.target = network.id.to_string();
        check_aliases(config, network)?;
        check_beside(&found, network)?;
        found.push(network);
    }
    spec.task_template.networks = Some(configs);
    predefined::check(spec)
}

fn find<'a>(state: &'a State, target: &str) -> Result<&'a Arc<Network>, Error> {
    let by_id = target.parse().ok().and_then(|id| state.network(id));
    let by_id = by_id.filter(|network| !network.pending_delete);
    let network = by_id.or_else(|| state.network_by_name(target));
    let network = network.ok_or_else(|| Error::NotFound { target: target.to_owned() })?;
    if network.spec.ingress.unwrap_or_default() {
        let name = &network.spec.name;
        return Err(Error::Invalid(format!(
            "Service cannot be explicitly attached to the ingress network {name:?}"
        )));
    }
    Ok(network)
}

fn check_aliases(config: &NetworkAttachmentConfig, network: &Network) -> Result<(), Error> {
    let is_label = |label: &str| {
        let is_inner = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        (1..=63).contains(&label.len()) && label.chars().all(is_inner)
    };
    let is_name = |alias: &&String| alias.len() <= 253 && alias.split('.').all(is_label);
    let mut aliases = config.aliases.iter().flatten();
    match aliases.find(|alias| !is_name(alias)) {
        Some(alias) => Err(Error::Invalid(format!(
            "alias {alias:?} on network {} is not a DNS name",
            network.spec.name
        ))),
        None => Ok(()),
    }
}

/// Refuses a network that is named twice, or has addresses of another one.
fn check_beside(found: &[&Arc<Network>], network: &Network) -> Result<(), Error> {
    let name = &network.spec.name;
    for other in found {
        if other.id == network.id {
            return Err(named_twice(name));
        }
        for (own, its) in network.subnets.iter().zip(&other.subnets) {
            let (own, its) = (own.subnet, its.subnet);
            if own.contains(&its) || its.contains(&own) {
                let other = &other.spec.name;
                return Err(Error::Invalid(format!(
                    "networks {other} ({its}) and {name} ({own}) overlap: a service cannot be on both"
                )));
            }
        }
    }
    Ok(())
}

fn named_twice(name: &str) -> Error {
    Error::Invalid(format!("network {name} is named twice: name it once"))
}

/// A network that a task is to be on.
#[derive(Debug)]
pub(crate) struct Wanted {
    network: Arc<Network>,
    aliases: Vec<String>,
}

/// The networks of a task's spec, in its order; an error is the reason for the task to wait.
pub(crate) fn wanted_by(state: &State, spec: &TaskSpec) -> Result<Vec<Wanted>, String> {
    let mut wanted = Vec::new();
    for config in spec.networks.iter().flatten() {
        let Ok(network_id) = config.target.parse::<NetworkId>() else { continue };
        let network = state.network(network_id).filter(|network| !network.pending_delete);
        let Some(network) = network.cloned() else {
            return Err(format!("network {network_id} not found: take the service off it"));
        };
        let aliases = config.aliases.clone().unwrap_or_default();
        wanted.push(Wanted { network, aliases });
    }
    Ok(wanted)
}

/// Whether tasks of a service reach beyond their networks, or are reached from beyond. `configs` are the
/// networks as their spec names them.
pub fn needs_uplink<'a>(
    service: Option<&Service>,
    configs: &[NetworkAttachmentConfig],
    mut networks: impl Iterator<Item = &'a Network>,
) -> bool {
    if is_without_uplink(configs) {
        return false;
    }
    let is_published = service.is_some_and(|service| !service.endpoint.ports.is_empty());
    let Some(first) = networks.next() else { return true };
    let leads_out = |network: &Network| !network.spec.internal.unwrap_or_default();
    let is_on_bridge = spec::predefined(configs).any(|one| one == Predefined::Bridge);
    is_on_bridge || is_published || leads_out(first) || networks.any(leads_out)
}

/// Whether a placed task has an address of its node's slice. One without attachments is of a time
/// before they were written down.
pub(crate) fn has_uplink(task: &Task) -> bool {
    let configs = task.spec.networks.as_deref().unwrap_or_default();
    let is_unwritten = task.networks_attachments.is_empty() && !is_without_uplink(configs);
    is_unwritten || task.ingress_address().is_some()
}

/// As [`needs_uplink`], for a task.
pub(crate) fn wants_uplink(service: Option<&Service>, spec: &TaskSpec, wanted: &[Wanted]) -> bool {
    let configs = spec.networks.as_deref().unwrap_or_default();
    needs_uplink(service, configs, wanted.iter().map(|wanted| &*wanted.network))
}

/// A place on each network; an error is the reason for the task to wait.
pub(crate) fn attach(
    state: &State,
    cursors: &mut Cursors,
    wanted: &[Wanted],
) -> Result<Vec<NetworkAttachment>, String> {
    wanted.iter().map(|wanted| place(state, cursors, wanted)).collect()
}

fn place(
    state: &State,
    cursors: &mut Cursors,
    wanted: &Wanted,
) -> Result<NetworkAttachment, String> {
    let network = &wanted.network;
    let (mut v4, mut v6) = (None, None);
    for subnet in &network.subnets {
        let address = addresses::for_task(state, cursors, network.id, subnet)
            .ok_or_else(|| addresses::exhausted(state, network, subnet))?;
        match (address, subnet.subnet) {
            (IpAddr::V4(address), IpNet::V4(net)) => v4 = Some((address, net.prefix_len())),
            (IpAddr::V6(address), IpNet::V6(net)) => {
                v6 = Ipv6Net::new(address, net.prefix_len()).ok();
            }
            _ => {}
        }
    }
    let name = &network.spec.name;
    let (address, prefix) = v4.ok_or_else(|| format!("network {name} has no IPv4 subnet"))?;
    Ok(NetworkAttachment {
        ingress: false,
        address,
        prefix,
        network_id: Some(network.id),
        ipv6: v6,
        aliases: wanted.aliases.clone(),
    })
}
