//! Published ports in Docker's short syntax: `[IP:][PUBLISHED:]TARGET[/PROTOCOL]`, with ranges.
//!
//! Sources: docker/go-connections `nat.ParsePortSpec`, docker/cli `opts.ConvertPortToPortConfig`.

use std::ops::RangeInclusive;

use crate::spec::{PortConfig, PortProtocol, PublishMode};

/// Why a text is not a published port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not of the form at all.
    #[error("{0:?} is not a port; write TARGET, PUBLISHED:TARGET or a range, with /tcp or /udp")]
    Syntax(String),
    /// The two sides of the colon do not pair up.
    #[error("{0:?} has ranges of different lengths")]
    Ranges(String),
    /// Not a transport protocol.
    #[error("{text:?}: protocol {protocol:?} is none of tcp, udp and sctp")]
    Protocol {
        /// What was given.
        text: String,
        /// Its protocol.
        protocol: String,
    },
}

/// What a short form says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShortPorts {
    /// One per published port.
    pub ports: Vec<PortConfig>,
    /// An address to bind, which a swarm's ports cannot have.
    pub address: Option<String>,
}

/// Reads the short form; the publish mode is ingress.
pub fn parse_short(text: &str) -> Result<ShortPorts, Error> {
    let syntax = || Error::Syntax(text.to_owned());
    let (rest, protocol) = match text.rsplit_once('/') {
        Some((rest, protocol)) => (
            rest,
            parse_protocol(protocol).ok_or_else(|| Error::Protocol {
                text: text.to_owned(),
                protocol: protocol.to_owned(),
            })?,
        ),
        None => (text, PortProtocol::Tcp),
    };
    let (left, target) = match rest.rsplit_once(':') {
        Some((left, target)) => (Some(left), target),
        None => (None, rest),
    };
    let (address, published) = match left.map(|left| (left, left.rsplit_once(':'))) {
        None => (None, None),
        Some((_, Some((address, published)))) => (Some(address.to_owned()), Some(published)),
        Some((left, None)) if left.parse::<std::net::IpAddr>().is_ok() => {
            (Some(left.to_owned()), None)
        }
        Some((left, None)) => (None, Some(left)),
    };
    let target = parse_range(target).ok_or_else(syntax)?;
    let published = match published {
        None | Some("" | "0") => None, // Any free one.
        Some(published) => Some(parse_range(published).ok_or_else(syntax)?),
    };
    let pairs = pair(target, published).ok_or_else(|| Error::Ranges(text.to_owned()))?;
    let ports = pairs.into_iter().map(|(published, target)| PortConfig {
        name: None,
        protocol: Some(protocol),
        target_port: target,
        published_port: published,
        publish_mode: Some(PublishMode::Ingress),
        proxy_protocol: None,
    });
    Ok(ShortPorts { ports: ports.collect(), address })
}

/// Every published port with its target; `None` where the ranges do not pair up.
pub fn pair(
    target: RangeInclusive<u16>,
    published: Option<RangeInclusive<u16>>,
) -> Option<Vec<(Option<u16>, u16)>> {
    let Some(published) = published else {
        return Some(target.map(|port| (None, port)).collect());
    };
    if target.len() == 1 {
        return Some(published.map(|port| (Some(port), *target.start())).collect());
    }
    (published.len() == target.len()).then(|| published.map(Some).zip(target).collect())
}

/// Reads `80` or `8000-8010`; zero is no port.
pub fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let number = |text: &str| {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok()).flatten()
    };
    let (start, end) = text.split_once('-').unwrap_or((text, text));
    let (start, end) = (number(start)?, number(end)?);
    (start > 0 && start <= end).then_some(start..=end)
}

/// Reads the name of a protocol.
pub fn parse_protocol(text: &str) -> Option<PortProtocol> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" => Some(PortProtocol::Tcp),
        "udp" => Some(PortProtocol::Udp),
        "sctp" => Some(PortProtocol::Sctp),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_forms() {
        for (text, expect) in [
            ("80", "-:80/tcp"),
            ("8080:80", "8080:80/tcp"),
            ("0:80", "-:80/tcp"),
            ("8080:80/udp", "8080:80/udp"),
            ("53:53/SCTP", "53:53/sctp"),
            ("8000-8002:80", "8000:80/tcp 8001:80/tcp 8002:80/tcp"),
            ("8000-8001:90-91", "8000:90/tcp 8001:91/tcp"),
            ("90-91", "-:90/tcp -:91/tcp"),
            ("127.0.0.1:8080:80", "8080:80/tcp at 127.0.0.1"),
            ("127.0.0.1::80", "-:80/tcp at 127.0.0.1"),
            ("[::1]:8080:80", "8080:80/tcp at [::1]"),
            ("", "error"),
            ("http", "error"),
            ("0", "error"),
            ("65536", "error"),
            ("8080:", "error"),
            ("8001-8000:80", "error"),
            ("8000-8001:90-92", "error"),
            ("80/icmp", "error"),
        ] {
            let got = match parse_short(text) {
                Err(_) => "error".to_owned(),
                Ok(parsed) => {
                    let words: Vec<String> = parsed.ports.iter().map(render).collect();
                    let address = parsed.address.map(|address| format!(" at {address}"));
                    format!("{}{}", words.join(" "), address.unwrap_or_default())
                }
            };
            assert_eq!(got, expect, "{text}");
        }
    }

    fn render(port: &PortConfig) -> String {
        let published = port.published_port.map_or("-".to_owned(), |port| port.to_string());
        format!("{published}:{}/{}", port.target_port, port.protocol.unwrap().name())
    }
}
