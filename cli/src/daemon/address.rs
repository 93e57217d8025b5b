//! From what a user wrote for an address to the `ip:port` that other nodes use.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use skep_common::object::NODE_PORT;
use tonic::Status;

use super::record::NodeRecord;

/// Where a node listens unless told otherwise: Docker's default.
pub(super) const DEFAULT_LISTEN: &str = "0.0.0.0:2377";

/// Between two looks at the addresses of this machine, which must agree: a node that moves is to be back before the
/// managers take it for dead.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// Every so often all interfaces are looked at.
const WHOLE_LOOKS: u64 = 10;

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

/// Where other nodes reach this machine now, if that is elsewhere than its record says.
///
/// An address that a user wrote stays until another one is written. What was chosen by this machine, or named by an
/// interface, follows the machine.
pub(super) fn moved(record: &NodeRecord, option: Option<&str>) -> Option<SocketAddr> {
    let now = current(record, option, &candidates(), towards)?;
    (now.to_string() != record.advertise_addr).then_some(now)
}

fn current(
    record: &NodeRecord,
    option: Option<&str>,
    candidates: &[(String, Ipv4Addr)],
    towards: impl Fn(&str) -> Option<IpAddr>,
) -> Option<SocketAddr> {
    let known: SocketAddr = record.advertise_addr.parse().ok()?;
    let Some(wanted) = wanted(record, option) else { return Some(known) };
    if !wanted.is_empty() {
        return parse_written(wanted, known.port(), candidates);
    }
    let has = |ip: IpAddr| candidates.iter().any(|(_, own)| IpAddr::from(*own) == ip);
    if has(known.ip()) {
        return Some(known);
    }
    let others = record.managers.iter().filter(|manager| **manager != record.advertise_addr);
    let routed = others.filter_map(|manager| towards(manager)).find(|ip| has(*ip));
    let only = match candidates {
        [(_, ip)] => Some((*ip).into()),
        _ => None,
    };
    routed.or(only).map(|ip| SocketAddr::new(ip, known.port()))
}

/// What counts of all that was written for a node's address; `None` where nobody knows what was.
pub(super) fn wanted<'a>(record: &'a NodeRecord, option: Option<&'a str>) -> Option<&'a str> {
    let written = record.written.as_deref()?;
    Some(option.filter(|_| option != record.option.as_deref()).unwrap_or(written))
}

/// The record of a node for which a user wrote `text` now, or nothing, and has written its listening address.
pub(super) fn chosen(
    record: &NodeRecord,
    text: &str,
    option: Option<&str>,
) -> Result<NodeRecord, Status> {
    let known = wanted(record, option).unwrap_or_default();
    let text = if text.is_empty() { known } else { text };
    if text.is_empty() {
        let moved = moved(record, option).map(|address| record.moved_to(address, option));
        return Ok(moved.unwrap_or_else(|| record.clone()));
    }
    let advertise = advertise(text, listen(&record.listen_addr)?, None)?;
    Ok(NodeRecord {
        advertise_addr: advertise.to_string(),
        written: Some(text.to_owned()),
        option: option.map(str::to_owned),
        ..record.clone()
    })
}

/// Waits until this machine has another address than its record says, and has had it for a moment.
pub(super) async fn moves(record: &NodeRecord, option: Option<&str>) -> SocketAddr {
    let known = record.advertise_addr.parse::<SocketAddr>().ok();
    let mut seen = None;
    let mut n_looks: u64 = 0;
    loop {
        tokio::time::sleep(LOOK_PERIOD).await;
        n_looks += 1;
        // Cheaper than a list of all interfaces, but true of any address where the kernel was told so.
        let has_it = known.is_some_and(|known| UdpSocket::bind((known.ip(), 0)).is_ok());
        if has_it && seen.is_none() && !n_looks.is_multiple_of(WHOLE_LOOKS) {
            continue;
        }
        let now = moved(record, option);
        match now {
            Some(address) if seen == now => return address,
            _ => seen = now,
        }
    }
}

fn written(text: &str, default_port: u16) -> Result<SocketAddr, Status> {
    parse_written(text, default_port, &candidates()).ok_or_else(|| {
        Status::invalid_argument(format!(
            "invalid advertise address {text:?}: it is neither an IP address nor an interface of this system with one"
        ))
    })
}

fn parse_written(
    text: &str,
    default_port: u16,
    candidates: &[(String, Ipv4Addr)],
) -> Option<SocketAddr> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some(address);
    }
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, port.parse::<u16>().ok()?),
        None => (text, default_port),
    };
    let known = || candidates.iter().find(|(interface, _)| interface == name);
    let ip = name.parse::<IpAddr>().ok().or_else(|| known().map(|(_, ip)| (*ip).into()))?;
    Some(SocketAddr::new(ip, port))
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

    #[test]
    fn an_address_follows_the_machine_where_nobody_wrote_it() {
        const OLD: &str = "10.0.0.1:2377";
        const UNKNOWN: &str = "?";
        let lan = |address: &str| ("eth0".to_owned(), address.parse::<Ipv4Addr>().unwrap());
        let other = || ("eth1".to_owned(), Ipv4Addr::new(192, 0, 2, 1));
        let (old, new) = (lan("10.0.0.1"), lan("10.0.0.9"));
        // What was written, the option of before and of now, the addresses, and what becomes of it.
        for (name, written, before, option, candidates, expect) in [
            ("it has it", "", None, None, vec![old.clone(), other()], Some(OLD)),
            ("the only one", "", None, None, vec![new.clone()], Some("10.0.0.9:2377")),
            (
                "the way to a manager",
                "",
                None,
                None,
                vec![other(), new.clone()],
                Some("10.0.0.9:2377"),
            ),
            ("none", "", None, None, vec![], None),
            ("written stays", "10.0.0.1", None, None, vec![new.clone()], Some(OLD)),
            ("an interface", "eth0", None, None, vec![new.clone(), other()], Some("10.0.0.9:2377")),
            ("an interface without", "eth0", None, None, vec![other()], None),
            ("the same option", "10.0.0.1", Some("x"), Some("x"), vec![new.clone()], Some(OLD)),
            (
                "another option",
                "10.0.0.1",
                Some("x"),
                Some("10.0.0.7:99"),
                vec![],
                Some("10.0.0.7:99"),
            ),
            ("an option gone", "10.0.0.1", Some("x"), None, vec![], Some(OLD)),
            ("an older daemon's stays", UNKNOWN, None, None, vec![new.clone()], Some(OLD)),
            ("whatever its option", UNKNOWN, None, Some("eth0"), vec![new.clone()], Some(OLD)),
        ] {
            let record = NodeRecord {
                written: (written != UNKNOWN).then(|| written.into()),
                option: before.map(str::to_owned),
                managers: vec![OLD.into(), "10.0.0.2:2377".into()],
                ..NodeRecord::at(OLD, "0.0.0.0:2377")
            };
            let towards =
                |manager: &str| (manager == "10.0.0.2:2377").then_some(IpAddr::from([10, 0, 0, 9]));
            let now = current(&record, option, &candidates, towards);
            assert_eq!(now.map(|address| address.to_string()).as_deref(), expect, "{name}");
        }
    }

    #[test]
    fn what_a_user_writes_now_counts_from_then_on() {
        let nobody = |_: &str| None;
        for (text, written, before, option, expect) in [
            ("10.0.0.7:99", Some("10.0.0.1"), None, None, "10.0.0.7:99"),
            ("10.0.0.7:99", None, None, Some("10.0.0.5"), "10.0.0.7:99"),
            ("", Some("10.0.0.1"), Some("10.0.0.5"), Some("10.0.0.5"), "10.0.0.1:2377"),
            ("", Some("10.0.0.1"), None, Some("10.0.0.5"), "10.0.0.5:2377"),
            ("", None, None, Some("10.0.0.5"), "10.0.0.1:2377"),
        ] {
            let record = NodeRecord {
                written: written.map(str::to_owned),
                option: before.map(str::to_owned),
                ..NodeRecord::at("10.0.0.1:2377", "0.0.0.0:2377")
            };
            let record = chosen(&record, text, option).unwrap();
            assert_eq!(record.advertise_addr, expect, "{text:?} {written:?} {option:?}");
            // A restarted daemon finds the same.
            let now = current(&record, option, &[], nobody);
            assert_eq!(now.map(|address| address.to_string()).as_deref(), Some(expect), "{text:?}");
        }
    }

    #[test]
    fn a_record_moves_with_its_machine() {
        let record = NodeRecord {
            managers: vec!["10.0.0.1:2377".into(), "10.0.0.2:2377".into()],
            ..NodeRecord::at("10.0.0.1:2377", "10.0.0.1:2300")
        };
        let moved = record.moved_to("10.0.0.9:2377".parse().unwrap(), Some("eth0"));
        assert_eq!(moved.advertise_addr, "10.0.0.9:2377");
        assert_eq!(moved.listen_addr, "10.0.0.9:2300");
        assert_eq!(moved.managers, ["10.0.0.9:2377", "10.0.0.2:2377"]);
        assert_eq!(
            (moved.written.as_deref(), moved.option.as_deref()),
            (Some("eth0"), Some("eth0"))
        );
        let everywhere = NodeRecord {
            written: Some(String::new()),
            ..NodeRecord::at("10.0.0.1:2377", "0.0.0.0:2377")
        };
        let moved = everywhere.moved_to("10.0.0.9:2377".parse().unwrap(), None);
        assert_eq!(
            (moved.listen_addr.as_str(), moved.written.as_deref()),
            ("0.0.0.0:2377", Some(""))
        );
    }
}
