//! A port of this node that no program has.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use skep_common::spec::PortProtocol;

/// A free port of the kernel's choice, in the network namespace of the calling thread. It is not held:
/// whoever wants it takes it next.
pub fn free_port(protocol: PortProtocol) -> io::Result<u16> {
    let any = (Ipv4Addr::UNSPECIFIED, 0);
    let address = match protocol {
        PortProtocol::Udp => UdpSocket::bind(any)?.local_addr()?,
        // Numbers of SCTP are its own, and few: one that TCP has free is as good as any.
        PortProtocol::Tcp | PortProtocol::Sctp => TcpListener::bind(any)?.local_addr()?,
    };
    Ok(address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_can_be_bound() {
        let port = free_port(PortProtocol::Tcp).unwrap();
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        assert_ne!(free_port(PortProtocol::Udp).unwrap(), 0);
    }
}
