//! Holding published ports on the node.
//!
//! Connections to a published port never reach a socket of the node, except over loopback: the
//! rules take them first. Without a socket that holds the port, a program could still bind it,
//! would seem to run, and would receive nothing. A [`Hold`] makes it fail as it should.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6, TcpListener};
use std::os::fd::OwnedFd;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
    SockaddrLike, bind, listen, setsockopt, socket, sockopt,
};
use skep_worker_core::mesh::PortKey;

/// Loopback connections that may wait to be accepted.
const LOOPBACK_BACKLOG: i32 = 1024;

/// A published port that no other program can bind while this value lives.
#[derive(Debug)]
pub(super) struct Hold {
    _socket: OwnedFd,
}

/// The listeners of one port for clients on the node itself that connect to loopback addresses.
#[derive(Debug)]
pub(super) struct LoopbackListeners {
    /// On 127.0.0.1, and on ::1 where the host has IPv6.
    pub(super) listeners: Vec<TcpListener>,
}

/// Holds a port on all addresses and listens on the loopback addresses.
///
/// The holding socket is bound but does not listen. It allows the reuse of its address only until
/// our own listeners are bound beside it; from then on it conflicts with everybody else's.
pub(super) fn hold(key: PortKey) -> io::Result<(Hold, LoopbackListeners)> {
    let any = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, key.port));
    let holder = bound(AddressFamily::Inet, &any)?;
    let local = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, key.port));
    let mut listeners = vec![listening(bound(AddressFamily::Inet, &local)?)?];
    let local = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::LOCALHOST, key.port, 0, 0));
    match bound(AddressFamily::Inet6, &local).and_then(listening) {
        Ok(listener) => listeners.push(listener),
        Err(error) => tracing::debug!(port = %key, %error, "not served on the loopback of IPv6"),
    }
    setsockopt(&holder, sockopt::ReuseAddr, &false)?;
    Ok((Hold { _socket: holder }, LoopbackListeners { listeners }))
}

fn bound(family: AddressFamily, address: &dyn SockaddrLike) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, SockProtocol::Tcp)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if family == AddressFamily::Inet6 {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    use std::os::fd::AsRawFd as _;
    bind(socket.as_raw_fd(), address)?;
    Ok(socket)
}

fn listening(socket: OwnedFd) -> io::Result<TcpListener> {
    listen(&socket, Backlog::new(LOOPBACK_BACKLOG)?)?;
    Ok(TcpListener::from(socket))
}

#[cfg(test)]
mod tests {
    use skep_worker_core::mesh::Protocol;

    use super::*;

    /// A port that was free a moment ago.
    fn free_port() -> u16 {
        TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_held_port_is_refused_to_others_and_free_after() {
        let key = PortKey { protocol: Protocol::Tcp, port: free_port() };
        let (hold, loopback) = hold(key).unwrap();
        for address in ["0.0.0.0", "127.0.0.1", "127.0.0.2", "[::]"] {
            // `TcpListener::bind` sets SO_REUSEADDR, as most servers do.
            let error = TcpListener::bind(format!("{address}:{}", key.port)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
        }
        assert!(super::hold(key).is_err());
        drop((hold, loopback));
        TcpListener::bind(("0.0.0.0", key.port)).unwrap();
    }

    #[test]
    fn a_port_in_use_is_not_held() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = hold(PortKey { protocol: Protocol::Tcp, port }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
