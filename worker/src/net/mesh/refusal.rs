//! What the kernel says where no socket takes a datagram: ICMP port unreachable.
//!
//! A relay has a socket all the time, so it must say it itself when nobody stands behind it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};

const UDP: u8 = 17;
const UDP_HEADER_LENGTH: u16 = 8;

/// Tells `client` that nothing listens at `server`, to which it sent a datagram on this machine.
pub(super) fn send(client: SocketAddr, server: SocketAddr) -> io::Result<()> {
    let (family, protocol) = match client {
        SocketAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        SocketAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Raw, flags, protocol)?;
    let to = SockaddrStorage::from(SocketAddr::new(client.ip(), 0));
    sendto(socket.as_raw_fd(), &message(client, server), &to, MsgFlags::empty())?;
    Ok(())
}

/// The message, with the headers that the datagram had: the kernel finds the client's socket by them.
fn message(client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let mut message = match client {
        SocketAddr::V4(_) => vec![3, 3, 0, 0, 0, 0, 0, 0],
        SocketAddr::V6(_) => vec![1, 4, 0, 0, 0, 0, 0, 0],
    };
    match (client.ip(), server.ip()) {
        (IpAddr::V4(client), IpAddr::V4(server)) => {
            let [high, low] = (20 + UDP_HEADER_LENGTH).to_be_bytes();
            message.extend([0x45, 0, high, low, 0, 0, 0, 0, 64, UDP, 0, 0]);
            message.extend([client.octets(), server.octets()].concat());
        }
        (client, server) => {
            let [high, low] = UDP_HEADER_LENGTH.to_be_bytes();
            message.extend([0x60, 0, 0, 0, high, low, UDP, 64]);
            for address in [client, server] {
                let address = match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped(),
                    IpAddr::V6(address) => address,
                };
                message.extend(address.octets());
            }
        }
    }
    message.extend(client.port().to_be_bytes());
    message.extend(server.port().to_be_bytes());
    message.extend(UDP_HEADER_LENGTH.to_be_bytes());
    message.extend([0, 0]);
    if client.is_ipv4() {
        // The kernel adds the one of ICMPv6 alone.
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// The Internet checksum (RFC 1071).
fn checksum(message: &[u8]) -> u16 {
    let words = message
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_client_hears_that_it_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run as root");
            println!("skipped: sending ICMP needs root");
            return;
        }
        for loopback in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(server) = UdpSocket::bind(loopback) else {
                println!("skipped: {loopback} is not on this machine");
                continue;
            };
            let client = UdpSocket::bind(loopback).unwrap();
            client.connect(server.local_addr().unwrap()).unwrap();
            client.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
            send(client.local_addr().unwrap(), server.local_addr().unwrap()).unwrap();
            let error = client.recv(&mut [0; 10]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{loopback}");
        }
    }
}
