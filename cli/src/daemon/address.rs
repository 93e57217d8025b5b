//! From what a user wrote for an address to the `ip:port` that other nodes use.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use nix::ifaddrs::getifaddrs;
use skep_common::object::NODE_PORT;
use tonic::Status;

/// Where a node listens unless told otherwise: Docker's default.
pub(super) const DEFAULT_LISTEN: &str = "0.0.0.0:2377";

/// The listening address that a user wrote; empty is [`DEFAULT_LISTEN`].
pub(super) fn listen(text: &str) -> Result<SocketAddr, Status> {
    let text = if text.is_empty() { DEFAULT_LISTEN } else { text };
    let parsed = text.parse().or_else(|_| text.parse().map(|ip| SocketAddr::new(ip, NODE_PORT)));
    parsed.map_err(|_| {
        Status::invalid_argument(format!("invalid listen address {text:?}: write IP or IP:PORT"))
    })
}

/// The address to advertise: as written (IP, interface, either with a port), else the one that routes to
/// `remote`, else the only one there is.
pub(super) fn advertise(
    text: &str,
    listen: SocketAddr,
    remote: Option<&str>,
) -> Result<SocketAddr, Status> {
    if !text.is_empty() {
        return written(text, listen.port());
    }
    if !listen.ip().is_unspecified() {
        return Ok(listen);
    }
    if let Some(ip) = remote.and_then(towards) {
        return Ok(SocketAddr::new(ip, listen.port()));
    }
    let candidates = candidates();
    match candidates.as_slice() {
        [] => Err(Status::failed_precondition(
            "could not choose an IP address to advertise since this system has none but loopback: connect it to a network, or use --advertise-addr",
        )),
        [(_, ip)] => Ok(SocketAddr::new((*ip).into(), listen.port())),
        several => {
            let list: Vec<String> =
                several.iter().map(|(name, ip)| format!("{ip} on {name}")).collect();
            Err(Status::failed_precondition(format!(
                "could not choose an IP address to advertise since this system has several ({}): choose one with --advertise-addr",
                list.join(", ")
            )))
        }
    }
}

fn written(text: &str, default_port: u16) -> Result<SocketAddr, Status> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address);
    }
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, port.parse::<u16>().ok()),
        None => (text, Some(default_port)),
    };
    let known = candidates().into_iter().find(|(interface, _)| interface == name);
    let ip = name.parse::<IpAddr>().ok().or(known.map(|(_, ip)| ip.into()));
    match (ip, port) {
        (Some(ip), Some(port)) => Ok(SocketAddr::new(ip, port)),
        _ => Err(Status::invalid_argument(format!(
            "invalid advertise address {text:?}: it is neither an IP address nor an interface of this system with one"
        ))),
    }
}

/// The address that packets to `remote` leave from. Nothing is sent.
fn towards(remote: &str) -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(remote).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_unspecified()).then_some(ip)
}

fn candidates() -> Vec<(String, Ipv4Addr)> {
    let interfaces = getifaddrs().into_iter().flatten();
    let addressed = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let ip = address.as_sockaddr_in()?.ip();
        (!ip.is_loopback()).then_some((interface.interface_name, ip))
    });
    // Bridges of container engines, and our own, are no addresses for other machines.
    let is_engine = |name: &str| {
        ["docker", "br-", "skep", "veth"].iter().any(|prefix| name.starts_with(prefix))
    };
    addressed.filter(|(name, _)| !is_engine(name)).collect()
}

/// A remote as users write it, with the usual port where it has none.
pub(super) fn remote(text: &str) -> String {
    if text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()) {
        format!("[{text}]:{NODE_PORT}")
    } else if text.contains(':') {
        text.to_owned()
    } else {
        format!("{text}:{NODE_PORT}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_as_written_and_completed() {
        let at = listen("").unwrap();
        assert_eq!(at.to_string(), "0.0.0.0:2377");
        assert_eq!(listen("10.0.0.1").unwrap().to_string(), "10.0.0.1:2377");
        assert_eq!(advertise("10.1.1.1", at, None).unwrap().to_string(), "10.1.1.1:2377");
        assert_eq!(advertise("10.1.1.1:99", at, None).unwrap().to_string(), "10.1.1.1:99");
        assert_eq!(
            advertise("", listen("10.0.0.1:5").unwrap(), None).unwrap().to_string(),
            "10.0.0.1:5"
        );
        assert!(advertise("nosuch0", at, None).unwrap_err().message().contains("nosuch0"));
        assert_eq!(remote("10.0.0.1"), "10.0.0.1:2377");
        assert_eq!(remote("manager.example:99"), "manager.example:99");
    }
}
