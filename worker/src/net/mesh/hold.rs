//! Holding published ports on the node.
//!
//! Where the rules balance a port, packets to it never reach a socket of the node, except over loopback: the
//! rules take them first. Without a socket that holds the port, a program could still bind it,
//! would seem to run, and would receive nothing. A [`Hold`] makes it fail as it should.
//!
//! A port of TCP has one listener on all addresses whether the rules balance it or the daemon does: it passes
//! from the one to the other without a moment in which nobody listens.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
    SockaddrLike, bind, listen, setsockopt, socket, sockopt,
};
use skep_worker_core::mesh::{PortKey, Protocol};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// A published port that no other program can bind while this value lives.
#[derive(Debug)]
pub(super) struct Hold {
    _sockets: Vec<OwnedFd>,
}

/// The sockets of one port that the daemon serves.
#[derive(Debug)]
pub(super) enum Listeners {
    /// Of TCP, on every address, of IPv6 where the host has it.
    Streams(Vec<TcpListener>),
    /// Of UDP, on 127.0.0.1, and on ::1 where the host has IPv6.
    Datagrams(Vec<UdpSocket>),
    /// None: an association has addresses of its own in its messages, which no relay can stand for.
    None,
}

/// Holds a port on all addresses, and listens for those that the rules leave to the daemon.
///
/// A port of TCP is listened on by every IPv6 address only where `all_ipv6`: elsewhere clients are to be refused, who
/// then go on to IPv4.
pub(super) fn hold(key: PortKey, all_ipv6: bool) -> io::Result<(Hold, Listeners)> {
    match key.protocol {
        Protocol::Tcp => hold_streams(key, all_ipv6),
        Protocol::Udp => hold_datagrams(key),
        Protocol::Sctp => hold_associations(key),
    }
}

fn hold_streams(key: PortKey, all_ipv6: bool) -> io::Result<(Hold, Listeners)> {
    // Reuse lets connections be of which the last packets are still on their way; another listener keeps the port.
    let mut listeners = vec![listening(bound(Transport::Stream, true, &any(key))?)?];
    let ipv6 = if_ipv6(bound(Transport::Stream, true, &any6(key)))?;
    if all_ipv6 {
        listeners.extend(ipv6.map(listening).transpose()?);
        return Ok((Hold { _sockets: Vec::new() }, Listeners::Streams(listeners)));
    }
    if let Some(holder) = &ipv6 {
        let local = if_ipv6(bound(Transport::Stream, true, &local6(key)))?;
        listeners.extend(local.map(listening).transpose()?);
        // It does not listen, and conflicts with everybody else's from now on.
        setsockopt(holder, sockopt::ReuseAddr, &false)?;
    }
    Ok((Hold { _sockets: ipv6.into_iter().collect() }, Listeners::Streams(listeners)))
}

/// Fails with [`io::ErrorKind::Unsupported`] where the kernel has no SCTP: then no program of this
/// node can take the port either.
fn hold_associations(key: PortKey) -> io::Result<(Hold, Listeners)> {
    let missing = |error: io::Error| match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT | libc::ESOCKTNOSUPPORT) => io::ErrorKind::Unsupported.into(),
        _ => error,
    };
    let mut holders = vec![bound(Transport::Sctp, false, &any(key)).map_err(missing)?];
    holders.extend(if_ipv6(bound(Transport::Sctp, false, &any6(key)))?);
    Ok((Hold { _sockets: holders }, Listeners::None))
}

/// Sockets of UDP share an address where both allow its reuse, and many servers do: a holding socket
/// must not allow it when it is bound, nor must any of ours in the end.
fn hold_datagrams(key: PortKey) -> io::Result<(Hold, Listeners)> {
    let holder = bound(Transport::Datagram, false, &any(key))?;
    setsockopt(&holder, sockopt::ReuseAddr, &true)?;
    let mut sockets = vec![bound(Transport::Datagram, true, &local(key))?];
    let mut holders = vec![holder];
    if let Some(holder) = if_ipv6(bound(Transport::Datagram, false, &any6(key)))? {
        setsockopt(&holder, sockopt::ReuseAddr, &true)?;
        sockets.extend(if_ipv6(bound(Transport::Datagram, true, &local6(key)))?);
        holders.push(holder);
    }
    for socket in holders.iter().chain(&sockets) {
        setsockopt(socket, sockopt::ReuseAddr, &false)?;
    }
    for holder in &holders {
        // What comes in beside the rules, such as broadcasts, is read by nobody.
        setsockopt(holder, sockopt::RcvBuf, &0)?;
    }
    let sockets = sockets.into_iter().map(UdpSocket::from).collect();
    Ok((Hold { _sockets: holders }, Listeners::Datagrams(sockets)))
}

/// Nothing where the host has no IPv6, or no such address.
fn if_ipv6(socket: io::Result<OwnedFd>) -> io::Result<Option<OwnedFd>> {
    match socket {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
        Err(error) => {
            tracing::debug!(%error, "a port is not held on IPv6");
            Ok(None)
        }
    }
}

fn any(key: PortKey) -> SockaddrIn {
    SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, key.port))
}

fn local(key: PortKey) -> SockaddrIn {
    SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, key.port))
}

fn any6(key: PortKey) -> SockaddrIn6 {
    SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, key.port, 0, 0))
}

fn local6(key: PortKey) -> SockaddrIn6 {
    SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::LOCALHOST, key.port, 0, 0))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Stream,
    Datagram,
    Sctp,
}

fn bound(kind: Transport, is_shared: bool, address: &dyn SockaddrLike) -> io::Result<OwnedFd> {
    let family = address.family().unwrap_or(AddressFamily::Inet);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (kind, protocol) = match kind {
        Transport::Stream => (SockType::Stream, SockProtocol::Tcp),
        Transport::Datagram => (SockType::Datagram, SockProtocol::Udp),
        Transport::Sctp => (SockType::Stream, SockProtocol::Sctp),
    };
    let socket = socket(family, kind, flags, protocol)?;
    setsockopt(&socket, sockopt::ReuseAddr, &is_shared)?;
    if family == AddressFamily::Inet6 {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    use std::os::fd::AsRawFd as _;
    bind(socket.as_raw_fd(), address)?;
    Ok(socket)
}

fn listening(socket: OwnedFd) -> io::Result<TcpListener> {
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port that was free a moment ago.
    fn free_port() -> u16 {
        TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_held_port_is_refused_to_others_and_free_after() {
        let key = PortKey { protocol: Protocol::Tcp, port: free_port() };
        for all_ipv6 in [true, false] {
            let (hold, listeners) = hold(key, all_ipv6).unwrap();
            for address in ["0.0.0.0", "127.0.0.1", "127.0.0.2", "[::]", "[::1]"] {
                // `TcpListener::bind` sets SO_REUSEADDR, as most servers do.
                let error = TcpListener::bind(format!("{address}:{}", key.port)).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
            }
            assert!(super::hold(key, true).is_err());
            drop((hold, listeners));
            TcpListener::bind(("0.0.0.0", key.port)).unwrap();
        }
    }

    #[test]
    fn a_port_in_use_is_not_held() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = hold(PortKey { protocol: Protocol::Tcp, port }, true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_held_port_of_datagrams_is_refused_to_others_and_free_after() {
        let port = UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
        let key = PortKey { protocol: Protocol::Udp, port };
        let (hold, loopback) = hold(key, true).unwrap();
        let addresses = ["0.0.0.0", "127.0.0.1", "127.0.0.2"].map(|text| text.parse().unwrap());
        let theirs = |address| SockaddrIn::from(SocketAddrV4::new(address, port));
        for address in addresses {
            for is_shared in [false, true] {
                let error = bound(Transport::Datagram, is_shared, &theirs(address)).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address} {is_shared}");
            }
        }
        let Listeners::Datagrams(sockets) = &loopback else { panic!("{loopback:?}") };
        if sockets.len() == 2 {
            for address in [Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST] {
                let address = SockaddrIn6::from(SocketAddrV6::new(address, port, 0, 0));
                let error = bound(Transport::Datagram, true, &address).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
            }
        }
        drop((hold, loopback));

        // A server that shares its address with whoever asks for it has the port all the same.
        let server = bound(Transport::Datagram, true, &theirs(addresses[2])).unwrap();
        assert_eq!(super::hold(key, true).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(server);
        super::hold(key, true).unwrap();
    }
}
