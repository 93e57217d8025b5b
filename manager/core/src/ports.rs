//! Published ports of a service: which numbers it gets, and who has the one it wants.
//!
//! A port that the spec numbers is kept. One without a number is given a free one of
//! [`DYNAMIC_PORTS`], and keeps it across updates as long as its target port and protocol stay.
//! In ingress mode a number belongs to one service on every node, per protocol; host-mode ports
//! conflict with ingress ports, and among each other only on one node, which the scheduler sees to.
//! Source: SwarmKit `manager/allocator/portallocator.go`, `manager/controlapi/service.go`
//! (`checkPortConflicts`).

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use skep_common::spec::{PortConfig, PortProtocol, Predefined, PublishMode, predefined};
use skep_common::{Service, ServiceId};

use crate::store::State;

/// Numbers for ports that the spec does not number. SwarmKit's dynamic range.
pub const DYNAMIC_PORTS: RangeInclusive<u16> = 30000..=32767;

/// Why a service cannot have its ports.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Choose another number, or remove the port from its owner.
    #[error(
        "port '{port}' ({protocol}) is already in use by service '{owner_name}' ({owner_id}) as {mode} port"
    )]
    InUse {
        /// Published port.
        port: u16,
        /// `tcp`, `udp` or `sctp`.
        protocol: &'static str,
        /// Who has it.
        owner_id: ServiceId,
        /// Its name.
        owner_name: String,
        /// `an ingress` or `a host-mode`.
        mode: &'static str,
    },
    /// Number some ports explicitly, outside of the range.
    #[error("no free port in the range {}-{} for target port {target_port}", DYNAMIC_PORTS.start(), DYNAMIC_PORTS.end())]
    Exhausted {
        /// The port that got none.
        target_port: u16,
    },
}

/// The ports of `service` with their numbers; those in its endpoint are kept where the spec allows.
pub fn allocate(state: &State, service: &Service) -> Result<Vec<PortConfig>, Error> {
    let mut ports: Vec<PortConfig> = service.spec.ports().to_vec();
    let mut taken: BTreeSet<(PortProtocol, u16)> = BTreeSet::new();
    if predefined(service.spec.networks()).any(|one| one == Predefined::Host) {
        // Containers listen on the node's own ports: nobody numbers those otherwise.
        for port in ports.iter_mut().filter(|port| !is_ingress(port)) {
            port.published_port = Some(port.target_port);
        }
    }
    for port in &ports {
        if let Some(number) = number(port) {
            refuse_conflict(state, service.id, port, number)?;
            if is_ingress(port) {
                taken.insert((port.protocol.unwrap_or_default(), number));
            }
        }
    }
    for port in ports.iter_mut().filter(|port| is_ingress(port) && number(port).is_none()) {
        let protocol = port.protocol.unwrap_or_default();
        let is_free = |number: &u16| {
            let owner = state.port_owner(protocol, *number);
            owner.is_none_or(|owner| owner == service.id) && !taken.contains(&(protocol, *number))
        };
        let had = service.endpoint.ports.iter().filter(|old| is_same_port(old, port));
        let kept =
            had.filter_map(number).find(|number| DYNAMIC_PORTS.contains(number) && is_free(number));
        let found = kept.or_else(|| DYNAMIC_PORTS.clone().find(is_free));
        let found = found.ok_or(Error::Exhausted { target_port: port.target_port })?;
        taken.insert((protocol, found));
        port.published_port = Some(found);
    }
    Ok(ports)
}

/// The ports that each task publishes on its node itself, in a form in which equal ones are equal.
pub fn host_mode(ports: &[PortConfig]) -> Vec<PortConfig> {
    let host = ports.iter().filter(|port| !is_ingress(port)).map(|port| PortConfig {
        protocol: Some(port.protocol.unwrap_or_default()),
        published_port: number(port),
        ..port.clone()
    });
    let mut host: Vec<PortConfig> = host.collect();
    host.sort_by_key(|port| (port.protocol, port.published_port, port.target_port));
    host
}

fn number(port: &PortConfig) -> Option<u16> {
    port.published_port.filter(|number| *number != 0)
}

fn is_ingress(port: &PortConfig) -> bool {
    port.publish_mode.unwrap_or_default() == PublishMode::Ingress
}

fn is_same_port(old: &PortConfig, new: &PortConfig) -> bool {
    is_ingress(old)
        && old.target_port == new.target_port
        && old.protocol.unwrap_or_default() == new.protocol.unwrap_or_default()
}

fn refuse_conflict(
    state: &State,
    service_id: ServiceId,
    port: &PortConfig,
    number: u16,
) -> Result<(), Error> {
    let protocol = port.protocol.unwrap_or_default();
    let ingress_owner = state.port_owner(protocol, number).filter(|owner| *owner != service_id);
    let in_host_mode = || {
        let others = state.services().values().filter(|other| other.id != service_id);
        let has_it = |other: &&PortConfig| {
            !is_ingress(other)
                && other.published_port == Some(number)
                && other.protocol.unwrap_or_default() == protocol
        };
        let mut owners = others.filter(|other| other.endpoint.ports.iter().any(|p| has_it(&p)));
        owners.next().map(|other| other.id)
    };
    let conflict = match ingress_owner {
        Some(owner) => Some((owner, "an ingress")),
        None if is_ingress(port) => in_host_mode().map(|owner| (owner, "a host-mode")),
        None => None,
    };
    let Some((owner_id, mode)) = conflict else { return Ok(()) };
    let owner_name =
        state.service(owner_id).map(|owner| owner.spec.name.clone()).unwrap_or_default();
    Err(Error::InUse { port: number, protocol: protocol.name(), owner_id, owner_name, mode })
}

#[cfg(test)]
mod tests {
    use skep_common::Object;
    use skep_common::spec::EndpointSpec;

    use super::*;
    use crate::testing::{World, service};

    /// A service whose ports are words `[PUBLISHED:]TARGET[/host]`.
    fn publishing(id: u128, words: &str) -> Service {
        let mut service = service(0);
        service.id = ServiceId(id);
        service.spec.name = format!("s{id}");
        let port = |word: &str| {
            let (word, mode) = word
                .split_once('/')
                .map_or((word, PublishMode::Ingress), |(word, _)| (word, PublishMode::Host));
            let (published, target) = word.split_once(':').unwrap_or(("0", word));
            PortConfig {
                target_port: target.parse().unwrap(),
                published_port: Some(published.parse().unwrap()),
                publish_mode: Some(mode),
                ..PortConfig::default()
            }
        };
        let ports = Some(words.split_whitespace().map(port).collect());
        service.spec.endpoint_spec = Some(EndpointSpec { ports, ..EndpointSpec::default() });
        service
    }

    #[test]
    fn on_the_nodes_network_a_port_is_the_one_that_containers_listen_on() {
        let mut service = publishing(1, "80/host");
        let world = World::new("", service.clone(), "");
        let shown = |service: &Service| {
            let ports = allocate(&world.state, service).unwrap();
            host_mode(&ports).first().and_then(|port| port.published_port)
        };
        assert_eq!(shown(&service), None, "its node numbers it");
        let on_host = serde_json::from_value(serde_json::json!([{"Target": "host"}])).unwrap();
        service.spec.task_template.networks = Some(on_host);
        assert_eq!(shown(&service), Some(80), "the scheduler sees to it that no other has it");
    }

    #[test]
    fn ports_are_kept_found_or_refused() {
        let mut world = World::new("", publishing(1, ""), "");
        for (name, id, words, expect) in [
            ("an explicit one", 1, "80:80", "80"),
            ("free ones of the range", 2, "80 81", "30000 30001"),
            ("one goes, another comes", 2, "90 81", "30000 30001"),
            ("an explicit one of the range is left alone", 3, "30002:1 2", "30002 30003"),
            (
                "in use",
                4,
                "80:1",
                "port '80' (tcp) is already in use by service 's1' (0000000000000000000000001) as an ingress port",
            ),
            (
                "in use, host mode",
                4,
                "80:1/host",
                "port '80' (tcp) is already in use by service 's1' (0000000000000000000000001) as an ingress port",
            ),
            ("host mode", 5, "8080:1/host 1/host", "8080 0"),
            ("host mode twice is a matter of nodes", 6, "8080:1/host", "8080"),
            (
                "not with ingress",
                7,
                "8080:1",
                "port '8080' (tcp) is already in use by service 's5' (0000000000000000000000005) as a host-mode port",
            ),
            ("given up", 1, "81:80", "81"),
            ("so it is free", 8, "80:80", "80"),
        ] {
            let mut service = publishing(id, words);
            if let Some(old) = world.state.service(service.id) {
                service.endpoint = old.endpoint.clone();
            }
            let text = match allocate(&world.state, &service) {
                Ok(ports) => {
                    service.endpoint.ports = ports;
                    let numbers =
                        service.endpoint.ports.iter().map(|port| port.published_port.unwrap());
                    let numbers: Vec<String> = numbers.map(|number| number.to_string()).collect();
                    let object = Object::Service(Box::new(service.clone()));
                    match world.state.service(service.id).is_some() {
                        true => world.replace(object),
                        false => world.put(vec![object]),
                    }
                    numbers.join(" ")
                }
                Err(error) => error.to_string(),
            };
            assert_eq!(text, expect, "{name}");
        }
    }

    #[test]
    fn a_port_keeps_its_number_across_updates() {
        let mut world = World::new("", publishing(1, ""), "");
        let mut service = publishing(2, "80 81");
        service.endpoint.ports = allocate(&world.state, &service).unwrap();
        world.put(vec![Object::Service(Box::new(service.clone()))]);
        let mut spec = publishing(2, "81 82").spec;
        std::mem::swap(&mut service.spec, &mut spec);
        let numbers: Vec<_> = allocate(&world.state, &service).unwrap();
        let numbers: Vec<_> = numbers.iter().map(|port| port.published_port.unwrap()).collect();
        assert_eq!(numbers, [30001, 30000]);
    }

    #[test]
    fn equal_host_mode_ports_are_equal_however_they_are_written() {
        let written = publishing(1, "81:80/host 9:9 0:7/host").spec;
        let mut otherwise = publishing(1, "0:7/host 81:80/host 10:10").spec;
        for port in otherwise.endpoint_spec.iter_mut().flat_map(|spec| &mut spec.ports).flatten() {
            port.protocol = Some(PortProtocol::Tcp);
            port.published_port = port.published_port.filter(|number| *number != 0);
        }
        let ports = host_mode(written.ports());
        assert_eq!(ports, host_mode(otherwise.ports()));
        let numbers: Vec<_> = ports.iter().map(|port| port.published_port).collect();
        assert_eq!(numbers, [None, Some(81)]);
    }
}
