//! What is known of a packet before it is sent.

use std::net::Ipv4Addr;

/// The node's interface to the other nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::net) struct Interface {
    pub(in crate::net) name: String,
    pub(in crate::net) index: u32,
}

/// A UDP packet over IPv4 that begins a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::net) struct Packet {
    pub(in crate::net) source: Ipv4Addr,
    pub(in crate::net) destination: Ipv4Addr,
    /// Where it is always the same.
    pub(in crate::net) source_port: Option<u16>,
    /// Its destination port.
    pub(in crate::net) port: u16,
    pub(in crate::net) interface: Interface,
    pub(in crate::net) is_incoming: bool,
}

/// Bytes, as far as they are known.
pub(super) type Known = Vec<Option<u8>>;

const UDP: u8 = 17;
/// `NFPROTO_IPV4`.
const FAMILY: u8 = 2;
const ETHER_TYPE: u16 = 0x0800;
/// Room for an interface's name (`IFNAMSIZ`).
const NAME_LENGTH: usize = 16;

const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

const META_PROTOCOL: u32 = 1;
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

/// The bit of `NFT_CT_STATE` for a connection's first packet.
const STATE_NEW: u32 = 8;
pub(super) const CT_STATE: u32 = 0;

pub(super) fn known(bytes: &[u8]) -> Known {
    bytes.iter().copied().map(Some).collect()
}

impl Packet {
    /// Bytes of a header, as `payload` loads them.
    pub(super) fn payload(&self, base: u32, offset: usize, length: usize) -> Known {
        let mut header: Known = match base {
            NETWORK_HEADER => {
                let mut header = vec![None; 20];
                header[0] = Some(0x45); // Version 4, no options.
                header[9] = Some(UDP);
                header[12..16].copy_from_slice(&known(&self.source.octets()));
                header[16..20].copy_from_slice(&known(&self.destination.octets()));
                header
            }
            TRANSPORT_HEADER => {
                let source = self.source_port.map(|port| known(&port.to_be_bytes()));
                let source = source.unwrap_or_else(|| vec![None; 2]);
                [source, known(&self.port.to_be_bytes())].concat()
            }
            _ => Known::new(),
        };
        let end = offset.saturating_add(length);
        header.resize(header.len().max(end), None);
        header[offset..end].to_vec()
    }

    /// What `meta` loads; `None` where it is not known.
    pub(super) fn meta(&self, key: u32) -> Option<Known> {
        // A packet that comes in has no interface to go out by, and the other way round.
        let name = |is_it: bool| {
            let mut name =
                if is_it { self.interface.name.clone().into_bytes() } else { Vec::new() };
            name.resize(NAME_LENGTH, 0);
            name
        };
        let index = |is_it: bool| if is_it { self.interface.index } else { 0 }.to_ne_bytes();
        let bytes = match key {
            META_PROTOCOL => ETHER_TYPE.to_be_bytes().to_vec(),
            META_IIF => index(self.is_incoming).to_vec(),
            META_OIF => index(!self.is_incoming).to_vec(),
            META_IIFNAME => name(self.is_incoming),
            META_OIFNAME => name(!self.is_incoming),
            META_NFPROTO => vec![FAMILY],
            META_L4PROTO => vec![UDP],
            _ => return None,
        };
        Some(known(&bytes))
    }

    /// The state of its connection, as `ct` loads it.
    pub(super) fn state() -> Known {
        known(&STATE_NEW.to_ne_bytes())
    }
}
