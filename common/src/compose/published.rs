//! The `ports` of a service, in short and long syntax.

use super::fields::Field;
use super::tree::{Node, Value};
use super::{Report, known, ports};
use crate::spec::{PortConfig, PortProtocol, ProxyProtocol, PublishMode};

/// The published ports, sorted; a later file's port replaces the same one of an earlier file.
pub(super) fn convert(field: &Field<'_>, report: &mut Report) -> Vec<PortConfig> {
    let mut all: Vec<(usize, PortConfig)> = Vec::new();
    for item in field.items(report) {
        let field = field.item(item);
        for port in one(item, &field, report) {
            let file = item.at.file;
            all.retain(|(from, other)| *from == file || !same_published(other, &port));
            all.push((file, port));
        }
    }
    let mut ports: Vec<PortConfig> = all.into_iter().map(|(_, port)| port).collect();
    ports.sort_by_key(|port| (port.published_port, port.target_port, port.protocol));
    ports.dedup();
    ports
}

/// The published ports of one entry, as far as they are named.
pub(super) fn numbers(item: &Node) -> Vec<(u16, PortProtocol)> {
    // What is wrong with the entry is reported when it is converted.
    let ports = one(item, &Field::unnamed(item), &mut Report::default());
    ports
        .iter()
        .filter_map(|port| Some((port.published_port?, port.protocol.unwrap_or_default())))
        .collect()
}

fn same_published(a: &PortConfig, b: &PortConfig) -> bool {
    a.published_port.is_some() && a.published_port == b.published_port && a.protocol == b.protocol
}

fn one(item: &Node, field: &Field<'_>, report: &mut Report) -> Vec<PortConfig> {
    let text = match &item.value {
        Value::Map(_) => return long(field, report),
        Value::Text(text) => text.clone(),
        Value::Int(number) => number.to_string(),
        Value::Null | Value::Bool(_) | Value::Float(_) | Value::List(_) => {
            field.refuse("made of ports such as 80, \"8080:80\" or a mapping", report);
            return Vec::new();
        }
    };
    match ports::parse_short(&text) {
        Ok(short) => {
            if let Some(address) = short.address {
                let name = &field.name;
                report.warn(
                    item.at,
                    format!(
                        "{name}: a service's ports listen on every address; {address} is ignored"
                    ),
                );
            }
            short.ports
        }
        Err(error) => {
            report.error(item.at, format!("{}: {error}", field.name));
            Vec::new()
        }
    }
}

fn long(field: &Field<'_>, report: &mut Report) -> Vec<PortConfig> {
    let section = field.section(report);
    section.check(known::PORT, known::PORT_LATER, report);
    let Some(target) = section.get("target") else {
        report
            .error(field.node.at, format!("{} has an entry without 'target'; add it", field.name));
        return Vec::new();
    };
    let Some(target) = target.number::<u16>(report) else { return Vec::new() };
    if target == 0 {
        report
            .error(field.node.at, format!("{}: 0 is no target port; write 1 to 65535", field.name));
        return Vec::new();
    }
    let published = match section.get("published") {
        None => None,
        Some(published) => match range(&published) {
            Some(range) => range,
            None => {
                published.refuse("a port from 0 to 65535, or a range such as 8000-8010", report);
                return Vec::new();
            }
        },
    };
    let protocol = section
        .get("protocol")
        .and_then(|field| field.word(&["tcp", "udp", "sctp"], report))
        .and_then(|word| ports::parse_protocol(&word))
        .unwrap_or(PortProtocol::Tcp);
    let mode = match section.get("mode").and_then(|field| field.word(&["ingress", "host"], report))
    {
        Some(word) if word == "host" => PublishMode::Host,
        _ => PublishMode::Ingress,
    };
    let proxy_protocol = section
        .get("x-skep-proxy-protocol")
        .and_then(|field| field.word(&[ProxyProtocol::V2.name()], report))
        .and_then(|word| ProxyProtocol::of(&word));
    let name = section.get("name").and_then(|field| field.text(report));
    let pairs = ports::pair(target..=target, published).expect("one target pairs with any range");
    let port = |(published_port, target_port)| PortConfig {
        name: name.clone(),
        protocol: Some(protocol),
        target_port,
        published_port,
        publish_mode: Some(mode),
        proxy_protocol,
    };
    pairs.into_iter().map(port).collect()
}

/// The published ports of the long syntax: `Some(None)` leaves the choice to the swarm.
fn range(field: &Field<'_>) -> Option<Option<std::ops::RangeInclusive<u16>>> {
    let text = match &field.node.value {
        Value::Int(0) => return Some(None),
        Value::Int(number) => number.to_string(),
        Value::Text(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => {
            return None;
        }
    };
    ports::parse_range(&text).map(Some)
}
