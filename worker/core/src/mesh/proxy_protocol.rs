//! The header of the PROXY protocol, version 2: who the client of a relayed connection is.
//!
//! Source: HAProxy `doc/proxy-protocol.txt`, section 2.2. All numbers are in network order.
//!
//! ```text
//!  0  0D 0A 0D 0A 00 0D 0A 51 55 49 54 0A   signature
//! 12  21                                    version 2, command PROXY
//! 13  11 or 21                              TCP over IPv4 or IPv6
//! 14  00 0C or 00 24                        bytes that follow
//! 16  source address, destination address, source port, destination port
//! ```

use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const VERSION_2_PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// The header for a connection of `client` to `server`, the address that it used.
///
/// Addresses of IPv4 in the form of IPv6 are written as what they are, where both are.
pub fn proxy_header(client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let (family, addresses) = match (client.ip().to_canonical(), server.ip().to_canonical()) {
        (IpAddr::V4(client), IpAddr::V4(server)) => {
            (TCP_OVER_IPV4, [client.octets(), server.octets()].concat())
        }
        (client, server) => {
            let octets = |address: IpAddr| match address {
                IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                IpAddr::V6(address) => address.octets(),
            };
            (TCP_OVER_IPV6, [octets(client), octets(server)].concat())
        }
    };
    let ports = [client.port().to_be_bytes(), server.port().to_be_bytes()].concat();
    let length = u16::try_from(addresses.len() + ports.len()).expect("two addresses are short");
    let mut header = SIGNATURE.to_vec();
    header.extend([VERSION_2_PROXY, family]);
    header.extend(length.to_be_bytes());
    header.extend(addresses);
    header.extend(ports);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(client: &str, server: &str, expect: &str) {
        let header = proxy_header(client.parse().unwrap(), server.parse().unwrap());
        let text: Vec<String> = header.iter().map(|byte| format!("{byte:02x}")).collect();
        let expect: Vec<&str> = expect.split_whitespace().collect();
        assert_eq!(text, expect, "{client} to {server}");
    }

    #[test]
    fn headers_are_those_of_the_specification() {
        let ipv4 = "0d 0a 0d 0a 00 0d 0a 51 55 49 54 0a 21 11 00 0c \
                    c6 33 64 07  c0 00 02 01  dd d5 1f 90";
        check("198.51.100.7:56789", "192.0.2.1:8080", ipv4);
        check("[::ffff:198.51.100.7]:56789", "[::ffff:192.0.2.1]:8080", ipv4);
        check(
            "[2001:db8::7]:56789",
            "[2001:db8:1::1]:443",
            "0d 0a 0d 0a 00 0d 0a 51 55 49 54 0a 21 21 00 24 \
             20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 07 \
             20 01 0d b8 00 01 00 00 00 00 00 00 00 00 00 01 dd d5 01 bb",
        );
        check(
            "198.51.100.7:1",
            "[2001:db8::1]:2",
            "0d 0a 0d 0a 00 0d 0a 51 55 49 54 0a 21 21 00 24 \
             00 00 00 00 00 00 00 00 00 00 ff ff c6 33 64 07 \
             20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 01 00 01 00 02",
        );
    }
}
